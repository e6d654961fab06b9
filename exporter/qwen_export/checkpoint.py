"""A Hugging Face checkpoint: where its tensors lie, and rows of them on demand.

The one place that reads weights. Files are read, not mapped: mapped pages would count in the process's
memory, which an export promises to bound.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from qwen_profiles.errors import UserError
from safetensors import SafetensorError, safe_open

from qwen_export.config import TextConfig, load_config

_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "merges.txt"]
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# The text model inside a vision-language checkpoint has the names of a text-only one, with this prefix.
_WRAPPED, _PLAIN = "model.language_model.", "model."
# Its other models: vision tower, multi-token prediction.
_IGNORED = ("model.visual.", "mtp.")
_BFLOAT16_EXPONENT = 0x7F80


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` from `offset` of `file`, row by row."""

    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, its shards validated.

    Attributes:
        root: the folder.
        source: what the user named: a folder or a hub id.
        revision: the commit that a hub id was resolved to; None for a folder.
        config: the text model's configuration.
        tensors: every tensor by name, text models' as `model.X` whatever they are wrapped in.
    """

    root: Path
    source: str
    revision: str | None
    config: TextConfig
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, source: str, revision: str | None = None) -> Checkpoint:
        """Open a local folder, or download a hub id such as `Qwen/Qwen3.5-0.8B`. Reads no weight.

        Raises:
            UserError: no such folder or hub id, not a supported model, or a shard missing, truncated, listed
                outside the folder, linked to from it, or of an unsupported dtype.
        """
        local = Path(source)
        if local.is_dir():
            root, commit = local.resolve(), None
        else:
            root, commit = _download(source, revision)
        _refuse_links_out(root)
        return cls(root, source, commit, load_config(root), dict(_tensors(root)))

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
        """Rows `start` to `stop` of axis 0, in the stored dtype. Safe to call from several threads.

        Raises:
            UserError: the rows hold NaN or Inf, or the file has become shorter.
        """
        info = self.tensors[name]
        rows = np.empty((stop - start, *info.shape[1:]), info.dtype)
        row_bytes = info.nbytes // info.shape[0]
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.offset + start * row_bytes)
            wanted = rows.reshape(-1).view(np.uint8).data
            while len(wanted) and (count := file.readinto(wanted)):
                wanted = wanted[count:]
        if len(wanted):
            raise UserError(f"shard {info.file.name} ends inside tensor {name}: download it again")
        if not _all_finite(rows):
            raise UserError(
                f"tensor {name} in {info.file.name} holds NaN or Inf: download the checkpoint again"
            )
        return rows


def _all_finite(rows: np.ndarray) -> bool:
    if rows.dtype == ml_dtypes.bfloat16:  # integer tests are many times quicker than ml_dtypes' isfinite
        exponent = rows.view(np.uint16) & np.uint16(_BFLOAT16_EXPONENT)
        return bool((exponent != _BFLOAT16_EXPONENT).all())
    return bool(np.isfinite(rows).all())


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


def _refuse_links_out(root: Path) -> None:
    """No link brings a file from elsewhere into an artifact; a hub snapshot links into its own cache."""
    homes = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    for pattern in _HUB_FILES:
        for path in root.glob(pattern):
            target = path.resolve()
            if not any(target.is_relative_to(home) for home in homes):
                raise UserError(f"{path.name} is a link out of {root}: put the file itself there")


def _tensors(root: Path) -> Iterator[tuple[str, TensorInfo]]:
    """Every tensor of the text model, by its canonical name."""
    owner: dict[str, str] = {}
    for shard, listed in _shards(root).items():
        entries, data = _header(root / shard)
        for name in listed:
            if name not in entries:
                raise UserError(f"{_INDEX} says {shard} holds {name}, but it does not: download both again")
        for stored_name, entry in entries.items():
            if stored_name.startswith(_IGNORED):
                continue
            name = stored_name
            if name.startswith(_WRAPPED):
                name = _PLAIN + name.removeprefix(_WRAPPED)
            if name in owner:
                raise UserError(f"tensor {name} is in both {owner[name]} and {shard}: remove the wrong one")
            if entry["dtype"] not in _DTYPES:
                raise UserError(
                    f"tensor {name} is {entry['dtype']}, which is not supported yet: give a "
                    f"{', '.join(_DTYPES)} checkpoint"
                )
            owner[name] = shard
            offset = data + entry["data_offsets"][0]
            yield name, TensorInfo(_DTYPES[entry["dtype"]], tuple(entry["shape"]), root / shard, offset)


def _shards(root: Path) -> dict[str, list[str]]:
    """Shard file name -> the tensors that the index expects in it ([] where there is no index)."""
    index = root / _INDEX
    if (root / _SINGLE).is_file():  # comes first in transformers too
        return {_SINGLE: []}
    if not index.is_file():
        if any(root.glob("*.gguf")):
            raise UserError(f"{root} holds GGUF, which is not supported yet: give the safetensors checkpoint")
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
