"""CPython for Windows: which files are taken, and (slow) that they are the Python Software Foundation's."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path, PurePosixPath

import pytest
from qwen_common.errors import UserError
from qwen_export.bundle import windows_python
from qwen_export.bundle.windows_python import ARCHIVES, carry, wanted
from qwen_launcher.bundle import PYTHON_PROGRAM, Bundle
from qwen_launcher.installed import Release
from qwen_launcher.program import command

from tests.support.small_kiosk import new_key, resealed, small_bundle

# The list leaves them out. Both were compared with CPython's of other patches: the same, and its own changes.
NOT_LISTED = ("Lib/xml/__init__.py", "Lib/zipfile/__init__.py")
OWNERS = ("O=Python Software Foundation", "O=Microsoft Corporation")


@pytest.mark.parametrize(
    "path,expected",
    [
        ("python.exe", True),
        ("python312.dll", True),
        ("vcruntime140_1.dll", True),
        ("LICENSE.txt", True),
        ("NEWS.txt", False),
        ("DLLs/_ssl.pyd", True),
        ("DLLs/libcrypto-3.dll", True),
        ("DLLs/python_lib.cat", True),
        ("DLLs/tk86t.dll", False),
        ("DLLs/deeper/evil.dll", False),
        ("Lib/os.py", True),
        ("Lib/email/mime/text.py", True),
        ("Lib/__pycache__/os.cpython-312.pyc", False),
        ("Lib/site-packages/pip/__init__.py", False),
        ("Lib/site-packages/distutils-precedence.pth", False),
        ("Lib/../../evil.py", False),
        ("Lib/unittest/test/testmock/support.py", False),
        ("Scripts/pip.exe", False),
        ("../evil.exe", False),
        ("sub/evil.exe", False),
    ],
)
def test_which_files(path: str, expected: bool) -> None:
    assert wanted(PurePosixPath(path)) is expected


@pytest.mark.parametrize(
    "platform,python", [("linux_x86_64", "3.12"), ("win_arm64", "3.12"), ("win_amd64", "3.99")]
)
def test_what_there_is_none_of(platform: str, python: str) -> None:
    with pytest.raises(UserError, match="CPython is carried along for win_amd64, in version"):
        windows_python.check(platform, python)


def test_a_version_runs_by_the_python_that_it_brings(tmp_path: Path) -> None:
    """And then it does not matter which one the device has."""
    key = new_key(tmp_path)
    made = small_bundle(tmp_path / "made", key, "1.0")
    program = made / PYTHON_PROGRAM
    program.parent.mkdir()
    program.write_bytes(b"MZ")
    bundle = resealed(made, tmp_path / "bundle", key, python="3.99")
    Bundle.open(bundle, key.with_suffix(".pub")).check_fit()
    assert command(Release(bundle), "serve")[0] == str(bundle / PYTHON_PROGRAM)


@pytest.mark.slow
@pytest.mark.parametrize("python", ARCHIVES)
def test_it_is_the_foundations(python: str, tmp_path: Path) -> None:
    """Programs and libraries by their own signatures, modules by the digests in the signed list of them."""
    sign = shutil.which("osslsigncode")
    if sign is None:
        pytest.skip("osslsigncode is not installed")
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in carry(python, tmp_path).read_text()
    root = tmp_path / "python"
    catalogue = (root / "DLLs" / "python_lib.cat").read_bytes()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        if path.suffix in (".exe", ".dll", ".pyd"):
            done = subprocess.run([sign, "verify", "-in", str(path)], capture_output=True, text=True)
            current, calculated = (
                [
                    line.partition(":")[2].split()
                    for line in done.stdout.splitlines()
                    if line.startswith(start)
                ]
                for start in ("Current message digest", "Calculated message digest")
            )
            assert current == calculated != [], path
            assert any(owner in done.stdout for owner in OWNERS), path
        elif path.stat().st_size and path.suffix == ".py" and not path.as_posix().endswith(NOT_LISTED):
            content = path.read_bytes()
            assert any(hashlib.new(name, content).digest() in catalogue for name in ("sha256", "sha1")), path
    assert not [path for path in root.rglob("*") if path.suffix in (".pyc", ".pth")]


def test_the_pins_are_whole() -> None:
    for python, archive in ARCHIVES.items():
        assert archive.cpython.startswith(f"{python}.") and archive.release.startswith(f"{python}.")
        assert len(bytes.fromhex(archive.sha256)) == 32
    json.dumps([vars(archive) for archive in ARCHIVES.values()])
