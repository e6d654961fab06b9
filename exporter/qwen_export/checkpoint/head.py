"""Which tensor lm_head is, where config.json says that it is the embedding.

As transformers' tie_weights decides: tied where only one of the two is stored, or both with the same values.
"""

from __future__ import annotations

import numpy as np

from qwen_export.architecture.models.qwen3_5 import EMBEDDING, LM_HEAD, TextConfig
from qwen_export.checkpoint.tensors.plain import FLOATS, PlainTensor
from qwen_export.checkpoint.tensors.tensor import CheckpointTensor

_COMPARED_BYTES = 16 * 1024 * 1024  # of each, at a time


def settle_head(config: TextConfig, tensors: dict[str, CheckpointTensor]) -> TextConfig:
    """`config` as the checkpoint's tensors make it; of two equal ones only the embedding stays in `tensors`.

    Raises:
        UserError: both are stored, and one holds NaN or Inf.
    """
    if not config.tie_word_embeddings or LM_HEAD not in tensors:
        return config
    if EMBEDDING not in tensors:
        tensors[EMBEDDING] = tensors.pop(LM_HEAD)
    elif _equal(tensors[EMBEDDING], tensors[LM_HEAD]):
        del tensors[LM_HEAD]
    else:
        return config.model_copy(update={"tie_word_embeddings": False})
    return config


def _equal(first: CheckpointTensor, second: CheckpointTensor) -> bool:
    """Whether both have the same values; the dtypes may differ."""
    both = first, second
    if first.shape != second.shape or any(
        isinstance(tensor, PlainTensor) and tensor.dtype not in FLOATS for tensor in both
    ):
        return False
    rows = first.shape[0]
    step = max(1, rows * _COMPARED_BYTES // max(1, *(tensor.nbytes for tensor in both)))
    for start in range(0, rows, step):
        left, right = (tensor.read(start, min(start + step, rows)).astype(np.float32) for tensor in both)
        if not np.array_equal(left, right):
            return False
    return True
