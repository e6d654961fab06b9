"""Which form a checkpoint declares; those that the export does not read, each by name, with the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen_common.errors import UserError

from qwen_export.checkpoint.mlx import is_mlx

_ADAPTER_CONFIG = "adapter_config.json"
_MODELOPT_CONFIG = "hf_quant_config.json"
_UNQUANTISED = "give the checkpoint in bf16 that it was made from, or its FP8, GPTQ or AWQ edition"
# By `quant_method`: whose it is, and what to do.
_METHODS = {
    "aqlm": ("AQLM", _UNQUANTISED),
    "eetq": ("EETQ", _UNQUANTISED),
    "exl2": ("EXL2 (ExLlamaV2)", _UNQUANTISED),
    "exl3": ("EXL3 (ExLlamaV3)", _UNQUANTISED),
    "higgs": ("HIGGS", _UNQUANTISED),
    "hqq": ("HQQ", _UNQUANTISED),
    "mxfp4": ("MXFP4", _UNQUANTISED),
    "nvfp4": ("NVFP4", _UNQUANTISED),
    "quanto": ("Quanto", _UNQUANTISED),
    "quark": ("AMD Quark", _UNQUANTISED),
    "vptq": ("VPTQ", _UNQUANTISED),
}
_MOST_SHOWN = 60  # characters of what somebody else's file says


def refuse_gguf(source: Path) -> None:
    """Raise a UserError for a folder that has nothing else, or a hub id named after the format; a file of it
    is opened elsewhere (`opening`)."""
    if source.is_dir():
        found = sorted(path for path in source.glob("*.gguf") if "mmproj" not in path.name)
        if found and not any(source.glob("*.safetensors")):
            raise UserError(f"{source} holds GGUF: give one of its files, such as {found[0]}")
    elif source.name.lower().endswith("gguf"):
        raise UserError(f"{source} holds GGUF: download one of its files, and give the path of that")


def refuse_adapter(root: Path) -> None:
    """transformers would put an adapter that lies beside a model into it, where PEFT is installed.

    Raises:
        UserError: there is one in the folder `root`; with the model that it says it is for.
    """
    found = [name for name in (_ADAPTER_CONFIG, "adapter_model.safetensors") if (root / name).exists()]
    if not found:
        return
    base = _field(root / _ADAPTER_CONFIG, "base_model_name_or_path")
    if (root / "config.json").is_file():
        raise UserError(
            f"{root} has an adapter ({found[0]}) beside the model, and its weights are without it: move the "
            "adapter's two files into a folder of their own, and name that with --adapter to merge it"
        )
    base = base if isinstance(base, str) and base else None
    raise UserError(
        f"{root} is an adapter{f' for {base}' if base else ''} and no model: merge it into "
        f"its model with qwen-export --profile NAME {base or 'CHECKPOINT'} --adapter {root}"
    )


def declared_quantization(root: Path, declared: Any, content: Any) -> Any:
    """`quantization_config` with a `quant_method`, also of those libraries that write none.

    Args:
        declared: `quantization_config` of config.json, which is `content`.
    """
    if _get(declared, "quant_method") is not None:
        return declared
    of_mlx = _get(content, "quantization") or declared
    if is_mlx(of_mlx):
        return {**of_mlx, "quant_method": "mlx"}
    if _get(declared, "load_in_4bit") or _get(declared, "load_in_8bit"):
        return {**declared, "quant_method": "bitsandbytes"}
    if declared is None and (root / _MODELOPT_CONFIG).is_file():
        found = _field(root / _MODELOPT_CONFIG, "quantization")
        return {**(found if isinstance(found, dict) else {}), "quant_method": "modelopt"}
    return declared


def refuse_other_quantization(declared: Any) -> None:
    """Weights in a form that is named here.

    Args:
        declared: `declared_quantization`.

    Raises:
        UserError: they are.
    """
    method = _get(declared, "quant_method")
    if not isinstance(method, str) or method.lower() not in _METHODS:
        return
    whose, way = _METHODS[method.lower()]
    detail = next(filter(None, (_get(declared, key) for key in ("quant_algo", "format", "quant_type"))), None)
    detail = f", {detail}"[:_MOST_SHOWN] if isinstance(detail, str) else ""
    raise UserError(
        f"config.json: the weights are quantised by {whose}{detail}, which is not supported yet: {way}"
    )


def _get(content: Any, key: str) -> Any:
    return content.get(key) if isinstance(content, dict) else None


def _field(path: Path, key: str) -> Any:
    """Of a JSON file that only makes a message better; None where it does not have it."""
    try:
        return _get(json.loads(path.read_text(encoding="utf-8")), key)
    except (OSError, ValueError, RecursionError):
        return None
