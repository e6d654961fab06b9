"""Downloads from the hub, its cache, and links out of a folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import pytest
import torch
from qwen_common.errors import UserError
from qwen_export.checkpoint import Checkpoint
from qwen_export.checkpoint.hub import download

from tests.support.random_checkpoints import write_random_checkpoint

NORM = "model.layers.2.input_layernorm.weight"


@pytest.mark.parametrize("source", ["./nothing", "/nothing/there", "one/two/three", "name"])
def test_what_looks_like_a_folder_is_not_asked_of_the_hub(source: str) -> None:
    with pytest.raises(UserError, match=f"no folder {source}"):
        Checkpoint.open(source)


def test_hub_id_without_a_hub() -> None:
    with pytest.raises(UserError, match="the hub did not give it"):
        Checkpoint.open("qwen-edge/does-not-exist")


def test_hub_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub cache filled beforehand: snapshots of links into blobs, found without a network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "models--someone--tiny"
    source = write_random_checkpoint(tmp_path / "source", shards=2, dtype=torch.bfloat16)
    snapshot, blobs = cache / "snapshots" / commit, cache / "blobs"
    for folder in (snapshot, blobs, cache / "refs"):
        folder.mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    for number, path in enumerate(source.iterdir()):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../..") / "blobs" / str(number))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    checkpoint = Checkpoint.open("someone/tiny")
    assert checkpoint.revision == commit
    assert checkpoint.read(NORM, 0, 64).dtype == ml_dtypes.bfloat16


def test_hub_snapshot_given_as_a_folder(tmp_path: Path) -> None:
    source = write_random_checkpoint(tmp_path / "source")
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "abc", tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    shutil.move(source, blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert NORM in Checkpoint.open(str(snapshot)).tensors


def test_connection_lost_during_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*args: object, **kwargs: object) -> str:
        raise RuntimeError("peer closed connection\nand more lines")  # stands for any HTTP client's error

    monkeypatch.setattr("huggingface_hub.snapshot_download", lost)
    with pytest.raises(
        UserError, match=r"the hub did not give it \(peer closed connection\): check"
    ) as caught:
        Checkpoint.open("Qwen/Qwen3.5-0.8B")
    assert "\n" not in str(caught.value)


def test_only_data_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, Any] = {}

    def download(source: str, **kwargs: Any) -> str:
        asked.update(kwargs, source=source)
        return str(write_random_checkpoint(tmp_path / "snapshots" / "abc"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert Checkpoint.open("someone/tiny", "v1").revision == "abc"
    assert (asked["source"], asked["revision"]) == ("someone/tiny", "v1")
    files = [
        "a.safetensors",
        "config.json",
        "chat_template.jinja",
        "merges.txt",
        "a.bin",
        "a.pt",
        "a.py",
        "a.pkl",
    ]
    assert list(filter_repo_objects(files, allow_patterns=asked["allow_patterns"])) == files[:4]


def test_one_file_is_downloaded_by_the_same_rules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def download_one(source: str, file: str, revision: str | None) -> str:
        assert (source, revision) == ("someone/tiny", "v1")
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download_one)
    assert download("someone/tiny", "v1", "config.json") == tmp_path
    with pytest.raises(UserError, match=r"a hub id like Qwen/Qwen3.5-0.8B, or one of one, two$"):
        download("nothing", None, "config.json", ("one", "two"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "merges.txt"])
def test_links_out_of_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "checkpoint")
    outside = tmp_path / "outside"
    if (folder / name).exists():
        (folder / name).rename(outside)
    else:
        outside.write_text("secret")
    (folder / name).symlink_to(outside)
    with pytest.raises(UserError, match=f"{name} is a link out of .*: put the file itself there"):
        Checkpoint.open(str(folder))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_links_that_circle(name: str, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "checkpoint")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(name)
    if name == "tokenizer.json":
        assert NORM in Checkpoint.open(str(folder)).tensors
    else:
        with pytest.raises(UserError, match=r"has neither model\.safetensors nor"):
            Checkpoint.open(str(folder))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_is_no_configuration(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "checkpoint")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(UserError, match=r"has no config\.json"):
        Checkpoint.open(str(folder))


def test_links_inside_the_folder_and_to_the_folder(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "checkpoint")
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to(folder)
    assert NORM in Checkpoint.open(str(tmp_path / "link")).tensors
