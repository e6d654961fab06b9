"""Answers that a client has begun: a last message of the assistant's goes on where it ends.

So llama-server and Ollama take it, and Anthropic's interface; vLLM where it is told to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qwen_runtime.serve.errors import ApiError
from qwen_runtime.serve.schema.chat import ChatRequest
from qwen_runtime.serve.schema.messages import Message, TextPart

_THOUGHT_END = "\n</think>\n\n"  # as the models write it


@dataclass(frozen=True)
class Begun:
    """Attributes:
    messages: those before the answer.
    text: how it begins, as the model would have written it after the template's own beginning; "" where it
        begins with what the model says.
    template_thinking: whether the template begins a thought.
    in_thought: whether the answer goes on inside it.
    """

    messages: Sequence[Message]
    text: str
    template_thinking: bool
    in_thought: bool


def begun(asked: ChatRequest, thinking: bool) -> Begun:
    """Raises:
    ApiError: the last message is to be continued, and cannot be.
    """
    wanted = asked.continue_final_message
    if wanted and asked.add_generation_prompt:
        message = "continue_final_message and add_generation_prompt: leave one off"
        raise ApiError(400, message, parameter="continue_final_message")
    last = asked.messages[-1]
    content, thought = _text(last), last.reasoning_content or ""
    able = last.role == "assistant" and not last.tool_calls and bool(content or (thought and thinking))
    if wanted and not able:
        message = "continue_final_message: the last message is no text of the assistant's"
        raise ApiError(400, message, parameter="continue_final_message")
    if not able or wanted is False or asked.add_generation_prompt:
        in_thought = thinking and asked.add_generation_prompt is not False
        return Begun(asked.messages, "", thinking, in_thought)
    before = asked.messages[:-1]
    if not content:
        return Begun(before, thought, True, True)
    if thought and thinking:
        return Begun(before, f"{thought}{_THOUGHT_END}{content}", True, False)
    return Begun(before, content, False, False)


def _text(message: Message) -> str:
    """What a message says, if it is text alone."""
    if isinstance(message.content, list):
        texts = [part.text for part in message.content if isinstance(part, TextPart)]
        return "".join(texts) if len(texts) == len(message.content) else ""
    return message.content or ""
