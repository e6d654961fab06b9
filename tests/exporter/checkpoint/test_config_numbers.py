"""Numbers of config.json that no model has: one line with file and field, at once."""

from __future__ import annotations

import json
import math
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from qwen_common.errors import USER_ERROR, UserError
from qwen_export.checkpoint import Checkpoint
from qwen_export.checkpoint.config import load_config, load_vision_config
from qwen_export.cli import main
from qwen_export.export import export
from transformers import AutoModelForCausalLM

from benchmarks.support.artifacts import Quiet, float_profile, make_artifact
from benchmarks.support.session import Session, cosine
from tests.support.random_checkpoints import GEOMETRY, write_random_checkpoint, write_vision_checkpoint

ROPE = GEOMETRY["rope_parameters"]


def rope(**values: Any) -> dict[str, Any]:
    return {"rope_parameters": {**ROPE, **values}}


def yarn(**values: Any) -> dict[str, Any]:
    return rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, **values)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"rms_norm_eps": math.nan}, "rms_norm_eps: "),
    ({"rms_norm_eps": math.inf}, "rms_norm_eps: inf is not a finite float32"),
    ({"rms_norm_eps": 1e300}, "rms_norm_eps: 1e+300 is not a finite float32"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps: "),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps: Input should be a valid number, not '1e-6'"),
    ({"rms_norm_eps": True}, "rms_norm_eps: "),
    ({"rms_norm_eps": None}, "rms_norm_eps: "),
    (rope(rope_theta=0), "rope_parameters.rope_theta: Input should be greater than 0, not 0"),
    (rope(rope_theta=-1.0), "rope_parameters.rope_theta: "),
    (rope(rope_theta=math.nan), "rope_parameters.rope_theta: "),
    (rope(rope_theta=math.inf), "rope_parameters.rope_theta: "),
    (rope(rope_theta="10000"), "rope_parameters.rope_theta: "),
    (rope(rope_theta=10**400), "rope_parameters.rope_theta: "),
    (rope(partial_rotary_factor=math.nan), "rope_parameters.partial_rotary_factor: "),
    (rope(partial_rotary_factor=0.1), "head_dim times partial_rotary_factor must be an even number"),
    (rope(partial_rotary_factor=0.01), "head_dim times partial_rotary_factor must be an even number"),
    (rope(mrope_section=[6, -1, -1]), "rope_parameters.mrope_section.1: "),
    (rope(mrope_section=[2, 1]), "rope_parameters.mrope_section"),
    (rope(mrope_section=[2.0, 1, 1]), "rope_parameters.mrope_section.0: "),
    (yarn(rope_theta=1.0), "rope_parameters: rope_type yarn needs a rope_theta above 1"),
    (yarn(beta_fast=0), "rope_parameters.beta_fast: "),
    (yarn(mscale=-5.0), "rope_parameters.mscale: "),
    (yarn() | {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": math.inf}}, "factor: "),
    ({"rope_scaling": [1]}, "rope_parameters: "),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers: Input should be less than or equal to 4096"),
    ({"num_hidden_layers": "4"}, "num_hidden_layers: Input should be a valid integer, not '4'"),
    ({"num_hidden_layers": True}, "num_hidden_layers: "),
    ({"num_hidden_layers": 4.0}, "num_hidden_layers: "),
    ({"num_hidden_layers": 0}, "num_hidden_layers: "),
    ({"vocab_size": 10**12}, "vocab_size: "),
    ({"hidden_size": 10**12}, "hidden_size: "),
    ({"head_dim": -8}, "head_dim: "),
    ({"max_position_embeddings": 10**12}, "max_position_embeddings: "),
    ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim: "),
    ({"linear_conv_kernel_dim": 10**9}, "linear_conv_kernel_dim: "),
    ({"layer_types": [None] * 4}, "layer_types.0: "),
    ({"layer_types": "full_attention"}, "layer_types: "),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: "),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings: "),
    ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok must be at most num_experts"),
    ({"num_experts": 10**9}, "num_experts: "),
    ({"num_experts": 4, "num_experts_per_tok": 0}, "num_experts_per_tok: "),
    ({"num_experts": "4"}, "num_experts: "),
]


def write_config(folder: Path, values: dict[str, Any]) -> Path:
    model_type = "qwen3_5_moe_text" if "num_experts" in values else "qwen3_5_text"
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **GEOMETRY, **values}))
    return folder


@pytest.mark.parametrize(("values", "message"), WRONG, ids=lambda value: str(value)[:50])
def test_numbers_that_no_model_has(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_config(tmp_path, values)
    tracemalloc.start()
    start = time.thread_time()
    with pytest.raises(UserError) as caught:
        load_config(tmp_path)
    assert time.thread_time() - start < 1
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    assert str(caught.value).startswith(f"{tmp_path}/config.json: ")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depth": 10**9}, "vision_config.depth: "),
        ({"hidden_size": "48"}, "vision_config.hidden_size: "),
        ({"patch_size": 0}, "vision_config.patch_size: "),
        ({"spatial_merge_size": True}, "vision_config.spatial_merge_size: "),
        ({"num_position_embeddings": 10**12}, "vision_config.num_position_embeddings: "),
    ],
)
def test_numbers_that_no_tower_has(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_vision_checkpoint(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= values
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"config\.json: {message}"):
        load_vision_config(folder)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "[]",
        "null",
        "",
        '{"model_type": "qwen3_5_text", "vocab_size": ' + "9" * 5000 + "}",
        "\udcff",
    ],
    ids=["deep list", "deep object", "list", "null", "empty", "5000 digits", "not UTF-8"],
)
def test_what_is_no_configuration(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    for arguments in (
        ["--profile", "cpu", str(tmp_path)],
        ["plan", "--profile", "cpu", str(tmp_path)],
    ):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == USER_ERROR
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"error: {tmp_path}/config.json is not ") and "download it again" in line


def test_a_config_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*config\.json \(Is a directory\)"):
        load_config(tmp_path)


@pytest.mark.parametrize("head_dim", [4, 12, 20, 33, 36, 100])
def test_heads_that_a_kernel_refuses(head_dim: int, tmp_path: Path) -> None:
    """GroupQueryAttention fails when it runs; the portable lowering has no such limit."""
    pairs = head_dim // 4
    sections = rope(partial_rotary_factor=2 * pairs / head_dim, mrope_section=[pairs, 0, 0])
    folder = write_random_checkpoint(tmp_path / "checkpoint", head_dim=head_dim, **sections)
    with pytest.raises(UserError, match=rf"head_dim is {head_dim}, and .* takes multiples of 8: .*portable"):
        export(Checkpoint.open(str(folder)), float_profile("fused"), tmp_path / "fused", Quiet())
    assert not list(tmp_path.glob("*fused*"))
    artifact = make_artifact(folder, float_profile("portable"), tmp_path / "portable")
    compare(folder, artifact)


ODD: dict[str, dict[str, Any]] = {
    "heads of 8, all rotated": {"head_dim": 8, **rope(partial_rotary_factor=1.0)},
    "rotated by 18 of 72": {"head_dim": 72, **rope(mrope_section=[3, 3, 3])},
    "heads of 520": {"head_dim": 520, **rope(mrope_section=[23, 21, 21])},
    "one key, five values": {"linear_key_head_dim": 1, "linear_value_head_dim": 5},
    "two taps": {"linear_conv_kernel_dim": 2},
    "an epsilon of 0": {"rms_norm_eps": 0.0},
    "an epsilon of 1": {"rms_norm_eps": 1.0},
    "a base of 1": rope(rope_theta=1.0),
    "a base of 1e30": rope(rope_theta=1e30),
    "a base below 1": rope(rope_theta=0.5),
    "no height, no width": rope(mrope_section=[4, 0, 0]),
    "one expert": {"num_experts": 1, "num_experts_per_tok": 1},
    "every expert": {"num_experts": 5, "num_experts_per_tok": 5},
    "YaRN, ramp the other way": yarn(beta_fast=1.0, beta_slow=32.0),
    "YaRN by 1": yarn() | rope(rope_type="yarn", factor=1, original_max_position_embeddings=64),
    "YaRN within a ramp of fractions": yarn(truncate=False, mscale=0.7, mscale_all_dim=2.0),
}


def compare(folder: Path, artifact: Path) -> None:
    ids = np.random.default_rng(4).integers(0, 512, 21)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor(ids)[None]).logits[0].numpy()
    session = Session(artifact)
    found = np.concatenate([session.run(part)[0] for part in (ids[:13], ids[13:14], ids[14:])])
    assert cosine(found, expected).min() > 0.99999


@pytest.mark.parametrize("lowering", ["fused", "portable"])
@pytest.mark.parametrize("case", ODD)
def test_odd_but_valid(case: str, lowering: str, tmp_path: Path) -> None:
    layers = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    folder = write_random_checkpoint(tmp_path / "checkpoint", **layers, **ODD[case])
    compare(folder, make_artifact(folder, float_profile(lowering), tmp_path / "artifact"))
