"""The terminal. What is printed there is data, also where it looks like markup or like a terminal's commands:
folders, models and tensors are called as others like."""

from __future__ import annotations

from typing import Any

from qwen_common.errors import one_line
from rich.console import Console
from rich.text import Text


class PlainConsole(Console):
    """Prints strings as they are, with what a terminal would act on written as escapes."""

    def __init__(self, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich's, of which every string that is printed is one, in a table's cell or title too."""
        return super().render_str("\n".join(map(one_line, text.split("\n"))), **options)
