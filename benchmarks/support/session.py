"""The bare ONNX Runtime session that runs an artifact's graph."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


class Session:
    """A graph run piece by piece, its states carried along."""

    providers: Sequence[str] = ("CPUExecutionProvider",)

    def __init__(self, artifact: Path, batch: int = 1, threads: int = 0) -> None:
        """`threads` 0: as many as there are cores."""
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        self._session = ort.InferenceSession(artifact / "model.onnx", options, providers=list(self.providers))
        self.outputs = [output.name for output in self._session.get_outputs()]
        self._artifact = artifact
        self._batch = batch
        self.reset()

    def reset(self) -> None:
        self._length = 0
        self.state = {}
        genai_config = json.loads((self._artifact / "genai_config.json").read_text())
        head_size = genai_config["model"]["decoder"]["head_size"]
        sizes = {"batch_size": self._batch, "past_sequence_length": 0, "kv_cache_dim": head_size}
        for value in self._session.get_inputs():
            if value.name.startswith("past"):
                dtype = _DTYPES[value.type]
                shape = [sizes.get(axis, axis) for axis in value.shape]
                self.state[value.name] = np.zeros(shape, dtype)

    def run(self, ids: Sequence[int] | np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
        """Append `ids` [tokens] or [batch, tokens]; returns logits [batch, tokens or 1, vocab].

        `positions` [3, batch, tokens] stands for the tokens' places in the sequence.
        """
        return self.run_all(ids, positions)["logits"]

    def run_all(
        self, ids: Sequence[int] | np.ndarray, positions: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """The same; returns every output."""
        ids = np.atleast_2d(np.asarray(ids, np.int64))
        start, self._length = self._length, self._length + ids.shape[1]
        if positions is None:
            positions = np.arange(start, self._length, dtype=np.int64)
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones((self._batch, self._length), np.int64),
            "position_ids": np.broadcast_to(positions, (3, self._batch, ids.shape[1])).copy(),
            **self.state,
        }
        results = dict(zip(self.outputs, self._session.run(None, feeds), strict=True))
        # `past_key_values.3.key` or `past.3.conv`, and `present.3.key`: the same but for the first word.
        self.state = {name: results["present." + name.split(".", 1)[1]] for name in self.state}
        return results


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of the angle between the last axes."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
