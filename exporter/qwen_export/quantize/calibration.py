"""Text that models are measured on: the user's, or a shipped one."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
from qwen_common.errors import UserError
from qwen_runtime.tokenizer import Tokenizer

from qwen_export.checkpoint.checkpoint import Checkpoint

SAMPLE_TOKENS = 128


def read_text(path: Path | None) -> str:
    """The UTF-8 text at `path`; None takes the shipped one.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return (path or files("qwen_export.quantize") / "calibration.txt").read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as UTF-8 text: {error}") from error


def samples_of(ids: Sequence[int], most: int, path: Path | None) -> np.ndarray:
    """Ids -> int64 [samples, SAMPLE_TOKENS]: at most `most` of them, from everywhere in the text.

    Raises:
        UserError: `ids`, of the text at `path`, are fewer than one sample.
    """
    count = len(ids) // SAMPLE_TOKENS
    if not count:
        raise UserError(f"{path} has {len(ids)} tokens: give a text of {SAMPLE_TOKENS} at least")
    every = np.asarray(ids[: count * SAMPLE_TOKENS], np.int64).reshape(count, SAMPLE_TOKENS)
    return every[np.linspace(0, count, min(most, count), endpoint=False).astype(int)]


def calibration_samples(checkpoint: Checkpoint, path: Path | None, most: int) -> np.ndarray:
    """At most `most` samples of a text, int64 [samples, SAMPLE_TOKENS], by the checkpoint's tokenizer.

    Raises:
        UserError: the checkpoint has no tokenizer or another model's, or the text cannot be read or is too
            short.
    """
    text = read_text(path)
    found = samples_of(Tokenizer.open(checkpoint.root).encode(text), most, path)
    vocabulary = checkpoint.config.vocab_size
    if (largest := int(found.max())) >= vocabulary:
        raise UserError(
            f"the tokenizer in {checkpoint.root} gives the id {largest}, and the model has {vocabulary} "
            "tokens: put the model's own tokenizer there"
        )
    return found
