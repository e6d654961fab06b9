"""`qwen-export export`, which is also meant where no command is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
from qwen_common.errors import UserError

from qwen_export.cli.auto_precision import as_json as choice_as_json
from qwen_export.cli.auto_precision import choose_precision, limits
from qwen_export.cli.report import end_with, show_report, verified
from qwen_export.cli.shared import (
    adapters_option,
    debug_option,
    keep_download_option,
    mmproj_option,
    overrides_option,
    progress_option,
    reporting,
    revision_option,
    typed,
)

if TYPE_CHECKING:
    from qwen_common.manifest import Manifest

    from qwen_export.planner.predictions import Prediction

EPILOG = """\b
Examples:
  qwen-export --profile cpu Qwen/Qwen3.5-0.8B
  qwen-export --profile strix-halo ~/models/Qwen3.5-4B -o D:/kiosk/model
  qwen-export --profile cpu Qwen/Qwen3.5-4B@main --keep-download
  qwen-export --profile cpu ~/models/Qwen3.5-0.8B --json
  qwen-export --profile cpu ~/models/Qwen3.5-0.8B --text-only
  qwen-export --profile cpu Qwen/Qwen3.5-4B --max-context 524288
  qwen-export --profile cpu Qwen/Qwen3.5-4B --adapter ~/lora
  qwen-export --profile cpu Qwen/Qwen3.5-4B --adapter ~/style=0.5 --adapter ~/tools
  qwen-export --profile cpu Qwen/Qwen3.5-4B --auto-precision --size 3GB
  qwen-export --profile laptop-32gb Qwen/Qwen3.5-35B-A3B --auto-precision --memory 22GB
  qwen-export --profile cpu Qwen3.5-4B-Q4_0.gguf --mmproj mmproj-F16.gguf
  qwen-export plan --profile cpu Qwen/Qwen3.5-4B
  qwen-export --profile ./kiosk.toml ~/models/Qwen3.5-0.8B
  qwen-export --profile cpu ~/models/Qwen3.5-0.8B --set weights.body=int8 --set context_length=65536
"""


@click.command("export", epilog=EPILOG)
@click.argument("checkpoint")
@click.option(
    "--profile",
    "profile_name",
    required=True,
    metavar="NAME",
    help="Hardware class to export for, one of `qwen-export profiles`, or the path of your own .toml.",
)
@overrides_option
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to write.  [default: artifacts/<model>-<profile>]",
)
@click.option(
    "--max-context",
    type=click.IntRange(min=2),
    metavar="TOKENS",
    help="Tokens of prompt and answer together, instead of the profile's limit; YaRN where that is more "
    "than the checkpoint was trained for.",
)
@revision_option
@keep_download_option
@mmproj_option
@adapters_option
@click.option(
    "--adapter-at-runtime",
    "switched",
    multiple=True,
    metavar="FOLDER[=WEIGHT]",
    help="LoRA adapter to switch at run time, by `qwen-run --adapter NAME`; may be repeated. CPU profiles "
    "only.",
)
@click.option("--force", is_flag=True, help="Replace the output folder if it is an artifact.")
@click.option("--text-only", is_flag=True, help="Leave the vision tower out.")
@click.option(
    "--auto-precision",
    is_flag=True,
    help="Choose the bits of each layer and role by their error; give --size, --memory or --bits.",
)
@click.option(
    "--size",
    metavar="SIZE",
    help="With --auto-precision: the most that the artifact's files may take, such as 18GB, 17GiB or 900MB.",
)
@click.option(
    "--memory",
    metavar="SIZE",
    help="With --auto-precision: the most memory that it may take once loaded, as `plan` predicts it.",
)
@click.option("--bits", type=float, help="With --auto-precision: bits per weight, all included, such as 4.8.")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path, dir_okay=False),
    help="With --auto-precision, --set compression=gptq or gptaq, or --set cache_dtype=int8: UTF-8 text of "
    "the kind that the model will read; else a shipped one.",
)
@click.option("--ignore-memory", is_flag=True, help="Export even what does not fit the profile's memory.")
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Compare the artifact with the checkpoint afterwards.",
)
@click.option("--all-logits", is_flag=True, help="Logits for every position: slower, for evaluation.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON on stdout.")
@progress_option
@debug_option
def export(
    checkpoint: str,
    profile_name: str,
    overrides: tuple[str, ...],
    output: Path | None,
    max_context: int | None,
    revision: str | None,
    mmproj: Path | None,
    keep_download: bool,
    adapters: tuple[str, ...],
    switched: tuple[str, ...],
    force: bool,
    text_only: bool,
    auto_precision: bool,
    size: str | None,
    memory: str | None,
    bits: float | None,
    calibration: Path | None,
    ignore_memory: bool,
    verify: bool,
    all_logits: bool,
    as_json: bool,
    progress: bool,
    debug: bool,
) -> None:
    """Turn a Qwen3.5 CHECKPOINT (a local folder, a hub id, or a GGUF file) into an artifact for one class of
    hardware.

    An export that was stopped goes on where it was when the same command is run again.
    """
    with reporting(debug):
        from qwen_profiles.schema import load_profile

        from qwen_export.adapters.merge import with_adapters
        from qwen_export.adapters.switched import with_switched_adapters
        from qwen_export.checkpoint.text_files import require_tokenizer
        from qwen_export.cli.progress import BYTES, progress_bar
        from qwen_export.export import default_output
        from qwen_export.export import export as write
        from qwen_export.opening import open_checkpoint
        from qwen_export.output import check_output
        from qwen_export.planner.predictions import require_memory

        profile = load_profile(profile_name, overrides)
        source = open_checkpoint(checkpoint, revision, text_only, mmproj, streaming=not keep_download)
        if source.streamed:
            source.streamed.needed_again = verify
        source = with_adapters(source, adapters)
        source = with_switched_adapters(source, switched, profile)
        folder = output or default_output(source, profile)
        check_output(folder, source.root, force)
        if verify:
            require_tokenizer(source)
        choice = None
        if auto_precision:
            asked = limits(size, memory, bits, fit=not ignore_memory)
            choice = choose_precision(source, profile, asked, calibration, progress and not as_json)
            profile = choice.profile
        elif size is not None or memory is not None or bits is not None:
            raise UserError("--size, --memory and --bits are for --auto-precision: add it")
        elif calibration and profile.compression == "data-free" and profile.cache_dtype != "int8":
            raise UserError(
                "--calibration is for --auto-precision, --set compression=gptq or gptaq (for OpenVINO gptq, "
                "scale-estimation or awq) and --set cache_dtype=int8: add one"
            )
        if not ignore_memory:
            _note_short_context(require_memory(source, profile), max_context)
        with progress_bar(progress and not as_json, "weights", BYTES) as shown:
            manifest = write(
                source,
                profile,
                folder,
                shown,
                force=force,
                all_logits=all_logits,
                max_context=max_context,
                calibration=calibration,
            )
        report = verified(folder, source, progress and not as_json) if verify else None
        if source.streamed:
            source.streamed.finish()
        if as_json:
            made = {"output": str(folder), **manifest, "verification": report}
            click.echo(
                json.dumps(made | ({"auto_precision": choice_as_json(choice)} if choice else {}), indent=2)
            )
        else:
            _summary(folder, manifest)
            if report:
                show_report(folder, report)
            click.echo(f'next: qwen-run {typed(folder)} "Hello"')
        end_with(report)


def _note_short_context(found: Prediction, max_context: int | None) -> None:
    predicted = found.estimate
    asked = max_context or predicted.context
    if predicted.largest_context < asked:
        click.echo(
            f"note: a context of {asked} tokens does not fit {found.profile.name}'s memory, "
            f"{predicted.largest_context} do: consider --max-context {predicted.largest_context}",
            err=True,
        )


def _summary(folder: Path, manifest: Manifest) -> None:
    from qwen_export.cli.console import PlainConsole
    from qwen_export.cli.tables import manifest_table

    PlainConsole().print(manifest_table(f"{folder}", manifest))
