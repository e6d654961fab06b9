"""The vision tower: its geometry, how images reach it, and its tensors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from qwen_profiles.schema import Role

from qwen_export.architecture.fields import Layers, Positions, Real, Size, TokenId
from qwen_export.architecture.tensors import Table, TensorRow, TensorSpec, expand, floats, matrix

VISION = "model.visual."  # begins the names of its tensors
_ROLE: Role = "vision"
_Positive = Annotated[Real, Field(gt=0)]


def _biased(name: str, out_size: str, *sizes: str | int) -> tuple[TensorRow, TensorRow]:
    """A projection and its bias."""
    weight = matrix(f"{VISION}{name}.weight", _ROLE, out_size, *sizes)
    return weight, floats(f"{VISION}{name}.bias", _ROLE, out_size)


def _norm(name: str) -> tuple[TensorRow, TensorRow]:
    """A LayerNorm's scale and bias."""
    scale = floats(f"{VISION}{name}.weight", _ROLE, "hidden_size")
    return scale, floats(f"{VISION}{name}.bias", _ROLE, "hidden_size")


_PATCH = ("in_channels", "temporal_patch_size", "patch_size", "patch_size")
TABLE: Table = (
    *_biased("patch_embed.proj", "hidden_size", *_PATCH),
    floats(f"{VISION}pos_embed.weight", _ROLE, "num_position_embeddings", "hidden_size"),
    *_norm("merger.norm"),
    *_biased("merger.linear_fc1", "merged_dim", "merged_dim"),
    *_biased("merger.linear_fc2", "out_hidden_size", "merged_dim"),
    *_norm("blocks.{block}.norm1"),
    *_norm("blocks.{block}.norm2"),
    *_biased("blocks.{block}.attn.qkv", "qkv_dim", "hidden_size"),
    *_biased("blocks.{block}.attn.proj", "hidden_size", "hidden_size"),
    *_biased("blocks.{block}.mlp.linear_fc1", "intermediate_size", "hidden_size"),
    *_biased("blocks.{block}.mlp.linear_fc2", "hidden_size", "intermediate_size"),
)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class PixelRange(_Frozen):
    """Pixels of an image after resizing, at least and at most; transformers calls them edges."""

    shortest_edge: Positions = 256 * 256
    longest_edge: Positions = 4096 * 4096


class ImageProcessor(_Frozen):
    """Settings of transformers' Qwen2VLImageProcessor; the defaults are those of the published Qwen3.5."""

    size: PixelRange = PixelRange()
    image_mean: tuple[Real, Real, Real] = (0.5, 0.5, 0.5)
    image_std: tuple[_Positive, _Positive, _Positive] = (0.5, 0.5, 0.5)
    rescale_factor: _Positive = 1 / 255

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

    depth: Layers = 27
    hidden_size: Size = 1152
    hidden_act: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    intermediate_size: Size = 4304
    num_heads: Size = 16
    in_channels: Literal[3] = 3
    patch_size: Size = 16
    spatial_merge_size: Size = 2
    temporal_patch_size: Literal[2] = 2
    out_hidden_size: Size = 3584
    num_position_embeddings: Size = 2304
    # Qwen3-VL hands features of inner blocks to the decoder; Qwen3.5 does not.
    deepstack_visual_indexes: tuple[()] = ()
    image_token_id: TokenId = 248056
    video_token_id: TokenId = 248057
    vision_start_token_id: TokenId = 248053
    vision_end_token_id: TokenId = 248054
    processor: ImageProcessor = ImageProcessor()

    @model_validator(mode="after")
    def _consistent(self) -> VisionConfig:
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError("hidden_size must be a multiple of 4 num_heads")
        if self.grid_side**2 != self.num_position_embeddings:
            raise ValueError("num_position_embeddings must be a square")
        return self

    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor of the tower that a checkpoint must hold."""
        return expand(TABLE, self, {"block": range(self.depth)})

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def qkv_dim(self) -> int:
        return 3 * self.hidden_size

    @property
    def merged_dim(self) -> int:
        """Values of the patches that the merger joins to one feature."""
        return self.hidden_size * self.spatial_merge_size**2

    @property
    def grid_side(self) -> int:
        """Rows, and columns, of the learned position embeddings."""
        return int(self.num_position_embeddings**0.5)

    @property
    def patch_dim(self) -> int:
        """Values of one patch: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2
