"""transformers' model to OpenVINO IR, by optimum-intel's tracing."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def convert(model: Any, folder: Path) -> None:
    """Write the IR of `model`, a transformers.PreTrainedModel, to `folder`; weights keep their dtype."""
    import torch
    from optimum.exporters.openvino.convert import export_from_model

    vision = hasattr(model.model, "visual")
    export_from_model(
        model=model,
        output=folder,
        task="image-text-to-text" if vision else "text-generation-with-past",
        stateful=True,
        patch_16bit_model=model.dtype != torch.float32,
    )
