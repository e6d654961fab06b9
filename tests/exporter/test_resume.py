"""Killed exports: nothing they leave is taken for an artifact, and the next one goes on with their work."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import time
from pathlib import Path

import onnxruntime_genai as og
import pytest
from qwen_common.errors import UserError
from qwen_export.backends.onnx.resume import Journal
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.export import export
from qwen_profiles.schema import load_profile
from qwen_runtime.artifact import Artifact

from benchmarks.geometry import write_checkpoint
from benchmarks.support.artifacts import Quiet, make_artifact
from benchmarks.support.checkpoints import TINY
from tests.support.exported import Exported
from tests.support.files import hashes

# Six entries in the journal, which has one for every 32 MiB.
GEOMETRY = {
    "vocab_size": 20_000,
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 3072,
    "linear_num_value_heads": 16,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), GEOMETRY)


def start(checkpoint: Path, output: Path) -> multiprocessing.Process:
    """An export in a process of its own, which begins with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.support.artifacts"])
    process = context.Process(target=make_artifact, args=(checkpoint, load_profile("cpu"), output, False))
    process.start()
    return process


def written(output: Path) -> int:
    """Bytes of the weights that are in the unfinished artifact's file; it has its full length at once."""
    data = output.parent / f".{output.name}.partial" / "artifact" / "model.onnx.data"
    return 512 * data.stat().st_blocks if data.exists() else 0


def kill(process: multiprocessing.Process, output: Path, count: float, seconds: float) -> bool:
    """Kill it `seconds` after `count` bytes were written; whether it was still running."""
    while process.is_alive() and written(output) < count:
        time.sleep(0.001)
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode != 0


def test_unfinished_export_of_something_else(checkpoint: Path, exported: Exported, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert kill(start(checkpoint, output), output, 1, 0)
    progress = Quiet()
    export(Checkpoint.open(str(TINY)), load_profile("cpu"), output, progress)
    assert progress.notes[-1] == "an earlier export of something else did not finish: starting over"
    assert hashes(output) == hashes(exported(TINY, load_profile("cpu")))


@pytest.mark.parametrize("most", [4, pytest.param(14, marks=pytest.mark.slow)])
def test_killed_at_random_moments(most: int, checkpoint: Path, tmp_path: Path) -> None:
    """Exports killed with SIGKILL, each carried on by one that ends with the same bytes."""
    process = start(checkpoint, tmp_path / "whole")
    started = time.perf_counter()
    process.join()
    duration = time.perf_counter() - started
    expected = hashes(tmp_path / "whole")
    size = (tmp_path / "whole" / "model.onnx.data").stat().st_size
    draw = random.Random(0).uniform
    # Most by the work that is done: the same moment of the clock comes early where other programs run too.
    moments = [(draw(0, 1) * size, 0.0) for _ in range(most)]
    moments += [(count, draw(0, 0.1) * duration) for count in (most // 4) * (0, size)]
    killed = resumed = 0
    for attempt, (count, seconds) in enumerate(moments):
        output, work = tmp_path / f"out{attempt}", tmp_path / f".out{attempt}.partial"
        killed += kill(start(checkpoint, output), output, count, seconds)
        if not output.exists():
            for folder in (output, work, work / "artifact"):
                with pytest.raises(UserError):
                    Artifact.open(folder)
                with pytest.raises(Exception):  # noqa: B017 - whatever ONNX Runtime GenAI raises
                    og.Model(str(folder))
            progress = Quiet()
            export(Checkpoint.open(str(checkpoint)), load_profile("cpu"), output, progress)
            resumed += any("going on after" in note and " 0 weights" not in note for note in progress.notes)
        assert hashes(output) == expected
        shutil.rmtree(output)
    assert killed >= len(moments) / 2
    assert resumed >= len(moments) / 4


@pytest.mark.parametrize("damage", [b'"c', b"\0\0\0\n", b"\xff\n", b'{"a\n"d"\n', b"\n"])
def test_a_damaged_journal_counts_up_to_its_damage(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'"a"\n"b"\n' + damage)
    assert Journal(path).done == {"a", "b"}
