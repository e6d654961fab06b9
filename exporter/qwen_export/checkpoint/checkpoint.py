"""A Hugging Face checkpoint: its shards validated, and rows of its tensors on demand.

Files are read, not mapped: mapped pages would count in the process's memory, which an export promises to
bound.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from qwen_common.errors import UserError
from safetensors import SafetensorError, safe_open

from qwen_export.architecture.text_config import TextConfig, load_config, quantization_config
from qwen_export.architecture.vision_config import VisionConfig, load_vision_config
from qwen_export.checkpoint.sources import DTYPES, Source, TensorInfo, assemble

_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "LICENSE", "NOTICE"]
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# The text model inside a vision-language checkpoint has the names of a text-only one, with this prefix.
_WRAPPED, _PLAIN = "model.language_model.", "model."
MTP = "mtp."  # begins the names of the multi-token-prediction head's tensors


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, its shards validated.

    Attributes:
        root: the folder.
        source: what the user named: a folder or a hub id.
        revision: the commit that a hub id was resolved to; None for a folder.
        config: the text model's configuration.
        tensors: every tensor by name, text models' as `model.X` whatever they are wrapped in, and in the
            model's shapes whatever form they are stored in.
        vision: the vision tower's configuration; None where there is none, or it is left out.
        mtp_problem: why the multi-token-prediction head is not among the tensors, though the shards have one.
    """

    root: Path
    source: str
    revision: str | None
    config: TextConfig
    tensors: Mapping[str, Source]
    vision: VisionConfig | None = None
    mtp_problem: str | None = None

    @classmethod
    def open(cls, source: str, revision: str | None = None, text_only: bool = False) -> Checkpoint:
        """Open a local folder, or download a hub id such as `Qwen/Qwen3.5-0.8B`. Reads no weight.

        Args:
            text_only: leave the vision tower out.

        Raises:
            UserError: no such folder or hub id, not a supported model, a shard missing, truncated, listed
                outside the folder or linked to from it, or tensors in a form that is not supported.
        """
        local = Path(source)
        _refuse_gguf(local)
        if local.is_dir():
            root, commit = local.resolve(), None
        else:
            root, commit = _download(source, revision)
        _refuse_links_out(root)
        config = load_config(root)
        stored, quantization = dict(_tensors(root)), quantization_config(root)
        head = {name: stored.pop(name) for name in list(stored) if name.startswith(MTP)}
        tensors, mtp_problem = assemble(stored, quantization), None
        try:
            tensors |= assemble(head, quantization)
        except UserError as error:  # the model does without it
            mtp_problem = str(error)
        vision = None if text_only else load_vision_config(root)
        return cls(root, source, commit, config, tensors, vision, mtp_problem)

    @property
    def model_type(self) -> str:
        """As ONNX Runtime GenAI calls it: with a vision tower, without `_text` at its end."""
        return self.config.model_type.removesuffix("_text") if self.vision else self.config.model_type

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Compare names and shapes with what the configuration asks for.

        Raises:
            UserError: a tensor is missing or has another shape; names the first one.
        """
        for name, shape in expected.items():
            if name not in self.tensors:
                raise UserError(f"the checkpoint has no tensor {name}: is a shard missing from {self.root}?")
            found = self.tensors[name].shape
            if found != shape:
                raise UserError(
                    f"tensor {name} has shape {found} where config.json says {shape}: "
                    "config and weights are not of the same model"
                )

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of axis 0 of one tensor; see `Source.read`."""
        return self.tensors[name].read(start, stop)


def _download(source: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download

    looks_local = source.startswith((".", "~", "/")) or source.count("/") != 1 or "\\" in source
    if looks_local:
        raise UserError(f"no folder {source}: give a checkpoint folder or a hub id like Qwen/Qwen3.5-0.8B")
    try:
        root = Path(snapshot_download(source, revision=revision, allow_patterns=_HUB_FILES)).resolve()
    except Exception as error:  # the library's own errors, and those of whichever HTTP client it uses
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"no folder {source}, and the hub did not give it ({reason}): check name and network"
        ) from error
    return root, root.name  # a snapshot's folder is named after its commit


def _refuse_gguf(source: Path) -> None:
    """A file, a folder that has nothing else, or a hub id that is named after the format."""
    if source.is_dir():
        is_gguf = any(source.glob("*.gguf")) and not any(source.glob("*.safetensors"))
    else:
        is_gguf = source.name.lower().endswith("gguf")
    if is_gguf:
        raise UserError(f"{source} holds GGUF, which is not supported yet: give the safetensors checkpoint")


def _refuse_links_out(root: Path) -> None:
    """No link brings a file from elsewhere into an artifact; a hub snapshot links into its own cache."""
    homes = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    for pattern in _HUB_FILES:
        for path in root.glob(pattern):
            target = path.resolve()
            if not any(target.is_relative_to(home) for home in homes):
                raise UserError(f"{path.name} is a link out of {root}: put the file itself there")


def _tensors(root: Path) -> Iterator[tuple[str, TensorInfo]]:
    """Every stored tensor of the text model, by its canonical name."""
    owner: dict[str, str] = {}
    for shard, listed in _shards(root).items():
        entries, data = _header(root / shard)
        for name in listed:
            if name not in entries:
                raise UserError(f"{_INDEX} says {shard} holds {name}, but it does not: download both again")
        for stored_name, entry in entries.items():
            name = stored_name
            if name.startswith(_WRAPPED):
                name = _PLAIN + name.removeprefix(_WRAPPED)
            if name in owner:
                raise UserError(f"tensor {name} is in both {owner[name]} and {shard}: remove the wrong one")
            if entry["dtype"] not in DTYPES:
                raise UserError(
                    f"tensor {name} is {entry['dtype']}, which is not supported yet: give a checkpoint in "
                    "bf16, fp16, fp32, FP8, GPTQ or AWQ"
                )
            owner[name] = shard
            dtype, offset = DTYPES[entry["dtype"]], data + entry["data_offsets"][0]
            yield name, TensorInfo(name, dtype, tuple(entry["shape"]), root / shard, offset)


def _shards(root: Path) -> dict[str, list[str]]:
    """Shard file name -> the tensors that the index expects in it ([] where there is no index)."""
    index = root / _INDEX
    if (root / _SINGLE).is_file():  # comes first in transformers too
        return {_SINGLE: []}
    if not index.is_file():
        if any(root.glob("*.bin")):
            raise UserError(f"{root} holds pickled weights, which are never loaded: convert to safetensors")
        raise UserError(f"{root} has neither {_SINGLE} nor {_INDEX}: is the download complete?")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[str, list[str]] = {}
        for name, shard in weight_map.items():
            shards.setdefault(str(shard), []).append(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{_INDEX} is not a shard index ({error!r}): download it again") from error
    for shard in shards:
        # A plain file name; files of a hub snapshot may be links, which is the hub cache's own layout.
        if Path(shard).name != shard or "\\" in shard or shard in (".", ".."):
            raise UserError(f"{_INDEX} names a file outside the folder: {shard}")
        if not (root / shard).is_file():
            raise UserError(f"shard {shard} is missing: download it into {root}")
    return shards


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Entries by tensor name, and where the data begins: after 8 bytes of length and a JSON header."""
    try:
        with safe_open(path, framework="numpy"):  # refuses whatever is malformed or truncated
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"shard {path.name} is truncated or damaged ({error}): download it again") from error
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return entries, 8 + length
