"""Folders that are no checkpoint though they look like one: GGUF files, adapters; each with the way out."""

from __future__ import annotations

import json
from pathlib import Path

from qwen_common.errors import UserError

_ADAPTER_CONFIG = "adapter_config.json"


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
    if (root / "config.json").is_file():
        raise UserError(
            f"{root} has an adapter ({found[0]}) beside the model, and its weights are without it: move the "
            "adapter's two files into a folder of their own, and name that with --adapter to merge it"
        )
    base = _base(root / _ADAPTER_CONFIG)
    raise UserError(
        f"{root} is an adapter{f' for {base}' if base else ''} and no model: merge it into "
        f"its model with qwen-export --profile NAME {base or 'CHECKPOINT'} --adapter {root}"
    )


def _base(config: Path) -> str | None:
    """The model that an adapter says it is for; it only makes a message better."""
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    return base if isinstance(base, str) and base else None
