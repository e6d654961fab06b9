"""What requests may say: OpenAI's fields, and the few that servers of open models added.

Fields that nobody here knows are ignored, as other servers do. Fields that are known and would change the
answer, but cannot be obeyed, are refused.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from qwen_runtime.serve.errors import ApiError
from qwen_runtime.tool_calls.json_schema import forms


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class StreamOptions(_Part):
    include_usage: bool = False


class TextPart(_Part):
    type: Literal["text"]
    text: str


class ImageUrl(_Part):
    url: str


class ImagePart(_Part):
    type: Literal["image_url"]
    image_url: ImageUrl


Content = str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]


class FunctionCall(_Part):
    name: str
    arguments: str


class ToolCall(_Part):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(_Part):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


def _check_parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    """What the server itself reads of a function's JSON schema."""
    properties, required = parameters.get("properties", {}), parameters.get("required", [])
    if not isinstance(properties, dict) or not all(
        isinstance(schema, dict | bool) for schema in properties.values()
    ):
        raise ValueError("properties are not an object of schemas")
    names = {name for form in forms(parameters, parameters) for name, _ in form.named()}
    if any(re.search("[<>\n]", name) for name in names):
        raise ValueError("names of properties must have no line breaks, no '<' and no '>'")
    if not isinstance(required, list):
        raise ValueError("required is not a list")
    return parameters


class Function(_Part):
    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")
    description: str | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(_check_parameters)] | None = None
    strict: bool | None = None


class Tool(_Part):
    type: Literal["function"]
    function: Function


class NamedFunction(_Part):
    name: str


class NamedTool(_Part):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(_Part):
    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(_Part):
    type: Literal["text"]


class JsonObjectFormat(_Part):
    type: Literal["json_object"]


class JsonSchemaFormat(_Part):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


def _only(*allowed: Any) -> BeforeValidator:
    """Refuse what cannot be obeyed; None and the values that change nothing pass."""

    def check(value: Any) -> Any:
        if value is not None and value not in allowed:
            raise ValueError(
                f"only {' or '.join(repr(choice) for choice in allowed)} is supported"
                if allowed
                else "not supported"
            )
        return value

    return BeforeValidator(check)


def _check_template_kwargs(variables: dict[str, Any]) -> dict[str, Any]:
    """What the server itself reads; all others are the template's business."""
    if not isinstance(variables.get("enable_thinking"), bool | None):
        raise ValueError("enable_thinking is neither true nor false")
    return variables


TemplateKwargs = Annotated[dict[str, Any], AfterValidator(_check_template_kwargs)]

# JSON has one kind of number, so 1 is a float too, and 1.0 an integer.
Number = Annotated[float, Field(strict=False)]

Body = TypeVar("Body", bound=BaseModel)


class SharedRequest(_Part):
    """What both kinds of completions share."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: Number | None = Field(None, ge=0, le=2)
    top_p: Number | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: Number | None = Field(None, ge=0, le=1)
    repetition_penalty: Number | None = Field(None, gt=0)
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    n: Annotated[Any, _only(1)] = None
    logit_bias: dict[int, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)


class ChatRequest(SharedRequest):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    chat_template_kwargs: TemplateKwargs | None = None
    enable_thinking: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    functions: Annotated[Any, _only([])] = None
    function_call: Annotated[Any, _only("none", "auto")] = None
    modalities: Annotated[Any, _only(["text"])] = None
    audio: Annotated[Any, _only()] = None
    web_search_options: Annotated[Any, _only()] = None


class CompletionRequest(SharedRequest):
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    max_tokens: int | None = Field(16, ge=1)
    echo: Annotated[Any, _only(False)] = None
    suffix: Annotated[Any, _only("")] = None
    best_of: Annotated[Any, _only(1)] = None
    logprobs: int | None = Field(None, ge=0, le=20)


class InputText(_Part):
    type: Literal["input_text", "output_text", "text"]
    text: str

    def as_chat(self) -> dict[str, Any]:
        return {"type": "text", "text": self.text}


class InputImage(_Part):
    type: Literal["input_image"]
    image_url: str

    def as_chat(self) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": self.image_url}}


def _parts(content: str | list[InputText | InputImage]) -> str | list[dict[str, Any]]:
    return content if isinstance(content, str) else [part.as_chat() for part in content]


class InputMessage(_Part):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[InputText | InputImage, Field(discriminator="type")]]

    def as_chat(self) -> dict[str, Any]:
        return {"role": self.role, "content": _parts(self.content)}


class InputCall(_Part):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str

    def as_chat(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"role": "assistant", "tool_calls": [{"id": self.call_id, "function": function}]}


class InputCallOutput(_Part):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[Annotated[InputText | InputImage, Field(discriminator="type")]]

    def as_chat(self) -> dict[str, Any]:
        return {"role": "tool", "tool_call_id": self.call_id, "content": _parts(self.output)}


class InputReasoning(_Part):
    """A thought of an earlier answer: Qwen3.5's template leaves it out of the history."""

    type: Literal["reasoning"]


class ResponseReasoning(_Part):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None


class ResponseText(_Part):
    format: dict[str, Any] | None = None


class ResponseRequest(_Part):
    """`/v1/responses`. Nothing is stored, so what refers to an earlier response is refused."""

    model: str | None = None
    input: (
        str
        | Annotated[list[InputCall | InputCallOutput | InputReasoning | InputMessage], Field(min_length=1)]
    )
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
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
    previous_response_id: Annotated[Any, _only()] = None
    conversation: Annotated[Any, _only()] = None
    prompt: Annotated[Any, _only()] = None
    background: Annotated[Any, _only(False)] = None
    truncation: Annotated[Any, _only("disabled")] = None
    top_logprobs: Annotated[Any, _only(0)] = None

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


def parse(kind: type[Body], body: bytes) -> Body:
    """The request in `body`.

    Raises:
        ApiError: it is not JSON, or not such a request; the message names the field.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(step) for step in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ApiError(
            400,
            f"{place}: {message}" if place else message,
            code=first["type"],
            parameter=place or None,
        ) from error
