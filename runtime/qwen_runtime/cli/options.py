"""What several commands take."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from qwen_common.errors import UserError
from qwen_common.providers import PROVIDERS

from qwen_runtime.load_options import LoadOptions
from qwen_runtime.speculative import Speculative
from qwen_runtime.threads import Asked


def number_of_threads(text: str) -> str:
    """`text`, which `Model.load` takes.

    Raises:
        click.BadParameter: it does not.
    """
    try:
        Asked.parse(text)
    except UserError as error:
        raise click.BadParameter(str(error)) from None
    return text


class GivenPath(click.Path):
    """Not "", which an unset variable of a script leaves, and which `Path` takes for the working folder."""

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        if value == "":
            self.fail("it is empty: give a path, . for this folder", param, ctx)
        return super().convert(value, param, ctx)


class FiniteRange(click.FloatRange):
    """A range without NaN, which lies in every one of click's, and without infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return found


ARTIFACT = click.argument("artifact", type=GivenPath(path_type=Path))
DEBUG = click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
PROVIDER = click.option(
    "--provider", default="auto", show_default=True, metavar="NAME", help=f"auto, {', '.join(PROVIDERS)}."
)
_VERIFY = click.option("--verify", is_flag=True, help="Check every file's SHA-256 before loading.")
_SPECULATIVE = click.option(
    "--speculative",
    is_flag=True,
    help="Guess the next tokens and check several in a run, on the CPU, while it pays.",
)
_EXACT = click.option(
    "--exact", is_flag=True, help="With --speculative, every logit is the same to the bit; slower."
)
_PREPACKED = click.option(
    "--prepacked-dir",
    "prepacked",
    type=GivenPath(file_okay=False, path_type=Path),
    help="Map weights from this folder, where they are written once in this CPU's layout, with twice the "
    "artifact's bytes: memory stays free, and a model larger than it runs at the disk's pace.",
)
_THREADS = click.option(
    "--threads",
    callback=lambda context, parameter, text: None if text is None else number_of_threads(text),
    metavar="N",
    help="That compute on the CPU: a number, 0 for one for each physical core, performance for one on each "
    "P core; 4:yield lets other work have a core while its thread waits, 4:50us after so long.  [default: "
    "ORT_INTRA_OP_NUM_THREADS or else the artifact's]",
)


def named_path(text: str, option: str, form: str) -> tuple[str, Path]:
    """The two parts of `form`, NAME=PATH or one like it.

    Raises:
        UserError: one is missing.
    """
    name, _, path = text.partition("=")
    if not name or not path:
        raise UserError(f"{option} {text}: give {form}")
    return name, Path(path)


def load_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of loading an artifact, in one argument: `load`, a `LoadOptions`."""

    @functools.wraps(command)
    def collected(
        *,
        speculative: bool,
        exact: bool,
        provider: str,
        threads: str | None,
        prepacked: Path | None,
        verify: bool,
        **others: Any,
    ) -> None:
        if exact and not speculative:
            raise click.UsageError("--exact needs --speculative.")
        how = (Speculative.EXACT if exact else Speculative.FAST) if speculative else None
        load = LoadOptions(provider, verify, prepacked=prepacked, speculative=how, threads=threads)
        command(load=load, **others)

    for option in reversed((_SPECULATIVE, _EXACT, PROVIDER, _THREADS, _PREPACKED, _VERIFY)):
        collected = option(collected)
    return collected
