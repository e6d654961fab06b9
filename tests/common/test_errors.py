"""A user's mistake is one line on stderr, whatever its names hold."""

from __future__ import annotations

import pytest
from qwen_common.errors import USER_ERROR, UserError, one_line, reported


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
