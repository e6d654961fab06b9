"""A user's mistake is one line on stderr, whatever its names hold."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from qwen_common.errors import INTERNAL_ERROR, USER_ERROR, UserError, one_line, reported


@pytest.mark.parametrize(
    "text,shown",
    [
        ("no folder Modèle 模型　1: export it", "no folder Modèle 模型　1: export it"),
        ("two  spaces\u00a0kept", "two  spaces\u00a0kept"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[2J\0", r"\x1b[2J\x00"),
        ("\u2028\ud800", r"\u2028\ud800"),
    ],
)
def test_one_line(text: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert one_line(text) == shown
    with pytest.raises(SystemExit) as ended, reported(debug=False):
        raise UserError(text)
    assert ended.value.code == USER_ERROR
    assert capsys.readouterr().err == f"error: {shown}\n"


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.EACCES, "allow this user to do that, or choose another place"),
        (errno.EROFS, "it is read-only: choose another place"),
        (errno.ENAMETOOLONG, "choose a shorter name"),
        (errno.ENOTDIR, "a part of the path is a file and no folder: choose another place"),
        (errno.ENXIO, "connect the device, or choose another place"),
        (errno.ENOSPC, "make room for it"),
    ],
)
@pytest.mark.parametrize("path", [Path("/some/file"), b"/some/file", None, 3])
def test_what_the_system_says_of_a_file(
    code: int, advice: str, path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, reported(debug=False):
        raise OSError(code, os.strerror(code), path) if path else OSError(code, os.strerror(code))
    assert ended.value.code == USER_ERROR
    where = "" if path in (None, 3) else "/some/file: "
    where = f"cannot write: {where}" if code == errno.ENOSPC else where
    assert capsys.readouterr().err == f"error: {where}{os.strerror(code)}: {advice}\n"


def test_what_the_system_says_for_our_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, reported(debug=False):
        os.close(10_000)
    assert ended.value.code == INTERNAL_ERROR
    assert capsys.readouterr().err.startswith("internal error: OSError: ")
