"""Artifacts that were changed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from qwen_common.errors import UserError
from qwen_runtime import Model


def edit(name: str, change: bytes | None):
    def damage(folder: Path) -> None:
        if change is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(change)

    return damage


def flip(name: str, at: int):
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[at] ^= 1
        (folder / name).write_bytes(content)

    return damage


def rewrite_manifest(old: str, new: str):
    def damage(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(path.read_text().replace(old, new))

    return damage


def replace_by_link(name: str):
    def damage(folder: Path) -> None:
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return damage


@pytest.mark.parametrize(
    "damage,message",
    [
        (edit("manifest.json", None), "has no manifest.json: it is not a finished artifact"),
        (edit("manifest.json", b"{"), "manifest.json is not valid JSON"),
        (edit("tokenizer.json", None), "tokenizer.json is missing"),
        (edit("genai_config.json", b"{}"), "genai_config.json changed since the export"),
        (flip("model.onnx.data", 1000), "model.onnx.data changed since the export"),
        (flip("model.onnx", 1000), "model.onnx changed since the export"),
        (rewrite_manifest('"format_version": 1', '"format_version": 2'), "has artifact format 2"),
        (edit("manifest.json", b'{"format_version": 1}'), "manifest.json has no valid 'qwen_edge'"),
        (rewrite_manifest('"files"', '"file"'), "manifest.json has no valid 'files'"),
        (rewrite_manifest('"size"', '"bytes"'), "has no valid 'files.chat_template.jinja.size'"),
        (rewrite_manifest('"genai_config.json"', '"other.json"'), "does not list genai_config.json"),
        (rewrite_manifest('"provider": "cpu"', '"provider": "tpu"'), "was made for 'tpu'"),
        (replace_by_link("model.onnx.data"), "names a file outside the folder: model.onnx.data"),
        (
            rewrite_manifest('"model.onnx"', '"../model.onnx"'),
            "names a file outside the folder: ../model.onnx",
        ),
    ],
)
def test_changed_artifacts(damage, message: str, copied: Path) -> None:
    damage(copied)
    with pytest.raises(UserError, match=re.escape(message)):
        Model.load(copied)


def test_large_files_are_hashed_only_when_asked(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_common.manifest.HASHED_BYTES", 1000)
    flip("model.onnx.data", 1000)(copied)
    Model.load(copied).close()
    with pytest.raises(UserError, match="changed since the export"):
        Model.load(copied, verify=True)
