"""The command `qwen-export`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from click_default_group import DefaultGroup
from pydantic import ByteSize, TypeAdapter, ValidationError
from qwen_common.errors import BELOW_THE_BAR, UserError, reported
from qwen_common.manifest import BackendName, Manifest
from qwen_common.providers import PROVIDERS
from qwen_common.version import DISTRIBUTION
from qwen_profiles.schema import Profile, load_profile
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from qwen_export.backends.onnx.inspection import inspect, precisions
from qwen_export.bundle.platforms import PLATFORMS
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.export import default_output, export
from qwen_export.output import check_output
from qwen_export.planner.fit import Fit, compare, configured, family, require_fit, shipped_profiles
from qwen_export.progress import Progress as ExportProgress
from qwen_export.tables import (
    compare_table,
    fit_table,
    inspection_tables,
    matrix_table,
    profiles_table,
    report_table,
)

_EPILOG = """\b
Examples:
  qwen-export --profile cpu Qwen/Qwen3.5-0.8B
  qwen-export --profile strix-halo ~/models/Qwen3.5-4B -o D:/kiosk/model
  qwen-export --profile cpu ~/models/Qwen3.5-0.8B --json
  qwen-export --profile cpu ~/models/Qwen3.5-0.8B --text-only
  qwen-export --profile cpu Qwen/Qwen3.5-4B --max-context 524288
  qwen-export --profile cpu Qwen/Qwen3.5-4B --auto-precision --size 3GB
  qwen-export plan --profile cpu Qwen/Qwen3.5-4B
  qwen-export --profile ./kiosk.toml ~/models/Qwen3.5-0.8B
  qwen-export --profile cpu ~/models/Qwen3.5-0.8B --set weights.body=int8 --set context_length=65536
"""


class _Bar:
    """How far a long task is, on stderr so that stdout stays clean for --json."""

    def __init__(self, console: Console, bar: Progress, title: str) -> None:
        self._console, self._bar = console, bar
        self._task = bar.add_task(title, total=None)

    def note(self, message: str) -> None:
        self._console.print(message)

    def start(self, total: int) -> None:
        self._bar.update(self._task, total=total)

    def advance(self, count: int) -> None:
        self._bar.advance(self._task, count)


_BYTES: tuple[ProgressColumn, ...] = (DownloadColumn(), TransferSpeedColumn())
_STEPS: tuple[ProgressColumn, ...] = (MofNCompleteColumn(),)


@contextmanager
def _progress(show: bool, title: str, columns: tuple[ProgressColumn, ...]) -> Iterator[ExportProgress]:
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        console=console,
        disable=not show,
    )
    with bar:
        yield _Bar(console, bar, title)


_overrides = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Change a field of the profile, such as weights.body=int8; may be repeated.",
)


@click.group(cls=DefaultGroup, default="export", epilog=_EPILOG)
@click.version_option(package_name=DISTRIBUTION)
def main() -> None:
    """Turn a Qwen3.5 checkpoint into an artifact for one class of hardware.

    Without the name of a command: export.

    Exit codes: 0 done, 2 a mistake that you can mend, 3 an artifact below its profile's quality bar, 1 a
    mistake of ours, 130 interrupted.
    """


@main.command("export", epilog=_EPILOG)
@click.argument("checkpoint")
@click.option(
    "--profile",
    "profile_name",
    required=True,
    metavar="NAME",
    help="Hardware class to export for, one of `qwen-export profiles`, or the path of your own .toml.",
)
@_overrides
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to write.  [default: artifacts/<model>-<profile>]",
)
@click.option(
    "--max-context",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Tokens of prompt and answer together, instead of the profile's limit; YaRN where that is more "
    "than the checkpoint was trained for.",
)
@click.option("--revision", help="Branch, tag or commit, when CHECKPOINT is a hub id.")
@click.option("--force", is_flag=True, help="Replace the output folder if it is an artifact.")
@click.option("--text-only", is_flag=True, help="Leave the vision tower out.")
@click.option(
    "--auto-precision",
    is_flag=True,
    help="Choose INT4 or INT8 for each layer and role by what INT4 costs there; give --size or --bits.",
)
@click.option("--size", metavar="SIZE", help="With --auto-precision: size of the artifact, such as 18GB.")
@click.option("--bits", type=float, help="With --auto-precision: bits per weight, all included, such as 4.8.")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path, dir_okay=False),
    help="With --auto-precision or --set compression=gptq: UTF-8 text of the kind that the model will read; "
    "else a shipped one.",
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
@click.option("--progress/--no-progress", default=True, help="Show a progress bar on stderr.")
@click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
def export_command(
    checkpoint: str,
    profile_name: str,
    overrides: tuple[str, ...],
    output: Path | None,
    max_context: int | None,
    revision: str | None,
    force: bool,
    text_only: bool,
    auto_precision: bool,
    size: str | None,
    bits: float | None,
    calibration: Path | None,
    ignore_memory: bool,
    verify: bool,
    all_logits: bool,
    as_json: bool,
    progress: bool,
    debug: bool,
) -> None:
    """Turn a Qwen3.5 CHECKPOINT (a local folder or a hub id) into an artifact for one class of hardware.

    An export that was stopped goes on where it was when the same command is run again.
    """
    with reported(debug):
        profile = load_profile(profile_name, overrides)
        source = Checkpoint.open(checkpoint, revision, text_only)
        folder = output or default_output(source, profile)
        check_output(folder, source.root, force)
        if auto_precision:
            profile = _chosen(source, profile, size, bits, calibration, progress and not as_json)
        elif size or bits:
            raise UserError("--size and --bits are for --auto-precision: add it")
        elif calibration and profile.compression == "data-free":
            raise UserError(
                "--calibration is for --auto-precision and --set compression=gptq (for OpenVINO "
                "scale-estimation and awq too): add one"
            )
        if not ignore_memory:
            _note_short_context(require_fit(source, profile), max_context)
        with _progress(progress and not as_json, "weights", _BYTES) as shown:
            manifest = export(
                source,
                profile,
                folder,
                shown,
                force=force,
                all_logits=all_logits,
                max_context=max_context,
                calibration=calibration,
            )
        report = _verified(folder, source, progress and not as_json) if verify else None
        if as_json:
            click.echo(json.dumps({"output": str(folder), **manifest, "verification": report}, indent=2))
        else:
            _summary(folder, manifest)
            if report:
                _judgement(folder, report)
            click.echo(f'next: qwen-run {folder} "Hello"')
        _end_with(report)


def _chosen(
    checkpoint: Checkpoint,
    profile: Profile,
    size: str | None,
    bits: float | None,
    calibration: Path | None,
    progress: bool,
) -> Profile:
    from qwen_export.quantize.auto_precision import auto_precision

    if profile.backend != BackendName.ONNX:
        raise UserError("--auto-precision is for ONNX Runtime: choose precisions with --set weights.ROLE=...")
    if (size is None) == (bits is None):
        raise UserError("--auto-precision needs a size to spend: give --size 18GB or --bits 4.8")
    try:
        limit = None if size is None else int(TypeAdapter(ByteSize).validate_python(size))
    except ValidationError as error:
        raise UserError(f"'{size}' is no size: write 18GB, or 900MB") from error
    checkpoint.check(checkpoint.config.tensors())
    with _progress(progress, "sensitivity", _STEPS) as shown:
        return auto_precision(checkpoint, profile, calibration, shown, size=limit, bits=bits)


def _verified(
    artifact: Path,
    checkpoint: Checkpoint,
    progress: bool,
    provider: str = "auto",
    tokens: int | None = None,
    text: Path | None = None,
) -> dict[str, Any]:
    from qwen_export.verify.verification import DEFAULT_TOKENS, verify

    with _progress(progress, "verification", _STEPS) as shown:
        return verify(
            artifact, checkpoint, shown, provider=provider, tokens=tokens or DEFAULT_TOKENS, text=text
        )


def _judgement(folder: Path, report: dict[str, Any]) -> None:
    console = Console(file=sys.stdout)
    console.print(report_table(report))
    for finding in report["findings"]:
        console.print(finding, highlight=False)
    click.echo(f"{'passed' if report['passed'] else 'BELOW THE BAR'}: {folder / 'REPORT.md'} has it all")


def _end_with(report: dict[str, Any] | None) -> None:
    if report and not report["passed"]:
        sys.exit(BELOW_THE_BAR)


def _note_short_context(found: Fit, max_context: int | None) -> None:
    predicted = found.estimate
    asked = max_context or (predicted.context if predicted else 0)
    if predicted and predicted.largest_context < asked:
        click.echo(
            f"note: a context of {asked} tokens does not fit {found.profile.name}'s memory, "
            f"{predicted.largest_context} do: consider --max-context {predicted.largest_context}",
            err=True,
        )


def _summary(folder: Path, manifest: Manifest) -> None:
    table = Table("role", "precision", "MB", title=f"{folder}")
    for role, precision in precisions(manifest).items():
        table.add_row(role, precision, f"{manifest['bytes_by_role'][role] / 1e6:.1f}")
    total = sum(entry["size"] for entry in manifest["files"].values())
    table.add_row("all files", "", f"{total / 1e6:.1f}", end_section=True)
    Console(file=sys.stdout).print(table)


*_OTHERS, _LAST = sorted(PROVIDERS)
_VERIFY_EPILOG = """\b
Examples:
  qwen-export verify artifacts/Qwen3.5-0.8B-cpu --against Qwen/Qwen3.5-0.8B
  qwen-export verify D:/kiosk/model --against ~/models/Qwen3.5-4B --tokens 4096 --text manuals.txt
"""


@main.command("verify", epilog=_VERIFY_EPILOG)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--against", required=True, metavar="CHECKPOINT", help="What it was made from: folder or hub id."
)
@click.option("--revision", help="Branch, tag or commit, when CHECKPOINT is a hub id.")
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
@click.option("--json", "as_json", is_flag=True, help="Print report.json on stdout.")
@click.option("--progress/--no-progress", default=True, help="Show a progress bar on stderr.")
@click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
def verify_command(
    artifact: Path,
    against: str,
    revision: str | None,
    provider: str,
    tokens: int | None,
    text: Path | None,
    as_json: bool,
    progress: bool,
    debug: bool,
) -> None:
    """Compare ARTIFACT with the checkpoint that it was made from, and write the report into it.

    The artifact runs on this machine's provider, the checkpoint layer by layer in float32, in little memory.
    Exit code 3 if the artifact is below its profile's quality bar.
    """
    with reported(debug):
        checkpoint = Checkpoint.open(against, revision)
        report = _verified(artifact, checkpoint, progress and not as_json, provider, tokens, text)
        if as_json:
            click.echo(json.dumps(report, indent=2))
        else:
            _judgement(artifact, report)
        _end_with(report)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON on stdout.")
@click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
def profiles(as_json: bool, debug: bool) -> None:
    """List the hardware classes that can be exported for."""
    with reported(debug):
        shipped = shipped_profiles()
        if as_json:
            click.echo(json.dumps([profile.model_dump() for profile in shipped], indent=2))
        else:
            Console(file=sys.stdout).print(profiles_table(shipped))


_PLAN_EPILOG = """\b
Examples:
  qwen-export plan --profile intel-n100 Qwen/Qwen3.5-2B
  qwen-export plan Qwen3.5-27B                            on all profiles
  qwen-export plan --profile radeon-780m                  the family
  qwen-export plan --profile cpu Qwen3.5-4B --set weights.body=int8 --json
"""


@main.command("plan", epilog=_PLAN_EPILOG)
@click.argument("model", required=False)
@click.option("--profile", "profile_name", metavar="NAME", help="Hardware class.  [default: all]")
@_overrides
@click.option("--revision", help="Branch, tag or commit, when MODEL is a hub id.")
@click.option("--text-only", is_flag=True, help="Leave the vision tower out.")
@click.option("--json", "as_json", is_flag=True, help="Print the predictions as JSON on stdout.")
@click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
def plan_command(
    model: str | None,
    profile_name: str | None,
    overrides: tuple[str, ...],
    revision: str | None,
    text_only: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Say what MODEL would take and give, from its config.json alone.

    MODEL is a checkpoint folder, a hub id, or a name like Qwen3.5-4B for a published text model; without it
    the family is compared. Without a profile all of them are. Exit code 2 if MODEL does not fit the profile.
    """
    with reported(debug):
        if overrides and not profile_name:
            raise UserError("--set changes one profile: say which with --profile")
        chosen = [load_profile(profile_name, overrides)] if profile_name else shipped_profiles()
        models = [configured(model, revision, text_only)] if model else list(family().values())
        one = bool(model and profile_name)
        found = compare(models, chosen)
        if as_json:
            rows = [row.as_json() for row in found]
            click.echo(json.dumps(rows[0] if one else rows, indent=2))
        else:
            many = not (model or profile_name)
            table = fit_table(found[0]) if one else matrix_table(found) if many else compare_table(found)
            Console(file=sys.stdout).print(table)
        if one:
            require_fit(models[0], chosen[0])


@main.command("inspect")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print what is found as JSON on stdout.")
@click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
def inspect_command(artifact: Path, as_json: bool, debug: bool) -> None:
    """Say what is in ARTIFACT and which providers or devices can run it, from its own files."""
    with reported(debug):
        found = inspect(artifact)
        if as_json:
            click.echo(json.dumps(found, indent=2))
        else:
            Console(file=sys.stdout).print(*inspection_tables(found))


_BUNDLE_EPILOG = """\b
Examples:
  qwen-export keygen kiosk.key
  qwen-export bundle artifacts/Qwen3.5-0.8B-cpu --key kiosk.key --platform win_amd64 -o kiosk.zip
"""


@main.command(epilog=_BUNDLE_EPILOG)
@click.argument("artifact", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--platform", required=True, type=click.Choice(PLATFORMS), help="The device's platform.")
@click.option(
    "--python",
    default=f"{sys.version_info.major}.{sys.version_info.minor}",
    show_default=True,
    metavar="X.Y",
    help="Version of CPython on the device.",
)
@click.option("--key", required=True, type=click.Path(path_type=Path), help="Private key that signs it.")
@click.option("--version", help="Numbers with dots.  [default: the date and time]")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder, or file ending in .zip."
)
@click.option("--json", "as_json", is_flag=True, help="Print the list of contents as JSON on stdout.")
@click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
def bundle(
    artifact: Path,
    platform: str,
    python: str,
    key: Path,
    version: str | None,
    output: Path,
    as_json: bool,
    debug: bool,
) -> None:
    """Pack ARTIFACT with everything that a device without a network needs. Needs: 'qwen-edge[bundle]'."""
    with reported(debug):
        try:
            from qwen_export.bundle.assemble import bundle as assemble
        except ModuleNotFoundError as error:
            raise UserError(f"{error.name} is not installed: pip install 'qwen-edge[bundle]'") from error
        version = version or datetime.now(UTC).strftime("%Y.%m.%d.%H%M%S")
        console = Console(stderr=True)
        contents = assemble(artifact, output, platform, python, version, key, console.print)
        if as_json:
            click.echo(json.dumps({"output": str(output), **contents}, indent=2))
        else:
            click.echo(f"{output}: version {version}, {len(contents['files'])} files")


@main.command()
@click.argument("private_key", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
def keygen(private_key: Path, debug: bool) -> None:
    """Make a key pair that signs bundles: PRIVATE_KEY, to be kept secret, and its .pub for the devices."""
    with reported(debug):
        try:
            from qwen_export.bundle.keys import make_keys
        except ModuleNotFoundError as error:
            raise UserError(f"{error.name} is not installed: pip install 'qwen-edge[bundle]'") from error
        click.echo(f"{private_key} signs bundles: keep it secret. Devices get {make_keys(private_key)}")
