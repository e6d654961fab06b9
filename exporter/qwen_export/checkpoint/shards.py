"""The files of a checkpoint: its shards validated by index and header, and where in them each tensor lies."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from qwen_common.errors import UserError
from safetensors import SafetensorError, safe_open

from qwen_export.checkpoint.plain import PlainTensor

_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I32": np.dtype("<i4"),
}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# The text model inside a vision-language checkpoint has the names of a text-only one, with this prefix.
_WRAPPED, _PLAIN = "model.language_model.", "model."


def shard_tensors(root: Path) -> dict[str, PlainTensor]:
    """Every stored tensor by its name, text models' as `model.X` whatever they are wrapped in.

    Raises:
        UserError: a shard is missing, truncated, damaged or listed outside the folder, or holds a dtype that
            is not supported or a tensor that another shard has too.
    """
    tensors: dict[str, PlainTensor] = {}
    for shard, listed in _shards(root).items():
        entries, data = _header(root / shard)
        for name in listed:
            if name not in entries:
                raise UserError(f"{_INDEX} says {shard} holds {name}, but it does not: download both again")
        for stored_name, entry in entries.items():
            name = stored_name
            if name.startswith(_WRAPPED):
                name = _PLAIN + name.removeprefix(_WRAPPED)
            if name in tensors:
                first = tensors[name].file.name
                raise UserError(f"tensor {name} is in both {first} and {shard}: remove the wrong one")
            if entry["dtype"] not in _DTYPES:
                raise UserError(
                    f"tensor {name} is {entry['dtype']}, which is not supported yet: give a checkpoint in "
                    "bf16, fp16, fp32, FP8, GPTQ or AWQ"
                )
            dtype, offset = _DTYPES[entry["dtype"]], data + entry["data_offsets"][0]
            tensors[name] = PlainTensor(name, dtype, tuple(entry["shape"]), root / shard, offset)
    return tensors


def refuse_gguf(source: Path) -> None:
    """Raise a UserError for a file, a folder that has nothing else, or a hub id named after the format."""
    if source.is_dir():
        is_gguf = any(source.glob("*.gguf")) and not any(source.glob("*.safetensors"))
    else:
        is_gguf = source.name.lower().endswith("gguf")
    if is_gguf:
        raise UserError(f"{source} holds GGUF, which is not supported yet: give the safetensors checkpoint")


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
