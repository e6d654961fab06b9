"""An artifact folder: its manifest, and whether its files are still those that were exported."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_common.errors import UserError

from qwen_runtime.images import ImageSettings

FORMAT_VERSION = 1
_MANIFEST = "manifest.json"
_GENAI_CONFIG = "genai_config.json"
_OPENVINO_TOKENIZER = "openvino_tokenizer.xml"
_ALWAYS_HASHED = 16 * 1024 * 1024  # bytes; larger files are compared by size unless asked
_HASH_BLOCK = 1024 * 1024
_FIELDS = {"model": dict, "profile": str, "provider": str, "files": dict}
# What a backend's artifact has besides: a file without which nothing loads, and fields of the manifest.
_BACKENDS: dict[str, tuple[str, dict[str, type]]] = {
    "onnx": (_GENAI_CONFIG, {"onnxruntime": str}),
    "openvino": (_OPENVINO_TOKENIZER, {"openvino": str, "runtime": dict}),
}


@dataclass(frozen=True)
class Artifact:
    """One exported model.

    Attributes:
        root: its folder, which is also one that ONNX Runtime GenAI, or OpenVINO GenAI, opens.
        manifest: what the exporter wrote about it.
        genai_config: ONNX Runtime GenAI's description of it. For OpenVINO, which has nothing like it, the
            manifest's `runtime`: those of its fields that are needed here.
    """

    root: Path
    manifest: Mapping[str, Any]
    genai_config: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | Path, verify: bool = False) -> Artifact:
        """Open the artifact in the folder `path` and compare its files with its manifest.

        Sizes are always compared, the SHA-256 of files under 16 MiB too; `verify` hashes every file.

        Raises:
            UserError: not a finished artifact, of a newer format, or changed since the export.
        """
        root = Path(path)
        if not root.is_dir():
            raise UserError(f"no folder {root}: make an artifact with qwen-export first")
        if not (root / _MANIFEST).is_file():
            raise UserError(f"{root} has no {_MANIFEST}: it is not a finished artifact, export it again")
        manifest = _read_json(root / _MANIFEST)
        if manifest.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{root} has artifact format {manifest.get('format_version')}, this qwen-edge reads "
                f"{FORMAT_VERSION}: install the qwen-edge that exported it, or export it again"
            )
        backend = manifest.get("backend", "onnx")
        if backend not in _BACKENDS:
            raise UserError(f"{root} was made for the backend {backend}: install the qwen-edge that knows it")
        needed, fields = _BACKENDS[backend]
        for name, kind in {**_FIELDS, **fields}.items():
            if not isinstance(manifest.get(name), kind):
                raise UserError(
                    f"{root / _MANIFEST} has no valid '{name}': copy the artifact again, or export it again"
                )
        if needed not in manifest["files"]:
            raise UserError(f"{root / _MANIFEST} does not list {needed}: export the artifact again")
        for name, entry in manifest["files"].items():
            _check_file(root, name, entry, verify)
        if backend == "openvino":
            return cls(root, manifest, manifest["runtime"])
        return cls(root, manifest, _read_json(root / _GENAI_CONFIG))

    @property
    def backend(self) -> str:
        """`onnx` or `openvino`."""
        return str(self.manifest.get("backend", "onnx"))

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together."""
        return int(self.genai_config["model"]["context_length"])

    def provider_options(self, provider: str) -> dict[str, str]:
        """What the artifact asks of an execution provider; {} of one that it was not made for."""
        entries = self.genai_config["model"]["decoder"]["session_options"]["provider_options"]
        return next((dict(entry[provider]) for entry in entries if provider in entry), {})

    @property
    def chunk_size(self) -> int:
        """Most tokens that one run of the graph may take."""
        return int(self.genai_config["search"]["chunk_size"])

    @property
    def images(self) -> ImageSettings | None:
        """How images are to be prepared; None where the artifact takes none."""
        vision = self.genai_config["model"].get("vision")
        if vision is None:
            return None
        return ImageSettings.from_processor(_read_json(self.root / vision["config_filename"]))

    @property
    def image_token(self) -> int:
        """The id that stands in a prompt where an image's features go."""
        return int(self.genai_config["model"]["image_token_id"])

    @property
    def video_token(self) -> int:
        return int(self.genai_config["model"]["video_token_id"])

    @property
    def image_prompt_tokens(self) -> int:
        """Most tokens of a prompt with images."""
        return int(self.manifest["image_prompt_tokens"])

    @property
    def rewinds(self) -> bool:
        """Whether a generator can return to an earlier point.

        ONNX Runtime GenAI 0.18 holds the states of text models in one of two ways, and the one that it takes
        when it is told of layer types cannot. With pictures it says nothing and gets it wrong.
        """
        model = self.genai_config["model"]
        return model["type"].endswith("_text") and "layer_types" not in model["decoder"]

    @property
    def vocab_size(self) -> int:
        return int(self.genai_config["model"]["vocab_size"])

    @property
    def end_tokens(self) -> frozenset[int]:
        """Ids that end an answer."""
        ids = self.genai_config["model"]["eos_token_id"]
        return frozenset(ids if isinstance(ids, list) else [ids])

    @property
    def chat_template(self) -> str:
        path = self.root / "chat_template.jinja"
        if not path.is_file():
            raise UserError(f"{self.root} has no chat template: give a raw prompt instead of messages")
        return path.read_text(encoding="utf-8")


def _check_file(root: Path, name: str, entry: Any, verify: bool) -> None:
    path = root / name
    if not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys():
        raise UserError(f"{_MANIFEST} of {root} has no size and sha256 of {name}: export the artifact again")
    if Path(name).name != name or "\\" in name or path.is_symlink():
        raise UserError(f"{_MANIFEST} of {root} names a file outside the folder: {name}")
    if not path.is_file():
        raise UserError(f"{name} is missing from {root}: copy the artifact again, or export it again")
    changed = path.stat().st_size != entry["size"]
    if not changed and (verify or entry["size"] < _ALWAYS_HASHED):
        changed = sha256(path) != entry["sha256"]
    if changed:
        raise UserError(f"{path} changed since the export: copy the artifact again, or export it again")


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal; a block of it in memory at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: copy the artifact again, or export it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object: copy the artifact again, or export it again")
    return content
