"""The file of a state, without a model."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qwen_runtime.state import KeptState, Point, common_keys, read, read_outline, write

KEYS = np.arange(10, 22)


def kept(*points: tuple[int, bool]) -> KeptState:
    caches = {"key": np.arange(24, dtype=np.float32).reshape(1, 1, 12, 2)}
    made = [Point(length, {"conv": np.full(3, length, np.float32)}, shared) for length, shared in points]
    return KeptState(KEYS, caches, made)


def test_points_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    with path.open("wb") as file:
        write(file, kept((4, True), (7, True), (9, False)), "model")
    found = read(path, "model")
    assert [(point.length, point.shared) for point in found.points] == [(4, True), (7, True), (9, False)]
    assert [point.fixed["conv"][0] for point in found.points] == [4, 7, 9]
    assert found.keys.tolist() == list(range(10, 19)) and found.caches["key"].shape == (1, 1, 9, 2)
    outline = read_outline(path, "model")
    other = KEYS.copy()
    other[8] = 0
    assert [outline.spares(keys) for keys in (KEYS, KEYS[:9], other, KEYS[:4], KEYS[1:])] == [9, 7, 7, 0, 0]
    assert [found.serves(keys) for keys in (KEYS, KEYS[:9], other, KEYS[:4], KEYS[1:])] == [3, 2, 2, 0, 0]
    assert common_keys(KEYS, other) == common_keys(other, KEYS[:8]) == 8


@pytest.mark.parametrize(
    "points",
    [
        None,
        [],
        "12",
        {"12": True},
        [12],
        [[12]],
        [[12, True, 1]],
        [[12, 1]],
        [[12.0, True]],
        [[True, True]],
        [[0, True], [12, True]],
        [[-1, True], [12, True]],
        [[13, True]],
        [[12, True], [4, True]],
        [[4, True], [4, True], [12, False]],
        [[4, True]],
    ],
)
def test_points_that_are_none(tmp_path: Path, points: Any) -> None:
    file = io.BytesIO()
    write(file, kept((12, True)), "model")
    arrays = dict(np.load(io.BytesIO(file.getvalue())))
    about = {**json.loads(arrays["about"].tobytes()), "points": points}
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    path = tmp_path / "state.npz"
    np.savez(path, **arrays)
    for reading in (read, read_outline):
        with pytest.raises(ValueError, match="its points are none of its tokens"):
            reading(path, "model")
