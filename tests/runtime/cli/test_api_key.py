"""The server's key from a file, which nobody sees in the list of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from qwen_runtime.cli import main


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the server is started with."""
    options: dict[str, Any] = {}
    monkeypatch.setattr("qwen_runtime.serve.server.serve", lambda settings, **given: options.update(given))
    return options


def serve(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(main, ["serve", "artifact", *arguments], env=environment)


def test_a_key_in_a_file(told: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sesame\n")
    key = str(tmp_path / "key")
    for arguments, environment in (
        (("--api-key-file", key), {}),
        ((), {"QWEN_EDGE_API_KEY_FILE": key}),
        ((), {"QWEN_EDGE_API_KEY": "sesame"}),
    ):
        done = serve(*arguments, **environment)
        assert (done.exit_code, told.pop("api_key")) == (0, "sesame"), done.output


@pytest.mark.parametrize(
    "content,message",
    [
        (b"", "has no API key"),
        (b"\n", "has no API key"),
        (b"one\ntwo\n", "has more than one API key"),
        (b"\xff", "cannot read an API key"),
        (None, "cannot read an API key"),
    ],
)
def test_what_is_no_key(told: dict[str, Any], content: bytes | None, message: str, tmp_path: Path) -> None:
    """Nothing is served without a key that was asked for."""
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    done = serve("--api-key-file", str(path))
    assert done.exit_code == 2 and message in done.output and not told


def test_two_keys(told: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sesame\n")
    done = serve("--api-key-file", str(tmp_path / "key"), QWEN_EDGE_API_KEY="other")
    assert done.exit_code == 2 and "leave one off" in done.output and not told
