"""What the text of an answer must be, in whichever field a client says it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from qwen_runtime.grammar import make_guidance
from qwen_runtime.grammar_schema import is_irregular
from qwen_runtime.guidance import Guidance
from qwen_runtime.serve.errors import ApiError
from qwen_runtime.serve.json_check import check_schema, fault
from qwen_runtime.serve.schema.messages import JsonObjectFormat, JsonSchemaFormat
from qwen_runtime.serve.schema.shared import SharedRequest

_LONGEST_REGEX = 10_000  # characters
_MOST_CHARACTERS = 100_000  # of all choices
_ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True)
class Structure:
    """One of the three.

    Attributes:
        schema: of its JSON.
        draft: of JSON Schema that it is of, once it was checked.
        regex: that matches it as a whole.
        choices: texts of which it is one.
    """

    schema: Mapping[str, Any] | None = None
    draft: Any = None
    regex: str | None = None
    choices: Sequence[str] = ()

    @property
    def check(self) -> Callable[[str], str | None] | None:
        """Tells what is wrong with an answer, where its guidance may not carry all."""
        if self.schema is None or self.schema == _ANY_OBJECT:
            return None
        return partial(fault, self.schema, self.draft)

    def guidance(self, thinking: bool) -> Guidance:
        return make_guidance(thinking=thinking, schema=self.schema, regex=self.regex, choices=self.choices)


def structure_of(asked: SharedRequest) -> Structure | None:
    """None where the answer may be anything.

    Raises:
        ApiError: it is said in several fields, or cannot be what they say.
    """
    found = list(_said(asked))
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise ApiError(400, f"{names}: leave one off", parameter=found[1][0])
    for name, structure in found:
        if structure.schema is not None:
            structure = replace(structure, draft=check_schema(structure.schema, name))
        if fault := _fault(structure):
            raise ApiError(400, f"{name}: {fault}", parameter=name)
        return structure
    return None


def _fault(structure: Structure) -> str | None:
    if is_irregular(structure.regex):
        return "look-around, named groups, flags and references back are not supported"
    for texts, most in (([structure.regex or ""], _LONGEST_REGEX), (structure.choices, _MOST_CHARACTERS)):
        if sum(map(len, texts)) > most:
            return f"more than {most} characters"
    return None


def _said(asked: SharedRequest) -> Iterator[tuple[str, Structure]]:
    """The fields that say it: OpenAI's, vLLM's, llama-server's."""
    form, vllm = asked.response_format, asked.structured_outputs
    if isinstance(form, JsonSchemaFormat):
        yield "response_format.json_schema.schema", Structure(form.json_schema.schema_)
    elif isinstance(form, JsonObjectFormat):
        yield "response_format.schema", Structure(form.schema_ or _ANY_OBJECT)
    schemas = {"json_schema": asked.json_schema, "guided_json": asked.guided_json}
    regexes, choices = {"guided_regex": asked.guided_regex}, {"guided_choice": asked.guided_choice}
    if vllm is not None:
        schemas |= {"structured_outputs.json": vllm.json_}
        schemas |= {"structured_outputs.json_object": _ANY_OBJECT if vllm.json_object else None}
        regexes |= {"structured_outputs.regex": vllm.regex}
        choices |= {"structured_outputs.choice": vllm.choice}
    yield from (
        (name, Structure(_read(name, schema))) for name, schema in schemas.items() if schema is not None
    )
    yield from ((name, Structure(regex=regex)) for name, regex in regexes.items() if regex is not None)
    yield from ((name, Structure(choices=texts)) for name, texts in choices.items() if texts is not None)


def _read(name: str, schema: Mapping[str, Any] | str) -> Mapping[str, Any]:
    """vLLM takes a schema as text too."""
    if not isinstance(schema, str):
        return schema
    try:
        found = json.loads(schema)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ApiError(400, f"{name}: no JSON object", parameter=name)
    return found
