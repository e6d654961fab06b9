"""The files of a checkpoint: its shards validated by index and header, and where in them each tensor lies."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from qwen_common.errors import UserError
from safetensors import SafetensorError, safe_open

from qwen_export.checkpoint.streamed import StreamedShards
from qwen_export.checkpoint.tensors.names import refuse_strange_names, tensor_name
from qwen_export.checkpoint.tensors.plain import PlainTensor

# Every dtype of the format whose elements are whole bytes. Which of them a weight may have is for its form to
# say: what no weight is may have any.
_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "BOOL": np.dtype(np.bool_),
    "C64": np.dtype("<c8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "I8": np.dtype("<i1"),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "U64": np.dtype("<u8"),
    "U8": np.dtype("<u1"),
}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def shard_tensors(root: Path, streamed: StreamedShards | None = None) -> dict[str, PlainTensor]:
    """Every stored tensor by the model's name for it, whatever the model was wrapped in; see `names`.

    Args:
        streamed: the shards, where they are fetched when they are read.

    Raises:
        UserError: a shard is missing, truncated, damaged or listed outside the folder, holds a dtype that is
            not supported, a tensor twice, or names that tell of an adapter or another model.
    """
    tensors: dict[str, PlainTensor] = {}
    stored_names: dict[str, str] = {}
    for shard, listed in _shards(root, streamed).items():
        path = streamed.path(shard) if streamed else root / shard
        stored = plain_tensors(path, streamed)
        for name in listed:
            if name not in stored:
                raise UserError(f"{_INDEX} says {shard} holds {name}, but it does not: download both again")
        refuse_strange_names(stored)
        for stored_name, tensor in stored.items():
            name = tensor_name(stored_name)
            if name in tensors:
                first = tensors[name].file.name
                where = f"both {first} and {shard}" if first != shard else f"{shard} under two names"
                if stored_names[name] != stored_name:
                    where += f" ({stored_names[name]} and {stored_name})"
                raise UserError(f"tensor {name} is in {where}: remove the wrong one")
            stored_names[name] = stored_name
            tensors[name] = replace(tensor, name=name)
    return tensors


def plain_tensors(path: Path, streamed: StreamedShards | None = None) -> dict[str, PlainTensor]:
    """The tensors of one safetensors file, by the names and with the dtypes that it gives them.

    Raises:
        UserError: it is truncated or damaged, written by MLX, or holds a dtype that is not supported.
    """
    entries, data = _streamed_header(path, streamed) if streamed else _header(path)
    tensors = {}
    for name, entry in entries.items():
        if entry["dtype"] not in _DTYPES:
            raise UserError(
                f"tensor {name} is {entry['dtype']}, which is not supported yet: give a checkpoint in "
                "bf16, fp16, fp32, FP8, GPTQ or AWQ"
            )
        dtype, offset = _DTYPES[entry["dtype"]], data + entry["data_offsets"][0]
        tensor = PlainTensor(name, dtype, tuple(entry["shape"]), path, offset)
        tensors[name] = replace(tensor, opened=streamed.open) if streamed else tensor
    return tensors


def _shards(root: Path, streamed: StreamedShards | None) -> dict[str, list[str]]:
    """Shard file name -> the tensors that the index expects in it ([] where there is no index)."""

    def there(shard: str) -> bool:
        return shard in streamed.sizes if streamed else (root / shard).is_file()

    index = root / _INDEX
    if there(_SINGLE):  # comes first in transformers too
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
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{_INDEX} is not a shard index ({error!r}): download it again") from error
    if not shards:
        raise UserError(f"{_INDEX} names no tensor: download it again")
    for shard in shards:
        # A plain file name; files of a hub snapshot may be links, which is the hub cache's own layout.
        if Path(shard).name != shard or "\\" in shard or shard in (".", ".."):
            raise UserError(f"{_INDEX} names a file outside the folder: {shard}")
        if not there(shard):
            raise UserError(f"shard {shard} is missing: download it into {root}")
    return shards


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Entries by tensor name, and where the data begins: after 8 bytes of length and a JSON header."""
    _metadata(path)
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return entries, 8 + length


def _streamed_header(path: Path, streamed: StreamedShards) -> tuple[dict[str, Any], int]:
    """The same of a file that is still to be fetched, and is validated then: here, what would mislead."""
    header = streamed.header(path.name)
    data, size = 8 + len(header), streamed.sizes[path.name]
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        for entry in entries.values():
            begin, end = entry["data_offsets"]
            count = math.prod(entry["shape"])
            if not (0 <= begin <= end <= size - data and count >= 0 and isinstance(entry["dtype"], str)):
                raise ValueError("tensors lie outside the file")
            if (dtype := _DTYPES.get(entry["dtype"])) and dtype.itemsize * count != end - begin:
                raise ValueError("sizes do not belong to the shapes")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"shard {path.name} is truncated or damaged ({error!r}): see its repository"
        ) from error
    return entries, data


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="numpy") as file:  # refuses whatever is malformed or truncated
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"shard {path.name} is truncated or damaged ({error}): download it again") from error


def written_by_mlx(root: Path, streamed: StreamedShards | None = None) -> bool:
    """Whether the shards say so; arguments as of `shard_tensors`.

    Raises:
        UserError: as `shard_tensors`, for the first shard.
    """
    first = next(iter(_shards(root, streamed)))
    if streamed:
        metadata = json.loads(streamed.header(first)).get("__metadata__") or {}
    else:
        metadata = _metadata(root / first)
    return metadata.get("format") == "mlx"
