"""Experts in NVFP4 and MXFP4: kept for the CPU's QMoE, dequantised with a line elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qwen_common import manifest as manifests
from qwen_common.errors import UserError
from qwen_export.backends.onnx.estimate import estimate
from qwen_export.backends.onnx.graphs import build_graphs
from qwen_export.backends.onnx.stored import stored_tensors
from qwen_export.checkpoint import Checkpoint
from qwen_export.export import export
from qwen_export.inspection import inspect
from qwen_profiles.schema import Profile, load_profile

from benchmarks.support.artifacts import Quiet, float_profile
from benchmarks.support.session import Session, cosine
from tests.support.compressed_checkpoints import compressed, scheme
from tests.support.quantized_checkpoints import write_quantized_checkpoint
from tests.support.random_checkpoints import load_tensors, save_shards

EXPERTS = 4
PREFIX = "model.layers.0.mlp.experts"
FORMS = {
    "NVFP4": compressed("nvfp4-pack-quantized", scheme(type="float", strategy="tensor_group", group_size=16)),
    "MXFP4": compressed(
        "mxfp4-pack-quantized",
        scheme(type="float", strategy="group", group_size=32, scale_dtype="torch.uint8"),
    ),
}


def write(folder: Path, form: str, **options: Any) -> tuple[Path, torch.nn.Module]:
    return write_quantized_checkpoint(folder, FORMS[form], num_experts=EXPERTS, **options)


def exported(folder: Path, profile: Profile, output: Path) -> list[str]:
    """The notes of an export."""
    quiet = Quiet()
    export(Checkpoint.open(str(folder)), profile, output, quiet, all_logits=True)
    return [note for note in quiet.notes if "dequantised" in note]


def parts_of(folder: Path, layer: str = PREFIX) -> dict[str, np.ndarray]:
    """By projection and part, what the checkpoint stores of all experts, stacked; bytes as uint8."""
    stored = load_tensors(folder)
    found = {}
    for kind in ("gate", "up", "down"):
        for part in ("weight_packed", "weight_scale", "weight_global_scale"):
            names = [
                f"{layer.replace('model.', 'model.language_model.', 1)}.{expert}.{kind}_proj.{part}"
                for expert in range(EXPERTS)
            ]
            if names[0] in stored:
                values = torch.stack([stored[name] for name in names])
                is_factor = part == "weight_global_scale"
                found[kind, part] = (values if is_factor else values.view(torch.uint8)).numpy()
    return found


def in_turn(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return np.stack([gate, up], axis=2).reshape(len(gate), -1, gate.shape[-1])


@pytest.mark.parametrize("form", FORMS)
def test_codes_and_scales_are_the_checkpoints_own(form: str, tmp_path: Path) -> None:
    folder, model = write(tmp_path / "checkpoint", form)
    profile = float_profile("fused")
    notes = exported(folder, profile, tmp_path / "artifact")
    # Attention, Gated DeltaNet and the shared expert: what no kernel of the CPU takes.
    assert len(notes) == 1
    assert notes[0].startswith(
        f"11 weights in {form} are dequantised, because no kernel here takes the codes"
    )
    manifest = manifests.read(tmp_path / "artifact")
    assert manifest["carried_over"] == ["experts"] and manifest["onnxruntime"] == ">=1.32"
    assert inspect(tmp_path / "artifact")["roles"]["experts"]["precision"] == "as in the checkpoint"

    checkpoint = Checkpoint.open(str(folder))
    data = (tmp_path / "artifact" / "model.onnx.data").read_bytes()
    graphs = build_graphs(checkpoint, profile, all_logits=True)
    placed = {
        tensor.name: np.frombuffer(data, np.uint8, tensor.nbytes, tensor.offset).view(
            tensor.dtype if tensor.dtype == np.float32 else np.uint8
        ).reshape(tensor.shape)
        for weight, tensors in graphs.placed
        if weight.role == "experts"
        for tensor in tensors
    }  # fmt: skip
    stored = parts_of(folder)
    for ours, theirs in (("", "weight_packed"), (".scales", "weight_scale")):
        both = in_turn(stored["gate", theirs], stored["up", theirs])
        np.testing.assert_array_equal(placed[f"{PREFIX}.gate_up_proj{ours}"], both)
        np.testing.assert_array_equal(placed[f"{PREFIX}.down_proj{ours}"], stored["down", theirs])
    first, second = (placed[f"{PREFIX}.{stack}.factors"] for stack in ("gate_up_proj", "down_proj"))
    if form == "MXFP4":
        assert (first == 1).all() and (second == 1).all()
    else:
        gate, up, down = (stored[kind, "weight_global_scale"][:, 0] for kind in ("gate", "up", "down"))
        assert (gate != up).any()
        np.testing.assert_allclose(first, 1 / gate, rtol=1e-6)
        np.testing.assert_allclose(second, gate / (up * down), rtol=1e-6)

    # Read back, a product of gate and up with down is what the library dequantises.
    specs = checkpoint.config.tensors()
    back = stored_tensors(tmp_path / "artifact", graphs, specs)
    gate_up, down_proj = (
        back[f"{PREFIX}.{stack}"].read(0, EXPERTS) for stack in ("gate_up_proj", "down_proj")
    )
    meant = dict(model.state_dict())
    inner = down_proj.shape[-1]
    wanted = meant[f"{PREFIX}.gate_up_proj"].numpy(), meant[f"{PREFIX}.down_proj"].numpy()
    np.testing.assert_allclose(gate_up[:, :inner], wanted[0][:, :inner], rtol=1e-6)
    for expert in range(EXPERTS):
        np.testing.assert_allclose(
            down_proj[expert] @ gate_up[expert, inner:],
            wanted[1][expert] @ wanted[0][expert, inner:],
            rtol=1e-4,
            atol=1e-5,
        )


def test_the_recipe_may_ask_for_codes_of_its_own(tmp_path: Path) -> None:
    folder, model = write(tmp_path / "checkpoint", "NVFP4")
    profile = float_profile("fused").model_copy(update={"carry_over": False})
    (note,) = exported(folder, profile, tmp_path / "artifact")
    assert note.startswith("35 weights in NVFP4 are dequantised, as carry_over = false asks")
    manifest = manifests.read(tmp_path / "artifact")
    assert manifest["carried_over"] == [] and manifest["onnxruntime"] == ">=1.30"
    ids = np.random.default_rng(0).integers(2, 500, (1, 20))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    assert cosine(Session(tmp_path / "artifact").run(ids), expected).min() > 0.999999


@pytest.mark.parametrize("overrides", [["provider=webgpu"], ["fallbacks=['webgpu']"]])
def test_providers_without_the_kernel_get_dequantised_experts(overrides: list[str], tmp_path: Path) -> None:
    """Where one of an artifact's providers has none, and all share the weights, too."""
    folder, _ = write(tmp_path / "checkpoint", "MXFP4")
    profile = load_profile("cpu", [*overrides, "mtp=false"])
    if profile.fallbacks:
        with pytest.raises(UserError, match=r"experts\.gate_up_proj in two forms"):
            exported(folder, profile, tmp_path / "artifact")
        return
    (note,) = exported(folder, profile, tmp_path / "artifact")
    assert note.startswith("35 weights in MXFP4 are dequantised, because no kernel here takes the codes")
    assert manifests.read(tmp_path / "artifact")["carried_over"] == []


def test_experts_that_differ_in_form_are_dequantised(tmp_path: Path) -> None:
    """A node of QMoE has one form for all of its experts."""
    folder, _ = write(tmp_path / "nvfp4", "NVFP4")
    tensors = load_tensors(folder)
    plain = {name: value for name, value in tensors.items() if ".experts.3.down_proj." not in name}
    name = f"{PREFIX}.3.down_proj.weight".replace("model.", "model.language_model.", 1)
    plain |= {name.replace("layers.0", f"layers.{layer}"): torch.randn(256, 128) for layer in range(2)}
    save_shards(folder, plain, 1)
    (note,) = exported(folder, float_profile("fused"), tmp_path / "artifact")
    assert note.startswith("33 weights in NVFP4 are dequantised")
    assert manifests.read(tmp_path / "artifact")["carried_over"] == []


@pytest.mark.parametrize("edit", ["nan", "zero", "huge"])
def test_scales_that_are_no_numbers(edit: str, tmp_path: Path) -> None:
    folder, _ = write(tmp_path / "checkpoint", "NVFP4")
    tensors = load_tensors(folder)
    stored = PREFIX.replace("model.", "model.language_model.", 1)
    if edit == "nan":
        tensors[f"{stored}.2.up_proj.weight_scale"].view(torch.uint8)[3, 1] = 127
        message = "2.up_proj.weight_scale holds NaN"
    elif edit == "zero":
        tensors[f"{stored}.2.up_proj.weight_global_scale"][:] = 0
        message = "2.up_proj.weight_global_scale makes scales infinite"
    else:
        tensors[f"{stored}.2.up_proj.weight_global_scale"][:] = 1e-30
        tensors[f"{stored}.2.down_proj.weight_global_scale"][:] = 1e-30
        message = "more than float32 holds"
    save_shards(folder, tensors, 1)
    with pytest.raises(UserError, match=message):
        exported(folder, float_profile("fused"), tmp_path / "artifact")


def test_an_estimate_has_the_experts_mapped(tmp_path: Path) -> None:
    folder, _ = write(tmp_path / "checkpoint", "MXFP4")
    kept, own = (
        estimate(Checkpoint.open(str(folder)), load_profile("cpu", [f"carry_over={keep}"]))
        for keep in ("true", "false")
    )
    assert kept.precision["experts"] == "mxfp4" and own.precision["experts"] == "int4/32"
    assert kept.by_role["experts"] < own.by_role["experts"] and kept.resident < own.resident
