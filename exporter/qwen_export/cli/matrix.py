"""`qwen-export matrix`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
from qwen_common.errors import BELOW_THE_BAR, INTERNAL_ERROR, USER_ERROR

from qwen_export.cli.shared import debug_option, progress_option, reporting

if TYPE_CHECKING:
    from qwen_export.matrix.plan import Planned
    from qwen_export.matrix.run import Outcome
    from qwen_export.progress import Progress

_EPILOG = """\b
Examples:
  qwen-export matrix release.toml --dry-run
  qwen-export matrix release.toml
  qwen-export matrix release.toml --json --no-progress > done.json
  qwen-export matrix /shared/release.toml --ray auto

\b
release.toml:
  profiles = ["intel-n100", "laptop-16gb", "strix-halo"]
  push = "my-org/{name}-{profile}"
  [[release]]
  checkpoints = ["Qwen/Qwen3.5-2B", "Qwen/Qwen3.5-4B"]
  [[release]]
  name = "kiosk-4B"
  checkpoints = ["Qwen/Qwen3.5-4B"]
  adapters = ["adapters/kiosk"]
"""


@click.command("matrix", epilog=_EPILOG)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--dry-run", is_flag=True, help="Say what would be made and why, and change nothing.")
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="Work on the machines of a Ray cluster: auto for the one of this machine, or HOST:PORT of its head. "
    "All paths must be on a folder that every machine has.",
)
@click.option(
    "--cpus",
    type=click.IntRange(min=1),
    help="With --ray: cores that a checkpoint's exports ask for.  [default: all of the smallest machine]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the plan, or what was done, as JSON on stdout.")
@progress_option
@debug_option
def matrix(
    file: Path, dry_run: bool, ray: str | None, cpus: int | None, as_json: bool, progress: bool, debug: bool
) -> None:
    """Export, verify and push what has changed of a release: FILE names checkpoints, adapters and profiles.

    Everything is looked at before anything is made. An artifact that is whole and was made from the same
    checkpoint, adapters and profile by this version is left alone. Exports of one checkpoint go in step, so
    that each tensor is read, or fetched, once. One that fails does not stop the others; run the same command
    again to go on.

    Exit code 2 or 1 if something failed, else 3 if an artifact is below its profile's quality bar.
    """
    with reporting(debug):
        from qwen_common.errors import UserError

        from qwen_export.cli.console import PlainConsole
        from qwen_export.cli.tables import outcome_table, release_table
        from qwen_export.matrix.combinations import combinations
        from qwen_export.matrix.file import read_release
        from qwen_export.matrix.plan import plan

        if cpus is not None and ray is None:
            raise UserError("--cpus is for --ray: leave it off")
        if ray is not None:
            from qwen_export.matrix.cluster import import_ray

            import_ray(ray)
        groups = plan(combinations(read_release(file), file.absolute().parent))
        console = PlainConsole()
        if dry_run:
            planned = [one for group in groups for one in group]
            if as_json:
                click.echo(json.dumps([one.as_json() for one in planned], indent=2))
            else:
                console.print(release_table(planned))
            return
        outcomes: list[Outcome] = []
        try:
            for done in _done(groups, ray, cpus, progress and not as_json):
                outcomes += done
        finally:
            if as_json:
                click.echo(json.dumps([outcome.as_json() for outcome in outcomes], indent=2))
            elif outcomes:
                console.print(outcome_table(outcomes))
                for outcome in outcomes:
                    if outcome.error is not None:
                        click.echo(f"{outcome.planned.combination.label}: {outcome.error}", err=True)
        _end_with(outcomes)


def _done(
    groups: Sequence[Sequence[Planned]], ray: str | None, cpus: int | None, progress: bool
) -> Iterator[list[Outcome]]:
    """Each group's outcomes, as soon as they are there."""
    if ray is None:
        from qwen_export.matrix.run import run

        yield from (run(group, lambda title, of_bytes: _bar(progress, title, of_bytes)) for group in groups)
    else:
        from qwen_export.matrix.cluster import run_on_cluster

        yield from run_on_cluster(groups, ray, cpus)


@contextmanager
def _bar(show: bool, title: str, of_bytes: bool) -> Iterator[Progress]:
    from qwen_export.cli.progress import BYTES, STEPS, progress_bar

    with progress_bar(show, title, BYTES if of_bytes else STEPS) as shown:
        yield shown


def _end_with(outcomes: Sequence[Outcome]) -> None:
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if failed:
        sys.exit(USER_ERROR if all(outcome.mendable for outcome in failed) else INTERNAL_ERROR)
    if any(outcome.passed is False for outcome in outcomes):
        sys.exit(BELOW_THE_BAR)
