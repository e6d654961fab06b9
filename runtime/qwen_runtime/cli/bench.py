"""`qwen-run bench`: how fast an artifact is here."""

from __future__ import annotations

import json
from pathlib import Path

import click
from qwen_common.errors import reported

from qwen_runtime.cli.options import ARTIFACT, DEBUG, JSON, PROVIDER

_EPILOG = """\b
Examples:
  qwen-run bench artifacts/Qwen3.5-0.8B-cpu
  qwen-run bench artifacts/Qwen3.5-0.8B-cpu --contexts 512,4096 --rounds 5 --plot speed.png
  qwen-run bench artifacts/Qwen3.5-0.8B-cpu --threads 6
  qwen-run bench artifacts/Qwen3.5-0.8B-cpu --json > speed.json
"""


def _lengths(context: click.Context, parameter: click.Parameter, text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter("give numbers of tokens with commas between them, such as 128,512") from None


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
    type=click.IntRange(1),
    metavar="N",
    help="That ONNX Runtime computes with on the CPU.  [default: one for each physical core]",
)
@PROVIDER
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="Draw it too, into this PNG file.")
@JSON
@DEBUG
def bench(
    artifact: Path,
    contexts: list[int] | None,
    tokens: int,
    rounds: int,
    threads: int | None,
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

        with Console(stderr=True).status("starting") as status:
            found = measuring.bench(artifact, provider, contexts, tokens, rounds, threads, status.update)
        if picture is not None:
            measuring.plot(found, picture)
        if as_json:
            click.echo(json.dumps(dataclasses.asdict(found), indent=2))
            return
        Console().print(measuring.table(found))
        click.echo(measuring.summary(found))
