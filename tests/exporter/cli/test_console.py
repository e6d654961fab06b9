"""What is printed is data: markup and commands of a terminal in it do nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from qwen_export.cli import main
from qwen_export.cli.console import PlainConsole
from qwen_export.cli.shared import typed
from rich.table import Table
from safetensors.numpy import save_file

from benchmarks.support.checkpoints import TINY
from tests.support.random_checkpoints import write_random_checkpoint

NAME = "[/x][bold]a[/bold] :smile: \x1b[31m\r"
SHOWN = r"[/x][bold]a[/bold] :smile: \x1b[31m\r"


def test_markup_and_commands_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    console = PlainConsole()
    table = Table(NAME, title=NAME, caption=NAME)
    table.add_row(f"{NAME}\nx")
    console.print(table, NAME)
    printed = capsys.readouterr().out
    assert printed.count(SHOWN) == 5 and "\x1b" not in printed


def test_names_of_tensors_and_folders_are_printed_as_they_are(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "[bold]m")
    shutil.move(checkpoint / "model.safetensors", checkpoint / "model-1.safetensors")
    save_file({NAME: np.zeros(1, np.float32)}, checkpoint / "model-2.safetensors")
    weights = {"model.norm.weight": "model-1.safetensors", NAME: "model-2.safetensors"}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    output = tmp_path / "[" / "a b]"
    done = CliRunner().invoke(
        main, ["--profile", "cpu", str(checkpoint), "-o", str(output), "--no-verify"], env={"COLUMNS": "400"}
    )
    assert done.exit_code == 0, done.output
    assert SHOWN in done.stderr and "\x1b[31m" not in done.output
    assert done.stdout.endswith(f'next: qwen-run "{output}" "Hello"\n')


def test_paths_that_can_be_typed() -> None:
    assert typed(Path("a/b-1.2@x")) == "a/b-1.2@x"
    assert typed(Path("a b")) == '"a b"'


def test_a_path_that_stdout_cannot_encode(tmp_path: Path) -> None:
    output = tmp_path / "é日"
    done = CliRunner(charset="ascii").invoke(
        main, ["--profile", "cpu", str(TINY), "-o", str(output), "--no-verify"]
    )
    assert done.exit_code == 0, done.output
    assert r"\xe9\u65e5" in done.stdout and (output / "manifest.json").is_file()
