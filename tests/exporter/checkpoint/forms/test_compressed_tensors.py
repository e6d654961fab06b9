"""compressed-tensors, written and read back by the library itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qwen_common.errors import UserError
from qwen_export.checkpoint import Checkpoint
from qwen_export.export import export
from qwen_export.quantize.blockwise import Quantization, Quantized, dequantize
from safetensors.torch import load_file

from benchmarks.support.artifacts import Quiet, float_profile, make_artifact
from benchmarks.support.session import Session, cosine
from tests.support.compressed_checkpoints import compressed, scheme, write_compressed_model
from tests.support.quantized_checkpoints import Method, write_quantized_checkpoint
from tests.support.random_checkpoints import load_tensors, save_shards

GATE = "model.layers.0.mlp.gate_proj"
STORED_GATE = "model.language_model.layers.0.mlp.gate_proj"
INT4 = scheme(strategy="group", group_size=32)
ASYMMETRIC = scheme(strategy="group", group_size=64, symmetric=False)
FP8 = {"type": "float", "num_bits": 8}
# Form, scheme, and whether the codes are kept.
FORMS: dict[str, tuple[Method, bool]] = {
    "int4": (compressed("pack-quantized", INT4), True),
    "int4 with zero points": (compressed("pack-quantized", ASYMMETRIC), True),
    "int4, a scale a row": (compressed("pack-quantized", scheme(strategy="channel")), True),
    "int4, zero points, a scale a row": (
        compressed("pack-quantized", scheme(strategy="channel", symmetric=False)),
        True,
    ),
    "int4, groups of 8": (compressed("pack-quantized", scheme(strategy="group", group_size=8)), False),
    "int2": (compressed("pack-quantized", scheme(num_bits=2, strategy="group", group_size=32)), False),
    "int8, packed": (
        compressed("pack-quantized", scheme(num_bits=8, strategy="group", group_size=128)),
        True,
    ),
    "int8": (compressed("int-quantized", scheme(num_bits=8, strategy="channel")), True),
    "int8 with zero points": (
        compressed("int-quantized", scheme(num_bits=8, strategy="channel", symmetric=False)),
        True,
    ),
    "int8, a scale a tensor": (compressed("int-quantized", scheme(num_bits=8, strategy="tensor")), True),
    "int4 in bytes": (compressed("int-quantized", scheme(strategy="channel")), True),
    "fp8, a scale a tensor": (compressed("float-quantized", scheme(**FP8, strategy="tensor")), False),
    "fp8, a scale a row": (compressed("float-quantized", scheme(**FP8, strategy="channel")), False),
    "fp8, blocks": (
        compressed("float-quantized", scheme(**FP8, strategy="block", block_structure=[128, 128])),
        False,
    ),
    "fp8, groups": (compressed("naive-quantized", scheme(**FP8, strategy="group", group_size=64)), False),
    "nvfp4": (
        compressed("nvfp4-pack-quantized", scheme(type="float", strategy="tensor_group", group_size=16)),
        False,
    ),
    "mxfp4": (
        compressed(
            "mxfp4-pack-quantized",
            scheme(type="float", strategy="group", group_size=32, scale_dtype="torch.uint8"),
        ),
        False,
    ),
    "mxfp8": (
        compressed(
            "mxfp8-quantized", scheme(**FP8, strategy="group", group_size=32, scale_dtype="torch.uint8")
        ),
        False,
    ),
}


MIXTURE = {"num_experts": 4}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_what_the_library_decompresses(form: str, tmp_path: Path) -> None:
    method, kept = FORMS[form]
    folder, model = write_quantized_checkpoint(tmp_path, method)
    checkpoint = Checkpoint.open(str(folder))
    state = dict(model.state_dict())
    for name in (f"{GATE}.weight", "model.layers.0.mlp.down_proj.weight"):
        source, meant = checkpoint.tensors[name], state[name].numpy()
        assert bool(getattr(source, "scheme", None)) == kept
        for start, stop in ((0, len(meant)), (0, 1), (7, 9), (127, 201), (len(meant) - 1, len(meant))):
            np.testing.assert_array_equal(source.read(start, stop), meant[start:stop])
        if kept:
            form_kept = Quantization(source.scheme.bits, 16, False, np.dtype(np.float32), prequantized=True)
            codes, scales, zeros = source.packed(3, 60, form_kept)
            packed = codes.reshape(*form_kept.packed_shape(57, meant.shape[1]))
            values = dequantize(Quantized(packed, scales, zeros), meant.shape[1], form_kept)
            np.testing.assert_array_equal(values, meant[3:60])


@pytest.mark.parametrize("lowering", ["fused", "portable"])
@pytest.mark.parametrize(
    ("form", "overrides"),
    [
        ("int4 with zero points", {}),
        ("int8", {}),
        ("int8, packed", MIXTURE),
        ("nvfp4", {}),
        ("nvfp4", MIXTURE),
        ("mxfp4", MIXTURE),
    ],
)
def test_answers_are_those_of_the_decompressed_weights(
    form: str, overrides: dict[str, Any], lowering: str, tmp_path: Path
) -> None:
    folder, model = write_quantized_checkpoint(tmp_path / "checkpoint", FORMS[form][0], **overrides)
    session = Session(make_artifact(folder, float_profile(lowering), tmp_path / "artifact"))
    with torch.no_grad():
        expected = model(ids()).logits.numpy()
    # QMoE's own arithmetic is coarser with 8 bits, whoever chose the codes.
    coarse = "int8" in form and bool(overrides) and lowering == "fused"
    assert cosine(session.run(ids().numpy()), expected).min() > (0.999 if coarse else 0.9999)


MIXED = {
    "config_groups": {
        "named": {
            **scheme(type="float", strategy="tensor_group", group_size=16),
            "targets": ["model.layers.0.mlp.down_proj"],
        },
        "expression": {
            **scheme(num_bits=8, strategy="channel"),
            "targets": ["re:.*mlp.*(gate|up)_proj$"],
        },
        "class": ASYMMETRIC,
        "embedding": {**scheme(num_bits=8, strategy="channel"), "targets": ["Embedding"]},
    },
    "ignore": ["lm_head", "re:.*in_proj_[ab]$"],
}


def ids() -> torch.Tensor:
    return torch.tensor(np.random.default_rng(1).integers(2, 512, (1, 40)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixed_model_answers_as_the_librarys(dtype: torch.dtype, tmp_path: Path) -> None:
    folder, model = write_compressed_model(tmp_path / "checkpoint", MIXED, dtype, tie_word_embeddings=False)
    stored = load_file(folder / "model.safetensors")
    assert stored["model.layers.0.mlp.down_proj.weight_packed"].dtype == torch.uint8
    assert stored[f"{GATE}.weight_packed"].shape == (384, 64)
    assert "model.layers.0.linear_attn.in_proj_a.weight" in stored
    with torch.no_grad():
        expected = model(ids()).logits.numpy()
    session = Session(make_artifact(folder, float_profile("fused"), tmp_path / "artifact"))
    # The library rounds what it decompresses to the model's dtype.
    assert cosine(session.run(ids().numpy()), expected).min() > (0.9999 if dtype == torch.float32 else 0.999)
    tensors = Checkpoint.open(str(folder)).tensors
    schemes = {name: getattr(tensors[f"{name}.weight"], "scheme", None) for name in (GATE, "lm_head")}
    assert schemes[GATE].bits == 8 and schemes["lm_head"] is None
    assert tensors["model.layers.1.mlp.down_proj.weight"].scheme.group_size == 64
    assert tensors["model.embed_tokens.weight"].scheme.bits == 8
    for name, meant in model.state_dict().items():
        if name in tensors:
            rows = tensors[name].read(0, len(meant)).astype(np.float32)
            narrow = torch.bfloat16 if "0.mlp.down_proj" in name else dtype
            assert torch.equal(torch.from_numpy(rows).to(narrow), meant.to(narrow)), name


def test_transformers_answers_alike(tmp_path: Path) -> None:
    """On what it can load (5.24 with compressed-tensors 0.20): no packed zero points, ..."""
    from transformers import AutoModelForCausalLM

    groups = {**MIXED["config_groups"], "class": INT4}
    del groups["embedding"], groups["named"]  # nor an embedding in codes, nor FP4 in float32
    folder, _ = write_compressed_model(tmp_path / "checkpoint", {**MIXED, "config_groups": groups})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(ids()).logits.float().numpy()
    session = Session(make_artifact(folder, float_profile("fused"), tmp_path / "artifact"))
    assert cosine(session.run(ids().numpy()), expected).min() > 0.9999


def test_activation_scales_are_left_out_with_a_line(tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        for part in ("mlp.gate_proj.input_scale", "mlp.up_proj.input_global_scale", "self_attn.k_scale"):
            tensors[f"model.language_model.layers.1.{part}"] = torch.ones(1)

    folder, _ = write_quantized_checkpoint(tmp_path / "checkpoint", FORMS["nvfp4"][0], edit=add)
    progress = Quiet()
    export(Checkpoint.open(str(folder)), float_profile("fused"), tmp_path / "artifact", progress)
    (line,) = [note for note in progress.notes if "activations" in note]
    assert "model.layers.1.mlp.gate_proj.input_scale and 2 more" in line
    (line,) = [note for note in progress.notes if "dequantised" in note]
    assert "weights in NVFP4 are dequantised" in line
    assert not any("no such tensors" in note for note in progress.notes)


def test_scales_that_float16_cannot_hold(tmp_path: Path) -> None:
    folder, _ = write_quantized_checkpoint(tmp_path, FORMS["int4"][0])
    tensors = load_tensors(folder)
    tensors[f"{STORED_GATE}.weight_scale"] *= 1e8
    save_shards(folder, tensors, 1)
    source = Checkpoint.open(str(folder)).tensors[f"{GATE}.weight"]
    with pytest.raises(UserError, match="more than float16 holds: choose a profile with float32"):
        source.packed(0, 8, Quantization(4, 32, True, np.dtype(np.float16), prequantized=True))


def change(part: str, edit: Callable[[torch.Tensor], torch.Tensor | None]):
    def change_it(folder: Path) -> None:
        tensors = load_tensors(folder)
        found = edit(tensors.pop(f"{STORED_GATE}.{part}"))
        if found is not None:
            tensors[f"{STORED_GATE}.{part}"] = found.contiguous()
        save_shards(folder, tensors, 1)

    return change_it


def declare(**values: Any):
    def declare_it(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= values
        (folder / "config.json").write_text(json.dumps(config))

    return declare_it


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def group(**weights: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": scheme(**weights)}}


DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "no scales": ("int4", change("weight_scale", lambda t: None), f"but no {GATE}.weight_scale"),
    "no codes": ("int4", change("weight_packed", lambda t: None), f"but no {GATE}.weight:"),
    "no shape": ("int4", change("weight_shape", lambda t: None), "but no weight_shape"),
    "a shape of floats": (
        "int4",
        change("weight_shape", lambda t: t.double() * torch.nan),
        "but no weight_shape",
    ),
    "another shape": ("int4", change("weight_shape", lambda t: t + 8), "holds no scales for 392 x 264"),
    "scales cut": ("int4", change("weight_scale", lambda t: t[:, :3]), "(384, 3)) holds no scales for 384"),
    "codes cut": ("int4", change("weight_packed", lambda t: t[:, :3]), "which do not belong together"),
    "scales that are integers": ("int4", change("weight_scale", lambda t: t.int()), "holds no scales for"),
    "NaN among scales": (
        "int4",
        change("weight_scale", lambda t: t.index_fill(0, torch.tensor(5), torch.nan)),
        "holds NaN or Inf",
    ),
    "scales of MXFP8 as floats": (
        "mxfp8",
        change("weight_scale", lambda t: t.bfloat16()),
        f"{GATE}.weight_scale is bfloat16, and scales of MXFP8 are bytes",
    ),
    "scales of groups as bytes": (
        "fp8, groups",
        change("weight_scale", lambda t: t.to(torch.uint8)),
        f"{GATE}.weight_scale (uint8 (384, 4)) holds no scales for 1 x 64 blocks",
    ),
    "scales of a row as bytes": (
        "fp8, a scale a row",
        change("weight_scale", lambda t: t.to(torch.uint8)),
        "weight_scale (uint8 (384, 1)) holds no scales",
    ),
    "scales of FP4 as floats": ("nvfp4", change("weight_scale", lambda t: t.float()), "are no 4-bit floats"),
    "scales of MXFP4 as floats": (
        "mxfp4",
        change("weight_scale", lambda t: t.float()),
        "are no 4-bit floats",
    ),
    "zero points without their sign": (
        "int8 with zero points",
        change("weight_zero_point", lambda t: t.view(torch.uint8)),
        "weight_zero_point is uint8, and holds no zero points",
    ),
    "packed zero points as floats": (
        "int4 with zero points",
        change("weight_zero_point", lambda t: t.float()),
        "weight_zero_point is float32, and holds no zero points",
    ),
    "no zero points": (
        "int4 with zero points",
        change("weight_zero_point", lambda t: None),
        "but no weight_zero_point",
    ),
    "zero points cut": (
        "int4 with zero points",
        change("weight_zero_point", lambda t: t[:5]),
        "codes, zero points and scales",
    ),
    "another group size": ("int4", declare(**group(strategy="group", group_size=64)), "group_size 64"),
    "a group size that divides nothing": (
        "int4",
        declare(**group(strategy="group", group_size=7)),
        "group_size 7",
    ),
    "a negative group size": (
        "int4",
        declare(**group(strategy="group", group_size=-2)),
        "config_groups.group_0.weights.group_size -2 is not supported",
    ),
    "no group size": ("int4", declare(**group(strategy="group")), "group_size None"),
    "other bits": ("int4", declare(**group(num_bits=8, strategy="group", group_size=32)), "8 bits"),
    "3 bits": ("int4", declare(**group(num_bits=3, strategy="channel")), "num_bits 3 is not supported"),
    "floats of 4 bits": ("int4", declare(**group(type="float", group_size=32)), "are no 4-bit floats"),
    "no group for it": (
        "int4",
        declare(config_groups={"group_0": {**INT4, "targets": ["re:.*self_attn.*"]}}),
        "no group has model.layers.",
    ),
    "no expression": (
        "int4",
        declare(config_groups={"group_0": {**INT4, "targets": ["re:(("]}}),
        "'((' is no regular expression",
    ),
    "no groups": ("int4", declare(config_groups=None), "config_groups None is not supported"),
    "a format of yesterday": ("int4", declare(format="marlin-24"), "format 'marlin-24' is not supported"),
    "rotations": (
        "int4",
        declare(transform_config={"config_groups": {"u": {"type": "hadamard"}}}),
        "transform_config {'config_groups'",
    ),
    "zeros left out": ("int4", declare(sparsity_config={"format": "sparse-24"}), "sparsity_config"),
    "not compressed": ("int4", declare(quantization_status="frozen"), "quantization_status 'frozen'"),
    "groups out of order": (
        "int4",
        lambda folder: save_shards(
            folder, {**load_tensors(folder), f"{STORED_GATE}.weight_g_idx": torch.zeros(256).int()}, 1
        ),
        "groups out of order (actorder: group)",
    ),
    "zero points under a symmetric scheme": (
        "int4 with zero points",
        declare(**group(strategy="group", group_size=64)),
        "but config.json says sym",
    ),
    "codes of no matrix": (
        "int8, a scale a tensor",
        change("weight", lambda t: t.flatten()),
        "holds no scales for 0 x 0 weights",
    ),
    "no global scale": (
        "nvfp4",
        change("weight_global_scale", lambda t: None),
        "but no weight_global_scale: is a shard missing?",
    ),
    "scales of NVFP4 as bytes": (
        "nvfp4",
        change("weight_scale", lambda t: t.view(torch.uint8)),
        "are no 4-bit floats",
    ),
    "scales of NVFP4 in another dtype": (
        "nvfp4",
        change("weight_scale", lambda t: t.double()),
        "are no 4-bit floats",
    ),
    "no factor": ("nvfp4", change("weight_global_scale", lambda t: t.repeat(2)), "are no 4-bit floats"),
    "a factor of 0": ("nvfp4", change("weight_global_scale", lambda t: t * 0), "makes scales infinite"),
    "scales of one byte too few": ("nvfp4", change("weight_scale", lambda t: t[1:]), "are no 4-bit floats"),
    "another block": (
        "fp8, blocks",
        change("weight_scale", lambda t: t[:2]),
        "holds no scales for 128 x 128 blocks",
    ),
    "a scale too few": ("fp8, a scale a row", change("weight_scale", lambda t: t[:9]), "for rows of"),
    "truncated": ("int4", cut, "is truncated or damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_before_work_begins(name: str, tmp_path: Path) -> None:
    form, damage, message = DAMAGE[name]
    folder, _ = write_quantized_checkpoint(tmp_path / "checkpoint", FORMS[form][0])
    damage(folder)
    with pytest.raises(UserError) as caught:
        make_artifact(folder, float_profile("fused"), tmp_path / "artifact")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "artifact").exists()
