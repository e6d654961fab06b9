"""Files of the checkpoint that go into every artifact as they are."""

from __future__ import annotations

import shutil
from pathlib import Path

# The tokenizer, and the terms that the weights come under.
COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "LICENSE",
    "NOTICE",
)


def copy_files(source: Path, destination: Path) -> None:
    """Copy the tokenizer's files, chat template and licence as they are."""
    for name in COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)
