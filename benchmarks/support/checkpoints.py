"""The trained checkpoints that the repository ships, and files for those that are made up."""

from __future__ import annotations

import shutil
from pathlib import Path

_CHECKPOINTS = Path(__file__).parents[2] / "tests" / "checkpoints"
TINY, TINY_MOE, TINY_VL = (_CHECKPOINTS / f"tiny-{name}" for name in ("dense", "moe", "vl"))
TINY_MOE_128 = _CHECKPOINTS / "tiny-moe-128"  # 128 experts, in rows of 128
TRAINED_HEAD = _CHECKPOINTS / "tiny-dense-mtp" / "mtp.safetensors"
EVALUATION = _CHECKPOINTS / "eval.txt"  # held out: none of them was trained on it


def copy_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer's files of the checkpoint `source`, which give a made-up checkpoint its words."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, folder / name)
