"""The benchmark of whole models: it runs what a checkpoint on the disk would give, and limits hold."""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
from qwen_export.checkpoint.checkpoint import Checkpoint

from benchmarks import whole
from benchmarks.geometry import GEOMETRIES, generated_checkpoint, write_checkpoint
from benchmarks.support.memory_limit import limited

_GEOMETRY = {
    **GEOMETRIES["35B-A3B"],
    "vocab_size": 3000,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


def test_generated_weights_are_those_of_the_files(tmp_path: Path) -> None:
    made = generated_checkpoint(tmp_path / "made", _GEOMETRY).tensors
    written = Checkpoint.open(str(write_checkpoint(tmp_path / "written", _GEOMETRY))).tensors
    assert set(made) == set(written)
    for name, tensor in made.items():
        rows = tensor.shape[0]
        stored = written[name].read(0, rows).view(np.uint16)
        assert np.array_equal(tensor.read(rows // 2, rows).view(np.uint16), stored[rows // 2 :]), name
    router = made["model.layers.0.mlp.gate.weight"].read(0, 16).astype(np.float32)
    assert len(np.unique(router, axis=0)) == 16


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_small_mixture_from_start_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(GEOMETRIES, "small", _GEOMETRY)
    figures = tmp_path / "figures.json"
    options = ["--size", "small", "--rounds", "1", "--prompt", "16", "--tokens", "4", "--json", str(figures)]
    monkeypatch.setattr("sys.argv", ["whole", *options, "--keep", str(tmp_path / "kept")])
    whole.main()
    found = json.loads(figures.read_text())
    (only,) = found["rounds"]
    assert found["disk"] == pytest.approx(found["predicted"]["disk"], rel=0.1)  # with the tokenizer's files
    resident = only["loaded"]["anonymous"] + only["loaded"]["mapped"]
    assert resident == pytest.approx(found["predicted"]["resident"], abs=4e7)  # the benchmark's own imports
    assert only["loaded"]["most"] <= only["done"]["most"]
    assert only["prefill"] > 0 < only["decode"]
    assert only["curve"][0]["held"]["anonymous"] < only["loaded"]["anonymous"]
    assert "share of the ceiling" in capsys.readouterr().out


@pytest.mark.skipif(
    not os.access("/sys/fs/cgroup/memory", os.W_OK), reason="control groups of version 1 are for root"
)
def test_a_process_ends_at_its_limit() -> None:
    with limited(100_000_000) as group, whole._process(group) as pool:
        assert pool.submit(len, b"short").result() == 5
        with pytest.raises(BrokenProcessPool):
            pool.submit(np.ones, 100_000_000).result()
    assert not group.exists()
