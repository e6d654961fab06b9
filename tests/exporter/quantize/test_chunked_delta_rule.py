"""The chunked recurrence against transformers' and the reference's, which go token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from qwen_export.quantize.chunked_delta_rule import chunked_delta_rule
from qwen_export.reference import delta_rule
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

HEADS, KEY, VALUE = 3, 16, 24


def inputs(length: int, kind: str) -> list[np.ndarray]:
    rng = np.random.default_rng(length)

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal((2, length, HEADS, *shape), dtype=np.float32)

    query, key, value = random(KEY), random(KEY), random(VALUE)
    beta, log_decay = 1 / (1 + np.exp(-random())), -np.exp(2 * random() - 2)
    if kind == "keys that repeat":  # every token writes over what the one before it wrote
        key[:], beta[:], log_decay[:] = key[:, :1], 1, 0
    elif kind == "all forgotten":  # now and then; the sums of the logarithms grow large
        log_decay = np.where(rng.random(log_decay.shape) < 0.2, -1e4, log_decay * 1e-3).astype(np.float32)
    query, key = (part / np.sqrt((part * part).sum(-1, keepdims=True)) for part in (query, key))
    return [query * np.float32(KEY**-0.5), key, value, beta, log_decay]


@pytest.mark.parametrize("kind", ["random", "keys that repeat", "all forgotten"])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_chunks_change_nothing(length: int, kind: str) -> None:
    given = inputs(length, kind)
    query, key, value, beta, log_decay = (torch.from_numpy(part).double() for part in given)
    theirs, _ = torch_recurrent_gated_delta_rule(
        query * KEY**0.5,
        key,
        value,
        log_decay,
        beta,
        initial_state=None,
        output_final_state=False,
        use_qk_l2norm_in_kernel=False,
    )
    for found in (chunked_delta_rule(*given), delta_rule(*given)):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, theirs.numpy(), atol=2e-6)
