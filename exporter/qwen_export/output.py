"""The folder that an export writes, and the hidden one beside it in which it is made."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

from qwen_common.errors import UserError, mended_by
from qwen_common.replacing import FILE_MANAGERS, REPLACED, check_replaceable

STAGED = "artifact"  # in the hidden folder of an export, what becomes the output
# What an export keeps in its hidden folder until it is done.
_WORK = {"lock", "fingerprint", "journal.jsonl", "weights", REPLACED, STAGED}
ADVICE = "choose another folder with -o"


def check_output(output: Path, source: Path, force: bool) -> None:
    """Refuse to write to `output` where something would be lost.

    Args:
        source: folder of the checkpoint, which is read while the artifact is written.
        force: whether an older artifact may be replaced.

    Raises:
        UserError: `output` is, contains or lies in `source`, exists and shall not be replaced, is not an
            artifact and nothing but an artifact, or cannot be written where it is wanted.
    """
    target, root = (Path(os.path.realpath(folder)) for folder in (output, source))  # even where links circle
    if target.is_relative_to(root) or root.is_relative_to(target):
        raise UserError(
            f"{output} and the checkpoint {source} are the same folder, or one lies in the other: choose "
            "another folder with -o"
        )
    if output.is_symlink():
        raise UserError(f"{output} is a link: give the folder itself with -o")
    if output.exists():
        if not force:
            raise UserError(
                f"{output} already exists: choose another folder with -o, or replace it with --force"
            )
        check_replaceable(output, ADVICE)
    work = _work(output)
    if not work.is_file():  # `work_folder` has more to say
        _check_writable(work)


def _work(output: Path) -> Path:
    return output.parent / f".{output.name}.partial"


def _check_writable(folder: Path) -> None:
    """Hear before the work what the system says to `folder`, with the parents it lacks, and a file in it.

    They are tried under a name of their own: another export may be making the same parents at the same time.

    Raises:
        UserError: it cannot be made, or nothing can be put into it.
    """
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        with ExitStack() as tried:
            place = folder
            if there != folder:
                place = Path(tried.enter_context(tempfile.TemporaryDirectory(prefix=".", dir=there)))
                place /= folder.relative_to(there)
                place.mkdir(parents=True)
            tried.enter_context(tempfile.TemporaryFile(dir=place))
    except OSError as error:
        error.filename = str(folder)  # not the name that was tried
        raise UserError(mended_by(error) or f"cannot write {folder}: {error.strerror}") from error


def work_folder(output: Path) -> Path:
    """The hidden folder beside `output` in which it is made; created if it is not there.

    Raises:
        UserError: something else has its name.
    """
    work = _work(output)
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise UserError(f"{work} is in the way of the export: move it elsewhere")
    work.mkdir(parents=True, exist_ok=True)
    found = {path.name: path for path in work.iterdir()}
    known = FILE_MANAGERS | {name for name in _WORK & found.keys() if _as_made(found[name])}
    if strange := sorted(found.keys() - known) or sorted(found if "lock" not in found else ()):
        raise UserError(f"{work} has {strange[0]}, which no export made: move it elsewhere")
    return work


def _as_made(path: Path) -> bool:
    """Whether what has a name of ours is of the kind that an export makes."""
    return not path.is_symlink() and path.is_dir() == (path.name in (STAGED, REPLACED))
