"""What a JSON schema allows, as far as a dialect without JSON's quotes has to know it.

Schemas come from clients, and anything may stand anywhere in them: what is not understood allows anything.
Source: JSON Schema 2020-12, and OpenAPI 3.0's `nullable`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from itertools import islice, product
from typing import Any, Protocol, Self, TypeVar
from urllib.parse import unquote

_NUMBER = frozenset({"number", "integer"})
_TYPES = {
    **{kind: frozenset({kind}) for kind in ("string", "integer", "boolean", "null", "array", "object")},
    "number": _NUMBER,
    # Not of JSON Schema, but of tools that people write by hand.
    **dict.fromkeys(("str", "text"), frozenset({"string"})),
    **dict.fromkeys(("int", "long"), frozenset({"integer"})),
    **dict.fromkeys(("float", "double"), _NUMBER),
    "bool": frozenset({"boolean"}),
    **dict.fromkeys(("list", "tuple"), frozenset({"array"})),
    "dict": frozenset({"object"}),
}
_ANY = frozenset({"any"})
# Keywords that say of what type a value is where `type` does not.
_KEYWORDS = {
    "array": ("items", "prefixItems", "contains", "minItems", "maxItems", "uniqueItems"),
    "object": (
        "properties", "required", "additionalProperties", "patternProperties", "propertyNames",
        "minProperties", "maxProperties",
    ),
    "string": ("pattern", "minLength", "maxLength"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}  # fmt: skip
_MOST_FORMS = 100  # of one value; each multiplies the grammar
_MOST_STEPS = 10_000  # schemas that are looked at for one value, which references may multiply without end


@dataclass(frozen=True)
class Allowed:
    """What a value may be: of one of `kinds`, or one of `values`.

    Attributes:
        kinds: types of JSON Schema, with "integer" wherever there is "number"; "any" where nothing is said.
        values: those of `enum` and `const`.
    """

    kinds: frozenset[str]
    values: tuple[Any, ...] = ()

    @property
    def text(self) -> bool:
        """Any text will do."""
        return not self.kinds.isdisjoint(("any", "string"))

    @property
    def containers(self) -> frozenset[str]:
        return self.kinds & {"array", "object"}

    @property
    def null(self) -> bool:
        return "null" in self.kinds or any(value is None for value in self.values)

    def has(self, value: Any) -> bool:
        return "any" in self.kinds or kind_of(value) in self.kinds or self.names(value)

    def names(self, value: Any) -> bool:
        """Whether `value` is one of `values`."""
        if kind_of(value) in ("array", "object"):
            return any(same(value, other) for other in self.values)
        return (isinstance(value, bool), value) in self._scalars

    @cached_property
    def _scalars(self) -> frozenset[tuple[bool, Any]]:
        scalars = (value for value in self.values if kind_of(value) not in ("array", "object"))
        return frozenset((isinstance(value, bool), value) for value in scalars)

    def __or__(self, other: Allowed) -> Allowed:
        return Allowed(self.kinds | other.kinds, self.values + other.values)

    def __and__(self, other: Allowed) -> Allowed:
        kinds = self.kinds & other.kinds
        if "any" in self.kinds:
            kinds = other.kinds
        elif "any" in other.kinds:
            kinds = self.kinds
        values = tuple(value for value in self.values if other.has(value))
        both = Allowed(kinds, values)
        more = tuple(value for value in other.values if self.has(value) and not both.names(value))
        return Allowed(kinds, values + more)


ANYTHING = Allowed(_ANY)


@dataclass(frozen=True)
class Arguments:
    """One form that a function's arguments may have.

    Attributes:
        properties: schemas of the arguments by name, in their order.
        patterns: schemas of arguments with names that a regular expression is found in.
        others: schema of arguments with other names; None where there are none.
        fewest, most: how many arguments there may be.
    """

    properties: Mapping[str, Any] = field(default_factory=dict)
    required: frozenset[str] = frozenset()
    patterns: Mapping[str, Any] = field(default_factory=dict)
    others: Any = None
    fewest: int = 0
    most: int | None = None

    def named(self) -> list[tuple[str, Any]]:
        """The names with their schemas; nothing may be said of one that is required."""
        missing = sorted(self.required - self.properties.keys())
        there = [(name, schema) for name, schema in self.properties.items() if self._may_be_given(name)]
        return [*there, *((name, self.others or {}) for name in missing)]

    def _may_be_given(self, name: str) -> bool:
        return self.properties[name] is not False or name in self.required

    def __and__(self, other: Arguments) -> Arguments:
        both = {
            name: _both(schema, other.properties[name])
            for name, schema in self.properties.items()
            if name in other.properties
        }
        limits = [limit for limit in (self.most, other.most) if limit is not None]
        return Arguments(
            {**self.properties, **other.properties, **both},
            self.required | other.required,
            {**self.patterns, **other.patterns},
            other.others if self.others is None else self.others,
            max(self.fewest, other.fewest),
            min(limits) if limits else None,
        )


def kind_of(value: Any) -> str:
    """The type of JSON Schema of a value that was read from JSON."""
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
    return kinds.get(type(value), "object" if isinstance(value, Mapping) else "array")


def allowed(schema: Any, root: Any) -> Allowed:
    """What `schema` allows.

    Args:
        root: the schema that `$ref` refers into.
    """
    try:
        found = _allowed(schema, root, {}, iter(range(_MOST_STEPS)))
    except RecursionError:
        return ANYTHING
    return found if found.kinds or found.values else ANYTHING


def _allowed(schema: Any, root: Any, known: dict[str, Allowed], steps: Iterator[int]) -> Allowed:
    """Args:
    known: what references allow; nothing by themselves where they lead in a circle.
    steps: one for each schema that may still be looked at.
    """
    if not isinstance(schema, Mapping) or next(steps, None) is None:
        return ANYTHING
    parts = []
    if "const" in schema:
        parts.append(Allowed(frozenset(), (schema["const"],)))
    elif isinstance(schema.get("enum"), list) and schema["enum"]:
        parts.append(Allowed(frozenset(), tuple(schema["enum"])))
    else:
        parts.append(Allowed(types_of(schema.get("type"))))
    reference = schema.get("$ref")
    if isinstance(reference, str):
        if reference not in known:
            known[reference] = Allowed(frozenset())
            known[reference] = _allowed(within(root, reference), root, known, steps)
        parts.append(known[reference])
    parts += [_allowed(each, root, known, steps) for each in as_list(schema.get("allOf"))]
    for keyword in ("anyOf", "oneOf"):
        if branches := [_allowed(each, root, known, steps) for each in as_list(schema.get(keyword))]:
            parts.append(reduce(Allowed.__or__, branches))
    found = reduce(Allowed.__and__, parts)
    if found == ANYTHING:
        hints = [kind for kind, keywords in _KEYWORDS.items() if not schema.keys().isdisjoint(keywords)]
        found = Allowed(types_of(hints))
    if schema.get("nullable") is True:
        found |= Allowed(_TYPES["null"])
    return found


def forms(schema: Any, root: Any) -> list[Arguments]:
    """The forms that an object of this schema may have; at least one.

    Args:
        root: as for `allowed`.
    """
    try:
        return combined(schema, root, _own, [Arguments()]) or _own(schema) or [Arguments()]
    except RecursionError:
        return [Arguments()]


class _Form(Protocol):
    def __and__(self, other: Self, /) -> Self: ...


_F = TypeVar("_F", bound=_Form)


def combined(
    schema: Any,
    root: Any,
    own: Callable[[Any], list[_F]],
    circular: list[_F],
    known: dict[str, list[_F]] | None = None,
) -> list[_F]:
    """The forms that a value of one kind may have by a schema, its references and its combinations.

    Args:
        own: those of a schema by itself; none where it allows no value of that kind.
        circular: those of a reference within what it refers to.
        known: those of references that were followed.

    Raises:
        RecursionError: schemas are too deep.
    """
    known = {} if known is None else known
    found = own(schema)
    if not found or not isinstance(schema, Mapping):
        return found
    reference = schema.get("$ref")
    if isinstance(reference, str):
        if reference not in known:
            known[reference] = circular
            known[reference] = combined(within(root, reference), root, own, circular, known)
        found = _product(found, known[reference])
    for each in as_list(schema.get("allOf")):
        found = _product(found, combined(each, root, own, circular, known))
    for keyword in ("anyOf", "oneOf"):
        if branches := as_list(schema.get(keyword)):
            every = (combined(each, root, own, circular, known) for each in branches)
            found = _product(found, [form for forms in every for form in forms])
    return found


def argument_schema(forms: Sequence[Arguments], name: str) -> Any:
    """The schema of the argument `name`, whichever form there is; {} where none says anything of it."""
    schemas = [form.properties[name] for form in forms if name in form.properties]
    if not schemas:
        schemas = [each for form in forms for each in form.patterns.values()]
        schemas += [form.others for form in forms if form.others is not None]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas} if schemas else {}


def standalone(schema: Any, root: Any) -> Any:
    """`schema` as a schema of its own, with the one that its references lead into."""
    moved = _moved(schema)
    if not isinstance(moved, Mapping) or moved == schema:
        return schema
    return {**moved, "$defs": {**moved.get("$defs", {}), "parameters": _moved(root)}}


def _own(schema: Any) -> list[Arguments]:
    """What `schema` says of an object by itself."""
    if not isinstance(schema, Mapping):
        return [] if schema is False else [Arguments()]
    if types_of(schema.get("type")).isdisjoint(("any", "object")):
        return []
    properties, required = schema.get("properties"), schema.get("required")
    patterns = schema.get("patternProperties")
    fewest, most = schema.get("minProperties"), schema.get("maxProperties")
    form = Arguments(
        properties if isinstance(properties, Mapping) else {},
        frozenset(name for name in as_list(required) if isinstance(name, str)),
        patterns if isinstance(patterns, Mapping) else {},
        _others(schema),
        fewest if isinstance(fewest, int) else 0,
        most if isinstance(most, int) else None,
    )
    return [form]


def _others(schema: Mapping[str, Any]) -> Any:
    others = schema.get("additionalProperties")
    if isinstance(others, Mapping):
        return others
    # Beside named ones, `true` is but the default, which nobody means as an invitation.
    asked = others is True or (others is None and schema.get("minProperties"))
    named = schema.get("properties") or schema.get("patternProperties")
    return {} if asked and not named else None


def _both(one: Any, other: Any) -> Any:
    """A schema for values of both. References may lead to one schema in many ways: each is named once."""
    every = [*_conjuncts(one), *_conjuncts(other)]
    different = list({id(schema): schema for schema in every}.values())
    return different[0] if len(different) == 1 else {"allOf": different}


def _conjuncts(schema: Any) -> list[Any]:
    alone = isinstance(schema, Mapping) and schema.keys() == {"allOf"}
    return as_list(schema["allOf"]) if alone else [schema]


def _product(some: Sequence[_F], others: Sequence[_F]) -> list[_F]:
    return [one & other for one, other in islice(product(some, others), _MOST_FORMS)]


def proper_type(name: Any) -> str | None:
    """The type of JSON Schema that `name` means; None where it is any."""
    found = _TYPES.get(name.lower()) if isinstance(name, str) else None
    return None if found is None else "number" if "number" in found else next(iter(found))


def types_of(named: Any) -> frozenset[str]:
    """The types that the keyword `type` names."""
    names = named if isinstance(named, list) else [named]
    found = [_TYPES.get(name.lower(), _ANY) for name in names if isinstance(name, str)]
    return frozenset().union(*found) or _ANY


def as_list(found: Any) -> list[Any]:
    """Of a keyword's value; empty where it is no list."""
    return found if isinstance(found, list) else []


def within(root: Any, reference: str) -> Any:
    """What a reference refers to; {} where that is nothing, or no part of `root`."""
    if not reference.startswith("#"):
        return {}
    found = root
    for step in reference[1:].split("/")[1:]:
        step = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping) and step in found:
            found = found[step]
        elif isinstance(found, list) and step.isdecimal() and int(step) < len(found):
            found = found[int(step)]
        else:
            return {}
    return found


def _moved(schema: Any) -> Any:
    """`schema` with references to where `standalone` puts what they refer to."""
    if isinstance(schema, list):
        return [_moved(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {key: _moved(value) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = f"#/$defs/parameters{reference[1:]}"
    return moved


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same in JSON, where 1 and 1.0 are, and 1 and true are not."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)
