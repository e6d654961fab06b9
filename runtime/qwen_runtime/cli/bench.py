"""`qwen-run bench`: how fast an artifact is here."""

from __future__ import annotations

import json
from pathlib import Path

import click
from qwen_common.errors import reported

from qwen_runtime.cli.options import ARTIFACT, DEBUG, JSON, PROVIDER, GivenPath, number_of_threads
from qwen_runtime.load_options import LoadOptions

_EPILOG = """\b
Examples:
  qwen-run bench artifacts/Qwen3.5-0.8B-cpu
  qwen-run bench artifacts/Qwen3.5-0.8B-cpu --contexts 512,4096 --rounds 5 --plot speed.png
  qwen-run bench artifacts/Qwen3.5-0.8B-cpu --threads 6
  qwen-run bench artifacts/Qwen3.5-0.8B-cpu --threads 2,4,performance,4:yield
  qwen-run bench artifacts/Qwen3.5-0.8B-cpu --json > speed.json
"""


def _lengths(context: click.Context, parameter: click.Parameter, text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter("give numbers of tokens with commas between them, such as 128,512") from None


def _choices(context: click.Context, parameter: click.Parameter, text: str | None) -> list[str]:
    choices = [] if text is None else [number_of_threads(part.strip()) for part in text.split(",")]
    if len(set(choices)) < len(choices):
        raise click.BadParameter("give each number once")
    return choices


@click.command(epilog=_EPILOG)
@ARTIFACT
@click.option(
    "--contexts",
    callback=_lengths,
    metavar="N,N,...",
    help="Lengths of prompt, in tokens.  [default: 128,512,2048, as far as they fit]",
)
@click.option(
    "--tokens", default=32, show_default=True, type=click.IntRange(1), help="To decode after each prompt."
)
@click.option(
    "--rounds", default=3, show_default=True, type=click.IntRange(1), help="The medians of so many are shown."
)
@click.option(
    "--threads",
    "choices",
    callback=_choices,
    metavar="N[,N...]",
    help="That compute on the CPU, as `qwen-run answer` takes it. Several are measured in turns and compared "
    "in processes of their own, with the memory of all of them.  [default: as the model is run]",
)
@PROVIDER
@click.option("--plot", "picture", type=GivenPath(path_type=Path), help="Draw it too, into this PNG file.")
@JSON
@DEBUG
def bench(
    artifact: Path,
    contexts: list[int] | None,
    tokens: int,
    rounds: int,
    choices: list[str],
    provider: str,
    picture: Path | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Measure ARTIFACT here: first token, prefill, decode, memory, share of the memory bandwidth."""
    with reported(debug):
        import dataclasses

        from rich.console import Console

        from qwen_runtime import bench as measuring
        from qwen_runtime import bench_threads as comparing

        if picture is not None and len(choices) > 1:
            raise click.UsageError("--plot draws one number of threads.")
        if picture is not None:
            measuring.check_plot(picture)
        with Console(stderr=True).status("starting") as status:
            if len(choices) > 1:
                options = LoadOptions(provider)
                compared = comparing.compare(
                    artifact, choices, options, contexts, tokens, rounds, status.update
                )
            else:
                options = LoadOptions(provider, threads=choices[0] if choices else None)
                found = measuring.bench(artifact, options, contexts, tokens, rounds, status.update)
        if len(choices) > 1:
            if as_json:
                click.echo(json.dumps(dataclasses.asdict(compared), indent=2))
                return
            Console().print(comparing.table(compared))
            click.echo(comparing.meanings(compared))
            click.echo(comparing.verdict(compared))
            return
        if picture is not None:
            measuring.plot(found, picture)
        if as_json:
            click.echo(json.dumps(dataclasses.asdict(found), indent=2))
            return
        Console().print(measuring.table(found))
        click.echo(measuring.summary(found))
