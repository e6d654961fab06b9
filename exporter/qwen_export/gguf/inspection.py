"""What a GGUF file holds, and what an export keeps of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf.constants import GGMLQuantizationType

from qwen_export.gguf.opening import open_files
from qwen_export.gguf.tensors import FLOATS, KEPT

_EXPORT = {
    **dict.fromkeys(FLOATS, "floats"),
    **dict.fromkeys(KEPT, "codes kept"),
    GGMLQuantizationType.MXFP4: "experts' codes kept on the CPU",
}


def inspect_gguf(source: str, mmproj: Path | None = None) -> dict[str, Any]:
    """Geometry, tensors by type, tokenizer and template, and what is not read.

    Raises:
        UserError: as `opening.open_gguf`.
    """
    checkpoint, files = open_files(source, mmproj)
    types: dict[str, dict[str, Any]] = {}
    for tensor in (tensor for file in files for tensor in file.tensors.values()):
        entry = types.setdefault(tensor.kind.name, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor.nbytes
        entry["export"] = _EXPORT.get(tensor.kind, "dequantised")
    return {
        "file": files[0].path.name,
        "architecture": files[0].architecture,
        "model_type": checkpoint.model_type,
        "name": files[0].metadata.get("general.name"),
        "layers": checkpoint.config.num_hidden_layers,
        "hidden_size": checkpoint.config.hidden_size,
        "vocab_size": checkpoint.config.vocab_size,
        "context_length": checkpoint.config.positions,
        "vision": checkpoint.vision is not None,
        "mtp": checkpoint.config.mtp_num_hidden_layers,
        "chat_template": "tokenizer.chat_template" in files[0].metadata,
        "types": types,
        "notes": list(checkpoint.notes),
    }
