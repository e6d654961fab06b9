"""Models by their config.json alone: the published family, a folder, or a hub id."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from qwen_export.architecture.registry import config_class
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.checkpoint.config import language_model_only, load_config, load_vision_config
from qwen_export.checkpoint.hub import download
from qwen_export.checkpoint.refused import refuse_adapter
from qwen_export.opening import is_gguf, open_checkpoint


def family() -> dict[str, Checkpoint]:
    """The published text models by name, smallest first; they have a configuration and no weights."""
    models = json.loads((files("qwen_export.planner") / "family.json").read_text(encoding="utf-8"))["models"]
    return {
        name: Checkpoint(Path(name), name, None, config_class(config["model_type"])(**config), {})
        for name, config in models.items()
    }


def configured(
    source: str, revision: str | None = None, text_only: bool = False, mmproj: Path | None = None
) -> Checkpoint:
    """A checkpoint as its config.json alone tells: a folder, a hub id, a GGUF file, or a name of `family`.

    Raises:
        UserError: none of these, or not a supported model.
    """
    if not mmproj and (known := family().get(source)) and not Path(source).exists():
        return known
    if is_gguf(source) or mmproj:
        return open_checkpoint(source, revision, text_only, mmproj)
    if Path(source).is_dir():
        root = Path(source).resolve()
    else:
        root = download(source, revision, "config.json", family())
    refuse_adapter(root)
    config = load_config(root)
    text_only = text_only or language_model_only(root)
    return Checkpoint(root, source, revision, config, {}, None if text_only else load_vision_config(root))
