"""Chat templates, rendered as transformers renders them.

ONNX Runtime GenAI has an engine of its own, which gets some templates wrong in silence: in 0.18 a substring
test such as `'</think>' in message.content` is always false, so that old thoughts stay in the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

from qwen_common.errors import UserError

from qwen_runtime.request import Message

if TYPE_CHECKING:
    from jinja2 import Template

THOUGHT, THOUGHT_END = "<think>", "</think>"  # in all of Qwen's templates
TEMPLATE_FILE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
_DEFAULT, _WITH_TOOLS = "default", "tool_use"  # transformers' names, where a checkpoint has several
GIVEN = ("messages", "tools")  # variables that no caller's own may replace


def read_templates(root: Path) -> Mapping[str, str]:
    """The chat templates of the checkpoint or artifact in the folder `root`, by name; {} if it has none.

    From chat_template.jinja, or else tokenizer_config.json, where there may be several.

    Raises:
        UserError: a file cannot be read.
    """
    try:
        if (root / TEMPLATE_FILE).is_file():
            return {_DEFAULT: (root / TEMPLATE_FILE).read_text(encoding="utf-8")}
        if not (root / TOKENIZER_CONFIG).is_file():
            return {}
        found = json.loads((root / TOKENIZER_CONFIG).read_text(encoding="utf-8")).get("chat_template")
        if found is None or isinstance(found, str):
            return {} if found is None else {_DEFAULT: found}
        return {str(entry["name"]): str(entry["template"]) for entry in found}
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{root} has no chat template that can be read ({error!r}): download it again"
        ) from error


def check(templates: Mapping[str, str]) -> None:
    """Raises:
    UserError: one is not valid jinja.
    """
    from jinja2 import TemplateError

    for name, template in templates.items():
        try:
            _compile(template)
        except (TemplateError, RecursionError) as error:
            raise UserError(f"the {name} chat template is not valid: {error}") from error


def render(
    templates: Mapping[str, str],
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    variables: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """The prompt for the assistant's next turn.

    The template comes with the checkpoint, so it runs in jinja2's sandbox, with limits of time and size.
    Environment and functions are those of transformers' `apply_chat_template`.

    Agents give system messages at any place, and developer messages, which Qwen's templates refuse. Those at
    the beginning are joined to one system message, with an empty line between them. Later ones stay what they
    are if the template takes them, and become user messages if it does not.

    Args:
        templates: as `read_templates` gives them.
        variables: the template's own, such as `enable_thinking`.

    Raises:
        UserError: there is no template, it refuses the messages, takes too long, or is not valid.
    """
    if not templates:
        raise UserError("the model has no chat template: give a raw prompt instead of messages")
    for name in GIVEN:
        if name in variables:
            raise UserError(f"the template's variable {name} is what the conversation says: leave it off")
    template = chosen(templates, bool(tools))
    if tools:
        variables = {**variables, "tools": tools}
    joined = _joined(messages)
    try:
        return _render(template, joined, variables)
    except UserError:
        if (carried := _as_user(joined)) == joined:
            raise
        return _render(template, carried, variables)


def begins_thought(
    templates: Mapping[str, str],
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    variables: Mapping[str, Any] = MappingProxyType({}),
) -> bool:
    """Whether the prompt for the assistant's next turn ends inside a thought, which the answer then ends.

    What was asked for does not tell: some templates always begin a thought, some never do, and some leave
    it to the model to begin one.

    Args:
        as `render`.
    """
    try:
        return render(templates, messages, tools, variables).rstrip().endswith(THOUGHT)
    except UserError:  # which is told where the prompt is made
        return False


def chosen(templates: Mapping[str, str], tools: bool) -> str:
    """The one of `templates`, of which there are some, for conversations with or without tools."""
    with_tools = templates.get(_WITH_TOOLS) if tools else None
    return with_tools or templates.get(_DEFAULT) or next(iter(templates.values()))


def _render(template: str, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
    from jinja2 import TemplateError

    from qwen_runtime.template_limits import LimitExceeded, limits

    try:
        compiled = _compile(template)
        with limits([messages, variables]):
            return compiled.render({"add_generation_prompt": True, **variables, "messages": messages})
    except LimitExceeded as error:
        raise UserError(f"the chat template was stopped: {error}") from error
    except TemplateError as error:
        raise UserError(f"the chat template does not take these messages: {error}") from error
    # Content that is not text, mostly, or what is nested too deeply; whatever it is, the template's own code.
    except Exception as error:
        raise UserError(f"the chat template does not take these messages: {error!r}") from error


def _joined(messages: Sequence[Message]) -> list[Message]:
    """Developer messages as system messages, and all that come first as one."""
    found: list[Message] = []
    for message in messages:
        if message.get("role") == "developer":
            message = {**message, "role": "system"}
        if message.get("role") == "system" and len(found) == 1 and found[0].get("role") == "system":
            found[0] = {**found[0], "content": _together(found[0].get("content"), message.get("content"))}
        else:
            found.append(message)
    return found


def _as_user(messages: Sequence[Message]) -> list[Message]:
    """System messages but the first as user messages."""
    return [
        {**message, "role": "user"} if at and message.get("role") == "system" else message
        for at, message in enumerate(messages)
    ]


def _together(one: Any, other: Any) -> Any:
    """Two contents with an empty line between them."""
    if not one or not other:
        return one or other
    if isinstance(one, str) and isinstance(other, str):
        return f"{one}\n\n{other}"
    parts = [
        [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        for content in (one, "\n\n", other)
    ]
    return [part for content in parts for part in content]


@lru_cache(maxsize=4)
def _compile(template: str) -> Template:
    """15 ms for a short template, longer than a short prompt takes the model."""
    from jinja2.ext import loopcontrols

    from qwen_runtime.template_limits import LimitedEnvironment, limits
    from qwen_runtime.template_tags import Generation

    environment = LimitedEnvironment(
        {"tojson": _to_json}, trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    with limits(template):
        return environment.from_string(template)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Without jinja2's own escaping of HTML, which would change what the model reads."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)
