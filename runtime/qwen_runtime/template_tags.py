"""Tags of chat templates that jinja2 does not have."""

from __future__ import annotations

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser


class Generation(Extension):
    """`{% generation %}`, by which training finds what the assistant says. It changes no text; as in
    transformers, variables that are set in it end with it."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)
