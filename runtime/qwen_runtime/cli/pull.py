"""`qwen-run pull`: an artifact from an OCI registry."""

from __future__ import annotations

import json
from pathlib import Path

import click
from qwen_common.errors import reported

from qwen_runtime.cli.options import DEBUG, JSON

_EPILOG = """\b
Examples:
  qwen-run pull oci://registry.example/models/qwen3.5-4b:stable model
  qwen-run pull oci://registry.example/models/qwen3.5-4b@sha256:1f0e... model --json
  qwen-run pull oci://registry.example/models/qwen3.5-4b:stable model --force
  qwen-run pull oci://localhost:5000/qwen3.5-4b:1 model && qwen-run model "Hello"
"""


@click.command(epilog=_EPILOG)
@click.argument("reference", metavar="oci://HOST/NAME[:TAG][@DIGEST]")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--force", is_flag=True, help="Replace another artifact; what is the same is not fetched again."
)
@click.option("--verify", is_flag=True, help="Compare every file of a FOLDER that is there already.")
@click.option("--plain-http", is_flag=True, help="Without TLS; to this machine it always is.")
@JSON
@DEBUG
def pull(
    reference: str,
    folder: Path,
    force: bool,
    verify: bool,
    plain_http: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Make FOLDER from an artifact that `qwen-export push` put into an OCI registry.

    FOLDER appears when it is whole and every file is as it was pushed. One that has something else is left
    alone, unless it is an artifact and --force is given. A pull that was stopped goes on when the same
    command is run again. Prints the digest, by which other machines get exactly the same.

    Logins are those of docker login, podman login and REGISTRY_AUTH_FILE.
    """
    with reported(debug):
        from qwen_runtime.registry.pull import pull as fetch
        from qwen_runtime.registry.reference import Reference

        named = Reference.parse(reference)
        done = fetch(
            named, folder, lambda line: click.echo(line, err=True), plain_http, force=force, verify=verify
        )
        if as_json:
            told = {"reference": reference, "digest": done.digest, "folder": str(folder), "new": done.new}
            sizes = {name: entry["size"] for name, entry in done.files.items()}
            click.echo(json.dumps({**told, "fetched": done.fetched, "files": sizes}, indent=2))
            return
        state = f"{done.fetched / 1e9:.2f} GB came" if done.new else "is the same already"
        click.echo(f"{folder}: {len(done.files)} files, {state}", err=True)
        click.echo(f"oci://{named.repository}@{done.digest}")
