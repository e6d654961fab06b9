"""Text that models are measured on: the user's, or a shipped one."""

from __future__ import annotations

import tempfile
from importlib.resources import files
from pathlib import Path

import numpy as np
from qwen_common.errors import UserError
from qwen_profiles.schema import Profile

from qwen_export.backends.onnx import package
from qwen_export.checkpoint.checkpoint import Checkpoint

PIECE_TOKENS = 128


def read_text(path: Path | None) -> str:
    """The UTF-8 text at `path`; None takes the shipped one.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return (path or files("qwen_export.quantize") / "calibration.txt").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as UTF-8 text: {error}") from error


def in_pieces(ids: np.ndarray, most: int, path: Path | None) -> np.ndarray:
    """int64 [tokens] -> [pieces, PIECE_TOKENS]: at most `most` of them, from everywhere in the text.

    Raises:
        UserError: `ids`, of the text at `path`, are fewer than one piece.
    """
    count = len(ids) // PIECE_TOKENS
    if not count:
        raise UserError(f"{path} has {len(ids)} tokens: give a text of {PIECE_TOKENS} at least")
    every = np.asarray(ids[: count * PIECE_TOKENS], np.int64).reshape(count, PIECE_TOKENS)
    return every[np.linspace(0, count, min(most, count), endpoint=False).astype(int)]


def pieces(checkpoint: Checkpoint, profile: Profile, path: Path | None, most: int) -> np.ndarray:
    """At most `most` pieces of a text, int64 [pieces, PIECE_TOKENS], by the checkpoint's tokenizer.

    Raises:
        UserError: the checkpoint has no tokenizer or another model's, or the text cannot be read or is too
            short.
    """
    import onnxruntime_genai as og

    text = read_text(path)
    with tempfile.TemporaryDirectory() as folder:
        package.copy_files(checkpoint.root, Path(folder))
        package.write_json(Path(folder, package.GENAI_CONFIG), package.genai_config(checkpoint, profile, {}))
        try:
            tokenizer = og.Tokenizer(folder)
        except RuntimeError as error:
            raise UserError(
                f"{checkpoint.root} has no tokenizer that can be read ({error}): put tokenizer.json and "
                "tokenizer_config.json there"
            ) from error
        found = in_pieces(tokenizer.encode(text), most, path)
    vocabulary = checkpoint.config.vocab_size
    if (largest := int(found.max())) >= vocabulary:
        raise UserError(
            f"the tokenizer in {checkpoint.root} gives the id {largest}, and the model has {vocabulary} "
            "tokens: put the model's own tokenizer there"
        )
    return found
