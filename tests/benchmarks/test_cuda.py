"""benchmarks/cuda.py from start to end with the CPU in the GPU's place: a rehearsal, no figure counts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from qwen_profiles.schema import Profile, load_profile

from benchmarks import cuda
from benchmarks.support.checkpoints import TINY


def on_the_cpu(name: str) -> Profile:
    """The CUDA profile's lowering and recipe, for the provider that there is."""
    return load_profile(name).model_copy(
        update={"provider": "cpu", "device": "cpu", "activation_dtype": "float32"}
    )


def test_rehearsal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda, "CUDA", "CPUExecutionProvider")
    monkeypatch.setattr(cuda.CudaSession, "providers", ("CPUExecutionProvider",))
    monkeypatch.setattr(cuda, "load_profile", on_the_cpu)
    monkeypatch.setattr(cuda, "bandwidth", lambda: 20e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "CPU, rehearsal")
    # The peers' prompts have ids of up to 100,000.
    small = {**json.loads((TINY / "config.json").read_text()), "vocab_size": 100_352}
    monkeypatch.setitem(cuda.GEOMETRIES, "0.8B", small)
    written = tmp_path / "cuda.json"
    options = ["--sizes", "0.8B", "--rounds", "1", "--tokens", "4", "--json", str(written)]
    monkeypatch.setattr(sys, "argv", ["cuda", *options])
    cuda.main()
    results = json.loads(written.read_text())
    assert min(results["parity"].values()) > 0.9999
    both = [value for name, value in results.items() if name.startswith("ours")]
    assert len(both) == 2  # the lowerings
    for ours in both:
        assert len(ours["decode"]) == 1 and ours["decode"][0] > 0
        assert ours["share"][0] == pytest.approx(ours["decode"][0] * ours["bytes"] / 20e9)
    assert "CPU, rehearsal" in capfd.readouterr().out


def test_without_a_gpu_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="install onnxruntime-genai-cuda"):
        cuda.main()
