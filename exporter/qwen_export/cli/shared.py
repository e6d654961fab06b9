"""What several commands have: options, and how their errors are reported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from qwen_common.errors import UserError, one_line, reported

overrides_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Change a field of the profile, such as weights.body=int8; may be repeated.",
)
adapters_option = click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="FOLDER[=WEIGHT]",
    help="PEFT's LoRA adapter to merge into the weights, its scaling times WEIGHT; may be repeated: merged "
    "in that order.",
)
revision_option = click.option(
    "--revision", help="Branch, tag or commit, when CHECKPOINT is a hub id; as org/name@REVISION."
)
mmproj_option = click.option(
    "--mmproj",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    metavar="FILE",
    help="Vision tower of a GGUF file, as llama.cpp keeps it beside the text model.",
)
keep_download_option = click.option(
    "--keep-download",
    is_flag=True,
    help="Of a hub id: download the whole checkpoint first and leave it in the hub's cache. Without it, one "
    "shard after the other is fetched when it is read, and deleted.",
)
progress_option = click.option(
    "--progress/--no-progress", default=True, help="Show a progress bar on stderr."
)
debug_option = click.option("--debug", is_flag=True, help="Show a traceback when something fails.")


@contextmanager
def reporting(debug: bool, extra: str = "export") -> Iterator[None]:
    """`reported`, and for a library that is missing the name of the `extra` that installs it."""
    with reported(debug):
        try:
            yield
        except ModuleNotFoundError as error:
            raise UserError(f"{error.name} is not installed: pip install 'qwen-edge[{extra}]'") from error


def typed(path: Path) -> str:
    """`path` as an argument on a command line."""
    name = one_line(str(path))
    return (
        name if all(character.isalnum() or character in "/\\.:_-+,@~" for character in name) else f'"{name}"'
    )
