"""`qwen-export bundle`."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

import click

from qwen_export.bundle.platforms import PLATFORMS
from qwen_export.cli.shared import debug_option, reporting

_EPILOG = """\b
Examples:
  qwen-export keygen kiosk.key
  qwen-export bundle artifacts/Qwen3.5-0.8B-cpu --key kiosk.key --platform win_amd64 -o kiosk.zip
"""


@click.command(epilog=_EPILOG)
@click.argument("artifact", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--platform", required=True, type=click.Choice(PLATFORMS), help="The device's platform.")
@click.option(
    "--python",
    default=f"{sys.version_info.major}.{sys.version_info.minor}",
    show_default=True,
    metavar="X.Y",
    help="Version of CPython on the device.",
)
@click.option("--key", required=True, type=click.Path(path_type=Path), help="Private key that signs it.")
@click.option("--version", help="Numbers with dots.  [default: the date and time]")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder, or file ending in .zip."
)
@click.option("--carry-python", is_flag=True, help="Bring CPython along (win_amd64): the device needs none.")
@click.option(
    "--carry-msvc",
    is_flag=True,
    help="Bring Microsoft's Visual C++ runtime along (Windows). Needs a licence of Visual Studio.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the list of contents as JSON on stdout.")
@debug_option
def bundle(
    artifact: Path,
    platform: str,
    python: str,
    key: Path,
    version: str | None,
    output: Path,
    carry_python: bool,
    carry_msvc: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Pack ARTIFACT with everything that a device without a network needs. Needs: 'qwen-edge[bundle]'."""
    with reporting(debug, extra="bundle"):
        from qwen_export.bundle.assemble import Device, default_version
        from qwen_export.bundle.assemble import bundle as assemble
        from qwen_export.cli.console import PlainConsole

        version = version or default_version(datetime.now(UTC))
        console = PlainConsole(stderr=True)
        device = Device(platform, python, carry_python, carry_msvc)
        contents = assemble(artifact, output, device, version, key, console.print)
        if as_json:
            click.echo(json.dumps({"output": str(output), **contents}, indent=2))
        else:
            click.echo(f"{output}: version {version}, {len(contents['files'])} files")
            click.echo("Keep these beside the public key; sha256sum -c compares them before a first install:")
            for name in ("launcher.pyz", "install.sh", "install.ps1"):
                if entry := contents["files"].get(name):
                    click.echo(f"{entry['sha256']}  {name}")
