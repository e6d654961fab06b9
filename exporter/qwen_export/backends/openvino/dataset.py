"""Text for the compressions that look at a model's activations, as inputs of its IR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from qwen_runtime.tokenizer import Tokenizer

from qwen_export.quantize.calibration import read_text, samples_of

_SAMPLES = 16  # at most


class CalibrationSamples:
    """Samples of a text by a checkpoint's tokenizer.

    Args:
        source: folder of the tokenizer.
        embedding: the model's, a torch.Tensor [vocabulary, hidden], for IRs that take embedded tokens.
        text: UTF-8; None takes the shipped one.

    Raises:
        UserError: the text cannot be read, or has less than one sample.
    """

    def __init__(self, source: Path, embedding: Any, text: Path | None) -> None:
        self._samples = samples_of(Tokenizer.open(source).encode(read_text(text)), _SAMPLES, text)
        self._embedding = embedding

    def dataset(self, model: Any) -> Any:
        """nncf.Dataset for a language model, an openvino.Model."""
        import nncf

        return nncf.Dataset([self._inputs(model, sample) for sample in self._samples])

    def _inputs(self, model: Any, ids: np.ndarray) -> dict[str, np.ndarray]:
        import torch

        values: dict[str, np.ndarray] = {
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "beam_idx": np.zeros(1, np.int32),
        }
        for given in model.inputs:
            name, shape = given.any_name, given.partial_shape
            if name == "input_ids":
                values[name] = ids[None]
            elif name == "inputs_embeds":
                values[name] = self._embedding[torch.from_numpy(ids)].float().numpy()[None]
            elif name == "position_ids":  # [1, tokens], or as many times as there are kinds of positions
                kinds = () if len(shape) == 2 else (shape[0].get_length(),)
                values[name] = np.broadcast_to(np.arange(len(ids)), (*kinds, 1, len(ids))).astype(np.int64)
        return values
