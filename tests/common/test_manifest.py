"""manifest.json: what is written is read again, and whatever is wrong with one is a single line of advice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from qwen_common import files
from qwen_common import manifest as manifests
from qwen_common.errors import UserError
from qwen_common.manifest import BackendName

STORED_AS = {"precision": "int4", "block_size": 32, "symmetric": True}
CONTENTS = {"genai_config.json": b"{}", "model.onnx": b"graph", "model.onnx.data": b"weights"}
ONNX: dict[str, Any] = {
    "format_version": 1,
    "qwen_edge": "0.1.0",
    "model": {"name": "Qwen/Qwen3.5-0.8B", "model_type": "qwen3_5_text"},
    "source": {"checkpoint": "Qwen/Qwen3.5-0.8B", "revision": None},
    "profile": "cpu",
    "backend": "onnx",
    "provider": "cpu",
    "lowering": "fused",
    "onnxruntime": ">=1.30",
    "activation_dtype": "float32",
    "recipe": {"mlp": STORED_AS},
    "context_length": 4096,
    "files": {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in CONTENTS.items()
    },
    "settings": {"layer_weights": {"3": {"mlp": STORED_AS}}, "hardware": {"bandwidth_gb_s": 50.0}},
    "bytes_by_role": {"mlp": 7},
    "carried_over": ["mlp"],
    "all_logits": False,
    "cache_bytes_per_token": 512,
}
OPENVINO: dict[str, Any] = {
    **{name: value for name, value in ONNX.items() if name not in ("lowering", "onnxruntime")},
    "backend": "openvino",
    "provider": "openvino",
    "device": "gpu",
    "openvino": "2026.4.0",
    "nncf": "3.3.0",
    "files": {"openvino_tokenizer.xml": {"size": 0, "sha256": hashlib.sha256().hexdigest()}},
    "image_prompt_tokens": 4096,
    "runtime": {"model": {"type": "qwen3_5"}},
}
# What artifacts of the first version did not have.
LATER = ("backend", "settings", "bytes_by_role", "carried_over", "all_logits", "cache_bytes_per_token")


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    for name, content in CONTENTS.items():
        (tmp_path / name).write_bytes(content)
    put(tmp_path, ONNX)
    return tmp_path


def put(folder: Path, content: object) -> None:
    (folder / "manifest.json").write_text(json.dumps(content), encoding="utf-8")


def refused(folder: Path) -> str:
    """The message, one line."""
    with pytest.raises(UserError) as raised:
        manifests.check_files(folder, manifests.read(folder))
    message = str(raised.value)
    assert message.isprintable() and len(message) < 2000, message
    return message


def changed(folder: Path, change: Callable[[dict[str, Any]], object], base: dict[str, Any] = ONNX) -> str:
    content = json.loads(json.dumps(base))
    change(content)
    put(folder, content)
    return refused(folder)


def places(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value but the root."""
    parts = dict(enumerate(value)) if isinstance(value, list) else value
    for key, item in parts.items() if isinstance(parts, dict) else ():
        yield (*path, key)
        yield from places(item, (*path, key))


def at(content: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        content = content[key]
    return content


# Fields of which any value is somebody's: of the profile, and of the description that the runtime reads.
def free(path: tuple[Any, ...]) -> bool:
    return path[:2] == ("settings", "hardware") or (path[0] == "runtime" and len(path) > 1)


@pytest.mark.parametrize("manifest", [ONNX, OPENVINO], ids=["onnx", "openvino"])
def test_what_is_written_is_read(manifest: dict[str, Any], tmp_path: Path) -> None:
    manifests.write(tmp_path, manifest)
    text = (tmp_path / "manifest.json").read_text(encoding="utf-8")
    assert text == json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    assert manifests.read(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_an_artifact_of_the_first_version_is_read(artifact: Path) -> None:
    put(artifact, {name: value for name, value in ONNX.items() if name not in LATER})
    found = manifests.read(artifact)
    assert found["backend"] == BackendName.ONNX and found["bytes_by_role"] == {} and found["settings"] == {}
    manifests.check_files(artifact, found, every=True)


def test_fields_of_a_later_version_are_kept(artifact: Path) -> None:
    put(artifact, {**ONNX, "colour": ["blue"]})
    assert manifests.put_files(artifact, manifests.read(artifact), {})["colour"] == ["blue"]  # type: ignore[typeddict-item]


@pytest.mark.parametrize("base", [ONNX, OPENVINO], ids=["onnx", "openvino"])
def test_every_value_of_another_type_is_named(base: dict[str, Any], artifact: Path) -> None:
    for path in places(base):
        for wrong in (None, True, 1.5, 7, "text", ["x"], {"x": 1}):
            allowed = {type(at(base, path))} | ({str} if path == ("source", "revision") else set())
            if type(wrong) in allowed or free(path):
                continue

            def change(content: dict[str, Any], path: tuple[Any, ...] = path, wrong: object = wrong) -> None:
                at(content, path[:-1])[path[-1]] = wrong

            name = ".".join(map(str, path))
            message = changed(artifact, change, base)
            if path != ("format_version",) or type(wrong) is not int:
                assert f"manifest.json has no valid '{name}': copy the artifact again" in message


@pytest.mark.parametrize("wrong", [True, "x", {}, STORED_AS, {**STORED_AS, "share": "x"}])
def test_a_format_of_frequent_tokens_is_whole_or_none(wrong: object, artifact: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["settings"]["frequent_tokens"] = wrong

    assert "has no valid 'settings.frequent_tokens'" in changed(artifact, change, ONNX)
    put(artifact, {**ONNX, "settings": {"frequent_tokens": None}})
    assert manifests.read(artifact)["settings"]["frequent_tokens"] is None


@pytest.mark.parametrize("base", [ONNX, OPENVINO], ids=["onnx", "openvino"])
def test_every_missing_field_is_named(base: dict[str, Any], artifact: Path) -> None:
    optional = {*LATER, "nncf", "image_prompt_tokens", "layer_weights"}
    by_name = ("files", "recipe", "bytes_by_role", "carried_over", "layer_weights", "3")
    for path in places(base):
        if free(path) or path[-1] in optional or path[-2:-1] in [(name,) for name in by_name]:
            continue
        message = changed(artifact, lambda content, path=path: at(content, path[:-1]).pop(path[-1]), base)
        assert f"has no valid '{'.'.join(path)}'" in message


@pytest.mark.parametrize(
    "text,message",
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"a":' * 100_000, "is not valid JSON"),
        (b'{"format_version": NaN}', "is not valid JSON"),
        (b'{"format_version": -Infinity}', "is not valid JSON"),
        (b'{"format_version": 1, 2: 3}', "is not valid JSON"),
        (b'{"format_version": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b"[]", "is not a JSON object"),
        (b"null", "is not a JSON object"),
        (b'"manifest"', "is not a JSON object"),
        (b"{}", "has no valid 'format_version'"),
        (
            b'{"format_version": 2}',
            "has artifact format 2, this qwen-edge reads 1: install the",
        ),
        (b'{"format_version": 1.0}', "has no valid '"),
        (b'{"format_version": true}', "has no valid 'format_version'"),
    ],
)
def test_what_is_no_manifest_is_refused(text: bytes, message: str, artifact: Path) -> None:
    (artifact / "manifest.json").write_bytes(text)
    assert message in refused(artifact)


@pytest.mark.parametrize(
    "name",
    ["../model.onnx", "..", ".", "", "/etc/passwd", "folder/model.onnx", "..\\model.onnx", "model.onnx/"],
)
def test_a_name_that_leads_out_of_the_folder(name: str, artifact: Path) -> None:
    entry = {"size": 5, "sha256": "0"}
    message = changed(artifact, lambda content: content["files"].update({name: entry}))
    assert message.endswith(f"names a file outside the folder: {name}")


@pytest.mark.parametrize("name", ["a\nb", "a\0b", "\ud800", "x" * 5000, "\x1b[2J"])
def test_odd_names_do_not_spoil_the_message(name: str, artifact: Path) -> None:
    changed(artifact, lambda content: content["files"].update({name: {"size": 5, "sha256": "0"}}))
    changed(artifact, lambda content: content["bytes_by_role"].update({name: "many"}))
    changed(artifact, lambda content: content.update(backend=name))


def test_an_unknown_backend_and_what_a_backend_needs(artifact: Path) -> None:
    message = changed(artifact, lambda content: content.update(backend="tensorrt"))
    assert "was made for the backend tensorrt: install the qwen-edge that knows it" in message
    message = changed(artifact, lambda content: content["files"].pop("genai_config.json"))
    assert "does not list genai_config.json" in message
    message = changed(artifact, lambda content: content["files"].clear(), OPENVINO)
    assert "does not list openvino_tokenizer.xml" in message
    assert "'context_length'" in changed(artifact, lambda content: content.update(context_length=0))


def test_no_artifact(tmp_path: Path) -> None:
    assert "has no manifest.json: it is not a finished artifact" in refused(tmp_path)
    assert "no folder" in refused(tmp_path / "missing")
    (tmp_path / "manifest.json").mkdir()
    assert "has no manifest.json" in refused(tmp_path)


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def other(path: Path) -> None:
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))


def linked(path: Path) -> None:
    path.rename(path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


def in_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize(
    "damage,message",
    [
        (longer, "changed since the export: copy the artifact again"),
        (other, "changed since the export: copy the artifact again"),
        (Path.unlink, "is missing from"),
        (in_a_folder, "is missing from"),
        (linked, "names a file outside the folder"),
    ],
)
def test_changed_files(name: str, damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    folder.mkdir()
    for each, content in CONTENTS.items():
        (folder / each).write_bytes(content)
    put(folder, ONNX)
    damage(folder / name)
    assert message in refused(folder)


def test_large_files_are_hashed_when_asked(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "HASHED_BYTES", len(CONTENTS["model.onnx.data"]))
    other(artifact / "model.onnx.data")
    manifest = manifests.read(artifact)
    manifests.check_files(artifact, manifest)
    with pytest.raises(UserError, match="changed since the export"):
        manifests.check_files(artifact, manifest, every=True)


def test_files_are_added_in_steps_that_each_leave_a_valid_artifact(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = files.replace
    for attempt in range(6):
        writes = iter(range(attempt))

        def interrupted(path: Path, content: bytes, writes: Iterator[int] = writes) -> None:
            if next(writes, None) is None:
                raise KeyboardInterrupt
            replace(path, content)

        monkeypatch.setattr(files, "replace", interrupted)
        added = {"REPORT.md": f"{attempt}".encode(), "report.json": b"{}", "model.onnx": b"another graph"}
        if attempt < 5:
            with pytest.raises(KeyboardInterrupt):
                manifests.put_files(artifact, manifests.read(artifact), added)
        else:
            manifests.put_files(artifact, manifests.read(artifact), added)
        manifests.check_files(artifact, manifests.read(artifact), every=True)
    assert manifests.read(artifact)["files"].keys() == {*CONTENTS, "REPORT.md", "report.json"}
    assert (artifact / "REPORT.md").read_bytes() == b"5"


def test_whose_files_they_are(artifact: Path) -> None:
    assert manifests.listed_files(artifact) == {"manifest.json", *CONTENTS}
    put(artifact, {"format_version": 99, "qwen_edge": "9.0", "files": {"weights": None}})
    assert manifests.listed_files(artifact) == {"manifest.json", "weights"}  # ours, of a later format
    for content in ({}, [], {"format_version": 1, "files": {}}, {"name": "a web page", "files": {}}):
        put(artifact, content)
        assert manifests.listed_files(artifact) is None
    (artifact / "manifest.json").unlink()
    assert manifests.listed_files(artifact) is None
