"""The program's own wheel: what is installed, and never what an index has under that name."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from qwen_common.errors import UserError
from qwen_export.bundle import own_wheel
from qwen_export.bundle.own_wheel import build_own_wheel, pack
from qwen_export.bundle.platforms import PLATFORMS
from qwen_export.bundle.wheels import download

METADATA = """Metadata-Version: 2.4
Name: qwen-edge
Version: 0.1.0
Provides-Extra: kiosk
Provides-Extra: serve
Requires-Dist: qwen-edge[serve]; extra == "kiosk"
Requires-Dist: thing>=1; extra == "serve"
"""


THING = "Metadata-Version: 2.4\nName: thing\nVersion: 1.0\n"


def wheel(folder: Path, name: str, files: dict[str, str], metadata: str) -> Path:
    """A wheel of these files."""
    folder.mkdir(exist_ok=True)
    info = f"{name}.dist-info"
    path = folder / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/entry_points.txt", "[console_scripts]\nqwen-run = qwen_runtime:main\n")
        rows = [f"{name},{record_hash(archive.read(name))},\n" for name in archive.namelist()]
        archive.writestr(f"{info}/RECORD", "".join([*rows, f"{info}/RECORD,,\n"]))
    return path


def record_hash(content: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def installed(folder: Path, source: Path) -> Distribution:
    """As pip installs it."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(folder),
    ]
    subprocess.run([*command, str(source)], check=True)
    return Distribution.at(folder / "qwen_edge-0.1.0.dist-info")


@pytest.fixture
def ours(tmp_path: Path) -> Distribution:
    source = wheel(tmp_path / "dist", "qwen_edge-0.1.0", {"qwen_runtime/__init__.py": "ours = 1\n"}, METADATA)
    return installed(tmp_path / "site", source)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index that pip asks, and that somebody put a qwen-edge of this version into."""
    folder = tmp_path / "index"
    wheel(folder, "qwen_edge-0.1.0", {"qwen_runtime/__init__.py": "evil = 1\n"}, METADATA)
    wheel(folder, "thing-1.0", {"thing.py": ""}, THING)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_it_is_what_is_installed(
    ours: Distribution, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_wheel, "distribution", lambda name: ours)
    output = tmp_path / "wheels"
    output.mkdir()
    made = build_own_wheel(output)
    with zipfile.ZipFile(made) as archive:
        assert archive.read("qwen_runtime/__init__.py") == b"ours = 1\n"
    again = installed(tmp_path / "again", made)
    assert again.version == "0.1.0" and [entry.name for entry in again.entry_points] == ["qwen-run"]
    assert {str(path) for path in again.files or [] if ".." not in path.parts and path.suffix != ".pyc"} >= {
        "qwen_runtime/__init__.py",
        "qwen_edge-0.1.0.dist-info/METADATA",
    }


def test_its_extras_that_name_itself_ask_no_index(ours: Distribution, index: Path, tmp_path: Path) -> None:
    output = tmp_path / "wheels"
    output.mkdir()
    root = pack(ours, output)
    before = root.read_bytes()
    wheels = download(root, ["kiosk"], {}, PLATFORMS["linux_x86_64"], "3.12", output)
    assert [item.name for item in wheels] == ["qwen-edge", "thing"]
    assert root.read_bytes() == before


@pytest.mark.parametrize("change", ["changed", "missing"])
def test_an_install_that_is_not_whole(ours: Distribution, change: str, tmp_path: Path) -> None:
    path = tmp_path / "site" / "qwen_runtime" / "__init__.py"
    path.unlink() if change == "missing" else path.write_text("evil = 1\n")
    with pytest.raises(UserError, match=r"qwen_runtime/__init__\.py of qwen-edge (is missing|changed)"):
        pack(ours, tmp_path)


def test_a_tree_that_is_no_wheels(tmp_path: Path) -> None:
    (tmp_path / "qwen_edge-0.1.0.dist-info").mkdir()
    (tmp_path / "qwen_edge-0.1.0.dist-info" / "METADATA").write_text(METADATA)
    with pytest.raises(UserError, match="was not installed from a wheel"):
        pack(Distribution.at(tmp_path / "qwen_edge-0.1.0.dist-info"), tmp_path)
