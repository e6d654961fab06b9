"""The dialect that a chat template asks for."""

from __future__ import annotations

import pytest
from qwen_runtime.tool_calls.registry import DIALECTS, dialect_of

from benchmarks.support.checkpoints import TINY

# As Qwen's published templates say it, before and with Qwen3-Next.
JSON_CALLS = """{%- if tools %}
{{- '<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call>' }}
{%- endif %}"""


@pytest.mark.parametrize(
    "template,dialect",
    [
        ((TINY / "chat_template.jinja").read_text(), "qwen3_5"),
        (JSON_CALLS, "hermes"),
        (JSON_CALLS.replace('\\"', '"'), "hermes"),
        ("{{- '<tool_call>' + name + '<arg_key>' }}", None),
        ("{{- messages[0].content }}", "qwen3_5"),
    ],
)
def test_dialects_of_templates(template: str, dialect: str | None) -> None:
    assert dialect_of(template) == dialect
    assert dialect is None or dialect in DIALECTS
