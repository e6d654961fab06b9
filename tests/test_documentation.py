"""What the documentation names is there: files, sections, modules, options of the commands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from qwen_export.cli import main as qwen_export
from qwen_runtime.cli import main as qwen_run

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
SOURCE = re.compile(r"[\w./-]*[\w-]\.(?:py|toml|md)")
COMMAND = re.compile(r"\bqwen-(?:run|export)(?= )[^|;&`#\n]*")
ELSEWHERE = ("REPORT.md", "xml/__init__.py", "zipfile/__init__.py")  # an artifact's, Python's
PLACEHOLDER = re.compile("NAME|BLOCK")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", prose, re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def options(group: click.Command) -> set[str]:
    found = {option for parameter in group.params for option in (*parameter.opts, *parameter.secondary_opts)}
    if isinstance(group, click.Group):
        context = click.Context(group)
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            assert command is not None
            found |= options(command)
    return found | {"--help"}


OPTIONS = {"qwen-run": options(qwen_run), "qwen-export": options(qwen_export)}
TREES = (".ci", "benchmarks", "common", "docs", "examples", "exporter", "profiles", "runtime", "tests")
FILES = [f"/{path.relative_to(ROOT).as_posix()}" for tree in TREES for path in (ROOT / tree).rglob("*.*")]
FILES += [f"/{path.name}" for path in ROOT.glob("*.*")]


def missing(page: Path) -> Iterator[str]:
    text = page.read_text(encoding="utf-8")
    for link in LINK.findall(re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)):
        name, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / name if name else page
        if not target.exists():
            yield f"{link}: no such file"
        elif anchor and anchor not in anchors(target):
            yield f"{link}: no such section"
    for code in CODE.findall(text):
        if not SOURCE.fullmatch(code) or PLACEHOLDER.search(code) or code in ELSEWHERE:
            continue
        if not any(file.endswith(f"/{code.removeprefix('../')}") for file in FILES):
            yield f"{code}: no such file"
    joined = text.replace("\\\n", " ")
    for command in COMMAND.findall(joined):
        program = command.split()[0]
        for option in OPTION.findall(command):
            if option not in OPTIONS[program]:
                yield f"{program} has no {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_named_is_there(page: Path) -> None:
    assert list(missing(page)) == []
