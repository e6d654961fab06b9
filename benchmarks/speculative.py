"""What speculative decoding costs and when it pays: python -m benchmarks.speculative [--size 0.8B]

Real answers of the trained checkpoint with its head, and the time of single runs at a published geometry. Its
weights are random, so that the head is never right; the speed at a rate of acceptance follows from the times
of a run of two tokens and of the head.
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
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.export import export
from qwen_profiles.schema import load_profile
from qwen_runtime import Model, Sampling
from qwen_runtime.artifact import Artifact
from qwen_runtime.speculative import Sessions, StatefulSession, zeros
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from benchmarks.geometry import GEOMETRIES, write_checkpoint
from benchmarks.support.artifacts import Quiet
from benchmarks.support.checkpoints import TINY, TRAINED_HEAD, copy_tokenizer
from benchmarks.support.mtp import with_head

PROMPT_TOKENS, TOKENS = 128, 16
RATES = (0.0, 0.5, 0.7, 0.8, 0.9, 1.0)


def artifact(checkpoint: Path, output: Path) -> Path:
    export(Checkpoint.open(str(checkpoint)), load_profile("cpu"), output, Quiet())
    return output


def trained(folder: Path, console: Console) -> None:
    """Acceptance, and how many answers are the same as without."""
    head = load_file(TRAINED_HEAD)
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


def seconds(run: StatefulSession, tokens: list[int], **inputs: np.ndarray) -> float:
    started = time.perf_counter()
    run(tokens, **inputs)
    return time.perf_counter() - started


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
        states = zeros(sessions.decoder, PROMPT_TOKENS + 2), zeros(sessions.head, PROMPT_TOKENS + 2)
        at_once = StatefulSession(sessions.decoder, states[0], PROMPT_TOKENS, all_at_once(sessions))
        decoder = StatefulSession(sessions.decoder, states[0], PROMPT_TOKENS, sessions.rows)
        head = StatefulSession(sessions.head, states[1], PROMPT_TOKENS)
        hidden = np.zeros((1, 1, config["hidden_size"]), np.float32)
        runs: dict[str, list[float]] = {"pair": [], "pair, all rows at once": [], "head": []}
        plain: list[float] = []
        for _ in range(rounds):  # in turn, because other work on the machine comes and goes
            plain.append(plain_seconds(model, prompt))
            time.sleep(0.1)  # GenAI's threads spin for a while
            for _ in range(TOKENS):
                runs["pair"].append(seconds(decoder, [1, 2]))
                runs["head"].append(seconds(head, [1], hidden_states=hidden))
            for _ in range(TOKENS):
                runs["pair, all rows at once"].append(seconds(at_once, [1, 2]))
        memory = process.memory_full_info().uss - before
    one = median(plain)
    costs = {name: median(times) / one for name, times in runs.items()}
    apart = [name for name, counts in sessions.rows.items() if counts[1]]
    console.print(
        f"{size}, random weights, profile cpu: {1 / one:.1f} tokens/s without; rows apart: "
        f"{', '.join(apart) or 'none'}; private memory {memory / 1e6:.0f} MB more"
    )
    console.print(
        f"against a token of ONNX Runtime GenAI ({one * 1e3:.1f} ms): "
        + ", ".join(f"{name} {cost:.2f}" for name, cost in costs.items())
    )
    table = Table("guesses accepted", "tokens/s against without")
    for rate in RATES:
        table.add_row(f"{rate:.0%}", f"{(1 + rate) / (costs['pair'] + costs['head']):.2f}")
    console.print(table)


def all_at_once(sessions: Sessions) -> dict[str, np.ndarray]:
    """What runs would take if every kernel rounded two rows as it rounds one."""
    return dict.fromkeys(sessions.rows, np.array([2, 0]))


def model_prompt(config: dict[str, Any]) -> list[int]:
    return np.random.default_rng(0).integers(0, config["vocab_size"], PROMPT_TOKENS).tolist()


def plain_seconds(model: Model, prompt: list[int]) -> float:
    """Median seconds for a token of ONNX Runtime GenAI's greedy decoding."""
    generator = model._backend.generator({"do_sample": False}, None, PROMPT_TOKENS + TOKENS + 1)
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
