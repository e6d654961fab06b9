"""The group of commands."""

from __future__ import annotations

import io
import sys

import click
from click_default_group import DefaultGroup
from qwen_common.version import DISTRIBUTION

from qwen_export.cli.adapter import adapter
from qwen_export.cli.bundle import bundle
from qwen_export.cli.catalog import catalog
from qwen_export.cli.export import EPILOG, export
from qwen_export.cli.inspect import inspect
from qwen_export.cli.keygen import keygen
from qwen_export.cli.matrix import matrix
from qwen_export.cli.plan import plan
from qwen_export.cli.profiles import profiles
from qwen_export.cli.publish import publish
from qwen_export.cli.push import push
from qwen_export.cli.verify import verify


@click.group(cls=DefaultGroup, default="export", epilog=EPILOG)
@click.version_option(package_name=DISTRIBUTION)
def main() -> None:
    """Turn a Qwen3.5 checkpoint into an artifact for one class of hardware.

    Without the name of a command: export.

    Exit codes: 0 done, 2 a mistake that you can mend, 3 an artifact below its profile's quality bar, 1 a
    mistake of ours, 130 interrupted.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # as a pipe on Windows, not in UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")


_COMMANDS = export, verify, adapter, profiles, plan, inspect, bundle, catalog, keygen, publish, push, matrix
for command in _COMMANDS:
    main.add_command(command)
