"""Far positions against transformers in float32: frequencies, logits, YaRN; and what --max-context does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from qwen_export.architecture.models.qwen3_5 import TextConfig
from qwen_export.architecture.yarn import inverse_frequencies
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.cli import main
from qwen_export.graph.model import cache_bytes_per_token
from transformers import Qwen3_5TextConfig
from transformers.cache_utils import DynamicCache
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextRotaryEmbedding

from benchmarks.support.artifacts import float_profile, make_artifact
from benchmarks.support.session import Session, cosine
from tests.support.random_checkpoints import GEOMETRY, random_model, write_random_checkpoint

LOWERINGS = ("fused", "portable")
ROPE = {
    "rope_type": "default",
    "rope_theta": 1e7,
    "partial_rotary_factor": 0.5,
    "mrope_section": [3, 3, 2],
    "mrope_interleaved": True,
}
YARN = {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}
LONG = {"max_position_embeddings": 262144, "rope_parameters": ROPE}
VARIANTS: dict[str, dict[str, Any]] = {
    "as trained": ROPE,
    "yarn as the model card has it": YARN,
    "yarn over a short context": {**YARN, "factor": 8, "original_max_position_embeddings": 4096},
    "attention factor given": {**YARN, "attention_factor": 1.5},
    "mscale": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    "other turns, not truncated": {**YARN, "beta_fast": 64, "beta_slow": 2, "truncate": False},
    "original length left out": {name: YARN[name] for name in YARN if name[:8] != "original"},
    "a factor of 1": {**YARN, "factor": 1.0},
}


@pytest.mark.parametrize("rope", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize(("theta", "head_dim"), [(1e7, 256), (1e4, 64), (1e6, 128)])
def test_frequencies_are_those_of_transformers(rope: dict[str, Any], theta: float, head_dim: int) -> None:
    """To the bit: at a million positions one bit of them is a visible angle."""
    half = head_dim // 4
    section = [half - 2 * (half // 3), half // 3, half // 3]
    values = {**GEOMETRY, **LONG, "head_dim": head_dim}
    values["rope_parameters"] = {**rope, "rope_theta": theta, "mrope_section": section}
    theirs = Qwen3_5TextRotaryEmbedding(Qwen3_5TextConfig(**values))
    frequencies, factor = inverse_frequencies(TextConfig(**values))
    np.testing.assert_array_equal(frequencies, theirs.inv_freq.numpy())
    assert factor == pytest.approx(theirs.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", ["as trained", "yarn as the model card has it", "yarn over a short context"])
def test_logits_near_and_far(name: str, lowering: str, tmp_path: Path) -> None:
    """40 tokens that begin anywhere up to the last of a million positions, and among them far jumps."""
    shape = {**LONG, "rope_parameters": VARIANTS[name]}
    checkpoint, model = write_random_checkpoint(tmp_path / "checkpoint", **shape), random_model(**shape)
    session = Session(make_artifact(checkpoint, float_profile(lowering), tmp_path / "artifact"))
    rng = np.random.default_rng(3)
    ids = rng.integers(2, 512, (1, 40))
    runs = [np.arange(start, start + 40) for start in (0, 4000, 32768, 262104, 1_048_536)]
    runs.append(np.sort(rng.integers(0, 1_048_576, 40)))
    for places in runs:
        positions = np.broadcast_to(places, (3, 1, 40))
        with torch.no_grad():
            expected = model(torch.tensor(ids), position_ids=torch.tensor(positions)).logits.numpy()
        session.reset()
        assert cosine(session.run(ids, positions), expected).min() > 0.99999, places


def test_float16_graphs_compute_angles_in_float32(tmp_path: Path) -> None:
    """float16 has no whole numbers beyond 2048: far positions must agree as well as near ones do."""
    checkpoint, model = write_random_checkpoint(tmp_path / "checkpoint", **LONG), random_model(**LONG)
    session = Session(make_artifact(checkpoint, float_profile("portable", "float16"), tmp_path / "artifact"))
    ids = np.random.default_rng(3).integers(2, 512, (1, 40))
    for start in (0, 1_048_536):
        positions = np.broadcast_to(np.arange(start, start + 40), (3, 1, 40))
        with torch.no_grad():
            expected = model(torch.tensor(ids), position_ids=torch.tensor(positions)).logits.numpy()
        session.reset()
        assert cosine(session.run(ids, positions), expected).min() > 0.9995


def export_with(folder: Path, output: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, genai_config.json (empty if there is none), and what was said on stderr."""
    command = ["--profile", "cpu", str(folder), "-o", str(output), "--no-progress", "--no-verify", *options]
    result = CliRunner().invoke(main, command)
    config = output / "genai_config.json"
    return result.exit_code, json.loads(config.read_text()) if config.exists() else {}, result.stderr


def test_max_context(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "checkpoint", **LONG)
    code, plain, said = export_with(folder, tmp_path / "plain")
    assert (code, plain["model"]["context_length"]) == (0, 32768)  # the profile's
    assert "the context is" not in said
    code, native, said = export_with(folder, tmp_path / "native", "--max-context", "262144")
    assert code == 0 and "YaRN" not in said
    assert native["model"]["context_length"] == native["search"]["max_length"] == 262144
    code, stretched, said = export_with(folder, tmp_path / "yarn", "--max-context", "1048576")
    assert code == 0 and "YaRN stretches the context by 4" in said
    assert stretched["model"]["context_length"] == 1048576
    code, _, said = export_with(folder, tmp_path / "too-far", "--max-context", "1048577")
    assert code == 2 and "1048577 tokens is more than this checkpoint can do: 262144 as trained" in said
    assert not (tmp_path / "too-far").exists()
    # The graphs differ in nothing but the rotary embedding; the weights are the same bytes.
    plain_graph = (tmp_path / "plain" / "model.onnx").read_bytes()
    assert plain_graph == (tmp_path / "native" / "model.onnx").read_bytes()
    assert plain_graph != (tmp_path / "yarn" / "model.onnx").read_bytes()


def test_context_of_a_profile_that_is_too_long(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "checkpoint", **LONG)
    code, config, said = export_with(folder, tmp_path / "artifact", "--set", "context_length=300000")
    assert code == 0 and config["model"]["context_length"] == 262144
    assert "the context is 262144 tokens, the checkpoint's own limit, and not 300000" in said


def test_max_context_means_the_yarn_that_a_config_would_ask_for(tmp_path: Path) -> None:
    plain = write_random_checkpoint(tmp_path / "plain", **LONG)
    declared = write_random_checkpoint(tmp_path / "declared", **{**LONG, "rope_parameters": YARN})
    for folder, options in ((plain, ["--max-context", "1048576"]), (declared, ["--max-context", "1000000"])):
        assert export_with(folder, tmp_path / f"{folder.name}-out", *options)[0] == 0
    graphs = [(tmp_path / f"{name}-out" / "model.onnx").read_bytes() for name in ("plain", "declared")]
    assert graphs[0] == graphs[1]


def test_only_attention_layers_keep_every_token(tmp_path: Path) -> None:
    """The manifest's figure is what the states really grow by, and no table of the graph is that long."""
    folder = write_random_checkpoint(tmp_path / "checkpoint", **LONG)
    for lowering, dtype in (("fused", "float32"), ("portable", "float16")):
        artifact = make_artifact(folder, float_profile(lowering, dtype), tmp_path / lowering)
        manifest = json.loads((artifact / "manifest.json").read_text())
        session = Session(artifact)
        sizes = []
        for count in (1, 63):
            session.run(np.arange(count) + 2)
            sizes.append(sum(state.nbytes for state in session.state.values()))
        assert sizes[1] - sizes[0] == 63 * manifest["cache_bytes_per_token"]
        assert (artifact / "model.onnx").stat().st_size < 500_000
    config = Checkpoint.open(str(folder)).config
    one_layer = 2 * config.num_key_value_heads * config.head_dim * 4
    assert cache_bytes_per_token(config, np.dtype(np.float32)) == one_layer


ONE_ATTENTION = {
    **LONG,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "rope_parameters": {**ROPE, "partial_rotary_factor": 0.25, "mrope_section": [6, 5, 5]},
}


def through_genai(artifact: Path, prompt: np.ndarray, steps: int, folder: Path) -> tuple[int, np.ndarray]:
    """Peak bytes of a process that answers `prompt`, and the logits after it and after each greedy step."""
    np.save(folder / "prompt.npy", prompt)
    script = Path(__file__).parents[2] / "support" / "long_prompt.py"
    command = [sys.executable, str(script), str(artifact), str(folder / "prompt.npy"), str(steps)]
    command.append(str(folder / "logits.npy"))
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output)["peak"], np.load(folder / "logits.npy")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_a_prompt_of_100_000_tokens(tmp_path: Path) -> None:
    """Through real GenAI: memory grows by the cache, and the answer is transformers'. About 5 minutes.

    Beside the cache each token has its id, its three positions and its place in the mask, some 50 bytes.
    """
    folder, model = (
        write_random_checkpoint(tmp_path / "checkpoint", **ONE_ATTENTION),
        random_model(**ONE_ATTENTION),
    )
    profile = float_profile("fused", prefill_chunk=512).model_copy(update={"context_length": 262144})
    artifact = make_artifact(folder, profile, tmp_path / "artifact", all_logits=False)
    prompt = np.random.default_rng(0).integers(2, 512, 100_000)
    short, _ = through_genai(artifact, prompt[:1000], 4, tmp_path)
    long, logits = through_genai(artifact, prompt, 4, tmp_path)

    cache = json.loads((artifact / "manifest.json").read_text())["cache_bytes_per_token"]
    assert cache == 2 * 128 * 4
    growth = (long - short) / (99_000 * cache)
    assert 0.99 < growth < 1.10, growth

    states = DynamicCache(config=model.config)
    with torch.no_grad():
        for piece in torch.tensor(prompt[None]).split(2048, dim=1):
            expected = model(piece, past_key_values=states, logits_to_keep=1).logits[0, -1]
        for ours in logits:
            assert cosine(ours, expected.numpy()) > 0.99999
            assert ours.argmax() == expected.argmax()
            expected = model(expected.argmax().reshape(1, 1), past_key_values=states).logits[0, -1]
