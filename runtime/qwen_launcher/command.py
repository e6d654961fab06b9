"""The launcher's command line: start, verify and install, and every command of the installed `qwen-run`.

    launcher.pyz start TARGET [--host ADDRESS] [--port NUMBER] [options of `qwen-run serve`]
    launcher.pyz verify TARGET [--full]
    launcher.pyz install BUNDLE TARGET --key KEY.pub
    launcher.pyz run TARGET COMMAND ...

Each checks the programs of a version before it runs any of them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

from qwen_common.errors import UserError, reported
from qwen_common.files import sha256

from qwen_launcher import orphan
from qwen_launcher.bundle import SITE, Bundle
from qwen_launcher.installed import Installed, Release
from qwen_launcher.program import command, environment
from qwen_launcher.supervise import supervise

_SCRIPTS = ("launcher.pyz", "start.sh", "start.ps1", "qwen-run", "qwen-run.ps1", "qwen-edge.service")


def main() -> None:
    parser = argparse.ArgumentParser(prog="launcher.pyz", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser(
        "start", allow_abbrev=False, help="serve the version in use and keep it running"
    )
    start.add_argument("target", type=Path)
    start.add_argument("--host", default="127.0.0.1")
    start.add_argument("--port", default=8000, type=int, choices=range(1, 65536), metavar="1..65535")
    check = commands.add_parser("verify", help="compare an installation with its signature")
    check.add_argument("target", type=Path)
    check.add_argument("--full", action="store_true", help="read every byte")
    first = commands.add_parser("install", help="install a bundle for the first time")
    first.add_argument("bundle", type=Path)
    first.add_argument("target", type=Path)
    first.add_argument("--key", type=Path, required=True, help="public key that signed the bundle")
    run = commands.add_parser("run", help="run a command of the installed qwen-run", add_help=False)
    run.add_argument("target", type=Path)
    run.add_argument("arguments", nargs="*")
    if sys.argv[1:2] == ["run"] and len(sys.argv) > 2:  # whatever follows is for qwen-run
        with reported(debug=False):
            run_installed(Installed(Path(sys.argv[2])), sys.argv[3:])
    options, further = parser.parse_known_args()
    if further and options.command != "start":
        parser.error(f"unknown options: {' '.join(further)}")
    with reported(debug=False):
        match options.command:
            case "start":
                supervise(options.target, options.host, options.port, further)
            case "verify":
                verify(Installed(options.target), options.full)
            case _:
                install(options.bundle, options.target, options.key)


def verify(installed: Installed, full: bool) -> None:
    """Print what the version in use is.

    Raises:
        UserError: a file of it, or the launcher beside it, is not as it was signed.
    """
    release = installed.current
    if release is None:
        raise UserError(f"{installed.target} has no version in use: install a bundle there")
    bundle = installed.check(release, full, _Progress("checking").add if full else None)
    check_scripts(installed)
    print(f"version {release.name}: {len(bundle.contents['files'])} files are as they were signed")
    if (served := orphan.serving(installed)) not in (None, release.name):
        raise UserError(
            f"version {served} is served instead of {release.name}: see {installed.target / 'logs'}"
        )


def check_scripts(installed: Installed) -> None:
    """Compare the launcher and the scripts with the versions that they may be from.

    Raises:
        UserError: one is from none of them.
    """
    signed: dict[str, set[str]] = {}
    for release in installed.candidates():
        try:
            files = installed.open(release).contents["files"]
        except (UserError, OSError):
            continue
        for name in _SCRIPTS:
            if name in files:
                signed.setdefault(name, set()).add(files[name]["sha256"])
    for name, digests in signed.items():
        path = installed.target / name
        if not path.is_file() or sha256(path) not in digests:
            raise UserError(f"{path} is missing or changed: install a bundle again")


def install(folder: Path, target: Path, key: Path) -> None:
    """Install with the bundle's own programs, which are checked first; the device has none yet."""
    started = time.monotonic()
    bundle = Bundle.open(folder, key)
    bundle.check_fit()
    bundle.check(within=f"{SITE}/", note=_Progress("checking the bundle's programs").add)
    print(f"checked in {time.monotonic() - started:.0f} s", file=sys.stderr)
    _run(
        Release(Path(os.path.abspath(folder))), ["install", str(folder), str(target), "--key", str(key)], None
    )


def run_installed(installed: Installed, arguments: list[str]) -> NoReturn:
    """Run a command of the best version that is whole.

    Raises:
        UserError: none is.
    """
    message = f"nothing is installed in {installed.target}: install a bundle there"
    for release in installed.candidates():
        try:
            installed.check(release)
        except UserError as error:
            message = str(error)
            print(f"version {release.name} is left out: {error}", file=sys.stderr)
            continue
        _run(release, arguments, installed.target)
    raise UserError(message)


def _run(release: Release, arguments: list[str], target: Path | None) -> NoReturn:
    line, variables = command(release, *arguments), environment(target=target)
    if os.name == "posix":  # signals and the exit code are the program's own
        os.execve(line[0], line, variables)
    process = subprocess.Popen(line, env=variables)
    while True:
        try:
            sys.exit(process.wait())
        except KeyboardInterrupt:  # the terminal has told the program too
            continue


class _Progress:
    """A line on standard error that counts gigabytes; nothing where no one looks."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._bytes = 0
        self._said = 0.0

    def add(self, count: int) -> None:
        self._bytes += count
        if sys.stderr.isatty() and time.monotonic() - self._said > 0.2:
            self._said = time.monotonic()
            print(f"\r{self._what}: {self._bytes / 1e9:.2f} GB", end="", file=sys.stderr, flush=True)
