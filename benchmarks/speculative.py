"""What speculative decoding costs and when it pays: python -m benchmarks.speculative [--size 0.8B]

Real answers of the trained checkpoint with its head, and the time of single runs at a published geometry. Its
weights are random, so that the head is never right; the speed at a rate of acceptance is what the decode loop
would need for it in runs of the measured times.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import Any

import numpy as np
import psutil
from qwen_export.checkpoint import Checkpoint
from qwen_export.export import export
from qwen_profiles.schema import load_profile
from qwen_runtime import Model, Sampling
from qwen_runtime.artifact import Artifact
from qwen_runtime.speculative import MOST_VERIFIED, Sessions, Speculator, StatefulRun
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from benchmarks.geometry import GEOMETRIES, write_checkpoint
from tests.mtp import with_head
from tests.random_checkpoints import TINY, copy_tokenizer

PROMPT_TOKENS, TOKENS = 128, 16
RATES = (0.0, 0.5, 0.7, 0.8, 0.9, 1.0)


class Quiet:
    def note(self, message: str) -> None: ...
    def start(self, total: int) -> None: ...
    def advance(self, count: int) -> None: ...


def artifact(checkpoint: Path, output: Path) -> Path:
    export(Checkpoint.open(str(checkpoint)), load_profile("cpu"), output, Quiet())
    return output


def trained(folder: Path, console: Console) -> None:
    """Acceptance, and how many answers are the same as without."""
    head = load_file(TINY.parent / "tiny-dense-mtp" / "mtp.safetensors")
    whole = with_head(TINY, head, folder / "tiny")
    drafted = accepted = same = 0
    prompts = [text.strip()[:200] for text in list(topics.values())[:60]]
    with Model.load(artifact(whole, folder / "tiny-cpu")) as model:
        for prompt in prompts:
            plain = model.generate(prompt, max_tokens=80, sampling=Sampling(temperature=0))
            guessed = model.generate(prompt, max_tokens=80, speculative=True)
            list(plain), list(guessed)
            assert guessed.acceptance is not None
            drafted += guessed.acceptance.drafted
            accepted += guessed.acceptance.accepted
            same += plain.tokens == guessed.tokens
    console.print(
        f"trained checkpoint, profile cpu: {accepted / drafted:.0%} of {drafted} guesses accepted; "
        f"{same} of {len(prompts)} answers of 80 tokens the same as without"
    )


def seconds(run: StatefulRun, tokens: int, **inputs: np.ndarray) -> float:
    started = time.perf_counter()
    run([1] * tokens, **inputs)
    return time.perf_counter() - started


def speed(runs: dict[int, float], head: float, rate: float) -> float:
    """Tokens per second of `Speculator`, whose guesses are right with probability `rate`.

    The loop is in one of few places, told by the tokens that are verified and not in the kept states. How
    often it is in each follows from going round a few hundred times.
    """
    places = {1: 1.0}
    made = spent = 0.0
    for _ in range(300):
        after: dict[int, float] = {}
        made = spent = 0.0
        for verified, share in places.items():
            guessed = verified < MOST_VERIFIED
            spent += share * (head + runs[verified + guessed])
            made += share * (1 + rate * guessed)
            right = rate if guessed else 1.0
            after[1] = after.get(1, 0.0) + share * right
            if guessed:
                after[verified + 1] = after.get(verified + 1, 0.0) + share * (1 - right)
        places = after
    return made / spent


def geometry(size: str, folder: Path, rounds: int, console: Console) -> None:
    config = {**GEOMETRIES[size], "mtp_num_hidden_layers": 1}
    checkpoint = write_checkpoint(folder / "checkpoint", config)
    copy_tokenizer(TINY, checkpoint)
    made = artifact(checkpoint, folder / "cpu")
    process = psutil.Process()
    with Model.load(made) as model:
        prompt = model_prompt(config)
        plain_seconds(model, prompt)  # warm
        before = process.memory_full_info().uss
        sessions = Sessions.load(Artifact.open(made), "cpu")
        speculator = Speculator(sessions, PROMPT_TOKENS + 64)
        speculator.append_tokens(prompt)
        decoder, head = speculator._decoder, speculator._head
        hidden = np.zeros((1, 1, config["hidden_size"]), np.float32)
        timed: dict[int, list[float]] = {count: [] for count in range(1, MOST_VERIFIED + 1)}
        heads: list[float] = []
        plain: list[float] = []
        for _ in range(rounds):  # in turn, because other work on the machine comes and goes
            plain.append(plain_seconds(model, prompt))
            for _ in range(TOKENS):
                for count, times in timed.items():
                    times.append(seconds(decoder, count))
                heads.append(seconds(head, 1, hidden_states=hidden))
        memory = process.memory_full_info().uss - before
    runs = {count: median(times) for count, times in timed.items()}
    base = 1 / median(plain)
    console.print(f"{size}, random weights, profile cpu: {base:.1f} tokens/s without")
    costs = ", ".join(f"{count} tokens {time / runs[1]:.2f}" for count, time in runs.items())
    console.print(
        f"a run of the decoder against one of 1 token ({runs[1] * 1e3:.1f} ms): {costs}; the head "
        f"{median(heads) / runs[1]:.2f}; private memory {memory / 1e6:.0f} MB more"
    )
    table = Table("guesses accepted", "tokens/s against without")
    for rate in RATES:
        table.add_row(f"{rate:.0%}", f"{speed(runs, median(heads), rate) / base:.2f}")
    console.print(table)


def model_prompt(config: dict[str, Any]) -> list[int]:
    return np.random.default_rng(0).integers(0, config["vocab_size"], PROMPT_TOKENS).tolist()


def plain_seconds(model: Model, prompt: list[int]) -> float:
    """Median seconds for a token of ONNX Runtime GenAI's greedy decoding."""
    generator = model._generator({"do_sample": False}, None, PROMPT_TOKENS + TOKENS + 1)
    generator.append_tokens(np.asarray(prompt, np.int32))
    generator.generate_next_token()
    times = []
    for _ in range(TOKENS):
        started = time.perf_counter()
        generator.generate_next_token()
        times.append(time.perf_counter() - started)
    return median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=GEOMETRIES, default="0.8B")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    console = Console(width=140)
    with tempfile.TemporaryDirectory() as folder:
        trained(Path(folder), console)
        geometry(arguments.size, Path(folder), arguments.rounds, console)


if __name__ == "__main__":
    main()
