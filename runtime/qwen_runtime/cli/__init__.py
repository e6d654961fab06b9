"""The command `qwen-run`: a module for each of its commands, and those of a kiosk."""

from __future__ import annotations

import click
from click_default_group import DefaultGroup
from qwen_common.version import DISTRIBUTION

from qwen_runtime.cli.answer import EPILOG, answer
from qwen_runtime.cli.bench import bench
from qwen_runtime.cli.devices import devices
from qwen_runtime.cli.pull import pull
from qwen_runtime.cli.serve import serve
from qwen_runtime.kiosk.commands import COMMANDS as KIOSK_COMMANDS


@click.group(cls=DefaultGroup, default="answer", epilog=EPILOG)
@click.version_option(package_name=DISTRIBUTION)
def main() -> None:
    """Run an artifact that qwen-export made.

    Without the name of a command: answer.

    Exit codes: 0 done, 2 a mistake that you can mend, 1 a mistake of ours, 130 interrupted.
    """


for _command in (answer, bench, devices, pull, serve, *KIOSK_COMMANDS):
    main.add_command(_command)
