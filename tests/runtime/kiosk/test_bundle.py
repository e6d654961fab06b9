"""A bundle's list of contents: versions in their order, and what is signed and still no list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version
from qwen_common.errors import UserError
from qwen_export.bundle.assemble import seal
from qwen_export.bundle.keys import make_keys, sign
from qwen_launcher.bundle import CONTENTS, MOST_BYTES, SIGNATURE, Bundle
from qwen_runtime.kiosk.versions import version_key

from tests.support import small_kiosk

FACTS = {**small_kiosk.FACTS, "version": "1.2"}


@pytest.mark.parametrize(
    "older,newer",
    [
        ("1.9", "1.10"),
        ("2026.11.05.080910", "2026.11.23.101500"),
        ("1.0rc1", "1.0"),
        ("1.0", "1.0.post1"),
        ("2026.1", "1!1.0"),
    ],
)
def test_versions_in_their_order(older: str, newer: str) -> None:
    assert version_key(older) < version_key(newer)
    assert version_key(newer) == Version(newer)


@pytest.mark.parametrize(
    "text", ["", "1..2", "one", "1.2/../..", "../1", " 1.2", "1.2\n", "1,2", "１.２", "1." * 40 + "1"]
)
def test_what_is_no_version(text: str) -> None:
    with pytest.raises(UserError, match="is not a version: write numbers with dots between them"):
        version_key(text)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"format_version": 1}, "has bundle format 1"),
        ({"version": 1.2}, "has no valid 'version'"),
        ({"version": "../../etc"}, "'../../etc' is not a version"),
        ({"version": "1.0\n"}, "is not a version"),
        ({"self_test": {"prompt": "Hello", "tokens": ["1"]}}, "has no valid 'self_test.tokens.0'"),
        ({"files": {"a": {"size": "1", "sha256": "0"}}}, "has no valid 'files.a.size'"),
        ({"files": []}, "has no valid 'files'"),
        ({"files": {"../a": {"size": 1, "sha256": "0"}}}, "names a file outside the folder, ../a"),
        ({"files": {"/a": {"size": 1, "sha256": "0"}}}, "names a file outside the folder, /a"),
        ({"files": {"C:a": {"size": 1, "sha256": "0"}}}, "names a file outside the folder, C:a"),
        (None, "is not a JSON object"),
    ],
)
def test_what_is_signed_and_malformed(change: dict[str, Any] | None, message: str, tmp_path: Path) -> None:
    key, folder = tmp_path / "kiosk.key", tmp_path / "bundle"
    public = make_keys(key)
    folder.mkdir()
    contents = seal(folder, FACTS, key)
    assert Bundle.open(folder, public).contents["version"] == "1.2"
    data = json.dumps(["bundle"] if change is None else contents | change).encode()
    (folder / CONTENTS).write_bytes(data)
    (folder / SIGNATURE).write_bytes(sign(data, key))
    with pytest.raises(UserError, match=message):
        Bundle.open(folder, public)


@pytest.mark.parametrize("name,most", [(CONTENTS, MOST_BYTES), (SIGNATURE, 1024)])
def test_a_list_without_end(name: str, most: int, tmp_path: Path) -> None:
    """What is not known to be signed is not read whole."""
    key, folder = tmp_path / "kiosk.key", tmp_path / "bundle"
    public = make_keys(key)
    folder.mkdir()
    seal(folder, FACTS, key)
    with (folder / name).open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(UserError, match=f"{name} is larger than {most} bytes"):
        Bundle.open(folder, public)
