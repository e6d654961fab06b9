"""Weights from the checkpoint to external-data files: read, transform, quantise, write, drop.

Every tensor's place in a file is known beforehand, so pieces are independent: a few worker threads each take
one piece from the checkpoint to its place, and memory holds no more than those pieces, whatever the model's
size. Exports of one checkpoint go in step: a piece is read once, for every file that wants it. A journal for
each file names the weights that are safely on disk; a later run skips them.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
from qwen_common.errors import UserError

from qwen_export.backends.onnx.resume import Journal
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.checkpoint.tensors.tensor import CheckpointTensor, Fp4Experts, PrequantizedTensor
from qwen_export.graph.weights import PlacedWeight, Rows, Weight
from qwen_export.quantize.blockwise import Quantization, quantize
from qwen_export.quantize.calibrated_codes import Codes
from qwen_export.quantize.fp4 import Fp4

_PIECE_ELEMENTS = 4 * 1024 * 1024
_SYNC_BYTES = 32 * 1024 * 1024
_WORKERS = os.cpu_count() or 1


@dataclass(eq=False)
class Destination:
    """The data file of one export, and its weights.

    Attributes:
        size: bytes of the file.
        fault: why no more is written to it; what its journal names is there nevertheless.
    """

    checkpoint: Checkpoint
    placed: Sequence[PlacedWeight]
    path: Path
    size: int
    journal: Journal
    fault: Exception | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _unsynced: list[Weight] = field(default_factory=list)
    _unsynced_bytes: int = 0

    def open(self) -> BinaryIO:
        self.path.touch()
        self._file = self.path.open("r+b")
        self._file.truncate(self.size)
        return self._file

    @contextmanager
    def faults(self) -> Iterator[None]:
        """What is raised in it is the `fault`, if it is the first."""
        try:
            yield
        except Exception as error:
            self.fault = self.fault or error

    def has(self, weight: Weight) -> bool:
        """Whether an earlier run wrote it."""
        return weight.name in self.journal.done

    def key(self, weight: Weight) -> Hashable:
        """Tells it from the weights of other destinations."""
        return self.path, weight.name

    def source(self, rows: Rows) -> CheckpointTensor:
        return self.checkpoint.tensors[rows.tensor]

    def source_bytes(self, weight: Weight) -> int:
        """Bytes of the checkpoint that `weight` is made from."""
        return sum(_bytes(self.source(rows), rows.start, rows.stop) for rows in weight.rows)

    def write(self, offset: int, distance: int, stripes: np.ndarray) -> None:
        """`stripes`, each at `distance` bytes from the one before."""
        with self._lock:
            for line, stripe in enumerate(stripes):
                self._file.seek(offset + line * distance)
                self._file.write(stripe.view(np.uint8).data)  # 8-bit floats have no buffer of their own

    def finished(self, weight: Weight) -> None:
        """All of `weight` is written; some of it perhaps not yet to the disk."""
        self._unsynced.append(weight)
        self._unsynced_bytes += self.source_bytes(weight)
        if self._unsynced_bytes >= _SYNC_BYTES:
            self.settle()

    def settle(self) -> None:
        """What was finished is on the disk, and then in the journal."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self.journal.add([weight.name for weight in self._unsynced])
        if self.checkpoint.streamed:
            self.checkpoint.streamed.done(map(self.key, self._unsynced))
        self._unsynced.clear()
        self._unsynced_bytes = 0


@dataclass(frozen=True, eq=False)
class Wanted:
    """One weight of one destination, and the codes that were made for it; None: each is the nearest."""

    destination: Destination
    placed: PlacedWeight
    codes: Codes | None = None

    @property
    def weight(self) -> Weight:
        return self.placed.weight

    @property
    def sources(self) -> list[CheckpointTensor]:
        return [self.destination.source(rows) for rows in self.weight.rows]


# Weights that are made at the same time, because they read the same tensors.
Step = Sequence[Wanted]


def in_step(destinations: Iterable[Destination]) -> list[Step]:
    """Every weight that is still to be written, with all that read one of its tensors.

    Of a checkpoint that is fetched, in the order in which the fewest shards are needed at a time.
    """
    step_of: dict[int, list[Wanted]] = {}  # by the id of a tensor
    streamed = None
    for destination in destinations:
        streamed = destination.checkpoint.streamed
        for placed in destination.placed:
            if destination.has(placed.weight):
                continue
            wanted = Wanted(destination, placed)
            step = [wanted]
            for source in wanted.sources:
                if (other := step_of.get(id(source), step)) is not step:
                    other += step
                    for moved in step:
                        step_of |= {id(source): other for source in moved.sources}
                    step = other
            step_of |= {id(source): step for source in wanted.sources}
    steps: list[Step] = list({id(step): step for step in step_of.values()}.values())
    if streamed:
        steps.sort(key=lambda step: streamed.among(source_files(step))[::-1])
    return steps


def source_files(step: Step) -> frozenset[Path]:
    """The shards that its weights are read from."""
    return frozenset().union(*(source.files for wanted in step for source in wanted.sources))


def write_weights(
    destinations: Collection[Destination], steps: Iterable[Step], advance: Callable[[int], None]
) -> None:
    """Write every weight in `steps` to its destination.

    What goes wrong with one destination is its `fault`, and the others go on: a UserError where a weight
    holds NaN or Inf, or a value that its float16 form cannot hold; an OSError where the disk is full, among
    others.

    Args:
        advance: called with the number of checkpoint bytes just dealt with, from this thread.
    """
    with ExitStack() as files:
        for destination in destinations:
            with destination.faults():
                files.enter_context(destination.open())
        for wanted in _written(destinations, steps, advance):
            with wanted.destination.faults():
                wanted.destination.finished(wanted.weight)
        for destination in destinations:
            if destination.fault is None:
                with destination.faults():
                    destination.settle()


def _written(
    destinations: Collection[Destination], steps: Iterable[Step], advance: Callable[[int], None]
) -> Iterator[Wanted]:
    """Convert pieces in worker threads, a bounded number at a time; yield each weight once it is whole."""
    open_pieces: Counter[Wanted] = Counter()
    running: dict[Future[None], _Piece] = {}

    def collect(limit: int) -> Iterator[Wanted]:
        while len(running) > limit:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                piece = running.pop(future)
                future.result()
                for taker in piece.takers:
                    advance(piece.nbytes)
                    open_pieces[taker.wanted] -= 1
                    if not open_pieces[taker.wanted] and taker.wanted.destination.fault is None:
                        yield taker.wanted

    with ThreadPoolExecutor(_WORKERS) as pool:
        try:
            for step in steps:
                step = [wanted for wanted in step if wanted.destination.fault is None]
                if not step:
                    if all(destination.fault for destination in destinations):
                        break
                    continue
                if streamed := step[0].destination.checkpoint.streamed:  # here, where Ctrl-C is heard at once
                    with ExitStack() as takers:
                        for wanted in step:
                            takers.enter_context(wanted.destination.faults())
                        streamed.fetch(source_files(step))
                pieces = _pieces(step)
                for piece in pieces:
                    open_pieces.update(taker.wanted for taker in piece.takers)
                for piece in pieces:
                    found = [piece.codes(taker) for taker in piece.takers]
                    running[pool.submit(_convert, piece, found)] = piece
                    yield from collect(limit=2 * _WORKERS)
            yield from collect(limit=0)
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Taker:
    """Who wants a piece: as the rows of which tensor, and at which row of the stored weight."""

    wanted: Wanted
    tensor: str
    first_row: int


@dataclass(frozen=True)
class _Piece:
    """Rows `start` to `stop` of one tensor of the checkpoint; of experts, one."""

    source: CheckpointTensor
    start: int
    stop: int
    takers: list[_Taker]

    @property
    def nbytes(self) -> int:
        return _bytes(self.source, self.start, self.stop)

    def codes(self, taker: _Taker) -> list[np.ndarray] | None:
        codes = taker.wanted.codes
        return None if codes is None else codes(taker.tensor, self.start, self.stop)


def _bytes(source: CheckpointTensor, start: int, stop: int) -> int:
    return (stop - start) * source.nbytes // source.shape[0]


def _pieces(step: Step) -> list[_Piece]:
    """What is read for `step`: of each tensor every row once, cut where any of the weights is cut."""
    cuts: dict[int, set[int]] = {}
    for wanted in step:
        weight = wanted.weight
        row = int(np.prod(weight.row_shape, dtype=np.int64))
        rows = 1 if weight.of_experts else max(1, _PIECE_ELEMENTS // row)
        for part, source in zip(weight.rows, wanted.sources, strict=True):
            cuts.setdefault(id(source), set()).update(range(part.start, part.stop, rows), [part.stop])
    pieces: dict[tuple[int, int], _Piece] = {}
    for wanted in step:
        first_row = 0
        for part, source in zip(wanted.weight.rows, wanted.sources, strict=True):
            places = sorted(cut for cut in cuts[id(source)] if part.start <= cut <= part.stop)
            for start, stop in pairwise(places):
                piece = pieces.setdefault((id(source), start), _Piece(source, start, stop, []))
                piece.takers.append(_Taker(wanted, part.tensor, first_row))
                first_row += stop - start
    return list(pieces.values())


def _convert(piece: _Piece, made: Sequence[list[np.ndarray] | None]) -> None:
    """Take one piece to its places, with the codes that were `made` for its takers."""
    read = _Read(piece)
    for taker, codes in zip(piece.takers, made, strict=True):
        destination = taker.wanted.destination
        if destination.fault is None:
            with destination.faults():
                _place(piece, taker, _stored_form(read, taker.wanted.weight, codes))


def _place(piece: _Piece, taker: _Taker, parts: Sequence[np.ndarray]) -> None:
    weight, count = taker.wanted.weight, piece.stop - piece.start
    for tensor, part in zip(taker.wanted.placed.tensors, parts, strict=True):
        row_bytes = tensor.nbytes // weight.row_count
        assert part.nbytes == count * row_bytes
        stripes, distance = part.reshape(1, -1), 0
        if weight.side_by_side:  # one line of each of the piece's matrices at a time
            lines = weight.row_shape[0]
            stripes = np.ascontiguousarray(part.reshape(count, lines, -1).swapaxes(0, 1)).reshape(lines, -1)
            row_bytes //= lines
            distance = weight.row_count * row_bytes
        taker.wanted.destination.write(tensor.offset + taker.first_row * row_bytes, distance, stripes)


class _Read:
    """A piece's rows, and its codes in each form that they are wanted in: read when they are first asked for,
    once."""

    def __init__(self, piece: _Piece) -> None:
        self._piece = piece
        self._rows: np.ndarray | None = None
        self._codes: dict[Quantization | Fp4, list[np.ndarray]] = {}

    def rows(self) -> np.ndarray:
        if self._rows is None:
            first = self._piece.takers[0]
            checkpoint = first.wanted.destination.checkpoint
            self._rows = checkpoint.read(first.tensor, self._piece.start, self._piece.stop)
        return self._rows

    def codes(self, form: Quantization | Fp4) -> list[np.ndarray]:
        if form not in self._codes:
            source, start, stop = self._piece.source, self._piece.start, self._piece.stop
            if isinstance(form, Fp4):
                assert isinstance(source, Fp4Experts)
                self._codes[form] = source.packed_fp4_experts(start, stop)
            else:
                assert isinstance(source, PrequantizedTensor)
                self._codes[form] = source.packed(start, stop, form)
        return self._codes[form]


def _stored_form(read: _Read, weight: Weight, made: list[np.ndarray] | None) -> list[np.ndarray]:
    """The piece as the arrays that its weight's `layout()` names, contiguous."""
    if isinstance(weight.storage, Fp4):
        *matrices, factors = read.codes(weight.storage)
        if weight.transform is not None:  # puts rows in another order
            matrices = [weight.transform(part) for part in matrices]
        return [np.ascontiguousarray(part) for part in (*matrices, factors)]
    if isinstance(weight.storage, Quantization) and (weight.prequantized or made is not None):
        parts = read.codes(weight.storage) if made is None else made
        if weight.transform is not None:  # puts rows in another order, whatever they hold
            parts = [weight.transform(part) for part in parts]
        return [np.ascontiguousarray(part) for part in parts]
    rows = read.rows()
    if weight.transform is not None:
        rows = weight.transform(rows)
    if isinstance(weight.storage, Quantization):
        quantized = quantize(rows.reshape(-1, rows.shape[-1]), weight.storage)
        arrays = [quantized.packed, quantized.scales, quantized.zero_points]
        return [np.ascontiguousarray(array) for array in arrays if array is not None]
    with np.errstate(over="ignore"):  # reported below
        converted = rows.astype(weight.storage)
    if weight.storage == np.float16 and not np.isfinite(converted).all():
        largest = float(np.abs(rows.astype(np.float32)).max())
        raise UserError(
            f"weight {weight.name} reaches {largest:.3g}, more than float16 holds: "
            "choose a profile with float32 activations"
        )
    return [np.ascontiguousarray(converted)]
