"""The first install by its script: who may write what afterwards; bundles for other machines."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

import pytest
from qwen_common.errors import UserError
from qwen_launcher.bundle import Bundle
from qwen_runtime.kiosk.install import Installation, beside

from tests.exporter.bundle.test_scripts import written
from tests.support.small_kiosk import new_key, resealed, small_bundle

pytestmark = pytest.mark.skipif(
    os.name == "nt" or not shutil.which(f"python{sys.version_info.major}.{sys.version_info.minor}"),
    reason="sh, and this Python by its name",
)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return new_key(tmp_path)


TOLD = ("useradd", "chown", "systemctl")  # as where systemd runs, and this machine's users stay as they are
# The small bundle's program installs nothing, so this one does.
INSTALLS = """
import os, sys
if sys.argv[1:2] == ["install"]:
    line = [sys.executable, "-c", "from qwen_runtime.cli import main; main()", *sys.argv[1:]]
    os.execve(sys.executable, line, {{"PYTHONPATH": {path!r}}})
"""


def installing(folder: Path, key: Path) -> Path:
    """A small bundle whose program is this one where it is told to install."""
    made = small_bundle(folder.with_name("made"), key, "1.0")
    path = os.pathsep.join(sys.path)
    library = made / "site" / "library.py"
    library.write_text(INSTALLS.format(path=path) + library.read_text())
    return resealed(made, folder, key)


def install(
    bundle: Path, key: Path, target: str | Path, before: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """As somebody does whose files are everybody's."""
    script = 'umask 0; exec "$@"'
    arguments = [str(bundle / "install.sh"), str(key.with_suffix(".pub")), str(target)]
    told = bundle.with_name("told")
    told.mkdir()
    for name in TOLD:
        (told / name).write_text(f'#!/bin/sh\necho {name} "$@" >> "{told}/calls"\n')
        (told / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{told}:{os.environ['PATH']}"}
    return subprocess.run(
        ["sh", "-c", script, "sh", *before, "sh", *arguments], capture_output=True, text=True, env=environment
    )


def test_nobody_else_writes_what_runs(key: Path, tmp_path: Path) -> None:
    """A stick's file system gives every file to everybody."""
    bundle = installing(tmp_path / "bundle", key)
    for path in [bundle, *bundle.rglob("*")]:
        path.chmod(0o777)
    target = tmp_path / "kiosk"
    done = install(bundle, key, target)
    assert done.returncode == 0, done.stderr
    writable = [
        path
        for path in [target, *target.rglob("*")]
        if not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) & 0o022
    ]
    assert not writable
    if os.geteuid() == 0:
        calls = (tmp_path / "told" / "calls").read_text().splitlines()
        assert calls[-1] == f"chown -R qwen-edge: {target}/state {target}/logs"
        users = [call for call in calls if call.startswith("useradd")]
        assert len(users) == (subprocess.run(["id", "-u", "qwen-edge"], capture_output=True).returncode != 0)


@pytest.mark.parametrize(
    "facts,message",
    [
        ({"platform": "win_amd64"}, "the bundle is for win_amd64, and this is"),
        ({"python": "3.10"}, "the bundle is for CPython 3.10, and this is CPython"),
        ({"needs": {"glibc": "9.99"}}, "the bundle needs glibc 9.99, and this system has"),
    ],
)
def test_a_bundle_for_another_machine(
    facts: dict[str, object], message: str, key: Path, tmp_path: Path
) -> None:
    """It says so before anything of it runs, and leaves nothing behind."""
    bundle = resealed(small_bundle(tmp_path / "made", key, "1.0"), tmp_path / "bundle", key, **facts)
    Bundle.open(bundle, key.with_suffix(".pub")).check()  # who packs it can still check it
    done = install(bundle, key, tmp_path / "kiosk")
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert not (tmp_path / "kiosk").exists()
    with pytest.raises(UserError, match=message):
        Installation(tmp_path / "kiosk").install(bundle, key.with_suffix(".pub"), print)


@pytest.mark.parametrize("name", ["a${HOME}b", "50%n", 'a"b', "a'b", "a\\b"])
def test_folders_that_systemd_would_read_otherwise(name: str, key: Path, tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "bundle", key, "1.0")
    done = install(bundle, key, tmp_path / name)
    assert done.returncode == 2 and "choose another folder" in done.stderr
    assert not (tmp_path / name).exists()


def test_a_folder_with_a_space(key: Path, tmp_path: Path) -> None:
    done = install(installing(tmp_path / "bundle", key), key, tmp_path / "in the hall")
    assert done.returncode == 0 and (tmp_path / "in the hall" / "current").read_text() == "1.0", done.stderr


@pytest.mark.parametrize("target", [r"D:\Kiosk & <Co>", r"E:\in the hall", r"C:\qwen-edge"])
def test_the_task_carries_the_folder(target: str, tmp_path: Path) -> None:
    data = written(tmp_path / "bundle", windows=True)["task.xml"].encode()
    task = ET.fromstring(beside("task.xml", data, Path(target)))
    assert (
        task.findtext(".//{*}Arguments") == rf'-NoProfile -ExecutionPolicy Bypass -File "{target}\start.ps1"'
    )
    assert beside("start.ps1", data, Path(target)) == data


def test_the_key_of_the_api_is_in_a_file(tmp_path: Path) -> None:
    """start.sh tells the program where, and not what."""
    folder = tmp_path / "kiosk"
    written(folder, windows=False)
    (folder / "api.key").write_text("sesame")
    program = folder / "python3.12"
    program.write_text('#!/bin/sh\necho "$@" "file=$QWEN_EDGE_API_KEY_FILE"\n')
    program.chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", str(folder / "start.sh")], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.endswith(f"file={folder / 'api.key'}\n") and "sesame" not in done.stdout


@pytest.mark.skipif(shutil.which("faketime") is None, reason="faketime is not installed")
@pytest.mark.parametrize("clock", ["1970-01-02", "2040-01-01", "2112-01-01"])
def test_a_device_whose_clock_is_wrong(clock: str, key: Path, tmp_path: Path) -> None:
    """Batteries of clocks die. It installs, starts what it installed, and checks it again at another time."""
    target, faked = tmp_path / "kiosk", ["faketime", f"{clock} 00:00:00"]
    done = install(installing(tmp_path / "bundle", key), key, target, faked)
    assert done.returncode == 0, done.stderr
    for prefix in ([], faked):
        verify = [*prefix, sys.executable, str(target / "launcher.pyz"), "verify", str(target), "--full"]
        assert subprocess.run(verify, capture_output=True, text=True).returncode == 0
        run = [*prefix, str(target / "qwen-run"), "self-test", "."]
        assert subprocess.run(run, capture_output=True).returncode == 0
