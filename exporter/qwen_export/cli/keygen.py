"""`qwen-export keygen`."""

from __future__ import annotations

from pathlib import Path

import click

from qwen_export.cli.shared import debug_option, reporting


@click.command()
@click.argument("private_key", type=click.Path(path_type=Path, dir_okay=False))
@debug_option
def keygen(private_key: Path, debug: bool) -> None:
    """Make a key pair that signs bundles: PRIVATE_KEY, to be kept secret, and its .pub for the devices."""
    with reporting(debug, extra="bundle"):
        from qwen_export.bundle.keys import make_keys

        click.echo(f"{private_key} signs bundles: keep it secret. Devices get {make_keys(private_key)}")
