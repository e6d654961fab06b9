"""What is refused before a request waits for a place: it would fail there, or hold the place for long."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import llguidance
from qwen_common.errors import UserError

from qwen_runtime.grammar import MOST_CHARACTERS, lark, why_refused
from qwen_runtime.guidance import Guidance
from qwen_runtime.info import ModelInfo
from qwen_runtime.prompt import check_count
from qwen_runtime.request import ContextLengthError, Request
from qwen_runtime.serve.errors import ApiError, request_failed

_SECONDS = 2.0  # that a grammar may take; the model's process takes as long again
# One at a time, so that they leave processors to others; llguidance works without Python's lock.
_trials = ThreadPoolExecutor(1, "guidance")


async def check(request: Request, info: ModelInfo) -> None:
    """Raises:
    ApiError: the prompt cannot fit the context, the guidance is not valid or takes too long, or there are
        tools whose calls could not be read.
    """
    if request.tools and info.dialect is None:
        raise ApiError(
            400,
            f"the chat template of {info.name} asks for calls of tools in a form that cannot be read: leave "
            'tools off, or say tool_choice "none"',
            parameter="tools",
        )
    if request.conversation is not None:
        try:
            check_count(request.conversation, info.context_length)
        except ContextLengthError as error:  # now, for only to send so many would take long
            sizes = (error.prompt_tokens, error.context_length)
            raise request_failed(str(error), True, sizes) from None
    # OpenVINO GenAI has another library inside.
    if request.guidance is not None and not info.provider.startswith("openvino"):
        if len(request.guidance.text) > MOST_CHARACTERS:  # before it is read, and kept in a cache
            raise ApiError(
                400,
                f"the guidance is too large: schemas, choices or tools of {len(request.guidance.text)} "
                f"characters, and {MOST_CHARACTERS} are the most",
            )
        loop = asyncio.get_running_loop()
        if fault := await loop.run_in_executor(_trials, _fault, request.guidance):
            raise ApiError(400, fault)


@lru_cache(maxsize=64)
def _fault(guidance: Guidance) -> str | None:
    """What is wrong with guidance, as far as it can be told without the model's vocabulary."""
    begun = time.monotonic()
    try:
        grammar = llguidance.LLMatcher.grammar_from_lark(lark(guidance.text))
        matcher = llguidance.LLMatcher(_tokenizer(), grammar, log_level=0)
    except (UserError, ValueError) as error:
        return str(error)
    if matcher.is_error():
        return f"the guidance is not valid: {why_refused(matcher.get_error())}"
    if (seconds := time.monotonic() - begun) > _SECONDS:
        return (
            f"the guidance takes {seconds:.1f} s to compile, and {_SECONDS:g} s is the limit: make schemas, "
            "choices or the regular expression smaller"
        )
    return None


@lru_cache(maxsize=1)
def _tokenizer() -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer("byte")
