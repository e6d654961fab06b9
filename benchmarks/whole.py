"""A whole model: exported, loaded and run under a memory limit, beside what `qwen-export plan` says of it.

    python -m benchmarks.whole --profile laptop-32gb [--limit 24GB] [--size 35B-A3B] [--rounds 3]
        [--set weights.experts.block_size=64] [--json whole.json] [--keep FOLDER]

The weights, routers and experts too, are random and differ row by row; they are made as the export reads
them, so that only the artifact takes disk (18 to 23 GB for 35B-A3B). An export from a real checkpoint reads
that besides. Every round is a process of its own, under the limit from its start: it loads, reads a prompt
and takes given tokens one by one, as answers do. Before the first round the artifact is dropped from the page
cache; a later round finds there what the limit, which counts pages of files too, and the machine had room
for: "from disk" is what the process really read. The ceiling is the bandwidth of the same round by the bytes
that one token reads. A round that the limit ends is reported as such. Linux; bytes are 10^9 in a GB.

The artifact that --keep names is taken as it is when it is there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ByteSize, TypeAdapter
from qwen_common.errors import UserError
from qwen_export.export import export
from qwen_export.planner.estimate import Estimate
from qwen_export.planner.predictions import predict
from qwen_profiles.schema import Profile, load_profile
from qwen_runtime.model import Model
from rich.console import Console
from rich.table import Table

from benchmarks.geometry import GEOMETRIES, generated_checkpoint
from benchmarks.peers import bandwidth
from benchmarks.support.artifacts import Quiet
from benchmarks.support.checkpoints import TINY, copy_tokenizer
from benchmarks.support.held import Held, forget_most, held
from benchmarks.support.memory_limit import drop_from_cache, join, limited

_POLL = 0.25  # seconds between two looks at a process
_BANDWIDTH_BYTES = 1_000_000_000
_FACTS = "exported.json"  # beside a kept artifact: what its export took


@dataclass(frozen=True)
class Exported:
    """What an export took: seconds, and the most bytes of its process."""

    seconds: float
    most: int


@dataclass(frozen=True)
class Look:
    """What the process held, some seconds after loading began."""

    seconds: float
    held: Held


@dataclass(frozen=True)
class Round:
    """One process.

    Attributes:
        load_seconds: from the artifact's folder to a model that can answer.
        loaded, done: what the process held then, and after the last token.
        prefill, decode: tokens per second.
        bandwidth: bytes per second that all cores read together, once the process had ended.
    """

    load_seconds: float
    loaded: Held
    prefill: float
    decode: float
    done: Held
    bandwidth: float
    curve: list[Look]


@dataclass(frozen=True)
class Ended:
    """A round that the system ended, for its limit as a rule: at what, and what it held until then."""

    stage: str
    curve: list[Look]


_model: Model | None = None  # the child's


def _export(folder: Path, geometry: Mapping[str, Any], profile: Profile, output: Path) -> Exported:
    """In a process of its own."""
    checkpoint = generated_checkpoint(folder, geometry)
    copy_tokenizer(TINY, folder)
    forget_most()
    started = time.perf_counter()
    export(checkpoint, profile, output, Quiet())
    return Exported(time.perf_counter() - started, held().most)


def _load(artifact: Path, prepacked: Path | None) -> float:
    global _model
    started = time.perf_counter()
    _model = Model.load(artifact, prepacked=prepacked)
    return time.perf_counter() - started


def _answer(ids: list[int], prompt: int) -> tuple[float, float]:
    """Tokens per second of prefill, of the first `prompt` of `ids`, and of decode, of the others."""
    assert _model is not None
    times = [time.perf_counter()]
    times += [time.perf_counter() for _ in _model.pace(ids, prompt)]
    read, *steps = (later - earlier for earlier, later in itertools.pairwise(times))
    return prompt / read, len(steps) / sum(steps)


@contextmanager
def _process(group: Path | None = None) -> Iterator[ProcessPoolExecutor]:
    starts = {} if group is None else {"initializer": join, "initargs": (group,)}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), **starts) as pool:
        yield pool


def _watched(future: Future[Any], process: int, curve: list[Look], begun: float) -> Any:
    """The future's result; looks at the process meanwhile."""
    while not future.done():
        with suppress(OSError):
            curve.append(Look(time.perf_counter() - begun, held(process)))
        with suppress(TimeoutError):
            future.exception(timeout=_POLL)
    return future.result()


def run(
    artifact: Path, prepacked: Path | None, group: Path | None, ids: list[int], prompt: int
) -> Round | Ended:
    """One round in a process of its own."""
    curve: list[Look] = []
    stage = "loading"
    try:
        with _process(group) as pool:
            process, begun = pool.submit(os.getpid).result(), time.perf_counter()
            seconds = _watched(pool.submit(_load, artifact, prepacked), process, curve, begun)
            loaded, stage = held(process), "decoding"
            prefill, decode = _watched(pool.submit(_answer, ids, prompt), process, curve, begun)
            done = held(process)
    except BrokenProcessPool:
        return Ended(stage, curve)
    read, _ = bandwidth.load(_BANDWIDTH_BYTES)
    return Round(seconds, loaded, prefill, decode, done, read()["bandwidth"], curve)


def exported(asked: argparse.Namespace, profile: Profile, folder: Path) -> tuple[Path, Exported, Estimate]:
    """The artifact, what its export took, and what the planner says of it."""
    name = f"{asked.size} {profile.name} {' '.join(asked.set)}".strip()
    home = folder / "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in name)
    artifact, facts = home / "artifact", home / _FACTS
    geometry, checkpoint = GEOMETRIES[asked.size], home / "checkpoint"
    predicted = predict(generated_checkpoint(checkpoint, geometry), profile).estimate
    if not facts.exists():
        _say(f"exporting {predicted.disk / 1e9:.1f} GB")
        with _process() as pool:
            took = pool.submit(_export, checkpoint, geometry, profile, artifact).result()
        facts.write_text(json.dumps(asdict(took)))
    return artifact, Exported(**json.loads(facts.read_text())), predicted


def report(took: Exported, disk: int, predicted: Estimate, rounds: list[Round | Ended]) -> Table:
    """For a terminal."""
    whole = [found for found in rounds if isinstance(found, Round)]
    table = Table("", "planned", *(f"round {number}" for number, _ in enumerate(rounds, 1)), "median")

    def row(title: str, planned: str, figures: list[float], form: str) -> None:
        by_round = iter(figures)
        cells = [format(next(by_round), form) if isinstance(found, Round) else "-" for found in rounds]
        table.add_row(title, planned, *cells, format(statistics.median(figures), form) if figures else "")

    def gigabytes(title: str, planned: int | None, sizes: list[int]) -> None:
        row(title, f"{planned / 1e9:.2f}" if planned else "", [size / 1e9 for size in sizes], ".2f")

    table.add_row("export, s", "", *[""] * len(rounds), f"{took.seconds:.0f}")
    table.add_row("export, most MB", "", *[""] * len(rounds), f"{took.most / 1e6:.0f}")
    table.add_row("files, GB", f"{predicted.disk / 1e9:.2f}", *[""] * len(rounds), f"{disk / 1e9:.2f}")
    row("load, s", "", [found.load_seconds for found in whole], ".1f")
    gigabytes("from disk while loading, GB", None, [found.loaded.read for found in whole])
    gigabytes("most while loading, GB", predicted.load, [found.loaded.most for found in whole])
    gigabytes("resident, GB", predicted.resident, [found.loaded.resident for found in whole])
    gigabytes("  anonymous", None, [found.loaded.anonymous for found in whole])
    gigabytes("  mapped", None, [found.loaded.mapped for found in whole])
    gigabytes("anonymous at the end, GB", None, [found.done.anonymous for found in whole])
    gigabytes("mapped at the end, GB", None, [found.done.mapped for found in whole])
    gigabytes("from disk while answering, GB", None, [found.done.read - found.loaded.read for found in whole])
    row("prefill, tokens/s", "", [found.prefill for found in whole], ".2f")
    row("decode, tokens/s", "", [found.decode for found in whole], ".2f")
    row("bandwidth, GB/s", "", [found.bandwidth / 1e9 for found in whole], ".1f")
    shares = [found.decode * predicted.decode_bytes / found.bandwidth for found in whole]
    row("share of the ceiling", "", shares, ".0%")
    table.caption = "; ".join(
        f"round {number} was ended while {found.stage}" + (f", {_last(found)}" if found.curve else "")
        for number, found in enumerate(rounds, 1)
        if isinstance(found, Ended)
    )
    return table


def _last(found: Ended) -> str:
    last = found.curve[-1]
    anonymous, mapped = last.held.anonymous / 1e9, last.held.mapped / 1e9
    return f"after {last.seconds:.0f} s with {anonymous:.1f} GB anonymous and {mapped:.1f} mapped"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _size(text: str) -> int:
    return int(TypeAdapter(ByteSize).validate_python(text))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", default="laptop-32gb")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the profile")
    parser.add_argument("--size", choices=GEOMETRIES, default="35B-A3B")
    parser.add_argument("--limit", type=_size, metavar="SIZE", help="of memory, such as 24GB; default: none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--tokens", type=int, default=32, help="decoded after it")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="for the artifact, and to find it again")
    parser.add_argument(
        "--prepacked", action="store_true", help="map saved prepacked weights, twice the artifact's disk more"
    )
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with ExitStack() as stack:
        # Of random weights any codes will do: the nearest take no calibration.
        try:
            profile = load_profile(asked.profile, ["compression=data-free", *asked.set])
        except UserError as error:
            raise SystemExit(f"error: {error}") from error
        group = stack.enter_context(limited(asked.limit)) if asked.limit else None
        folder = asked.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        artifact, took, predicted = exported(asked, profile, folder)
        drop_from_cache(artifact)
        prepacked = None
        if asked.prepacked:
            prepacked = artifact.with_name("prepacked")
            with _process() as pool:
                pool.submit(_load, artifact, prepacked).result()  # without the limit: writes them
            for written in prepacked.iterdir():
                drop_from_cache(written)
        # Random tokens, so that they go to different experts.
        vocabulary, count = GEOMETRIES[asked.size]["vocab_size"], asked.prompt + asked.tokens
        ids = np.random.default_rng(0).integers(0, vocabulary, count).tolist()
        rounds: list[Round | Ended] = []
        with suppress(KeyboardInterrupt):  # what was measured so far is told
            for number in range(asked.rounds):
                _say(f"round {number + 1} of {asked.rounds}")
                rounds.append(run(artifact, prepacked, group, ids, asked.prompt))
        disk = sum(path.stat().st_size for path in artifact.iterdir())
    Console(width=130).print(report(took, disk, predicted, rounds))
    if asked.json:
        found = {
            "size": asked.size,
            "profile": asked.profile,
            "set": asked.set,
            "limit": asked.limit,
            "prepacked": asked.prepacked,
            "prompt": asked.prompt,
            "tokens": asked.tokens,
            "disk": disk,
            "exported": asdict(took),
            "predicted": {**asdict(predicted), "needed": predicted.needed},
            "rounds": [asdict(found) for found in rounds],
        }
        asked.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
