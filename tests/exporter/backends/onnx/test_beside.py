"""Adapters for an artifact that is there. That answers are PEFT's is in tests/runtime/test_switched.py."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from qwen_common.errors import UserError
from qwen_export.adapters.switched import with_switched_adapters
from qwen_export.backends.onnx.beside import write_beside
from qwen_export.checkpoint import Checkpoint
from qwen_export.cli import main
from qwen_export.export import export

from benchmarks.support.artifacts import Quiet, float_profile
from tests.support.random_checkpoints import write_random_checkpoint

if TYPE_CHECKING:
    from tests.support.adapters import Adapted


def test_the_command_writes_what_an_export_does(adapted: Adapted, tmp_path: Path) -> None:
    base = str(adapted.folder / "base")
    for name, weight in (("style", "=0.5"), ("tools", "")):
        given = ["adapter", str(adapted.artifact), f"{adapted.folder / name}{weight}", "--against", base]
        found = CliRunner().invoke(main, [*given, "-o", str(tmp_path / "out")])
        assert (found.exit_code, found.stdout) == (0, f"{tmp_path / 'out' / name}.onnx_adapter\n"), (
            found.stderr
        )
        written = tmp_path / "out" / f"{name}.onnx_adapter"
        assert written.read_bytes() == (adapted.artifact / written.name).read_bytes()
    again = CliRunner().invoke(main, [*given, "-o", str(tmp_path / "out")])
    assert again.exit_code == 2 and "tools.onnx_adapter is there already" in again.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "style.onnx_adapter",
        "tools.onnx_adapter",
    ]


def test_what_does_not_fit(adapted: Adapted, cpu_artifact: Path, tmp_path: Path) -> None:
    base, words = Checkpoint.open(str(adapted.folder / "base")), str(adapted.folder / "words")
    out = tmp_path / "out"
    with pytest.raises(UserError, match="takes no adapters at run time"):
        write_beside(cpu_artifact, base, [words], out)
    other = Checkpoint.open(str(write_random_checkpoint(tmp_path / "other", intermediate_size=128)))
    with pytest.raises(UserError, match="the adapter is for another model"):
        write_beside(adapted.artifact, other, [words], out)
    few = shutil.copytree(adapted.folder / "words", tmp_path / "few")
    profile = float_profile("fused")
    export(
        with_switched_adapters(base, [str(adapted.folder / "style")], profile),
        profile,
        tmp_path / "a",
        Quiet(),
    )
    with pytest.raises(UserError, match=r"^few\.onnx_adapter changes .*down_proj.* export the artifact"):
        write_beside(tmp_path / "a", base, [str(few)], out)
    assert not out.exists() or not list(out.iterdir())
