"""What an answer must look like - JSON of a schema, or calls of tools - as each backend takes it.

ONNX Runtime GenAI has llguidance inside, OpenVINO GenAI xgrammar.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_common.errors import UserError

from qwen_runtime.grammar_schema import carried, repetitions
from qwen_runtime.guidance import Guidance
from qwen_runtime.tool_calls.notation import SPACING, const, either, in_slashes, one_of, sequence
from qwen_runtime.tool_calls.registry import DEFAULT, DIALECTS

# llguidance forces what must come next as the tokenizer would write it, which is best for the answer. To ONNX
# Runtime GenAI 0.18, though, the rest of a character that a token began is U+FFFD, and the answer fails; and
# a long text that is forced is worked out again with every token, 0.1 s for 100,000 characters.
_NO_FORCING = '%llguidance {"no_forcing": true}\n'
_GRAMMAR_TEXT = re.compile(r" 1 \| | <backtrace>")
_PLACES = re.compile(r"^(Error creating grammar: |at \d+\(\d+\): |\[[\d:]+\] \S+: )+|<string>:\d+: ")
_LONGEST_FORCED = 2000  # characters
MOST_CHARACTERS = 500_000  # of a grammar
_LONGEST_REASON = 300  # characters


def make_guidance(
    *,
    thinking: bool,
    schema: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    several: bool = True,
    regex: str | None = None,
    choices: Sequence[str] = (),
    forced: bool = True,
    dialect: str | None = DEFAULT,
) -> Guidance:
    """An answer of one of these forms: JSON of this schema, calls of these tools, a text that this regular
    expression matches as a whole, or one of these texts.

    What no grammar carries of a schema is left out of it (`grammar_schema`).

    Args:
        thinking: the prompt ended inside a thought, which is finished first.
        several: more than one call is allowed.
        forced: otherwise the answer may be anything, and only calls of tools that are `strict` are held to
            their schemas.
        dialect: of the calls, by its name in `tool_calls.registry`; None where there are none.
    """
    functions = [
        {**tool["function"], "parameters": carried(tool["function"].get("parameters"))} for tool in tools
    ]
    answer = {
        "thinking": thinking,
        "schema": carried(schema),
        "functions": functions,
        "several": several,
        "forced": forced,
        "dialect": dialect or DEFAULT,
        "regex": regex,
        "choices": list(choices),
    }
    return Guidance("answer", json.dumps(answer))


def lark(answer: str) -> str:
    """The text of a guidance of kind `answer` as a grammar for llguidance.

    Raises:
        UserError: it would be too large, or nothing fits it.
    """
    asked = json.loads(answer)
    calls = DIALECTS[asked["dialect"]].grammar
    bodies = []
    rules = []
    if asked["schema"] is not None:
        bodies.append("object")
        rules.append(f"object: %json {json.dumps({**asked['schema'], 'x-guidance': SPACING})}")
    if not asked["forced"]:
        bodies.append("answer")
        rules += calls.lark_unforced(asked["functions"])
    elif asked["functions"]:
        bodies.append('call ("\\n" call)*' if asked["several"] else "call")
        rules += calls.lark(asked["functions"])
    if asked["regex"] is not None:
        bodies.append("matching")
        rules.append(f"matching: /{in_slashes(asked['regex'])}/")
    if asked["choices"]:
        bodies.append("chosen")
        rules.append(f"chosen: /{one_of(asked['choices'])}/")
    thinking = asked["thinking"] and asked["forced"]
    if thinking:
        # A call inside of it would be one.
        rules.append(rf'thought[suffix="</think>"]: /(.|\n)*/ & ~/(.|\n)*{calls.BEGINS}(.|\n)*/')
    begin = 'thought "\\n\\n" ' if thinking else ""
    text = "\n".join([f"start: {begin}({' | '.join(bodies)})", *rules]) + "\n"
    if len(text) > MOST_CHARACTERS:
        raise UserError(
            f"the guidance is too large: a grammar of {len(text)} characters, and {MOST_CHARACTERS} are the "
            "most: make schemas smaller, or ask for fewer tools"
        )
    plain = text.isascii() and "\\u" not in text and not _forces_much(text)
    return text if plain else _NO_FORCING + text


def _forces_much(text: str) -> bool:
    """Whether a grammar may force a long text at once."""
    longest = max(map(len, re.split(r'["|]', text)))  # between quotes of a literal, or bars of choices
    return longest > _LONGEST_FORCED or repetitions(text) > _LONGEST_FORCED


def why_refused(text: str) -> str:
    """What a library says of a grammar that it does not take, in one line, without the grammar itself and the
    place in the library's source."""
    text = " ".join(text.split())
    text = _GRAMMAR_TEXT.split(text)[0]
    return _PLACES.sub("", text)[:_LONGEST_REASON].strip()


def structural_tag(answer: str) -> str:
    """The text of a guidance of kind `answer` as a structural tag for xgrammar, which is JSON."""
    asked = json.loads(answer)
    calls = DIALECTS[asked["dialect"]].grammar
    bodies: list[Any] = []
    if asked["schema"] is not None:
        bodies.append({"type": "json_schema", "json_schema": asked["schema"]})
    if not asked["forced"]:
        bodies.append(calls.structural_tag_unforced(asked["functions"]))
    elif asked["functions"]:
        bodies.append(
            {
                "type": "tags_with_separator",
                "tags": [calls.structural_tag(function) for function in asked["functions"]],
                "separator": "\n",
                "at_least_one": True,
                "stop_after_first": not asked["several"],
            }
        )
    if asked["regex"] is not None:
        bodies.append({"type": "regex", "pattern": asked["regex"]})
    bodies += [const(text) for text in asked["choices"]]
    found = either(bodies)
    if asked["thinking"] and asked["forced"]:
        thought = {"type": "tag", "begin": "", "content": {"type": "any_text"}, "end": "</think>"}
        found = sequence(thought, const("\n\n"), found)
    return json.dumps({"type": "structural_tag", "format": found})
