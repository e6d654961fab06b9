"""How fast a context grows and is read at places far into it: python -m benchmarks.context ARTIFACT...

    python -m benchmarks.context OUT/float32 OUT/int8 --past 512 8192 32768 --chunks 256 512 1024

A run's time depends on how many tokens its cache holds, and not on which. So nothing is read before a place:
the cache is filled at random. ONNX Runtime itself runs the decoder, past and present in one buffer, as
`backends.ort` does. Artifacts take turns in one process, round by round; a ratio is that of a round, to the
first artifact, and medians count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from qwen_runtime.artifact import Artifact
from qwen_runtime.backends.ort import Ort
from rich.console import Console
from rich.table import Table

Place = tuple[int, int]  # tokens of a run, and tokens before it


class Reader:
    """An artifact's decoder, with a cache for `room` tokens that are nobody's."""

    def __init__(self, artifact: Path, room: int) -> None:
        self._backend = Ort.load(Artifact.open(artifact), "cpu")
        value, rng = ort.OrtValue.ortvalue_from_numpy, np.random.default_rng(0)
        self._past = {}
        for name, array in self._backend.zeros(room).items():
            some = rng.standard_normal(1_000_003, dtype=np.float32)  # a prime: heads differ
            some = (some * 30).astype(np.int8) if array.dtype == np.int8 else some.astype(array.dtype)
            self._past[name] = value(np.resize(some, array.shape))
        self._present = {
            name: past if "past_sequence_length" in self._backend.states[name].shape else value(past.numpy())
            for name, past in self._past.items()
        }

    def seconds(self, place: Place) -> float:
        """Of one run."""
        tokens, past = place
        binding = self._backend.decoder.io_binding()
        inputs = {
            "input_ids": np.random.default_rng(past).integers(0, 1000, (1, tokens)),
            "attention_mask": np.ones((1, past + tokens), np.int64),
            "position_ids": np.tile(np.arange(past, past + tokens), (3, 1, 1)),
        }
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        for name, state in self._past.items():
            binding.bind_ortvalue_input(name, state)
        for name in self._backend.outputs:
            state = name.replace("present.", "past_key_values.", 1)
            if state in self._present:
                binding.bind_ortvalue_output(name, self._present[state])
            else:
                binding.bind_output(name)
        begun = time.perf_counter()
        self._backend.decoder.run_with_iobinding(binding)
        return time.perf_counter() - begun


def measured(readers: Mapping[str, Reader], place: Place, rounds: int) -> dict[str, list[float]]:
    """Tokens per second of each round, by reader; the first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(rounds + 1):
        for name, reader in readers.items():
            found[name].append(place[0] / reader.seconds(place))
    return {name: speeds[1:] for name, speeds in found.items()}


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--past", nargs="+", type=int, default=[512, 8192])
    parser.add_argument("--chunks", nargs="*", type=int, default=[512], help="tokens of a run while reading")
    parser.add_argument("--rounds", type=int, default=20, help="of one token; a fifth as many of a chunk")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    room = max(asked.past) + max([1, *asked.chunks])
    readers = {str(artifact): Reader(artifact, room) for artifact in asked.artifacts}
    table = Table("after", "run", *(f"{name}, tok/s" for name in readers), *list(readers)[1:])
    results: list[dict[str, Any]] = []
    for past in asked.past:
        for tokens in (1, *asked.chunks):
            rounds = asked.rounds if tokens == 1 else max(2, asked.rounds // 5)
            speeds = measured(readers, (tokens, past), rounds)
            first, *others = speeds.values()
            ratios = [[ours / base for ours, base in zip(other, first, strict=True)] for other in others]
            table.add_row(str(past), str(tokens), *map(spread, speeds.values()), *map(spread, ratios))
            results.append({"past": past, "tokens": tokens, "tokens_per_second": speeds})
    Console(width=150).print(table)
    if asked.json:
        asked.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
