"""Names in registries."""

from __future__ import annotations

import pytest
from qwen_common.errors import UserError
from qwen_runtime.registry.reference import Reference

DIGEST = "sha256:" + "0a" * 32


@pytest.mark.parametrize(
    "text,url,version",
    [
        ("oci://registry.example/a:1", "https://registry.example/v2/a", "1"),
        (
            "oci://registry.example:8443/team/a_b/c-d:V1.2_x",
            "https://registry.example:8443/v2/team/a_b/c-d",
            "V1.2_x",
        ),
        (f"oci://registry.example/a@{DIGEST}", "https://registry.example/v2/a", DIGEST),
        (f"oci://registry.example/a:1@{DIGEST}", "https://registry.example/v2/a", DIGEST),
        ("oci://docker.io/team/a:1", "https://registry-1.docker.io/v2/team/a", "1"),
        ("oci://localhost:5000/a:1", "http://localhost:5000/v2/a", "1"),
        ("oci://127.0.0.1/a:1", "http://127.0.0.1/v2/a", "1"),
        ("oci://[::1]:5000/a:1", "http://[::1]:5000/v2/a", "1"),
        ("oci://[fd00::1]/a:1", "https://[fd00::1]/v2/a", "1"),
        ("oci://10.0.0.1:5000/a:1", "https://10.0.0.1:5000/v2/a", "1"),
        ("oci://localhost.example/a:1", "https://localhost.example/v2/a", "1"),
    ],
)
def test_what_they_mean(text: str, url: str, version: str) -> None:
    reference = Reference.parse(text)
    assert (reference.url(plain_http=False), reference.version, str(reference)) == (url, version, text)
    assert reference.url(plain_http=True) == url.replace("https:", "http:")


@pytest.mark.parametrize(
    "text",
    [
        "registry.example/a:1",
        "https://registry.example/a:1",
        "oci://registry.example",
        "oci://registry.example/",
        "oci://registry.example/Team/a:1",
        "oci://registry.example/../a:1",
        "oci://registry.example/a//b:1",
        "oci://registry.example/a:",
        "oci://registry.example/a:-1",
        "oci://registry.example/a@sha256:abc",
        "oci://registry.example/a@md5:d41d8cd98f00b204e9800998ecf8427e",
        "oci://user:password@registry.example/a:1",
        "oci://registry.example/a:1?x=y",
        "oci://registry.example/a:1\n",
        "oci://regis try.example/a:1",
    ],
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(UserError, match=r"names nothing in a registry: write oci://") as caught:
        Reference.parse(text)
    assert "\n" not in str(caught.value)


def test_neither_tag_nor_digest() -> None:
    with pytest.raises(UserError, match="neither tag nor digest"):
        Reference.parse("oci://registry.example/a")
