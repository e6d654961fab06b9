"""`/v1/responses`: the same request in OpenAI's newer form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from qwen_runtime.serve.schema.base import Body, Integer, Number, Part, parse
from qwen_runtime.serve.schema.chat import ChatRequest, Effort
from qwen_runtime.serve.schema.messages import TemplateKwargs
from qwen_runtime.serve.schema.unsupported import RESPONSES


class InputText(Part):
    type: Literal["input_text", "output_text", "text"]
    text: str

    def as_chat(self) -> dict[str, Any]:
        return {"type": "text", "text": self.text}


class InputImage(Part):
    type: Literal["input_image"]
    image_url: str

    def as_chat(self) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": self.image_url}}


def _parts(content: str | list[InputText | InputImage]) -> str | list[dict[str, Any]]:
    return content if isinstance(content, str) else [part.as_chat() for part in content]


class InputMessage(Part):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[InputText | InputImage, Field(discriminator="type")]]

    def as_chat(self) -> dict[str, Any]:
        return {"role": self.role, "content": _parts(self.content)}


class InputCall(Part):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str

    def as_chat(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"role": "assistant", "tool_calls": [{"id": self.call_id, "function": function}]}


class InputCallOutput(Part):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[Annotated[InputText | InputImage, Field(discriminator="type")]]

    def as_chat(self) -> dict[str, Any]:
        return {"role": "tool", "tool_call_id": self.call_id, "content": _parts(self.output)}


class InputReasoning(Part):
    """A thought of an earlier answer: Qwen3.5's template leaves it out of the history."""

    type: Literal["reasoning"]


class ResponseReasoning(Part):
    effort: Effort | None = None


class ResponseText(Part):
    format: dict[str, Any] | None = None


class ResponseRequest(Body):
    """Nothing is stored, so what refers to an earlier response is refused."""

    unsupported: ClassVar[Mapping[str, Sequence[Any]]] = RESPONSES

    model: str | None = None
    input: (
        str
        | Annotated[list[InputCall | InputCallOutput | InputReasoning | InputMessage], Field(min_length=1)]
    )
    instructions: str | None = None
    max_output_tokens: Integer | None = Field(None, ge=1)
    stream: bool = False
    temperature: Number | None = Field(None, ge=0, le=2)
    top_p: Number | None = Field(None, gt=0, le=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ResponseReasoning | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    enable_thinking: bool | None = None
    text: ResponseText | None = None
    metadata: dict[str, str] | None = None

    def as_chat(self) -> ChatRequest:
        """The same request in the older form.

        Raises:
            ApiError: a tool or a format is not one.
        """
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            messages.append({"role": "user", "content": self.input})
        else:
            for item in self.input:
                if isinstance(item, InputReasoning):
                    continue
                message = item.as_chat()
                if isinstance(item, InputCall) and messages and messages[-1]["role"] == "assistant":
                    # One turn of the model: its text and its calls are items of their own only here.
                    calls = messages[-1].setdefault("tool_calls", [])
                    calls += message["tool_calls"]
                else:
                    messages.append(message)
        fields = {
            "model": self.model,
            "messages": messages,
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "tools": None if self.tools is None else [_nested(tool, "function") for tool in self.tools],
            "tool_choice": _nested(self.tool_choice, "function"),
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "chat_template_kwargs": self.chat_template_kwargs,
            "enable_thinking": self.enable_thinking,
            "response_format": _nested(self.text.format, "json_schema") if self.text else None,
        }
        return parse(ChatRequest, json.dumps(fields).encode())


def _nested(value: Any, kind: str) -> Any:
    """{"type": kind, ...} with the rest under the name of its kind, as chat completions have it."""
    if not isinstance(value, dict) or value.get("type") != kind:
        return value
    return {"type": kind, kind: {name: entry for name, entry in value.items() if name != "type"}}
