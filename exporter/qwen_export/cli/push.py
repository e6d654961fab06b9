"""`qwen-export push`."""

from __future__ import annotations

import json
from pathlib import Path

import click
from qwen_common.errors import UserError

from qwen_export.cli.shared import debug_option, reporting

_EPILOG = """\b
Examples:
  qwen-export push artifacts/Qwen3.5-4B-strix-halo my-org/Qwen3.5-4B-strix-halo --dry-run
  qwen-export push artifacts/Qwen3.5-4B-strix-halo my-org/Qwen3.5-4B-strix-halo
  hf download my-org/Qwen3.5-4B-strix-halo --local-dir model && qwen-run model "Hello"

\b
  qwen-export push artifacts/Qwen3.5-4B-strix-halo oci://registry.example/qwen3.5-4b:stable
  qwen-run pull oci://registry.example/qwen3.5-4b:stable model && qwen-run model "Hello"
"""


@click.command(epilog=_EPILOG)
@click.argument("artifact", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("repository", metavar="ORG/NAME|oci://HOST/NAME:TAG")
@click.option("--public", is_flag=True, help="A repository that is made on the hub can be read by everybody.")
@click.option("--plain-http", is_flag=True, help="To a registry without TLS; to this machine it always is.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and change nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON on stdout.")
@debug_option
def push(
    artifact: Path,
    repository: str,
    public: bool,
    plain_http: bool,
    dry_run: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Put ARTIFACT into the repository ORG/NAME on the Hugging Face hub, or into an OCI registry.

    Every file is compared with the manifest first. A push that was stopped goes on when the same command is
    run again.

    On the hub a new repository is private. It has nothing but the artifact afterwards; one that has other
    files is left alone.

    In a registry every file is a layer, and the tag is given when all are there. Prints the digest, by which
    `qwen-run pull` gets exactly this artifact. Logins are those of docker login, podman login and
    REGISTRY_AUTH_FILE.
    """
    with reporting(debug):
        if repository.startswith("oci://"):
            if public:
                raise UserError("--public is for the hub: a registry says itself who may read")
            _to_registry(artifact, repository, plain_http, dry_run, as_json)
            return
        if plain_http:
            raise UserError("--plain-http is for a registry: give oci://HOST/NAME:TAG")
        _to_hub(artifact, repository, public, dry_run, as_json)


def _to_hub(artifact: Path, repository: str, public: bool, dry_run: bool, as_json: bool) -> None:
    from qwen_export.push import plan, push

    planned = plan(artifact, repository)
    commit = None if dry_run else push(artifact, planned, public)
    if as_json:
        done = {"repository": repository, "new": not planned.exists, "commit": commit}
        click.echo(json.dumps({**done, "files": planned.files, "removed": list(planned.removed)}, indent=2))
        return
    for name, size in planned.files.items() if dry_run else ():
        click.echo(f"{size:>15,} {name}")
    for name in planned.removed if dry_run else ():
        click.echo(f"{'removed':>15} {name}")
    what = "" if planned.exists else f"a new {'public' if public else 'private'} repository, "
    total = f"{len(planned.files)} files, {sum(planned.files.values()) / 1e9:.2f} GB"
    click.echo(f"{repository}: {what}{total}" + (", not pushed" if dry_run else f", commit {commit}"))


def _to_registry(artifact: Path, name: str, plain_http: bool, dry_run: bool, as_json: bool) -> None:
    from qwen_export.registry_push import plan, push

    def note(line: str) -> None:
        click.echo(line, err=True)

    planned = plan(artifact, name, plain_http, note)
    reference = planned.registry.reference
    if not dry_run:
        push(artifact, planned, note)
    sizes = {name: entry["size"] for name, entry in sorted(planned.files.items())}
    if as_json:
        done = {"reference": str(reference), "digest": planned.digest, "pushed": not dry_run}
        click.echo(json.dumps({**done, "files": sizes, "sent": sorted(planned.missing)}, indent=2))
        return
    for file, size in sizes.items() if dry_run else ():
        click.echo(f"{size:>15,} {file}{'' if file in planned.missing else ', there already'}")
    sent = sum(sizes[file] for file in planned.missing)
    state = f"not pushed, {sent / 1e9:.2f} GB would be sent" if dry_run else f"{sent / 1e9:.2f} GB sent"
    click.echo(f"{reference}: {len(sizes)} files, {sum(sizes.values()) / 1e9:.2f} GB, {state}", err=True)
    click.echo(f"oci://{reference.repository}@{planned.digest}")
