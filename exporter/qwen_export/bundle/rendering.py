"""Scripts and unit files from their templates, in which no value can say more than a word."""

from __future__ import annotations

import re
from importlib.resources import files

import jinja2

# Letters and digits of any script, and what means nothing to sh, PowerShell, systemd or XML.
_HARMLESS = re.compile(r"[^\w .,:+()-]")
_LONGEST = 120


def plain(value: object) -> str:
    """A value as every template writes it: one line, without quotes, `$`, `%`, `\\`, `<`, `&` or the like."""
    return _HARMLESS.sub("_", str(value))[:_LONGEST]


def render(template: str, **values: object) -> str:
    """The file that `templates/NAME.jinja` makes. Values go through `plain`, whichever they are."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        finalize=plain,
    )
    return environment.get_template(template).render(values)


def _source(template: str) -> str:
    return files("qwen_export.bundle").joinpath("templates", f"{template}.jinja").read_text(encoding="utf-8")
