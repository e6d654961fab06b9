"""Calls in the dialect of `qwen3_5` as grammars, for calls that must fit their schemas.

ONNX Runtime GenAI has llguidance inside, OpenVINO GenAI xgrammar. Sources: llguidance's docs/syntax.md, whose
literals are JSON strings, which its Lark reads alike; xgrammar's documentation of structural tags.

Arguments come in the schema's order; those that are not required may be left out. No text has marks of the
dialect in it, for it would be read otherwise than it was meant.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwen_common.errors import UserError

from qwen_runtime.tool_calls.json_schema import Allowed, Arguments, allowed, forms, kind_of, standalone
from qwen_runtime.tool_calls.notation import SPACING, const, either, in_slashes, one_of, quoted, sequence
from qwen_runtime.tool_calls.qwen3_5 import (
    CALL,
    CALL_END,
    FUNCTION,
    FUNCTION_END,
    PARAMETER,
    PARAMETER_END,
)
from qwen_runtime.tool_calls.texts import ANY, Text, texts, whole
from qwen_runtime.tool_calls.values import without_surrogates

BEGINS = FUNCTION
_BEGIN, _END = f"{CALL}\n{FUNCTION}", f"{FUNCTION_END}\n{CALL_END}"
_VALUE_END = f"\n{PARAMETER_END}\n"
_OTHER_NAME = "[A-Za-z_][A-Za-z0-9_.-]{0,63}"  # where the schema leaves names free
_MOST_OTHERS = 16  # such arguments, which small models would write without end
_TYPED_ELSEWHERE = {"$ref", "allOf", "anyOf", "oneOf"}
_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
_MARK = re.compile(r"</?(?:tool_call>|function|parameter)")
_NO_MARK = rf"~/{ANY}<\/?(tool_call>|function|parameter){ANY}/"
# The same without a negation, which beside limits of length is too much for llguidance; and without returns,
# of which the last would belong to the line break.
_LETTER = r"(t[^<\ro]|f[^<\ru]|p[^<\ra]"
_FEW_MARKS = rf"/([^<\r]|<+([^<\r\/tfp]|{_LETTER})|\/([^<\rtfp]|{_LETTER}))))*(<+\/?[tfp]?)?/"
# Whatever is read as no list and no object, nor as the beginning of a Python literal.
_PLAIN = r"([^\s\x00-\x20\[{(\"']" + rf"{ANY})?"
_INTEGER = "-?(0|[1-9][0-9]{0,17})"
_NUMBER = rf"{_INTEGER}(\.[0-9]{{1,17}})?([eE][+-]?[0-9]{{1,2}})?"


def lark(functions: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rules of llguidance; the one for a call of one of these functions is `call`.

    Raises:
        UserError: nothing can be written that fits a function's schema.
    """
    return _Lark().forced(functions)


def lark_unforced(functions: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rules of llguidance for any text, in which calls of functions that are `strict` fit their schemas; the
    one to begin with is `answer`. A call begins in the dialect's own way only.

    Raises:
        UserError: as `lark`.
    """
    return _Lark().unforced(functions)


class _Lark:
    """Rules of one grammar, named as they are first used."""

    def __init__(self) -> None:
        self._rules: dict[str, str] = {}  # names by what they stand for

    def forced(self, functions: Sequence[Mapping[str, Any]]) -> list[str]:
        bodies = [self._function(function) for function in functions]
        return [f"call: {quoted(_BEGIN)} ({' | '.join(bodies)}) {quoted(_END)}", *self._named()]

    def unforced(self, functions: Sequence[Mapping[str, Any]]) -> list[str]:
        begin, mark = in_slashes(_BEGIN), in_slashes(FUNCTION)
        bodies = [
            f"{self._function(function)} {quoted(_END)}"
            if function.get("strict")
            else quoted(f"{function['name']}>")
            for function in functions
        ]
        return [
            "answer: (OPENING called)* PROSE?",
            rf"OPENING: /{ANY}{begin}/ & ~/{ANY}{mark}(.|\n)+/",
            rf"PROSE: /(.|\n)+/ & ~/{ANY}{mark}{ANY}/",
            f"called: {' | '.join(bodies)}",
            *self._named(),
        ]

    def _named(self) -> list[str]:
        return [f"{name}{body}" for body, name in self._rules.items()]

    def _rule(self, body: str) -> str:
        kind = "r" if body.startswith("[") else "T"  # the first have attributes, the others intersections
        return self._rules.setdefault(body, f"{kind}{len(self._rules)}")

    def _function(self, function: Mapping[str, Any]) -> str:
        begin = quoted(f"{function['name']}>\n")
        parameters = function.get("parameters") or {}
        # Each form once: some differ in nothing that the grammar knows of.
        bodies = dict.fromkeys(self._arguments(form, parameters) for form in forms(parameters, parameters))
        some = " | ".join(body for body in bodies if body)
        return f"({begin} ({some}){'?' if '' in bodies else ''})" if some else begin

    def _arguments(self, form: Arguments, root: Any) -> str:
        parts = []
        for name, schema in form.named():
            value = self._value(schema, root)
            if value is None and name in form.required:
                raise UserError(f"argument '{name}': a call cannot have what its schema asks for")
            if value is not None:
                argument = f"{quoted(f'{PARAMETER}{name}>{chr(10)}')} {value}"
                parts.append(argument if name in form.required else f"({argument})?")
        fewest, most = _others(form)
        if most:
            others = " | ".join(self._others(form, root))
            parts.append(f"({quoted(PARAMETER)} ({others})){{{fewest},{most}}}")
        return " ".join(parts)

    def _others(self, form: Arguments, root: Any) -> Iterator[str]:
        """Names and values of arguments that the schema does not name."""
        named = [name for name in form.properties.keys() | form.required if re.fullmatch(_OTHER_NAME, name)]
        apart = [f"~/{re.escape(name)}/" for name in sorted(named)]
        patterns = [(whole(pattern), schema) for pattern, schema in form.patterns.items()]
        ours = [([f"/{in_slashes(pattern or ANY)}/"], schema, pattern) for pattern, schema in patterns]
        if form.others is not None:
            ours.append(([], form.others, None))
        for conditions, schema, mine in ours:
            elsewhere = [f"~/{in_slashes(each)}/" for each, _ in patterns if each and each != mine]
            name = self._rule(": " + " & ".join([f"/{_OTHER_NAME}/", *conditions, *apart, *elsewhere]))
            if (value := self._value(schema, root)) is not None:
                yield f'{name} ">\\n" {value}'

    def _value(self, schema: Any, root: Any) -> str | None:
        """A value and its end; None where there is none."""
        known = allowed(schema, root)
        choices = []
        if named := _texts(known):
            choices.append(self._rule(f": /{one_of(named)}{in_slashes(_VALUE_END)}/"))
        kinds = known.kinds
        if schema is False:
            kinds = frozenset()
        elif known.text:
            kinds = known.containers
            choices += [self._rule(_text_rule(text, bool(kinds))) for text in texts(schema, root)]
            if known.null:
                choices.append(quoted(f"null{_VALUE_END}"))
        elif _TYPED_ELSEWHERE.isdisjoint(schema) and _BOUNDS.isdisjoint(schema):
            # Not as long as JSON may have them, which small models would use.
            number = _NUMBER if "number" in kinds else _INTEGER if "integer" in kinds else None
            if number is not None:
                choices.append(f"/{number}{in_slashes(_VALUE_END)}/")
            kinds -= {"integer", "number"}
        if kinds:
            options = {**SPACING, "coerce_one_of": True}  # oneOf is not known to llguidance
            typed = _typed(schema, root, kinds)
            if known.text and not _TYPED_ELSEWHERE.isdisjoint(typed):  # which xgrammar cannot carry
                definitions = {"$defs": typed["$defs"]} if "$defs" in typed else {}
                typed = {**definitions, "allOf": [typed, {"type": sorted(kinds)}]}
            choices.append(f"%json {json.dumps({**typed, 'x-guidance': options})} {quoted(_VALUE_END)}")
        return f"({' | '.join(dict.fromkeys(choices))})" if choices else None


def _text_rule(text: Text, beside_containers: bool) -> str:
    """Args:
    beside_containers: what looks like a list or an object would be read as one.
    """
    regexes = [*text.regexes, *([_PLAIN] if beside_containers else [])]
    conditions = [f"/{in_slashes(regex)}/" for regex in regexes]
    conditions.append(_NO_MARK if text.free else _FEW_MARKS)
    return f"[suffix={quoted(_VALUE_END)}]: {' & '.join(conditions)}"


def structural_tag(function: Mapping[str, Any]) -> dict[str, Any]:
    """A tag of xgrammar for a call of this function."""
    parameters = function.get("parameters") or {}
    bodies = [_tagged_arguments(form, parameters) for form in forms(parameters, parameters)]
    return {
        "type": "tag",
        "begin": f"{_BEGIN}{function['name']}>\n",
        "content": either([body for at, body in enumerate(bodies) if body not in bodies[:at]]),
        "end": _END,
    }


def structural_tag_unforced(functions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """As `lark_unforced`."""
    tags = [
        structural_tag(function)
        if function.get("strict")
        else {
            "type": "tag",
            "begin": f"{_BEGIN}{function['name']}>",
            "content": {"type": "any_text"},
            "end": _END,
        }
        for function in functions
    ]
    return {"type": "triggered_tags", "triggers": [_BEGIN], "tags": tags}


def _tagged_arguments(form: Arguments, root: Any) -> dict[str, Any]:
    parts = []
    for name, schema in form.named():
        argument = sequence(const(f"{PARAMETER}{name}>\n"), _tagged_value(schema, root))
        parts.append(argument if name in form.required else either([argument, _NOTHING]))
    fewest, most = _others(form)
    if most:
        free = {"type": "regex", "pattern": _OTHER_NAME}
        schemas = [*form.patterns.values(), *([] if form.others is None else [form.others])]
        value = either([_tagged_value(schema, root) for schema in schemas])
        other = sequence(const(PARAMETER), free, const(">\n"), value)
        parts += [other] * fewest + [either([other, _NOTHING])] * (most - fewest)
    return sequence(*parts) if parts else _NOTHING


def _tagged_value(schema: Any, root: Any) -> dict[str, Any]:
    known = allowed(schema, root)
    choices = [sequence(const(text), const(_VALUE_END)) for text in _texts(known)]
    if known.text:
        choices += [_tagged_text(text) for text in texts(schema, root)]
    elif known.kinds:
        typed = {"type": "json_schema", "json_schema": _typed(schema, root, known.kinds)}
        choices.append(sequence(typed, const(_VALUE_END)))
    return either(choices) if choices else _tagged_text(Text())


def _tagged_text(text: Text) -> dict[str, Any]:
    """xgrammar's regular expressions have no intersection: one condition is held, the others are checked."""
    if text.free:
        return {"type": "tag", "begin": "", "content": {"type": "any_text"}, "end": _VALUE_END}
    most = "" if text.most is None else str(text.most)
    pattern = text.patterns[0] if text.patterns else f"[^<]{{{text.fewest},{most}}}"
    return sequence({"type": "regex", "pattern": pattern}, const(_VALUE_END))


_NOTHING = {"type": "grammar", "grammar": 'root ::= ""'}  # xgrammar takes no empty literal


def _texts(known: Allowed) -> list[str]:
    """How the values are written that a value is one of; those that would be read otherwise are left out."""
    strings = [value for value in known.values if isinstance(value, str)]
    found = [text for text in strings if _is_read_back(text)]
    for value in known.values:
        taken = not known.text or value is None or kind_of(value) in known.containers
        text = json.dumps(value, ensure_ascii=False)
        if not isinstance(value, str) and taken and text not in strings and _is_read_back(text):
            found.append(text)
    return found


def _is_read_back(text: str) -> bool:
    return not _MARK.search(text) and not text.endswith("\r") and without_surrogates(text) == text


def _typed(schema: Any, root: Any, kinds: frozenset[str]) -> dict[str, Any]:
    """The schema by itself, with types that the libraries know."""
    found: dict[str, Any] = standalone(schema, root)
    named = sorted(kinds - {"integer"} if "number" in kinds else kinds)
    types = {"type": named if len(named) > 1 else named[0]}
    return {**found, **types} if _TYPED_ELSEWHERE.isdisjoint(found) else found


def _others(form: Arguments) -> tuple[int, int]:
    """How many arguments with free names there may be. None at all is no call that anybody asked for."""
    if form.others is None and not form.patterns:
        return 0, 0
    fewest = max(form.fewest, 0 if form.properties else 1) - len(form.required)
    most = _MOST_OTHERS if form.most is None else form.most - len(form.required)
    most = max(0, min(most, _MOST_OTHERS))
    return max(0, min(fewest, most)), most
