"""manifest.json of an artifact: what it is, where it came from, and the size and SHA-256 of its files.

The one module that writes and reads it. The exporter fills it in, verification adds its report's files, and
whatever opens an artifact (`qwen-run`, `inspect`, `verify`, a bundle) reads it here first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from qwen_common import files
from qwen_common.errors import UserError, one_line
from qwen_common.shape import first_fault

MANIFEST = "manifest.json"
GENAI_CONFIG = "genai_config.json"
OPENVINO_TOKENIZER = "openvino_tokenizer.xml"
FORMAT_VERSION = 1
HASHED_BYTES = 16 * 1024 * 1024  # files below are hashed whenever an artifact is opened
ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of one that is switched at run time
_SHOWN = 100  # characters of what stands in a manifest, in a message
ADVICE = "copy the artifact again, or export it again"


class BackendName(StrEnum):
    """The runtime family that an artifact is for. Execution providers, of which OpenVINO has one too, are in
    `qwen_common.providers`."""

    ONNX = "onnx"
    OPENVINO = "openvino"


class FileEntry(TypedDict):
    """One file: its bytes, and their SHA-256 in hexadecimal."""

    size: int
    sha256: str


class ModelNames(TypedDict):
    name: str
    model_type: str


class _SourceAlways(TypedDict):
    checkpoint: str
    revision: str | None


class Source(_SourceAlways, total=False):
    """The checkpoint, by hub id or folder name; the commit, where it came from a hub.

    Attributes:
        identity: of a folder, a hash that is another one when a file in it was written again.
    """

    identity: str


class MergedAdapter(TypedDict):
    """An adapter that is in the weights: its folder's name or its hub id, the weight that its scaling was
    multiplied with, and its files."""

    name: str
    weight: float
    files: dict[str, FileEntry]


class SwitchedAdapter(MergedAdapter):
    """An adapter in `file`, in ONNX Runtime's format, that is switched at run time."""

    file: str


class StoredAs(TypedDict):
    """A profile's `WeightFormat`."""

    precision: str
    block_size: int
    symmetric: bool


class FrequentAs(StoredAs):
    """A profile's `FrequentTokens`."""

    share: float


class Settings(TypedDict, total=False):
    """The whole profile, overrides included. Named here is what is read without the schema of profiles."""

    frequent_tokens: FrequentAs | None
    layer_weights: dict[str, dict[str, StoredAs]]
    fallbacks: list[str]
    threads: int | Literal["performance"]
    spin_us: int | None


class _FurtherAlways(TypedDict):
    providers: list[str]
    lowering: str
    onnxruntime: str
    files: dict[str, str]
    overlay: str


class FurtherGraphs(_FurtherAlways, total=False):
    """Graphs over the same weights for providers that have no kernels for the main ones.

    Attributes:
        files: by a main graph's file the one that they take in its place.
        overlay: file of what is different for them from genai_config.json.
        image_prompt_tokens: as the manifest's; without it, the same.
    """

    image_prompt_tokens: int


class RunsOn(TypedDict, total=False):
    """What an artifact needs: `lowering`, `onnxruntime` and `further_graphs` for ONNX Runtime, the others for
    OpenVINO."""

    lowering: str
    onnxruntime: str
    further_graphs: list[FurtherGraphs]
    device: str
    openvino: str
    nncf: str


class _Always(TypedDict):
    format_version: int
    qwen_edge: str
    model: ModelNames
    source: Source
    profile: str
    backend: str
    provider: str
    activation_dtype: Literal["float32", "float16"]
    recipe: dict[str, StoredAs]
    context_length: int
    files: dict[str, FileEntry]
    settings: Settings
    bytes_by_role: dict[str, int]
    carried_over: list[str]
    all_logits: bool
    cache_bytes_per_token: int


class Manifest(_Always, RunsOn, total=False):
    """The whole file.

    Attributes:
        provider: the execution provider that the artifact was made for.
        context_length: tokens of prompt and answer together.
        carried_over: roles whose codes are the checkpoint's own.
        cache_bytes_per_token: of the KV cache.
        image_prompt_tokens: most tokens of a prompt with images; with a vision tower only.
        adapters: merged into the weights, in this order; absent where there are none.
        switched_adapters: beside the weights, chosen at run time; absent where there are none.
        sampling: defaults of the checkpoint that ONNX Runtime GenAI's configuration has no word for: `min_p`.
        runtime: for OpenVINO, which has no genai_config.json: those of its fields that our runtime reads.
    """

    image_prompt_tokens: int
    adapters: list[MergedAdapter]
    switched_adapters: list[SwitchedAdapter]
    sampling: dict[str, float]
    runtime: dict[str, Any]


class _Ours(TypedDict):
    """What tells our manifests, of whatever format version, from other people's files of that name."""

    format_version: int
    qwen_edge: str
    files: dict[str, Any]


# For artifacts that were made before the field was there.
_BEFORE: dict[str, Any] = {
    "backend": BackendName.ONNX.value,
    "settings": {},
    "bytes_by_role": {},
    "carried_over": [],
    "all_logits": False,
    "cache_bytes_per_token": 0,
}
# Of each backend: a file without which nothing loads, and the fields that are its own.
_NEEDS: dict[str, tuple[str, tuple[str, ...]]] = {
    BackendName.ONNX: (GENAI_CONFIG, ("lowering", "onnxruntime")),
    BackendName.OPENVINO: (OPENVINO_TOKENIZER, ("device", "openvino", "runtime")),
}


def file_entry(path: Path) -> FileEntry:
    return {"size": path.stat().st_size, "sha256": files.sha256(path)}


def write(artifact: Path, manifest: Manifest) -> None:
    """Replace the manifest in the folder `artifact` in one step."""
    files.replace(artifact / MANIFEST, files.as_json(manifest))


def put_files(artifact: Path, manifest: Manifest, contents: Mapping[str, bytes]) -> Manifest:
    """Write files into a finished artifact and list them; wherever this is cut short, the artifact is valid.

    Returns:
        The manifest that lists them.
    """
    others = {name: entry for name, entry in manifest["files"].items() if name not in contents}
    write(artifact, {**manifest, "files": others})
    for name, content in contents.items():
        files.replace(artifact / name, content)
    listed = others | {name: file_entry(artifact / name) for name in contents}
    written: Manifest = {**manifest, "files": listed}
    write(artifact, written)
    return written


def read(artifact: Path) -> Manifest:
    """The manifest in the folder `artifact`. Looks at no other file: see `check_files`.

    Raises:
        UserError: there is none, it is of another format version or for a backend that is unknown here, a
            field is missing or of the wrong type, or it names a file outside the folder.
    """
    path = artifact / MANIFEST
    if not artifact.is_dir():
        pulled = str(artifact).startswith("oci:")
        advice = "get it with qwen-run pull" if pulled else "make an artifact with qwen-export"
        raise UserError(f"no folder {artifact}: {advice} first")
    if not path.is_file():
        raise UserError(f"{artifact} has no {MANIFEST}: it is not a finished artifact, export it again")
    content = files.read_json(path, ADVICE)
    content |= {field: value for field, value in _BEFORE.items() if field not in content}
    version = content.get("format_version")
    if type(version) is int and version != FORMAT_VERSION:
        raise UserError(
            f"{artifact} has artifact format {version}, this qwen-edge reads {FORMAT_VERSION}: "
            "install the qwen-edge that exported it, or export it again"
        )
    fault = first_fault(content, Manifest)
    if fault is None and content["backend"] not in _NEEDS:
        raise UserError(
            f"{artifact} was made for the backend {_shown(content['backend'])}: install the qwen-edge that "
            "knows it"
        )
    if fault is None:
        needed, fields = _NEEDS[content["backend"]]
        missing = [field for field in fields if field not in content]
        fault = next(iter(missing), None if content["context_length"] > 0 else "context_length")
    switched = [adapter["name"] for adapter in content.get("switched_adapters", [])] if fault is None else []
    if len(set(switched)) < len(switched) or not all(map(ADAPTER_NAME.fullmatch, switched)):
        fault = "switched_adapters"
    if fault is not None:
        raise UserError(f"{path} has no valid '{_shown(fault)}': {ADVICE}")
    listed = [needed]
    for further in content.get("further_graphs", []):
        listed += [*further["files"].values(), further["overlay"]]
    listed += [adapter["file"] for adapter in content.get("switched_adapters", [])]
    for name in listed:
        if name not in content["files"]:
            raise UserError(f"{path} does not list {_shown(name)}: export the artifact again")
    for name in content["files"]:
        if name in ("", ".", "..") or Path(name).name != name or "\\" in name:
            raise UserError(f"{path} names a file outside the folder: {_shown(name)}")
    return cast(Manifest, content)


def further_graphs(manifest: Manifest, provider: str) -> FurtherGraphs | None:
    """What an execution provider takes in place of the main graphs; None: it takes those."""
    found = (further for further in manifest.get("further_graphs", []) if provider in further["providers"])
    return next(found, None)


def check_files(artifact: Path, manifest: Manifest, every: bool = False) -> None:
    """Compare the files of `artifact` with its manifest: sizes always, SHA-256 of those under `HASHED_BYTES`.

    Args:
        every: compare the SHA-256 of every file, whatever its size.

    Raises:
        UserError: a file is missing, a link, or not as it was exported.
    """
    for name, entry in manifest["files"].items():
        path = artifact / name
        if os.path.islink(path):
            raise UserError(f"{artifact / MANIFEST} names a file outside the folder: {_shown(name)}")
        if not os.path.isfile(path):  # pathlib's raises where the system takes no such name
            raise UserError(f"{_shown(name)} is missing from {artifact}: {ADVICE}")
        changed = path.stat().st_size != entry["size"]
        if not changed and (every or entry["size"] < HASHED_BYTES):
            changed = files.sha256(path) != entry["sha256"]
        if changed:
            raise UserError(f"{path} changed since the export: {ADVICE}")


def listed_files(artifact: Path) -> set[str] | None:
    """Names of the files that an export put into `artifact`, the manifest's among them, whatever became of
    them since and of whatever format version; None where the folder has no manifest of ours."""
    try:
        content = files.read_json(artifact / MANIFEST, ADVICE)
    except UserError:
        return None
    return None if first_fault(content, _Ours) else {MANIFEST, *content["files"]}


def _shown(text: str) -> str:
    """For a message of one line."""
    return one_line(text[:_SHOWN])
