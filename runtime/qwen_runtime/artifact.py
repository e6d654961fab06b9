"""An artifact folder: its manifest, and whether its files are still those that were exported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

from qwen_common import manifest as manifests
from qwen_common.artifact_folder import open_folder
from qwen_common.errors import UserError, check_unicode, one_line
from qwen_common.files import read_json
from qwen_common.manifest import ADVICE, GENAI_CONFIG, MANIFEST, BackendName, Manifest
from qwen_common.providers import CPU, named
from qwen_common.shape import first_fault

from qwen_runtime.images import ImageSettings
from qwen_runtime.template import read_templates
from qwen_runtime.threads import Threads


class _SessionOptions(TypedDict):
    provider_options: list[dict[str, dict[str, str]]]


class _Decoder(TypedDict):
    session_options: _SessionOptions


class _Model(TypedDict):
    type: str
    vocab_size: int
    context_length: int
    eos_token_id: int | list[int]
    decoder: _Decoder


class _Vision(TypedDict):
    config_filename: str


class _SeeingModel(_Model):
    vision: _Vision
    image_token_id: int
    video_token_id: int


class _Search(TypedDict):
    chunk_size: int


class _GenAIConfig(TypedDict):
    """The fields of ONNX Runtime GenAI's configuration that are read here."""

    model: _Model
    search: _Search


class _SeeingGenAIConfig(TypedDict):
    """With a vision tower."""

    model: _SeeingModel


@dataclass(frozen=True)
class Artifact:
    """One exported model.

    Attributes:
        root: its folder, which is also one that ONNX Runtime GenAI, or OpenVINO GenAI, opens.
        manifest: what the exporter wrote about it.
        genai_config: ONNX Runtime GenAI's description of it. For OpenVINO, which has nothing like it, the
            manifest's `runtime`: those of its fields that are needed here.
        prepacked: the graph that the CPU takes in place of the decoder's, with weights in its own layout, as
            a path from `root`.
        threads: that compute on the CPU; None: what genai_config says.
    """

    root: Path
    manifest: Manifest
    genai_config: Mapping[str, Any]
    prepacked: Path | None = None
    threads: Threads | None = None

    @classmethod
    def open(cls, path: str | Path, verify: bool = False) -> Artifact:
        """Open the artifact in the folder `path` and compare its files with its manifest.

        Sizes are always compared, the SHA-256 of files under 16 MiB too; `verify` hashes every file.

        Raises:
            UserError: not a finished artifact, of another format, malformed, changed since the export, or
                more than data; see `open_folder` and `check_path`.
        """
        root = Path(path)
        check_path(root)
        manifest = open_folder(root, every=verify)
        if manifest["backend"] == BackendName.OPENVINO:
            config, where, name = manifest["runtime"], root / MANIFEST, "runtime"
        else:
            config, where, name = read_json(root / GENAI_CONFIG, ADVICE), root / GENAI_CONFIG, ""
        fault = first_fault(config, _GenAIConfig, name)
        seeing = fault is None and "vision" in config["model"]
        if seeing:
            fault = first_fault(config, _SeeingGenAIConfig, name)
        if seeing and "image_prompt_tokens" not in manifest:
            where, fault = root / MANIFEST, "image_prompt_tokens"
        if fault is not None:
            raise UserError(f"{where} has no valid '{one_line(fault)}': {ADVICE}")
        return cls(root, manifest, config)

    @property
    def folders(self) -> list[Path]:
        """Where its weights are mapped from."""
        if self.prepacked is None:
            return [self.root]
        return [self.root, (self.root.resolve() / self.prepacked).resolve().parent]

    @property
    def backend(self) -> BackendName:
        return BackendName(self.manifest["backend"])

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together."""
        return int(self.genai_config["model"]["context_length"])

    def provider_options(self, provider: str) -> dict[str, str]:
        """What the artifact asks of an execution provider; {} of one that it was not made for."""
        entries = self.genai_config["model"]["decoder"]["session_options"]["provider_options"]
        return next(
            (
                dict(options)
                for entry in entries
                for name, options in entry.items()
                if (record := named(name)) is not None and record.key == provider
            ),
            {},
        )

    @property
    def chunk_size(self) -> int:
        """Most tokens that one run of the graph may take."""
        return int(self.genai_config["search"]["chunk_size"])

    @property
    def search_defaults(self) -> dict[str, Any]:
        """The checkpoint's own sampling: ONNX Runtime GenAI's search options, and what it has no word for."""
        return {**self.genai_config["search"], **self.manifest.get("sampling", {})}

    @property
    def images(self) -> ImageSettings | None:
        """How images are to be prepared; None where the artifact takes none."""
        vision = self.genai_config["model"].get("vision")
        if vision is None:
            return None
        return ImageSettings.from_processor(read_json(self.root / vision["config_filename"], ADVICE))

    @property
    def image_token(self) -> int:
        """The id that stands in a prompt where an image's features go."""
        return int(self.genai_config["model"]["image_token_id"])

    @property
    def video_token(self) -> int:
        return int(self.genai_config["model"]["video_token_id"])

    def image_prompt_tokens(self, provider: str) -> int:
        """Most tokens of a prompt with images, in one of the graphs that an execution provider takes."""
        most = self.manifest["image_prompt_tokens"]
        further = manifests.further_graphs(self.manifest, provider)
        return most if further is None else further.get("image_prompt_tokens", most)

    def overlay(self, provider: str) -> dict[str, Any]:
        """What is different from `genai_config` for the graphs that an execution provider takes; {} where it
        takes the main ones."""
        further = manifests.further_graphs(self.manifest, provider)
        found: dict[str, Any] = {} if further is None else read_json(self.root / further["overlay"], ADVICE)
        changed: dict[str, Any] = {}
        if self.prepacked is not None and provider == CPU.key:
            changed["filename"] = str(self.prepacked)
        if self.threads is not None:
            changed["session_options"] = self.threads.session_options
        if changed:
            model = found.get("model", {})
            found = {**found, "model": {**model, "decoder": {**model.get("decoder", {}), **changed}}}
        return found

    def decoder(self, provider: str) -> str:
        """The file with the decoder's graph on an execution provider."""
        replaced = self.overlay(provider).get("model", {}).get("decoder", {})
        return str(replaced.get("filename") or self.genai_config["model"]["decoder"]["filename"])

    def graphs(self, provider: str) -> list[str]:
        """Names of the files that answer on an execution provider."""
        described = [
            {**part, **self.overlay(provider).get("model", {}).get(kind, {})}
            for kind, part in self.genai_config["model"].items()
            if isinstance(part, dict)
        ]
        return [part["filename"] for part in described if "filename" in part]

    def rewinds(self, provider: str) -> bool:
        """Whether a generator on an execution provider can return to an earlier point.

        ONNX Runtime GenAI 0.18 holds the states of text models in one of two ways, and the one that it takes
        when it is told of layer types cannot. With pictures it says nothing and gets it wrong.
        """
        model = self.genai_config["model"]
        decoder = {**model["decoder"], **self.overlay(provider).get("model", {}).get("decoder", {})}
        return model["type"].endswith("_text") and "layer_types" not in decoder

    @property
    def vocab_size(self) -> int:
        return int(self.genai_config["model"]["vocab_size"])

    @property
    def end_tokens(self) -> frozenset[int]:
        """Ids that end an answer."""
        ids = self.genai_config["model"]["eos_token_id"]
        return frozenset(ids if isinstance(ids, list) else [ids])

    @cached_property
    def chat_templates(self) -> Mapping[str, str]:
        """As `read_templates` gives them."""
        return read_templates(self.root)


def check_path(path: Path) -> None:
    """Raises:
    UserError: ONNX Runtime and OpenVINO take paths of Unicode alone, and POSIX has others.
    """
    check_unicode(str(path), one_line(str(path)), "rename it")
