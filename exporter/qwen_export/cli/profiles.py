"""`qwen-export profiles`."""

from __future__ import annotations

import json

import click

from qwen_export.cli.shared import debug_option, reporting


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON on stdout.")
@debug_option
def profiles(as_json: bool, debug: bool) -> None:
    """List the hardware classes that can be exported for."""
    with reporting(debug):
        from qwen_export.cli.console import PlainConsole
        from qwen_export.cli.tables import profiles_table
        from qwen_export.planner.predictions import shipped_profiles

        shipped = shipped_profiles()
        if as_json:
            click.echo(json.dumps([profile.model_dump() for profile in shipped], indent=2))
        else:
            PlainConsole().print(profiles_table(shipped))
