"""An artifact in ONNX Runtime itself, with its states in arrays of ours: to keep, copy and write to disk.

ONNX Runtime GenAI 0.18 shows its states and takes none: `set_model_input` only adds a second input of the
same name, which every later run would be given too, and positions are counted from the tokens it has read.
The graphs, the kernels and the runs are those of GenAI, and so are the logits. Tokens are drawn with another
generator of random numbers: with a temperature the same seed gives other tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from qwen_common.errors import UserError
from qwen_common.files import sha256
from qwen_common.manifest import MANIFEST
from qwen_common.providers import CPU, PROVIDERS

from qwen_runtime.artifact import Artifact
from qwen_runtime.backends.choosing import DEFAULTS, ChoosingGenerator, Guide
from qwen_runtime.backends.guide import Guides
from qwen_runtime.backends.protocol import Logits
from qwen_runtime.guidance import Guidance
from qwen_runtime.images import Patches
from qwen_runtime.prepacked import damaged
from qwen_runtime.resident import settle
from qwen_runtime.state import KeptState, Point
from qwen_runtime.switched import SwitchedAdapter
from qwen_runtime.threads import apply
from qwen_runtime.tokenizer import Tokenizer

_PAST, _PRESENT = "past_key_values.", "present."
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
_ROWS = 8  # as in `prefix`


class Ort:
    """An artifact in ONNX Runtime; attributes as in `Backend`.

    Attributes:
        given: what every run takes besides.
        factors: of the adapter that every run has, as OrtValues by input.
        digest: of what a state depends on: the artifact, the provider, and the library that runs the graph.
        alignment: a prompt may be cut at multiples of it without changing a bit.
    """

    provider = CPU.key
    reason = f"{CPU.title}: ONNX Runtime itself, so that states can be kept"
    asked_for = "states are kept", "--state-dir"  # what needs it, and by which option
    rewinds = False
    shows_logits = True

    def __init__(self, artifact: Artifact) -> None:
        import onnxruntime as ort

        def session(name: str) -> Any:
            options = ort.SessionOptions()
            options.log_severity_level = 3
            apply(options, artifact.threads)
            return ort.InferenceSession(artifact.root / name, options, providers=[CPU.onnxruntime_name])

        model = artifact.genai_config["model"]
        self.artifact = artifact
        seeing = "embedding" in model
        self.decoder = self._open_decoder(artifact, session)
        self.embedding = session(model["embedding"]["filename"]) if seeing else None
        self.vision = session(model["vision"]["filename"]) if "vision" in model else None
        self.states = {v.name: v for v in self.decoder.get_inputs() if v.name.startswith(_PAST)}
        # By its name; of one that is a state, the input that it is given to by the next run.
        self.outputs = {v.name: v.name.replace(_PRESENT, _PAST, 1) for v in self.decoder.get_outputs()}
        self.given: dict[str, npt.NDArray[Any]] = {}
        self.factors: Mapping[str, Any] = {}
        # States stay where they are: a run writes after keys and values, and over the others.
        self.shared = bool(artifact.genai_config["search"].get("past_present_share_buffer", True))
        self.chunk_size: int | None = artifact.chunk_size
        self.alignment = _ROWS if self.shared else artifact.chunk_size
        self.tokenizer = Tokenizer.open(artifact.root)
        made = f"{sha256(artifact.root / MANIFEST)} {CPU.key} {ort.__version__}"
        self.digest = hashlib.sha256(made.encode()).hexdigest()
        self._guides = Guides(artifact, self.tokenizer)
        settle(*artifact.folders)

    def _open_decoder(self, artifact: Artifact, session: Callable[[str], Any]) -> Any:
        return session(artifact.decoder(CPU.key))

    @classmethod
    def load(cls, artifact: Artifact, provider: str) -> Self:
        """Args:
            provider: `cpu`, or `auto` of an artifact that was made for it.

        Raises:
            UserError: the artifact or the provider is not one for states of ours.
        """
        wanted = artifact.manifest["provider"] if provider == "auto" else provider
        if wanted != CPU.key:
            known = PROVIDERS.get(wanted)
            what, option = cls.asked_for
            raise UserError(
                f"{what} on the CPU only, not on {known.title if known else wanted}: "
                f"take --provider cpu, or leave {option} off"
            )
        try:
            return cls(artifact)
        except UserError:
            raise
        except Exception as error:
            raise damaged(artifact, error) or UserError(
                f"ONNX Runtime could not load {artifact.root}: {' '.join(str(error).split())}"
            ) from error

    def generator(
        self, options: Mapping[str, Any], guidance: Guidance | None, max_length: int
    ) -> OrtGenerator:
        defaults = {
            name: value for name, value in self.artifact.genai_config["search"].items() if name in DEFAULTS
        }
        guide = None if guidance is None else self._guides.make(guidance)
        return self._open({**defaults, **options}, max_length, guide)

    logits_generator = generator

    def _open(self, settings: Mapping[str, Any], max_length: int, guide: Guide | None) -> OrtGenerator:
        return OrtGenerator(self, settings, max_length, guide)

    def adapted(self, adapter: SwitchedAdapter) -> Self:
        """As `AdaptableBackend`."""
        other = copy(self)
        other.factors = adapter.factors
        return other

    def logprobs(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        raise NotImplementedError("its logits say it")

    def image_inputs(self, text: str, tokens: Sequence[int], images: Sequence[Patches]) -> Pictures:
        return Pictures.place(tokens, self.artifact.image_token, images)

    def see(self, image: Patches) -> npt.NDArray[Any]:
        """Features of an image, [tokens, hidden]."""
        grid = np.asarray([[1, image.height, image.width]], np.int64)
        assert self.vision is not None  # else the prompt has no images
        (features,) = self.vision.run(None, {"pixel_values": image.values, "image_grid_thw": grid})
        return features

    @property
    def no_features(self) -> npt.NDArray[Any]:
        """Of no image."""
        assert self.embedding is not None
        (value,) = (value for value in self.embedding.get_inputs() if value.name == "image_features")
        return np.zeros((0, value.shape[1]), _DTYPES[value.type])

    def fits(self, state: KeptState) -> bool:
        """Whether `state` has what this model's runs take."""
        length = len(state.keys)
        fixed = {name: self.shape(name, 0) for name, value in self.states.items() if not _grows(value)}
        growing = {name: self.shape(name, length) for name, value in self.states.items() if _grows(value)}

        def match(found: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[int, ...]]) -> bool:
            return found.keys() == wanted.keys() and all(
                found[name].shape == shape and found[name].dtype == self.dtype(name)
                for name, shape in wanted.items()
            )

        return match(state.caches, growing) and all(match(point.fixed, fixed) for point in state.points)

    def zeros(self, length: int) -> dict[str, npt.NDArray[Any]]:
        """The states before the first token; keys and values with room for `length` tokens."""
        return {name: np.zeros(self.shape(name, length), self.dtype(name)) for name in self.states}

    def shape(self, name: str, length: int) -> tuple[int, ...]:
        """Of a state; keys and values with room for `length` tokens."""
        sizes = {"batch_size": 1, "past_sequence_length": length}
        return tuple(sizes.get(axis, axis) for axis in self.states[name].shape)

    def dtype(self, name: str) -> Any:
        return _DTYPES[self.states[name].type]


def _grows(value: Any) -> bool:
    return "past_sequence_length" in value.shape


@dataclass(frozen=True)
class Pictures:
    """The images of a prompt, in their places.

    Attributes:
        images: each with the place of its first token.
        positions: int64 [3, tokens]: time, height and width, as transformers' get_rope_index counts them.
        next_position: of the token after the prompt.
    """

    images: Sequence[tuple[int, Patches]]
    positions: npt.NDArray[np.int64]
    next_position: int

    @classmethod
    def place(cls, tokens: Sequence[int], image_token: int, images: Sequence[Patches]) -> Pictures:
        """Args:
        tokens: with an image token for each feature.
        """
        placed = []
        positions = np.empty((3, len(tokens)), np.int64)
        at = position = 0
        waiting = iter(images)
        while at < len(tokens):
            if tokens[at] != image_token:
                positions[:, at] = position
                at, position = at + 1, position + 1
                continue
            image = next(waiting)
            placed.append((at, image))
            rows, columns = _grid(image)
            grid = np.indices((1, rows, columns)).reshape(3, -1)
            positions[:, at : at + image.tokens] = position + grid
            at, position = at + image.tokens, position + max(rows, columns)
        return cls(placed, positions, position)


def _grid(image: Patches) -> tuple[int, int]:
    """Rows and columns of an image's features."""
    merge = round((image.height * image.width / image.tokens) ** 0.5)
    return image.height // merge, image.width // merge


class OrtGenerator(ChoosingGenerator):
    """One sequence, an `ImageGenerator`, `OutputGenerator` and `KeepingGenerator` too."""

    def __init__(
        self, backend: Ort, settings: Mapping[str, Any], max_length: int, guide: Guide | None
    ) -> None:
        super().__init__(settings, max_length, guide)
        self._backend = backend
        self._pictures: Pictures | None = None
        self._found: dict[str, Any] = {}  # the last run's outputs but states
        # Of a run of one token, and all that it gave: the next one has the same in the same memory.
        self._bound: tuple[Any, dict[str, Any]] | None = None
        self._features: dict[int, npt.NDArray[Any]] = {}  # of images, by the place of their first token
        room = max_length if backend.shared else 0
        self._hold(backend.zeros(room))

    def set_inputs(self, inputs: Pictures) -> None:
        """The prompt's images. Its tokens are still to be appended."""
        self._pictures = inputs

    def restore(self, state: KeptState, tokens: Sequence[int]) -> None:
        """Begin at the last point of `state`, whose caches are this generator's from now on.

        Args:
            tokens: ids of those before it.
        """
        backend, length = self._backend, state.length
        arrays = {name: array.copy() for name, array in state.points[-1].fixed.items()}
        for name, array in state.caches.items():
            if not backend.shared:
                array = np.ascontiguousarray(array[:, :, :length])
            elif array.shape[2] < self._max_length:
                smaller, array = array, np.zeros(backend.shape(name, self._max_length), array.dtype)
                array[:, :, :length] = smaller[:, :, :length]
            arrays[name] = array
        self._tokens = list(tokens)
        self._hold(arrays)

    def point(self) -> Point:
        """Where it stands."""
        fixed = {name: self._arrays[name].copy() for name in self._fixed}
        return Point(len(self._tokens), fixed)

    @property
    def caches(self) -> dict[str, npt.NDArray[Any]]:
        """Keys and values, [1, heads, tokens or more, dim]. An OrtValue's own array may not outlive what the
        value was made of."""
        return {
            name: self._arrays[name] if self._backend.shared else self._values[name].numpy().copy()
            for name in self._values
            if name not in self._fixed
        }

    def get_output(self, name: str) -> npt.NDArray[Any]:
        """An output of the graph's last run."""
        state = name.replace(_PRESENT, _PAST, 1)
        return (self._values[state] if state in self._values else self._found[name]).numpy().copy()

    def _hold(self, arrays: dict[str, npt.NDArray[Any]]) -> None:
        import onnxruntime as ort

        value = ort.OrtValue.ortvalue_from_numpy  # the array's own memory
        self._arrays, self._bound = arrays, None
        self._values = {name: value(array) for name, array in arrays.items()}
        self._fixed = [name for name in arrays if not _grows(self._backend.states[name])]
        # Where they may not be written over they take turns between two places, which takes LinearAttention
        # twice the time.
        self._spare = (
            {} if self._backend.shared else {name: np.empty_like(arrays[name]) for name in self._fixed}
        )
        self._spare_values = {name: value(array) for name, array in self._spare.items()}

    def _read(self, tokens: Sequence[int]) -> Logits:
        backend = self._backend
        start, end = len(self._tokens), len(self._tokens) + len(tokens)
        again = self._bound if len(tokens) == 1 else None
        binding, found = again or (backend.decoder.io_binding(), {})
        for name, array in self._inputs(tokens, start, end).items():
            binding.bind_cpu_input(name, array)
        if not found:
            self._bind_states(binding)
        backend.decoder.run_with_iobinding(binding)
        if not found:
            found = dict(zip(backend.outputs, binding.get_outputs(), strict=True))
            self._keep_states(found)
        self._bound = (binding, found) if backend.shared and len(tokens) == 1 else None
        self._found = {name: found[name] for name in found if backend.outputs[name] not in self._values}
        return found["logits"].numpy()[:, -1:].astype(np.float32)

    def _bind_states(self, binding: Any) -> None:
        """And the adapter, and the other outputs."""
        backend = self._backend
        for name, value in backend.factors.items():
            # Not of the session's own adapters: ONNX Runtime passes over those in runs with a binding.
            binding.bind_ortvalue_input(name, value)
        for name, value in self._values.items():
            binding.bind_ortvalue_input(name, value)
        for output, name in backend.outputs.items():
            if name in self._spare:
                binding.bind_ortvalue_output(output, self._spare_values[name])
            elif name in self._values and backend.shared:
                binding.bind_ortvalue_output(output, self._values[name])
            else:
                binding.bind_output(output)

    def _keep_states(self, found: Mapping[str, Any]) -> None:
        """Those that a run has put into other memory."""
        for name in self._values:
            if name in self._spare:
                self._arrays[name], self._spare[name] = self._spare[name], self._arrays[name]
                values = self._values[name], self._spare_values[name]
                self._spare_values[name], self._values[name] = values
            elif not self._backend.shared:
                self._values[name] = found[name.replace(_PAST, _PRESENT, 1)]

    def _inputs(self, tokens: Sequence[int], start: int, end: int) -> dict[str, npt.NDArray[Any]]:
        ids = np.asarray([tokens], np.int64)
        inputs: dict[str, npt.NDArray[Any]] = {
            **self._backend.given,
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.ascontiguousarray(self._positions(start, end)[:, None]),
        }
        if self._backend.embedding is None:
            return {"input_ids": ids, **inputs}
        features = self._features_between(start, end)
        (embedded,) = self._backend.embedding.run(None, {"input_ids": ids, "image_features": features})
        return {"inputs_embeds": embedded, **inputs}

    def _positions(self, start: int, end: int) -> npt.NDArray[np.int64]:
        """int64 [3, tokens]."""
        places = np.tile(np.arange(start, end, dtype=np.int64), (3, 1))
        if self._pictures is None:
            return places
        prompt = self._pictures.positions.shape[1]
        if end <= prompt:
            return self._pictures.positions[:, start:end]
        return places - prompt + self._pictures.next_position

    def _features_between(self, start: int, end: int) -> npt.NDArray[Any]:
        """Of the images' tokens among those from `start` to `end`."""
        parts = []
        for place, image in self._pictures.images if self._pictures else ():
            if place < end and start < place + image.tokens:
                if place not in self._features:
                    self._features[place] = self._backend.see(image)
                parts.append(self._features[place][max(0, start - place) : end - place])
        return np.concatenate([self._backend.no_features, *parts])
