"""From a request to what the model reads: token ids, with each image's features in their places."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from qwen_common.errors import UserError

from qwen_runtime.artifact import Artifact
from qwen_runtime.images import MOST_PIXELS, Patches, cut_patches, expand, open_images, take_images
from qwen_runtime.prefix import common_prefix
from qwen_runtime.request import ContextLengthError, Message, Request
from qwen_runtime.template import render
from qwen_runtime.video import with_frames

_MAX_IMAGE_TOKENS = 1024
_DEFAULT_MAX_TOKENS = 4096  # of an answer
_INSTRUCTING = ("system", "developer")


@dataclass(frozen=True)
class Prompt:
    """What is read before an answer.

    Attributes:
        text: raw, or as the chat template made it, with an image token for each image.
        tokens: its ids, with an image token for each feature of an image.
        images: in their order.
        messages: as the chat template took them; None of a raw text.
    """

    text: str
    tokens: Sequence[int]
    images: Sequence[Patches] = ()
    messages: Sequence[Message] | None = None

    def room(self, max_tokens: int | None, context_length: int) -> int:
        """How many tokens the answer may have, of `max_tokens` that are wanted.

        Raises:
            UserError: the prompt is empty, or leaves no room for any.
        """
        if not self.tokens:
            raise UserError("the prompt is empty")
        room = context_length - len(self.tokens)
        if room < 1:
            raise ContextLengthError(len(self.tokens), context_length)
        return min(room, _DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens)


@dataclass(frozen=True)
class PromptBuilder:
    """Builds prompts for one artifact.

    Attributes:
        provider: the execution provider that reads the prompts.
        encode: text to ids; see `Model.encode`.
        decode: the way back; whether tokens like <|im_end|> become text comes second.
        context_length: most tokens of a prompt.
        longest_token: characters of the longest one.
        most_pixels: of all images of a prompt.
    """

    artifact: Artifact
    provider: str
    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int], bool], str]
    context_length: int
    longest_token: int
    most_pixels: int = MOST_PIXELS

    def build(self, request: Request) -> Prompt:
        """Raises:
        UserError: the chat template does not take the messages, an image or a video cannot be read, or the
            artifact does not take so many.
        """
        messages: Sequence[Message] | None = None
        tokens: Sequence[int]
        sources: Sequence[Any] = ()
        if isinstance(request.prompt, str):
            text, tokens = request.prompt, self._encode(request.prompt)
        elif request.conversation is None:
            tokens = cast(Sequence[int], request.prompt)
            if wrong := [token for token in tokens if not 0 <= token < self.artifact.vocab_size]:
                raise UserError(
                    f"the prompt has token {wrong[0]}, but they go from 0 to {self.artifact.vocab_size - 1}"
                )
            text = self.decode(tokens, True)
        else:
            if not all(isinstance(message, Mapping) for message in request.conversation):
                raise UserError("a list of prompts is not supported: the model keeps one sequence's state")
            check_count(request.conversation, self.context_length)
            messages, sources = take_images(with_frames(request.conversation, request.video_frames))
            text = self.render(messages, request.thinking, request.tools, request.template_kwargs)
            text += request.begun
            tokens = self._encode(text)
        tokens, images = self._place_images(tokens, sources, request.max_image_tokens)
        return Prompt(text, tokens, images, messages)

    def render(
        self,
        messages: Sequence[Message],
        thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        template_kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """The prompt for the assistant's next turn, by the checkpoint's own chat template."""
        variables = {"enable_thinking": thinking, **template_kwargs}
        return render(self.artifact.chat_templates, messages, tools, variables)

    def shared(self, prompt: Prompt, request: Request) -> int:
        """How far the next turn's prompt will agree with `prompt`, in tokens, whatever is said in it.

        Not to the end: Qwen3.5's template begins an answer with a thought, be it empty, and leaves it out
        when the answer is history. Of a raw text all but the last token: something must be left to read.
        """
        if prompt.messages is None:
            return len(prompt.tokens) - 1
        later = [*prompt.messages, {"role": "assistant", "content": "A"}, {"role": "user", "content": "B"}]
        return self._common(prompt, request, later)

    def beginning(self, prompt: Prompt, request: Request) -> int:
        """How far the prompt of another conversation with the same tools and instructions will agree with
        `prompt`, in tokens; 0 of a raw text."""
        roles = [message.get("role") for message in prompt.messages or ()]
        count = next((at for at, role in enumerate(roles) if role not in _INSTRUCTING), 0)
        if not count and not request.tools:
            return 0
        instructions = (prompt.messages or [])[:count]
        # Two, for one may begin as the question does.
        return min(
            self._common(prompt, request, [*instructions, {"role": "user", "content": text}])
            for text in ("A", "\n\nB")
        )

    def keys(self, prompt: Prompt) -> npt.NDArray[np.int64]:
        """A number for each token: its id, and of an image's features a negative one that tells the image."""
        keys = np.asarray(prompt.tokens, np.int64)
        if prompt.images:
            places = keys == self.artifact.image_token
            keys[places] = [image.key for image in prompt.images for _ in range(image.tokens)]
        return keys

    def _common(self, prompt: Prompt, request: Request, other: Sequence[Message]) -> int:
        try:
            text = self.render(other, request.thinking, request.tools, request.template_kwargs)
        except UserError:  # a template with rules of its own about who speaks when
            return 0
        tokens: Sequence[int] = self.encode(text)
        if prompt.images:
            image_token, images = self.artifact.image_token, iter(prompt.images)
            tokens = [
                same
                for token in tokens
                for same in [token] * (next(images).tokens if token == image_token else 1)
            ]
        return common_prefix(prompt.tokens, tokens)

    def history(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        template_kwargs: Mapping[str, Any],
    ) -> Sequence[int]:
        """Ids of a conversation up to where the user speaks next."""
        one, other = (
            self.encode(
                self.render(
                    [*messages, {"role": "user", "content": text}],
                    tools=tools,
                    template_kwargs=template_kwargs,
                )
            )
            for text in ("A", "\n\nB")  # a line break may become one token with those before it
        )
        return one[: common_prefix(one, other)]

    def _encode(self, text: str) -> Sequence[int]:
        """Unless it is so long that to count its tokens would take minutes."""
        least = len(text) // self.longest_token
        if least > self.context_length:
            raise ContextLengthError(
                least,
                self.context_length,
                f"a prompt of {len(text)} characters does not fit the context of {self.context_length} "
                "tokens: shorten it",
            )
        return self.encode(text)

    def _place_images(
        self, tokens: Sequence[int], sources: Sequence[Any], max_tokens: int | None
    ) -> tuple[Sequence[int], list[Patches]]:
        """The prompt with room for every image's features, and the images themselves."""
        settings = self.artifact.images
        if settings is None:
            if sources:
                raise UserError(
                    f"{self.artifact.manifest['model']['name']} takes no images: export a vision-language "
                    "checkpoint, not --text-only"
                )
            return tokens, []
        if max_tokens is not None and max_tokens < 1:
            raise UserError(f"max_image_tokens is {max_tokens}, but must be at least 1")
        limit = self.artifact.image_prompt_tokens(self.provider)
        room = (limit - len(tokens)) // max(1, len(sources))
        if sources and room < 1:
            raise ContextLengthError(
                len(tokens),
                limit,
                f"the text has {len(tokens)} tokens and a prompt with images at most {limit}: shorten it, or "
                "give fewer images",
            )
        most = min(room, max_tokens or _MAX_IMAGE_TOKENS)
        images = [cut_patches(image, settings, most) for image in open_images(sources, self.most_pixels)]
        tokens = expand(tokens, self.artifact.image_token, self.artifact.video_token, images)
        if images and len(tokens) > limit:  # a strip cannot be made as small as it should
            raise ContextLengthError(
                len(tokens),
                limit,
                f"the images take {len(tokens)} tokens, and {limit} is the most: cut or leave some",
            )
        return tokens, images


def check_count(messages: Sequence[Message], context_length: int) -> None:
    """Raises:
    ContextLengthError: there are so many that they cannot fit the context, whatever is in them.
    """
    count = len(messages)
    for message in messages:
        content = message.get("content")
        count += len(content) if isinstance(content, Sequence) and not isinstance(content, str) else 0
    if count > context_length:
        raise ContextLengthError(
            count,
            context_length,
            f"{count} messages and parts of messages do not fit the context of {context_length} tokens: send "
            "fewer",
        )
