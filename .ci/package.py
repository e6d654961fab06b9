"""Builds the sdist, and the wheel from it: both must be whole, and the wheel must answer from an artifact
where nothing but its base dependencies is installed.

Runs in an environment with `build` and `twine`, after the README's test command, whose `.venv` it uses.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("common/", "exporter/", "profiles/", "runtime/")
SOURCE = ROOT / ".venv" / "bin"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
        sdist, wheel = next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))
        run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
        check_files(sdist, wheel)
        check_installed(wheel, folder)
        print(f"{sdist.name} and {wheel.name} are whole")


def check_files(sdist: Path, wheel: Path) -> None:
    """The sdist is the repository and the wheel its packages: no file is missing, none came by accident."""
    files = set(run("git", "-C", ROOT, "ls-files").splitlines())
    with tarfile.open(sdist) as archive:
        packed = {member.name.partition("/")[2] for member in archive if member.isfile()}
    same(sdist, packed - {"PKG-INFO"}, files)
    with zipfile.ZipFile(wheel) as archive:
        packed = {path for path in archive.namelist() if ".dist-info/" not in path}
    same(wheel, packed, {path.partition("/")[2] for path in files if path.startswith(FOLDERS)})


def same(archive: Path, packed: set[str], files: set[str]) -> None:
    if packed != files:
        sys.exit(f"{archive.name} lacks {sorted(files - packed)} and has besides {sorted(packed - files)}")


def check_installed(wheel: Path, folder: Path) -> None:
    venv.create(folder / "venv", with_pip=True)
    programs = folder / "venv" / "bin"
    run(programs / "pip", "install", "-q", wheel)
    artifact, checkpoint = folder / "artifact", ROOT / "tests" / "checkpoints" / "tiny-dense"
    run(SOURCE / "qwen-export", "--profile", "cpu", checkpoint, "-o", artifact, "--no-verify")
    asked = ("qwen-run", artifact, "What is yield?", "--max-tokens", "20", "--temperature", "0")
    expected, found = (run(place / asked[0], *asked[1:], cwd=folder) for place in (SOURCE, programs))
    if not expected.strip() or found != expected:
        sys.exit(f"the wheel answers {found!r}, the source {expected!r}")
    refused = execute(programs / "qwen-export", "plan", cwd=folder)
    if refused.returncode != 2 or "qwen-edge[export]" not in refused.stderr:
        sys.exit(f"without its extra qwen-export says {refused.stderr!r}")


def run(*command: str | Path, cwd: Path | None = None) -> str:
    done = execute(*command, cwd=cwd)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}:\n{done.stdout}{done.stderr}")
    return done.stdout


def execute(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


if __name__ == "__main__":
    main()
