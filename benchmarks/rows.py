"""What a product with quantised weights costs for several tokens, one token = 1: python -m benchmarks.rows

CPU time of one thread, the least of `--rounds`, of MatMulNBits with accuracy_level 4 over several weights of
3584 x 1024 in turn, as a model reads them.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import onnx
import onnxruntime as ort
from rich.console import Console
from rich.table import Table

ROWS, COLUMNS, WEIGHTS = 3584, 1024, 8
TOKENS = (1, 2, 3, 4, 8)
FORMS = ((4, 32), (4, 64), (4, 128), (8, 32), (8, 128))  # bits, block size


def products(bits: int, block: int) -> ort.InferenceSession:
    """One input x [tokens, 1024], and its products with random weights."""
    random, floats = np.random.default_rng(0), onnx.TensorProto.FLOAT
    nodes, initializers, outputs = [], [], []
    for number in range(WEIGHTS):
        codes = random.integers(0, 256, (ROWS, COLUMNS // block, block * bits // 8), dtype=np.uint8)
        scales = random.random((ROWS, COLUMNS // block), dtype=np.float32)
        names = [f"codes.{number}", f"scales.{number}"]
        initializers += [
            onnx.numpy_helper.from_array(array, name)
            for array, name in zip((codes, scales), names, strict=True)
        ]
        attributes = {"K": COLUMNS, "N": ROWS, "bits": bits, "block_size": block, "accuracy_level": 4}
        nodes.append(
            onnx.helper.make_node(
                "MatMulNBits", ["x", *names], [f"y.{number}"], domain="com.microsoft", **attributes
            )
        )
        outputs.append(onnx.helper.make_tensor_value_info(f"y.{number}", floats, ["tokens", ROWS]))
    given = onnx.helper.make_tensor_value_info("x", floats, ["tokens", COLUMNS])
    graph = onnx.helper.make_graph(nodes, "products", [given], outputs, initializers)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def least_seconds(session: ort.InferenceSession, rounds: int) -> dict[int, float]:
    """By tokens in a run."""
    inputs = {count: np.random.default_rng(1).random((count, COLUMNS), np.float32) for count in TOKENS}
    least = dict.fromkeys(TOKENS, float("inf"))
    for _ in range(rounds):  # in turns, because other work on the machine comes and goes
        for count, x in inputs.items():
            started = time.thread_time()
            session.run(None, {"x": x})
            least[count] = min(least[count], time.thread_time() - started)
    return least


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    table = Table("bits, block", "one token, ms", *(f"{count} tokens" for count in TOKENS[1:]))
    for bits, block in FORMS:
        least = least_seconds(products(bits, block), rounds)
        one = least[1]
        shown = (f"{least[count] / one:.2f}" for count in TOKENS[1:])
        table.add_row(f"{bits}, {block}", f"{one / WEIGHTS * 1000:.3f}", *shown)
    Console().print(table)


if __name__ == "__main__":
    main()
