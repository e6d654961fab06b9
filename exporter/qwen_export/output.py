"""The folder that an export writes: refused where it would replace what is not ours, put in place at once."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from qwen_common.errors import UserError, mended_by
from qwen_common.files import partial
from qwen_common.manifest import listed_files

STAGED = "artifact"  # in the hidden folder of an export, what becomes the output
# What an export keeps in its hidden folder until it is done.
_WORK = {"lock", "fingerprint", "journal.jsonl", "weights", "replaced", STAGED}
# What file managers leave in every folder that they show.
_FILE_MANAGERS = {".DS_Store", "Thumbs.db", "desktop.ini"}


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
        _check_replaceable(output)
    work = _work(output)
    if not work.is_file():  # `work_folder` has more to say
        _check_writable(work)


def _work(output: Path) -> Path:
    return output.parent / f".{output.name}.partial"


def _check_writable(folder: Path) -> None:
    """Make and remove `folder`, with the parents that it lacks, to hear before the work what the system says.

    Raises:
        UserError: it cannot be made, or nothing can be put into it.
    """
    made = []
    try:
        for path in reversed([folder, *folder.parents]):
            if not os.path.lexists(path):
                path.mkdir()
                made.append(path)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(mended_by(error) or f"cannot write {folder}: {error.strerror}") from error
    finally:
        for path in reversed(made):
            path.rmdir()


def work_folder(output: Path) -> Path:
    """The hidden folder beside `output` in which it is made; created if it is not there.

    Raises:
        UserError: something else has its name.
    """
    work = _work(output)
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise UserError(f"{work} is in the way of the export: move it elsewhere")
    work.mkdir(parents=True, exist_ok=True)
    found = {path.name for path in work.iterdir()}
    if strange := sorted(found - _WORK - _FILE_MANAGERS) or sorted(found if "lock" not in found else ()):
        raise UserError(f"{work} has {strange[0]}, which no export made: move it elsewhere")
    return work


def put_in_place(staged: Path, output: Path) -> None:
    """Rename `staged` to `output`; an older artifact of that name goes away only then.

    Raises:
        UserError: what is at `output` by now is no artifact.
    """
    if not output.exists():
        os.replace(staged, output)
        return
    _check_replaceable(output)
    old = staged.parent / "replaced"
    shutil.rmtree(old, ignore_errors=True)
    try:
        os.replace(output, old)
        os.replace(staged, output)
    except BaseException:
        if old.exists() and not output.exists():
            os.replace(old, output)
        raise


def _check_replaceable(output: Path) -> None:
    """Only an artifact is replaced, and an empty folder.

    Raises:
        UserError: it is neither, or has something that its manifest does not name.
    """
    if not output.is_dir():
        raise UserError(f"{output} is a file: choose another folder with -o")
    found = {path.relative_to(output).as_posix() for path in output.rglob("*")}
    found = {name for name in found if Path(name).name not in _FILE_MANAGERS}
    if not found:
        return
    ours = listed_files(output)
    if ours is None:
        raise UserError(
            f"{output} is not an artifact of qwen-export, and is not replaced: choose another folder with "
            "-o, or remove it yourself"
        )
    ours |= {partial(output / name).name for name in ours}  # of a verification that was killed
    if strange := sorted(found - ours):
        raise UserError(
            f"{output} has {strange[0]}, which no export made, and is not replaced: move that elsewhere, or "
            "choose another folder with -o"
        )
