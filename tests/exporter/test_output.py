"""What `--force` may replace: an artifact of ours, and nothing else that lies in the way."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from qwen_common.errors import UserError
from qwen_common.replacing import put_in_place
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.cli import main
from qwen_export.export import export
from qwen_export.output import ADVICE, check_output, work_folder
from qwen_profiles.schema import load_profile
from qwen_runtime.artifact import Artifact

from benchmarks.support.artifacts import Quiet, make_artifact
from benchmarks.support.checkpoints import TINY
from tests.support.files import hashes


def forced(checkpoint: Path, output: Path) -> None:
    export(Checkpoint.open(str(checkpoint)), load_profile("cpu"), output, Quiet(), force=True)


@pytest.mark.parametrize("place", ["", "..", "artifacts/out", "../{name}/../{name}"])
def test_the_checkpoint_is_never_replaced(place: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").write_text("mine")
    checkpoint = Path(shutil.copytree(TINY, home / "checkpoint"))
    before = hashes(tmp_path)
    output = checkpoint / place.format(name=checkpoint.name)
    with pytest.raises(UserError, match="the same folder, or one lies in the other: choose another folder"):
        forced(checkpoint, output)
    assert hashes(tmp_path) == before
    arguments = ["--profile", "cpu", str(checkpoint), "-o", str(output), "--force", "--no-verify"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2 and "one lies in the other" in done.stderr
    assert hashes(tmp_path) == before


def test_the_checkpoint_behind_a_link_is_never_replaced(tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(TINY, tmp_path / "checkpoint"))
    (tmp_path / "link").symlink_to(checkpoint)
    before = hashes(checkpoint)
    for source, output in [(checkpoint, tmp_path / "link"), (tmp_path / "link", checkpoint)]:
        with pytest.raises(UserError, match="one lies in the other"):
            forced(source, output)
    assert hashes(checkpoint) == before


@pytest.mark.parametrize(
    "files",
    [
        {"letter.txt": "mine"},
        {"manifest.json": "{}"},
        {"manifest.json": "not JSON"},
        {"manifest.json": "[" * 100_000},
        {"manifest.json": json.dumps({"name": "a web page", "files": {}})},
        {"manifest.json": json.dumps({"format_version": 1, "qwen_edge": "0.1.0", "files": ["letter.txt"]})},
        {"folder/letter.txt": "mine"},
    ],
)
def test_a_folder_that_is_no_artifact_is_never_replaced(files: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "documents"
    for name, text in files.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text(text)
    before = hashes(tmp_path)
    with pytest.raises(UserError, match="is not an artifact of qwen-export, and is not replaced"):
        forced(TINY, output)
    assert hashes(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["documents"]


@pytest.mark.parametrize("name", ["notes.txt", "notes/one.txt", ".hidden"])
def test_what_somebody_put_into_an_artifact_is_not_lost(name: str, tmp_path: Path) -> None:
    output = make_artifact(TINY, load_profile("cpu"), tmp_path / "out")
    (output / name).parent.mkdir(exist_ok=True)
    (output / name).write_text("mine")
    before = hashes(tmp_path)
    with pytest.raises(UserError, match=rf"out has {name.partition('/')[0]}, which no export made"):
        forced(TINY, output)
    assert hashes(tmp_path) == before


def test_artifacts_and_empty_folders_are_replaced(tmp_path: Path) -> None:
    output = make_artifact(TINY, load_profile("cpu"), tmp_path / "out")
    (output / "genai_config.json").unlink()  # damaged, and still nobody else's
    (output / ".DS_Store").write_text("a file manager was here")
    forced(TINY, output)
    Artifact.open(output, verify=True)
    (tmp_path / "empty").mkdir()
    forced(TINY, tmp_path / "empty")
    Artifact.open(tmp_path / "empty", verify=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "out"]


def test_links_and_files_are_in_the_way(tmp_path: Path) -> None:
    artifact = make_artifact(TINY, load_profile("cpu"), tmp_path / "v1")
    (tmp_path / "current").symlink_to(artifact)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("mine")
    for name, message in [("current", "is a link"), ("dangling", "is a link"), ("file", "is a file")]:
        with pytest.raises(UserError, match=message):
            forced(TINY, tmp_path / name)
    assert (tmp_path / "current").is_symlink() and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["letter.txt", "artifact/letter.txt", "lock", "replaced/letter.txt"])
def test_the_hidden_folder_may_be_somebody_elses(name: str, tmp_path: Path) -> None:
    path = tmp_path / ".out.partial" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    if name == "lock":
        assert work_folder(tmp_path / "out") == tmp_path / ".out.partial"
        return
    with pytest.raises(UserError, match=r"\.out\.partial has .*, which no export made: move it elsewhere"):
        make_artifact(TINY, load_profile("cpu"), tmp_path / "out")
    assert path.read_text() == "mine"


@pytest.mark.parametrize("name", ["artifact", "replaced", "journal.jsonl", "fingerprint", "weights", "lock"])
@pytest.mark.parametrize("kind", ["link", "other"])
def test_what_only_has_a_name_of_the_hidden_folder(name: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    path = tmp_path / ".out.partial" / name
    path.parent.mkdir()
    (path.parent / "lock").touch()
    if kind == "link":
        path.unlink(missing_ok=True)
        path.symlink_to(tmp_path / "mine")
    elif name in ("artifact", "replaced"):
        path.write_text("mine")
    else:
        path.unlink(missing_ok=True)
        path.mkdir()
    with pytest.raises(UserError, match=rf"\.out\.partial has {re.escape(name)}, which no export made"):
        work_folder(tmp_path / "out")
    assert (tmp_path / "mine").read_text() == "mine"


def test_the_older_artifact_comes_back_where_the_last_step_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = make_artifact(TINY, load_profile("cpu"), tmp_path / "out")
    before = hashes(output)
    staged = tmp_path / "work" / "artifact"
    staged.mkdir(parents=True)
    replace = os.replace

    def interrupted(source: Path, target: Path) -> None:
        if source == staged:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        put_in_place(staged, output, ADVICE)
    assert hashes(output) == before


def test_what_came_while_the_export_ran_is_not_lost(tmp_path: Path) -> None:
    output = tmp_path / "out"
    check_output(output, TINY, force=False)
    output.mkdir()
    (output / "letter.txt").write_text("mine")
    staged = tmp_path / "work" / "artifact"
    staged.mkdir(parents=True)
    with pytest.raises(UserError, match="is not an artifact"):
        put_in_place(staged, output, ADVICE)
    assert (output / "letter.txt").read_text() == "mine" and staged.exists()
