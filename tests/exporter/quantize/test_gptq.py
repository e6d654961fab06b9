"""GPTQ: its codes against the published algorithm, its inputs against transformers, its gain end to end."""

from __future__ import annotations

import hashlib
import shutil
import tracemalloc
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from qwen_common.errors import UserError
from qwen_export.backends.onnx.graphs import build_graphs
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.export import export
from qwen_export.quantize import blockwise, gptq
from qwen_export.quantize.blockwise import Compensation, Quantization, dequantize, quantize
from qwen_export.quantize.calibration import calibration_samples
from qwen_export.quantize.gptq import SAMPLES, compensation, with_compensations
from qwen_profiles.schema import load_profile
from transformers import AutoModelForCausalLM

from benchmarks.geometry import GEOMETRIES, generated_checkpoint
from benchmarks.quality import log_softmax, measure, windows
from benchmarks.support.artifacts import Quiet
from benchmarks.support.checkpoints import TINY, TINY_MOE, TINY_VL, copy_tokenizer
from tests.support.exported import Exported
from tests.support.quantized_checkpoints import gptq as gptq_checkpoint
from tests.support.quantized_checkpoints import write_quantized_checkpoint
from tests.support.random_checkpoints import load_tensors, save_shards

FORMS = [
    Quantization(bits, block, symmetric, np.dtype(np.float32))
    for bits, block, symmetric in product((2, 4), (16, 32, 64, 128), (True, False))
]


def correlated(tokens: int, k: int, seed: int = 0) -> np.ndarray:
    """Inputs [tokens, k] that mostly lie in few directions, as activations do."""
    generator = np.random.default_rng(seed)
    directions = generator.standard_normal((k // 4, k))
    mixed = generator.standard_normal((tokens, k // 4)) @ directions
    return (mixed + 0.5 * generator.standard_normal((tokens, k))).astype(np.float32)


def published(weight: np.ndarray, form: Quantization, gram: np.ndarray) -> np.ndarray:
    """Frantar et al.'s loop, in float64: every error is spread over all features that are still to come. A
    block's scale is fitted as ours is, by what an error costs that is not made up for: 1 / inverse^2."""
    inverse = np.linalg.cholesky(np.linalg.inv(gram)).T
    weight, result = weight.astype(np.float64), np.empty(weight.shape)
    k, levels = weight.shape[1], 2**form.bits - 1
    costs = np.diag(inverse) ** -2.0
    for start in range(0, k, form.block_size):
        stop = min(start + form.block_size, k)
        block = np.pad(weight[:, start:stop], ((0, 0), (0, form.block_size - (stop - start))))
        alone = np.pad(costs[start:stop], (0, form.block_size - (stop - start)))
        nothing = np.zeros((form.block_size, form.block_size), np.float32)
        fitted = quantize(block.astype(np.float32), form, Compensation(nothing, np.float32(alone)))
        scale = fitted.scales[:, 0].astype(np.float64)
        middle = 2.0 ** (form.bits - 1)
        zero = (
            middle if fitted.zero_points is None else (fitted.zero_points[:, 0] & levels).astype(np.float64)
        )
        for feature in range(start, stop):
            code = np.clip(np.rint(weight[:, feature] / scale) + zero, 0, levels)
            result[:, feature] = (code - zero) * scale
            error = (weight[:, feature] - result[:, feature]) / inverse[feature, feature]
            weight[:, feature:] -= np.outer(error, inverse[feature, feature:])
    return result


@pytest.fixture
def first_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of 4 bits stay as the published algorithm leaves them."""
    monkeypatch.setattr(blockwise, "_ROUNDS", {})


@pytest.mark.parametrize("k", [256, 200])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.usefixtures("first_codes")
def test_the_codes_are_the_published_algorithms(form: Quantization, k: int) -> None:
    weight = np.random.default_rng(1).standard_normal((40, k)).astype(np.float32)
    x = correlated(600, k)
    gram = x.T @ x
    damped = gram + np.eye(k) * np.trace(gram) / k * gptq._DAMPING * k / len(x)
    ours = dequantize(quantize(weight, form, compensation(gram, len(x))), k, form)
    theirs = published(weight, form, damped)
    # A value halfway between two codes may be rounded either way, and what follows in its row differs.
    same = np.isclose(ours, theirs, atol=1e-4).all(axis=1)
    assert same.mean() > 0.8
    errors = [np.square((found - weight) @ x.T).sum() for found in (ours, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@pytest.mark.parametrize("tokens", [300, 3000], ids=["fewer tokens than features", "more"])
@pytest.mark.usefixtures("first_codes")
def test_work_in_stripes_and_halves_changes_no_code(tokens: int) -> None:
    """Beside float64, feature by feature, for more features than a stripe of H has."""
    k, form = 900, Quantization(4, 64, True, np.dtype(np.float32))
    weight = np.random.default_rng(1).standard_normal((64, k)).astype(np.float32)
    x = correlated(tokens, k)
    exact = (x.T @ x).astype(np.float64)
    damped = exact + np.eye(k) * np.trace(exact) / k * gptq._DAMPING * k / tokens
    found = compensation(gptq.gram([x[:100], x[100:]], k), tokens)
    upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    roots = np.diag(upper)
    np.testing.assert_allclose(np.tril(found.feedback, -1), np.tril((upper / roots).T, -1), atol=1e-5)
    np.testing.assert_allclose(found.importance, np.square(roots / roots.max()), rtol=1e-4)
    ours = dequantize(quantize(weight, form, found), k, form)
    theirs = published(weight, form, damped)
    assert np.isclose(ours, theirs, atol=1e-4).mean() > 0.995
    errors = [np.square((codes - weight) @ x.T).sum() for codes in (ours, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


@pytest.mark.parametrize("tokens", [300, 3000], ids=["fewer tokens than features", "more"])
@pytest.mark.parametrize("k", [256, 90])
@pytest.mark.parametrize("form", [form for form in FORMS if form.bits == 4], ids=str)
def test_codes_of_four_bits_cost_less_than_the_published_algorithms(
    form: Quantization, k: int, tokens: int
) -> None:
    """By the damped H, of which both are made: together well less, and hardly a row more."""
    weight = np.random.default_rng(1).standard_normal((200, k)).astype(np.float32)
    x = correlated(tokens, k)
    gram = x.T @ x
    damped = gram + np.eye(k) * np.trace(gram) / k * gptq._DAMPING * k / tokens
    ours = dequantize(quantize(weight, form, compensation(gram.copy(), tokens)), k, form)
    theirs = published(weight, form, damped)
    costs = [np.einsum("nk,kl,nl->n", error, damped, error) for error in (ours - weight, theirs - weight)]
    # With fewer tokens, little is made up for: there are better codes, but not by much.
    assert costs[0].sum() < (0.97 if tokens > k * 2 else 0.995) * costs[1].sum()
    assert (costs[0] < costs[1]).mean() > 0.6


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("scale_dtype", [np.float32, np.float16])
def test_of_one_block_no_turn_costs_more_than_the_one_before(
    symmetric: bool, scale_dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every row, also of zeros, of one lone value, and of the least and largest that are stored."""
    weight = np.random.default_rng(1).standard_normal((64, 128)).astype(np.float32)
    weight[0], weight[1], weight[2, 1:], weight[3:6] = 0, 0.25, 0, weight[3:6] * np.float32(1e-6)
    form, x = Quantization(4, 128, symmetric, np.dtype(scale_dtype)), correlated(500, 128).astype(np.float64)
    damped = x.T @ x + np.eye(128) * np.trace(x.T @ x) / 128 * gptq._DAMPING * 128 / len(x)
    found = compensation((x.T @ x).astype(np.float32), len(x))
    least = 1e-9 * np.einsum("nk,kl,nl->n", weight, damped, weight)  # a last bit of the scale
    before = np.full(len(weight), np.inf)
    for rounds in range(4):
        monkeypatch.setattr(blockwise, "_ROUNDS", {4: rounds})
        error = dequantize(quantize(weight, form, found), 128, form).astype(np.float64) - weight
        costs = np.einsum("nk,kl,nl->n", error, damped, error)
        assert (costs <= before * (1 + (1e-5 if scale_dtype == np.float32 else 1e-3)) + least).all()
        before = costs


RUNS = [
    Quantization(bits, block, symmetric, np.dtype(np.float16))
    for bits, block, symmetric in [(4, 32, True), (4, 256, False), (2, 256, False)]
]


@pytest.mark.parametrize("form", RUNS, ids=str)
def test_features_in_runs_have_the_codes_of_each_run_alone(form: Quantization) -> None:
    k, run = 2500, 1024
    weight = np.random.default_rng(1).standard_normal((16, k)).astype(np.float32)
    x = correlated(500, k)
    found = quantize(weight, form, compensation(gptq.gram([x[:200], x[200:]], k, run), len(x)))
    assert found.packed.shape == form.packed_shape(16, k)
    ours = dequantize(found, k, form)
    for start in range(0, k, run):
        features = slice(start, start + run)
        part = np.ascontiguousarray(x[:, features])
        size = part.shape[1]
        alone = quantize(weight[:, features], form, compensation(gptq.gram([part], size), len(x)))
        same = np.isclose(ours[:, features], dequantize(alone, size, form), atol=1e-4)
        assert same.mean() > 0.99


def test_only_the_widest_inputs_are_taken_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.8B to 4B, the mixtures' and 27B's hidden states are not; 27B's and 9B's MLPs in two."""
    assert [gptq.run_of(k) for k in (64, 1000, 5120, 9216)] == [64, 1000, 5120, 9216]
    assert [gptq.run_of(k) for k in (17408, 12288)] == [9216, 6144]
    assert all(gptq.run_of(k) % 1024 == 0 for k in range(9217, 60000, 100))
    monkeypatch.setattr(gptq, "_LONGEST_RUN", 1024)
    of = gptq._Compensations({"wide": {None: correlated(300, 2048)}}).of
    assert of("wide").feedback.shape == (2048, 1024)


def peak_bytes(work: Callable[[], object]) -> int:
    """Of what `work` allocates, at most at a time."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_factor_takes_the_place_of_its_products() -> None:
    k = 3072
    x = np.random.default_rng(0).standard_normal((500, k), dtype=np.float32)
    assert peak_bytes(lambda: compensation(gptq.gram([x], k), len(x))) < 1.3 * 4 * k**2


def test_memory_is_one_factor_and_the_widest_activations(tmp_path: Path) -> None:
    wide, tokens = 4096, 16 * 128
    geometry = {
        **GEOMETRIES["0.8B"],
        "hidden_size": 128,
        "intermediate_size": wide,
        "num_hidden_layers": 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "full_attention_interval": 2,
        "vocab_size": 512,
    }
    checkpoint = generated_checkpoint(tmp_path, geometry)
    placed = build_graphs(checkpoint, load_profile("cpu-int4"), mtp=False).placed
    text = np.random.default_rng(0).integers(512, size=(16, 128))

    def ask() -> None:
        for (weight, _), of in with_compensations(checkpoint.config, checkpoint.tensors, placed, text):
            for rows in weight.rows:
                of(rows.tensor, None)

    assert peak_bytes(ask) < 1.2 * 4 * wide**2 + 2.5 * 4 * wide * tokens


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_error_of_the_output_falls(form: Quantization) -> None:
    weight = np.random.default_rng(2).standard_normal((64, 256)).astype(np.float32)
    seen, unseen = correlated(2048, 256), correlated(2048, 256)[::-1] * np.float32(1.5)
    codes = quantize(weight, form, compensation(seen.T @ seen, len(seen)))
    nearest, ours = (
        np.square((dequantize(found, 256, form) - weight) @ unseen.T).sum()
        for found in (quantize(weight, form), codes)
    )
    assert ours < 0.8 * nearest


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_without_anything_to_make_up_for_the_codes_are_the_nearest(form: Quantization) -> None:
    weight = np.random.default_rng(3).standard_normal((24, 200)).astype(np.float32)
    found, nearest = (
        quantize(weight, form, compensation(np.zeros((200, 200), np.float32), 10)),
        quantize(weight, form),
    )
    np.testing.assert_array_equal(found.packed, nearest.packed)
    np.testing.assert_allclose(found.scales, nearest.scales, rtol=1e-6)
    if not form.symmetric:
        np.testing.assert_array_equal(found.zero_points, nearest.zero_points)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_scale_is_fitted_to_the_features_that_matter(form: Quantization) -> None:
    """Inputs that do not go together, a few of them a hundred times as large as the others."""
    weight = np.random.default_rng(3).standard_normal((24, 256)).astype(np.float32)
    sizes = np.where(np.random.default_rng(4).random(256) < 0.05, 100, 1).astype(np.float32)
    found, nearest = quantize(weight, form, compensation(np.diag(sizes**2), 10**9)), quantize(weight, form)
    errors = [np.square((dequantize(q, 256, form) - weight) * sizes).sum() for q in (found, nearest)]
    assert errors[0] < 0.8 * errors[1]


def test_rows_that_are_looked_up_too_count_by_themselves() -> None:
    """By float64: H's diagonal has its mean once more."""
    inputs = correlated(600, 64)
    found = gptq._Compensations({"table": {None: inputs}}, {"table"}).of("table")
    exact = (inputs.T @ inputs).astype(np.float64)
    share = gptq._LOOKED_UP + gptq._DAMPING * 64 / 600
    damped = exact + np.eye(64) * np.trace(exact) / 64 * share
    upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    roots = np.diag(upper)
    np.testing.assert_allclose(np.tril(found.feedback, -1), np.tril((upper / roots).T, -1), atol=1e-5)
    np.testing.assert_allclose(found.importance, np.square(roots / roots.max()), rtol=1e-4)


def test_an_expert_that_no_token_chose_has_the_layers_product() -> None:
    inputs = correlated(4000, 64)
    of = gptq._Compensations({"experts": {0: inputs[:1000], 7: inputs[1000:]}}).of
    found = of("experts", 5)
    expected = compensation(inputs.T @ inputs * np.float32(gptq._SHARED_TOKENS / 4000), gptq._SHARED_TOKENS)
    np.testing.assert_allclose(np.tril(found.feedback, -1), np.tril(expected.feedback, -1), atol=1e-6)
    np.testing.assert_allclose(found.importance, expected.importance, rtol=1e-5)


@pytest.mark.parametrize("folder", [TINY, TINY_MOE], ids=["dense", "experts"])
def test_inputs_are_what_transformers_projections_are_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(str(folder))
    text = calibration_samples(checkpoint, None, most=3)
    grams: dict[str, tuple[np.ndarray, int]] = {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def watch(name: str) -> None:
        def note(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            grams[f"{name}.weight"] = ((x.T @ x).numpy(), len(x))

        model.get_submodule(name).register_forward_pre_hook(note)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            watch(name)
    with torch.no_grad():
        model(torch.from_numpy(text))
    grams["model.embed_tokens.weight"] = grams.pop("lm_head.weight")

    # What is handed on as the feedback is then the products themselves, their lower triangles.
    monkeypatch.setattr(gptq, "compensation", lambda gram, tokens, alone=0.0: (gram, tokens))
    profile = load_profile("cpu-int4")
    placed = build_graphs(checkpoint, profile, mtp=False).placed
    names, compared = [], 0
    for (weight, _), products in with_compensations(checkpoint.config, checkpoint.tensors, placed, text):
        names.append(weight.name)
        if products is gptq.nearest:
            continue
        for name in {rows.tensor for rows in weight.rows}:
            if weight.of_experts:
                own = [products(name, expert) for expert in range(checkpoint.config.num_experts)]
                tokens = sum(count - gptq._SHARED_TOKENS for _, count in own)
                chosen = checkpoint.config.num_experts_per_tok
                assert tokens == text.size * chosen
                if name.endswith("gate_up_proj"):  # every token comes in to as many as are chosen
                    shared, _ = grams[name.replace("experts.gate_up_proj", "shared_expert.up_proj.weight")]
                    expected = shared * chosen * (1 + gptq._SHARED_TOKENS * len(own) / tokens)
                    total = sum(gram for gram, _ in own)
                    np.testing.assert_allclose(
                        np.tril(total), np.tril(expected), atol=1e-4 * np.abs(expected).max()
                    )
                continue
            gram, tokens = products(name, None)
            expected, count = grams[name]
            assert tokens == count
            scale = np.abs(expected).max()
            np.testing.assert_allclose(np.tril(gram), np.tril(expected), atol=1e-4 * scale)
            compared += 1
    assert sorted(names) == sorted(weight.name for weight, _ in placed)
    linear = sum(weight.count(".weight") for weight in grams) - compared
    # The gates of the recurrence and of the experts are not in 4 bits.
    layers = checkpoint.config.layer_types
    gates = 2 * layers.count("linear_attention") + (len(layers) if folder == TINY_MOE else 0)
    assert linear == gates


@pytest.mark.parametrize("folder", [TINY, TINY_MOE], ids=["dense", "experts"])
def test_less_is_lost_on_text_that_was_not_seen(folder: Path, tmp_path: Path) -> None:
    texts = windows(4096)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = np.stack(
            [log_softmax(model(torch.from_numpy(ids)[None]).logits[0].numpy()) for ids in texts]
        )
    lost = {}
    for compression in ("data-free", "gptq"):
        profile = load_profile("cpu-int4", [f"compression={compression}"])
        artifact = tmp_path / compression
        export(Checkpoint.open(str(folder)), profile, artifact, Quiet(), all_logits=True)
        lost[compression] = measure(artifact, texts, expected)["kl"]
    assert lost["gptq"] < 0.96 * lost["data-free"]


class Interrupted(Quiet):
    """Stops after some of the work, as Ctrl-C does."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self._left = left

    def advance(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise KeyboardInterrupt


def digest(artifact: Path) -> str:
    return hashlib.sha256((artifact / "model.onnx.data").read_bytes()).hexdigest()


def test_an_interrupted_export_goes_on_and_ends_with_the_same_bytes(
    exported: Exported, tmp_path: Path
) -> None:
    checkpoint, profile = Checkpoint.open(str(TINY_VL)), load_profile("cpu-int4")
    size = sum(source.nbytes for source in checkpoint.tensors.values())
    for done in (0.2, 0.6, 0.9):
        with pytest.raises(KeyboardInterrupt):
            export(checkpoint, profile, tmp_path / "parts", Interrupted(int(done * size)))
        assert not (tmp_path / "parts").exists()
    export(checkpoint, profile, tmp_path / "parts", Quiet())
    assert digest(tmp_path / "parts") == digest(exported(TINY_VL, profile))


def test_another_text_gives_other_codes_and_starts_over(exported: Exported, tmp_path: Path) -> None:
    checkpoint, profile = Checkpoint.open(str(TINY)), load_profile("cpu-int4")
    text = tmp_path / "text.txt"
    text.write_text("The committee met on Tuesday to discuss the new timetable for the harbour ferry. " * 40)
    with pytest.raises(KeyboardInterrupt):
        export(checkpoint, profile, tmp_path / "a", Interrupted(2_000_000))
    progress = Quiet()
    export(checkpoint, profile, tmp_path / "a", progress, calibration=text)
    assert any("starting over" in note for note in progress.notes)
    assert digest(tmp_path / "a") != digest(exported(TINY, profile))


def test_codes_that_the_checkpoint_brings_stay_as_they_are(tmp_path: Path) -> None:
    source, _ = write_quantized_checkpoint(tmp_path / "source", gptq_checkpoint(), vocab_size=2048)
    checkpoint = Checkpoint.open(str(source))
    found = {}
    for compression in ("data-free", "gptq"):
        profile = load_profile("cpu-int4", [f"compression={compression}"])
        graphs = build_graphs(checkpoint, profile)
        artifact = tmp_path / compression
        export(checkpoint, profile, artifact, Quiet())
        data = (artifact / "model.onnx.data").read_bytes()
        found[compression] = {
            tensor.name: data[tensor.offset : tensor.offset + tensor.nbytes]
            for weight, tensors in graphs.placed
            if weight.prequantized
            for tensor in tensors
        }
    assert found["gptq"] and found["gptq"] == found["data-free"]


def test_another_models_tokenizer_is_refused(tmp_path: Path) -> None:
    source, _ = write_quantized_checkpoint(tmp_path / "source", None)
    copy_tokenizer(TINY, source)
    with pytest.raises(UserError, match="the model has 512 tokens: put the model's own tokenizer there"):
        export(Checkpoint.open(str(source)), load_profile("cpu-int4"), tmp_path / "out", Quiet())
    assert not (tmp_path / "out").exists()


def test_activations_that_overflow(tmp_path: Path) -> None:
    tensors = load_tensors(TINY)
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e30
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    copy_tokenizer(TINY, folder)
    shutil.copyfile(TINY / "config.json", folder / "config.json")
    save_shards(folder, tensors, 1)
    with pytest.raises(UserError, match=r"inputs of model.layers.1.mlp.down_proj.weight overflow"):
        export(Checkpoint.open(str(folder)), load_profile("cpu-int4"), tmp_path / "out", Quiet())


def test_at_most_so_much_text_is_read() -> None:
    checkpoint = Checkpoint.open(str(TINY))
    assert calibration_samples(checkpoint, None, SAMPLES).shape == (SAMPLES, 128)
