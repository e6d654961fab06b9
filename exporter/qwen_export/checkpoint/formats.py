"""Forms of a checkpoint that the export does not read: each by its name, with the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen_common.errors import UserError

_ADAPTER_CONFIG = "adapter_config.json"
_MODELOPT_CONFIG = "hf_quant_config.json"
_UNQUANTISED = "give the checkpoint in bf16 that it was made from, or its FP8, GPTQ or AWQ edition"
_GPTQ_OR_AWQ = "save it again with --format auto_gptq or auto_awq, or give the checkpoint in bf16"
_DEQUANTIZE = "load it with transformers, call dequantize(), save that, and give its folder"
# By `quant_method`: whose it is, and what to do.
_METHODS = {
    "aqlm": ("AQLM", _UNQUANTISED),
    "auto-round": ("AutoRound", _GPTQ_OR_AWQ),
    "bitsandbytes": ("bitsandbytes", _DEQUANTIZE),
    "eetq": ("EETQ", _UNQUANTISED),
    "exl2": ("EXL2 (ExLlamaV2)", _UNQUANTISED),
    "exl3": ("EXL3 (ExLlamaV3)", _UNQUANTISED),
    "higgs": ("HIGGS", _UNQUANTISED),
    "hqq": ("HQQ", _UNQUANTISED),
    "intel/auto-round": ("AutoRound", _GPTQ_OR_AWQ),
    "modelopt": ("NVIDIA ModelOpt", _UNQUANTISED),
    "modelopt_fp4": ("NVIDIA ModelOpt's NVFP4", _UNQUANTISED),
    "mxfp4": ("MXFP4", _UNQUANTISED),
    "nvfp4": ("NVFP4", _UNQUANTISED),
    "quanto": ("Quanto", _UNQUANTISED),
    "quark": ("AMD Quark", _UNQUANTISED),
    "torchao": ("torchao", _UNQUANTISED),
    "vptq": ("VPTQ", _UNQUANTISED),
}
_MOST_SHOWN = 60  # characters of what somebody else's file says


def refuse_gguf(source: Path) -> None:
    """Raise a UserError for a file, a folder that has nothing else, or a hub id named after the format."""
    if source.is_dir():
        is_gguf = any(source.glob("*.gguf")) and not any(source.glob("*.safetensors"))
    else:
        is_gguf = source.name.lower().endswith("gguf")
    if is_gguf:
        raise UserError(f"{source} holds GGUF, which is not supported yet: give the safetensors checkpoint")


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


def refuse_other_quantization(root: Path, declared: Any, content: Any) -> None:
    """Weights in a form that is named here.

    Args:
        declared: `quantization_config` of config.json, which is `content`.

    Raises:
        UserError: they are.
    """
    file, method = "config.json", _get(declared, "quant_method")
    if method is None and declared is None and (root / _MODELOPT_CONFIG).is_file():
        file, method = _MODELOPT_CONFIG, "modelopt"
        declared = _field(root / file, "quantization")
    if method is None and (_get(declared, "load_in_4bit") or _get(declared, "load_in_8bit")):
        method = "bitsandbytes"
    if method is None and _is_mlx(_get(content, "quantization") or declared):
        raise UserError(
            "config.json, quantization: the weights are MLX's, which no other runtime reads: " + _UNQUANTISED
        )
    if not isinstance(method, str) or method.lower() not in _METHODS:
        return
    whose, way = _METHODS[method.lower()]
    detail = next(filter(None, (_get(declared, key) for key in ("quant_algo", "format", "quant_type"))), None)
    detail = f", {detail}"[:_MOST_SHOWN] if isinstance(detail, str) else ""
    raise UserError(
        f"{file}: the weights are quantised by {whose}{detail}, which is not supported yet: {way}"
    )


def _is_mlx(quantization: Any) -> bool:
    return isinstance(quantization, dict) and {"group_size", "bits"} <= quantization.keys()


def _get(content: Any, key: str) -> Any:
    return content.get(key) if isinstance(content, dict) else None


def _field(path: Path, key: str) -> Any:
    """Of a JSON file that only makes a message better; None where it does not have it."""
    try:
        return _get(json.loads(path.read_text(encoding="utf-8")), key)
    except (OSError, ValueError, RecursionError):
        return None
