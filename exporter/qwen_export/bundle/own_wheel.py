"""This program's own wheel, from what is installed here: an index could have another one of that name."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution, PackagePath, distribution
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

from packaging.utils import canonicalize_name
from qwen_common.errors import UserError
from qwen_common.version import DISTRIBUTION

# An installer writes them, each for its own install.
_INSTALLERS = ("INSTALLER", "REQUESTED", "RECORD", "direct_url.json", "uv_cache.json", "uv_build.json")


def build_own_wheel(folder: Path) -> Path:
    """Built from the source tree of an editable install, or packed from the installed files.

    Raises:
        UserError: the tree cannot be built, or an installed file is missing or changed.
    """
    own = distribution(DISTRIBUTION)
    origin = json.loads(own.read_text("direct_url.json") or "{}")  # PEP 610
    if origin.get("dir_info", {}).get("editable"):
        return _build(Path(url2pathname(urlparse(origin["url"]).path)), folder)
    return pack(own, folder)


def _build(tree: Path, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    result = subprocess.run([*command, str(tree)], capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"pip could not make qwen-edge's own wheel: {' '.join(result.stderr.split())[-300:]}")
    return next(folder.glob("qwen_edge-*.whl"))


def pack(installed: Distribution, folder: Path) -> Path:
    """A wheel (PEP 427) of an installed distribution's files, each as its RECORD says.

    Raises:
        UserError: a file is missing or changed.
    """
    name = canonicalize_name(installed.metadata["Name"]).replace("-", "_")
    tags = [
        line.partition(": ")[2]
        for line in (installed.read_text("WHEEL") or "").splitlines()
        if line.startswith("Tag: ")
    ]
    if not tags:
        raise UserError(f"{DISTRIBUTION} was not installed from a wheel: install it with pip")
    wheel = folder / f"{name}-{installed.version}-{tags[0]}.whl"
    record = io.StringIO()
    rows = csv.writer(record, lineterminator="\n")
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(filter(_belongs, installed.files or []), key=str):
            content = _content(path)
            archive.writestr(str(path), content)
            rows.writerow([str(path), f"sha256={_digest(content)}", len(content)])
        listed = f"{name}-{installed.version}.dist-info/RECORD"
        rows.writerow([listed, "", ""])
        archive.writestr(listed, record.getvalue())
    return wheel


def _belongs(path: PackagePath) -> bool:
    """Not the commands, which an installer makes, nor bytecode."""
    inside = ".." not in path.parts and path.suffix != ".pyc"
    return inside and not (path.parts[0].endswith(".dist-info") and path.name in _INSTALLERS)


def _content(path: PackagePath) -> bytes:
    try:
        content = Path(str(path.locate())).read_bytes()
    except OSError as error:
        raise UserError(f"{path} of {DISTRIBUTION} is missing: install it again") from error
    if path.hash is None or path.hash.mode != "sha256" or path.hash.value != _digest(content):
        raise UserError(f"{path} of {DISTRIBUTION} changed since it was installed: install it again")
    return content


def _digest(content: bytes) -> str:
    """As a RECORD has it."""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
