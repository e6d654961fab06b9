"""Greedy tokens of ONNX Runtime GenAI beside those of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime_genai as og
import torch


def check_greedy_tokens(loaded: og.Model, reference: Any) -> None:
    """After 100 random tokens below 2,048 come the 32 of `reference`, or as many as end with token 1."""
    ids = np.random.default_rng(1).integers(2, 2048, 100)
    with torch.no_grad():
        expected = reference.generate(
            torch.tensor(ids)[None], max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, 100:].tolist()
    parameters = og.GeneratorParams(loaded)
    parameters.set_search_options(do_sample=False, max_length=132)
    generator = og.Generator(loaded, parameters)
    generator.append_tokens(ids.astype(np.int32))
    found: list[int] = []
    while len(found) < 32 and not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    assert found == expected[: len(found)]
    assert len(found) == 32 or found[-1] == 1
