"""Text that models are measured on: the user's, or a shipped one."""

from __future__ import annotations

import tempfile
from importlib.resources import files
from pathlib import Path

import numpy as np
from qwen_common.errors import UserError
from qwen_common.files import as_json
from qwen_common.manifest import GENAI_CONFIG
from qwen_profiles.schema import Profile

from qwen_export.backends.copied_files import copy_files
from qwen_export.backends.onnx.genai_config import genai_config
from qwen_export.checkpoint.checkpoint import Checkpoint

SAMPLE_TOKENS = 128


def read_text(path: Path | None) -> str:
    """The UTF-8 text at `path`; None takes the shipped one.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return (path or files("qwen_export.quantize") / "calibration.txt").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as UTF-8 text: {error}") from error


def samples_of(ids: np.ndarray, most: int, path: Path | None) -> np.ndarray:
    """int64 [tokens] -> [samples, SAMPLE_TOKENS]: at most `most` of them, from everywhere in the text.

    Raises:
        UserError: `ids`, of the text at `path`, are fewer than one sample.
    """
    count = len(ids) // SAMPLE_TOKENS
    if not count:
        raise UserError(f"{path} has {len(ids)} tokens: give a text of {SAMPLE_TOKENS} at least")
    every = np.asarray(ids[: count * SAMPLE_TOKENS], np.int64).reshape(count, SAMPLE_TOKENS)
    return every[np.linspace(0, count, min(most, count), endpoint=False).astype(int)]


def calibration_samples(checkpoint: Checkpoint, profile: Profile, path: Path | None, most: int) -> np.ndarray:
    """At most `most` samples of a text, int64 [samples, SAMPLE_TOKENS], by the checkpoint's tokenizer.

    Raises:
        UserError: the checkpoint has no tokenizer or another model's, or the text cannot be read or is too
            short.
    """
    import onnxruntime_genai as og

    text = read_text(path)
    with tempfile.TemporaryDirectory() as folder:
        copy_files(checkpoint.root, Path(folder))
        Path(folder, GENAI_CONFIG).write_bytes(as_json(genai_config(checkpoint, profile, {})))
        try:
            tokenizer = og.Tokenizer(folder)
        except RuntimeError as error:
            raise UserError(
                f"{checkpoint.root} has no tokenizer that can be read ({error}): put tokenizer.json and "
                "tokenizer_config.json there"
            ) from error
        found = samples_of(tokenizer.encode(text), most, path)
    vocabulary = checkpoint.config.vocab_size
    if (largest := int(found.max())) >= vocabulary:
        raise UserError(
            f"the tokenizer in {checkpoint.root} gives the id {largest}, and the model has {vocabulary} "
            "tokens: put the model's own tokenizer there"
        )
    return found
