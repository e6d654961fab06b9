"""Opening an artifact: a malformed description of the model is one line that names the field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qwen_common import manifest as manifests
from qwen_common.errors import UserError
from qwen_runtime.artifact import Artifact

SESSION = {"provider_options": [{"openvino": {"INFERENCE_PRECISION_HINT": "f32"}}]}
DESCRIPTION: dict[str, Any] = {
    "model": {
        "type": "qwen3_5",
        "vocab_size": 100,
        "context_length": 64,
        "eos_token_id": [1, 2],
        "decoder": {"session_options": SESSION},
        "image_token_id": 3,
        "video_token_id": 4,
        "vision": {"config_filename": "processor_config.json"},
    },
    "search": {"chunk_size": 16},
}


def written(folder: Path, description: object, backend: str, **fields: Any) -> Path:
    """An artifact whose files are as its manifest says, with this description of its model."""
    folder.mkdir()
    names = {"onnx": "genai_config.json", "openvino": "openvino_tokenizer.xml"}
    text = {"onnx": json.dumps(description), "openvino": "<net/>"}
    (folder / names[backend]).write_text(text[backend])
    (folder / "processor_config.json").write_text("{}")
    needs = {
        "onnx": {"lowering": "fused", "onnxruntime": ">=1.30"},
        "openvino": {"device": "cpu", "openvino": "2026.4.0", "runtime": description},
    }
    manifest: Any = {
        "format_version": 1,
        "qwen_edge": "0.1.0",
        "model": {"name": "tiny", "model_type": "qwen3_5"},
        "source": {"checkpoint": "tiny", "revision": None},
        "profile": "cpu",
        "backend": backend,
        "provider": "cpu",
        **needs[backend],
        "activation_dtype": "float32",
        "recipe": {},
        "context_length": 64,
        "image_prompt_tokens": 64,
        "files": {path.name: manifests.file_entry(path) for path in sorted(folder.iterdir())},
        **fields,
    }
    manifests.write(folder, {name: value for name, value in manifest.items() if value is not None})  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_what_the_description_says(backend: str, tmp_path: Path) -> None:
    artifact = Artifact.open(written(tmp_path / "out", DESCRIPTION, backend), verify=True)
    assert artifact.backend == backend
    assert (artifact.context_length, artifact.chunk_size, artifact.vocab_size) == (64, 16, 100)
    assert artifact.end_tokens == {1, 2} and (artifact.image_token, artifact.video_token) == (3, 4)
    assert artifact.provider_options("openvino") == {"INFERENCE_PRECISION_HINT": "f32"}
    assert artifact.provider_options("cpu") == {}


def without(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


def put(value: object, *path: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


@pytest.mark.parametrize("backend,inside", [("onnx", ""), ("openvino", "runtime.")])
@pytest.mark.parametrize(
    "change,field",
    [
        (without("model"), "model"),
        (without("model", "context_length"), "model.context_length"),
        (put("64", "model", "context_length"), "model.context_length"),
        (put([1, "2"], "model", "eos_token_id"), "model.eos_token_id"),
        (put(None, "model", "eos_token_id"), "model.eos_token_id"),
        (without("model", "decoder", "session_options"), "model.decoder.session_options"),
        (
            put(
                [{"dml": {"enable_graph_capture": 0}}],
                "model",
                "decoder",
                "session_options",
                "provider_options",
            ),
            "model.decoder.session_options.provider_options.0.dml.enable_graph_capture",
        ),
        (put({}, "search"), "search.chunk_size"),
        (put({}, "model", "vision"), "model.vision.config_filename"),
        (without("model", "image_token_id"), "model.image_token_id"),
    ],
)
def test_malformed_descriptions(
    backend: str, inside: str, change: Callable[[dict[str, Any]], None], field: str, tmp_path: Path
) -> None:
    description = json.loads(json.dumps(DESCRIPTION))
    change(description)
    folder = written(tmp_path / "out", description, backend)
    with pytest.raises(UserError) as raised:
        Artifact.open(folder)
    file = {"onnx": "genai_config.json", "openvino": "manifest.json"}[backend]
    start = f"{folder / file} has no valid '{inside}{field}': copy the artifact again"
    assert str(raised.value).startswith(start)


def test_pictures_need_their_limit_and_others_do_not(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest.json has no valid 'image_prompt_tokens'"):
        Artifact.open(written(tmp_path / "seeing", DESCRIPTION, "onnx", image_prompt_tokens=None))
    outside = json.loads(json.dumps(DESCRIPTION))
    outside["model"]["vision"]["config_filename"] = "../secret.json"
    with pytest.raises(UserError, match=r"manifest\.json does not list \.\./secret\.json"):
        Artifact.open(written(tmp_path / "outside", outside, "onnx"))
    blind = json.loads(json.dumps(DESCRIPTION))
    del blind["model"]["vision"]
    assert Artifact.open(written(tmp_path / "blind", blind, "onnx", image_prompt_tokens=None)).images is None


@pytest.mark.parametrize("text", ["[]", "NaN", "{", "[" * 100_000])
def test_what_is_no_description(text: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "out", DESCRIPTION, "onnx")
    manifest = manifests.read(folder)
    manifests.put_files(folder, manifest, {"genai_config.json": text.encode()})
    with pytest.raises(UserError, match=r"genai_config\.json is not "):
        Artifact.open(folder)


@pytest.mark.parametrize("content", [b"\x08\x0a\x3a\x00", b"", b" <net/>", b"\x1f\x8b<net"])
def test_another_format_under_an_irs_name(content: bytes, tmp_path: Path) -> None:
    """OpenVINO 2026.4 reads an ONNX graph of that name, with weights from wherever it says (measured)."""
    folder = written(tmp_path / "out", DESCRIPTION, "openvino")
    manifests.put_files(folder, manifests.read(folder), {"openvino_model.xml": content})
    with pytest.raises(UserError, match=r"openvino_model.xml is no OpenVINO IR"):
        Artifact.open(folder)


@pytest.mark.parametrize("option", ["CACHE_DIR", "CONFIG_FILE", "WEIGHTS_PATH", "MODEL_PTR"])
def test_properties_of_openvino_that_name_files(option: str, tmp_path: Path) -> None:
    description = json.loads(json.dumps(DESCRIPTION))
    description["model"]["decoder"]["session_options"] = {"provider_options": [{"openvino": {option: "x"}}]}
    with pytest.raises(UserError, match=f"'{option}' of openvino is not an option that an artifact may set"):
        Artifact.open(written(tmp_path / "out", description, "openvino"))
