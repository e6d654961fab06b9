"""Memory that ONNX Runtime's CPU provider holds for one node with quantised weights, by byte of its data.

    python -m benchmarks.memory [--operators QMoE MatMulNBits MXFP4 NVFP4] [--bits 4 8] [--blocks 32 64 128]
        [--levels 0 4] [--zero-points] [--option session.disable_prepacking=1] [--json memory.json]

MXFP4 and NVFP4 are QMoE with experts in those formats, whose bits and blocks are their own: `--bits 4`, and
`--blocks 32` or 16.

A kernel repacks its weights when a session is made, into a layout that depends on the CPU: the table is for
this one. Codes and scales are random; scales of zero would make packed pages of zeros, which tell nothing.
Each node is loaded in a process of its own (Linux). Private memory is RssAnon after loading, once malloc has
given back what is free; mapped is RssFile after a prompt and some steps; both without what Python and ONNX
Runtime took before.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from qwen_runtime.resident import release_freed, release_mapped

from benchmarks.support.held import forget_most, held

_EXPERTS, _CHOSEN, _HIDDEN, _INNER = 32, 8, 2048, 512
_ROWS, _COLUMNS = 32768, 2048
# Types of a block's scale, one byte each, and bytes whose values lie near the other formats' here.
_FP4 = {"MXFP4": (TensorProto.FLOAT8E8M0, (117, 121)), "NVFP4": (TensorProto.FLOAT8E4M3FN, (8, 32))}
_QUANT_TYPES = {"MXFP4": "fp4", "NVFP4": "nvfp4"}
_TOKENS, _STEPS = 16, 20


@dataclass(frozen=True)
class Case:
    """One node.

    Attributes:
        operator: a key of `_FP4`: QMoE with experts in that format.
        zero_points: one for each block is stored.
    """

    operator: str
    bits: int
    block: int
    level: int
    zero_points: bool = False


@dataclass(frozen=True)
class NodeHeld:
    """Bytes that a process took for the node's weights, and its speed.

    Attributes:
        data: codes, scales and zero points in the file.
        private: anonymous memory after loading.
        mapped: resident pages of files after a prompt and steps of one token, without those of loading.
        peak: of all resident memory while loading.
        decode: seconds for one token.
    """

    data: int
    private: int
    mapped: int
    peak: int
    decode: float


def measure(case: Case, options: dict[str, str]) -> NodeHeld:
    """`case` in a process of its own.

    Raises:
        subprocess.CalledProcessError: the CPU has no such kernel, or it does not load.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = write_node(case, Path(folder))
        command = [sys.executable, "-m", "benchmarks.memory", "--hold", folder, json.dumps(options)]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return NodeHeld(data, **json.loads(found))


def write_node(case: Case, folder: Path) -> int:
    """A model of one node in `folder`; returns the bytes of its weights."""
    rng = np.random.default_rng(0)
    model, data = folder / "model.onnx", folder / "data"
    initializers, size = [], 0
    with data.open("wb") as file:
        for name, array in _weights(case, rng):
            file.write(b"\0" * (-file.tell() % 4096))
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            if case.operator in _FP4 and name.endswith(".scales"):
                kind = _FP4[case.operator][0]
            tensor = TensorProto(
                name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL
            )
            for key, value in (("location", "data"), ("offset", file.tell()), ("length", array.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            initializers.append(tensor)
            file.write(array.tobytes())
            size += array.nbytes
    inputs, node = [_tensor("x", "tokens", _HIDDEN)], _node(case)
    if case.operator != "MatMulNBits":
        inputs.append(_tensor("router", "tokens", _EXPERTS))
    graph = helper.make_graph([node], "node", inputs, [_tensor("y", "tokens", None)], initializers)
    # Float8E8M0 is a type since opset 24.
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=11), model)
    return size


def _tensor(name: str, *shape: str | int | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _weights(case: Case, rng: np.random.Generator) -> list[tuple[str, np.ndarray]]:
    """The node's initializers in the order of its inputs."""
    found = []
    for name, (*stack, n, k) in _matrices(case).items():
        blocks, packed = k // case.block, case.block * case.bits // 8
        shape = (n, blocks, packed) if case.operator == "MatMulNBits" else (*stack, n, blocks * packed)
        found.append((f"{name}.codes", rng.integers(0, 256, shape, np.uint8)))
        if case.operator in _FP4:
            scales = rng.integers(*_FP4[case.operator][1], (*stack, n, blocks), np.uint8)
            found.append((f"{name}.global", np.ones(_EXPERTS, np.float32)))
        else:
            scales = rng.uniform(0.001, 0.01, (*stack, n, blocks)).astype(np.float32)
        found.append((f"{name}.scales", scales))
        if case.zero_points:
            found.append(
                (f"{name}.zeros", rng.integers(0, 256, (*stack, n, blocks * case.bits // 8), np.uint8))
            )
    return found


def _matrices(case: Case) -> dict[str, tuple[int, ...]]:
    if case.operator == "MatMulNBits":
        return {"w": (_ROWS, _COLUMNS)}
    return {"up": (_EXPERTS, 2 * _INNER, _HIDDEN), "down": (_EXPERTS, _HIDDEN, _INNER)}


def _node(case: Case) -> onnx.NodeProto:
    shared = {"block_size": case.block, "accuracy_level": case.level}
    if case.operator == "MatMulNBits":
        inputs = ["x", "w.codes", "w.scales"] + ["w.zeros"] * case.zero_points
        attributes = {"N": _ROWS, "K": _COLUMNS, "bits": case.bits}
    else:
        inputs = ["x", "router", "up.codes", "up.scales", "", "down.codes", "down.scales"]
        inputs += ["", "", "", "", "up.zeros", "down.zeros"] * case.zero_points
        attributes = {"k": _CHOSEN, "expert_weight_bits": case.bits, "normalize_routing_weights": 1}
        attributes |= {"activation_type": "swiglu", "swiglu_fusion": 1}
        if case.operator in _FP4:
            inputs += [""] * 8 + ["up.global", "down.global"]
            attributes |= {"quant_type": _QUANT_TYPES[case.operator], "weights_prepacked": 1}  # rows of K
        return helper.make_node("QMoE", inputs, ["y"], domain="com.microsoft", **attributes, **shared)
    return helper.make_node("MatMulNBits", inputs, ["y"], domain="com.microsoft", **attributes, **shared)


def _hold(folder: Path, options: dict[str, str]) -> dict[str, float]:
    """Loads and runs the node of `folder` in this process."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    for key, value in options.items():
        settings.add_session_config_entry(key, value)
    settings.intra_op_num_threads = 2
    rng = np.random.default_rng(0)
    # The library's own pages, threads and arenas are no part of what a node takes.
    ort.InferenceSession(_empty_model(), settings, providers=["CPUExecutionProvider"]).run(
        None, {"x": np.zeros((1, 1), np.float32)}
    )
    forget_most()
    before = held()
    session = ort.InferenceSession(folder / "model.onnx", settings, providers=["CPUExecutionProvider"])
    loaded = held()
    release_mapped(folder)
    release_freed()
    kept = held()

    def run(tokens: int) -> None:
        shapes = {value.name: (tokens, value.shape[1]) for value in session.get_inputs()}
        feed = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
        session.run(None, feed)

    run(_TOKENS)
    run(1)
    seconds = []
    for _ in range(_STEPS):
        started = time.perf_counter()
        run(1)
        seconds.append(time.perf_counter() - started)
    after = held()
    return {
        "private": kept.anonymous - before.anonymous,
        "mapped": after.mapped - before.mapped,
        "peak": loaded.most - before.resident,
        "decode": float(np.median(seconds)),
    }


def _empty_model() -> bytes:
    ends = _tensor("x", "tokens", 1), _tensor("y", "tokens", 1)
    graph = helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "empty", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bytes(model.SerializeToString())


def main() -> None:
    if sys.argv[1:2] == ["--hold"]:
        print(json.dumps(_hold(Path(sys.argv[2]), json.loads(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--operators", nargs="+", default=["QMoE", "MatMulNBits"])
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--blocks", nargs="+", type=int, default=[32, 64, 128])
    parser.add_argument("--levels", nargs="+", type=int, default=[4], help="accuracy_level")
    parser.add_argument("--zero-points", action="store_true", help="with stored zero points too")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the session")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    options = dict(option.split("=", 1) for option in asked.option)
    zero_points = [False, True] if asked.zero_points else [False]
    header = [*(field.name for field in fields(Case)), "data MB", "private", "mapped", "peak", "ms a token"]
    print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    found = []
    for values in itertools.product(asked.operators, asked.bits, asked.blocks, asked.levels, zero_points):
        case = Case(*values)
        cells = [str(value) for value in asdict(case).values()]
        try:
            node = measure(case, options)
        except subprocess.CalledProcessError as error:
            cells += ["", (error.stderr.strip().splitlines() or ["?"])[-1]]
        else:
            found.append({**asdict(case), **asdict(node)})
            shares = (f"{size / node.data:.3f}" for size in (node.private, node.mapped, node.peak))
            cells += [f"{node.data / 1e6:.1f}", *shares, f"{node.decode * 1e3:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
