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
from qwen_export.checkpoint.forms.declared import declared_quantization, refuse_other_quantization

# Where transformers' releases have put the image processor's settings, and the key that they lie under.
_PROCESSOR_FILES = (("processor_config.json", "image_processor"), ("preprocessor_config.json", None))

_AGAIN = "download it again"
_MOST_SHOWN = 60  # characters of a wrong value


def load_config(folder: Path) -> TextConfig:
    """The text model's configuration from `folder`/config.json.

    Raises:
        UserError: it is missing or malformed, of a model type that is not supported, or contradicts itself.
    """
    path, content = _content(folder)
    config, values = config_class(str(content.get("model_type"))), _text(path, content)
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
    path, outer = _content(folder)
    section = outer.get("vision_config")
    if not section:
        return None
    if not isinstance(section, dict):
        raise UserError(f"{path}: vision_config is no object: {_AGAIN}")
    ids = {name: value for name, value in outer.items() if name.endswith("_token_id")}
    try:
        config = VisionConfig(**{**section, **ids, "processor": _processor_settings(folder)})
    except ValidationError as error:
        raise UserError(f"{path}: vision_config.{in_words(error)}") from error
    if config.out_hidden_size != (hidden := _text(path, outer).get("hidden_size")):
        raise UserError(
            f"{path}: vision_config.out_hidden_size is {config.out_hidden_size}, but text_config.hidden_size "
            f"is {hidden}"
        )
    return config


def language_model_only(folder: Path) -> bool:
    """Whether config.json says that a vision-language model is to be taken without its tower, as vLLM does.

    Raises:
        UserError: as `load_config`, for the file.
    """
    path, content = _content(folder)
    found = content.get("language_model_only", False)
    if not isinstance(found, bool):
        raise UserError(f"{path}: language_model_only is neither true nor false: {_AGAIN}")
    return found


def quantization_config(folder: Path) -> Any:
    """How the weights in `folder` are quantised, as `quantization_config` of config.json says, wherever it
    stands; None if they are floats.

    Raises:
        UserError: as `load_config`, for the file, or the weights are in a form that `declared` names.
    """
    path, content = _content(folder)
    found = content.get("quantization_config", _text(path, content).get("quantization_config"))
    declared = declared_quantization(folder, found, content)
    refuse_other_quantization(declared)
    return declared


def _content(folder: Path) -> tuple[Path, dict[str, Any]]:
    path = folder / "config.json"
    if not (path.is_file() or path.is_dir()):  # a folder is told as what it is, a pipe would be waited for
        raise UserError(f"{folder} has no config.json: give the folder of a Hugging Face checkpoint")
    return path, _read_json(path)


def _text(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    try:
        return text_section(content)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a model configuration ({error!r}): {_AGAIN}") from error


def _processor_settings(folder: Path) -> dict[str, Any]:
    for name, key in _PROCESSOR_FILES:
        if (folder / name).is_file():
            content = _read_json(folder / name)
            settings = content.get(key) if key else content
            if isinstance(settings, dict):
                return settings
    return {}


def _read_json(path: Path) -> dict[str, Any]:
    """NaN and Infinity are read: which number it is that may not be one, the fields say."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): {_AGAIN}") from error
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{path} is not valid JSON ({why}): {_AGAIN}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object: {_AGAIN}")
    return content


def in_words(error: ValidationError) -> str:
    """The first thing that is wrong, with the field it is wrong in."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "literal_error":
        message += f" ({_shown(first['input'])} is not supported yet)"
    elif field and first["type"] != "value_error" and not isinstance(first["input"], dict):
        message += f", not {_shown(first['input'])}"
    return f"{field}: {message}" if field else message


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= _MOST_SHOWN else f"{shown[:_MOST_SHOWN]}..."
