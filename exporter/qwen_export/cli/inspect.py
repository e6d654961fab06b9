"""`qwen-export inspect`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from qwen_export.cli.shared import debug_option, reporting


@click.command("inspect")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print what is found as JSON on stdout.")
@debug_option
def inspect(artifact: Path, as_json: bool, debug: bool) -> None:
    """Say what is in ARTIFACT and which providers or devices can run it, from its own files."""
    with reporting(debug):
        from rich.console import Console

        from qwen_export.cli.tables import inspection_tables
        from qwen_export.inspection import inspect as look_into

        found = look_into(artifact)
        if as_json:
            click.echo(json.dumps(found, indent=2))
        else:
            Console(file=sys.stdout).print(*inspection_tables(found))
