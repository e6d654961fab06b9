"""The graphs of speculative decoding on plain onnxruntime, and the states that their runs carry on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from qwen_common.errors import UserError
from qwen_common.providers import CPU

from qwen_runtime.artifact import Artifact
from qwen_runtime.speculative import Speculative
from qwen_runtime.threads import apply

MOST_DRAFTS = 7  # a run of more tokens costs more than it can bring (docs/speculative.md)
_GRAPHS, _HEAD = {Speculative.FAST: "speculative.onnx", Speculative.EXACT: "pairs.onnx"}, "mtp.onnx"
_PAIR = 2
_PAST, _PRESENT, _SETTLED = "past_key_values.", "present.", "settled."
_PENDING, _ENTERING, _ROWS = "pending", "entering", "rows."
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
_APART, _AT_ONCE = np.array([1, 1]), np.array([2, 0])  # rows of a pair, in two products or in one


@dataclass(frozen=True)
class Sessions:
    """All read the artifact's one data file.

    Attributes:
        decoder: reads several tokens in a run.
        most: tokens that may be drafted for one.
        head: the checkpoint's MTP head, where the artifact has one.
        rows: inputs of every run of the decoder, see `exact_rows`.
    """

    decoder: Any
    most: int
    head: Any | None
    rows: dict[str, npt.NDArray[np.int64]]

    @classmethod
    def load(cls, artifact: Artifact, how: Speculative) -> Sessions:
        """Raises:
        UserError: the artifact has no such graph.
        """
        import onnxruntime as ort

        files = artifact.manifest["files"]
        if artifact.manifest.get("switched_adapters"):
            raise UserError(
                f"{artifact.root} has adapters to switch at run time, which no graph for several tokens "
                "takes: leave --speculative off"
            )
        if missing := [name for name in _GRAPHS.values() if name not in files]:
            reason = "was made by an earlier version" if _HEAD in files else "cannot decode speculatively"
            raise UserError(
                f"{artifact.root} {reason}, for it has no {missing[0]}: export it again with a profile for "
                "the CPU, or leave --speculative off"
            )
        options = ort.SessionOptions()
        options.log_severity_level = 3
        apply(options, artifact.threads)
        # Sessions take turns: the threads of one must not keep the cores busy while another works.
        options.add_session_config_entry("session.force_spinning_stop", "1")

        def session(name: str) -> Any:
            return ort.InferenceSession(artifact.root / name, options, providers=[CPU.onnxruntime_name])

        decoder, head = session(_GRAPHS[how]), session(_HEAD) if _HEAD in files else None
        if how == Speculative.EXACT:
            return cls(decoder, _PAIR - 1, head, exact_rows(decoder))
        for drafts in (1, MOST_DRAFTS):  # the first run of a shape takes longer
            StatefulSession(decoder, zeros(decoder, 1 + drafts))(range(1 + drafts))
        return cls(decoder, MOST_DRAFTS, head, {})


def exact_rows(decoder: Any) -> dict[str, npt.NDArray[np.int64]]:
    """How each kind of product in `decoder`, a graph of pairs, takes the rows of a pair, by the input that
    tells it: at once where they then have the same bits as one by one, which depends on the processor.

    Found out by running the model with and without, and comparing all that comes out.
    """

    def outcome(rows: dict[str, npt.NDArray[np.int64]]) -> list[npt.NDArray[Any]]:
        run = StatefulSession(decoder, zeros(decoder, _PAIR), inputs=rows)
        return list(run(range(_PAIR)).values())

    found = {value.name: _APART for value in decoder.get_inputs() if value.name.startswith(_ROWS)}
    expected = outcome(found)
    for name in found:
        trial = found | {name: _AT_ONCE}
        if all(map(np.array_equal, outcome(trial), expected)):
            found = trial
    return found


def zeros(session: Any, capacity: int) -> dict[str, npt.NDArray[Any]]:
    """The states before the first token, by the names of the graph's inputs; keys and values with room for
    `capacity` tokens."""
    sizes = {"batch_size": 1, "past_sequence_length": capacity}
    return {
        value.name: np.zeros([sizes.get(axis, axis) for axis in value.shape], _DTYPES[value.type])
        for value in session.get_inputs()
        if value.name.startswith(_PAST)
    }


def without_pending(decoder: Any) -> tuple[dict[str, str], dict[str, npt.NDArray[np.float32]]]:
    """Outputs of `decoder`, a graph whose tokens may be taken back, where none are, each with the state that
    it is in the next run, and what it is given."""
    outputs = [value.name for value in decoder.get_outputs() if value.name != _ENTERING]
    shapes = {value.name: value.shape for value in decoder.get_inputs() if value.name == _PENDING}
    given = {name: np.zeros((shape[0], 0, shape[2]), np.float32) for name, shape in shapes.items()}
    kept = {name: name.replace(_PRESENT, _PAST, 1).replace(_SETTLED, _PAST, 1) for name in outputs}
    return kept, given


class StatefulSession:
    """One graph and the states that its runs carry on: keys and values in buffers that every run writes into
    at its own place, and Gated DeltaNet's states, of which `keep` chooses how many of the last run's tokens
    they go on after.

    A graph of pairs tells the states after each of its tokens. One with an input `pending` tells those before
    the run, and is given the tokens that were kept again.

    Args:
        states: see `zeros`; they are written over.
        length: tokens that are in `states`.
        inputs: what every run is given.
        spare: more memory for states, which is made where it is missing.

    Attributes:
        values: the states, as OrtValues.
        spare: memory that no state is in now.
        pending: whether tokens were kept that are not in the states yet.
    """

    def __init__(
        self,
        session: Any,
        states: Mapping[str, Any],
        length: int = 0,
        inputs: Mapping[str, npt.NDArray[Any]] | None = None,
        spare: Mapping[str, Any] | None = None,
    ) -> None:
        import onnxruntime as ort

        def value(array: Any) -> Any:
            return array if isinstance(array, ort.OrtValue) else ort.OrtValue.ortvalue_from_numpy(array)

        taken = {value.name: value for value in session.get_inputs()}
        outputs = [value.name for value in session.get_outputs()]
        self._session = session
        self._length = length
        self._inputs = dict(inputs or {})
        self.values = {name: value(array) for name, array in states.items()}
        self._defers = _PENDING in taken
        self._waiting: npt.NDArray[np.float32] | None = None  # `entering` of the tokens that are pending
        if self._defers:
            layers, _, width = taken[_PENDING].shape
            self._nothing = np.zeros((layers, 0, width), np.float32)
        # The same states after one token of the run, after two, ...; or after all of them only.
        self._present = {
            name: [output for output in outputs if output.startswith(name.replace(_PAST, _PRESENT))]
            for name in self.values
        }
        settled = ((name, name.replace(_PAST, _SETTLED)) for name in self.values)
        self._settled = {name: output for name, output in settled if output in outputs}
        self._fixed = {name for name in self.values if "past_sequence_length" not in taken[name].shape}
        self.spare: dict[str, list[Any]] = {}
        for name in () if self._defers else self._fixed:
            there = [value(array) for array in (spare or {}).get(name, ())]
            shape, dtype = self.values[name].shape(), _DTYPES[taken[name].type]
            made = [value(np.empty(shape, dtype)) for _ in range(len(self._present[name]) - len(there))]
            self.spare[name] = there + made
        self._outputs = [name for name in outputs if not name.startswith((_PRESENT, _SETTLED))]

    @property
    def pending(self) -> bool:
        return self._waiting is not None and self._waiting.shape[1] > 0

    def __call__(
        self, tokens: Sequence[int], settle: bool = False, **inputs: npt.NDArray[Any]
    ) -> dict[str, npt.NDArray[Any]]:
        """Run `tokens` after those that are kept; returns the outputs that are not states.

        Args:
            settle: all of them are kept, in the states.
            inputs: what else the graph is given, or something in place of what it is given else.
        """
        end = self._length + len(tokens)
        positions = np.arange(self._length, end, dtype=np.int64)
        given = self._inputs | {
            "input_ids": np.asarray([tokens], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.tile(positions, (3, 1, 1)),
        }
        if self._defers:
            given[_PENDING] = self._nothing if self._waiting is None else self._waiting
        binding = self._session.io_binding()
        for name, array in (given | inputs).items():
            binding.bind_cpu_input(name, array)
        for name in self._outputs:
            binding.bind_output(name)
        for name, state in self.values.items():
            binding.bind_ortvalue_input(name, state)
            if before := self._settled.get(name):
                binding.bind_ortvalue_output(before, state)
            if settle or not before:
                for output, value in zip(self._present[name], self._places(name), strict=True):
                    binding.bind_ortvalue_output(output, value)
        self._session.run_with_iobinding(binding)
        # Outputs come in the order in which they were bound.
        found = {
            name: value.numpy() for name, value in zip(self._outputs, binding.get_outputs(), strict=False)
        }
        if self._defers:
            self._waiting = self._nothing if settle else found.pop(_ENTERING)
        if settle:
            self._length = end
        return found

    def keep(self, count: int) -> None:
        """The next run goes on after the first `count` tokens of the last one."""
        self._length += count
        if self._waiting is not None:
            self._waiting = np.ascontiguousarray(self._waiting[:, :count])
        else:
            self._swap(count - 1)

    def forget(self, count: int) -> None:
        """The next run goes on before the last `count` tokens that were kept. Keys and values only can be cut
        back like this."""
        assert not self._fixed
        self._length -= count

    def _places(self, name: str) -> list[Any]:
        """Where the state `name` is written: in its own place, unless it may have to be taken back."""
        return self.spare.get(name) or [self.values[name]] * len(self._present[name])

    def _swap(self, place: int) -> None:
        """What was written in this place of the spare memory are the states."""
        for name, memory in self.spare.items():
            index = min(place, len(memory) - 1)
            self.values[name], memory[index] = memory[index], self.values[name]
