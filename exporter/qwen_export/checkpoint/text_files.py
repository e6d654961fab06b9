"""Tokenizer, chat template and generation_config.json, read before the work begins."""

from __future__ import annotations

from qwen_common.errors import UserError
from qwen_runtime.template import TOKENIZER_CONFIG, check, read_templates
from qwen_runtime.tokenizer import TOKENIZER_FILE, Tokenizer

from qwen_export.checkpoint.checkpoint import Checkpoint


def check_text_files(checkpoint: Checkpoint) -> None:
    """What an artifact would not answer with. A checkpoint without a tokenizer is let through.

    Raises:
        UserError: a file is malformed, the tokenizer has ids that the model has not, a chat template is not
            valid, or no file says where an answer ends.
    """
    root, vocab_size = checkpoint.root, checkpoint.config.vocab_size
    if (root / TOKENIZER_FILE).is_file() and (largest := Tokenizer.open(root).largest_id) >= vocab_size:
        raise UserError(
            f"the tokenizer in {root} has the id {largest}, and the model has {vocab_size} tokens: put the "
            "model's own tokenizer there"
        )
    check(read_templates(root))
    _ = checkpoint.generation


def require_tokenizer(checkpoint: Checkpoint) -> None:
    """Raises:
    UserError: there is none, and verification needs one.
    """
    for name in (TOKENIZER_FILE, TOKENIZER_CONFIG):
        if not (checkpoint.root / name).is_file():
            raise UserError(
                f"{checkpoint.root} has no {name}: put {TOKENIZER_FILE} and {TOKENIZER_CONFIG} there, or "
                "export with --no-verify"
            )
