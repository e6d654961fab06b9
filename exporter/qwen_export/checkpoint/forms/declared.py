"""Which form a checkpoint declares; those that the export does not read, each by name, with the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen_common.errors import UserError
from qwen_common.files import read_json

from qwen_export.checkpoint.forms.mlx import is_mlx

_MODELOPT_CONFIG = "hf_quant_config.json"
_AGAIN = "download the checkpoint again"
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


def declared_quantization(root: Path, declared: Any, content: Any) -> Any:
    """`quantization_config` with a `quant_method`, also of those libraries that write none.

    Args:
        declared: `quantization_config` of config.json, which is `content`.

    Raises:
        UserError: the file in which ModelOpt says it cannot be read.
    """
    if _get(declared, "quant_method") is not None:
        return declared
    of_mlx = _get(content, "quantization") or declared
    if is_mlx(of_mlx):
        return {**of_mlx, "quant_method": "mlx"}
    if _get(declared, "load_in_4bit") or _get(declared, "load_in_8bit"):
        return {**declared, "quant_method": "bitsandbytes"}
    if declared is None and (root / _MODELOPT_CONFIG).is_file():
        found = read_json(root / _MODELOPT_CONFIG, _AGAIN).get("quantization")
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
