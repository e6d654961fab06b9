"""States in a folder, so that a prompt that was read once need not be read again after a restart."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from qwen_common.errors import UserError

from qwen_runtime import state as states
from qwen_runtime.state import KeptState, Outline

_log = logging.getLogger(__name__)

_SUFFIX = ".npz"
_WORTH = 64  # tokens more than what is there already, for a file to be written
_LONGEST_WRITE = 600.0  # seconds

Keys = npt.NDArray[np.int64]


class StateFolder:
    """The states of one model in a folder, which several models may share. Safe to use from several threads.

    Nobody but the user can read it: a state tells the text that it was made of.

    Args:
        root: made if it is not there.
        model: digest of what the states belong to.
        size: most bytes of all states in `root`, whoever's they are; those used longest ago go first.

    Raises:
        UserError: `root` cannot be made or written to.
    """

    def __init__(self, root: Path, model: str, size: int) -> None:
        self._root, self._model, self._size = root, model, size
        self._folder = root / model[:16]
        self._outlines: dict[Path, Outline] = {}
        self._refused: set[Path] = set()
        self._failing = False
        self._lock = threading.Lock()
        try:
            for folder in (root, self._folder):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for left in self._folder.glob(".*.partial"):  # by a process that was interrupted
                if time.time() - left.lstat().st_mtime > _LONGEST_WRITE:
                    left.unlink()
        except OSError as error:
            raise UserError(
                f"states cannot be kept in {root} ({error.strerror}): choose another folder"
            ) from error

    def find(
        self,
        keys: Keys,
        more_than: int,
        fits: Callable[[KeptState], bool],
        among: Mapping[Path, Outline] | None = None,
    ) -> KeptState | None:
        """The state that spares most of a text of `keys`, if it spares more than so many tokens.

        Args:
            fits: whether the model takes it.
            among: the `index`, where the caller has it already.
        """
        useful = [
            (spared, -len(held.keys), path)
            for path, held in (self.index() if among is None else among).items()
            if (spared := held.spares(keys)) > more_than
        ]
        for spared, _, path in sorted(useful, reverse=True):
            try:
                found = states.read(path, self._model)
                if not fits(found):
                    raise ValueError("its arrays are not this model's")
            except ValueError as error:
                self._refuse(path, error)
                continue
            with contextlib.suppress(OSError):  # of somebody else's file, or on a disk that is read only
                os.utime(path)
            if found.outline.spares(keys) >= spared:
                return found
            with self._lock:  # another process has written it again, with other points
                self._outlines[path] = found.outline
        return None

    def put(self, kept: KeptState) -> None:
        """Write `kept`, unless what is there spares nearly as much of it.

        What is there of its beginning goes, but for what is shared. The first failure of several is told in a
        line, and nothing is written.
        """
        keys = kept.keys[: kept.length]
        prefixes = {path: held for path, held in self.index().items() if _begins(keys, held.keys)}
        if kept.length < max((len(held.keys) for held in prefixes.values()), default=0) + _WORTH:
            return
        if kept.nbytes > self._size:
            _log.warning("a state of %d bytes does not fit the limit of %d", kept.nbytes, self._size)
            return
        path = self._path(keys)
        try:
            write_state(path, kept, self._model)
        except OSError as error:
            if not self._failing:  # a disk that is full stays so for many answers
                _log.warning("states are not written to %s: %s", self._folder, error.strerror)
            self._failing = True
            return
        self._failing = False
        with self._lock:
            self._refused.discard(path)
            self._outlines[path] = kept.outline
        for older, held in prefixes.items():
            if not any(shared for _, shared in held.points):
                self._remove(older)
        self._make_room()

    def _path(self, keys: Keys) -> Path:
        return self._folder / (hashlib.sha256(keys.tobytes()).hexdigest()[:32] + _SUFFIX)

    def index(self) -> dict[Path, Outline]:
        """The outline of each state that is there and can be used."""
        with self._lock:
            there = {path for path, _ in _files(self._folder)}
            for path in self._outlines.keys() - there:  # another process made room
                del self._outlines[path]
            for path in there - self._outlines.keys() - self._refused:
                try:
                    self._outlines[path] = states.read_outline(path, self._model)
                except ValueError as error:
                    self._ignore(path, error)
            return dict(self._outlines)

    def _refuse(self, path: Path, error: Exception) -> None:
        with self._lock:
            self._outlines.pop(path, None)
            self._ignore(path, error)

    def _ignore(self, path: Path, error: Exception) -> None:
        if path.exists():  # else another process made room just now
            self._refused.add(path)
            _log.warning("%s is ignored: %s", path, error)

    def _remove(self, path: Path) -> None:
        with self._lock:
            self._outlines.pop(path, None)
        with contextlib.suppress(OSError):
            path.unlink()

    def _make_room(self) -> None:
        found = [entry for folder in self._root.iterdir() if _is_folder(folder) for entry in _files(folder)]
        total = sum(status.st_size for _, status in found)
        for path, status in sorted(found, key=lambda entry: entry[1].st_mtime_ns):
            if total <= self._size:
                break
            self._remove(path)
            total -= status.st_size


def write_state(path: Path, kept: KeptState, model: str) -> None:
    """Write `kept` to `path` in one step, for nobody but the user to read.

    Raises:
        OSError: it cannot be written; then nothing is left there.
    """
    # Processes of several containers may have the same id.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            states.write(file, kept, model)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _begins(keys: Keys, held: Keys) -> bool:
    return len(held) <= len(keys) and np.array_equal(held, keys[: len(held)])


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Those that may be states; no links."""
    for path in folder.glob("*" + _SUFFIX):
        with contextlib.suppress(OSError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                yield path, status
