"""FP8, GPTQ and AWQ: answers against transformers on the dequantised weights; codes bit for bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qwen_common.errors import UserError
from qwen_export.backends.onnx.graphs import build_graphs
from qwen_export.checkpoint import Checkpoint
from qwen_export.quantize.blockwise import Quantization, Quantized, dequantize

from benchmarks.support.artifacts import float_profile, make_artifact
from benchmarks.support.session import Session, cosine
from tests.support.quantized_checkpoints import (
    FP8,
    GEOMETRY,
    PROJECTIONS,
    Method,
    awq,
    fp8_blocks,
    gptq,
    integers,
    write_quantized_checkpoint,
)
from tests.support.random_checkpoints import load_tensors, random_model, save_shards

LOWERINGS = ("fused", "portable")
EXPERTS = ("experts",)
MIXTURE = {"num_experts": 4}
STACKED_FP8 = "fp8, experts stacked"
PREFIX = "model.language_model.layers.0.mlp"
CASES: dict[str, tuple[Method | None, tuple[str, ...], dict[str, Any]]] = {
    "fp8": (FP8, PROJECTIONS, {}),
    "fp8 experts": (FP8, PROJECTIONS, MIXTURE),
    STACKED_FP8: (FP8, PROJECTIONS, MIXTURE),
    "experts one by one": (None, PROJECTIONS, MIXTURE),
    "gptq": (gptq(), PROJECTIONS, {}),
    "gptq without sym": (gptq(sym=False), PROJECTIONS, {}),
    "gptq_v2, groups of 32": (gptq(32, sym=False, version="gptq_v2"), PROJECTIONS, {}),
    "gptq, one scale for each row": (gptq(256), ("q_proj", "k_proj", "v_proj"), {}),
    "gptq experts": (gptq(), EXPERTS, MIXTURE),
    "gptq experts without sym": (gptq(sym=False), EXPERTS, MIXTURE),
    "gptq, groups out of order": (gptq(desc_act=True), PROJECTIONS, {}),
    "awq": (awq(), PROJECTIONS, {}),
    "awq experts": (awq(), EXPERTS, MIXTURE),
    "half of what is one projection here": (gptq(), ("gate_proj", "q_proj"), {}),
}


def stack(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Experts, and their scales, as one tensor for all of them; 128 rows of each are whole blocks."""
    alone = {name: tensors.pop(name) for name in list(tensors) if ".experts." in name}
    for layer in range(2):
        experts = f"model.language_model.layers.{layer}.mlp.experts"
        for suffix in ("", "_scale_inv"):
            for name, kinds in {
                "gate_up_proj": ("gate_proj", "up_proj"),
                "down_proj": ("down_proj",),
            }.items():
                tensors[f"{experts}.{name}{suffix}"] = torch.stack(
                    [
                        torch.cat([alone[f"{experts}.{expert}.{kind}.weight{suffix}"] for kind in kinds])
                        for expert in range(MIXTURE["num_experts"])
                    ]
                )
    assert tensors[f"{experts}.gate_up_proj_scale_inv"].shape == (4, 2, 2)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_the_dequantised_weights(case: str, lowering: str, tmp_path: Path) -> None:
    method, chosen, overrides = CASES[case]
    edit = {"edit": stack} if case == STACKED_FP8 else {}
    folder, model = write_quantized_checkpoint(tmp_path / "checkpoint", method, chosen, **edit, **overrides)
    session = Session(make_artifact(folder, float_profile(lowering), tmp_path / "artifact"))
    prompt = torch.tensor(np.random.default_rng(1).integers(2, 512, (1, 40)))
    with torch.no_grad():
        ids = model.generate(prompt, max_new_tokens=20, min_new_tokens=20, do_sample=False)
        expected = model(ids).logits.numpy()
    found = session.run(ids.numpy())
    assert cosine(found, expected).min() > 0.9999
    # What we would choose after the same tokens is transformers' choice, or one that it likes as well.
    chosen_by_us = np.take_along_axis(expected, found.argmax(-1)[..., None], -1)[..., 0]
    assert (expected.max(-1) - chosen_by_us).max() < 1e-3


def test_fp8_means_what_transformers_makes_of_it(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = np.random.default_rng(0).normal(size=(384, 256)).astype(np.float32)
    weight[130:140] *= 100
    tensors, meaning = fp8_blocks(weight)
    expected = Fp8Dequantize(None)._dequantize_one(
        tensors["weight"], tensors["weight_scale_inv"], torch.float32
    )
    np.testing.assert_array_equal(meaning, expected.numpy())
    name = "model.layers.0.mlp.gate_proj.weight"
    folder, model = write_quantized_checkpoint(tmp_path, FP8)
    source = Checkpoint.open(str(folder)).tensors[name]
    meant = dict(model.state_dict())[name].numpy()
    for start, stop in ((0, 384), (0, 1), (127, 129), (200, 384)):
        np.testing.assert_array_equal(source.read(start, stop), meant[start:stop])


def test_stacked_fp8_means_what_transformers_makes_of_it(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    folder, _ = write_quantized_checkpoint(tmp_path, FP8, edit=stack, **MIXTURE)
    stored = load_tensors(folder)
    tensors = Checkpoint.open(str(folder)).tensors
    for kind in ("gate_up_proj", "down_proj"):
        name = f"mlp.experts.{kind}"
        values, scales = (stored[f"{PREFIX.removesuffix('mlp')}{name}{part}"] for part in ("", "_scale_inv"))
        expected = Fp8Dequantize(None)._dequantize_one(values, scales, torch.float32).numpy()
        source = tensors[f"model.layers.0.{name}"]
        assert source.shape == expected.shape
        for start, stop in ((0, 4), (0, 1), (1, 3), (3, 4)):
            np.testing.assert_array_equal(source.read(start, stop), expected[start:stop])


def test_blocks_of_stacked_fp8_that_the_last_row_and_column_cut_short(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(3, 200, 300)).astype(np.float32)
    packed = [fp8_blocks(expert) for expert in weight]
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {
        name: torch.stack([parts["weight"] for parts, _ in packed]),
        f"{name}_scale_inv": torch.stack([parts["weight_scale_inv"] for parts, _ in packed]),
    }
    folder, _ = write_quantized_checkpoint(tmp_path, FP8)
    save_shards(folder, {**load_tensors(folder), **tensors}, 1)
    source = Checkpoint.open(str(folder)).tensors[name]
    np.testing.assert_array_equal(source.read(1, 3), np.stack([meaning for _, meaning in packed])[1:])


def test_fp8_with_a_scale_for_each_tensor_and_for_activations(tmp_path: Path) -> None:
    """As AutoFP8 wrote it, and transformers writes static activations."""
    static = {"quant_method": "fp8", "activation_scheme": "static"}

    def pack(weight: np.ndarray) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        scale = torch.tensor(np.abs(weight).max() / 448)
        values = (torch.from_numpy(weight) / scale).to(torch.float8_e4m3fn)
        parts = {"weight": values, "weight_scale": scale, "input_scale": torch.tensor(0.5)}
        return {**parts, "activation_scale": torch.tensor(0.5)}, (values.float() * scale).numpy()

    folder, model = write_quantized_checkpoint(tmp_path, Method(static, pack))
    checkpoint = Checkpoint.open(str(folder))
    name = "model.layers.0.mlp.down_proj.weight"
    np.testing.assert_array_equal(checkpoint.read(name, 3, 200), model.state_dict()[name].numpy()[3:200])
    assert [note for note in checkpoint.notes if "activations" in note]
    assert not [note for note in checkpoint.notes if "no such tensors" in note]


def stored_weight(
    artifact: Path, checkpoint: Path, lowering: str, name: str
) -> tuple[Quantization, np.ndarray, np.ndarray | None, np.ndarray, np.ndarray]:
    """Form, codes, zero points, scales and values of one weight, from the artifact's own bytes."""
    graphs = build_graphs(Checkpoint.open(str(checkpoint)), float_profile(lowering), all_logits=True)
    weight, tensors = next((weight, tensors) for weight, tensors in graphs.placed if weight.name == name)
    data = (artifact / "model.onnx.data").read_bytes()
    arrays = [
        np.frombuffer(data, tensor.dtype, tensor.nbytes // tensor.dtype.itemsize, tensor.offset)
        for tensor in tensors
    ]
    form = weight.storage
    assert isinstance(form, Quantization)
    k = weight.shape[-1]
    n = int(np.prod(weight.shape[:-1]))
    arrays = [
        array.reshape(shape(n, k))
        for array, shape in zip(
            arrays, (form.packed_shape, form.scales_shape, form.zero_points_shape), strict=False
        )
    ]
    codes = np.stack([arrays[0] & 15, arrays[0] >> 4], -1).reshape(n, -1)
    zeros = None
    if len(arrays) == 3:
        zeros = np.stack([arrays[2] & 15, arrays[2] >> 4], -1).reshape(n, -1)[:, : form.blocks(k)]
    values = dequantize(Quantized(arrays[0], arrays[1], arrays[2] if len(arrays) == 3 else None), k, form)
    return form, codes, zeros, arrays[1], values


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize(
    ("method", "sym"),
    [(gptq(), True), (gptq(sym=False), False), (gptq(sym=False, version="gptq_v2"), False), (awq(), False)],
)
def test_codes_and_scales_are_the_checkpoints_own(
    method: Method, sym: bool, lowering: str, tmp_path: Path
) -> None:
    folder, model = write_quantized_checkpoint(tmp_path / "checkpoint", method)
    artifact = make_artifact(folder, float_profile(lowering), tmp_path / "artifact")
    original = dict(random_model(**GEOMETRY).state_dict())
    mlp = "model.layers.0.mlp"
    for name, parts in {
        f"{mlp}.gate_up_proj": ["gate_proj", "up_proj"],  # 256 inputs: two blocks of 128
        f"{mlp}.down_proj": ["down_proj"],  # 384: three, of which 4-bit zero points are no whole bytes
    }.items():
        form, codes, zeros, scales, values = stored_weight(artifact, folder, lowering, name)
        weights = np.concatenate([original[f"{mlp}.{part}.weight"].numpy() for part in parts])
        expected_codes, expected_zeros, expected_scales = integers(weights, 128, sym)
        repeats = 128 // form.block_size
        assert form.prequantized and (repeats == 1 or (lowering == "portable" and name.endswith("down_proj")))
        np.testing.assert_array_equal(codes, expected_codes)
        np.testing.assert_array_equal(scales, np.repeat(expected_scales, repeats, axis=1).astype(np.float32))
        assert (zeros is None) == (sym and lowering == "fused")
        if zeros is not None:
            np.testing.assert_array_equal(zeros, np.repeat(expected_zeros, repeats, axis=1))
        meant = np.concatenate([dict(model.state_dict())[f"{mlp}.{part}.weight"].numpy() for part in parts])
        np.testing.assert_array_equal(values, meant)


@pytest.mark.parametrize("method", [gptq(sym=False), awq()])
def test_any_rows_are_read_alike(method: Method, tmp_path: Path) -> None:
    """Pieces begin and end anywhere; AWQ and the zero points hold eight rows in one int32."""
    folder, model = write_quantized_checkpoint(tmp_path, method)
    name = "model.layers.0.mlp.gate_proj.weight"
    source = Checkpoint.open(str(folder)).tensors[name]
    meant = dict(model.state_dict())[name].numpy()
    form = Quantization(4, 128, False, np.dtype(np.float32), prequantized=True)
    whole = source.packed(0, 384, form)
    for start, stop in ((0, 384), (0, 1), (7, 9), (8, 16), (13, 301), (383, 384)):
        np.testing.assert_array_equal(source.read(start, stop), meant[start:stop])
        for part, all_rows in zip(source.packed(start, stop, form), whole, strict=True):
            np.testing.assert_array_equal(part, all_rows[start:stop])


def write_many_experts(folder: Path, method: Method, experts: int) -> Path:
    """One layer whose experts are noise: 1.5 M weights each."""
    hidden, inner = 1024, 512
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    noise = torch.Generator().manual_seed(0)

    def add(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        config["text_config"]["num_experts"] = experts
        tensors[f"{PREFIX}.gate.weight"] = torch.randn(experts, hidden, generator=noise)
        kept = {name: value for name, value in tensors.items() if ".experts." not in name}
        tensors.clear()
        tensors.update(kept)
        for kind, (n, k) in shapes.items():
            packed, _ = method.pack(torch.randn(n, k, generator=noise).numpy())
            for expert in range(experts):
                tensors |= {
                    f"{PREFIX}.experts.{expert}.{kind}.{suffix}": tensor.clone()
                    for suffix, tensor in packed.items()
                }

    geometry = {"hidden_size": hidden, "moe_intermediate_size": inner, "num_experts": 2}
    layers = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    return write_quantized_checkpoint(folder, method, EXPERTS, add, **geometry, **layers)[0]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("method", [FP8, gptq()], ids=["fp8", "gptq"])
def test_memory_does_not_grow_with_the_number_of_experts(method: Method, tmp_path: Path) -> None:
    """The peak of the exporting process grows by less than half of what four times the experts' codes take.

    Runs of one checkpoint differ by some 16 MB: what is read, coded and written overlaps by chance.
    """
    code = (
        "import sys; from qwen_export.cli import main; main(standalone_mode=False)\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    peaks = []
    for experts in (16, 64):
        folder = write_many_experts(tmp_path / f"checkpoint{experts}", method, experts)
        arguments = [
            "--profile",
            "cpu",
            str(folder),
            "-o",
            str(tmp_path / f"out{experts}"),
            "--no-progress",
            "--no-verify",
        ]
        command = [sys.executable, "-c", code, *arguments]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks.append(int(output.split("VmHWM:")[1].split()[0]))
    grown = 48 * 3 * 1024 * 512 // 1024  # kB, a byte each
    assert peaks[1] < peaks[0] + grown / (2 if method is FP8 else 4), peaks


def without(ending: str) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], None]:
    def edit(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        del tensors[f"{PREFIX}.{ending}"]

    return edit


def changed(ending: str, change: Callable[[torch.Tensor], torch.Tensor]):
    def edit(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        tensors[f"{PREFIX}.{ending}"] = change(tensors[f"{PREFIX}.{ending}"]).contiguous()

    return edit


def declared(**values: Any) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], None]:
    def edit(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        config["quantization_config"] |= values

    return edit


def stacked_and(change: Callable[[torch.Tensor], torch.Tensor]):
    """Experts stacked, and the scales of one stack changed."""

    def edit(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        stack(tensors, config)
        changed("experts.gate_up_proj_scale_inv", change)(tensors, config)

    return edit


def undeclared(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    del config["quantization_config"]


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(torch.uint8)[3, 5] = 0x7F
    return tensor


GATE = "model.layers.0.mlp.gate_proj"
DAMAGE: dict[str, tuple[Method, dict[str, Any], Any, str]] = {
    "FP8 without scales": (
        FP8,
        {},
        without("gate_proj.weight_scale_inv"),
        f"tensor {GATE}.weight is float8_e4m3fn without its scales",
    ),
    "scales without a weight": (
        FP8,
        {},
        without("gate_proj.weight"),
        f"has {GATE}.weight_scale_inv, but no {GATE}.weight",
    ),
    "scales of another shape": (
        FP8,
        {},
        changed("gate_proj.weight_scale_inv", lambda tensor: tensor[:1]),
        f"{GATE}.weight_scale_inv (bfloat16 (1, 2)) holds no scales for 128 x 128 blocks",
    ),
    "FP8 that config.json does not declare": (FP8, {}, undeclared, "config.json says no quantization_config"),
    "one factor for the whole tensor": (
        FP8,
        {},
        declared(weight_block_size=None),
        "holds no scales for rows of",
    ),
    "scales of one expert too few": (
        FP8,
        MIXTURE,
        stacked_and(lambda scales: scales[:3]),
        "experts.gate_up_proj_scale_inv (bfloat16 (3, 2, 2)) holds no scales for 128 x 128 blocks",
    ),
    "scales for other blocks": (
        FP8,
        MIXTURE,
        stacked_and(lambda scales: scales.repeat_interleave(2, 2)),
        "experts.gate_up_proj_scale_inv (bfloat16 (4, 2, 4)) holds no scales for 128 x 128 blocks",
    ),
    "scales that are no floats": (
        FP8,
        MIXTURE,
        stacked_and(lambda scales: scales.to(torch.uint8)),
        "experts.gate_up_proj_scale_inv (uint8 (4, 2, 2)) holds no scales for 128 x 128 blocks",
    ),
    "NaN in FP8": (FP8, {}, changed("gate_proj.weight", poisoned), f"tensor {GATE}.weight holds NaN"),
    "a missing expert": (
        FP8,
        MIXTURE,
        without("experts.2.up_proj.weight"),
        "has model.layers.0.mlp.experts.2.up",
    ),
    "an expert that is nowhere": (
        gptq(),
        MIXTURE,
        lambda tensors, config: [tensors.pop(name) for name in list(tensors) if "0.mlp.experts.2.up" in name],
        "has no tensor model.layers.0.mlp.experts.2.up_proj.weight: is a shard missing?",
    ),
    "the last expert missing": (
        gptq(),
        MIXTURE,
        lambda tensors, config: [tensors.pop(name) for name in list(tensors) if "0.mlp.experts.3." in name],
        "has shape (3, 256, 256) where config.json says (4, 256, 256)",
    ),
    "no zero points": (gptq(), {}, without("gate_proj.qzeros"), f"has {GATE}.qweight, but no {GATE}.qzeros"),
    "scales cut short": (
        awq(),
        {},
        changed("gate_proj.scales", lambda tensor: tensor[:, :100]),
        f"{GATE}.qweight has codes, zero points and scales of the shapes",
    ),
    "AWQ taken for GPTQ": (awq(), {}, declared(quant_method="gptq"), "which do not belong together"),
    "not what config.json says": (
        gptq(),
        {},
        lambda tensors, config: config["text_config"].update(intermediate_size=512),
        "has shape (384, 256) where config.json says (512, 256)",
    ),
    "a group that is none": (
        gptq(desc_act=True),
        {},
        changed("gate_proj.g_idx", lambda tensor: tensor + 2),
        "g_idx does not name one of 2 groups for each of 256 input features",
    ),
    "no groups, though they are out of order": (
        gptq(desc_act=True),
        {},
        without("gate_proj.g_idx"),
        f"has {GATE}.qweight, but no g_idx, though config.json says desc_act",
    ),
    "groups that are no integers": (
        gptq(desc_act=True),
        {},
        changed("gate_proj.g_idx", lambda tensor: tensor.float()),
        f"{GATE}.g_idx is float32, and holds no integers",
    ),
    "codes of floats": (
        gptq(),
        {},
        changed("gate_proj.qweight", lambda tensor: tensor.float()),
        f"{GATE}.qweight is float32, and holds no integers",
    ),
    "scales of integers": (
        awq(),
        {},
        changed("gate_proj.scales", lambda tensor: tensor.int()),
        f"{GATE}.scales is int32, and holds no scales",
    ),
    "codes of no matrix": (
        awq(),
        {},
        changed("gate_proj.qweight", lambda tensor: tensor.reshape(-1)[0].clone()),
        "of no matrix",
    ),
    "sym that is not": (gptq(sym=False), {}, declared(sym=True), "but config.json says sym"),
    "a zero point of 16": (
        gptq(sym=False),
        {},
        changed("gate_proj.qzeros", lambda tensor: torch.full_like(tensor, -1)),
        f"{GATE}.qzeros has the zero point 16, but 4 bits do not hold that",
    ),
    "3 bits": (gptq(), {}, declared(bits=3), "quantization_config: gptq.bits 3 is not supported yet"),
    "another kernel's order": (
        awq(),
        {},
        declared(version="gemv"),
        "awq.version 'gemv' is not supported yet",
    ),
    "another method": (
        gptq(),
        {},
        declared(quant_method="hqq"),
        "quantised by HQQ",
    ),
    "no method": (
        gptq(),
        {},
        lambda tensors, config: config["quantization_config"].clear(),
        "not supported yet",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, tmp_path: Path) -> None:
    method, overrides, edit, message = DAMAGE[name]
    chosen = EXPERTS if overrides and method is not FP8 else PROJECTIONS
    folder, _ = write_quantized_checkpoint(tmp_path / "checkpoint", method, chosen, edit, **overrides)
    with pytest.raises(UserError) as caught:
        make_artifact(folder, float_profile("fused"), tmp_path / "artifact")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "artifact").exists()
