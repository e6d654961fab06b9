"""`qwen-export publish`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from qwen_export.cli.shared import debug_option, reporting

_EPILOG = """\b
Examples:
  qwen-export publish kiosk-1.2 /srv/kiosks --key kiosk.pub --ring early
  qwen-export publish kiosk-1.2 /srv/kiosks --key kiosk.pub --ring early --ring all
"""


@click.command(epilog=_EPILOG)
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("store", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--key", required=True, type=click.Path(path_type=Path, dir_okay=False), help="Public key that signed it."
)
@click.option("--ring", "rings", multiple=True, help="Devices that take it; 'all': those without a ring.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON on stdout.")
@debug_option
def publish(bundle: Path, store: Path, key: Path, rings: tuple[str, ...], as_json: bool, debug: bool) -> None:
    """Put the unpacked BUNDLE into STORE, a folder that devices update from, also through a web server."""
    with reporting(debug, extra="bundle"):
        from qwen_export.bundle.publish import publish as put

        done = put(bundle, store, key, rings, lambda text: click.echo(text, err=True))
        if as_json:
            click.echo(json.dumps(asdict(done), indent=2))
        else:
            taken = ", ".join(f"{ring}: {version}" for ring, version in sorted(done.rings.items()))
            click.echo(f"version {done.version}: {done.new / 1e9:.2f} GB new; {taken or 'no ring takes it'}")
