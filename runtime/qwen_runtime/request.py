"""What is asked of a model: the same for the command, the chat, the server and Python programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from qwen_common.errors import UserError

from qwen_runtime.guidance import Guidance
from qwen_runtime.sampling import Sampling

Message = Mapping[str, Any]

_MAX_LOGPROBS = 20


class ContextLengthError(UserError):
    """A prompt that is too long.

    Attributes:
        prompt_tokens: how many it has.
        context_length: most of prompt and answer together.
    """

    def __init__(self, prompt_tokens: int, context_length: int, message: str | None = None) -> None:
        super().__init__(
            message
            or f"the prompt has {prompt_tokens} tokens, and the context is {context_length}: shorten it"
        )
        self.prompt_tokens, self.context_length = prompt_tokens, context_length


@dataclass(frozen=True)
class Request:
    """One answer to make. What most of these mean stands in `Model.generate`; here is what that has not. It
    can be pickled where the prompt's images can.

    Attributes:
        prompt: token ids too.
        max_tokens: 0 reads the prompt only.
        stop_token_ids: ids at which to stop, as at those that end an answer.
        min_tokens: tokens that an answer has before it may end, unless its guidance lets it only end.
        ignore_eos: the model's own end is never chosen.
        echo: the prompt is told first, also its log probabilities where `logprobs` is set; it is then read
            token by token, as an answer is computed, and nothing that was kept is used. The token that ends
            the answer has a log probability then too.
        begun: for messages, how the answer begins; it goes on from there.
        prediction: a text that much of the answer may be. Where decoding is speculative tokens are drafted
            from it too; it changes no answer.
        read_ahead: whether a server may read the conversation on after the answer.
    """

    prompt: str | Sequence[int] | Sequence[Message]
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    echo: bool = False
    begun: str = ""
    read_ahead: bool = True
    thinking: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_image_tokens: int | None = None
    video_frames: int | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    guidance: Guidance | None = None
    logprobs: int | None = None
    prediction: str = ""
    adapter: str | None = None

    @property
    def conversation(self) -> Sequence[Message] | None:
        """The prompt, where it is messages."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return None
        return cast(Sequence[Message], self.prompt)

    def check(self) -> None:
        """What can be checked before a model is loaded.

        Raises:
            UserError: an option is out of range.
        """
        if self.max_tokens is not None and self.max_tokens < 0:
            raise UserError(f"max_tokens is {self.max_tokens}, but must be at least 0")
        if self.min_tokens < 0:
            raise UserError(f"min_tokens is {self.min_tokens}, but must be at least 0")
        if self.logprobs is not None and not 0 <= self.logprobs <= _MAX_LOGPROBS:
            raise UserError(f"logprobs is {self.logprobs}, but must be from 0 to {_MAX_LOGPROBS}")
        if not isinstance(self.prediction, str):
            raise UserError("prediction must be a text")
        self.sampling.check()
