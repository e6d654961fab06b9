"""`qwen-run devices`: what this machine can run."""

from __future__ import annotations

import json

import click
from qwen_common.errors import reported
from qwen_common.providers import PROVIDERS

from qwen_runtime.cli.options import DEBUG, JSON

_EPILOG = """\b
Examples:
  qwen-run devices
  qwen-run devices --json | jq -r '.profiles[]'
  qwen-run devices --get nvtensorrtrtx
"""


@click.command(epilog=_EPILOG)
@click.option(
    "--get",
    "wanted",
    type=click.Choice([key for key, provider in PROVIDERS.items() if provider.in_catalogue]),
    help="First have Windows download this provider, for all programs of this machine.",
)
@JSON
@DEBUG
def devices(wanted: str | None, as_json: bool, debug: bool) -> None:
    """Show what this machine has, which providers can use it, and which profiles are made for it."""
    with reported(debug):
        import dataclasses

        import onnxruntime_genai as og

        from qwen_runtime import windows_ml
        from qwen_runtime.devices import find_machine, fitting_profiles, providers

        if wanted is not None:
            provider = PROVIDERS[wanted]
            click.echo(f"Windows is asked for {provider.title}", err=True)
            windows_ml.download(
                provider, lambda percent: click.echo(f"\r{percent:3.0f}%", err=True, nl=False)
            )
            click.echo("\rdone", err=True)
        machine, offered = find_machine(), windows_ml.system_providers()
        usable, profiles = providers(machine, og), fitting_profiles(machine)
        if as_json:
            found = dataclasses.asdict(machine) | {"cpu_flags": sorted(machine.cpu_flags)}
            found |= {"providers": [dataclasses.asdict(item) for item in usable], "profiles": profiles}
            found["windows_ml"] = [dataclasses.asdict(item) for item in offered]
            click.echo(json.dumps(found, indent=2))
            return
        click.echo(f"CPU           {machine.cpu}, {machine.memory_bytes / 1e9:.0f} GB of memory")
        for device in machine.devices:
            memory = f", {device.memory_bytes / 1e9:.0f} GB of its own" if device.memory_bytes else ""
            click.echo(f"{device.kind.upper():13} {device.name}{memory}")
        for adapter in machine.adapters:
            kind = "software, computes on the CPU" if adapter.software else "hardware"
            float16 = {True: ", float16", False: ", no float16", None: ""}[adapter.float16]
            click.echo(f"adapter       {adapter.name}: {kind}{float16} (says {adapter.source})")
        for item in usable:
            state = f"usable{item.note and '; '}{item.note}" if item.usable else item.advice
            click.echo(f"{item.title:13} {state}")
        for entry in offered:
            click.echo(f"Windows ML    offers {entry.name} {entry.version}: {entry.state}")
        click.echo(
            f"profiles      {', '.join(profiles) or 'none is made for this machine; cpu always works'}"
        )
