"""States of earlier prompts, in memory and in a folder: a prompt that goes on from one is read from there on.

Where the graph runs in ONNX Runtime itself (`backends.ort`). `prefix` does the same with ONNX Runtime GenAI's
generators, of which each keeps one sequence, one point of it, and nothing on disk.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from qwen_common.errors import UserError

from qwen_runtime.backends.protocol import Generator
from qwen_runtime.prefill import Cancelled, Prefill, append
from qwen_runtime.state import KeptState, Outline, Point, common_keys, read
from qwen_runtime.state_folder import StateFolder, write_state

GB = 10**9
_AHEAD_CHUNK = 64  # tokens; a question that comes meanwhile waits for one chunk
_OWN = 3  # points of a conversation alone that it may go back to
_SHARED = 8  # points of a sequence where others may begin
_NEAREST = 512  # tokens; the first distance of `_landmarks`
_FORK = 256  # tokens; a point costs as much memory as some hundred tokens' keys and values


@dataclass(frozen=True)
class StateSettings:
    """Where states are kept.

    Attributes:
        folder: for those on disk; None keeps them in memory only.
        disk_bytes, memory_bytes: most that they may take, all together; those used longest ago go first.
    """

    folder: Path | None = None
    disk_bytes: int = 8 * GB
    memory_bytes: int = 2 * GB


class KeepingGenerator(Generator, Protocol):
    """A generator whose states can be taken and given."""

    @property
    def caches(self) -> Mapping[str, npt.NDArray[Any]]: ...

    def point(self) -> Point: ...

    def restore(self, state: KeptState, tokens: Sequence[int]) -> None: ...


class Fits(Protocol):
    """The model that states are for."""

    chunk_size: int | None
    alignment: int

    def fits(self, state: KeptState) -> bool: ...


class States:
    """The states used last. Safe to use from several threads: one that is taken belongs to the taker."""

    def __init__(self, settings: StateSettings, model: Fits, digest: str, count: int) -> None:
        """Args:
        digest: of all that a state depends on.
        count: most states in memory.

        Raises:
            UserError: the folder cannot be used.
        """
        self._model, self._digest = model, digest
        self._count, self._limit = count, settings.memory_bytes
        self._states: list[KeptState] = []  # the one used last at the end
        self._lock = threading.Lock()
        self._unwritten: list[KeptState] = []
        self._writing = threading.Lock()
        folder = settings.folder
        self._folder = None if folder is None else StateFolder(folder, digest, settings.disk_bytes)

    def prefill(
        self,
        generator: KeepingGenerator,
        tokens: Sequence[int],
        keys: npt.NDArray[np.int64],
        beginning: int,
        turn: int,
    ) -> Prefill:
        """A prompt that is read from the best state on.

        Args:
            generator: empty.
            keys: as in `KeptState`, of `tokens`.
            beginning: how far other conversations' prompts may agree with this one, in tokens.
            turn: the same of the next turn's.
        """
        on_disk = {} if self._folder is None else self._folder.index()
        common = min(self._common(keys, on_disk.values()), len(keys) - 1)
        state = self.take(keys, on_disk)
        start = 0 if state is None else state.length
        points: list[Point] = [] if state is None else list(state.points)
        if state is not None:
            generator.restore(state, tokens[:start])
        step, chunk_size = self._model.alignment, self._model.chunk_size
        stops = self._stops(len(tokens), start, beginning, turn, common)

        def read(cancelled: Cancelled) -> bool:
            done = start
            for stop in sorted({*stops, len(tokens)}):
                done += append(generator, tokens[done:stop], chunk_size, cancelled, before=done)
                new = done > (points[-1].length if points else 0)  # else it was cancelled before a chunk
                if done % step == 0 and new and (done < stop or stop in stops):
                    points.append(replace(generator.point(), shared=stops.get(done, False)))
                if done < stop:
                    return False
            return True

        def release() -> None:
            if points:
                self.put(KeptState(keys, generator.caches, points))

        return Prefill(generator, len(tokens), read, cached_tokens=start, release=release)

    def _stops(self, length: int, start: int, beginning: int, turn: int, common: int) -> dict[int, bool]:
        """Where points are made of a text that is read from `start` on, and whether others may begin there.

        Args:
            length: of the text.
            common: tokens with which another text begins too.
        """
        step = self._model.alignment
        landmarks = _landmarks(beginning, self._model.chunk_size or step)
        turn, *others = (stop - stop % step for stop in (turn, beginning, *landmarks))
        near = max((stop for stop in (start, turn, *others) if stop <= common), default=common)
        if common - near >= _FORK:
            others.append(common - common % step)  # where one other text goes on otherwise, more may
        stops = {stop: stop in others for stop in (turn, *others) if start < stop <= length}
        if not start and stops:
            stops[min(stops)] = True
        return stops

    def _common(self, keys: npt.NDArray[np.int64], on_disk: Iterable[Outline]) -> int:
        """How many tokens of a text of `keys` one that is kept begins with too, at most."""
        with self._lock:
            kept = [state.keys for state in self._states]
        kept += [held.keys for held in on_disk]
        return max((common_keys(held, keys) for held in kept), default=0)

    def read_ahead(
        self,
        generator: KeepingGenerator,
        tokens: Sequence[int],
        keys: npt.NDArray[np.int64],
        cancelled: Cancelled,
    ) -> None:
        """Read a text whose beginning is kept, in small chunks, and keep it.

        Args:
            generator, tokens, keys: as in `prefill`.
        """
        state = self.take(keys)
        if state is None:
            return
        generator.restore(state, tokens[: state.length])
        end = len(tokens) - len(tokens) % self._model.alignment
        done, step = state.length, max(self._model.alignment, _AHEAD_CHUNK)
        done += append(generator, tokens[done:end], step, cancelled, before=done)
        points = [*state.points, generator.point()] if done > state.length else state.points
        self.put(KeptState(keys, generator.caches, points))

    def take(
        self, keys: npt.NDArray[np.int64], on_disk: Mapping[Path, Outline] | None = None
    ) -> KeptState | None:
        """The state that spares most of a text of `keys`; its last point is where to go on.

        Args:
            on_disk: as the folder was listed for it already.
        """
        with self._lock:
            serving = [(state, count) for state in self._states if (count := state.serves(keys))]
        best, points = max(serving, key=lambda pair: pair[0].points[pair[1] - 1].length, default=(None, 0))
        length = 0 if best is None else best.points[points - 1].length
        if self._folder is not None:
            found = self._folder.find(keys, length, self._model.fits, on_disk)
            if found is not None:
                points = found.serves(keys)
                return found if points == len(found.points) else found.until(points).copy()
        if best is None:
            return None
        with self._lock:
            # What is read after the last point does not harm a state that is being written to disk.
            others = [state for state in self._states if state is not best]
            whole = points == len(best.points) and len(others) < len(self._states)
            if whole:
                self._states = others
        return best if whole else best.until(points).copy()

    def put(self, state: KeptState) -> None:
        """Keep it in memory, and on disk with the next `flush`."""
        state = KeptState(state.keys, state.caches, _most_useful(state.points))
        self._keep(state)
        if self._folder is None:
            return
        with self._lock:
            self._unwritten.append(state)
            many = len(self._unwritten) > max(1, self._count)
        if many:  # they hold memory, and nobody calls it
            self.flush()

    def _keep(self, state: KeptState) -> None:
        with self._lock:
            self._states.append(state)
            while len(self._states) > self._count or (
                len(self._states) > 1 and sum(kept.nbytes for kept in self._states) > self._limit
            ):
                self._states.pop(0)

    def save(
        self,
        generator: KeepingGenerator,
        tokens: Sequence[int],
        keys: npt.NDArray[np.int64],
        stop: int,
        path: Path,
    ) -> int:
        """Read a prompt up to `stop`, and write its state to `path`; how many tokens that are.

        Raises:
            UserError: it is too short to be cut there, or the file cannot be written.
        """
        stop -= stop % self._model.alignment
        if not stop:
            raise UserError(f"a prompt of {len(tokens)} tokens is too short to keep")
        self.prefill(generator, tokens[:stop], keys[:stop], 0, stop).read(lambda done: False)
        point = replace(generator.point(), shared=True)
        try:
            write_state(path, KeptState(keys[:stop], generator.caches, [point]), self._digest)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): choose another place") from error
        return stop

    def load(self, path: Path) -> int:
        """Keep the state in the file `path`; how many tokens it has.

        Raises:
            UserError: it is damaged, or another model's.
        """
        try:
            found = read(path, self._digest)
        except ValueError as error:
            raise UserError(f"{path} is no state of this model ({error}): save it again") from error
        if not self._model.fits(found):
            raise UserError(f"{path} is no state of this model: save it again")
        self._keep(found)
        return found.length

    def flush(self) -> None:
        """Write to disk what is not there yet."""
        if self._folder is None:
            return
        with self._writing:
            while True:
                with self._lock:
                    if not self._unwritten:
                        return
                    state = self._unwritten.pop(0)
                # In files of their own, for the longer ones of a conversation replace each other.
                shared = [point for point in state.points if point.shared]
                own = [point for point in state.points if not shared or point.length > shared[-1].length]
                for points in (shared, own):
                    if points:
                        self._folder.put(KeptState(state.keys, state.caches, points))

    def clear(self) -> None:
        with self._lock:
            self._states.clear()


def _landmarks(beginning: int, chunk: int) -> Iterator[int]:
    """Where a text may differ within what conversations begin with, as agents' instructions do that name the
    folder: at distances from its end that double, so that at most some twice as much is read as differs."""
    distance = _NEAREST
    while 2 * distance <= beginning:
        yield (beginning - distance) // chunk * chunk
        distance *= 2


def _most_useful(points: Sequence[Point]) -> list[Point]:
    """The last ones, and those where others may begin, but for the ones that have another one soon after."""
    shared = [point for point in points if point.shared]
    own = [point for point in points if not point.shared][-_OWN:]
    while len(shared) > _SHARED:
        gaps = [after.length - before.length for before, after in pairwise(shared)]
        del shared[gaps.index(min(gaps))]
    return sorted([*shared, *own], key=lambda point: point.length)
