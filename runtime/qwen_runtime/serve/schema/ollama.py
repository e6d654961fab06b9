"""`/api/chat`, `/api/generate` and `/api/show`: the same requests as Ollama's clients write them.

Source: the types of Ollama's Python client and its API reference.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from qwen_runtime.serve.schema.base import Body, Options, parse
from qwen_runtime.serve.schema.chat import ChatRequest, Effort

Dict = dict[str, Any]

# Sampling options by Ollama's names, and the same by ours. Those that say how it runs (num_ctx, num_gpu, ...)
# are the server's business and ignored.
_SAMPLING = {
    "frequency_penalty": "frequency_penalty",
    "min_p": "min_p",
    "mirostat": "mirostat",
    "num_predict": "max_tokens",
    "presence_penalty": "presence_penalty",
    "repeat_last_n": "repeat_last_n",
    "repeat_penalty": "repetition_penalty",
    "seed": "seed",
    "stop": "stop",
    "temperature": "temperature",
    "tfs_z": "tfs_z",
    "top_k": "top_k",
    "top_p": "top_p",
    "typical_p": "typical_p",
}


# "latest" is what clients add to a name that has no tag.
ModelName = Annotated[str, AfterValidator(lambda name: name.removesuffix(":latest"))]


class Function(Options):
    name: str
    arguments: Dict | None = None

    def as_json(self) -> str:
        return json.dumps(self.arguments or {})


class ToolCall(Options):
    id: str | None = None
    function: Function


class Message(Options):
    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    thinking: str | None = None
    images: list[str] = Field(default_factory=list)
    tool_calls: list[ToolCall] = Field(default_factory=list)
    tool_name: str | None = None
    tool_call_id: str | None = None


class AnswerRequest(Body):
    model: ModelName | None = None
    stream: bool = True
    format: Literal["", "json"] | Dict = ""
    options: Dict | None = None
    think: bool | Effort | None = None
    keep_alive: Any = None

    def _chat(self, messages: list[Dict], tools: list[Dict] | None = None) -> ChatRequest:
        form: Dict | None = {"type": "json_object"} if self.format == "json" else None
        if isinstance(self.format, dict):
            form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": self.format}}
        options = {ours: (self.options or {}).get(theirs) for theirs, ours in _SAMPLING.items()}
        for unless_negative in ("max_tokens", "seed"):  # -1: as many as fit, and another one each time
            value = options[unless_negative]
            if isinstance(value, int | float) and value < 0:
                options[unless_negative] = None
        effort = None if isinstance(self.think, bool) else self.think
        fields = {
            **options,
            "messages": messages,
            "tools": tools,
            "response_format": form,
            "enable_thinking": self.think if isinstance(self.think, bool) else None,
            "reasoning_effort": effort,
        }
        return parse(ChatRequest, json.dumps(fields).encode())


class OllamaChatRequest(AnswerRequest):
    """Without messages it only loads the model."""

    unsupported: ClassVar[Mapping[str, Sequence[Any]]] = {"logprobs": (False,), "top_logprobs": (0,)}

    messages: list[Message] = Field(default_factory=list)
    tools: list[Dict] | None = None

    def as_chat(self) -> ChatRequest:
        """The same request as chat completions have it.

        Raises:
            ApiError: an option, a tool or a format cannot be obeyed.
        """
        return self._chat(list(_with_ids(self.messages)), self.tools)


class GenerateRequest(AnswerRequest):
    """A question of its own, or with `raw` a text to continue. Without a prompt it only loads the model."""

    unsupported: ClassVar[Mapping[str, Sequence[Any]]] = {
        "context": ([],),
        "logprobs": (False,),
        "suffix": ("",),
        "template": ("",),
        "top_logprobs": (0,),
    }

    prompt: str = ""
    system: str = ""
    raw: bool = False
    images: list[str] = Field(default_factory=list)

    def as_chat(self) -> ChatRequest:
        """As `OllamaChatRequest.as_chat`."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self._chat([*system, {"role": "user", "content": _content(self.prompt, self.images)}])


class ShowRequest(Body):
    model: ModelName | None = None
    name: ModelName | None = None


def _with_ids(messages: Sequence[Message]) -> Iterator[Dict]:
    """The messages of chat completions, where each result has its call's id. Here it may have the name of the
    function, or nothing: then it is of the first call of that name, or of any, that has none yet."""
    waiting: list[tuple[str, str]] = []  # names and ids of calls without a result
    for at, message in enumerate(messages):
        found: Dict = {
            "role": message.role,
            "content": _content(message.content, message.images),
            "reasoning_content": message.thinking,
        }
        if message.tool_calls:
            ids = [call.id or f"call_{at}_{number}" for number, call in enumerate(message.tool_calls)]
            waiting = [(call.function.name, id_) for call, id_ in zip(message.tool_calls, ids, strict=True)]
            found["tool_calls"] = [
                {"id": id_, "function": {"name": call.function.name, "arguments": call.function.as_json()}}
                for call, id_ in zip(message.tool_calls, ids, strict=True)
            ]
        if message.role == "tool":
            call = message.tool_call_id or next(
                (id_ for name, id_ in waiting if message.tool_name in (None, "", name)), None
            )
            waiting = [(name, id_) for name, id_ in waiting if id_ != call]
            found["tool_call_id"] = call
        yield found


def _content(text: str, images: Sequence[str]) -> str | list[Dict]:
    """Pictures come before the text; which kind of file they are stands in them."""
    if not images:
        return text
    urls = [image if image.startswith("data:") else f"data:image/png;base64,{image}" for image in images]
    return [
        *({"type": "image_url", "image_url": {"url": url}} for url in urls),
        {"type": "text", "text": text},
    ]
