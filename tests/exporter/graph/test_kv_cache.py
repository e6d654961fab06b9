"""A KV cache in INT8 on the CPU: its codes against transformers' keys and values, what they cost, and what
goes on from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from qwen_common.errors import UserError
from qwen_common.manifest import read as read_manifest
from qwen_export.backends.onnx.graphs import build_graphs
from qwen_export.backends.onnx.stored import tensor_places
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.quantize import kv_cache
from qwen_profiles.schema import Profile, load_profile
from qwen_runtime import Model, Sampling, StateSettings
from qwen_runtime.speculative import Speculative
from qwen_runtime.tokenizer import Tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from benchmarks.quality import log_softmax
from benchmarks.support.artifacts import float_profile
from benchmarks.support.checkpoints import EVALUATION, TINY, TINY_MOE, TRAINED_HEAD
from benchmarks.support.mtp import with_head
from benchmarks.support.session import Session
from tests.support.exported import Exported

LAYER, KV_HEADS, HEADS, DIM = 3, 2, 4, 64  # of TINY, the first with full attention
GREEDY = Sampling(temperature=0)


def int8(profile: Profile) -> Profile:
    return profile.model_copy(update={"cache_dtype": "int8"})


@pytest.fixture(scope="module")
def coded(exported: Exported) -> Path:
    """Nothing is rounded but the cache."""
    return exported(TINY, int8(float_profile("fused")), all_logits=True)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return Tokenizer.open(TINY).encode(EVALUATION.read_text())[:700]


def run(session: Session, ids: list[int], piece: int) -> np.ndarray:
    return np.concatenate([session.run(ids[at : at + piece])[0] for at in range(0, len(ids), piece)])


def stored(artifact: Path, name: str) -> np.ndarray:
    checkpoint = Checkpoint.open(str(TINY))
    graphs = build_graphs(checkpoint, int8(float_profile("fused")), all_logits=True)
    places = dict(tensor_places(artifact, graphs))
    offset, shape = places[name]
    data = artifact / "model.onnx.data"
    return np.fromfile(data, np.float32, int(np.prod(shape)), offset=offset).reshape(shape)


def test_codes_are_keys_and_values_by_their_scales(coded: Path, ids: list[int]) -> None:
    session = Session(coded)
    run(session, ids, 100)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([ids]), cache=cache)
    norm = 1 + model.model.layers[LAYER].self_attn.k_norm.weight.detach().numpy()
    key_scale = norm / stored(coded, f"model.layers.{LAYER}.self_attn.qk_norm.weight")[HEADS:]
    value_scale = stored(coded, f"model.layers.{LAYER}.self_attn.v_cache.inverse_scale") ** -1.0
    expected = cache.layers[LAYER].keys.numpy()[0], cache.layers[LAYER].values.numpy()[0]
    scales = key_scale, value_scale.reshape(KV_HEADS, DIM)
    for kind, truth, scale in zip(("key", "value"), expected, scales, strict=True):
        codes = session.state[f"past_key_values.{LAYER}.{kind}"][0]
        assert codes.dtype == np.int8
        assert codes.shape == truth.shape
        step = scale[:, None]
        inside = np.abs(truth) <= 127 * step
        assert inside.mean() > 0.9999
        # Half a step, and a little for what the earlier layer's codes changed.
        assert (np.abs(codes * step - truth) / step)[inside].max() < 1.0
        assert np.abs(codes).max() > 80  # the codes are made use of
        # All channels: none is so coarse that it has a handful of codes.
        assert np.abs(codes).max(axis=1).min() > 40


def test_its_cost_is_far_below_that_of_weights(coded: Path, ids: list[int], exported: Exported) -> None:
    """Of the profile `cpu` it is 0.025 nats."""
    plain = Session(exported(TINY, float_profile("fused"), all_logits=True))
    expected = log_softmax(run(plain, ids, 100).astype(np.float64))
    for piece in (100, 7):
        found = log_softmax(run(Session(coded), ids, piece).astype(np.float64))
        divergence = (np.exp(expected) * (expected - found)).sum(-1)
        assert 1e-7 < divergence.mean() < 5e-4
    assert plain.state[f"past_key_values.{LAYER}.key"].dtype == np.float32


def attention_node(length: int) -> ort.InferenceSession:
    """One with INT8 keys and values, and room for `length` tokens."""
    tensor = onnx.helper.make_tensor_value_info
    float32, int8, int32 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT8, onnx.TensorProto.INT32
    names = ["query", "key", "value", "past_key", "past_value", "last", "total", *[""] * 5, "one", "one"]
    node = onnx.helper.make_node(
        "GroupQueryAttention",
        names,
        ["output", "present_key", "present_value"],
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=KV_HEADS,
        k_quant_type="PER_TENSOR",
        v_quant_type="PER_TENSOR",
        kv_cache_bit_width=8,
    )
    inputs = [
        tensor("query", float32, [1, "run", HEADS * DIM]),
        *(tensor(name, float32, [1, "run", KV_HEADS * DIM]) for name in ("key", "value")),
        *(tensor(name, int8, [1, KV_HEADS, length, DIM]) for name in ("past_key", "past_value")),
        tensor("last", int32, [1]),
        tensor("total", int32, []),
    ]
    outputs = [tensor("output", float32, None)]
    outputs += [tensor(f"present_{name}", int8, [1, KV_HEADS, length, DIM]) for name in ("key", "value")]
    one = onnx.numpy_helper.from_array(np.ones(1, np.float32), "one")
    graph = onnx.helper.make_graph([node], "attention", inputs, outputs, [one])
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("run", [1, 5, 40])
def test_the_kernel_rounds_and_cuts_off(run: int) -> None:
    """After a past, into the buffer that it is given, beyond the codes too."""
    past, rng = 30, np.random.default_rng(run)
    total = past + run
    query = rng.standard_normal((1, run, HEADS * DIM)).astype(np.float32) * 0.01
    key, value = (rng.uniform(-200, 200, (1, run, KV_HEADS * DIM)).astype(np.float32) for _ in range(2))
    buffers = [np.zeros((1, KV_HEADS, 100, DIM), np.int8) for _ in range(2)]
    for buffer in buffers:
        buffer[:, :, :past] = rng.integers(-128, 128, (1, KV_HEADS, past, DIM))
    before = [buffer.copy() for buffer in buffers]
    binding = (session := attention_node(100)).io_binding()
    lengths = {"last": np.array([total - 1], np.int32), "total": np.array(total, np.int32)}
    for name, array in ({"query": query, "key": key, "value": value} | lengths).items():
        binding.bind_cpu_input(name, array)
    held = [ort.OrtValue.ortvalue_from_numpy(buffer) for buffer in buffers]
    binding.bind_output("output")
    for name, one in zip(("key", "value"), held, strict=True):
        binding.bind_ortvalue_input(f"past_{name}", one)
        binding.bind_ortvalue_output(f"present_{name}", one)
    session.run_with_iobinding(binding)
    for buffer, old, new in zip(buffers, before, (key, value), strict=True):
        codes = np.clip(np.rint(new.reshape(run, KV_HEADS, DIM)), -128, 127).swapaxes(0, 1)
        np.testing.assert_array_equal(buffer[0, :, :past], old[0, :, :past])
        assert np.abs(buffer[0, :, past:total].astype(int) - codes).max() <= 1  # -128 may be left out
        assert not buffer[0, :, total:].any()
    keys, values = (np.repeat(buffer[0, :, :total], HEADS // KV_HEADS, axis=0) for buffer in buffers)
    scores = query.reshape(run, HEADS, DIM).swapaxes(0, 1) @ keys.swapaxes(1, 2).astype(np.float32)
    scores = scores / np.sqrt(DIM) + np.where(np.tri(run, total, past), 0, -1e30)
    weights = np.exp(log_softmax(scores))
    expected = (weights @ values).swapaxes(0, 1).reshape(1, run, -1)
    np.testing.assert_allclose(binding.get_outputs()[0].numpy(), expected, atol=0.02)


def test_scales_do_not_depend_on_the_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turned by any angle, a key fits its codes."""
    checkpoint = kv_cache.with_cache_scales(Checkpoint.open(str(TINY)))
    samples = np.asarray(Tokenizer.open(TINY).encode(EVALUATION.read_text())[:512]).reshape(4, 128)
    monkeypatch.setattr(kv_cache, "_HEADROOM", 1)
    kv_cache.find_cache_scales(checkpoint.config, checkpoint.tensors, samples)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    norm = 1 + model.model.layers[LAYER].self_attn.k_norm.weight.detach().numpy()
    name = f"model.layers.{LAYER}.self_attn.scaled_qk_norm"
    scale = norm / checkpoint.tensors[name].read(HEADS, HEADS + KV_HEADS)
    reached = []
    for start in (0, 100, 5000, 1_000_000):
        cache, places = DynamicCache(config=model.config), torch.arange(start, start + 128).expand(3, 4, 128)
        with torch.no_grad():
            model(torch.tensor(samples), cache=cache, position_ids=places)
        reached.append((np.abs(cache.layers[LAYER].keys.numpy()) / scale[:, None]).max())
    assert max(reached) <= 127.01
    assert min(reached) > 110


@pytest.fixture(scope="module")
def artifact(exported: Exported) -> Path:
    return exported(TINY, load_profile("cpu", ["cache_dtype=int8"]))


def questions(model: Model) -> list[list[int]]:
    """The tokens of three answers, each to all that was said before."""
    messages: list[Any] = [{"role": "system", "content": "The statement is a word. " * 40}]
    answers = []
    for question in ("What is assert?", "What is yield?", "And if?"):
        messages.append({"role": "user", "content": question})
        generation = model.generate(messages, max_tokens=24, sampling=GREEDY)
        text = generation.run()
        answers.append(generation.tokens)
        messages.append({"role": "assistant", "content": text})
    return answers


def test_states_go_on_in_memory_and_after_a_restart(artifact: Path, tmp_path: Path) -> None:
    with Model.load(artifact, "cpu") as model:
        expected = questions(model)
    with Model.load(artifact, "cpu", keep=2) as model:
        assert questions(model) == expected
        assert model.generate("again", max_tokens=1).run() is not None
    for _ in range(2):
        with Model.load(artifact, "cpu", keep=2, states=StateSettings(tmp_path)) as model:
            assert questions(model) == expected
    kept = [np.load(file)["cache.past_key_values.3.key"] for file in tmp_path.rglob("*.npz")]
    assert kept
    assert {array.dtype for array in kept} == {np.dtype(np.int8)}


def test_speculative_decoding_has_the_same_tokens(exported: Exported, tmp_path: Path) -> None:
    checkpoint = with_head(TINY, load_file(TRAINED_HEAD), tmp_path / "checkpoint")
    artifact = exported(checkpoint, load_profile("cpu", ["cache_dtype=int8"]))
    with Model.load(artifact, "cpu") as model:
        expected = questions(model)
    with Model.load(artifact, "cpu", speculative=Speculative.EXACT) as model:
        assert questions(model) == expected


def test_memory_is_a_quarter(artifact: Path, cpu_artifact: Path) -> None:
    found, plain = (read_manifest(folder)["cache_bytes_per_token"] for folder in (artifact, cpu_artifact))
    assert found == plain // 4 == 512


def test_a_mixture_answers_as_without(exported: Exported) -> None:
    answers = []
    for overrides in ([], ["cache_dtype=int8"]):
        with Model.load(exported(TINY_MOE, load_profile("cpu", overrides)), "cpu") as model:
            messages = [{"role": "user", "content": "What is assert?"}]
            generation = model.generate(messages, max_tokens=8, sampling=GREEDY)
            generation.run()
            answers.append(generation.tokens)
    assert answers[0] == answers[1]
    assert len(answers[0]) == 8


def test_other_providers_are_not_given_one(artifact: Path) -> None:
    with pytest.raises(UserError, match="KV cache is in int8, and WebGPU has not been shown to take one"):
        Model.load(artifact, "webgpu")


@pytest.mark.parametrize(
    ("profile", "overrides", "message"),
    [
        ("strix-halo", [], "cache_dtype int8 has run on no AMDGPU or WebGPU or DirectML"),
        ("webgpu", [], "cache_dtype int8 has run on no WebGPU"),
        ("cpu", ['fallbacks=["webgpu"]'], "cache_dtype int8 has run on no WebGPU"),
        ("cpu", ['fallbacks=["dml"]'], "cache_dtype int8 has run on no DirectML"),
        ("cpu", ["lowering=portable"], "set lowering to fused"),
        ("intel-lunar-lake", [], "cache_dtype int8 is for backend onnx"),
    ],
)
def test_profiles_that_cannot_have_one(profile: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as raised:
        load_profile(profile, [*overrides, "cache_dtype=int8"])
    assert message in str(raised.value)


def test_keys_that_overflow_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = kv_cache.with_cache_scales(Checkpoint.open(str(TINY)))
    made = kv_cache._Watched.linear

    def overflowing(self: Any, name: str, x: np.ndarray, expert: int | None = None) -> np.ndarray:
        result = made(self, name, x, expert)
        if name.endswith("v_proj.weight"):
            result[0, 0] = np.inf
        return result

    monkeypatch.setattr(kv_cache._Watched, "linear", overflowing)
    with pytest.raises(UserError, match="overflow on the calibration text"):
        kv_cache.find_cache_scales(checkpoint.config, checkpoint.tensors, np.arange(256).reshape(2, 128))
