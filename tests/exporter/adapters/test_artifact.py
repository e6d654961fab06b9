"""An artifact of a checkpoint with adapters: what it answers, what its manifest says, how it is verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from qwen_common import manifest as manifests
from qwen_common.errors import USER_ERROR
from qwen_common.files import sha256
from qwen_export.adapters.merge import with_adapters
from qwen_export.backends.onnx.graphs import build_graphs
from qwen_export.backends.onnx.resume import fingerprint
from qwen_export.checkpoint import Checkpoint
from qwen_export.cli import main
from qwen_export.export import export
from qwen_profiles.schema import load_profile
from transformers import AutoModelForCausalLM

from benchmarks.support.artifacts import Quiet, float_profile
from benchmarks.support.checkpoints import TINY
from benchmarks.support.session import Session, cosine
from tests.support.adapters import LINEAR, train
from tests.support.quantized_checkpoints import GEOMETRY, gptq, write_quantized_checkpoint

IDS = list(range(5, 45))


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def tiny() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    train(tiny(), folder / "style", seed=1, target_modules=LINEAR, r=4, lora_alpha=1)
    train(tiny(), folder / "tools", seed=2, target_modules=["k_proj"], use_dora=True, r=2, lora_alpha=1)
    return folder / "style", folder / "tools"


def logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS])).logits[0].float().numpy()


def assert_answers_as(artifact: Path, model: torch.nn.Module) -> None:
    assert cosine(Session(artifact).run(IDS), logits(model)).min() > 0.9999


def test_exported_and_verified_with_adapters(adapters: tuple[Path, Path], tmp_path: Path) -> None:
    style, tools = adapters
    artifact = tmp_path / "artifact"
    given = ["--adapter", f"{style}=0.5", "--adapter", tools]
    settings = ["--profile", "cpu", "--set", "weights.body=int8", "--no-verify", "--no-progress"]
    found = run(TINY, "-o", artifact, *settings, *given, "--json")
    assert found.exit_code == 0, found.output
    listed = json.loads(found.stdout)["adapters"]
    assert listed == manifests.read(artifact)["adapters"]
    assert [(adapter["name"], adapter["weight"]) for adapter in listed] == [("style", 0.5), ("tools", 1.0)]
    for adapter, folder in zip(listed, adapters, strict=True):
        for name, entry in adapter["files"].items():
            assert entry["sha256"] == sha256(folder / name)
    card = (artifact / "README.md").read_text()
    assert "The adapter style is merged into the weights with the weight 0.5" in card
    assert listed[1]["files"]["adapter_model.safetensors"]["sha256"] in card
    assert str(tmp_path) not in (artifact / "manifest.json").read_text() + card

    verify = ["verify", artifact, "--against", TINY, "--tokens", "256", "--no-progress"]
    assert run(*verify, *given).exit_code == 0
    report = json.loads((artifact / "report.json").read_text())
    assert report["run"]["kl_divergence"] < 0.1 and report["passed"]
    assert run(*verify, *given, "--reference", "transformers").exit_code == 0
    wrong = {
        "none was given": [],
        "others were given": given[:2],
        "others were": ["--adapter", style, "--adapter", tools],
    }
    for message, other in wrong.items():
        refused = run(*verify, *other)
        assert refused.exit_code == USER_ERROR
        assert "was exported with --adapter style=0.5 --adapter tools, and" in refused.stderr
        assert message in refused.stderr


def test_answers_as_what_peft_merges(adapters: tuple[Path, Path], tmp_path: Path) -> None:
    for adapter in adapters:
        checkpoint = with_adapters(Checkpoint.open(str(TINY)), [str(adapter)])
        output = tmp_path / adapter.name
        export(checkpoint, float_profile("fused"), output, Quiet(), all_logits=True)
        merged = tiny()
        from peft import PeftModel

        assert_answers_as(output, PeftModel.from_pretrained(merged, adapter).merge_and_unload())


def test_an_artifact_without_an_adapter(adapters: tuple[Path, Path], exported: Any) -> None:
    artifact = exported(TINY, load_profile("cpu"))
    assert "adapters" not in manifests.read(artifact)
    refused = run("verify", artifact, "--against", TINY, "--adapter", adapters[0])
    assert refused.exit_code == USER_ERROR and "was exported without an adapter" in refused.stderr


def test_an_export_with_another_weight_is_another(adapters: tuple[Path, Path]) -> None:
    """So that it does not go on with the other one's files."""
    prints = set()
    for given in ([], ["style"], ["style=0.5"], ["tools"], ["style", "tools"], ["tools", "style"]):
        paths = [str(adapters[0].parent / name) for name in given]
        checkpoint = with_adapters(Checkpoint.open(str(TINY)), paths)
        profile = load_profile("cpu")
        prints.add(
            fingerprint(checkpoint, profile, build_graphs(checkpoint, profile, all_logits=False), None)
        )
    assert len(prints) == 6


def test_a_quantised_checkpoint(tmp_path: Path) -> None:
    """What the adapter changes is dequantised and quantised again; the other codes are kept."""
    folder, model = write_quantized_checkpoint(tmp_path / "base", gptq())
    adapted = train(model, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    plain = Checkpoint.open(str(folder))
    merged = with_adapters(plain, [str(tmp_path / "adapter")])
    output, quiet = tmp_path / "artifact", Quiet()
    export(merged, float_profile("fused"), output, quiet, all_logits=True)
    said = "3 weights in 4-bit integers in groups of 128 are dequantised, because an adapter changes them"
    assert any(said in note for note in quiet.notes)
    assert_answers_as(output, adapted.merge_and_unload())
    changed = {name for name in plain.tensors if merged.tensors[name] is not plain.tensors[name]}
    assert len(changed) == 3 and all(("q_proj" in name or "down_proj" in name) for name in changed)
    assert len(GEOMETRY["layer_types"]) == 2
