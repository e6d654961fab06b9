"""An OpenVINO artifact's language model run by plain OpenVINO, for its logits: the paged pipeline shows none.

The same IR and the same device, with other kernels for attention and the Gated DeltaNet. It is compiled when
somebody first asks for it, and holds the weights once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_runtime.artifact import Artifact

# Artifacts that see have it, and a language model of its own name.
EMBEDDINGS = "openvino_text_embeddings_model.xml"
_TEXT, _SEEING = "openvino_model.xml", "openvino_language_model.xml"
_STREAMS = 4  # of positions that a seeing model wants: a token's place, and time, height and width


class Stateful:
    """The compiled IR."""

    def __init__(self, artifact: Artifact, device: str, properties: Mapping[str, Any]) -> None:
        """Args:
        device: as OpenVINO calls it.
        """
        import openvino

        core, root = openvino.Core(), artifact.root
        seeing = (root / EMBEDDINGS).is_file()
        self._embeddings = core.compile_model(root / EMBEDDINGS, device, properties) if seeing else None
        self._model = core.compile_model(root / (_SEEING if seeing else _TEXT), device, properties)
        self._defaults = {
            name: value for name, value in artifact.genai_config["search"].items() if name in _GREEDY
        }

    def generator(self, options: Mapping[str, Any], max_length: int) -> StatefulGenerator:
        """As `Backend.logits_generator`."""
        embeddings = self._embeddings.create_infer_request() if self._embeddings else None
        settings = {**_GREEDY, **self._defaults, **options}
        return StatefulGenerator(self._model.create_infer_request(), embeddings, settings, max_length)


class StatefulGenerator:
    """One sequence. Tokens are chosen here: plain OpenVINO only computes logits."""

    def __init__(self, request: Any, embeddings: Any, settings: Mapping[str, Any], max_length: int) -> None:
        self._request, self._embeddings, self._max_length = request, embeddings, max_length
        self._settings = settings
        self._random = np.random.default_rng(settings["random_seed"])
        self._tokens: list[int] = []
        self._pending: list[int] = []  # a token that was chosen, and is read when the next logits are wanted
        self._logits: npt.NDArray[np.float32] = np.zeros((1, 1, 0), np.float32)

    def append_tokens(self, tokens: npt.NDArray[np.int32]) -> None:
        self._read([*self._pending, *(int(token) for token in tokens)])
        self._pending = []

    def get_logits(self) -> npt.NDArray[np.float32]:
        """float32 [1, 1, vocab] after the last token."""
        if self._pending:
            self.append_tokens(np.empty(0, np.int32))
        return self._logits

    def set_logits(self, logits: npt.NDArray[np.float32]) -> None:
        self._logits = logits

    def generate_next_token(self) -> None:
        logits = self.get_logits().reshape(-1)
        self._pending = [choose(logits, self._tokens, self._settings, self._random)]

    def get_next_tokens(self) -> npt.NDArray[np.int64]:
        return np.array(self._pending, np.int64)

    def is_done(self) -> bool:
        return len(self._tokens) + len(self._pending) >= self._max_length

    def _read(self, tokens: list[int]) -> None:
        start, self._tokens = len(self._tokens), self._tokens + tokens
        ids, places = np.array([tokens], np.int64), np.arange(start, len(self._tokens), dtype=np.int64)[None]
        inputs = {
            "attention_mask": np.ones((1, len(self._tokens)), np.int64),
            "beam_idx": np.zeros(1, np.int32),
        }
        if self._embeddings is None:
            inputs |= {"input_ids": ids, "position_ids": places}
        else:
            inputs["inputs_embeds"] = self._embeddings.infer([ids])[0]
            inputs["position_ids"] = np.repeat(places[None], _STREAMS, axis=0)
        self._logits = self._request.infer(inputs)["logits"][:, -1:].astype(np.float32)


# Settings where nobody says otherwise.
_GREEDY: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "random_seed": None,
}


def choose(
    logits: npt.NDArray[np.float32],
    before: list[int],
    settings: Mapping[str, Any],
    random: np.random.Generator,
) -> int:
    """The next token's id: the likeliest, or drawn as temperature, top_k and top_p say.

    Args:
        logits: [vocab].
        before: prompt and answer so far, which `repetition_penalty` makes less likely.
    """
    if settings["repetition_penalty"] != 1 and before:
        seen = np.unique(before)
        scale = np.where(logits[seen] > 0, 1 / settings["repetition_penalty"], settings["repetition_penalty"])
        logits = logits.copy()
        logits[seen] *= scale
    if not settings["do_sample"]:
        return int(logits.argmax())
    order = np.argsort(-logits)[: settings["top_k"] or None]
    weights = np.exp((logits[order] - logits[order[0]]).astype(np.float64) / settings["temperature"])
    weights /= weights.sum()
    kept = weights.cumsum() - weights < settings["top_p"]  # those before which the sum is not reached yet
    return int(random.choice(order[kept], p=weights[kept] / weights[kept].sum()))
