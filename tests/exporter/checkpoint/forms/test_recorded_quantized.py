"""Checkpoints that other libraries wrote, and what their weights answer: support/record_quantized.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qwen_common.errors import UserError
from qwen_export import reference
from qwen_export.checkpoint import Checkpoint
from qwen_export.checkpoint.dequantised import dequantised
from qwen_export.checkpoint.tensors.plain import PlainTensor
from qwen_export.checkpoint.tensors.tensor import PrequantizedTensor
from qwen_export.reference import Weights
from safetensors.torch import load_file, save_file

from benchmarks.support.session import cosine
from tests.support.record_quantized import FORMS, RECORDED

# How many weights keep their codes, and what the notes say of the others.
KEPT: dict[str, tuple[int, str]] = {
    "auto-round-gptq": (13, ""),
    "auto-round-own": (13, ""),
    "auto-round-awq": (13, ""),
    "bitsandbytes-int8": (15, ""),
    "bitsandbytes-nf4": (0, "15 weights in NF4 are"),
    "bitsandbytes-nf4-nested": (0, "15 weights in NF4 are"),
    "mlx": (0, ""),
    "mlx-4": (0, "17 weights in MLX's 4-bit groups of 64 are"),
    "mlx-5": (0, "17 weights in MLX's 5-bit groups of 32 are"),
    "mlx-8-experts": (0, "4 weights in MLX's 8-bit groups of 64 are"),  # routers, which mlx-lm treats apart
    "mlx-mxfp4": (0, "17 weights in MXFP4 are"),
    "mlx-mxfp8": (0, "17 weights in FP8 are"),
    "mlx-nvfp4": (0, "17 weights in NVFP4 are"),
    "modelopt-fp8": (0, "13 weights in FP8 are"),
    "modelopt-mxfp4": (0, "weights in MXFP4 are"),
    "modelopt-nvfp4": (0, "weights in NVFP4 are"),
    "torchao-fp8": (0, "15 weights in FP8 are"),
    "torchao-int4": (15, ""),
    "torchao-int8": (15, ""),
}


def test_all_forms_are_recorded() -> None:
    assert {path.name for path in RECORDED.iterdir()} == set(FORMS) == set(KEPT)


@pytest.mark.parametrize("form", KEPT)
def test_weights_answer_as_the_librarys(form: str) -> None:
    checkpoint = Checkpoint.open(str(RECORDED / form))
    checkpoint.check(checkpoint.config.tensors())
    recorded = np.load(RECORDED / form / "logits.npz")
    config, weights = checkpoint.config, Weights(checkpoint.tensors)
    *_, hidden = reference.forward(config, weights, recorded["ids"])
    logits = reference.logits(config, weights, hidden)
    assert cosine(logits, recorded["logits"]).min() > 0.9999
    kept, said = KEPT[form]
    schemes = [t.scheme for t in checkpoint.tensors.values() if isinstance(t, PrequantizedTensor)]
    assert sum(scheme is not None for scheme in schemes) == kept
    integers = [
        name for name, t in checkpoint.tensors.items() if isinstance(t, PrequantizedTensor) and t.scheme
    ]
    notes = " ".join(dequantised(checkpoint.tensors, integers))
    assert said in notes and ("are dequantised" in notes) == bool(said)


@pytest.mark.parametrize("form", KEPT)
def test_a_weight_has_the_bytes_and_files_that_are_read_for_it(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Progress, and what is fetched and deleted, go by them."""
    read: dict[tuple[Path, int], int] = {}
    columns = PlainTensor.columns

    def seen(tensor: PlainTensor, *where: int) -> np.ndarray:
        read[tensor.file, tensor.offset] = tensor.nbytes
        return columns(tensor, *where)

    tensors = Checkpoint.open(str(RECORDED / form)).tensors
    monkeypatch.setattr(PlainTensor, "columns", seen)
    for name, tensor in tensors.items():
        read.clear()
        tensor.read(0, tensor.shape[0])
        assert (tensor.nbytes, tensor.files) == (sum(read.values()), {file for file, _ in read}), name


def damaged(form: str, folder: Path, **config: Any) -> Path:
    shutil.copytree(RECORDED / form, folder)
    if config:
        content = json.loads((folder / "config.json").read_text())
        content["quantization_config"] |= config
        (folder / "config.json").write_text(json.dumps(content))
    return folder


# Parts that say nothing of the weight.
IDLE = ("g_idx", "input_scale", "weight_format")


@pytest.mark.parametrize("form", [form for form in KEPT if form != "mlx"])
def test_every_part_is_needed(form: str, tmp_path: Path) -> None:
    """Without it, or cut short, the checkpoint is refused in a line that names the weight or its part."""
    folder = damaged(form, tmp_path / form)
    tensors = load_file(folder / "model.safetensors")
    parts = [name for name in tensors if "layers.0.mlp." in name and ".gate_proj." in name]
    parts = [name for name in parts if not name.endswith(IDLE)]
    assert len(parts) > 1
    for name in parts:
        rest = {other: value for other, value in tensors.items() if other != name}
        cut = [{**rest, name: tensors[name][:-1].contiguous()}] if tensors[name].ndim else []
        for changed in (rest, *cut):
            save_file(changed, folder / "model.safetensors")
            with pytest.raises(UserError) as caught:
                checkpoint = Checkpoint.open(str(folder))
                checkpoint.check(checkpoint.config.tensors())
            assert "layers.0.mlp." in str(caught.value), str(caught.value)
            assert "\n" not in str(caught.value)
    save_file(tensors, folder / "model.safetensors")
    Checkpoint.open(str(folder))


@pytest.mark.parametrize(
    ("form", "config", "message"),
    [
        (
            "auto-round-gptq",
            {"packing_format": "auto_round:of_tomorrow_e5m3"},
            "packing_format 'auto_round:of",
        ),
        ("auto-round-gptq", {"extra_config": 7}, "extra_config 7 is not supported"),
        ("mlx-4", {"bits": 7}, "'bits': 7"),
        ("mlx-4", {"group_size": 32}, "do not belong together for 4 bits in groups of 32"),
        ("mlx-mxfp4", {"mode": "nvfp4"}, "'mode': 'nvfp4'"),
        ("modelopt-fp8", {"quant_algo": "W4A8_AWQ"}, "quant_algo 'W4A8_AWQ' is not supported"),
    ],
)
def test_settings_are_named(form: str, config: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = damaged(form, tmp_path / form, **config)
    content = json.loads((folder / "config.json").read_text())
    if "quantization" in content:
        content["quantization"] |= config
        (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        Checkpoint.open(str(folder))
    assert message in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


def test_torchaos_layout_for_one_kernel(tmp_path: Path) -> None:
    folder = damaged("torchao-int8", tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj._weight_qdata"
    save_file({**tensors, name: tensors[name].view(torch.uint8)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="is in a layout of torchao's that is not supported yet"):
        Checkpoint.open(str(folder))


@pytest.mark.parametrize(
    ("form", "part", "dtype"),
    [("torchao-fp8", "scale", torch.float8_e8m0fnu), ("torchao-int8", "zero_point", torch.uint8)],
)
def test_torchaos_parts_in_another_dtype(form: str, part: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = damaged(form, tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.0.mlp.gate_proj._weight_{part}"
    save_file({**tensors, name: tensors[name].to(dtype)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"mlp\.gate_proj.*is in a layout of torchao's"):
        Checkpoint.open(str(folder))


def test_words_of_awq_are_in_its_order(tmp_path: Path) -> None:
    folder = damaged("auto-round-awq", tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj.qzeros"
    save_file({**tensors, name: tensors[name].view(torch.uint8)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"gate_proj\.qzeros is uint8, and AWQ's are int32"):
        Checkpoint.open(str(folder))


def test_a_stack_of_experts_without_a_byte(tmp_path: Path) -> None:
    """However many it says that there are."""
    folder = damaged("mlx-8-experts", tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("switch_mlp.gate_proj.weight"))
    empty = torch.empty((2**40, 0, 4), dtype=torch.uint32)
    save_file({**tensors, name: empty}, folder / "model.safetensors")
    with pytest.raises(UserError, match="gate_proj"):
        Checkpoint.open(str(folder))


@pytest.mark.parametrize(
    ("form", "part", "dtype"),
    [
        ("bitsandbytes-nf4", "weight", torch.float8_e5m2),
        ("bitsandbytes-nf4-nested", "weight.absmax", torch.float32),
        ("mlx-mxfp8", "scales", torch.float32),
        ("auto-round-own", "g_idx", torch.bool),
        ("auto-round-awq", "qzeros", torch.int64),
        ("auto-round-gptq", "scales", torch.float64),
        ("mlx-4", "biases", torch.int32),
        ("modelopt-mxfp4", "weight_scale", torch.bfloat16),
    ],
)
def test_parts_in_another_dtype(form: str, part: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = damaged(form, tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith(f"layers.0.mlp.gate_proj.{part}"))
    save_file({**tensors, name: tensors[name].to(dtype)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.gate_proj.*download"):
        Checkpoint.open(str(folder))


def test_a_weight_of_bitsandbytes_that_does_not_say_how(tmp_path: Path) -> None:
    folder = damaged("bitsandbytes-nf4", tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    (name,) = (name for name in tensors if "layers.0.mlp.gate_proj.weight.quant_state" in name)
    for content in (b"{}", b"[" * 50_000, b"\xff", b'{"quant_type": "nf4", "blocksize": 0, "shape": [1, 1]}'):
        changed = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        save_file({**tensors, name: changed}, folder / "model.safetensors")
        with pytest.raises(UserError, match="does not say how its weight is quantised"):
            Checkpoint.open(str(folder))
