"""A bundle's signature and list: whatever changes in its folder is refused, with its own message."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from qwen_common.errors import UserError
from qwen_export.bundle.assemble import copy_listed, default_version, pack, seal
from qwen_export.bundle.keys import make_keys, sign
from qwen_export.bundle.platforms import PLATFORMS
from qwen_export.bundle.wheels import Wheel, download
from qwen_launcher.bundle import CONTENTS, SIGNATURE, Bundle, check_signature
from qwen_runtime.artifact import Artifact
from qwen_runtime.cli import main
from qwen_runtime.kiosk.self_test import make_self_test, run_self_test

from benchmarks.support.artifacts import float_profile, make_artifact
from tests.support import small_kiosk
from tests.support.random_checkpoints import write_random_checkpoint

FACTS = {**small_kiosk.FACTS, "version": "1.2"}
FILES = {"artifact/model.onnx": 5000, "artifact/manifest.json": 300, "wheels/a-1-py3-none-any.whl": 2000}


@pytest.fixture
def key(tmp_path: Path) -> Path:
    make_keys(tmp_path / "kiosk.key")
    return tmp_path / "kiosk.key"


@pytest.fixture
def sealed(tmp_path: Path, key: Path) -> Path:
    """A small folder under the real list and signature."""
    folder = tmp_path / "bundle"
    generator = np.random.default_rng(0)
    for name, size in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(generator.bytes(size))
    seal(folder, FACTS, key)
    return folder


def check(folder: Path, key: Path) -> None:
    Bundle.open(folder, key.with_suffix(".pub")).check()


def test_as_it_was_signed(sealed: Path, key: Path) -> None:
    check(sealed, key)
    done = CliRunner().invoke(main, ["verify", str(sealed), "--key", str(key.with_suffix(".pub"))])
    assert done.exit_code == 0 and "version 1.2: 3 files" in done.output
    assert key.stat().st_mode & 0o077 == 0


def test_every_flipped_bit_is_found(sealed: Path, key: Path) -> None:
    """200 single bits anywhere, the list and the signature among the places."""
    generator = np.random.default_rng(1)
    paths = [path for path in sealed.rglob("*") if path.is_file()]
    for _ in range(200):
        path = paths[generator.integers(len(paths))]
        original = path.read_bytes()
        changed = bytearray(original)
        place = int(generator.integers(len(changed)))
        changed[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(changed)
        with pytest.raises(UserError):
            check(sealed, key)
        path.write_bytes(original)
    check(sealed, key)


def removed(path: Path) -> None:
    path.unlink()


def renamed(path: Path) -> None:
    path.rename(path.with_name("other" + path.name))


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def shorter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def one_more(path: Path) -> None:
    (path.parent / "more").write_bytes(b"1")


def link_out(path: Path) -> None:
    shutil.move(path, path.parents[2] / "outside")
    path.symlink_to(path.parents[2] / "outside")


def linked_folder(path: Path) -> None:
    (path.parent / "linked").symlink_to("/", target_is_directory=True)


def pipe(path: Path) -> None:
    os.mkfifo(path.parent / "pipe")


def in_a_folder(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.mkdir()
    (path / path.name).write_bytes(content)


@pytest.mark.parametrize("name", [*FILES, CONTENTS, SIGNATURE])
@pytest.mark.parametrize(
    "change",
    [removed, renamed, longer, shorter, emptied, one_more, link_out, linked_folder, pipe, in_a_folder],
)
def test_every_change_of_structure_is_found(
    sealed: Path, key: Path, change: Callable[[Path], None], name: str
) -> None:
    change(sealed / name)
    with pytest.raises(UserError):
        check(sealed, key)


@pytest.mark.parametrize(
    "change,message",
    [
        (removed, "manifest.json is missing"),
        (renamed, "manifest.json is missing"),
        (longer, "manifest.json in .* changed since it was signed"),
        (one_more, "artifact/more does not belong"),
        (link_out, "is a link or a device"),
    ],
)
def test_each_has_its_own_message(
    sealed: Path, key: Path, change: Callable[[Path], None], message: str
) -> None:
    change(sealed / "artifact" / "manifest.json")
    with pytest.raises(UserError, match=message):
        check(sealed, key)


def test_another_key(sealed: Path, key: Path, tmp_path: Path) -> None:
    other = make_keys(tmp_path / "other.key")
    with pytest.raises(UserError, match="another key signed it"):
        Bundle.open(sealed, other)
    with pytest.raises(UserError, match="is not a public key"):
        Bundle.open(sealed, key)
    with pytest.raises(UserError, match="choose another name"):
        make_keys(key)


def test_the_list_cannot_name_files_outside(sealed: Path, key: Path, tmp_path: Path) -> None:
    """Even signed, a name with .. in it is none of the folder's files."""
    (tmp_path / "secret").write_bytes(b"s")
    contents = json.loads((sealed / CONTENTS).read_text())
    contents["files"]["../secret"] = {"size": 1, "sha256": "0"}
    data = json.dumps(contents).encode()
    (sealed / CONTENTS).write_bytes(data)
    (sealed / SIGNATURE).write_bytes(sign(data, key))
    check_signature(data, (sealed / SIGNATURE).read_bytes(), key.with_suffix(".pub"), sealed)
    with pytest.raises(UserError, match=r"names a file outside the folder, \.\./secret"):
        check(sealed, key)


def test_wheels_for_windows_are_what_their_metadata_asks_for(tmp_path: Path) -> None:
    """pip alone would leave out colorama, which only Windows needs, when it runs elsewhere."""
    root = download_only("tqdm", tmp_path)
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheels = download(root, [], {}, PLATFORMS["win_amd64"], "3.12", folder)
    assert {wheel.name for wheel in wheels} == {"tqdm", "colorama"}
    assert {path.name for path in folder.glob("*.whl")} == {
        wheel.path.name for wheel in wheels if wheel.path != root
    }


def download_only(name: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), name]
    subprocess.run(command, check=True)
    return Wheel(next(folder.glob(f"{name}-*.whl"))).path


def test_self_test_tells_another_model(cpu_artifact: Path, tmp_path: Path) -> None:
    recorded = make_self_test(cpu_artifact)
    assert 1 <= len(recorded["tokens"]) <= 8
    run_self_test(cpu_artifact, recorded)
    other = write_random_checkpoint(tmp_path / "checkpoint", vocab_size=2048)
    artifact = make_artifact(other, float_profile("fused"), tmp_path / "artifact", all_logits=False)
    with pytest.raises(UserError, match="the self-test answered"):
        run_self_test(artifact, recorded)


def test_the_checkpoints_licence_comes_along(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint")
    (checkpoint / "LICENSE").write_text("terms")
    artifact = make_artifact(checkpoint, float_profile("fused"), tmp_path / "artifact", all_logits=False)
    assert (artifact / "LICENSE").read_text() == "terms"
    assert "LICENSE" in json.loads((artifact / "manifest.json").read_text())["files"]


@pytest.mark.parametrize("year", [1970, 2040, 2112])
def test_files_of_any_clock_are_packed(year: int, sealed: Path, key: Path, tmp_path: Path) -> None:
    """A ZIP has years from 1980 to 2107."""
    moment = datetime(year, 1, 1, tzinfo=UTC).timestamp()
    for path in sealed.rglob("*"):
        os.utime(path, (moment, moment))
    pack(sealed, tmp_path / "bundle.zip")
    shutil.unpack_archive(tmp_path / "bundle.zip", tmp_path / "unpacked")
    check(tmp_path / "unpacked", key)


def test_a_clock_that_was_never_set_names_no_version() -> None:
    assert default_version(datetime(2040, 1, 2, 3, 4, 5, tzinfo=UTC)) == "2040.01.02.030405"
    with pytest.raises(UserError, match="the clock says 1970: set it, or give --version"):
        default_version(datetime(1970, 1, 1, tzinfo=UTC))


def test_what_lies_beside_the_artifact_stays_there(cpu_artifact: Path, tmp_path: Path) -> None:
    artifact = shutil.copytree(cpu_artifact, tmp_path / "artifact")
    (artifact / "NOTES.md").write_text("private")
    (artifact / ".git").mkdir()
    (artifact / ".git" / "config").write_text("password")
    copy_listed(Artifact.open(artifact), tmp_path / "copied")
    assert {path.name for path in (tmp_path / "copied").iterdir()} == {
        "manifest.json",
        *Artifact.open(artifact).manifest["files"],
    }
    Artifact.open(tmp_path / "copied", verify=True)
