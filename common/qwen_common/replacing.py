"""What may be replaced: an artifact and nothing but an artifact, or an empty folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from qwen_common.errors import UserError
from qwen_common.files import partial
from qwen_common.manifest import listed_files

REPLACED = "replaced"  # beside what takes its place, until it has
# What file managers leave in every folder that they show.
FILE_MANAGERS = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})


def check_replaceable(folder: Path, advice: str) -> None:
    """Refuse a folder in which something would be lost.

    Args:
        advice: how another folder is chosen.

    Raises:
        UserError: it is a file, no artifact, or has something that its manifest does not name.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: {advice}")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    found = {name for name in found if Path(name).name not in FILE_MANAGERS}
    if not found:
        return
    ours = listed_files(folder)
    if ours is None:
        raise UserError(
            f"{folder} is not an artifact of qwen-export, and is not replaced: {advice}, or remove it "
            "yourself"
        )
    ours |= {partial(folder / name).name for name in ours}  # of a verification that was killed
    if strange := sorted(found - ours):
        raise UserError(
            f"{folder} has {strange[0]}, which no export made, and is not replaced: move that elsewhere, or "
            f"{advice}"
        )


def put_in_place(staged: Path, folder: Path, advice: str) -> None:
    """Rename `staged` to `folder`; an older artifact of that name goes away only then.

    Raises:
        UserError: as `check_replaceable`, of what is there by now.
    """
    if not folder.exists():
        os.replace(staged, folder)
        return
    check_replaceable(folder, advice)
    old = staged.parent / REPLACED
    shutil.rmtree(old, ignore_errors=True)
    try:
        os.replace(folder, old)
        os.replace(staged, folder)
    except BaseException:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        raise
