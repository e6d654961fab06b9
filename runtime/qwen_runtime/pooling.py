"""A text as one vector: the decoder's hidden states after its final norm, pooled.

The graph shows them where it feeds an MTP head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from qwen_common.errors import UserError

from qwen_runtime.artifact import Artifact
from qwen_runtime.backends.protocol import Backend, OutputGenerator
from qwen_runtime.request import ContextLengthError
from qwen_runtime.sampling import GREEDY

Pooling = Literal["mean", "last"]
Vector = npt.NDArray[np.float32]

_OUTPUT = "hidden_states"
_SHOWN_FOR = "mtp.onnx"


def has_hidden_states(artifact: Artifact) -> bool:
    return _SHOWN_FOR in artifact.manifest["files"]


@dataclass(frozen=True)
class Pooler:
    """Makes vectors with a loaded artifact.

    Attributes:
        context_length: most tokens of a text.
    """

    artifact: Artifact
    backend: Backend
    context_length: int

    def embed(self, tokens: Sequence[int], pooling: Pooling) -> Vector:
        """As `Model.embed`."""
        if not has_hidden_states(self.artifact):
            raise UserError(
                f"{self.artifact.manifest['model']['name']} shows no hidden states to make embeddings from: "
                "export a checkpoint that has an MTP head, with --set mtp=true"
            )
        chunk_size = self.backend.chunk_size
        if chunk_size is None:
            raise UserError(
                f"{self.backend.provider} shows only a part of the hidden states: use --provider cpu"
            )
        if not tokens:
            raise UserError("a text has no tokens: there is nothing to make an embedding of")
        if len(tokens) >= self.context_length:
            raise ContextLengthError(len(tokens), self.context_length)
        if wrong := [token for token in tokens if not 0 <= token < self.artifact.vocab_size]:
            raise UserError(f"there is no token {wrong[0]}: they go from 0 to {self.artifact.vocab_size - 1}")
        generator = self.backend.generator(GREEDY, None, len(tokens) + 1)
        assert isinstance(generator, OutputGenerator)  # only ONNX Runtime's artifacts have an MTP head
        total: npt.NDArray[np.float64] | float = 0.0
        for at in range(0, len(tokens), chunk_size):
            generator.append_tokens(np.asarray(tokens[at : at + chunk_size], np.int32))
            hidden = generator.get_output(_OUTPUT)[0].astype(np.float64)  # [chunk, hidden_size]
            total = total + hidden.sum(axis=0) if pooling == "mean" else hidden[-1]
        vector = np.asarray(total)
        return (vector / np.linalg.norm(vector)).astype(np.float32)
