"""The seam between the runtime and the library that runs a model: what a backend must do.

Nothing above knows which backend it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qwen_runtime.guidance import Guidance
from qwen_runtime.images import Patches


class TokenStream(Protocol):
    """Tokens to text, one after the other."""

    def decode(self, token: int) -> str:
        """The text that is whole with `token`; "" in the middle of a character."""


class Tokenizer(Protocol):
    """Text to tokens and back."""

    def encode(self, text: str) -> Sequence[int] | npt.NDArray[Any]:
        """Ids; special tokens written in `text` are recognised."""

    def decode(self, tokens: npt.NDArray[np.int32]) -> str: ...

    def create_stream(self) -> TokenStream: ...


class Generator(Protocol):
    """One sequence that grows. The methods are those of onnxruntime_genai.Generator that make an answer."""

    def append_tokens(self, tokens: npt.NDArray[np.int32]) -> None: ...

    def generate_next_token(self) -> None: ...

    def get_next_tokens(self) -> npt.NDArray[Any]:
        """The token that was just generated, as an array of one, or of none while a prompt is being read."""

    def is_done(self) -> bool: ...


class Backend(Protocol):
    """A loaded artifact.

    Attributes:
        provider: what runs it, in one word.
        reason: why, in one line for people.
        rewinds: generators have `snapshot_state` and `rewind_to`.
        shows_logits: all generators have `get_logits` and `set_logits`, not only those that were asked for
            with `logits`. Without them presence and frequency penalty and min_p go to `generator` as options.
        appends: most tokens that a generator takes at a time; None: the whole prompt at once.
    """

    provider: str
    reason: str
    rewinds: bool
    shows_logits: bool
    appends: int | None
    tokenizer: Tokenizer

    def generator(
        self,
        options: Mapping[str, Any],
        guidance: Guidance | None,
        max_length: int,
        logits: bool = False,
    ) -> Generator:
        """A generator for one sequence of at most `max_length` tokens, prompt included.

        Args:
            options: as `Sampling.search_options` gives them.
            logits: it shall have `get_logits` and `set_logits`, slower as it may be.

        Raises:
            UserError: the guidance is not valid, or the backend does not know it, or not with logits.
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
