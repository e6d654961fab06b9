"""What the system refuses: read-only places, names that are too long, files in the place of folders."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from qwen_common.errors import USER_ERROR, UserError
from qwen_export.cli import main
from qwen_export.output import check_output, work_folder
from qwen_profiles.schema import load_profile

from benchmarks.support.artifacts import make_artifact
from benchmarks.support.checkpoints import TINY


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder on a read-only file system; permission bits do not stop root."""
    place = tmp_path / "read-only"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def refused(output: Path, message: str, command: Sequence[str] = ("--profile", "cpu", str(TINY))) -> None:
    result = CliRunner().invoke(main, [*command, "-o", str(output), "--no-progress", "--no-verify"])
    assert result.exit_code == USER_ERROR, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line


def test_where_nothing_can_be_written(tmp_path: Path, read_only: Path) -> None:
    """Said before the work, and nothing is left behind."""
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for output, message in {
        read_only / "out": "it is read-only: choose another place",
        read_only / "new" / "out": "it is read-only: choose another place",
        tmp_path / "file" / "out": "a part of the path is a file and no folder",
        tmp_path / "file" / "new" / "out": "a part of the path is a file and no folder",
        tmp_path / ("x" * 250): "choose a shorter name",  # the hidden folder's name is longer
        tmp_path / ("x" * 5000): "choose a shorter name",
        tmp_path / ("x/" * 5000): "choose a shorter name",
    }.items():
        refused(output, message)
        with pytest.raises((UserError, OSError)):
            check_output(output, TINY, force=False)
    assert sorted(tmp_path.rglob("*")) == before


def test_another_export_makes_the_same_parents_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release's machines begin at once, in a folder that is not there yet."""
    ours, theirs = tmp_path / "artifacts" / "ours", tmp_path / "artifacts" / "theirs"
    made = tempfile.TemporaryFile

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        work_folder(theirs)
        return made(*arguments, **options)

    monkeypatch.setattr(tempfile, "TemporaryFile", meanwhile)
    check_output(ours, TINY, force=False)
    assert [path.name for path in theirs.parent.iterdir()] == [".theirs.partial"]


def test_a_place_that_is_found_writable_is_left_as_it_was(tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "folders" / "out", TINY, force=False)
    assert not list(tmp_path.iterdir())


def test_links_that_lead_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    refused(tmp_path / "a", "is a link: give the folder itself")
    refused(tmp_path / "a" / "out", "its links lead in a circle")


def test_what_cannot_be_read(tmp_path: Path, read_only: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(TINY, checkpoint)
    command = ["--profile", "cpu-int4", "--set", "compression=gptq", str(checkpoint), "--calibration"]
    refused(tmp_path / "out", "cannot read", [*command, str(tmp_path / "none.txt")])
    refused(tmp_path / "out", "cannot read", [*command, str(TINY / "model.safetensors")])
    refused(tmp_path / "out", "choose a shorter name", ["--profile", "cpu", "x" * 5000])
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors").mkdir()
    refused(tmp_path / "out", "is the download complete?", ["--profile", "cpu", str(checkpoint)])
    assert not (tmp_path / "out").exists()


def test_a_report_that_cannot_be_written(tmp_path: Path, read_only: Path) -> None:
    """An artifact on a read-only disk is measured, and the line says why there is no report."""
    subprocess.run(["umount", str(read_only)], check=True)
    artifact = make_artifact(TINY, load_profile("cpu"), read_only / "artifact")
    subprocess.run(["mount", "--bind", str(read_only), str(read_only)], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", str(read_only)], check=True)
    arguments = ["verify", str(artifact), "--against", str(TINY), "--tokens", "256", "--no-progress"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == USER_ERROR
    assert result.stderr.splitlines()[-1].endswith("it is read-only: choose another place")
