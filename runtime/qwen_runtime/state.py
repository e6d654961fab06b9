"""What a model remembers of a text, as arrays, and as a file of NumPy's npz format, which holds no code."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

_FORMAT = 2
_ABOUT, _KEYS, _CACHE, _FIXED = "about", "keys", "cache.", "fixed."

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Point:
    """One that a sequence can return to.

    Attributes:
        length: tokens before it.
        fixed: recurrent and convolution states after them, which cannot be cut back, by input of the graph.
        shared: other conversations may begin with these tokens too.
    """

    length: int
    fixed: Arrays
    shared: bool = False


@dataclass(frozen=True, eq=False)
class Outline:
    """What of a state tells which texts it is of use to.

    Attributes:
        keys: as in `KeptState`, those before the last point.
        points: of each its length, and whether it is shared.
    """

    keys: npt.NDArray[np.int64]
    points: Sequence[tuple[int, bool]]

    def spares(self, keys: npt.NDArray[np.int64]) -> int:
        """How many tokens of a text of `keys` need not be read: those before a point, where at least one is
        left to read."""
        common = min(common_keys(self.keys, keys), len(keys) - 1)
        return max((length for length, _ in self.points if length <= common), default=0)


@dataclass(frozen=True, eq=False)
class KeptState:
    """One sequence.

    Attributes:
        keys: int64, a number for each token: its id, or of an image's features one of the picture itself;
            of what was read with an adapter, XOR a number of that adapter.
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

    @property
    def outline(self) -> Outline:
        return Outline(self.keys[: self.length], [(point.length, point.shared) for point in self.points])

    def serves(self, keys: npt.NDArray[np.int64]) -> int:
        """How many of the points a text of `keys` can go on from: it begins with their tokens, and at least
        one of its own is left to read."""
        common = min(common_keys(self.keys, keys), len(keys) - 1)
        return sum(point.length <= common for point in self.points)

    def until(self, points: int) -> KeptState:
        """Up to the last of so many points; the arrays are the same."""
        return KeptState(self.keys, self.caches, self.points[:points])

    def copy(self) -> KeptState:
        """One that may be written over."""
        caches = {name: array[:, :, : self.length].copy() for name, array in self.caches.items()}
        return KeptState(self.keys, caches, self.points)


def common_keys(one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> int:
    """With how many equal ones both begin."""
    shorter = min(len(one), len(other))
    differing = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(differing[0]) if len(differing) else shorter


def write(file: IO[bytes], state: KeptState, model: str) -> None:
    """`state` up to its last point.

    Args:
        model: what it belongs to; `read` wants the same.
    """
    points = [[point.length, point.shared] for point in state.points]
    about = json.dumps({"format": _FORMAT, "model": model, "points": points}).encode()
    arrays: dict[str, npt.NDArray[Any]] = {
        _ABOUT: np.frombuffer(about, np.uint8),
        _KEYS: state.keys[: state.length],
        **{_CACHE + name: array[:, :, : state.length] for name, array in state.caches.items()},
        **{
            f"{_FIXED}{point.length}.{name}": array
            for point in state.points
            for name, array in point.fixed.items()
        },
    }
    np.savez(file, allow_pickle=False, **arrays)


def read_outline(path: Path, model: str) -> Outline:
    """Only the outline of the state in `path`.

    Raises:
        ValueError: as `read`.
    """
    return _read(path, model, lambda name: name == _KEYS)[0]


def read(path: Path, model: str) -> KeptState:
    """The state in `path`.

    Raises:
        ValueError: no such state, damaged, of another format or another model; a line for people.
    """
    outline, arrays = _read(path, model, lambda name: True)

    def named(begin: str) -> Arrays:
        return {name.removeprefix(begin): array for name, array in arrays.items() if name.startswith(begin)}

    points = [Point(length, named(f"{_FIXED}{length}."), shared) for length, shared in outline.points]
    return KeptState(outline.keys, named(_CACHE), points)


def _read(
    path: Path, model: str, wanted: Callable[[str], bool]
) -> tuple[Outline, dict[str, npt.NDArray[Any]]]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as members:
            about = json.loads(members[_ABOUT].tobytes())
            arrays = {name: members[name] for name in members.files if wanted(name)}
    except OSError as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(f"it is damaged or no state ({type(error).__name__})") from error
    if not isinstance(about, dict) or (about.get("format"), about.get("model")) != (_FORMAT, model):
        raise ValueError("it is of another model, provider or version")
    keys = arrays.get(_KEYS)
    if keys is None or keys.dtype != np.int64 or keys.ndim != 1 or not len(keys):
        raise ValueError("it has no tokens")
    points: Any = about.get("points")
    if not _are_points(points, len(keys)):
        raise ValueError("its points are none of its tokens")
    return Outline(keys, [(length, shared) for length, shared in points]), arrays


def _are_points(found: list[list[Any]], tokens: int) -> bool:
    """In order, the last one at the end."""
    try:
        lengths = [length for length, shared in found if type(length) is int and type(shared) is bool]
        return (
            len(lengths) == len(found)
            and lengths == sorted(set(lengths))
            and lengths[0] > 0
            and lengths[-1] == tokens
        )
    except (TypeError, ValueError, IndexError):
        return False
