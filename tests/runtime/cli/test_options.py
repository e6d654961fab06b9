"""Mistakes in options are told before a model is loaded, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from qwen_common.errors import UserError
from qwen_runtime import Model
from qwen_runtime.bench import fitting
from qwen_runtime.cli import main

USER_ERROR = 2


@pytest.fixture(autouse=True)
def _never_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Model, "load_with", lambda *given: pytest.fail("it was loaded"))


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["", "Hi"], "it is empty"),
        (["serve", ""], "it is empty"),
        (["bench", ""], "it is empty"),
        (["ARTIFACT", "Hi", "--prepacked-dir", ""], "it is empty"),
        (["serve", "ARTIFACT", "--state-dir", ""], "it is empty"),
        (["ARTIFACT", "Hi", "--image", "nosuch.png"], "'nosuch.png' does not exist"),
        (["ARTIFACT", "Hi", "--video", "nosuch.mp4"], "'nosuch.mp4' does not exist"),
        (["ARTIFACT", "Hi", "--max-image-tokens", "0"], "0 is not in the range"),
        (["ARTIFACT", "Hi", "--video-frames", "0"], "0 is not in the range"),
        (["ARTIFACT", "Hi", "--template-arg", "messages=[]"], "messages is what the conversation says"),
        (["ARTIFACT", "Hi", "--raw", "--system", ""], "--raw uses no chat template"),
        (["ARTIFACT", "Hi", "--raw", "--think"], "--raw uses no chat template"),
        (["ARTIFACT", "Hi", "--raw", "--template-arg", "a=1"], "--raw uses no chat template"),
        (["ARTIFACT", "\udcff"], "the prompt is not valid UTF-8"),
        (["ARTIFACT", "Hi", "--system", "\udcff"], "the system message is not valid UTF-8"),
        (["bench", "ARTIFACT", "--plot", "speed"], "name a file, such as speed.png"),
        (["bench", "ARTIFACT", "--plot", "."], "name a file, such as speed.png"),
        (["bench", "ARTIFACT", "--plot", "nosuch/speed.png"], "no folder nosuch for the plot"),
        (["serve", "ARTIFACT", "--unload-after", "nan"], "nan is not a finite number"),
        (["serve", "ARTIFACT", "--state-disk", "inf"], "inf is not a finite number"),
        (["serve", "ARTIFACT", "--state-memory", "nan"], "nan is not a finite number"),
        (["serve", "ARTIFACT", "--image-megapixels", "inf"], "inf is not a finite number"),
    ],
)
def test_refused_before_anything_is_done(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "ARTIFACT").mkdir()
    found = CliRunner().invoke(main, arguments)
    assert found.exit_code == USER_ERROR, found.output
    assert message in found.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["ARTIFACT"]


def test_more_tokens_than_the_context() -> None:
    with pytest.raises(UserError, match="choose fewer --tokens"):
        fitting(None, -5)
