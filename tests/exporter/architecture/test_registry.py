"""Model types are files: one more file is one more model type."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from qwen_common.errors import UserError
from qwen_export.architecture import models, registry
from qwen_export.architecture.models.qwen3_5 import TextConfig
from qwen_export.architecture.models.qwen3_5_moe import MoeTextConfig
from qwen_export.architecture.models.qwen3_next import Qwen3NextConfig
from qwen_export.architecture.registry import config_class


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("qwen3_5", TextConfig),
        ("qwen3_5_text", TextConfig),
        ("qwen3_5_moe", MoeTextConfig),
        ("qwen3_5_moe_text", MoeTextConfig),
        ("qwen3_next", Qwen3NextConfig),
    ],
)
def test_a_model_type_is_found(model_type: str, expected: type[TextConfig]) -> None:
    assert config_class(model_type) is expected


@pytest.mark.parametrize("model_type", ["llama", "", "_text", "os", "qwen3_5.TextConfig", "../qwen3_5"])
def test_no_other_module_is_imported(model_type: str) -> None:
    with pytest.raises(
        UserError, match=r"supported are qwen3_5_text, qwen3_5, qwen3_5_moe_text, qwen3_5_moe, qwen3_next$"
    ):
        config_class(model_type)


def test_a_preview_of_qwen4_is_refused_with_its_reason() -> None:
    for model_type in ("qwen4_exp", "qwen4_exp_text"):
        with pytest.raises(UserError, match=r"'qwen4_exp\w*' is not supported \(Qwen3.8-Flash-Next.*indexer"):
            config_class(model_type)


def test_a_file_is_a_model_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "another.py").write_text(
        "from qwen_export.architecture.models.qwen3_5 import TextConfig\n"
        "class AnotherConfig(TextConfig):\n"
        "    linear_conv_kernel_dim: int = 7\n"
        "CONFIG = AnotherConfig\n"
    )
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    registry._names.cache_clear()
    try:
        found = config_class("another_text")(hidden_size=64)
        assert found.tensors()["model.layers.0.linear_attn.conv1d.weight"].shape[-1] == 7
    finally:
        registry._names.cache_clear()
        sys.modules.pop(f"{models.__name__}.another", None)
