"""Answers that a client has begun: a last message of the assistant's goes on where it ends.

So llama-server and Ollama take it, and Anthropic's interface; vLLM where it is told to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qwen_runtime.serve.errors import ApiError
from qwen_runtime.serve.schema.chat import ChatRequest
from qwen_runtime.serve.schema.messages import Message, TextPart
from qwen_runtime.template import THOUGHT, THOUGHT_END

_BEGIN, _END = f"{THOUGHT}\n", f"\n{THOUGHT_END}\n\n"  # as the models write them


@dataclass(frozen=True)
class Begun:
    """Attributes:
    messages: those before the answer.
    thought: how it begins; "" where it begins with what the model thinks,
    content: or says.
    thinking: what the template is asked for.
    """

    messages: Sequence[Message]
    thought: str
    content: str
    thinking: bool

    def __bool__(self) -> bool:
        return bool(self.thought or self.content)

    def text(self, opened: bool) -> str:
        """As the model would have written it after the template's own beginning.

        Args:
            opened: the template has begun a thought, whatever it was asked for.
        """
        if not self:
            return ""
        begin = "" if opened else _BEGIN
        if not self.content:
            return begin + self.thought
        return f"{begin}{self.thought}{_END}{self.content}" if self.thought or opened else self.content

    def in_thought(self, opened: bool) -> bool:
        """Whether the answer goes on inside a thought."""
        return not self.content and (opened or bool(self.thought))


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
        return Begun(asked.messages, "", "", thinking)
    if not thinking:
        thought = ""
    return Begun(asked.messages[:-1], thought, content, bool(thought))


def _text(message: Message) -> str:
    """What a message says, if it is text alone."""
    if isinstance(message.content, list):
        texts = [part.text for part in message.content if isinstance(part, TextPart)]
        return "".join(texts) if len(texts) == len(message.content) else ""
    return message.content or ""
