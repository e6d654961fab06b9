"""Replacement in one step, digests, and JSON whose errors are one line."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Literal

import pytest
from qwen_common import files
from qwen_common.errors import UserError
from qwen_common.shape import first_fault


def test_sha256(tmp_path: Path) -> None:
    """The example of FIPS 180-2, and a file of several blocks."""
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256(tmp_path / "abc") == expected
    content = os.urandom(3_000_001)
    (tmp_path / "large").write_bytes(content)
    assert files.sha256(tmp_path / "large") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_the_old_file_stays_when_a_replacement_is_interrupted(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "current"
    files.replace(path, b"old")

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            files.replace(path, b"new")
    assert path.read_bytes() == b"old"
    assert {entry.name for entry in tmp_path.iterdir()} == {"current", files.partial(path).name}
    files.replace(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_bytes_are_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (steps.append("fsync"), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda *paths: (steps.append("replace"), replace(*paths)))
    files.replace(tmp_path / "file", b"x")
    assert steps == ["fsync", "replace"]


def test_what_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=r"cannot read .*: copy it again$"):
            files.read_json(path, "copy it again")


@pytest.mark.parametrize(
    "value,kind,fault",
    [
        (1, int, None),
        (True, int, ""),
        (1.0, int, ""),
        (None, str | None, None),
        (1, str | None, ""),
        ([1, 2], list[int], None),
        ([1, "2"], list[int], "1"),
        ([1], int | list[int], None),
        ({"a": {"b": 1}}, dict[str, dict[str, int]], None),
        ({"a": {"b": "1"}}, dict[str, dict[str, int]], "a.b"),
        ([], dict[str, int], ""),
        ("a", Literal["a", "b"], None),
        ("c", Literal["a", "b"], ""),
        ([], Literal["a", "b"], ""),
    ],
)
def test_first_fault(value: object, kind: object, fault: str | None) -> None:
    assert first_fault(value, kind) == fault


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="the system has no such links")
def test_a_link_where_bytes_are_written_first_is_not_followed(tmp_path: Path) -> None:
    """Who may write into a folder could else have somebody with more rights overwrite any file."""
    victim, path = tmp_path / "victim", tmp_path / "file"
    victim.write_text("mine")
    files.partial(path).symlink_to(victim)
    with pytest.raises(OSError):
        files.replace(path, b"evil")
    assert victim.read_text() == "mine"
