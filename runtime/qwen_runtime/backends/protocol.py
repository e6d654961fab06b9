"""The seam between the runtime and the library that runs a model: what a backend must do.

Nothing above knows which backend it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from qwen_runtime.guidance import Guidance
from qwen_runtime.images import Patches
from qwen_runtime.switched import SwitchedAdapter
from qwen_runtime.tokenizer import Tokenizer

Logits = npt.NDArray[np.float32]


class Generator(Protocol):
    """One sequence that grows. The methods here and below are those of onnxruntime_genai.Generator."""

    def append_tokens(self, tokens: npt.NDArray[np.int32]) -> None:
        """Read a chunk of the prompt, now or with the next token."""

    def generate_next_token(self) -> None: ...

    def get_next_tokens(self) -> npt.NDArray[Any]:
        """The token that was just generated, as an array of one, or of none while a prompt is being read."""

    def is_done(self) -> bool: ...


@runtime_checkable
class LogitsGenerator(Generator, Protocol):
    """One that shows its logits, [batch 1, 1, vocab], before each token is chosen, and takes others."""

    def get_logits(self) -> Logits: ...

    def set_logits(self, logits: Logits) -> None: ...


@runtime_checkable
class ImageGenerator(Generator, Protocol):
    """One that reads prompts with images."""

    def set_inputs(self, inputs: Any) -> None:
        """The whole prompt, as `Backend.image_inputs` of the same backend made it."""


@runtime_checkable
class RewindableGenerator(Generator, Protocol):
    """One that can return to an earlier point."""

    def snapshot_state(self) -> None:
        """Remember this point, in place of the one before."""

    def rewind_to(self, length: int) -> None:
        """Return to the point that was remembered, `length` tokens after the beginning."""


@runtime_checkable
class OutputGenerator(Generator, Protocol):
    """One that shows what its graph computed."""

    def get_output(self, name: str) -> npt.NDArray[Any]:
        """An output of the graph's last run."""


class Backend(Protocol):
    """A loaded artifact.

    Attributes:
        provider: what runs it, in one word.
        reason: why, in one line for people.
        rewinds: each generator is a `RewindableGenerator`.
        shows_logits: each generator is a `LogitsGenerator`, and `logits_generator` is no slower. Otherwise
            presence and frequency penalty and min_p go to `generator` as options.
        chunk_size: most tokens that a generator takes at a time; None: the whole prompt at once.
    """

    provider: str
    reason: str
    rewinds: bool
    shows_logits: bool
    chunk_size: int | None
    tokenizer: Tokenizer

    def generator(self, options: Mapping[str, Any], guidance: Guidance | None, max_length: int) -> Generator:
        """A generator for one sequence of at most `max_length` tokens, prompt included; an `ImageGenerator`
        where the artifact takes images.

        Args:
            options: as `Sampling.search_options` gives them.

        Raises:
            UserError: the guidance is not valid, or the backend does not know it.
        """

    def logits_generator(
        self, options: Mapping[str, Any], guidance: Guidance | None, max_length: int
    ) -> LogitsGenerator:
        """As `generator`, slower as it may be.

        Raises:
            UserError: as there, or the backend takes no guidance with logits.
        """

    def logprobs(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """As `Model.logprobs`, of a backend that does not show all logits."""

    def image_inputs(self, text: str, tokens: Sequence[int], images: Sequence[Patches]) -> Any:
        """What a generator's `set_inputs` takes in place of tokens, for a prompt with images.

        Args:
            text: as the chat template made it, with an image token for each image.
            tokens: the same, with an image token for each feature.

        Raises:
            UserError: the text has what stands for an image written in it.
        """


@runtime_checkable
class AdaptableBackend(Backend, Protocol):
    """One whose generators may have an adapter."""

    def adapted(self, adapter: SwitchedAdapter) -> Backend:
        """The same model, whose generators have `adapter`.

        Raises:
            UserError: the library does not take it.
        """
