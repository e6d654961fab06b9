"""What is asked of a model: the same for the command, the chat, the server and Python programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen_common.errors import UserError

from qwen_runtime.guidance import Guidance
from qwen_runtime.sampling import Sampling

Message = Mapping[str, Any]

_MAX_LOGPROBS = 20


@dataclass(frozen=True)
class Request:
    """One answer to make; what each of these means stands in `Model.generate`. It can be pickled where the
    prompt's images can."""

    prompt: str | Sequence[Message]
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: str | Sequence[str] = ()
    thinking: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_image_tokens: int | None = None
    video_frames: int | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    guidance: Guidance | None = None
    logprobs: int | None = None
    speculative: bool = False

    def check(self) -> None:
        """What can be checked before a model is loaded.

        Raises:
            UserError: an option is out of range.
        """
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"max_tokens is {self.max_tokens}, but must be at least 1")
        if self.logprobs is not None and not 0 <= self.logprobs <= _MAX_LOGPROBS:
            raise UserError(f"logprobs is {self.logprobs}, but must be from 0 to {_MAX_LOGPROBS}")
        self.sampling.check()
