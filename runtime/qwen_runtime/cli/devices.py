"""`qwen-run devices`: what this machine can run."""

from __future__ import annotations

import json

import click
from qwen_common.errors import reported

from qwen_runtime.cli.options import DEBUG, JSON

_EPILOG = """\b
Examples:
  qwen-run devices
  qwen-run devices --json | jq -r '.profiles[]'
"""


@click.command(epilog=_EPILOG)
@JSON
@DEBUG
def devices(as_json: bool, debug: bool) -> None:
    """Show what this machine has, which providers can use it, and which profiles are made for it."""
    with reported(debug):
        import dataclasses

        import onnxruntime_genai as og

        from qwen_runtime.devices import find_machine, fitting_profiles, providers

        machine = find_machine()
        usable, profiles = providers(machine, og), fitting_profiles(machine)
        if as_json:
            found = dataclasses.asdict(machine) | {"cpu_flags": sorted(machine.cpu_flags)}
            found |= {"providers": [dataclasses.asdict(item) for item in usable], "profiles": profiles}
            click.echo(json.dumps(found, indent=2))
            return
        click.echo(f"CPU       {machine.cpu}, {machine.memory_bytes / 1e9:.0f} GB of memory")
        for device in machine.devices:
            memory = f", {device.memory_bytes / 1e9:.0f} GB of its own" if device.memory_bytes else ""
            click.echo(f"{device.kind.upper():9} {device.name}{memory}")
        for item in usable:
            click.echo(f"{item.title:9} {'usable' if item.usable else item.advice}")
        click.echo(f"profiles  {', '.join(profiles) or 'none is made for this machine; cpu always works'}")
