"""What a config.json leaves out is what transformers takes for it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel
from qwen_export.architecture.models.qwen3_5 import TextConfig
from qwen_export.architecture.models.qwen3_5_moe import MoeTextConfig
from qwen_export.architecture.models.qwen3_next import Qwen3NextConfig
from qwen_export.architecture.vision import VisionConfig
from transformers import Qwen3_5MoeTextConfig, Qwen3_5TextConfig
from transformers import Qwen3NextConfig as TheirNextConfig
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5VisionConfig

CONFIGS: dict[str, tuple[type[BaseModel], type[Any], int]] = {
    "dense": (TextConfig, Qwen3_5TextConfig, 20),
    "mixture": (MoeTextConfig, Qwen3_5MoeTextConfig, 22),
    "Qwen3-Next": (Qwen3NextConfig, TheirNextConfig, 26),
    "vision tower": (VisionConfig, Qwen3_5VisionConfig, 11),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_field(kind: str) -> None:
    config, theirs, least = CONFIGS[kind]
    found, expected, seen = config(), theirs(), 0
    for name in config.model_fields:
        if name != "rope_parameters" and hasattr(expected, name):
            ours, other = getattr(found, name), getattr(expected, name)
            assert (list(ours) if isinstance(ours, tuple) else ours) == other, name
            seen += 1
    assert seen >= least


@pytest.mark.parametrize("kind", ["dense", "mixture", "Qwen3-Next"])
def test_the_rotary_embedding(kind: str) -> None:
    config, theirs, _ = CONFIGS[kind]
    ours, expected = config().rope_parameters, theirs().rope_parameters
    for name in ("rope_type", "rope_theta", "partial_rotary_factor"):
        assert getattr(ours, name) == expected[name]
