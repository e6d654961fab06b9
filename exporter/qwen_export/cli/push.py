"""`qwen-export push`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from qwen_export.cli.shared import debug_option, reporting

_EPILOG = """\b
Examples:
  qwen-export push artifacts/Qwen3.5-4B-strix-halo my-org/Qwen3.5-4B-strix-halo --dry-run
  qwen-export push artifacts/Qwen3.5-4B-strix-halo my-org/Qwen3.5-4B-strix-halo
  hf download my-org/Qwen3.5-4B-strix-halo --local-dir model && qwen-run model "Hello"
"""


@click.command(epilog=_EPILOG)
@click.argument("artifact", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("repository", metavar="ORG/NAME")
@click.option("--public", is_flag=True, help="A repository that is made here can be read by everybody.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and change nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON on stdout.")
@debug_option
def push(artifact: Path, repository: str, public: bool, dry_run: bool, as_json: bool, debug: bool) -> None:
    """Put ARTIFACT into the repository ORG/NAME on the Hugging Face hub; a new one is private.

    Every file is compared with the manifest first. The repository has nothing but the artifact afterwards;
    one that has other files is left alone. A push that was stopped goes on when the same command is run
    again.
    """
    with reporting(debug):
        from qwen_export.push import plan
        from qwen_export.push import push as put

        planned = plan(artifact, repository)
        commit = None if dry_run else put(artifact, planned, public)
        if as_json:
            done = {"repository": repository, "new": not planned.exists, "commit": commit}
            click.echo(
                json.dumps({**done, "files": planned.files, "removed": list(planned.removed)}, indent=2)
            )
            return
        for name, size in planned.files.items() if dry_run else ():
            click.echo(f"{size:>15,} {name}")
        for name in planned.removed if dry_run else ():
            click.echo(f"{'removed':>15} {name}")
        what = "" if planned.exists else f"a new {'public' if public else 'private'} repository, "
        total = f"{len(planned.files)} files, {sum(planned.files.values()) / 1e9:.2f} GB"
        click.echo(f"{repository}: {what}{total}" + (", not pushed" if dry_run else f", commit {commit}"))
