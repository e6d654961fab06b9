"""`/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from qwen_runtime.serve.schema.base import Integer, Options
from qwen_runtime.serve.schema.messages import Message, NamedTool, TemplateKwargs, Tool
from qwen_runtime.serve.schema.shared import SharedRequest
from qwen_runtime.serve.schema.unsupported import CHAT

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class Reasoning(Options):
    """OpenAI's newer form, which gateways send to this endpoint too."""

    model_config = ConfigDict(extra="forbid")

    effort: Effort | None = None
    summary: Any = None


class Thinking(Options):
    """As other makers of models have it. A budget would change the answer."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["enabled", "disabled"]


class PredictedPart(Options):
    type: Literal["text"]
    text: str


class Prediction(Options):
    """Text that much of the answer may be: a hint, which changes no answer."""

    type: Literal["content"]
    content: str | list[PredictedPart]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatRequest(SharedRequest):
    unsupported: ClassVar[Mapping[str, Sequence[Any]]] = CHAT

    messages: list[Message] = Field(min_length=1)
    max_tokens: Integer | None = Field(None, ge=1)
    max_completion_tokens: Integer | None = Field(None, ge=1)
    chat_template_kwargs: TemplateKwargs | None = None
    enable_thinking: bool | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    reasoning_effort: Effort | None = None
    reasoning: Reasoning | None = None
    thinking: Thinking | None = None
    prediction: Prediction | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Integer | None = Field(None, ge=0, le=20)
