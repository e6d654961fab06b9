"""Greedy speculative decoding: the checkpoint's own MTP head guesses a token, the model checks it in the run
that makes the next one.

On plain onnxruntime, because ONNX Runtime GenAI does not run the head. A Gated DeltaNet's state cannot be cut
back: a run leaves the states that it began with untouched, and a wrong guess drops those that it led to. The
token that the run did verify joins the next run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from qwen_profiles.errors import UserError

from qwen_runtime.artifact import Artifact

_DECODER, _HEAD = "speculative.onnx", "mtp.onnx"
_PROVIDERS = {"cpu": "CPUExecutionProvider"}
# Every wrong guess makes the next run one token longer. After this many the run takes no guess, so that its
# states may be kept.
MOST_VERIFIED = 3
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass
class Acceptance:
    """How many tokens the head guessed, and how many of them the model would have chosen itself."""

    drafted: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float:
        return self.accepted / max(1, self.drafted)


@dataclass(frozen=True)
class Sessions:
    """The decoder that also tells its hidden states, and the head. Both read the artifact's one data file."""

    decoder: Any
    head: Any

    @classmethod
    def load(cls, artifact: Artifact, provider: str) -> Sessions:
        """Load both with the provider that the model runs on.

        Raises:
            UserError: the artifact has no MTP head, or the provider is not one for speculative decoding.
        """
        import onnxruntime as ort

        if _HEAD not in artifact.manifest["files"]:
            raise UserError(
                f"{artifact.root} has no MTP head: export a checkpoint that has one, for a profile that can "
                "use it, or leave speculative decoding off"
            )
        if provider not in _PROVIDERS:
            raise UserError(
                f"speculative decoding runs on {', '.join(_PROVIDERS)}, not on {provider}: choose another "
                "provider, or leave it off"
            )
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # Two sessions take turns: the threads of one must not keep the cores busy while the other works.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        return cls(
            *(
                ort.InferenceSession(artifact.root / name, options, providers=[_PROVIDERS[provider]])
                for name in (_DECODER, _HEAD)
            )
        )


class StatefulRun:
    """One graph and its states: keys and values in buffers that every run writes into at its own place, and
    Gated DeltaNet's states twice, because they cannot be cut back."""

    def __init__(self, session: Any, capacity: int) -> None:
        self._session = session
        self._length = 0  # tokens in the states that are kept
        self._added = 0
        self._caches: dict[str, Any] = {}
        self._kept: dict[str, Any] = {}
        self._new: dict[str, Any] = {}
        sizes = {"batch_size": 1, "past_sequence_length": capacity}
        for value in session.get_inputs():
            if value.name.startswith("past_key_values."):
                shape = [sizes.get(axis, axis) for axis in value.shape]
                if "past_sequence_length" in value.shape:
                    self._caches[value.name] = _zeros(shape, value.type)
                else:
                    self._kept[value.name] = _zeros(shape, value.type)
                    self._new[value.name] = _zeros(shape, value.type)
        self._outputs = [
            value.name for value in session.get_outputs() if not value.name.startswith("present.")
        ]

    def __call__(self, tokens: Sequence[int], **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run `tokens` after those that are kept; returns the outputs that are not states."""
        count = len(tokens)
        end = self._length + count
        positions = np.arange(self._length, end, dtype=np.int64)
        inputs |= {
            "input_ids": np.asarray([tokens], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.tile(positions, (3, 1, 1)),
        }
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        for name in self._outputs:
            binding.bind_output(name)
        for read, written in (self._caches, self._caches), (self._kept, self._new):
            for name, value in read.items():
                binding.bind_ortvalue_input(name, value)
                binding.bind_ortvalue_output(name.replace("past_key_values.", "present."), written[name])
        self._session.run_with_iobinding(binding)
        self._added = count
        # Outputs come in the order in which they were bound.
        return {
            name: value.numpy() for name, value in zip(self._outputs, binding.get_outputs(), strict=False)
        }

    def keep(self) -> None:
        """The next run goes on where the last one ended, not where it began."""
        self._length += self._added
        self._kept, self._new = self._new, self._kept


def _zeros(shape: Sequence[int], kind: str) -> Any:
    import onnxruntime as ort

    return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, _DTYPES[kind]))


class Speculator:
    """One greedy answer, with those methods of onnxruntime_genai.Generator that make one.

    Attributes:
        acceptance: counts as the answer grows.
    """

    def __init__(self, sessions: Sessions, max_length: int) -> None:
        """`max_length`: most tokens of prompt and answer together."""
        self.acceptance = Acceptance()
        self._decoder = StatefulRun(sessions.decoder, max_length + 1)  # a guess may lie past the end
        self._head = StatefulRun(sessions.head, max_length + 1)
        self._max_length = max_length
        self._length = 0
        self._verified: list[int] = []  # since the states that are kept
        self._ready: deque[int] = deque()  # verified, and not handed out yet
        # What the head has not seen: tokens, and for each the hidden state of the one before it.
        self._unseen: list[int] = []
        self._hidden: np.ndarray

    def append_tokens(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Read a piece of the prompt."""
        tokens = [int(token) for token in tokens]
        found = self._decoder(tokens)
        self._decoder.keep()
        hidden, unseen = found["hidden_states"], tokens[1:]
        if self._length:
            hidden, unseen = np.concatenate([self._hidden, hidden], axis=1), tokens
        if unseen:
            self._head(unseen, hidden_states=hidden[:, :-1])
            self._head.keep()
        self._length += len(tokens)
        likeliest = int(found["logits"][0, -1].argmax())
        self._verified, self._ready = [likeliest], deque([likeliest])
        self._unseen, self._hidden = [likeliest], hidden[:, -1:]

    def generate_next_token(self) -> None:
        if not self._ready:
            self._extend()
        self._token = self._ready.popleft()
        self._length += 1

    def get_next_tokens(self) -> np.ndarray:
        return np.array([self._token])

    def is_done(self) -> bool:
        return self._length >= self._max_length

    def _extend(self) -> None:
        """One run of the model: one token more, or two where the guess is right."""
        logits = self._head(self._unseen, hidden_states=self._hidden)["logits"]
        self._head.keep()
        guess = int(logits[0, -1].argmax())
        guessed = len(self._verified) < MOST_VERIFIED
        found = self._decoder([*self._verified, guess] if guessed else self._verified)
        likeliest = found["logits"][0, -2 if guessed else -1 :].argmax(-1).tolist()
        accepted = guessed and likeliest[0] == guess
        new = likeliest if accepted else likeliest[:1]
        first = len(self._verified) - 1
        self._unseen, self._hidden = new, found["hidden_states"][:, first : first + len(new)]
        if accepted or not guessed:
            self._decoder.keep()
            self._verified = new[-1:]
        else:
            self._verified = [*self._verified, *new]
        self._ready.extend(new)
        self.acceptance.drafted += guessed
        self.acceptance.accepted += accepted
