"""`qwen-export verify`."""

from __future__ import annotations

import json
from pathlib import Path

import click
from qwen_common.providers import PROVIDERS

from qwen_export.cli.report import end_with, show_report, verified
from qwen_export.cli.shared import (
    adapters_option,
    debug_option,
    keep_download_option,
    mmproj_option,
    progress_option,
    reporting,
    revision_option,
)

*_OTHERS, _LAST = sorted(PROVIDERS)
_EPILOG = """\b
Examples:
  qwen-export verify artifacts/Qwen3.5-0.8B-cpu --against Qwen/Qwen3.5-0.8B
  qwen-export verify artifacts/Qwen3.5-4B-cpu --against Qwen/Qwen3.5-4B --adapter ~/lora
  qwen-export verify D:/kiosk/model --against ~/models/Qwen3.5-4B --tokens 4096 --text manuals.txt
"""


@click.command("verify", epilog=_EPILOG)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--against",
    required=True,
    metavar="CHECKPOINT",
    help="What it was made from: folder, hub id or GGUF file.",
)
@revision_option
@keep_download_option
@mmproj_option
@adapters_option
@click.option(
    "--provider",
    default="auto",
    show_default=True,
    help=f"Execution provider: auto, {', '.join(_OTHERS)} or {_LAST}; with OpenVINO the device.",
)
@click.option("--tokens", type=click.IntRange(min=1), help="How many to compare on.  [default: 1024]")
@click.option(
    "--text",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Text to compare on, UTF-8; else a shipped one.",
)
@click.option(
    "--reference",
    type=click.Choice(["numpy", "transformers"]),
    default="numpy",
    show_default=True,
    help="With transformers, it reads the checkpoint, too, and its logits are compared with our reference's; "
    "the whole model in memory, in float32.",
)
@click.option("--json", "as_json", is_flag=True, help="Print report.json on stdout.")
@progress_option
@debug_option
def verify(
    artifact: Path,
    against: str,
    revision: str | None,
    mmproj: Path | None,
    keep_download: bool,
    adapters: tuple[str, ...],
    provider: str,
    tokens: int | None,
    text: Path | None,
    reference: str,
    as_json: bool,
    progress: bool,
    debug: bool,
) -> None:
    """Compare ARTIFACT with the checkpoint that it was made from, and write the report into it.

    The artifact runs on this machine's provider, the checkpoint layer by layer in float32, in little memory.
    An adapter that was merged is given again with --adapter: the checkpoint with it is the reference.
    Exit code 3 if the artifact is below its profile's quality bar.
    """
    with reporting(debug):
        from qwen_export.adapters.merge import with_adapters
        from qwen_export.opening import open_checkpoint

        whole = keep_download or reference == "transformers"  # which reads the files itself
        opened = open_checkpoint(against, revision, mmproj=mmproj, streaming=not whole)
        checkpoint = with_adapters(opened, adapters)
        report = verified(
            artifact,
            checkpoint,
            progress and not as_json,
            provider,
            tokens,
            text,
            with_transformers=reference == "transformers",
        )
        if checkpoint.streamed:
            checkpoint.streamed.finish()
        if as_json:
            click.echo(json.dumps(report, indent=2))
        else:
            show_report(artifact, report)
        end_with(report)
