"""What speculative decoding brings: python -m benchmarks.speculative [--size 0.8B] [--profile cpu cpu-int4]

- Acceptance of real answers of the trained checkpoint, with its trained MTP head.
- At a published geometry with random weights, in turns: the time of runs of k tokens at once, of a pair with
  the bits of single tokens, and of the head, against a token of plain decoding.
- At that geometry, whole answers whose tokens are given: a text, an edited source file, and JSON. Drafts,
  acceptance, times and the automatic switch are real; which tokens come next is not the model's choice.
"""

from __future__ import annotations

import argparse
import inspect
import json
import tempfile
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import Any

import numpy as np
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.export import export
from qwen_profiles.schema import load_profile
from qwen_runtime import Model, Sampling
from qwen_runtime.prefill import append
from qwen_runtime.sampling import GREEDY
from qwen_runtime.speculative import Speculative
from qwen_runtime.speculative.acceptance import Acceptance
from qwen_runtime.speculative.generator import SpeculativeGenerator, SpeculativeOrt
from qwen_runtime.speculative.sessions import Sessions, StatefulSession, zeros
from qwen_runtime.speculative.switch import Switch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from benchmarks.geometry import GEOMETRIES, write_checkpoint
from benchmarks.support.artifacts import Quiet
from benchmarks.support.checkpoints import TINY, TRAINED_HEAD, copy_tokenizer
from benchmarks.support.mtp import with_head

CONTEXT, RUNS = 128, 8
LENGTHS = (2, 3, 4, 8)  # a run of one token is plain decoding
ANSWER = 100  # tokens at most


def exported(checkpoint: Path, profile: str, output: Path) -> Path:
    """Codes from the weights alone: they are as quick as any."""
    if not output.exists():
        settings = ["compression=data-free"]
        export(Checkpoint.open(str(checkpoint)), load_profile(profile, settings), output, Quiet())
    return output


@contextmanager
def speculating(
    artifact: Path, how: Speculative, always: bool = False
) -> Iterator[tuple[Model, SpeculativeOrt]]:
    with Model.load(artifact, speculative=how) as model:
        backend = model._backend
        assert isinstance(backend, SpeculativeOrt)
        backend.switch = Switch(backend.sessions.most, always)
        yield model, backend


def trained(folder: Path, console: Console) -> None:
    """How often drafts for real answers are right, and how many answers are the same as without."""
    whole = with_head(TINY, load_file(TRAINED_HEAD), folder / "tiny")
    artifact = exported(whole, "cpu", folder / "tiny-cpu")
    prompts = [text.strip()[:200] for text in list(topics.values())[:30]]
    options: dict[str, Any] = {"max_tokens": 80, "sampling": Sampling(temperature=0)}
    with Model.load(artifact) as plain:
        expected = [tokens_of(plain, prompt, options) for prompt in prompts]
    for how in Speculative:
        drafted = accepted = same = 0
        with speculating(artifact, how, always=True) as (model, _):
            for prompt, tokens in zip(prompts, expected, strict=True):
                generation = model.generate(prompt, **options)
                list(generation)
                assert generation.acceptance is not None
                drafted += generation.acceptance.drafted
                accepted += generation.acceptance.accepted
                same += generation.tokens == tokens
        console.print(
            f"trained checkpoint, profile cpu, {how}: {accepted / drafted:.0%} of {drafted} drafted tokens "
            f"accepted; {same} of {len(prompts)} answers of 80 tokens the same as without"
        )


def tokens_of(model: Model, prompt: str, options: dict[str, Any]) -> list[int]:
    generation = model.generate(prompt, **options)
    list(generation)
    return generation.tokens


def costs(artifact: Path, rounds: int, console: Console) -> None:
    """Medians, and least and greatest, of each round's times against a plain token's of that round."""
    with Model.load(artifact) as plain, speculating(artifact, Speculative.FAST) as (_, backend):
        pair = Sessions.load(backend.artifact, Speculative.EXACT)
        several, exact = (
            StatefulSession(sessions.decoder, zeros(sessions.decoder, CONTEXT + 8), CONTEXT, sessions.rows)
            for sessions in (backend.sessions, pair)
        )
        runs: dict[str, Callable[[], object]] = {
            f"{length} at once": lambda length=length: several(range(length)) for length in LENGTHS
        }
        runs["a pair, exact"] = lambda: exact(range(2))
        if pair.head is not None:
            head = StatefulSession(pair.head, zeros(pair.head, CONTEXT), CONTEXT - 1)
            (shape,) = (value.shape for value in pair.head.get_inputs() if value.name == "hidden_states")
            hidden = np.zeros((1, 1, shape[2]), np.float32)
            runs["the MTP head"] = lambda: head([1], hidden_states=hidden)
        ratios: dict[str, list[float]] = defaultdict(list)
        for _ in range(rounds):  # in turns, because other work on the machine comes and goes
            one = plain_seconds(plain)
            time.sleep(0.1)  # its threads spin for a while
            for name, run in runs.items():
                run()
                ratios[name].append(median(seconds(run) for _ in range(RUNS)) / one)
    apart = [name for name, counts in pair.rows.items() if counts[1]]
    console.print(f"{artifact.name}: an exact pair takes the rows apart of {', '.join(apart) or 'nothing'}")
    table = Table("run", "time, a plain token = 1", "least", "most")
    for name, found in ratios.items():
        table.add_row(name, *(f"{value:.2f}" for value in (median(found), min(found), max(found))))
    console.print(table)


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def plain_seconds(model: Model) -> float:
    """Median seconds for a token of ONNX Runtime GenAI's greedy decoding."""
    generator = model._backend.generator(GREEDY, None, CONTEXT + RUNS + 1)
    generator.append_tokens(np.arange(CONTEXT, dtype=np.int32))
    generator.generate_next_token()
    return median(seconds(generator.generate_next_token) for _ in range(RUNS))


def tasks(model: Model) -> dict[str, tuple[list[int], list[int]]]:
    """Prompts and answers."""
    text = topics["assignment"]
    code = inspect.getsource(textwrap.dedent)[:800]
    records = [
        {"id": 7 * n, "name": f"part {n}", "price": 3 * n + 1, "in_stock": n % 3 > 0} for n in range(7)
    ]
    changed = [{**record, "price": record["price"] * 2} for record in records]
    found = {
        "text": (text[:800], text[800:1400]),
        "code, a name changed": (f"Rename text to words.\n{code}\n", code.replace("text", "words")),
        "JSON, a field changed": (f"Double the prices.\n{json.dumps(records)}\n", json.dumps(changed)),
    }
    return {
        name: (model.encode(prompt), model.encode(answer)[:ANSWER])
        for name, (prompt, answer) in found.items()
    }


def forced(model: Model, prompt: Sequence[int], answer: Sequence[int]) -> tuple[float, Any]:
    """Seconds of an answer that is made to have these tokens, and its generator."""
    generator = model._backend.logits_generator(GREEDY, None, len(prompt) + len(answer) + 1)
    append(generator, prompt, model._backend.chunk_size, lambda done: False)
    started = time.perf_counter()
    for token in answer:
        logits = generator.get_logits()
        logits[...] = -np.inf
        logits[..., token] = 0
        generator.set_logits(logits)
        generator.generate_next_token()
    return time.perf_counter() - started, generator


def answers(artifact: Path, rounds: int, console: Console) -> None:
    table = Table("answer", "decoding", "speed, plain = 1", "least", "most", "drafted", "accepted")
    with ExitStack() as stack:
        plain = stack.enter_context(Model.load(artifact))
        models = {how: stack.enter_context(speculating(artifact, how))[0] for how in Speculative}
        for task, (prompt, answer) in tasks(plain).items():
            ratios: dict[str, list[float]] = defaultdict(list)
            accepted: dict[str, Acceptance] = {}
            for _ in range(rounds):
                base, _generator = forced(plain, prompt, answer)
                time.sleep(0.1)
                for how, model in models.items():
                    took, generator = forced(model, prompt, answer)
                    assert isinstance(generator, SpeculativeGenerator)
                    ratios[how].append(base / took)
                    accepted[how] = generator.acceptance
            for how, found in ratios.items():
                shown = (f"{value:.2f}" for value in (median(found), min(found), max(found)))
                drafts = accepted[how]
                table.add_row(task, how, *shown, str(drafts.drafted), f"{drafts.rate:.0%}")
    console.print(artifact.name, table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=GEOMETRIES, default="0.8B")
    parser.add_argument("--profile", nargs="+", default=["cpu", "cpu-int4"], help="profiles to export with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="keeps what is exported, and takes what is there already")
    parser.add_argument("--trained", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    console = Console(width=140)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if arguments.trained:
            trained(Path(temporary), console)
        checkpoint = folder / "checkpoint"
        if not all((folder / profile).exists() for profile in arguments.profile):
            write_checkpoint(checkpoint, {**GEOMETRIES[arguments.size], "mtp_num_hidden_layers": 1})
            copy_tokenizer(TINY, checkpoint)
        for profile in arguments.profile:
            artifact = exported(checkpoint, profile, folder / profile)
            costs(artifact, arguments.rounds, console)
            answers(artifact, arguments.rounds, console)


if __name__ == "__main__":
    main()
