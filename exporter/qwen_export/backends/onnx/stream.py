"""Weights from the checkpoint to the external-data file: read, transform, quantise, write, drop.

Every tensor's place in the file is known beforehand, so pieces are independent: a few worker threads each
take one piece from the checkpoint to its place, and memory holds no more than those pieces, whatever the
model's size. A journal names the weights that are safely on disk; a later run skips them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from qwen_common.errors import UserError

from qwen_export.backends.onnx.resume import Journal
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.checkpoint.streamed import StreamedShards
from qwen_export.checkpoint.tensors.tensor import Fp4Experts, PrequantizedTensor
from qwen_export.graph.weights import ExternalTensor, PlacedWeight, Rows, Weight
from qwen_export.quantize.blockwise import Compensation, Quantization, quantize
from qwen_export.quantize.fp4 import Fp4
from qwen_export.quantize.gptq import Compensations

# A weight, its place, and what finds how its codes make up for each other.
Compensated = tuple[PlacedWeight, Compensations]

_PIECE_ELEMENTS = 4 * 1024 * 1024
_SYNC_BYTES = 32 * 1024 * 1024
_WORKERS = os.cpu_count() or 1


@dataclass(frozen=True)
class _Piece:
    """Rows of one checkpoint tensor, and the row of the stored weight where they begin; of experts, one."""

    weight: Weight
    tensors: Sequence[ExternalTensor]
    rows: Rows
    first_row: int

    @property
    def expert(self) -> int | None:
        return self.rows.start if self.weight.of_experts else None


def source_bytes(checkpoint: Checkpoint, weight: Weight) -> int:
    """Bytes of the checkpoint that `weight` is made from."""
    return sum(_bytes(checkpoint, rows) for rows in weight.rows)


def _bytes(checkpoint: Checkpoint, rows: Rows) -> int:
    source = checkpoint.tensors[rows.tensor]
    return (rows.stop - rows.start) * source.nbytes // source.shape[0]


def write_weights(
    checkpoint: Checkpoint,
    weights: Iterable[Compensated],
    path: Path,
    size: int,
    journal: Journal,
    advance: Callable[[int], None],
) -> None:
    """Write every weight that `journal` does not name yet into `path`, a file of `size` bytes.

    Args:
        advance: called with the number of checkpoint bytes just dealt with, from this thread.

    Raises:
        UserError: a weight holds NaN or Inf, or a value that its float16 form cannot hold.
        OSError: the disk is full, among others; the journal stays valid.
    """
    path.touch()
    with path.open("r+b") as file:
        file.truncate(size)
        unsynced: list[str] = []
        unsynced_bytes = 0
        for weight in _finished(checkpoint, _remaining(weights, journal, checkpoint, advance), file, advance):
            unsynced.append(weight.name)
            unsynced_bytes += source_bytes(checkpoint, weight)
            if unsynced_bytes >= _SYNC_BYTES:
                _settle(file, journal, unsynced, checkpoint)
                unsynced, unsynced_bytes = [], 0
        _settle(file, journal, unsynced, checkpoint)


def source_files(checkpoint: Checkpoint, weight: Weight) -> frozenset[Path]:
    """The shards that `weight` is read from."""
    return frozenset().union(*(checkpoint.tensors[rows.tensor].files for rows in weight.rows))


def by_shard(
    checkpoint: Checkpoint, weights: Iterable[PlacedWeight], streamed: StreamedShards
) -> list[PlacedWeight]:
    """In the order in which the fewest shards are needed at a time."""
    return sorted(weights, key=lambda placed: streamed.among(source_files(checkpoint, placed.weight))[::-1])


def _settle(file: BinaryIO, journal: Journal, weights: list[str], checkpoint: Checkpoint) -> None:
    _sync(file)
    journal.add(weights)
    if checkpoint.streamed:
        checkpoint.streamed.done(weights)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _remaining(
    weights: Iterable[Compensated],
    journal: Journal,
    checkpoint: Checkpoint,
    advance: Callable[[int], None],
) -> Iterator[Compensated]:
    for placed, compensations in weights:
        if placed.weight.name in journal.done:
            advance(source_bytes(checkpoint, placed.weight))
        else:
            yield placed, compensations


def _finished(
    checkpoint: Checkpoint, weights: Iterator[Compensated], file: BinaryIO, advance: Callable[[int], None]
) -> Iterator[Weight]:
    """Convert pieces in worker threads, a bounded number at a time; yield each weight once it is whole."""
    lock = threading.Lock()
    open_pieces: dict[str, int] = {}
    running: dict[Future[int], Weight] = {}

    def collect(limit: int) -> Iterator[Weight]:
        while len(running) > limit:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                weight = running.pop(future)
                advance(future.result())
                open_pieces[weight.name] -= 1
                if open_pieces[weight.name] == 0:
                    yield weight

    with ThreadPoolExecutor(_WORKERS) as pool:
        try:
            for (weight, tensors), compensations in weights:
                if checkpoint.streamed:  # here, where Ctrl-C is heard at once
                    checkpoint.streamed.fetch(source_files(checkpoint, weight))
                pieces = list(_pieces(weight, tensors))
                open_pieces[weight.name] = len(pieces)
                for piece in pieces:
                    found = compensations(piece.rows.tensor, piece.expert)
                    running[pool.submit(_convert, checkpoint, piece, found, file, lock)] = weight
                    yield from collect(limit=2 * _WORKERS)
            yield from collect(limit=0)
        finally:
            pool.shutdown(cancel_futures=True)


def _pieces(weight: Weight, tensors: Sequence[ExternalTensor]) -> Iterator[_Piece]:
    row = int(np.prod(weight.row_shape, dtype=np.int64))
    step = 1 if weight.of_experts else max(1, _PIECE_ELEMENTS // row)
    first_row = 0
    for part in weight.rows:
        for start in range(part.start, part.stop, step):
            stop = min(start + step, part.stop)
            yield _Piece(weight, tensors, Rows(part.tensor, start, stop), first_row)
            first_row += stop - start


def _convert(
    checkpoint: Checkpoint,
    piece: _Piece,
    compensation: Compensation | None,
    file: BinaryIO,
    lock: threading.Lock,
) -> int:
    """Take one piece to its place; returns the checkpoint bytes read."""
    count = piece.rows.stop - piece.rows.start
    for tensor, part in zip(piece.tensors, _stored_form(checkpoint, piece, compensation), strict=True):
        row_bytes = tensor.nbytes // piece.weight.row_count
        assert part.nbytes == count * row_bytes
        stripes = part.reshape(1, -1)
        if piece.weight.side_by_side:  # one line of each of the piece's matrices at a time
            lines = piece.weight.row_shape[0]
            stripes = np.ascontiguousarray(part.reshape(count, lines, -1).swapaxes(0, 1)).reshape(lines, -1)
            row_bytes //= lines
        with lock:
            for line, stripe in enumerate(stripes):
                file.seek(tensor.offset + (line * piece.weight.row_count + piece.first_row) * row_bytes)
                file.write(stripe.view(np.uint8).data)  # 8-bit floats have no buffer of their own
    return _bytes(checkpoint, piece.rows)


def _stored_form(
    checkpoint: Checkpoint, piece: _Piece, compensation: Compensation | None
) -> list[np.ndarray]:
    """The piece as the arrays that its weight's `layout()` names, contiguous."""
    weight, (tensor, start, stop) = piece.weight, astuple(piece.rows)
    source = checkpoint.tensors[tensor]
    if isinstance(weight.storage, Fp4):
        assert isinstance(source, Fp4Experts)
        *matrices, factors = source.packed_fp4_experts(start, stop)
        if weight.transform is not None:  # puts rows in another order
            matrices = [weight.transform(part) for part in matrices]
        return [np.ascontiguousarray(part) for part in (*matrices, factors)]
    if isinstance(weight.storage, Quantization) and weight.prequantized:
        assert isinstance(source, PrequantizedTensor)
        parts = source.packed(start, stop, weight.storage)
        if weight.transform is not None:  # puts rows in another order, whatever they hold
            parts = [weight.transform(part) for part in parts]
        return [np.ascontiguousarray(part) for part in parts]
    rows = checkpoint.read(tensor, start, stop)
    if weight.transform is not None:
        rows = weight.transform(rows)
    if isinstance(weight.storage, Quantization):
        quantized = quantize(rows.reshape(-1, rows.shape[-1]), weight.storage, compensation)
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
