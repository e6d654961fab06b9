"""config.json and the image processor's file of a checkpoint, as the architecture's configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from qwen_common.errors import UserError

from qwen_export.architecture.models.qwen3_5 import TextConfig
from qwen_export.architecture.registry import config_class, text_section
from qwen_export.architecture.vision import VisionConfig

# Where transformers' releases have put the image processor's settings, and the key that they lie under.
_PROCESSOR_FILES = (("processor_config.json", "image_processor"), ("preprocessor_config.json", None))


def load_config(folder: Path) -> TextConfig:
    """The text model's configuration from `folder`/config.json.

    Raises:
        UserError: it is missing or malformed, of a model type that is not supported, or contradicts itself.
    """
    path, content = _content(folder)
    try:
        config = config_class(str(content["model_type"]))
        values = text_section(content)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a model configuration ({error!r}): download it again") from error
    if "tie_word_embeddings" in content:  # the outer model owns lm_head
        values["tie_word_embeddings"] = content["tie_word_embeddings"]
    try:
        return config(**values)
    except ValidationError as error:
        raise UserError(f"{path}: {in_words(error)}") from error


def load_vision_config(folder: Path) -> VisionConfig | None:
    """The vision tower's configuration from the checkpoint in `folder`; None for a text-only one.

    Raises:
        UserError: it is malformed, contradicts itself, or asks for what is not supported.
    """
    path = folder / "config.json"
    outer = _read_json(path)
    section = outer.get("vision_config")
    if not section:
        return None
    ids = {name: value for name, value in outer.items() if name.endswith("_token_id")}
    try:
        config = VisionConfig(**{**section, **ids, "processor": _processor_settings(folder)})
    except ValidationError as error:
        raise UserError(f"{path}: vision_config.{in_words(error)}") from error
    if config.out_hidden_size != (hidden := (outer.get("text_config") or {}).get("hidden_size")):
        raise UserError(
            f"{path}: vision_config.out_hidden_size is {config.out_hidden_size}, but text_config.hidden_size "
            f"is {hidden}"
        )
    return config


def quantization_config(folder: Path) -> Any:
    """`quantization_config` of `folder`/config.json, wherever it stands; None if the weights are floats."""
    _, content = _content(folder)
    return content.get("quantization_config", text_section(content).get("quantization_config"))


def _content(folder: Path) -> tuple[Path, dict[str, Any]]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json: give the folder of a Hugging Face checkpoint")
    try:
        return path, dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a model configuration ({error!r}): download it again") from error


def _processor_settings(folder: Path) -> dict[str, Any]:
    for name, key in _PROCESSOR_FILES:
        if (folder / name).is_file():
            content = _read_json(folder / name)
            settings = content.get(key) if key else content
            if isinstance(settings, dict):
                return settings
    return {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path.name} is not valid JSON: download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path.name} is not a JSON object: download it again")
    return content


def in_words(error: ValidationError) -> str:
    """The first thing that is wrong, with the field it is wrong in."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "literal_error":
        message += f" ({first['input']!r} is not supported yet)"
    return f"{field}: {message}" if field else message
