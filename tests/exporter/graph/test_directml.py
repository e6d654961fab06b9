"""The portable graphs on real DirectML, by Windows' Python on Wine: docs/testing.md.

Truth is transformers in float32, or the operator's definition in NumPy.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from qwen_export.quantize.blockwise import Quantization, dequantize, quantize

from benchmarks.support.artifacts import float_profile, make_artifact
from benchmarks.support.checkpoints import TINY, TINY_MOE
from benchmarks.support.session import cosine
from tests.support.wine import AVAILABLE, REASON, Windows

pytestmark = [pytest.mark.slow, pytest.mark.directml, pytest.mark.skipif(not AVAILABLE, reason=REASON)]
SUPPORT = Path(__file__).parents[3] / "benchmarks" / "support"
# Named by its number, a device is found through DXGI: Wine's DXCore is an empty shell.
DIRECTML = ("DmlExecutionProvider", json.dumps({"device_id": "0"}))
CHECKPOINTS = {"dense": TINY, "experts": TINY_MOE}
# Arithmetic of shapes and lengths, which ONNX Runtime leaves to the CPU on every provider.
ON_THE_CPU = {"Add", "Concat", "Gather", "Squeeze", "Sub", "Unsqueeze"}
HALF = np.float16


@dataclass(frozen=True)
class Node:
    """A node, its inputs as constants (None: left out) and fed, and by its definition what it gives."""

    operator: str
    fed: dict[str, np.ndarray]
    constants: list[np.ndarray | None]
    attributes: dict[str, object]
    expected: np.ndarray
    outputs: int = 1


def product(bits: int, block: int, k: int, symmetric: bool, rows: int) -> Node:
    generator = np.random.default_rng(bits * block + k)
    form = Quantization(bits, block, symmetric, np.dtype(HALF))
    weight = generator.random((64, k)).astype(np.float32) - 0.2  # zero points far from the middle
    stored = quantize(weight, form)
    x = generator.standard_normal((1, rows, k)).astype(HALF)
    return Node(
        "MatMulNBits",
        {"x": x},
        [stored.packed, stored.scales, stored.zero_points],
        {"K": k, "N": 64, "bits": bits, "block_size": block},
        x.astype(np.float32) @ dequantize(stored, k, form).T,
    )


def softmax(x: np.ndarray) -> np.ndarray:
    exponent = np.exp(x - x.max(-1, keepdims=True))
    return exponent / exponent.sum(-1, keepdims=True)


def attention(past: int, tokens: int) -> Node:
    """GroupQueryAttention of `tokens` after `past` others, causal; 4 heads of 32, 2 of keys and values."""
    generator = np.random.default_rng(past + tokens)
    heads, groups, size = 4, 2, 32
    total = past + tokens
    query = generator.standard_normal((1, tokens, heads * size)).astype(HALF)
    keys, values = (generator.standard_normal((1, groups, total, size)).astype(HALF) for _ in range(2))
    q = query.reshape(tokens, heads, size).transpose(1, 0, 2).astype(np.float32)
    k, v = (np.repeat(x[0].astype(np.float32), heads // groups, 0) for x in (keys, values))
    scores = q @ k.transpose(0, 2, 1) / size**0.5
    scores += np.where(np.arange(total) > np.arange(past, total)[:, None], -1e30, 0)
    fed = {"query": query}
    for name, whole in (("key", keys), ("value", values)):
        fed[name] = whole[:, :, past:].transpose(0, 2, 1, 3).reshape(1, tokens, groups * size)
        fed[f"past_{name}"] = whole[:, :, :past]
    order = ("query", "key", "value", "past_key", "past_value")
    return Node(
        "GroupQueryAttention",
        {name: fed[name] for name in order},
        [np.array([[total - 1]], np.int32), np.array(total, np.int32)],
        {"num_heads": heads, "kv_num_heads": groups},
        (softmax(scores) @ v).transpose(1, 0, 2).reshape(1, tokens, heads * size),
        outputs=3,
    )


def every_token_sees_every_other(tokens: int) -> Node:
    """MultiHeadAttention, as the vision tower has it."""
    generator = np.random.default_rng(tokens)
    heads, size = 3, 24
    fed = {
        name: generator.standard_normal((1, tokens, heads * size)).astype(HALF)
        for name in ("query", "key", "value")
    }
    q, k, v = (x.reshape(tokens, heads, size).transpose(1, 0, 2).astype(np.float32) for x in fed.values())
    found = softmax(q @ k.transpose(0, 2, 1) / size**0.5) @ v
    expected = found.transpose(1, 0, 2).reshape(1, tokens, heads * size)
    return Node("MultiHeadAttention", fed, [], {"num_heads": heads}, expected)


def quick_gelu() -> Node:
    x = np.linspace(-9, 9, 700, dtype=HALF)[None]
    wide = x.astype(np.float32)
    return Node("QuickGelu", {"x": x}, [], {"alpha": 1.0}, wide / (1 + np.exp(-wide)))


RIGHT: dict[str, Callable[[], Node]] = {
    **{
        f"{bits} bits, {k // block} blocks of {block}, {rows} rows": (
            lambda bits=bits, block=block, k=k, rows=rows: product(bits, block, k, False, rows)
        )
        for bits, block, k in [(4, 32, 256), (4, 128, 256), (4, 64, 192), (8, 32, 256), (8, 128, 256)]
        for rows in (1, 12)
    },
    "4 bits without zero points": lambda: product(4, 32, 256, True, 12),
    "8 bits without zero points": lambda: product(8, 32, 256, True, 12),
    "a prompt in one run": lambda: attention(0, 9),
    "every token sees every other": lambda: every_token_sees_every_other(50),
    "SiLU": quick_gelu,
}
# What DirectML does not take, so that it runs on the CPU.
LEFT_OVER: dict[str, Callable[[], Node]] = {
    f"{bits} bits, padded to {-(-k // 32)} blocks (exact_blocks)": (
        lambda bits=bits, k=k: product(bits, 32, k, False, 12)
    )
    for bits in (4, 8)
    for k in (200, 232)
}
# What a provider's record and the choice of operators keep out of our graphs, each with the rule that does.
WRONG: dict[str, Callable[[], Node]] = {
    "8 bits, 3 blocks (exact_blocks)": lambda: product(8, 64, 192, False, 12),
    **{
        f"a run of {tokens} after 9 tokens (lowerings)": lambda tokens=tokens: attention(9, tokens)
        for tokens in (1, 4)
    },
}


def write(node: Node, path: Path) -> None:
    constants = {f"c{i}": value for i, value in enumerate(node.constants) if value is not None}
    inputs = [*node.fed, *(f"c{i}" if v is not None else "" for i, v in enumerate(node.constants))]
    while not inputs[-1]:
        inputs.pop()
    outputs = ["y", *(f"other{i}" for i in range(node.outputs - 1))]
    graph = helper.make_graph(
        [helper.make_node(node.operator, inputs, outputs, domain="com.microsoft", **node.attributes)],
        "one",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in node.fed.items()
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT16, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path.with_suffix(".onnx"))
    np.savez(path.with_suffix(".npz"), **node.fed)


@pytest.fixture(scope="module")
def ran(windows: Windows, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, float]]:
    """Of each node the provider, and the largest difference as a part of the largest value. One process for
    all."""
    folder = tmp_path_factory.mktemp("nodes")
    nodes = {name: make() for name, make in {**RIGHT, **LEFT_OVER, **WRONG}.items()}
    files = {name: folder / f"{i:02}" for i, name in enumerate(nodes)}
    for name, node in nodes.items():
        write(node, files[name])
    done = windows.python(SUPPORT / "run_nodes.py", folder, *DIRECTML, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    providers = json.loads(done.stdout.splitlines()[-1])
    found = {}
    for name, node in nodes.items():
        (provider,) = providers[files[name].name]
        got = np.load(files[name].with_suffix(".out.npz"))["y"].astype(np.float32)
        found[name] = provider, float(np.abs(got - node.expected).max() / np.abs(node.expected).max())
    return found


@pytest.mark.parametrize("name", RIGHT)
def test_nodes_as_our_graphs_have_them(ran: dict[str, tuple[str, float]], name: str) -> None:
    provider, error = ran[name]
    assert provider == DIRECTML[0] and error < 3e-3


@pytest.mark.parametrize("name", LEFT_OVER)
def test_what_directml_leaves_to_the_cpu(ran: dict[str, tuple[str, float]], name: str) -> None:
    assert ran[name][0] == "CPUExecutionProvider"


@pytest.mark.parametrize("name", WRONG)
def test_what_our_graphs_avoid_is_wrong(ran: dict[str, tuple[str, float]], name: str) -> None:
    """Where this fails the rule can go."""
    provider, error = ran[name]
    assert provider == DIRECTML[0] and error > 0.05


def run(windows: Windows, artifact: Path, ids: list[int], folder: Path) -> tuple[np.ndarray, dict[str, int]]:
    """Logits float32 [tokens, vocab] of a prompt in pieces, then step by step; operators left to the CPU."""
    asked = json.dumps({"ids": ids, "chunks": [24, 16, 1, 1, 3]})
    done = windows.python(
        SUPPORT / "plugin_run.py", DIRECTML[0], artifact, DIRECTML[1], text=asked, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ran = json.loads(done.stdout.splitlines()[-1])
    assert len(ran[DIRECTML[0]]) > 20  # operators
    return np.load(folder / "logits.npy"), ran["CPUExecutionProvider"]


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_logits_are_those_of_transformers(windows: Windows, kind: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    artifact = make_artifact(CHECKPOINTS[kind], float_profile("portable", "float16"), tmp_path / "artifact")
    ids = np.random.default_rng(3).integers(0, 2000, 45).tolist()
    found, left = run(windows, artifact, ids, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINTS[kind], dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    assert cosine(found, expected).min() > 0.9995
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.95
    assert set(left) <= ON_THE_CPU
