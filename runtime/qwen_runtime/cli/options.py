"""What several commands take."""

from __future__ import annotations

from pathlib import Path

import click
from qwen_common.errors import UserError
from qwen_common.providers import PROVIDERS

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


ARTIFACT = click.argument("artifact", type=click.Path(path_type=Path))
DEBUG = click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
PROVIDER = click.option(
    "--provider", default="auto", show_default=True, metavar="NAME", help=f"auto, {', '.join(PROVIDERS)}."
)
VERIFY = click.option("--verify", is_flag=True, help="Check every file's SHA-256 before loading.")
SPECULATIVE = click.option(
    "--speculative",
    is_flag=True,
    help="Guess the next tokens and check several in a run, on the CPU, while it pays.",
)
EXACT = click.option(
    "--exact", is_flag=True, help="With --speculative, every logit is the same to the bit; slower."
)
PREPACKED = click.option(
    "--prepacked-dir",
    "prepacked",
    type=click.Path(file_okay=False, path_type=Path),
    help="Map weights from this folder, where they are written once in this CPU's layout, with twice the "
    "artifact's bytes: memory stays free, and a model larger than it runs at the disk's pace.",
)


THREADS = click.option(
    "--threads",
    callback=lambda context, parameter, text: None if text is None else number_of_threads(text),
    metavar="N",
    help="That compute on the CPU: a number, 0 for one for each physical core, performance for one on each "
    "P core; 4:yield lets other work have a core while its thread waits, 4:50us after so long.  [default: "
    "ORT_INTRA_OP_NUM_THREADS or else the artifact's]",
)


def speculates(speculative: bool, exact: bool) -> Speculative | None:
    """What these two options come to.

    Raises:
        click.UsageError: one of them alone says nothing.
    """
    if exact and not speculative:
        raise click.UsageError("--exact needs --speculative.")
    if not speculative:
        return None
    return Speculative.EXACT if exact else Speculative.FAST
