"""Messages, tools, and forms of answers, as chat completions have them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from qwen_runtime.serve.schema.base import Part
from qwen_runtime.tool_calls.json_schema import forms
from qwen_runtime.tool_calls.qwen3_5 import LONGEST_NAME


class TextPart(Part):
    type: Literal["text"]
    text: str


class ImageUrl(Part):
    url: str


class ImagePart(Part):
    type: Literal["image_url"]
    image_url: ImageUrl


Content = str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]


class FunctionCall(Part):
    name: str
    arguments: str


class ToolCall(Part):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Part):
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
    if any(not 1 <= len(name) <= LONGEST_NAME for name in names):
        raise ValueError(f"names of properties must have 1 to {LONGEST_NAME} characters")
    if not isinstance(required, list):
        raise ValueError("required is not a list")
    return parameters


class Function(Part):
    name: str = Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.-]+$")
    description: str | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(_check_parameters)] | None = None
    strict: bool | None = None


class Tool(Part):
    type: Literal["function"]
    function: Function


class NamedFunction(Part):
    name: str


class NamedTool(Part):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Part):
    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(Part):
    type: Literal["text"]


class JsonObjectFormat(Part):
    """With a schema it is llama-server's form of `json_schema`."""

    type: Literal["json_object"]
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class JsonSchemaFormat(Part):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


def _check_template_kwargs(variables: dict[str, Any]) -> dict[str, Any]:
    """What the server itself reads; all others are the template's business."""
    if not isinstance(variables.get("enable_thinking"), bool | None):
        raise ValueError("enable_thinking is neither true nor false")
    return variables


TemplateKwargs = Annotated[dict[str, Any], AfterValidator(_check_template_kwargs)]
