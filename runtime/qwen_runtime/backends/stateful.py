"""An OpenVINO artifact's language model run by plain OpenVINO, for its logits: the paged pipeline shows none.

The same IR and the same device, with other kernels for attention and the Gated DeltaNet. It is compiled when
somebody first asks for it, and holds the weights once more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qwen_runtime.artifact import Artifact
from qwen_runtime.backends.choosing import DEFAULTS, ChoosingGenerator
from qwen_runtime.backends.protocol import Logits

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
        language = core.read_model(root / (_SEEING if seeing else _TEXT))
        only_last_logits(language)
        self._model = core.compile_model(language, device, properties)
        self._defaults = {
            name: value for name, value in artifact.genai_config["search"].items() if name in DEFAULTS
        }

    def generator(self, options: Mapping[str, Any], max_length: int) -> StatefulGenerator:
        """As `Backend.logits_generator`."""
        embeddings = self._embeddings.create_infer_request() if self._embeddings else None
        request = self._model.create_infer_request()
        return StatefulGenerator(request, embeddings, {**self._defaults, **options}, max_length)


def only_last_logits(model: Any) -> None:
    """Have an openvino.Model compute the logits of a run's last token alone: [1, 1, vocab].

    Nobody reads the others. In the 0.8B geometry lm_head is a sixth of a long run's time, and the logits of
    512 tokens are half a gigabyte.
    """
    from openvino import opset13

    node = model.output("logits").node
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    hidden = node.input(0)  # [1, tokens, hidden_size]
    last = opset13.slice(hidden.get_source_output(), [-1], [np.iinfo(np.int64).max], [1], [1])
    hidden.replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


class StatefulGenerator(ChoosingGenerator):
    """One sequence. Tokens are chosen here: plain OpenVINO only computes logits."""

    def __init__(self, request: Any, embeddings: Any, settings: Mapping[str, Any], max_length: int) -> None:
        super().__init__(settings, max_length)
        self._request, self._embeddings = request, embeddings

    def _read(self, tokens: Sequence[int]) -> Logits:
        start, end = len(self._tokens), len(self._tokens) + len(tokens)
        ids, places = np.array([tokens], np.int64), np.arange(start, end, dtype=np.int64)[None]
        inputs = {
            "attention_mask": np.ones((1, end), np.int64),
            "beam_idx": np.zeros(1, np.int32),
        }
        if self._embeddings is None:
            inputs |= {"input_ids": ids, "position_ids": places}
        else:
            inputs["inputs_embeds"] = self._embeddings.infer([ids])[0]
            inputs["position_ids"] = np.repeat(places[None], _STREAMS, axis=0)
        return self._request.infer(inputs)["logits"].astype(np.float32)
