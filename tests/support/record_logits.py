"""Logits of the shipped checkpoints as transformers computes them, for tests without it.

Run as a program it writes them anew: `python -m tests.support.record_logits`.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.support.checkpoints import TINY, TINY_MOE, TINY_VL

CHECKPOINTS = {path.name: path for path in (TINY, TINY_MOE, TINY_VL)}
_FOLDER = Path(__file__).parents[1] / "exporter" / "recorded"
_TOKENS, _EVERY = 48, 16


class Recorded(NamedTuple):
    """Of one checkpoint.

    Attributes:
        ids: int64 [tokens].
        columns: int64 [columns], tokens of the vocabulary.
        logits: float32 [tokens, columns].
        best: int64 [tokens], the likeliest token of all.
    """

    ids: np.ndarray
    columns: np.ndarray
    logits: np.ndarray
    best: np.ndarray


def recorded(name: str) -> Recorded:
    """That of the checkpoint `name`."""
    with np.load(_FOLDER / f"{name}.npz") as arrays:
        return Recorded(*(arrays[field] for field in Recorded._fields))


def record(name: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(CHECKPOINTS[name], dtype=torch.float32).eval()
    vocabulary = model.config.get_text_config().vocab_size
    ids = np.random.default_rng(11).integers(0, vocabulary, _TOKENS)
    with torch.no_grad():
        logits = model(torch.tensor(ids)[None]).logits[0].numpy()
    columns = np.arange(0, vocabulary, _EVERY)
    np.savez_compressed(
        _FOLDER / f"{name}.npz", ids=ids, columns=columns, logits=logits[:, columns], best=logits.argmax(-1)
    )


if __name__ == "__main__":
    _FOLDER.mkdir(exist_ok=True)
    for checkpoint in CHECKPOINTS:
        record(checkpoint)
