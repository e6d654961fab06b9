"""How a model reads prompts: with what, and from where on, for earlier answers have read parts of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from qwen_common.errors import UserError

from qwen_runtime.backends.ort import Ort, OrtGenerator
from qwen_runtime.backends.protocol import Backend, Generator, ImageGenerator, RewindableGenerator
from qwen_runtime.images import take_images
from qwen_runtime.prefill import Prefill, prefill_images, prefill_tokens
from qwen_runtime.prefix import KeptGenerator, KeptGenerators
from qwen_runtime.prompt import Prompt, PromptBuilder
from qwen_runtime.request import Message, Request
from qwen_runtime.sampling import GREEDY
from qwen_runtime.states import States
from qwen_runtime.switched import SwitchedAdapter

_ROOM_TO_GROW = 4096  # tokens by which the KV cache of a kept state is rounded up
_AHEAD_CHUNK = 64  # tokens; a question that comes meanwhile waits for one chunk

OpenGenerator = Callable[[int], Generator]  # of the most tokens that it must hold


class PromptReader:
    """With generators of the backend, which are kept where they can return to an earlier point."""

    def __init__(self, backend: Backend, prompts: PromptBuilder, context_length: int, keep: int) -> None:
        """Args:
        keep: most generators that are kept.
        """
        self._backend, self._prompts, self._context_length = backend, prompts, context_length
        self._generators = KeptGenerators(keep if backend.rewinds else 0)
        self._mark = 0  # of the adapter

    def adapted(self, backend: Backend, adapter: SwitchedAdapter) -> Self:
        """One for `backend`, which has `adapter`. Both keep no more than one does, and neither goes on from
        what the other has read."""
        reader = copy(self)
        reader._backend, reader._mark = backend, adapter.mark
        return reader

    def prefill(
        self,
        prompt: Prompt,
        request: Request,
        options: Mapping[str, Any],
        max_length: int,
        open_generator: OpenGenerator,
    ) -> Prefill:
        """How `prompt` is read.

        Args:
            options: as `Sampling.search_options` gives them.
            max_length: most tokens of prompt and answer.
        """
        tokens, chunk_size = prompt.tokens, self._backend.chunk_size
        if prompt.images:
            inputs = self._backend.image_inputs(prompt.text, tokens, prompt.images)
            generator = open_generator(max_length)
            assert isinstance(generator, ImageGenerator)  # see `Backend.generator`
            return prefill_images(generator, len(tokens), inputs)
        # What a generator has drawn so far would change what it draws next.
        if not self._generators.size or "random_seed" in options:
            return prefill_tokens(open_generator(max_length), tokens, chunk_size)
        snapshot = self._prompts.shared(prompt, request)
        key = {**options, "guidance": request.guidance, "adapter": self._mark}
        kept = self._generators.take(tokens, key, max_length)
        if kept is None:
            grown = -(-max_length // _ROOM_TO_GROW) * _ROOM_TO_GROW
            max_length = min(grown, self._context_length)
            opened = open_generator(max_length)
            assert isinstance(opened, RewindableGenerator)  # else none is kept
            kept = KeptGenerator(opened, key, max_length)
        return kept.prefill(tokens, snapshot, chunk_size, self._generators.put)

    def read_ahead(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        template_kwargs: Mapping[str, Any],
        key: Mapping[str, Any],
        cancelled: Callable[[], bool],
    ) -> None:
        """As `Model.read_ahead`.

        Args:
            key: search options, and the guidance.
        """
        if not self._generators.size:
            return
        tokens = self._prompts.history(messages, tools, template_kwargs)
        kept = self._generators.take(tokens, {**key, "adapter": self._mark}, len(tokens) + 1)
        if kept is not None:
            chunk_size = min(_AHEAD_CHUNK, self._backend.chunk_size or _AHEAD_CHUNK)
            kept.read(tokens, len(tokens), chunk_size, lambda done: cancelled())
            self._generators.put(kept)

    def flush(self) -> None:
        """Write to disk what is kept there."""

    def clear(self) -> None:
        """Keep nothing in memory."""
        self._generators.clear()

    def save(self, prompt: Prompt, request: Request, path: Path) -> int:
        """As `Model.save_state`."""
        raise UserError(_NO_STATES)

    def load(self, path: Path) -> int:
        """As `Model.load_state`."""
        raise UserError(_NO_STATES)


_NO_STATES = "this model's states cannot be saved or set: load it with states=StateSettings()"


class KeepingReader(PromptReader):
    """With states that are kept as arrays."""

    def __init__(self, backend: Ort, prompts: PromptBuilder, context_length: int, states: States) -> None:
        super().__init__(backend, prompts, context_length, keep=0)
        self._kept = states

    @property
    def _ort(self) -> Ort:
        assert isinstance(self._backend, Ort)
        return self._backend

    def prefill(
        self,
        prompt: Prompt,
        request: Request,
        options: Mapping[str, Any],
        max_length: int,
        open_generator: OpenGenerator,
    ) -> Prefill:
        generator = open_generator(max_length)
        assert isinstance(generator, OrtGenerator)
        beginning, turn = self._prompts.beginning(prompt, request), self._prompts.shared(prompt, request)
        self._show(generator, prompt)
        return self._kept.prefill(generator, prompt.tokens, self._keys(prompt), beginning, turn)

    def read_ahead(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        template_kwargs: Mapping[str, Any],
        key: Mapping[str, Any],
        cancelled: Callable[[], bool],
    ) -> None:
        if take_images(messages)[1]:  # they would have to be decoded once more
            return
        tokens = self._prompts.history(messages, tools, template_kwargs)
        generator = self._ort.generator(GREEDY, None, len(tokens) + _ROOM_TO_GROW)
        keys = np.asarray(tokens, np.int64) ^ self._mark
        self._kept.read_ahead(generator, tokens, keys, lambda done: cancelled())

    def flush(self) -> None:
        self._kept.flush()

    def clear(self) -> None:
        self._kept.clear()

    def save(self, prompt: Prompt, request: Request, path: Path) -> int:
        generator = self._ort.generator(GREEDY, None, len(prompt.tokens) + 1)
        self._show(generator, prompt)
        stop = self._prompts.shared(prompt, request)
        return self._kept.save(generator, prompt.tokens, self._keys(prompt), stop, path)

    def load(self, path: Path) -> int:
        return self._kept.load(path)

    def _keys(self, prompt: Prompt) -> npt.NDArray[np.int64]:
        """As `KeptState.keys`."""
        return self._prompts.keys(prompt) ^ self._mark

    def _show(self, generator: OrtGenerator, prompt: Prompt) -> None:
        if prompt.images:
            generator.set_inputs(self._ort.image_inputs(prompt.text, prompt.tokens, prompt.images))
