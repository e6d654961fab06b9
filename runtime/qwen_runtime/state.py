"""What a model remembers of a text, as arrays, and as a file of NumPy's npz format, which holds no code."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

_FORMAT = 1
_ABOUT, _KEYS, _CACHE, _FIXED = "about", "keys", "cache.", "fixed."

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Point:
    """One that a sequence can return to.

    Attributes:
        length: tokens before it.
        fixed: recurrent and convolution states after them, which cannot be cut back, by input of the graph.
    """

    length: int
    fixed: Arrays


@dataclass(frozen=True, eq=False)
class KeptState:
    """One sequence.

    Attributes:
        keys: int64, a number for each token: its id, or of an image's features one of the picture itself.
        caches: keys and values, [1, heads, tokens or more, dim], by input of the graph.
        points: in order, at least one.
    """

    keys: npt.NDArray[np.int64]
    caches: Arrays
    points: Sequence[Point]

    @property
    def length(self) -> int:
        """Tokens before the last point."""
        return self.points[-1].length

    @property
    def nbytes(self) -> int:
        """Bytes in memory, without room that was never written."""
        caches = sum(array[:, :, : self.length].nbytes for array in self.caches.values())
        return caches + sum(array.nbytes for point in self.points for array in point.fixed.values())

    def serves(self, keys: npt.NDArray[np.int64]) -> int:
        """How many of the points a text of `keys` can go on from: it begins with their tokens, and at least
        one of its own is left to read."""
        common = min(len(keys) - 1, self.length)
        differing = np.flatnonzero(self.keys[:common] != keys[:common])
        common = int(differing[0]) if len(differing) else common
        return sum(point.length <= common for point in self.points)

    def until(self, points: int) -> KeptState:
        """Up to the last of so many points; the arrays are the same."""
        return KeptState(self.keys, self.caches, self.points[:points])

    def copy(self) -> KeptState:
        """One that may be written over."""
        caches = {name: array[:, :, : self.length].copy() for name, array in self.caches.items()}
        return KeptState(self.keys, caches, self.points)


def write(file: IO[bytes], state: KeptState, model: str) -> None:
    """`state` up to its last point.

    Args:
        model: what it belongs to; `read` wants the same.
    """
    about = json.dumps({"format": _FORMAT, "model": model}).encode()
    arrays: dict[str, npt.NDArray[Any]] = {
        _ABOUT: np.frombuffer(about, np.uint8),
        _KEYS: state.keys[: state.length],
        **{_CACHE + name: array[:, :, : state.length] for name, array in state.caches.items()},
        **{_FIXED + name: array for name, array in state.points[-1].fixed.items()},
    }
    np.savez(file, allow_pickle=False, **arrays)


def read_keys(path: Path, model: str) -> npt.NDArray[np.int64]:
    """Only the keys of the state in `path`.

    Raises:
        ValueError: as `read`.
    """
    return _read(path, model, lambda name: name == _KEYS)[_KEYS]


def read(path: Path, model: str) -> KeptState:
    """The state in `path`.

    Raises:
        ValueError: no such state, damaged, of another format or another model; a line for people.
    """
    arrays = _read(path, model, lambda name: True)
    keys = arrays[_KEYS]
    caches, fixed = (
        {name.removeprefix(begin): array for name, array in arrays.items() if name.startswith(begin)}
        for begin in (_CACHE, _FIXED)
    )
    return KeptState(keys, caches, [Point(len(keys), fixed)])


def _read(path: Path, model: str, wanted: Callable[[str], bool]) -> dict[str, npt.NDArray[Any]]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as members:
            about = json.loads(members[_ABOUT].tobytes())
            arrays = {name: members[name] for name in members.files if wanted(name)}
    except OSError as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(f"it is damaged or no state ({type(error).__name__})") from error
    if about != {"format": _FORMAT, "model": model}:
        raise ValueError("it is of another model, provider or version")
    keys = arrays.get(_KEYS)
    if keys is None or keys.dtype != np.int64 or keys.ndim != 1 or not len(keys):
        raise ValueError("it has no tokens")
    return arrays
