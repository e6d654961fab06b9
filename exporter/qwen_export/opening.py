"""A checkpoint by whatever names it: a folder, a hub id, or a GGUF file."""

from __future__ import annotations

from pathlib import Path

from qwen_common.errors import UserError

from qwen_export.checkpoint.checkpoint import Checkpoint

_MAGIC = b"GGUF"


def is_gguf(source: str) -> bool:
    """Whether `source` is a GGUF file by its content, or was meant to be one by its name."""
    path = Path(source)
    if path.is_file():
        with path.open("rb") as file:
            return source.lower().endswith(".gguf") or file.read(len(_MAGIC)) == _MAGIC
    return source.lower().endswith(".gguf") and not path.is_dir()


def open_checkpoint(
    source: str,
    revision: str | None = None,
    text_only: bool = False,
    mmproj: Path | None = None,
    streaming: bool = False,
) -> Checkpoint:
    """See `Checkpoint.open` and `open_gguf`, which say what is raised."""
    if not is_gguf(source):
        if mmproj:
            raise UserError(f"--mmproj goes with a GGUF file, and {source} is none: leave it off")
        return Checkpoint.open(source, revision, text_only, streaming)
    if revision:
        raise UserError(f"--revision is for hub ids, and {source} is a file: leave it off")
    if not Path(source).is_file():
        raise UserError(f"no file {source}: give the path of a GGUF file that is on this machine")
    from qwen_export.gguf.opening import open_gguf  # the package gguf takes long to import

    return open_gguf(source, mmproj, text_only)
