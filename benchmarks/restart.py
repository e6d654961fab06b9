"""A long conversation with a new server before each turn: time to the first token, with what is on disk and
read anew, and whether the answers are the same. Then an agent's first question in one folder after another,
which its instructions name.

python -m benchmarks.restart ARTIFACT [--tokens 25000] [--named-at 0.9]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openai import OpenAI
from qwen_runtime.tokenizer import Tokenizer
from rich.console import Console
from rich.table import Table

from benchmarks.support.serving import served

_TEXT = "A list is mutable, and a tuple is not. "
_FOLDERS = ("/home/ada/parser", "/srv/www", "/home/grace/compiler", "/srv/www/docs", "/home/ada")
_QUESTIONS = ("What is yield?", "What is assert?", "What is a list?")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--tokens", type=int, default=25_000, help="of the instructions")
    parser.add_argument(
        "--named-at", type=float, default=0.9, help="where the instructions name the folder, of their length"
    )
    asked = parser.parse_args()
    tokenizer = Tokenizer.open(asked.artifact)
    instructions = tokenizer.decode(tokenizer.encode(_TEXT * asked.tokens)[: asked.tokens])
    Console().print(_conversation(asked.artifact, instructions))
    Console().print(_folders(asked.artifact, instructions, int(len(instructions) * asked.named_at)))


def _conversation(artifact: Path, instructions: str) -> Table:
    messages: list[dict[str, Any]] = [{"role": "system", "content": instructions}]
    table = Table("turn", "prompt", "not read", "first token, s", "GenAI, all read, s", "same answer")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, question in enumerate(_QUESTIONS):
            # A new server for each turn, over the same folder.
            with _serving(artifact, "--state-dir", folder) as client:
                messages.append({"role": "user", "content": question})
                found = _ask(client, messages)
                time.sleep(2)  # what was read is written when nobody waits
                if number == 1:
                    other = [messages[0], {"role": "user", "content": "Something else."}]
                    rows.append(("another conversation", other, _ask(client, other)))
            rows.append((f"{number + 1}, after a start", list(messages), found))
            messages.append({"role": "assistant", "content": found[0]})
    with _serving(artifact, "--keep", "0") as client:
        for name, conversation, (text, prompt, cached, seconds) in rows:
            expected, _, _, anew = _ask(client, conversation)
            same = "yes" if text == expected else "no"
            table.add_row(name, str(prompt), str(cached), f"{seconds:.2f}", f"{anew:.2f}", same)
    return table


def _folders(artifact: Path, instructions: str, named_at: int) -> Table:
    """The same question in five folders, with a new server for each."""
    table = Table("folder", "prompt", "not read", "read", "first token, s", "same answer")
    rows = []
    with tempfile.TemporaryDirectory() as states:
        for folder in _FOLDERS:
            text = f"{instructions[:named_at]}The folder is {folder}. {instructions[named_at:]}"
            messages = [{"role": "system", "content": text}, {"role": "user", "content": _QUESTIONS[0]}]
            with _serving(artifact, "--state-dir", states) as client:
                rows.append((folder, messages, _ask(client, messages)))
                time.sleep(2)
    with _serving(artifact, "--keep", "0") as client:
        for folder, messages, (text, prompt, cached, seconds) in rows:
            same = "yes" if text == _ask(client, messages)[0] else "no"
            table.add_row(folder, str(prompt), str(cached), str(prompt - cached), f"{seconds:.2f}", same)
    return table


@contextmanager
def _serving(artifact: Path, *options: str) -> Iterator[OpenAI]:
    with served(artifact, list(options)) as (url, _):
        yield OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=3600)


def _ask(client: OpenAI, messages: list[dict[str, Any]]) -> tuple[str, int, int, float]:
    """The answer, tokens of the prompt, how many were not read, and seconds to the first piece."""
    begun, first, text, usage = time.perf_counter(), 0.0, "", None
    stream = client.chat.completions.create(
        model="any",
        messages=messages,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        usage = chunk.usage or usage
        piece = chunk.choices[0].delta.content if chunk.choices else None
        if piece:
            first = first or time.perf_counter() - begun
            text += piece
    assert usage is not None and usage.prompt_tokens_details is not None
    return text, usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens or 0, first


if __name__ == "__main__":
    main()
