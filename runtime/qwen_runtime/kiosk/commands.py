"""The commands of `qwen-run` that a kiosk needs: verify, install, rollback, kiosk, self-test."""

from __future__ import annotations

from pathlib import Path

import click
from qwen_common.errors import UserError, reported

_KEY = click.option(
    "--key", type=click.Path(path_type=Path, dir_okay=False), help="Public key that signed the bundle."
)
_TARGET = click.argument("target", type=click.Path(path_type=Path, file_okay=False))
_VERIFY_EPILOG = """\b
Examples:
  qwen-run verify /media/usb/bundle --key vendor.pub
  qwen-run verify /opt/kiosk --full
"""
_INSTALL_EPILOG = """\b
Example:
  qwen-run install /media/usb/bundle /opt/kiosk --key vendor.pub
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


def _need_extra() -> None:
    try:
        import cryptography  # noqa: F401
        import filelock  # noqa: F401
        import packaging  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'qwen-edge[kiosk]'") from error


@click.command(epilog=_VERIFY_EPILOG)
@click.argument("path", type=click.Path(path_type=Path, exists=True, file_okay=False))
@_KEY
@click.option(
    "--full", is_flag=True, help="Hash every file of an installation, not only those that look changed."
)
@_DEBUG
def verify(path: Path, key: Path | None, full: bool, debug: bool) -> None:
    """Check the bundle or the installation in PATH against its signature.

    A bundle's files are all hashed. Of an installation, size and time are compared, which takes a moment;
    with --full every byte.
    """
    with reported(debug):
        _need_extra()
        from qwen_runtime.kiosk.bundle import CONTENTS, Bundle
        from qwen_runtime.kiosk.install import Installation

        if (path / CONTENTS).exists():
            if key is None:
                raise UserError("give the public key with --key")
            bundle = Bundle.open(path, key)
            bundle.check()
            version, count = bundle.contents["version"], len(bundle.contents["files"])
            click.echo(f"version {version}: {count} files are as they were signed")
            return
        installation = Installation(path)
        release = installation.current
        if release is None:
            raise UserError(f"{path} is neither a bundle nor an installation: install a bundle there")
        release.check(key or installation.key, full)
        click.echo(f"version {release.root.name} is as it was installed")


@click.command(epilog=_INSTALL_EPILOG)
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, file_okay=False))
@_TARGET
@_KEY
@click.option("--older", is_flag=True, help="Allow a version older than the one in use.")
@_DEBUG
def install(bundle: Path, target: Path, key: Path | None, older: bool, debug: bool) -> None:
    """Install the unpacked BUNDLE into TARGET, beside what is there, and use it if it works. No network."""
    with reported(debug):
        _need_extra()
        from qwen_runtime.kiosk.install import Installation

        Installation(target).install(bundle, key, lambda text: click.echo(text, err=True), older)


@click.command(epilog=_ROLLBACK_EPILOG)
@_TARGET
@_DEBUG
def rollback(target: Path, debug: bool) -> None:
    """Use the last good version in TARGET again."""
    with reported(debug):
        _need_extra()
        from qwen_runtime.kiosk.install import Installation

        click.echo(f"version {Installation(target).roll_back().root.name} is in use")


@click.command(context_settings={"ignore_unknown_options": True}, epilog=_KIOSK_EPILOG)
@_TARGET
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535))
@click.argument("serve_options", nargs=-1, type=click.UNPROCESSED)
@_DEBUG
def kiosk(target: Path, host: str, port: int, serve_options: tuple[str, ...], debug: bool) -> None:
    """Check the version in use in TARGET, serve it, and keep it running. Further options go to `serve`."""
    with reported(debug):
        _need_extra()
        from qwen_runtime.kiosk.supervise import supervise

        supervise(target, host, port, serve_options)


@click.command("self-test", hidden=True)
@click.argument("release", type=click.Path(path_type=Path, exists=True, file_okay=False))
@_DEBUG
def self_test(release: Path, debug: bool) -> None:
    """Generate the bundle's recorded answer again."""
    with reported(debug):
        from qwen_common.files import read_json

        from qwen_runtime.kiosk.bundle import CONTENTS
        from qwen_runtime.kiosk.install import Release
        from qwen_runtime.kiosk.self_test import run_self_test

        made = Release(release)
        contents = read_json(made.bundle / CONTENTS, "install the bundle again")
        run_self_test(made.artifact, contents["self_test"])


COMMANDS = (verify, install, rollback, kiosk, self_test)
