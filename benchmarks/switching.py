"""What adapters that are switched at run time cost: memory, time to load, time of a step and of a switch.

    python -m benchmarks.switching [--size 0.8B] [--rank 16] [--rounds 5] [--work FOLDER]

A random checkpoint of a real geometry, exported with the profile `cpu-int4` (data-free) as it is and with two
adapters of every projection. Memory is that of a process of its own. Then both artifacts are loaded in one,
answers are made in turns, and medians are shown with the least and the most. With --work the artifacts stay
there for the next time. Needs the extra `test`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import psutil
from qwen_export.adapters.switched import with_switched_adapters
from qwen_export.checkpoint import Checkpoint
from qwen_export.export import export
from qwen_profiles.schema import load_profile
from qwen_runtime import Model, Sampling
from rich.console import Console
from rich.table import Table

from benchmarks.adapter import write_adapter
from benchmarks.geometry import GEOMETRIES, write_checkpoint
from benchmarks.support.artifacts import Quiet
from benchmarks.support.checkpoints import TINY, copy_tokenizer

_PROMPT, _TOKENS = 64, 24
_PLAIN, _ADAPTED = "plain", "adapted"
_NAMES = ("one", "two")


def prepare(work: Path, size: str, rank: int) -> None:
    """The two artifacts, and files of the adapters, in `work`."""
    base = write_checkpoint(work / "base", GEOMETRIES[size])
    copy_tokenizer(TINY, base)
    adapters = [str(write_adapter(work / name, base, rank, dora=False)) for name in _NAMES]
    profile, checkpoint = load_profile("cpu-int4", ["compression=data-free"]), Checkpoint.open(str(base))
    export(checkpoint, profile, work / _PLAIN, Quiet())
    export(with_switched_adapters(checkpoint, adapters, profile), profile, work / _ADAPTED, Quiet())


def loaded(folder: Path, adapters: dict[str, Path]) -> tuple[int, float, float]:
    """In a process of its own: number of adapters, seconds to load, and MB of it after an answer."""
    begun = time.perf_counter()
    with Model.load(folder, adapters=adapters) as model:
        seconds = time.perf_counter() - begun
        for name in (None, *model.info.adapters):
            timed(model, name)
        return len(model.info.adapters), seconds, psutil.Process().memory_info().rss / 1e6


def timed(model: Model, adapter: str | None) -> tuple[float, float]:
    """Milliseconds to the first token of a new prompt, and for each token after it."""
    generation = model.generate("word " * _PROMPT, max_tokens=_TOKENS, sampling=Sampling(0), adapter=adapter)
    begun = time.perf_counter()
    next(generation)
    first = time.perf_counter()
    generation.run()
    count = max(1, len(generation.tokens) - 1)
    return 1000 * (first - begun), 1000 * (time.perf_counter() - first) / count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=GEOMETRIES, default="0.8B")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = asked.work or Path(temporary)
        if not (work / _ADAPTED).is_dir():
            work.mkdir(parents=True, exist_ok=True)
            prepare(work, asked.size, asked.rank)
        measure(work, asked.rounds)


def measure(work: Path, rounds: int) -> None:
    console = Console()
    beside = {f"beside{at}": work / _ADAPTED / f"{name}.onnx_adapter" for at, name in enumerate(_NAMES)}
    size = sum(file.stat().st_size for file in beside.values()) / len(beside) / 1e6
    for folder, adapters in ((_PLAIN, {}), (_ADAPTED, {}), (_ADAPTED, beside)):
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            count, seconds, taken = process.submit(loaded, work / folder, adapters).result()
        console.print(f"{folder}, {count} adapters of {size:.1f} MB: {seconds:.1f} s to load, {taken:.0f} MB")
    with Model.load(work / _PLAIN) as plain, Model.load(work / _ADAPTED) as adapted:
        kinds = {
            "without inputs for adapters": (plain, [None]),
            "with them, no adapter": (adapted, [None]),
            "one adapter": (adapted, ["one"]),
            "two adapters in turns": (adapted, ["one", "two"]),
        }
        found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
        for at in range(rounds + 1):  # the first warms up
            for kind, (model, names) in kinds.items():
                found[kind] += [timed(model, name) for name in names] if at else []
    table = Table("answers", "first token, ms", "next tokens, ms each")
    for kind, times in found.items():
        columns = zip(*times, strict=True)
        table.add_row(kind, *(f"{median(all_):.1f} ({min(all_):.1f} to {max(all_):.1f})" for all_ in columns))
    console.print(table)


if __name__ == "__main__":
    main()
