"""`qwen-export adapter`."""

from __future__ import annotations

from pathlib import Path

import click

from qwen_export.cli.shared import debug_option, mmproj_option, reporting, revision_option

_EPILOG = """\b
Examples:
  qwen-export adapter artifacts/Qwen3.5-4B-cpu ~/words --against Qwen/Qwen3.5-4B
  qwen-run artifacts/Qwen3.5-4B-cpu --adapter words=words.onnx_adapter "..."
"""


@click.command("adapter", epilog=_EPILOG)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("adapters", metavar="FOLDER[=WEIGHT]...", nargs=-1, required=True)
@click.option(
    "--against",
    required=True,
    metavar="CHECKPOINT",
    help="What ARTIFACT was made from: folder, hub id or GGUF file. Its weights are not read.",
)
@revision_option
@mmproj_option
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    help="Folder to write to.  [default: this one]",
)
@debug_option
def adapter(
    artifact: Path,
    adapters: tuple[str, ...],
    against: str,
    revision: str | None,
    mmproj: Path | None,
    output: Path,
    debug: bool,
) -> None:
    """Write LoRA adapters of PEFT's as files for `qwen-run --adapter NAME=PATH` with ARTIFACT.

    ARTIFACT was exported with --adapter-at-runtime, and the adapters change projections that one of its own
    changes. It stays as it is.
    """
    with reporting(debug):
        from qwen_export.backends.onnx.beside import write_beside
        from qwen_export.opening import open_checkpoint

        checkpoint = open_checkpoint(against, revision, mmproj=mmproj, streaming=True)
        for path in write_beside(artifact, checkpoint, adapters, output):
            click.echo(path)
