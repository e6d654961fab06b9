"""Saved prepacked weights: the same answers, mapped and not copied, and never taken where they are wrong."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from qwen_common.errors import UserError
from qwen_profiles.schema import load_profile
from qwen_runtime import Model, Sampling, StateSettings

from benchmarks.support.artifacts import directml_profile
from benchmarks.support.checkpoints import TINY, TINY_MOE, TINY_VL
from tests.support.exported import Exported

_IDS = list(range(5, 45))


def logprobs(artifact: Path, **options: object) -> np.ndarray:
    with Model.load(artifact, "cpu", **options) as model:  # type: ignore[arg-type]
        return model.logprobs(_IDS)


@pytest.mark.parametrize("checkpoint", [TINY, TINY_MOE, TINY_VL], ids=lambda path: path.name)
def test_answers_are_the_same(checkpoint: Path, exported: Exported, tmp_path: Path) -> None:
    artifact = exported(checkpoint, load_profile("cpu"))
    plain = logprobs(artifact)
    assert np.array_equal(logprobs(artifact, prepacked=tmp_path), plain)
    (home,) = tmp_path.iterdir()
    written = (home / "model.onnx.data").stat().st_mtime_ns
    assert np.array_equal(logprobs(artifact, prepacked=tmp_path), plain)
    assert np.array_equal(logprobs(artifact, prepacked=tmp_path, states=StateSettings()), plain)
    assert (home / "model.onnx.data").stat().st_mtime_ns == written
    with Model.load(artifact, prepacked=tmp_path) as model:
        assert model.generate("a = ", max_tokens=4, sampling=Sampling(temperature=0)).run()


def test_another_layout_is_not_taken_and_damage_is_refused(cpu_artifact: Path, tmp_path: Path) -> None:
    plain = logprobs(cpu_artifact, prepacked=tmp_path)
    (home,) = tmp_path.iterdir()
    graph = (home / "model.onnx").read_bytes()
    assert b"MatMulNBits+" in graph
    (home / "model.onnx").write_bytes(graph.replace(b"MatMulNBits+", b"MatMulNBits-"))
    assert np.array_equal(logprobs(cpu_artifact, prepacked=tmp_path), plain)
    (home / "model.onnx").write_bytes(graph)
    saved = re.search(rb"MatMulNBits\+\d+\|(\d+);", graph)
    assert saved is not None
    data = home / "model.onnx.data"
    whole = data.read_bytes()
    damage(data, int(saved[1]))  # repacked weights
    for options in ({}, {"states": StateSettings()}, {"verify": True}):
        with pytest.raises(UserError, match=f"damaged: delete {home}"):
            Model.load(cpu_artifact, prepacked=tmp_path, **options)
    data.write_bytes(whole)
    damage(data, 0)  # a weight as it was
    with pytest.raises(UserError, match=f"damaged: delete {home}"):
        Model.load(cpu_artifact, prepacked=tmp_path, verify=True)
    for wrong in (whole[:-1], None):
        data.unlink() if wrong is None else data.write_bytes(wrong)
        with pytest.raises(UserError, match=f"damaged: delete {home}"):
            Model.load(cpu_artifact, prepacked=tmp_path)
    shutil.rmtree(home)
    assert np.array_equal(logprobs(cpu_artifact, prepacked=tmp_path), plain)


def damage(file: Path, at: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(at)
        opened.write(b"\x55" * 64)


def test_what_cannot_be_written_is_said(
    cpu_artifact: Path, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="for the CPU"):
        Model.load(exported(TINY, directml_profile()), prepacked=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="no prepacked weights can be kept"):
        Model.load(cpu_artifact, prepacked=tmp_path / "file")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match=r"prepacked weights need 0\.0 GB"):
        Model.load(cpu_artifact, prepacked=tmp_path)


def test_what_a_killed_process_left_is_removed(cpu_artifact: Path, tmp_path: Path) -> None:
    logprobs(cpu_artifact, prepacked=tmp_path)
    (home,) = tmp_path.iterdir()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    # Our own number is that of a process before us: containers give the same ones again.
    made_by = (ended.pid, os.getpid(), os.getppid())
    left, ours, busy = (tmp_path / f".{home.name}.{pid}.partial" for pid in made_by)
    for folder in (left, ours, busy):
        folder.mkdir()
    shutil.rmtree(home)
    logprobs(cpu_artifact, prepacked=tmp_path)
    assert home.is_dir() and busy.is_dir() and not left.exists() and not ours.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="names are Unicode there")
def test_names_of_folders(cpu_artifact: Path, tmp_path: Path) -> None:
    """ONNX Runtime GenAI is told of the graph in JSON, and takes no name that is not Unicode."""
    plain = logprobs(cpu_artifact)
    assert np.array_equal(logprobs(cpu_artifact, prepacked=tmp_path / 'é "\\ \U0001f600'), plain)
    unwritten = tmp_path / "\udcff"
    for path, options in ((unwritten, {}), (cpu_artifact, {"prepacked": unwritten})):
        with pytest.raises(UserError, match=r"udcff.* is not valid UTF-8: rename it"):
            Model.load(path, "cpu", **options)
    assert not unwritten.exists()
