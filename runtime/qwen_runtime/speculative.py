"""Greedy speculative decoding: the checkpoint's own MTP head guesses a token, the model checks it in the run
that makes the next one.

ONNX Runtime GenAI reads the prompt, as always. From there on other graphs run on plain onnxruntime. The
decoder's takes the token verified last and a guess, gives each the bits that GenAI's run of one token would,
and tells the states after one of them and after both: a wrong guess leaves no trace.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from qwen_common.errors import UserError
from qwen_common.providers import PROVIDERS

from qwen_runtime.artifact import Artifact
from qwen_runtime.backends.protocol import OutputGenerator
from qwen_runtime.request import Request

_DECODER, _HEAD = "speculative.onnx", "mtp.onnx"
_PAIR = 2
_PAST, _PRESENT = "past_key_values.", "present."
_ROWS = "rows."
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_APART, _AT_ONCE = np.array([1, 1]), np.array([2, 0])  # rows of a pair, in two products or in one


def check_greedy(request: Request, options: Mapping[str, Any], images: bool) -> None:
    """Args:
        options: the search options that `request` comes to.
        images: whether its prompt has any.

    Raises:
        UserError: `request` asks for more than the likeliest tokens.
    """
    sampling = request.sampling
    refused = {
        "temperature": options.get("do_sample", False),
        "repetition penalty": options.get("repetition_penalty", 1) != 1,
        "presence or frequency penalty": bool(sampling.presence_penalty or sampling.frequency_penalty),
        "logit bias": bool(sampling.logit_bias),
        "smallest length": bool(request.min_tokens or request.ignore_eos),
        "echo": request.echo,
        "guidance": request.guidance is not None,
        "log probabilities": request.logprobs is not None,
        "images": images,
    }
    for what, present in refused.items():
        if present:
            raise UserError(
                f"speculative decoding chooses the likeliest token and takes no {what}: leave one off"
            )


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
    """The decoder that reads pairs of tokens, and the head. Both read the artifact's one data file.

    Attributes:
        rows: inputs of every run of the decoder, see `exact_rows`.
    """

    decoder: Any
    head: Any
    rows: dict[str, np.ndarray]

    @classmethod
    def load(cls, artifact: Artifact, provider: str) -> Sessions:
        """Load both with the provider that the model runs on.

        Raises:
            UserError: the artifact has no MTP head, an earlier version made it, or the provider is not one
                for speculative decoding.
        """
        import onnxruntime as ort

        if not {_DECODER, _HEAD} <= artifact.manifest["files"].keys():
            raise UserError(
                f"{artifact.root} has no MTP head: export a checkpoint that has one, for a profile that can "
                "use it, or leave speculative decoding off"
            )
        names = {key: record.onnxruntime_name for key, record in PROVIDERS.items() if record.speculative}
        if provider not in names:
            raise UserError(
                f"speculative decoding runs on {', '.join(names)}, not on {provider}: choose another "
                "provider, or leave it off"
            )
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # Two sessions take turns: the threads of one must not keep the cores busy while the other works.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        decoder, head = (
            ort.InferenceSession(artifact.root / name, options, providers=[names[provider]])
            for name in (_DECODER, _HEAD)
        )
        if not any(value.name.startswith(_ROWS) for value in decoder.get_inputs()):
            raise UserError(
                f"{_DECODER} of {artifact.root} was made by an earlier version: export it again, or leave "
                "speculative decoding off"
            )
        return cls(decoder, head, exact_rows(decoder))


def exact_rows(decoder: Any) -> dict[str, np.ndarray]:
    """How each kind of product in `decoder` takes the rows of a pair, by the input that tells it: at once
    where they then have the same bits as one by one, which depends on the processor.

    Found out by running the model with and without, and comparing all that comes out.
    """

    def outcome(rows: dict[str, np.ndarray]) -> list[np.ndarray]:
        run = StatefulSession(decoder, zeros(decoder, _PAIR), inputs=rows)
        return list(run(range(_PAIR)).values())

    found = {value.name: _APART for value in decoder.get_inputs() if value.name.startswith(_ROWS)}
    expected = outcome(found)
    for name in found:
        trial = found | {name: _AT_ONCE}
        if all(map(np.array_equal, outcome(trial), expected)):
            found = trial
    return found


def zeros(session: Any, capacity: int) -> dict[str, np.ndarray]:
    """The states before the first token, by the names of the graph's inputs; keys and values with room for
    `capacity` tokens."""
    sizes = {"batch_size": 1, "past_sequence_length": capacity}
    return {
        value.name: np.zeros([sizes.get(axis, axis) for axis in value.shape], _DTYPES[value.type])
        for value in session.get_inputs()
        if value.name.startswith(_PAST)
    }


class StatefulSession:
    """One graph and the states that its runs carry on: keys and values in buffers that every run writes into
    at its own place, and Gated DeltaNet's states after each token of a run, of which `keep` chooses.

    Args:
        states: see `zeros`; they are written over.
        length: tokens that are in `states`.
        inputs: what every run is given.
    """

    def __init__(
        self,
        session: Any,
        states: Mapping[str, np.ndarray],
        length: int = 0,
        inputs: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        import onnxruntime as ort

        shared = ort.OrtValue.ortvalue_from_numpy  # the array's own memory
        self._session = session
        self._length = length
        self._inputs = dict(inputs or {})
        self._kept = {name: shared(array) for name, array in states.items()}
        growing = {value.name for value in session.get_inputs() if "past_sequence_length" in value.shape}
        outputs = [value.name for value in session.get_outputs()]
        # The same states after one token of the run, after two, ...; or after all of them only.
        self._present = {
            name: [output for output in outputs if output.startswith(name.replace(_PAST, _PRESENT))]
            for name in states
        }
        self._new = {
            name: [
                self._kept[name] if name in growing else shared(np.empty_like(states[name])) for _ in present
            ]
            for name, present in self._present.items()
        }
        self._outputs = [output for output in outputs if not output.startswith(_PRESENT)]

    def __call__(self, tokens: Sequence[int], **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run `tokens` after those that are kept; returns the outputs that are not states."""
        end = self._length + len(tokens)
        positions = np.arange(self._length, end, dtype=np.int64)
        inputs |= self._inputs | {
            "input_ids": np.asarray([tokens], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.tile(positions, (3, 1, 1)),
        }
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        for name in self._outputs:
            binding.bind_output(name)
        for name, state in self._kept.items():
            binding.bind_ortvalue_input(name, state)
            for output, value in zip(self._present[name], self._new[name], strict=True):
                binding.bind_ortvalue_output(output, value)
        self._session.run_with_iobinding(binding)
        # Outputs come in the order in which they were bound.
        return {
            name: value.numpy() for name, value in zip(self._outputs, binding.get_outputs(), strict=False)
        }

    def keep(self, count: int) -> None:
        """The next run goes on after the first `count` tokens of the last one."""
        self._length += count
        for name, new in self._new.items():
            place = min(count, len(new)) - 1
            self._kept[name], new[place] = new[place], self._kept[name]


class Speculator:
    """One greedy answer, as a `Generator`.

    Attributes:
        acceptance: counts as the answer grows.
    """

    def __init__(self, sessions: Sessions, generator: OutputGenerator, max_length: int) -> None:
        """Args:
        generator: GenAI's, greedy and empty, to read the prompt.
        max_length: most tokens of prompt and answer together.
        """
        self.acceptance = Acceptance()
        self._sessions = sessions
        self._generator: OutputGenerator | None = generator  # until it has read the prompt
        self._capacity = max_length + 1  # a guess may lie past the end
        self._decoder: StatefulSession | None = None
        self._head = StatefulSession(sessions.head, zeros(sessions.head, self._capacity))
        self._length = 0
        self._ready: deque[int] = deque()  # verified, and not handed out yet
        # What the head has not seen: tokens, and for each the hidden state of the one before it. The last of
        # them is the token verified last.
        self._unseen: list[int] = []
        self._hidden: np.ndarray

    def append_tokens(self, tokens: np.ndarray) -> None:
        """Read a chunk of the prompt."""
        assert self._generator is not None, "the answer has begun"
        self._generator.append_tokens(tokens)
        hidden, unseen = self._generator.get_output("hidden_states"), tokens[1:].tolist()
        if self._length:
            hidden, unseen = np.concatenate([self._hidden, hidden], axis=1), tokens.tolist()
        if unseen:
            self._head(unseen, hidden_states=hidden[:, :-1])
            self._head.keep(len(unseen))
        self._length += len(tokens)
        self._hidden = hidden[:, -1:]

    def generate_next_token(self) -> None:
        if self._decoder is None:
            self._decoder = self._begin()
        elif not self._ready:
            self._extend(self._decoder)
        self._token = self._ready.popleft()
        self._length += 1

    def get_next_tokens(self) -> np.ndarray:
        return np.array([self._token])

    def is_done(self) -> bool:
        return self._length >= self._capacity - 1

    def _begin(self) -> StatefulSession:
        """Take the first token of the answer, and the states that the prompt left, from GenAI."""
        assert self._generator is not None
        states = zeros(self._sessions.decoder, self._capacity)
        for name, state in states.items():
            read = self._generator.get_output(name.replace(_PAST, _PRESENT))
            if read.shape == state.shape:
                states[name] = read
            else:  # keys or values, with room for another number of tokens
                state[:, :, : self._length] = read[:, :, : self._length]
        self._generator.generate_next_token()
        self._unseen = self._generator.get_next_tokens().tolist()
        self._ready.extend(self._unseen)
        self._generator = None
        return StatefulSession(self._sessions.decoder, states, self._length, self._sessions.rows)

    def _extend(self, decoder: StatefulSession) -> None:
        """One run of the model: one token more, or two where the guess is right."""
        logits = self._head(self._unseen, hidden_states=self._hidden)["logits"]
        self._head.keep(len(self._unseen))
        guess = int(logits[0, -1].argmax())
        found = decoder([self._unseen[-1], guess])
        likeliest = found["logits"][0].argmax(-1).tolist()
        accepted = likeliest[0] == guess
        self._unseen = likeliest if accepted else likeliest[:1]
        self._hidden = found["hidden_states"][:, : len(self._unseen)]
        decoder.keep(len(self._unseen))
        self._ready.extend(self._unseen)
        self.acceptance.drafted += 1
        self.acceptance.accepted += accepted
