"""A line for each form whose codes an artifact does not keep, whatever the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from qwen_export.checkpoint import Checkpoint
from qwen_export.checkpoint.dequantised import dequantised
from qwen_export.export import export
from qwen_profiles.schema import load_profile

from benchmarks.support.artifacts import Quiet, float_profile
from tests.support.quantized_checkpoints import gptq, write_quantized_checkpoint
from tests.support.random_checkpoints import edit_config, load_tensors, save_shards, write_vision_checkpoint

LINEAR = {"mlp.linear_fc1", "mlp.linear_fc2", "attn.qkv"}


def quantise_tower(folder: Path) -> int:
    """Linear layers of the tower in GPTQ's layout; returns how many."""
    method, tensors, count = gptq(32), load_tensors(folder), 0
    for name in list(tensors):
        module = name.removesuffix(".weight")
        if "visual." in name and name.endswith(".weight") and any(module.endswith(part) for part in LINEAR):
            packed, _ = method.pack(tensors.pop(name).float().numpy())
            tensors |= {f"{module}.{part}": value for part, value in packed.items()}
            count += 1
    save_shards(folder, tensors, 1)
    edit_config(folder, quantization_config=method.config)
    return count


def notes_of(folder: Path, text_only: bool, output: Path) -> list[str]:
    quiet = Quiet()
    export(Checkpoint.open(str(folder), text_only=text_only), load_profile("cpu"), output, quiet)
    return [note for note in quiet.notes if "dequantised" in note]


def test_a_quantised_vision_tower(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_heads": 4}
    folder = write_vision_checkpoint(tmp_path / "checkpoint", vision=sizes)
    count = quantise_tower(folder)
    assert count > 2
    (note,) = notes_of(folder, False, tmp_path / "artifact")
    assert note == (
        f"{count} weights of the vision tower in 4-bit integers in groups of 32 are dequantised, because no "
        "kernel here takes the codes; then stored as the profile says"
    )
    assert notes_of(folder, True, tmp_path / "text") == []


@pytest.mark.parametrize("chosen", [("gate_proj", "q_proj"), ("gate_proj", "up_proj")])
def test_a_part_of_what_is_one_projection(chosen: tuple[str, ...], tmp_path: Path) -> None:
    folder, _ = write_quantized_checkpoint(tmp_path / "checkpoint", gptq(), chosen)
    quiet = Quiet()
    export(Checkpoint.open(str(folder)), float_profile("fused"), tmp_path / "artifact", quiet)
    said = [note for note in quiet.notes if "dequantised" in note]
    if "up_proj" in chosen:
        assert said == []
    else:
        assert len(said) == 1 and said[0].startswith("3 weights in 4-bit integers in groups of 128 are")


def test_the_mtp_head_and_the_model_apart(tmp_path: Path) -> None:
    folder, _ = write_quantized_checkpoint(tmp_path, gptq(), ("down_proj",))
    tensors = load_tensors(folder)
    down = {name: value for name, value in tensors.items() if "layers.1.mlp.down_proj" in name}
    for name, value in down.items():
        tensors[f"mtp.layers.0.{name.partition('layers.1.')[2]}"] = value.clone()
    save_shards(folder, tensors, 1)
    first, second = dequantised(Checkpoint.open(str(folder)).tensors)
    assert first.startswith("2 weights in 4-bit") and second.startswith("1 weight of the MTP head in 4-bit")
