"""Templates that would take hours or gigabytes."""

from __future__ import annotations

import time
import tracemalloc

import pytest
from qwen_common.errors import UserError
from qwen_runtime.template import render

MESSAGES = [{"role": "user", "content": "Hello"}]
GROW = "{%% set ns = namespace(x=%s) %%}{%% for i in range(60) %%}{%% set ns.x = %s %%}{%% endfor %%}"
LIST = GROW % ("[1]", "[ns.x, ns.x]")
TEXT = "{% set s = 'x' * 1000000 %}"

ENDLESS = {
    "nested ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "ranges of text": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "recursive loop": "{% for i in [1] recursive %}{% if loop.depth0 < 3 %}"
    "{{ loop(range(9999)) }}{% endif %}{% endfor %}",
    "macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}",
    "nested list shown": LIST + "{{ ns.x }}",
    "nested list as JSON": LIST + "{{ ns.x | tojson }}",
    "nested list as text": LIST + "{{ (ns.x | string) | length }}",
    "nested list joined": LIST + "{{ (ns.x ~ '') | length }}",
    "nested list formatted": LIST + "{{ '%s' % [ns.x] }}",
    "nested mapping": GROW % ("{}", "{'a': ns.x, 'b': ns.x}") + "{{ ns.x }}",
    "nested lists compared": LIST + LIST.replace("ns", "other") + "{{ ns.x == other.x }}",
    **{
        f"nested lists in {name}": LIST + LIST.replace("ns", "other") + "{{ (" + expression + ") and 1 }}"
        for name, expression in {
            "sort": "[ns.x, other.x] | sort",
            "max": "[ns.x, other.x] | max",
            "unique": "[ns.x, other.x] | unique | list",
            "groupby": "[{'k': ns.x}, {'k': other.x}] | groupby('k')",
            "index": "[ns.x].index(other.x)",
            "count": "[ns.x].count(other.x)",
            "changed": "[1] | map('string') | list and namespace(x=ns.x) | string",
            "views": "{'x': ns.x}.values() | string",
            "items": "'' ~ {'x': ns.x}.items()",
        }.items()
    },
    "nested lists told": LIST + "{{ raise_exception(ns.x) }}",
    "nested namespace": LIST + "{{ ns }}",
    "nested key": LIST.replace("[1]", "(1, 1)").replace("[ns.x, ns.x]", "(ns.x, ns.x)")
    + "{{ {'a': 1}[ns.x] }}",
    "nested lists tested": LIST + LIST.replace("ns", "other") + "{{ ns.x is eq other.x }}",
}
LARGE = {
    "text times": "{{ 'x' * 4000000000 }}",
    "times text": "{{ 4000000000 * 'x' }}",
    "list times": "{{ ([1] * 4000000000) | length }}",
    "doubled by +": GROW % ("'xxxxxxxx'", "ns.x + ns.x"),
    "doubled by ~": GROW % ("'xxxxxxxx'", "ns.x ~ ns.x"),
    "squared": GROW % ("7", "ns.x * ns.x"),
    "power": "{{ 9 ** 9999999 }}",
    "center": "{{ 'x' | center(4000000000) }}",
    "ljust": "{{ 'x'.ljust(4000000000) | length }}",
    "zfill": "{{ 'x'.zfill(4000000000) | length }}",
    "expandtabs": "{{ '\t'.expandtabs(4000000000) | length }}",
    "%": "{{ '%4000000000d' % 1 }}",
    "% with *": "{{ '%*d' % (4000000000, 1) }}",
    "format": "{{ '{:4000000000}'.format(1) }}",
    "format with a width": "{{ '{:{w}}'.format(1, w=4000000000) }}",
    "format filter": "{{ '%4000000000d' | format(1) }}",
    "format often": TEXT + "{{ ('{0}' * 9999).format(s) | length }}",
    "replace": TEXT + "{{ s | replace('x', s) | length }}",
    "replace method": TEXT + "{{ s.replace('x', s) | length }}",
    "replace nothing": TEXT + "{{ s.replace('', s) | length }}",
    "join": TEXT + "{{ s | join(s) | length }}",
    "join method": TEXT + "{{ s.join(s) | length }}",
    "join of a list": TEXT + "{{ ([s] * 99999) | join | length }}",
    "block": TEXT + "{% set y %}{% for i in range(9999) %}{{ s }}{% endfor %}{% endset %}{{ y | length }}",
    "macro": TEXT
    + "{% macro m() %}{% for i in range(9999) %}{{ s }}{% endfor %}{% endmacro %}{{ m() | length }}",
    "output": TEXT + "{% for i in range(9999) %}{{ s }}{% endfor %}",
    "sum": "{% set l = range(99999) | list %}{{ ([l] * 9999) | sum(start=[]) | length }}",
    "% of a mapping": TEXT + "{{ ('%(a)s' * 99999) % {'a': s} }}",
    "many widths": "{{ ('{0:9999d}' * 99999).format(3) | length }}",
    "many widths of %": "{{ (('%(a)9999s' * 99999) % {'a': 1}) | length }}",
    "translate": TEXT + "{{ ('a' * 99999).translate({97: s}) | length }}",
    "format_map": TEXT + "{{ ('{a}' * 99999).format_map({'a': s}) | length }}",
    "bytes": "{{ 'x'.encode().center(4000000000) | length }}",
    "% of bytes": "{{ ('%1000000000d'.encode() % 3) | length }}",
    "to_bytes": "{{ (5).to_bytes(1000000000, 'big') | length }}",
    "wordwrap": TEXT + "{{ ('a b ' * 9999) | wordwrap(1, True, s) | length }}",
    "urlize": TEXT + "{{ ('www.example.com ' * 9999) | urlize(target=s) | length }}",
    "slices": TEXT + "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}"
    "{% set ns.l = ns.l + [s[1:]] %}{% endfor %}",
    "rounded": "{{ 35 | round(-1000000000) }}",
    "rounded up": "{{ 3 | round(400000000, 'floor') }}",
    "indent": "{{ ('x\n' * 100000) | indent(99999) | length }}",
    "indent of JSON": "{{ [1, 2, 3] | tojson(indent=4000000000) }}",
    "map": "{{ range(99999) | map('center', 4000000000) | list | length }}",
    "batch": "{{ [1] | batch(4000000000, 'x') | list | length }}",
    "slice": "{{ [1] | slice(4000000000) | list | length }}",
}
FAULTS = {
    "large range": ("{% for i in range(999999999) %}{% endfor %}", "Range too big"),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    "zero": ("{{ 1 / 0 }}", "division by zero"),
    "internals": ("{{ ''.__class__.__mro__ }}", "unsafe"),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_templates_that_do_not_end(name: str) -> None:
    begun = time.thread_time()
    with pytest.raises(UserError, match="the chat template was stopped: it takes too long"):
        render({"default": ENDLESS[name]}, MESSAGES)
    assert time.thread_time() - begun < 2


@pytest.mark.parametrize("name", LARGE)
def test_templates_that_make_too_much(name: str) -> None:
    render({"default": "{{ 1 }}"}, MESSAGES)  # what jinja2 itself takes
    tracemalloc.start()
    begun = time.thread_time()
    try:
        with pytest.raises(
            UserError, match=r"the chat template was stopped: (it makes too much|its numbers are)"
        ):
            render({"default": LARGE[name]}, MESSAGES)
        assert tracemalloc.get_traced_memory()[1] < 64 * 1024 * 1024
    finally:
        tracemalloc.stop()
    assert time.thread_time() - begun < 2


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_templates_are_the_users_to_mend(name: str) -> None:
    template, message = FAULTS[name]
    with pytest.raises(UserError, match=f"the chat template does not take these messages: .*{message}"):
        render({"default": template}, MESSAGES)


def test_what_is_limited_is_rendered_as_ever() -> None:
    template = (
        "{% for n in [3, 4, 5] %}{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}"
        "{{ loop.nextitem }}{% endfor %}"
        "{% for k, v in {'a': 1} | items if v %}{{ k ~ '=' ~ v ~ none }}{% else %}no{% endfor %}"
        "{% for x in nothing %}{% else %}empty{% endfor %}"
        "{{ 'ab' * 2 + 'c' }} {{ 7 % 4 }} {{ 2 ** 10 }} {{ '%03d' % 5 }} {{ [1] + [2] }} {{ 1.5 * 2 }}"
        "{{ ['a', 'b'] | join('-') }}{{ range(3) | join }}{{ [[1], [2]] | sum(start=[]) }} "
        "{{ 'a b'.split() }}"
        "{{ '{0:>3}'.format('x') }} {{ 'aXa'.replace('X', '-') }} {{ 'n\nm' | indent(2) }} "
        "{{ 3 is eq 3 }} {{ 1 in [1] }}"
    )
    assert render({"default": template}, MESSAGES) == (
        "1/3,42/3,53/3a=1Noneemptyababc 3 1024 005 [1, 2] 3.0a-b012[1, 2] ['a', 'b']  x a-a n\n  m True True"
    )


def test_long_conversations_are_not_stopped() -> None:
    line = "{{ message.role + ': ' + (message.content | trim) ~ '\n' }}"
    template = "{% for message in messages %}" + line + "{% endfor %}"
    messages = [{"role": "user", "content": "word " * 2000} for _ in range(3000)]
    assert len(render({"default": template}, messages)) > 25_000_000
