"""transformers' model to OpenVINO IR, by optimum-intel's tracing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

Finish = Callable[[Any, str], Any]


def convert(model: Any, folder: Path, finish: Finish) -> None:
    """Write the IR of `model`, a transformers.PreTrainedModel, to `folder`; weights keep their dtype.

    Args:
        finish: called with each openvino.Model that is traced, and the name of its file without the ending;
            what it returns is written.
    """
    import openvino
    import torch
    from optimum.exporters.openvino import convert as optimum

    def save(traced: Any, path: str, _: bool) -> None:
        openvino.save_model(finish(traced, Path(path).stem), path, compress_to_fp16=False)

    vision = hasattr(model.model, "visual")
    # optimum-intel gives a traced model to nobody before it has written it. It would also trace twice, in
    # three times the memory, to compare what weights that are not there come to.
    with (
        patch.object(optimum, "save_model", save),
        patch.object(optimum, "allow_skip_tracing_check", return_value=True),
    ):
        optimum.export_from_model(
            model=model,
            output=folder,
            task="image-text-to-text" if vision else "text-generation-with-past",
            stateful=True,
            patch_16bit_model=model.dtype != torch.float32,
        )
