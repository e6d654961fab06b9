"""`/v1/messages` and `/v1/messages/count_tokens`: the same request as Anthropic's clients write it.

Source: the types of Anthropic's Python client.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from qwen_runtime.serve.schema.base import Body, Integer, Number, Options, Part, parse
from qwen_runtime.serve.schema.chat import ChatRequest

Dict = dict[str, Any]


class TextBlock(Part):
    type: Literal["text"]
    text: str

    def as_parts(self) -> list[Dict]:
        return [{"type": "text", "text": self.text}]


class Base64Source(Part):
    type: Literal["base64"]
    media_type: str
    data: str

    @property
    def data_url(self) -> str:
        return f"data:{self.media_type};base64,{self.data}"


class UrlSource(Part):
    type: Literal["url"]
    url: str

    @property
    def data_url(self) -> str:
        return self.url  # another one is refused where images are read: nothing is fetched


class ImageBlock(Part):
    type: Literal["image"]
    source: Annotated[Base64Source | UrlSource, Field(discriminator="type")]

    def as_parts(self) -> list[Dict]:
        return [{"type": "image_url", "image_url": {"url": self.source.data_url}}]


class PlainText(Part):
    type: Literal["text"]
    data: str

    def as_parts(self) -> list[Dict]:
        return [{"type": "text", "text": self.data}]


class Blocks(Part):
    type: Literal["content"]
    content: str | list[Annotated[TextBlock | ImageBlock, Field(discriminator="type")]]

    def as_parts(self) -> list[Dict]:
        return _parts(self.content)


class DocumentBlock(Options):
    """A text or parts, after its title and context; nobody here reads PDF files."""

    type: Literal["document"]
    source: Annotated[PlainText | Blocks, Field(discriminator="type")]
    title: str | None = None
    context: str | None = None

    def as_parts(self) -> list[Dict]:
        head = "".join(f"{line}\n" for line in (self.title, self.context) if line)
        return [{"type": "text", "text": head}, *self.source.as_parts()]


Shown = TextBlock | ImageBlock | DocumentBlock


class ToolResult(Options):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[Annotated[Shown, Field(discriminator="type")]] = ""
    is_error: bool = False

    def as_chat(self) -> Dict:
        """Templates have no word for an error."""
        error = [{"type": "text", "text": "Error: "}] if self.is_error else []
        return {"role": "tool", "tool_call_id": self.tool_use_id, "content": error + _parts(self.content)}


class Thinking(Part):
    type: Literal["thinking"]
    thinking: str


class RedactedThinking(Part):
    """A thought that only its maker can read."""

    type: Literal["redacted_thinking"]


class ToolUse(Part):
    type: Literal["tool_use"]
    id: str
    name: str
    input: Dict

    def as_chat(self) -> Dict:
        return {"id": self.id, "function": {"name": self.name, "arguments": json.dumps(self.input)}}


class UserMessage(Part):
    role: Literal["user"]
    content: str | list[Annotated[Shown | ToolResult, Field(discriminator="type")]]

    def as_chat(self) -> Iterator[Dict]:
        """A message for each result of a tool, and one for what stands between them."""
        if isinstance(self.content, str):
            yield {"role": "user", "content": self.content}
            return
        said: list[Dict] = []
        for block in self.content:
            if not isinstance(block, ToolResult):
                said += block.as_parts()
                continue
            if said:
                yield {"role": "user", "content": said}
                said = []
            yield block.as_chat()
        if said:
            yield {"role": "user", "content": said}


class AssistantMessage(Part):
    role: Literal["assistant"]
    content: (
        str | list[Annotated[TextBlock | Thinking | RedactedThinking | ToolUse, Field(discriminator="type")]]
    )

    def as_chat(self) -> Iterator[Dict]:
        if isinstance(self.content, str):
            yield {"role": "assistant", "content": self.content}
            return
        thoughts = [block.thinking for block in self.content if isinstance(block, Thinking)]
        calls = [block.as_chat() for block in self.content if isinstance(block, ToolUse)]
        yield {
            "role": "assistant",
            "content": "".join(block.text for block in self.content if isinstance(block, TextBlock)),
            "reasoning_content": "\n\n".join(thoughts) or None,
            "tool_calls": calls or None,
        }


class SystemMessage(Part):
    role: Literal["system"]
    content: str | list[TextBlock]

    def as_chat(self) -> Iterator[Dict]:
        """A message for each block: they are joined as several system messages are."""
        for text in [self.content] if isinstance(self.content, str) else [b.text for b in self.content]:
            yield {"role": "system", "content": text}


def _parts(content: str | Sequence[Shown]) -> list[Dict]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [part for block in content for part in block.as_parts()]


class Tool(Options):
    """One that the client runs: those that Anthropic runs, or describes itself, have types of their own."""

    type: Literal["custom"] = "custom"
    name: str
    description: str | None = None
    input_schema: Dict
    strict: bool | None = None

    def as_chat(self) -> Dict:
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": self.input_schema,
            "strict": self.strict,
        }
        return {"type": "function", "function": {k: v for k, v in function.items() if v is not None}}


class ToolChoice(Options):
    type: Literal["auto", "any", "none", "tool"]
    name: str | None = None
    disable_parallel_tool_use: bool = False

    def as_chat(self) -> Any:
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name or ""}}
        return "required" if self.type == "any" else self.type


class ThinkingConfig(Options):
    """`budget_tokens` is a wish with Anthropic too; here the thought ends where the model ends it."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Integer | None = Field(None, ge=1)
    display: Literal["summarized", "omitted"] = "summarized"


class OutputFormat(Part):
    type: Literal["json_schema"]
    schema_: Dict = Field(alias="schema")


class OutputConfig(Options):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountRequest(Body):
    """What makes a prompt."""

    unsupported: ClassVar[Mapping[str, Sequence[Any]]] = {"container": (), "mcp_servers": ([],)}

    model: str | None = None
    messages: list[Annotated[UserMessage | AssistantMessage | SystemMessage, Field(discriminator="role")]] = (
        Field(min_length=1)
    )
    system: str | list[TextBlock] = ""
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig = OutputConfig()
    output_format: OutputFormat | None = None  # where `output_config.format` was at first

    def as_chat(self) -> ChatRequest:
        """The same request as chat completions have it.

        Raises:
            ApiError: a tool or a schema is not one.
        """
        system = SystemMessage(role="system", content=self.system) if self.system else None
        choice, form = self.tool_choice, self.output_config.format or self.output_format
        thinks = None if self.thinking is None else self.thinking.type != "disabled"
        effort = self.output_config.effort
        fields = {
            "model": self.model,
            "messages": [
                chat
                for message in (*([system] if system else []), *self.messages)
                for chat in message.as_chat()
            ],
            "tools": None if self.tools is None else [tool.as_chat() for tool in self.tools],
            "tool_choice": choice and choice.as_chat(),
            "parallel_tool_calls": False if choice and choice.disable_parallel_tool_use else None,
            "enable_thinking": thinks,
            "reasoning_effort": ("xhigh" if effort == "max" else effort) if thinks else None,
            "response_format": form
            and {"type": "json_schema", "json_schema": {"name": "answer", "schema": form.schema_}},
            **self._sampling(),
        }
        return parse(ChatRequest, json.dumps(fields).encode())

    def _sampling(self) -> Dict:
        return {}


class MessagesRequest(CountRequest):
    max_tokens: Integer = Field(ge=1)
    stream: bool = False
    stop_sequences: Annotated[list[str], Field(max_length=1000)] | None = None
    temperature: Number | None = Field(None, ge=0, le=2)
    top_p: Number | None = Field(None, gt=0, le=1)
    top_k: Integer | None = Field(None, ge=-1)

    def _sampling(self) -> Dict:
        return {
            "max_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }
