"""Chat templates, rendered as transformers renders them.

ONNX Runtime GenAI has an engine of its own, which gets some templates wrong in silence: in 0.18 a substring
test such as `'</think>' in message.content` is always false, so that old thoughts stay in the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

from qwen_common.errors import UserError

if TYPE_CHECKING:
    from jinja2 import Template


def render(template: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """The prompt for the assistant's next turn.

    The template comes with the checkpoint, so it runs in jinja2's sandbox. Environment and functions are
    those of transformers' `apply_chat_template`.

    Raises:
        UserError: the template refuses the messages, or is not valid.
    """
    from jinja2 import TemplateError

    try:
        return _compile(template).render(messages=messages, add_generation_prompt=True, **variables)
    # Content that is not text, mostly, or what is nested too deeply.
    except (TemplateError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"the chat template does not take these messages: {error}") from error


@lru_cache(maxsize=4)
def _compile(template: str) -> Template:
    """15 ms for a short template, longer than a short prompt takes the model."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Without jinja2's own escaping of HTML, which would change what the model reads."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)
