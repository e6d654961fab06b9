"""The artifact's README.md: what it is, how to run it, and what verification found."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import jinja2
from qwen_common.manifest import Manifest

from qwen_export.inspection import precisions

README = "README.md"


@cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("qwen_export"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render(template: str, **values: Any) -> str:
    """A file of `templates`, filled in."""
    return _templates().get_template(f"{template}.jinja").render(**values)


def model_card(manifest: Manifest, report: Mapping[str, Any] | None) -> str:
    """Markdown for `manifest`'s artifact; `report` is its report.json, None where nobody verified it."""
    return render(README, manifest=manifest, precisions=precisions(manifest), report=report)
