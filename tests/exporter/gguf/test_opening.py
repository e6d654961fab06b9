"""GGUF files as checkpoints: the weights that they were made of, and answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from qwen_common import manifest as manifests
from qwen_common.errors import UserError
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.checkpoint.tensors.tensor import PrequantizedTensor
from qwen_export.export import export
from qwen_export.gguf.inspection import inspect_gguf
from qwen_export.opening import open_checkpoint
from qwen_export.planner.models import configured
from qwen_profiles.schema import load_profile
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.support.artifacts import Quiet, float_profile
from benchmarks.support.session import Session, cosine
from tests.support.gguf_checkpoints import write_gguf, write_mmproj
from tests.support.random_checkpoints import write_random_checkpoint

NEXT: dict[str, Any] = {"model_type": "qwen3_next", "num_experts": 8, "vocab_size": 2048}
CHECKPOINTS = Path("tests/checkpoints").resolve()
DENSE, MOE, VISION = (CHECKPOINTS / name for name in ("tiny-dense", "tiny-moe", "tiny-vl"))
IDS = torch.tensor(np.random.default_rng(1).integers(2, 2000, (1, 40)))


def check_same(found: Checkpoint, expected: Checkpoint, prefix: str = "") -> None:
    """Bit for bit, but for A_log, which the file has as -exp(A_log)."""
    wanted = {name for name in expected.tensors if name.startswith(prefix)}
    assert {name for name in found.tensors if name.startswith(prefix)} == wanted
    for name in wanted:
        ours, theirs = (one.tensors[name] for one in (found, expected))
        assert ours.shape == theirs.shape
        values, truth = (one.read(0, one.shape[0]).astype(np.float32) for one in (ours, theirs))
        if name.endswith("A_log"):
            np.testing.assert_allclose(values, truth, rtol=0, atol=1e-6)
        else:
            np.testing.assert_array_equal(values, truth, name)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.BF16])
@pytest.mark.parametrize("source", [DENSE, MOE])
def test_weights_are_the_checkpoints(source: Path, kind: Kind, tmp_path: Path) -> None:
    found = open_checkpoint(str(write_gguf(source, tmp_path / "model.gguf", kind)))
    expected = Checkpoint.open(str(source))
    check_same(found, expected)
    ids = {"bos_token_id", "eos_token_id", "pad_token_id"}
    assert found.config.model_dump(exclude=ids) == expected.config.model_dump(exclude=ids)
    assert found.generation.eos_token_id == expected.generation.eos_token_id == [2037, 2035]
    assert found.generation.search() == expected.generation.search()
    assert not found.notes


def test_experts_in_one_tensor_and_files_in_parts_are_the_same(tmp_path: Path) -> None:
    first = write_gguf(MOE, tmp_path / "model.gguf", fuse=True, parts=3)
    assert first.name == "model-00001-of-00003.gguf"
    for part in (first, first.with_name("model-00003-of-00003.gguf")):
        found = open_checkpoint(str(part))
        check_same(found, Checkpoint.open(str(MOE)))
        assert found.root.name == "model"
    first.with_name("model-00002-of-00003.gguf").unlink()
    with pytest.raises(UserError, match=r"one of 3 parts, and .*00002-of-00003\.gguf is missing"):
        open_checkpoint(str(first))


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("value_heads", [2, 6])
def test_qwen3_next(fuse: bool, value_heads: int, tmp_path: Path) -> None:
    """Projections of Gated DeltaNet apart, as llama.cpp writes them, and fused, as it has written them."""
    folder = write_random_checkpoint(
        tmp_path / "next", dtype=torch.bfloat16, **NEXT, linear_num_value_heads=value_heads
    )
    found = open_checkpoint(str(write_gguf(folder, tmp_path / "model.gguf", fuse=fuse)))
    expected = Checkpoint.open(str(folder))
    check_same(found, expected)
    differ = {"bos_token_id", "eos_token_id", "pad_token_id", "mtp_num_hidden_layers", "intermediate_size"}
    assert found.config.model_dump(exclude=differ) == expected.config.model_dump(exclude=differ)
    assert found.model_type == "qwen3_next" and not found.notes
    found.check(found.config.tensors())
    kept = open_checkpoint(str(write_gguf(folder, tmp_path / "kept.gguf", Kind.Q8_0, fuse=fuse)))
    codes = kept.tensors["model.layers.0.linear_attn.in_proj_qkv.weight"]
    assert isinstance(codes, PrequantizedTensor) and codes.scheme.bits == 8
    with pytest.raises(UserError, match="has no vision tower: leave --mmproj off"):
        open_checkpoint(str(tmp_path / "model.gguf"), mmproj=tmp_path / "mmproj.gguf")


@pytest.mark.parametrize("source", [DENSE, MOE])
@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0, Kind.Q5_1])
def test_types_are_what_the_library_dequantises(kind: Kind, source: Path, tmp_path: Path) -> None:
    def floats(tensor: str, value: np.ndarray) -> tuple[np.ndarray, Kind] | None:
        rounded = value.ndim > 1 and value.shape[-1] % 32 == 0 and "ffn_gate_inp" not in tensor
        return (dequantize(quantize(value, kind), kind), Kind.F32) if rounded else None

    found = open_checkpoint(str(write_gguf(source, tmp_path / "model.gguf", kind)))
    check_same(found, open_checkpoint(str(write_gguf(source, tmp_path / "floats.gguf", change=floats))))
    assert not found.notes


@pytest.mark.parametrize("fuse", [False, True])
def test_experts_in_mxfp4_keep_their_codes(fuse: bool, tmp_path: Path) -> None:
    """As in llama.cpp's MXFP4_MOE; the answers are those of the same numbers as floats."""
    logits = []
    ids = np.random.default_rng(0).integers(2, 500, (1, 30))
    for name, kind in (("codes", Kind.MXFP4), ("floats", Kind.F32)):

        def change(tensor: str, value: np.ndarray, kind: Kind = kind) -> tuple[np.ndarray, Kind] | None:
            if "_exps" not in tensor:
                return None
            codes = quantize(value, Kind.MXFP4)
            return (codes, kind) if kind is Kind.MXFP4 else (dequantize(codes, Kind.MXFP4), kind)

        file = write_gguf(MOE, tmp_path / f"{name}.gguf", fuse=fuse, change=change)
        artifact = tmp_path / name
        export(open_checkpoint(str(file)), float_profile("fused"), artifact, Quiet(), all_logits=True)
        assert manifests.read(artifact)["carried_over"] == (["experts"] if name == "codes" else [])
        logits.append(Session(artifact).run(ids))
    assert cosine(*logits).min() > 0.99999


def test_the_mtp_head_is_read(tmp_path: Path) -> None:
    folder = shutil.copytree(DENSE, tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mtp_num_hidden_layers": 1}))
    tensors = load_file(folder / "model.safetensors")
    tensors |= load_file(CHECKPOINTS / "tiny-dense-mtp" / "mtp.safetensors")
    save_file(tensors, folder / "model.safetensors")
    found = open_checkpoint(str(write_gguf(folder, tmp_path / "model.gguf")))
    check_same(found, Checkpoint.open(str(folder)))
    assert found.config.mtp_num_hidden_layers == 1


def test_the_vision_tower_is_read_from_its_own_file(tmp_path: Path) -> None:
    file = write_gguf(VISION, tmp_path / "model.gguf")
    tower = write_mmproj(VISION, tmp_path / "mmproj-model.gguf")
    found, expected = open_checkpoint(str(file), mmproj=tower), Checkpoint.open(str(VISION))
    check_same(found, expected)
    assert found.vision is not None and expected.vision is not None
    assert found.vision.model_dump(exclude={"processor"}) == expected.vision.model_dump(exclude={"processor"})
    assert found.vision.processor.image_mean == expected.vision.processor.image_mean
    assert found.model_type == "qwen3_5"
    alone = open_checkpoint(str(file))
    assert alone.vision is None
    assert f"--mmproj {tower}" in alone.notes[0]
    assert not open_checkpoint(str(file), text_only=True).notes
    for wrong, message in (
        ((str(file), None, True, tower), "--text-only leaves the vision tower out"),
        ((str(file), None, False, file), "is qwen35, None: --mmproj takes the vision tower"),
        ((str(tower),), "general.architecture is clip, a vision tower: name it with --mmproj"),
        ((str(VISION), None, False, tower), "--mmproj goes with a GGUF file"),
    ):
        with pytest.raises(UserError, match=message):
            open_checkpoint(*wrong)
    other = write_mmproj(VISION, tmp_path / "other.gguf")
    write_gguf(MOE, tmp_path / "narrow.gguf", metadata={"qwen35moe.embedding_length": 64})
    with pytest.raises(UserError, match="not of the same model"):
        open_checkpoint(str(tmp_path / "narrow.gguf"), mmproj=other)


@pytest.mark.parametrize("source", [DENSE, MOE])
def test_an_artifact_answers_like_transformers(source: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_gguf(source, tmp_path / "model.gguf", Kind.BF16)))
    export(checkpoint, float_profile("fused"), tmp_path / "artifact", Quiet(), all_logits=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        expected = model(IDS).logits.numpy()
    assert cosine(Session(tmp_path / "artifact").run(IDS.numpy()), expected).min() > 0.9999


@pytest.mark.parametrize("source", [DENSE, MOE])
def test_codes_are_carried_over_into_an_artifact(source: Path, tmp_path: Path) -> None:
    """They are multiplied as the file's own numbers, which an artifact of floats has, too."""
    checkpoint = open_checkpoint(str(write_gguf(source, tmp_path / "model.gguf", Kind.Q4_0)))
    profile = load_profile("cpu", ["accuracy_level=0"])
    manifest = export(checkpoint, profile, tmp_path / "kept", Quiet(), all_logits=True)
    assert {"attention", "linear_attention"} <= set(manifest["carried_over"])
    assert manifest["source"]["checkpoint"] == "model"
    export(checkpoint, float_profile("fused"), tmp_path / "floats", Quiet(), all_logits=True)
    kept, floats = (Session(tmp_path / name).run(IDS.numpy()) for name in ("kept", "floats"))
    assert cosine(kept, floats).min() > 0.9999


def test_plan_and_inspect_take_a_file(tmp_path: Path) -> None:
    file = write_gguf(DENSE, tmp_path / "model.gguf", Kind.Q8_0)
    assert configured(str(file)).config.hidden_size == 192
    found = inspect_gguf(str(file))
    assert found["types"]["Q8_0"]["export"] == "codes kept"
    assert found["types"]["F32"]["export"] == "floats"
    assert (found["architecture"], found["layers"], found["context_length"]) == ("qwen35", 8, 8192)
    renamed = file.rename(tmp_path / "sha256-0123")  # as Ollama keeps them
    assert open_checkpoint(str(renamed)).config.num_hidden_layers == 8
