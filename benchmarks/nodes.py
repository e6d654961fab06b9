"""The nodes of a decode step on the CPU, by operator: python -m benchmarks.nodes ARTIFACT [--past 512]

As ONNX Runtime's profiler counts and times them after its fusions; it adds some microseconds to each. The
time is the mean of `--steps` steps of one token after `--past` others, past and present in one buffer as in
ONNX Runtime GenAI.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from rich.console import Console
from rich.table import Table

from benchmarks.support.plugin_run import profiled

_WARM_UP = 3


@dataclass
class Kind:
    """Nodes of one operator in one step, and their milliseconds."""

    nodes: float = 0.0
    milliseconds: float = 0.0


def step_nodes(
    artifact: Path, past: int, steps: int, tokens: int = 1, file: str = "model.onnx"
) -> dict[str, Kind]:
    """By operator, the means of `steps` runs of `tokens` tokens after `past` others, by the graph in `file`.

    That of `speculative.onnx` is run as in plain decoding, where no token is pending.
    """
    graph = artifact.absolute() / file
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        session = profiled(graph, "CPUExecutionProvider", {})
        binding = _bound(session, past, tokens)
        for _ in range(_WARM_UP + steps):
            session.run_with_iobinding(binding)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    ran = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    per_step = len(ran) // (_WARM_UP + steps)
    kinds: dict[str, Kind] = {}
    for event in ran[_WARM_UP * per_step :]:
        kind = kinds.setdefault(event["args"]["op_name"], Kind())
        kind.nodes += 1 / steps
        kind.milliseconds += event["dur"] / 1000 / steps
    return kinds


def _bound(session: ort.InferenceSession, past: int, tokens: int) -> ort.IOBinding:
    binding, total = session.io_binding(), past + tokens
    outputs = [value.name for value in session.get_outputs()]
    sizes = {"batch_size": 1, "past_sequence_length": total, "sequence_length": tokens}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            state = np.zeros([sizes.get(axis, axis) for axis in value.shape], np.float32)
            shared = ort.OrtValue.ortvalue_from_numpy(state)
            binding.bind_ortvalue_input(value.name, shared)
            for kind in ("present.", "settled."):
                if (output := kind + value.name.split(".", 1)[1]) in outputs:
                    binding.bind_ortvalue_output(output, shared)
        elif value.name == "pending":
            binding.bind_cpu_input(value.name, np.zeros((value.shape[0], 0, value.shape[2]), np.float32))
    positions = np.broadcast_to(np.arange(past, total), (3, 1, tokens)).astype(np.int64)
    binding.bind_cpu_input("input_ids", np.ones((1, tokens), np.int64))
    binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
    binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions))
    for name in outputs:
        if not name.startswith(("present", "settled")) and name != "entering":
            binding.bind_output(name)
    return binding


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--past", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1, help="of one run: 1 is a decode step")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--graph", default="model.onnx", help="a graph's file, as speculative.onnx")
    asked = parser.parse_args()
    kinds = step_nodes(asked.artifact, asked.past, asked.steps, asked.tokens, asked.graph)
    table = Table("operator", "nodes", "ms")
    for name, kind in sorted(kinds.items(), key=lambda item: -item[1].milliseconds):
        table.add_row(name, f"{kind.nodes:.0f}", f"{kind.milliseconds:.2f}")
    whole = sum(kind.milliseconds for kind in kinds.values())
    table.add_row("all", f"{sum(kind.nodes for kind in kinds.values()):.0f}", f"{whole:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
