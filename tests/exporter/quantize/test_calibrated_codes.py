"""Codes on a calibration text: inputs of both runs against transformers, what they spare, going on."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from qwen_common.errors import UserError
from qwen_export.backends.onnx.graphs import build_graphs
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.export import export
from qwen_export.graph.weights import PlacedWeight
from qwen_export.quantize import calibrated_codes, gptq
from qwen_export.quantize.blockwise import Compensation, Quantization, Quantized, dequantize
from qwen_export.quantize.calibrated_codes import Codes, with_codes
from qwen_export.quantize.calibration import calibration_samples
from qwen_export.quantize.gptq import SAMPLES, compensation
from qwen_profiles.schema import load_profile
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.geometry import GEOMETRIES, generated_checkpoint
from benchmarks.quality import log_softmax, measure, windows
from benchmarks.support.artifacts import Quiet
from benchmarks.support.checkpoints import TINY, TINY_MOE, TINY_VL, copy_tokenizer
from tests.support.calibration import correlated, peak_bytes
from tests.support.exported import Exported
from tests.support.quantized_checkpoints import gptq as gptq_checkpoint
from tests.support.quantized_checkpoints import write_quantized_checkpoint
from tests.support.random_checkpoints import load_tensors, save_shards

HEAD = "model.embed_tokens.weight"  # tied


def placed_of(checkpoint: Checkpoint) -> Sequence[PlacedWeight]:
    return build_graphs(checkpoint, load_profile("cpu-int4"), mtp=False).placed


def coded(
    shapes: dict[str, tuple[int, ...]], found: dict[str, dict[int | None, np.ndarray]]
) -> calibrated_codes._Coded:
    """Weights of zeros whose exact inputs were `found`."""

    class Zeros:
        def __init__(self, shape: tuple[int, ...]) -> None:
            self.shape = shape

    tensors = {name: Zeros(shape) for name, shape in shapes.items()}
    exact = calibrated_codes._Exact(tensors, set(shapes))  # type: ignore[arg-type]
    exact.found = found
    form = Quantization(4, 32, True, np.dtype(np.float32))
    wanted = {name: [calibrated_codes._Wanted(0, shape[0], form)] for name, shape in shapes.items()}
    return calibrated_codes._Coded(tensors, wanted, exact, None)  # type: ignore[arg-type]


def test_wide_inputs_are_taken_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "_LONGEST_RUN", 1024)
    x = correlated(300, 2048)
    found = coded({"wide": (8, 2048)}, {"wide": {None: x.copy()}})._of_tensor("wide", x)
    assert found.correction is not None
    assert found.feedback.shape == found.correction.shape == (2048, 1024)


def test_rows_that_are_looked_up_too_count_by_themselves() -> None:
    """By float64: H's diagonal has its mean once more."""
    inputs = correlated(600, 64)
    found = coded({"table": (8, 64)}, {"table": {None: inputs}})._of_tensor(
        "table", inputs, calibrated_codes._LOOKED_UP
    )
    exact = (inputs.T @ inputs).astype(np.float64)
    share = calibrated_codes._LOOKED_UP + gptq._DAMPING * 64 / 600
    damped = exact + np.eye(64) * np.trace(exact) / 64 * share
    upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    roots = np.diag(upper)
    np.testing.assert_allclose(np.tril(found.feedback, -1), np.tril((upper / roots).T, -1), atol=1e-5)
    np.testing.assert_allclose(found.importance, np.square(roots / roots.max()), rtol=1e-4)


def test_an_expert_that_no_token_chose_has_the_layers_product() -> None:
    inputs = correlated(4000, 64)
    of = coded({"experts": (8, 16, 64)}, {"experts": {0: inputs[:1000], 7: inputs[1000:]}})._of_expert
    found = of("experts", 5, None)
    shared = calibrated_codes._SHARED_TOKENS
    expected = compensation(inputs.T @ inputs * np.float32(shared / 4000), shared)
    np.testing.assert_allclose(np.tril(found.feedback, -1), np.tril(expected.feedback, -1), atol=1e-6)
    np.testing.assert_allclose(found.importance, expected.importance, rtol=1e-5)
    assert found.correction is None


def test_a_few_tokens_move_an_expert_little() -> None:
    """Beside many whose inputs miss as much."""
    x, aim = correlated(4000, 64), correlated(4000, 64) + correlated(4000, 64, seed=5) * np.float32(0.3)
    sizes = []
    for count in (3, 30, 3000):
        of = coded({"experts": (8, 16, 64)}, {"experts": {0: aim[:count], 1: aim[count:]}})._of_expert
        correction = of("experts", 0, x[:count]).correction
        assert correction is not None
        sizes.append(float(np.linalg.norm(correction)))
    assert sizes[0] < 0.3 * sizes[2]
    assert sizes[0] < sizes[1] < sizes[2]


def test_memory_is_one_factor_and_the_widest_activations(tmp_path: Path) -> None:
    """Beside the codes, of four bits each and scales."""
    wide, tokens = 4096, 16 * 128
    geometry = {
        **GEOMETRIES["0.8B"],
        "hidden_size": 128,
        "intermediate_size": wide,
        "num_hidden_layers": 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "full_attention_interval": 2,
        "vocab_size": 512,
    }
    checkpoint = generated_checkpoint(tmp_path, geometry)
    placed = placed_of(checkpoint)
    text = np.random.default_rng(0).integers(512, size=(16, 128))

    def ask() -> None:
        for _ in with_codes(checkpoint.config, checkpoint.tensors, placed, text, asymmetric=True):
            pass

    assert peak_bytes(ask) < 1.2 * 4 * wide**2 + 2.5 * 4 * wide * tokens


def watched(model: PreTrainedModel, text: np.ndarray) -> dict[str, np.ndarray]:
    """What transformers' projections are given, [tokens, K] by tensor."""
    inputs: dict[str, np.ndarray] = {}

    def watch(name: str) -> RemovableHandle:
        def note(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            inputs[f"{name}.weight"] = args[0].reshape(-1, args[0].shape[-1]).numpy().copy()

        return model.get_submodule(name).register_forward_pre_hook(note)

    hooks = [watch(name) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    with torch.no_grad():
        model(torch.from_numpy(text))
    for hook in hooks:
        hook.remove()
    inputs[HEAD] = inputs.pop("lm_head.weight")
    return inputs


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[np.ndarray]]]:
    """What comes in to each tensor in the coded run, expert by expert."""
    found: dict[str, list[np.ndarray]] = {}
    of_tensor, of_expert = calibrated_codes._Coded._of_tensor, calibrated_codes._Coded._of_expert

    def tensor(self: calibrated_codes._Coded, name: str, x: np.ndarray, alone: float = 0.0) -> Compensation:
        found.setdefault(name, []).append(x.reshape(-1, x.shape[-1]).copy())
        return of_tensor(self, name, x, alone)

    def expert(self: calibrated_codes._Coded, name: str, index: int, x: np.ndarray | None) -> Compensation:
        if x is not None:
            found.setdefault(name, []).append(x.copy())
        return of_expert(self, name, index, x)

    monkeypatch.setattr(calibrated_codes._Coded, "_of_tensor", tensor)
    monkeypatch.setattr(calibrated_codes._Coded, "_of_expert", expert)
    return found


@pytest.mark.parametrize("asymmetric", [False, True], ids=["gptq", "gptaq"])
@pytest.mark.parametrize("folder", [TINY, TINY_MOE], ids=["dense", "experts"])
def test_with_exact_codes_inputs_are_what_transformers_projections_are_given(
    folder: Path, asymmetric: bool, monkeypatch: pytest.MonkeyPatch, given: dict[str, list[np.ndarray]]
) -> None:
    checkpoint = Checkpoint.open(str(folder))
    text = calibration_samples(checkpoint, None, most=3)
    expected = watched(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), text)
    monkeypatch.setattr(calibrated_codes, "quantize", lambda rows, form, own: rows)
    monkeypatch.setattr(calibrated_codes, "dequantize", lambda rows, k, form: rows)
    monkeypatch.setattr(calibrated_codes._Codes, "put", lambda *_: None)
    placed = placed_of(checkpoint)
    names = [
        one.weight.name
        for one, _ in with_codes(checkpoint.config, checkpoint.tensors, placed, text, asymmetric=True)
    ]
    assert sorted(names) == sorted(weight.name for weight, _ in placed)
    compared = 0
    for name, parts in given.items():
        if "experts." in name and "shared" not in name:
            chosen = checkpoint.config.num_experts_per_tok
            x = np.concatenate(parts)
            assert len(x) == text.size * chosen
            if name.endswith("gate_up_proj"):  # every token comes in to as many as are chosen
                once = expected[name.replace("experts.gate_up_proj", "shared_expert.up_proj.weight")]
                np.testing.assert_allclose(x.sum(0), once.sum(0) * chosen, atol=1e-2 * np.abs(x).max())
            continue
        np.testing.assert_allclose(parts[0], expected[name], atol=1e-3 * np.abs(expected[name]).max())
        compared += 1
    # The gates of the recurrence and of the experts are not in 4 bits.
    layers = checkpoint.config.layer_types
    gates = 2 * layers.count("linear_attention") + (len(layers) if folder == TINY_MOE else 0)
    assert len(expected) - compared == gates


def matrices(
    checkpoint: Checkpoint, made: list[tuple[PlacedWeight, Codes | None]]
) -> Iterator[tuple[str, np.ndarray]]:
    """float32, by name."""
    for (weight, _), codes in made:
        if codes is None:
            continue
        assert isinstance(weight.storage, Quantization)
        for name in {rows.tensor for rows in weight.rows}:
            n, k = checkpoint.tensors[name].shape
            packed, scales, *zeros = codes(name, 0, n)
            stored = Quantized(
                packed.reshape(weight.storage.packed_shape(n, k)), scales, zeros[0] if zeros else None
            )
            yield name, dequantize(stored, k, weight.storage)


def test_inputs_are_what_the_codes_made_so_far_give_in_transformers(
    given: dict[str, list[np.ndarray]],
) -> None:
    checkpoint = Checkpoint.open(str(TINY))
    text = calibration_samples(checkpoint, None, most=3)
    made = list(
        with_codes(checkpoint.config, checkpoint.tensors, placed_of(checkpoint), text, asymmetric=True)
    )
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    exact = watched(model, text)
    state = model.state_dict()
    for name, matrix in matrices(checkpoint, made):
        if name != HEAD:  # it is exact in both
            state[name].copy_(torch.from_numpy(matrix))
    expected = watched(model, text)
    for name, (x,) in given.items():
        largest = np.abs(expected[name]).max()
        np.testing.assert_allclose(x, expected[name], atol=2e-3 * largest)
        if "layers.0.linear_attn.in" not in name:
            assert np.abs(x - exact[name]).max() > 0.02 * largest


@pytest.mark.parametrize("folder", [TINY, TINY_MOE], ids=["dense", "experts"])
def test_less_is_lost_on_text_that_was_not_seen(folder: Path, tmp_path: Path) -> None:
    texts = windows(4096)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = np.stack(
            [log_softmax(model(torch.from_numpy(ids)[None]).logits[0].numpy()) for ids in texts]
        )
    lost = {}
    for compression in ("data-free", "gptq", "gptaq"):
        profile = load_profile("cpu-int4", [f"compression={compression}"])
        artifact = tmp_path / compression
        export(Checkpoint.open(str(folder)), profile, artifact, Quiet(), all_logits=True)
        lost[compression] = measure(artifact, texts, expected)["kl"]
    assert lost["gptaq"] < lost["gptq"] < 0.96 * lost["data-free"]


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


@pytest.mark.parametrize("compression", ["gptq", "gptaq"])
def test_an_interrupted_export_goes_on_and_ends_with_the_same_bytes(
    exported: Exported, tmp_path: Path, compression: str
) -> None:
    checkpoint = Checkpoint.open(str(TINY_VL))
    profile = load_profile("cpu-int4", [f"compression={compression}"])
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
    for compression in ("data-free", "gptaq"):
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
    assert found["gptaq"] and found["gptaq"] == found["data-free"]


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
