"""config.json and the image processor's file: the vision tower's geometry, and how images reach it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from qwen_common.errors import UserError

from qwen_export.architecture.text_config import in_words

# Where transformers' releases have put the image processor's settings, and the key that they lie under.
_PROCESSOR_FILES = (("processor_config.json", "image_processor"), ("preprocessor_config.json", None))


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class PixelRange(_Frozen):
    """Pixels of an image after resizing, at least and at most; transformers calls them edges."""

    shortest_edge: int = Field(default=256 * 256, gt=0)
    longest_edge: int = Field(default=4096 * 4096, gt=0)


class ImageProcessor(_Frozen):
    """Settings of transformers' Qwen2VLImageProcessor; the defaults are those of the published Qwen3.5."""

    size: PixelRange = PixelRange()
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255

    @model_validator(mode="before")
    @classmethod
    def _pixels_in_one_place(cls, values: dict[str, Any]) -> dict[str, Any]:
        """`min_pixels` and `max_pixels` are older names, and win where both are given."""
        size = dict(values.get("size") or {})
        for old, new in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            if values.get(old) is not None:
                size[new] = values[old]
        return {**values, "size": size}


class VisionConfig(_Frozen):
    """Geometry of the vision tower; names and defaults as in transformers' Qwen3_5VisionConfig.

    The token ids are the outer model's: image_token_id stands once in a prompt for each feature.
    """

    depth: int = Field(default=27, gt=0)
    hidden_size: int = Field(default=1152, gt=0)
    hidden_act: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    intermediate_size: int = Field(default=4304, gt=0)
    num_heads: int = Field(default=16, gt=0)
    in_channels: Literal[3] = 3
    patch_size: int = Field(default=16, gt=0)
    spatial_merge_size: int = Field(default=2, gt=0)
    temporal_patch_size: Literal[2] = 2
    out_hidden_size: int = Field(default=3584, gt=0)
    num_position_embeddings: int = Field(default=2304, gt=0)
    # Qwen3-VL hands features of inner blocks to the decoder; Qwen3.5 does not.
    deepstack_visual_indexes: tuple[()] = ()
    image_token_id: int = 248056
    video_token_id: int = 248057
    vision_start_token_id: int = 248053
    vision_end_token_id: int = 248054
    processor: ImageProcessor = ImageProcessor()

    @model_validator(mode="after")
    def _consistent(self) -> VisionConfig:
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError("hidden_size must be a multiple of 4 num_heads")
        if self.grid_side**2 != self.num_position_embeddings:
            raise ValueError("num_position_embeddings must be a square")
        return self

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def grid_side(self) -> int:
        """Rows, and columns, of the learned position embeddings."""
        return int(self.num_position_embeddings**0.5)

    @property
    def patch_dim(self) -> int:
        """Values of one patch: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


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


def vision_shapes(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the vision tower that a checkpoint of `config` must hold, with its shape."""
    hidden, inner, patch = config.hidden_size, config.intermediate_size, config.patch_size
    merged = hidden * config.spatial_merge_size**2

    def biased(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

    shapes = {
        **biased("patch_embed.proj", hidden, config.in_channels, config.temporal_patch_size, patch, patch),
        "pos_embed.weight": (config.num_position_embeddings, hidden),
        **biased("merger.norm", hidden),
        **biased("merger.linear_fc1", merged, merged),
        **biased("merger.linear_fc2", config.out_hidden_size, merged),
    }
    for block in range(config.depth):
        name = f"blocks.{block}"
        shapes |= {
            **biased(f"{name}.norm1", hidden),
            **biased(f"{name}.norm2", hidden),
            **biased(f"{name}.attn.qkv", 3 * hidden, hidden),
            **biased(f"{name}.attn.proj", hidden, hidden),
            **biased(f"{name}.mlp.linear_fc1", inner, hidden),
            **biased(f"{name}.mlp.linear_fc2", hidden, inner),
        }
    return {f"model.visual.{name}": shape for name, shape in shapes.items()}
