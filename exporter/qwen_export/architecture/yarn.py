"""Frequencies of the rotary embedding: as trained, or stretched over a longer context by YaRN.

Source: Peng et al., YaRN (2023); transformers' _compute_yarn_parameters. At a million positions the last bit
of a frequency turns an angle by 0.06, so these are transformers' float32 values to the bit.
"""

from __future__ import annotations

import math

import numpy as np

from qwen_export.architecture.models.qwen3_5 import TextConfig
from qwen_export.architecture.rope import RopeParameters


def inverse_frequencies(config: TextConfig) -> tuple[np.ndarray, float]:
    """float32 [rotary_dim / 2], radians per position, and the factor of cos and sin."""
    rope, dim = config.rope_parameters, config.rotary_dim
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    periods = (rope.rope_theta ** exponents.astype(np.float64)).astype(np.float32)
    extrapolated = np.float32(1) / periods
    if rope.rope_type == "default":
        return extrapolated, 1.0
    # Dimensions that turn often within the trained context keep their frequency, those that turn less than
    # about once are slowed down by the factor, and a ramp lies between.
    interpolated = np.float32(1) / (np.float32(rope.factor) * periods)
    low, high = _ramp(rope, dim, config.trained_positions)
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    kept = np.float32(1) - ramp
    return interpolated * (np.float32(1) - kept) + extrapolated * kept, _attention_factor(rope)


def _ramp(rope: RopeParameters, dim: int, trained_positions: int) -> tuple[float, float]:
    """Between which of the dim / 2 pairs the ramp lies."""

    def pair(turns: float) -> float:
        """The pair that turns so many times within the trained context."""
        return dim * math.log(trained_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high + 0.001 if low == high else high


def _attention_factor(rope: RopeParameters) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def shorter_context(limit: int, asked: int) -> str | None:
    """What is told where a profile asks for more tokens than the checkpoint was made for."""
    if asked <= limit:
        return None
    return (
        f"the context is {limit} tokens, the checkpoint's own limit, and not {asked}: "
        "--max-context reaches further, by YaRN"
    )
