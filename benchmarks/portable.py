"""The portable Gated DeltaNet recurrence against a Scan over single tokens: one layer, 512 tokens.

    path/to/ort124/python benchmarks/portable.py MODELS        on onnxruntime 1.24, needs only onnxruntime
    python -m benchmarks.portable --write MODELS               first, here: needs qwen-edge[export]

Both graphs take the same queries, keys, values, decays and betas of the 0.8B geometry (16 heads of 128) and
carry the state; the portable one is run in chunks of 16 to 512 tokens. They take turns; the medians count.
A third kind is no recurrence, but the floor of the second: the three products of a chunk with the state, and
nothing else.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

TOKENS, HEADS, SIZE = 512, 16, 128
CHUNKS = (16, 32, 64, 128, 256, 512)
ROUNDS = 5
STATE = (1, HEADS, SIZE, SIZE)


def write(folder: Path) -> None:
    import onnx
    from qwen_export.backends.onnx.proto import model_proto
    from qwen_export.graph.builder import DataLayout, GraphBuilder
    from qwen_export.graph.gated_delta_net import chunked_delta_rule, triangles
    from qwen_export.graph.targets import PORTABLE

    folder.mkdir(parents=True, exist_ok=True)
    geometry: Any = SimpleNamespace(
        linear_num_value_heads=HEADS,
        linear_num_key_heads=HEADS,
        linear_key_head_dim=SIZE,
        linear_value_head_dim=SIZE,
        key_dim=HEADS * SIZE,
        value_dim=HEADS * SIZE,
    )
    float32 = np.dtype(np.float32)
    for chunk in CHUNKS:
        g = GraphBuilder(PORTABLE, float32, DataLayout())
        mixed = g.input("mixed", float32, (1, "tokens", 3 * HEADS * SIZE))
        decay, beta = (g.input(name, float32, (1, "tokens", HEADS)) for name in ("decay", "beta"))
        past = g.input("past", float32, STATE)
        output, present = chunked_delta_rule(
            g, geometry, mixed, decay, beta, past, triangles(g, mixed, chunk)
        )
        g.output(output, "output", float32, (1, "tokens", HEADS * SIZE))
        g.output(present, "present", float32, STATE)
        onnx.save(model_proto(g.graph("chunk")), folder / f"chunk{chunk}.onnx")
        floor = _floor(GraphBuilder(PORTABLE, float32, DataLayout()))
        onnx.save(model_proto(floor), folder / f"floor{chunk}.onnx")
    _write_scan(folder / "scan.onnx")


def _floor(g: Any) -> Any:
    """What no form of the recurrence leaves out: queries and keys times the state, and keys times values."""
    float32 = np.dtype(np.float32)
    mixed = g.input("mixed", float32, (1, "tokens", 3 * HEADS * SIZE))
    past = g.input("past", float32, STATE)
    heads = g.op("Transpose", g.reshape(mixed, 0, 0, 3 * HEADS, SIZE), perm=[0, 2, 1, 3])
    query, key, value = g.ops("Split", heads, outputs=3, axis=1, num_outputs=3)
    output = g.op("Add", g.op("MatMul", query, past), g.op("MatMul", key, past))
    g.output(output, "output", float32, (1, HEADS, "tokens", SIZE))
    transposed = g.op("Transpose", key, perm=[0, 1, 3, 2])
    g.output(g.op("MatMul", transposed, value), "present", float32, STATE)
    return g.graph("floor")


def _write_scan(path: Path) -> None:
    """The recurrence as its definition has it, on inputs that are normalised outside of the loop too."""
    import onnx
    import onnx.parser

    text = """
    <ir_version: 10, opset_import: ["": 21]>
    scan (float[1, tokens, 6144] mixed, float[1, tokens, 16] decay, float[1, tokens, 16] beta,
          float[1, 16, 128, 128] past)
          => (float[1, tokens, 2048] output, float[1, 16, 128, 128] present)
    {
      heads = Constant <value = int64[4] {-1, 48, 128, 1}> ()
      all = Reshape (mixed, heads)
      sizes = Constant <value = int64[3] {16, 16, 16}> ()
      q, k, v = Split <axis = 1> (all, sizes)
      tiny = Constant <value = float {1e-6}> ()
      axes = Constant <value = int64[1] {2}> ()
      qs = ReduceSumSquare <keepdims = 1> (q, axes)
      qe = Add (qs, tiny)
      qr = Sqrt (qe)
      qn = Div (q, qr)
      scale = Constant <value = float {0.08838834764831845}> ()
      queries = Mul (qn, scale)
      ks = ReduceSumSquare <keepdims = 1> (k, axes)
      ke = Add (ks, tiny)
      kr = Sqrt (ke)
      keys = Div (k, kr)
      row = Constant <value = int64[4] {-1, 16, 1, 128}> ()
      values = Reshape (v, row)
      one = Constant <value = int64[4] {-1, 16, 1, 1}> ()
      e = Exp (decay)
      alphas = Reshape (e, one)
      betas = Reshape (beta, one)
      first = Constant <value = int64[1] {0}> ()
      state = Squeeze (past, first)
      last, outputs = Scan <num_scan_inputs = 5, body = step (float[16, 128, 128] s,
          float[16, 128, 1] qt, float[16, 128, 1] kt, float[16, 1, 128] vt,
          float[16, 1, 1] at, float[16, 1, 1] bt)
          => (float[16, 128, 128] s3, float[16, 1, 128] ot)
        {
          s1 = Mul (s, at)
          krow = Transpose <perm = [0, 2, 1]> (kt)
          found = MatMul (krow, s1)
          miss = Sub (vt, found)
          write = Mul (miss, bt)
          outer = MatMul (kt, write)
          s3 = Add (s1, outer)
          qrow = Transpose <perm = [0, 2, 1]> (qt)
          ot = MatMul (qrow, s3)
        }> (state, queries, keys, values, alphas, betas)
      present = Unsqueeze (last, first)
      flat = Constant <value = int64[3] {1, -1, 2048}> ()
      output = Reshape (outputs, flat)
    }
    """
    onnx.save(onnx.parser.parse_model(text), path)


def run(session: ort.InferenceSession, feeds: dict[str, np.ndarray], chunk: int) -> tuple[float, np.ndarray]:
    """Seconds for the whole prompt, and its outputs."""
    state = feeds["past"]
    names = {value.name for value in session.get_inputs()} - {"past"}
    started = time.perf_counter()
    outputs = []
    for start in range(0, TOKENS, chunk):
        piece = {name: feeds[name][:, start : start + chunk] for name in names}
        output, state = session.run(None, {**piece, "past": state})
        outputs.append(output)
    return time.perf_counter() - started, np.concatenate(outputs, axis=1 if outputs[0].ndim == 3 else 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path)
    parser.add_argument("--write", action="store_true", help="make the graphs, run nothing")
    asked = parser.parse_args()
    if asked.write:
        write(asked.models)
        return
    rng = np.random.default_rng(0)
    feeds = {
        "mixed": rng.standard_normal((1, TOKENS, 3 * HEADS * SIZE), np.float32),
        "decay": -rng.random((1, TOKENS, HEADS), np.float32),
        "beta": rng.random((1, TOKENS, HEADS), np.float32),
        "past": np.zeros(STATE, np.float32),
    }
    sessions = {"scan": (ort.InferenceSession(asked.models / "scan.onnx"), TOKENS)}
    for chunk in CHUNKS:
        for kind in ("chunk", "floor"):
            session = ort.InferenceSession(asked.models / f"{kind}{chunk}.onnx")
            sessions[f"{kind} {chunk}"] = (session, chunk)
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    expected = None
    for _ in range(ROUNDS):
        for name, (session, chunk) in sessions.items():
            taken, found = run(session, feeds, chunk)
            expected = found if expected is None else expected
            if not name.startswith("floor"):
                np.testing.assert_allclose(found, expected, atol=1e-4)
            seconds[name].append(taken)
    print(f"onnxruntime {ort.__version__}, {TOKENS} tokens, one layer, medians of {ROUNDS} rounds")
    for name, found in seconds.items():
        times = [scan / one for scan, one in zip(seconds["scan"], found, strict=True)]
        print(
            f"{name:10} {1e3 * statistics.median(found):8.1f} ms, {statistics.median(times):5.1f} times scan"
        )


if __name__ == "__main__":
    main()
