"""Image manifests of folders, and those that others wrote."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from oras import schemas
from qwen_common.errors import UserError
from qwen_common.manifest import FileEntry
from qwen_runtime.registry import image

ENTRY: FileEntry = {"size": 3, "sha256": "0a" * 32}
TITLE = "org.opencontainers.image.title"


def layer(title: Any, **changes: Any) -> dict[str, Any]:
    fields = {"mediaType": "x/y", "digest": f"sha256:{ENTRY['sha256']}", "size": 3}
    return fields | {"annotations": {TITLE: title}} | changes


def manifest(*layers: Any) -> bytes:
    return json.dumps({"schemaVersion": 2, "layers": layers}).encode()


def test_there_and_back() -> None:
    files = {"b.json": ENTRY, "a.onnx.data": ENTRY, "c": ENTRY, "Größe.md": ENTRY}
    data = image.build(files, {"x": "y"})
    assert image.read(data, "oci://a/b:1") == files
    content = json.loads(data)
    jsonschema.validate(content, schemas.manifest)
    assert content["artifactType"] == "application/vnd.qwen-edge.artifact.v1"
    # the specification's own figures for an empty configuration
    assert content["config"] == {
        "mediaType": "application/vnd.oci.empty.v1+json",
        "digest": "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
        "size": 2,
    }
    types = {one["annotations"][TITLE]: one["mediaType"] for one in content["layers"]}
    assert types["b.json"] == "application/json" and types["a.onnx.data"] == "application/octet-stream"
    assert image.build(dict(reversed(files.items())), {"x": "y"}) == data


REFUSED = [
    *("", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", "C:x", "C:\\x", "a:b", "x.", "x ", "x" * 201),
    *("CON", "nul.txt", "Com1", "lpt9.x", "COM¹", "conout$"),
    *("a\0b", "a\nb", "a\x1b[2Jb", "a*", "a?", "<a>", '"', "|", "\ud800"),
]


@pytest.mark.parametrize("title", REFUSED)
def test_names_that_no_folder_should_get(title: str) -> None:
    with pytest.raises(UserError, match="whose name no folder should get") as caught:
        image.read(manifest(layer(title)), "oci://a/b:1")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", [".gitattributes", "com", "console.json", "a b", "..x", "x" * 200, "nulx"])
def test_names_that_are_right(name: str) -> None:
    assert image.read(manifest(layer(name)), "oci://a/b:1") == {name: ENTRY}


@pytest.mark.parametrize("other", ["a.json", "A.JSON", "Å", "Å".lower()])
def test_the_same_name_twice(other: str) -> None:
    first = "a.json" if other.lower() == "a.json" else "Å"
    with pytest.raises(UserError, match="a file twice"):
        image.read(manifest(layer(first), layer(other)), "oci://a/b:1")


@pytest.mark.parametrize(
    "data,why",
    [
        (b"{}", "is no image manifest"),
        (b"[]", "not a JSON object"),
        (b"\xff", "not valid JSON"),
        (b'{"layers": [], "layers": []}', "not valid JSON"),
        (b'{"layers": {}}', "is no image manifest"),
        (b'{"manifests": []}', "is an index of several"),
        (manifest(layer(None)), "a layer without a name"),
        (manifest(layer(7)), "a layer without a name"),
        (manifest("x"), "a layer without a name"),
        (manifest(layer("a", annotations=[])), "a layer without a name"),
        (manifest(layer("a", digest="md5:00")), "no valid size and SHA-256 of a"),
        (manifest(layer("a", digest=f"sha256:{'0A' * 32}")), "no valid size and SHA-256 of a"),
        (manifest(layer("a", digest=None)), "no valid size and SHA-256 of a"),
        (manifest(layer("a", size=-1)), "no valid size and SHA-256 of a"),
        (manifest(layer("a", size=True)), "no valid size and SHA-256 of a"),
        (manifest(layer("a", size="3")), "no valid size and SHA-256 of a"),
    ],
)
def test_what_is_none(data: bytes, why: str) -> None:
    with pytest.raises(UserError, match=why):
        image.read(data, "oci://a/b:1")
