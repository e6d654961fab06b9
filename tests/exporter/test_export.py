"""Exports end to end: what they write, what stops them, and what a killed one leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from filelock import FileLock
from qwen_common.errors import UserError
from qwen_export.backends.onnx.graphs import build_graphs
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.cli import main
from qwen_export.export import export
from qwen_profiles.schema import load_profile, parse_profile
from qwen_runtime.artifact import Artifact
from qwen_runtime.cores import find_cores
from qwen_runtime.model import Model

from benchmarks.geometry import write_checkpoint
from benchmarks.support.artifacts import Quiet, float_profile, make_artifact
from benchmarks.support.checkpoints import TINY
from tests.support.files import hashes
from tests.support.random_checkpoints import load_tensors, save_shards, write_random_checkpoint

MEDIUM = {
    "vocab_size": 60_000,
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 3072,
    "linear_num_value_heads": 16,
    "tie_word_embeddings": False,
}


def command(checkpoint: Path, output: Path) -> list[str]:
    arguments = ["--profile", "cpu", str(checkpoint), "-o", str(output), "--no-progress", "--no-verify"]
    return [sys.executable, "-c", "from qwen_export.cli import main; main()", *arguments]


@pytest.mark.parametrize("profile", ["cpu", "strix-halo"])
def test_artifact_is_what_its_manifest_says(profile: str, tmp_path: Path) -> None:
    output = make_artifact(TINY, load_profile(profile), tmp_path / "out", all_logits=False)
    manifest = Artifact.open(output, verify=True).manifest
    assert set(manifest["files"]) == {path.name for path in output.iterdir()} - {"manifest.json"}
    assert manifest["model"] == {"name": "tiny-dense", "model_type": "qwen3_5_text"}
    assert manifest["profile"] == profile
    assert str(TINY.parent) not in (output / "manifest.json").read_text()
    graphs = build_graphs(Checkpoint.open(str(TINY)), load_profile(profile))
    assert manifest["files"]["model.onnx.data"]["size"] == graphs.data_bytes
    assert sum(manifest["bytes_by_role"].values()) <= graphs.data_bytes
    assert not list(tmp_path.glob(".*"))
    session = json.loads((output / "genai_config.json").read_text())["model"]["decoder"]["session_options"]
    expected = {"cpu": [], "strix-halo": [{"AMDGPU": {"profile": "hip"}}]}
    assert session["provider_options"] == expected[profile]


@pytest.mark.parametrize(
    "settings, options, count, spin_us",
    [
        (
            ["threads=1", "spin_us=0"],
            {"intra_op_num_threads": 1, "session.intra_op.allow_spinning": "0"},
            1,
            0,
        ),
        (
            ["threads=1", "spin_us=50"],
            {"intra_op_num_threads": 1, "session.intra_op.spin_duration_us": "50"},
            1,
            50,
        ),
        (["threads=performance"], {"intra_op_num_threads": 0}, len(find_cores().performance), None),
    ],
)
def test_threads_of_a_profile(
    settings: list[str], options: dict[str, Any], count: int, spin_us: int | None, tmp_path: Path
) -> None:
    output = make_artifact(TINY, load_profile("cpu", settings), tmp_path / "out", all_logits=False)
    session = json.loads((output / "genai_config.json").read_text())["model"]["decoder"]["session_options"]
    assert session == options | {"provider_options": []}
    with Model.load(output, "cpu") as model:
        assert model.info.threads is not None and model.info.threads.count == count
        assert model.info.threads.spin_us == spin_us and "by the artifact" in model.info.placed


def test_tied_embedding_is_stored_once(tmp_path: Path) -> None:
    for profile in map(load_profile, ("cpu", "strix-halo")):
        tied = build_graphs(Checkpoint.open(str(write_random_checkpoint(tmp_path / "tied"))), profile)
        untied_folder = write_random_checkpoint(tmp_path / "untied", tie_word_embeddings=False)
        untied = build_graphs(Checkpoint.open(str(untied_folder)), profile)
        assert "embedding" not in tied.bytes_by_role()
        assert untied.bytes_by_role()["embedding"] == untied.bytes_by_role()["lm_head"]


def test_sharded_and_wrapped_checkpoints_give_the_same_weights(tmp_path: Path) -> None:
    found = set()
    for shards, wrap in [(1, False), (3, False), (2, True)]:
        folder = write_random_checkpoint(tmp_path / f"{shards}{wrap}", shards=shards, wrap=wrap)
        output = make_artifact(folder, load_profile("cpu"), tmp_path / f"out{shards}{wrap}")
        found.add(hashes(output)["model.onnx.data"])
    assert len(found) == 1


def test_existing_output_is_kept_unless_forced(tmp_path: Path) -> None:
    output = make_artifact(TINY, load_profile("cpu"), tmp_path / "out")
    before = hashes(output)
    with pytest.raises(UserError, match="already exists"):
        make_artifact(TINY, load_profile("strix-halo"), output)
    assert hashes(output) == before
    export(Checkpoint.open(str(TINY)), load_profile("strix-halo"), output, Quiet(), force=True)
    assert Artifact.open(output, verify=True).manifest["profile"] == "strix-halo"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_space_is_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(UserError, match=r"needs 0\.1 GB more and .* has 0\.0 GB free"):
        make_artifact(TINY, load_profile("cpu"), tmp_path / "out")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real ENOSPC from the kernel in the middle of the weights; the next run goes on."""
    real = Checkpoint.read

    def full(self: Checkpoint, name: str, start: int, stop: int) -> np.ndarray:
        if name.endswith("layers.5.mlp.down_proj.weight"):
            os.write(os.open("/dev/full", os.O_WRONLY), b"x")
        return real(self, name, start, stop)

    monkeypatch.setattr(Checkpoint, "read", full)
    with pytest.raises(UserError, match="no space left"):
        make_artifact(TINY, load_profile("cpu"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    progress = Quiet()
    export(Checkpoint.open(str(TINY)), load_profile("cpu"), tmp_path / "out", progress)
    assert any("did not finish" in note for note in progress.notes)


def test_values_beyond_float16(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "checkpoint")
    tensors = load_tensors(folder)
    tensors["model.layers.1.input_layernorm.weight"][3] = 1e6
    save_shards(folder, tensors, 1)
    with pytest.raises(UserError, match=r"layers\.1\.input_layernorm\.weight reaches 1e\+06"):
        make_artifact(folder, float_profile("portable", "float16"), tmp_path / "out")


def test_two_exports_to_one_place(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    with FileLock(tmp_path / ".out.partial" / "lock"), pytest.raises(UserError, match="another export"):
        make_artifact(TINY, load_profile("cpu"), tmp_path / "out")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow_with_the_largest_tensor(tmp_path: Path) -> None:
    """An embedding 16 times larger adds less than a twentieth of its own growth to the exporting peak.

    Runs of one checkpoint differ by some 16 MB: what is read, coded and written overlaps by chance.
    """
    peaks = []
    for vocabulary in (20_000, 320_000):
        geometry = {**MEDIUM, "vocab_size": vocabulary, "num_hidden_layers": 1, "tie_word_embeddings": True}
        checkpoint = write_checkpoint(tmp_path / str(vocabulary), geometry)
        # Not ru_maxrss: a new process inherits its parent's there.
        code = (
            "from qwen_export.cli import main\nmain(standalone_mode=False)\n"
            "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
        )
        arguments = [sys.executable, "-c", code, *command(checkpoint, tmp_path / f"out{vocabulary}")[3:]]
        output = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
        peaks.append(int(output.split("VmHWM:")[1].split()[0]))
        shutil.rmtree(checkpoint)
    grown = 300_000 * MEDIUM["hidden_size"] * 2 // 1024  # kB of bfloat16
    assert peaks[1] < peaks[0] + grown / 20, peaks
    assert peaks[1] < 600_000, peaks  # kB


def test_profiles_are_checked() -> None:
    with pytest.raises(UserError, match="no profile 'strixhalo': did you mean 'strix-halo'"):
        load_profile("strixhalo")
    with pytest.raises(UserError, match="no profile 'x': there are: apple-m4, browser, "):
        load_profile("x")
    with pytest.raises(UserError, match="profile 'mine' is not valid TOML"):
        parse_profile("mine", "a = ")
    with pytest.raises(UserError, match="profile 'mine', field 'description': Field required"):
        parse_profile("mine", "provider = 'cpu'")


def test_command_line(tmp_path: Path) -> None:
    runner = CliRunner()
    arguments = ["--profile", "cpu", str(TINY), "-o", str(tmp_path / "out"), "--json", "--no-verify"]
    done = runner.invoke(main, arguments)
    assert done.exit_code == 0
    assert json.loads(done.stdout)["profile"] == "cpu"
    again = runner.invoke(main, arguments)
    assert again.exit_code == 2
    assert again.stderr.startswith("error: ") and again.stderr.count("\n") == 1
    unknown = runner.invoke(main, ["--profile", "cpux", str(TINY)])
    assert unknown.exit_code == 2 and "did you mean 'cpu'" in unknown.stderr
    assert "Examples:" in runner.invoke(main, ["--help"]).stdout


def test_our_mistakes_have_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_export.export.export", lambda *_, **__: 1 / 0)
    failed = CliRunner().invoke(main, ["--profile", "cpu", str(TINY), "-o", str(tmp_path / "out")])
    assert failed.exit_code == 1
    assert "ZeroDivisionError" in failed.stderr and "Traceback" not in failed.stderr


def test_the_exporter_needs_no_torch() -> None:
    code = "import sys, qwen_export.export; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
