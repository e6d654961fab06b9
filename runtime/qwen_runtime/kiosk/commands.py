"""The commands of `qwen-run` that a kiosk needs: verify, install, update, rollback, kiosk, self-test."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from qwen_common.errors import UserError, reported

_KEY = click.option(
    "--key", type=click.Path(path_type=Path, dir_okay=False), help="Public key that signed the bundle."
)
_TARGET = click.argument("target", type=click.Path(path_type=Path, file_okay=False), envvar="QWEN_EDGE_KIOSK")
_VERIFY_EPILOG = """\b
Examples:
  qwen-run verify /media/usb/bundle --key vendor.pub
  qwen-run verify /opt/kiosk --full
"""
_INSTALL_EPILOG = """\b
Example:
  qwen-run install /media/usb/bundle /opt/kiosk --key vendor.pub
"""
_UPDATE_EPILOG = """\b
Examples, by the qwen-run of an installed kiosk, which knows its folder:
  /opt/kiosk/qwen-run update /media/usb/bundle
  /opt/kiosk/qwen-run update --from https://updates.example/kiosks --ring early --json
"""
_ROLLBACK_EPILOG = """\b
Example:
  qwen-run rollback /opt/kiosk
"""
_KIOSK_EPILOG = """\b
Example:
  qwen-run kiosk /opt/kiosk --port 8000 --kiosk
"""
_DEBUG = click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
_OLDER = click.option("--older", is_flag=True, help="Allow a version older than the one in use.")


def _need_extra() -> None:
    try:
        import filelock  # noqa: F401
        import packaging  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'qwen-edge[kiosk]'") from error


def _note(text: str) -> None:
    click.echo(text, err=True)


def _end_tidily() -> None:
    """SIGTERM ends a command as Ctrl-C does, so that what it was making is removed."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)


@click.command(epilog=_VERIFY_EPILOG)
@click.argument(
    "path", type=click.Path(path_type=Path, exists=True, file_okay=False), envvar="QWEN_EDGE_KIOSK"
)
@_KEY
@click.option(
    "--full", is_flag=True, help="Hash every file of an installation, not only those that look changed."
)
@_DEBUG
def verify(path: Path, key: Path | None, full: bool, debug: bool) -> None:
    """Check the bundle or the installation in PATH against its signature.

    A bundle's files are all hashed. Of an installation, those are whose size, times or place on the disk are
    other ones than when they were last hashed; with --full every one.
    """
    with reported(debug):
        from qwen_launcher.bundle import CONTENTS, Bundle
        from qwen_launcher.command import verify as verify_installed
        from qwen_launcher.installed import Installed

        if not (path / CONTENTS).exists():
            verify_installed(Installed(path), full)
            return
        if key is None:
            raise UserError("give the public key with --key")
        bundle = Bundle.open(path, key)
        bundle.check()
        version, count = bundle.contents["version"], len(bundle.contents["files"])
        click.echo(f"version {version}: {count} files are as they were signed")


@click.command(epilog=_INSTALL_EPILOG)
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, file_okay=False))
@_TARGET
@_KEY
@_OLDER
@_DEBUG
def install(bundle: Path, target: Path, key: Path | None, older: bool, debug: bool) -> None:
    """Install the unpacked BUNDLE into TARGET, beside what is there, and use it if it works. No network."""
    with reported(debug):
        _need_extra()
        from qwen_runtime.kiosk.install import Installation

        _end_tidily()
        Installation(target).install(bundle, key, _note, older)


@click.command(epilog=_UPDATE_EPILOG)
@click.argument("bundle", required=False, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--from", "store", metavar="URL|FOLDER", help="Where qwen-export publish put versions.")
@click.option("--ring", default="all", show_default=True, help="Which devices this one is among.")
@click.option(
    "--target",
    required=True,
    envvar="QWEN_EDGE_KIOSK",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Where the kiosk is installed.",
)
@_KEY
@_OLDER
@click.option("--json", "as_json", is_flag=True, help="Print a report as JSON on stdout, also of a failure.")
@_DEBUG
def update(
    bundle: Path | None,
    store: str | None,
    ring: str,
    target: Path,
    key: Path | None,
    older: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Update a kiosk from the unpacked BUNDLE, or from a store. Nothing of it runs before it is checked.

    What did not change is taken from the version in use. From a store, an interrupted update goes on where it
    stopped when it is started again.
    """
    with reported(debug):
        _need_extra()
        from qwen_launcher.bundle import CONTENTS

        from qwen_runtime.kiosk.install import Installation
        from qwen_runtime.kiosk.sources import bundle_folder
        from qwen_runtime.kiosk.sources import store as open_store

        if (bundle is None) == (store is None):
            raise UserError("give a bundle's folder, or a store with --from")
        _end_tidily()
        installation = Installation(target)
        report: dict[str, Any] = {"target": str(installation.target), "ring": ring}
        try:
            if bundle is not None and not (bundle / CONTENTS).exists():
                raise UserError(f"{bundle} has no {CONTENTS}: give an unpacked bundle, or --from a store")
            source = open_store(store, ring) if store is not None else bundle_folder(bundle or Path())
            change = installation.install(source, key, _note, older)
            report |= {"ok": True, **asdict(change)}
        except BaseException as error:
            report |= {
                "ok": False,
                "version": _name(installation),
                "error": str(error) or type(error).__name__,
            }
            raise
        finally:
            installation.remember(installation.state / "update.json", report)
            if as_json:
                click.echo(json.dumps(report, indent=2))


def _name(installation: Any) -> str | None:
    return installation.current.name if installation.current else None


@click.command(epilog=_ROLLBACK_EPILOG)
@_TARGET
@_DEBUG
def rollback(target: Path, debug: bool) -> None:
    """Use the last good version in TARGET again."""
    with reported(debug):
        _need_extra()
        from qwen_runtime.kiosk.install import Installation

        Installation(target).roll_back(click.echo)


@click.command(context_settings={"ignore_unknown_options": True}, epilog=_KIOSK_EPILOG)
@_TARGET
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535))
@click.argument("serve_options", nargs=-1, type=click.UNPROCESSED)
@_DEBUG
def kiosk(target: Path, host: str, port: int, serve_options: tuple[str, ...], debug: bool) -> None:
    """Check the version in use in TARGET, serve it, and keep it running. Further options go to `serve`."""
    with reported(debug):
        from qwen_launcher.supervise import supervise

        supervise(target, host, port, serve_options)


@click.command("self-test", hidden=True)
@click.argument("release", type=click.Path(path_type=Path, exists=True, file_okay=False))
@_DEBUG
def self_test(release: Path, debug: bool) -> None:
    """Generate the bundle's recorded answer again."""
    with reported(debug):
        from qwen_common.files import read_json
        from qwen_launcher.bundle import CONTENTS
        from qwen_launcher.installed import Release

        from qwen_runtime.kiosk.self_test import run_self_test

        contents = read_json(release / CONTENTS, "install the bundle again")
        run_self_test(Release(release).artifact, contents["self_test"])


COMMANDS = (verify, install, update, rollback, kiosk, self_test)
