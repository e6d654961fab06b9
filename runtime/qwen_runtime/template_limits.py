"""jinja2's sandbox with limits of time and size: a chat template is a program that comes with a checkpoint.

The sandbox itself keeps a template from Python's internals and from ranges of more than 100,000 numbers. Here
loops and calls take from a budget of time, and whatever makes text or lists from one of size, before they are
made where they can be much larger than what they are made of.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MappingView, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from jinja2 import TemplateError, nodes, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

Node = TypeVar("Node", bound=nodes.Node)

_SECONDS = 1.0  # of this thread's own time, so that a busy machine changes nothing
_CHARACTERS = 4 * 1024 * 1024  # and elements of lists
# Of each character of what is rendered, besides.
_SECONDS_EACH, _CHARACTERS_EACH = 1e-6, 64
_LARGEST_BITS = 1_000_000  # of an integer
_LARGEST_PRECISION = 1000  # digits to round to


class LimitExceeded(TemplateError):
    """The template takes too long, or makes too much."""


@dataclass
class _Budget:
    """What is left to one rendering."""

    deadline: float
    characters: int

    def step(self) -> None:
        if time.thread_time() > self.deadline:
            raise LimitExceeded("it takes too long")

    def take(self, characters: int) -> None:
        self.characters -= characters
        if self.characters < 0:
            raise LimitExceeded("it makes too much text")


_budget: ContextVar[_Budget] = ContextVar("budget")


@contextmanager
def limits(values: Any) -> Iterator[None]:
    """A budget for rendering `values`, or for compiling them, when jinja2 works out what it can: a second and
    4 million characters, and more where they are large."""
    size = _text_size(values)
    deadline = time.thread_time() + _SECONDS + _SECONDS_EACH * size
    token = _budget.set(_Budget(deadline, _CHARACTERS + _CHARACTERS_EACH * size))
    try:
        yield
    finally:
        _budget.reset(token)


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox that takes from the budget of `limits`."""

    intercepted_binops = frozenset({"*", "+", "%", "**"})

    def __init__(self, filters: Mapping[str, Callable[..., Any]], **options: Any) -> None:
        """Args:
        filters: besides jinja2's.
        """
        super().__init__(**options)
        del self.globals["lipsum"]  # makes text from nothing
        filters = {**self.filters, **filters}
        self.filters = {name: _limited(name, function) for name, function in filters.items()}
        self.filters |= {_COUNTED: _counted, _JOINED: _joined, _COMPARED: _compared, _CUT: _cut}
        tests: dict[str, Any] = self.tests
        self.tests = tests | {name: _limited_test(tests[name]) for name in _COMPARISONS}
        self.concat = _concat  # type: ignore[method-assign]
        self.finalize = _shown

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget.get()
        budget.step()
        if isinstance(left, int) and isinstance(right, int):
            bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * max(right, 0)}
            if bits.get(operator, 0) > _LARGEST_BITS:
                raise LimitExceeded("its numbers are too large")
            return super().call_binop(context, operator, left, right)
        if operator == "*":
            budget.take(_size(left) * _number(right) + _size(right) * _number(left))
        elif operator == "%":
            budget.take(_formatted(left, "%", _flat(right if isinstance(right, tuple) else (right,))))
        elif operator == "+":
            budget.take(_size(left) + _size(right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.step()
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox has a `format` of its own around text's
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str | bytes):
            budget.take(_predicted(name, owner, _flat([*args, *kwargs.values()])))
        elif name in _COMPARING:
            _shown([owner, args])
        elif name == "to_bytes":
            budget.take(max(map(_number, [*args, *kwargs.values()]), default=0))
        found = super().call(__context, __obj, *args, **kwargs)
        budget.take(_size(found))
        return found

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):  # whose hash reads it whole
            _shown(argument)
        return super().getitem(obj, argument)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """With loops and comparisons counted, and `~` a function that can be limited."""
        return _rewritten(super()._parse(source, name, filename))


# No template can write such names.
_COUNTED, _JOINED, _COMPARED = "counted by the sandbox", "joined by the sandbox", "compared by the sandbox"
_CUT = "cut by the sandbox"
_COMPARISONS = (
    "eq",
    "==",
    "equalto",
    "ne",
    "!=",
    "lt",
    "<",
    "lessthan",
    "le",
    "<=",
    "gt",
    ">",
    "ge",
    ">=",
    "in",
)


def _rewritten(node: Node) -> Node:
    for name, value in list(node.iter_fields()):
        if isinstance(value, nodes.Node):
            setattr(node, name, _rewritten_node(value))
        elif isinstance(value, list):
            setattr(node, name, [_rewritten_node(v) if isinstance(v, nodes.Node) else v for v in value])
    if isinstance(node, nodes.For):
        node.iter = _filter(node.iter, _COUNTED)
    if isinstance(node, nodes.Compare):  # which goes no deeper than one side does
        node.expr = _filter(node.expr, _COMPARED)
    return node


def _rewritten_node(node: nodes.Node) -> nodes.Node:
    node = _rewritten(node)
    if isinstance(node, nodes.Concat):
        return _filter(nodes.List(node.nodes, lineno=node.lineno), _JOINED)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _filter(node, _CUT)
    return node


def _filter(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Counted:
    """An iterable each of whose items takes from the budget."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        budget = _budget.get()
        for item in self._items:
            budget.step()
            yield item

    def __len__(self) -> int:
        return len(self._items)


@pass_context  # so that jinja2 does not work it out as it compiles
def _counted(context: Context, items: Any) -> _Counted:
    return _Counted(items)


@pass_context
def _joined(context: Context, items: Iterable[Any]) -> str:
    return _concat(str(_shown(item)) for item in items)


@pass_context
def _compared(context: Context, value: Any) -> Any:
    return _shown(value)


@pass_context
def _cut(context: Context, part: Any) -> Any:
    _budget.get().take(_size(part))
    return part


def _limited_test(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda value, *arguments: function(_shown(value), *arguments)


def _concat(pieces: Iterable[str]) -> str:
    """The environment's, for whole prompts, macros and blocks."""
    budget, found = _budget.get(), []
    for piece in pieces:
        budget.take(len(piece))
        found.append(piece)
    return "".join(found)


def _limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that takes from the budget."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # where the value stands that is filtered

    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.step()
        if name in ("join", "sum"):  # they would use an iterator up
            args = (*args[:first], _listed(args[first], budget), *args[first + 1 :])
        if name in _WRITING or name in _COMPARING:
            _shown(args[first])
        others = _flat([*args[first + 1 :], *kwargs.values()])
        if name == "round" and any(isinstance(n, int) and abs(n) > _LARGEST_PRECISION for n in others):
            raise LimitExceeded("its numbers are too large")
        budget.take(_predicted(name, args[first], others))
        found = function(*args, **kwargs)
        budget.take(_size(found))
        return found

    return limited


# Filters that turn whatever they are given into text.
_WRITING = {
    *("capitalize", "center", "e", "escape", "forceescape", "format", "indent", "join", "lower", "pprint"),
    *("replace", "safe", "string", "striptags", "title", "tojson", "trim", "truncate", "upper", "urlencode"),
    *("urlize", "wordcount", "wordwrap", "xmlattr"),
}


# Filters, and methods of lists and mappings, that compare or hash what they are given.
_COMPARING = {
    *("sort", "max", "min", "unique", "groupby", "dictsort"),
    *("index", "count", "remove", "get", "pop", "setdefault", "changed", "raise_exception"),
}


def _flat(values: Iterable[Any]) -> list[Any]:
    """The values, and those inside lists and mappings among them."""
    found = []
    for value in values:
        inside = value.values() if isinstance(value, Mapping) else value
        found += [value, *inside] if isinstance(value, Mapping | list | tuple) else [value]
    return found


def _shown(value: Any) -> Any:
    """`value`, which is about to be read whole: a list may hold another twice, and that one another twice."""
    if isinstance(value, _CONTAINERS):
        budget, rest = _budget.get(), list[Any]([value])
        while rest:
            item = rest.pop()
            budget.step()
            budget.take(1)
            if isinstance(item, Mapping):
                rest += [*item.keys(), *item.values()]
            elif isinstance(item, Namespace):
                rest.append(_attributes(item))
            elif isinstance(item, _CONTAINERS):
                rest += list[Any](item)  # type: ignore[arg-type]  # a Namespace was above
            else:
                budget.take(_size(item))
    return value


_CONTAINERS = (list, tuple, Mapping, MappingView, set, frozenset, Namespace)


def _attributes(namespace: Namespace) -> Any:
    """jinja2 keeps them where no attribute of the template's can be in the way."""
    return object.__getattribute__(namespace, "_Namespace__attrs")


def _listed(items: Any, budget: _Budget) -> Any:
    if isinstance(items, str | list | tuple | Mapping):
        return items
    found = []
    for item in items:
        budget.take(1)
        found.append(item)
    return found


def _predicted(name: str, value: Any, arguments: Sequence[Any]) -> int:
    """How long the result of a filter or of a method of text may be, of those that can be far longer than
    what they are given; 0 of the others."""
    longest = max((_size(argument) for argument in arguments), default=0)
    largest = max((_number(argument) for argument in arguments), default=0)
    size = _size(value)
    if name in ("center", "ljust", "rjust", "zfill", "batch", "slice"):
        return size + largest
    if name in ("indent", "expandtabs", "tojson", "translate"):
        return size * max(1, largest, longest)
    if name in ("wordwrap", "urlize"):
        return size * max(1, longest)
    if name == "replace":
        old = arguments[0] if arguments and isinstance(arguments[0], str) else ""
        return size + (str(value).count(old) if old else size + 1) * longest
    if name == "join":
        # The filter's value is the items, the method's the separator.
        return _joined_size(value) + sum(map(_joined_size, arguments)) + size * longest
    if name == "sum":
        return _joined_size(value)
    if name in ("format", "format_map"):
        return _formatted(value, "{" if name == "format_map" else "{%", arguments)
    return 0


def _joined_size(items: Any) -> int:
    return sum(map(_size, items)) if isinstance(items, list | tuple) else _size(items)


_LONG_WIDTH = re.compile(r"\d{5,}")
_WIDTH = re.compile(r"\d{2,4}")
_WIDTH_ELSEWHERE = re.compile(r"%[^a-zA-Z%]*\*|\{[^{}]*:[^{}]*\{")


def _formatted(form: Any, marks: str, values: Sequence[Any]) -> int:
    if isinstance(form, bytes):
        form = form.decode("latin-1")
    if not isinstance(form, str):
        return 0
    for value in values:
        _shown(value)
    if _LONG_WIDTH.search(form) or (
        _WIDTH_ELSEWHERE.search(form) and max(map(_number, values), default=0) > 9999
    ):
        raise LimitExceeded("it makes too much text")
    widths = sum(map(int, _WIDTH.findall(form)))
    return len(form) + widths + sum(map(form.count, marks)) * max(map(_size, values), default=0)


def _size(value: Any) -> int:
    """Of what was made, as the budget counts it."""
    return len(value) if isinstance(value, str | bytes | list | tuple | Mapping) else 0


def _number(value: Any) -> int:
    return max(value, 0) if isinstance(value, int) else 0


def _text_size(value: Any) -> int:
    """Characters in a tree of messages."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_text_size(item) + 1 for item in value.values())
    if isinstance(value, list | tuple):
        return sum(_text_size(item) + 1 for item in value)
    return 0
