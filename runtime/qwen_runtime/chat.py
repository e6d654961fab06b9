"""A conversation in the terminal."""

from __future__ import annotations

from typing import Any

from qwen_profiles.errors import UserError
from rich.console import Console

from qwen_runtime.model import Message, Model

_LEAVE = {"/exit", "/quit"}
_HELP = "Ctrl-C stops an answer; /clear forgets the conversation; Ctrl-D or /exit leaves."


def chat(model: Model, system: str | None, options: dict[str, Any]) -> None:
    """Read turns from stdin and answer them until the end of input.

    Args:
        options: keyword arguments of `Model.generate`.
    """
    console = Console(highlight=False)
    console.print(f"{model.info.name}. {_HELP}", style="dim", markup=False)
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    while True:
        try:
            text = console.input("[bold]> [/bold]").strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print(f"\n{_HELP}", style="dim", markup=False)
            continue
        if text in _LEAVE:
            return
        if text == "/clear":
            messages = list(opening)
        elif text:
            question: Message = {"role": "user", "content": text}
            try:
                answer = _answer(model, [*messages, question], options, console)
            except UserError as error:
                if messages == opening:
                    raise
                # Most likely the context is full. What was said so far is not lost.
                console.print(f"{error}; /clear forgets the conversation", style="dim", markup=False)
            else:
                messages += [question, {"role": "assistant", "content": answer}]


def _answer(model: Model, messages: list[Message], options: dict[str, Any], console: Console) -> str:
    """Stream one answer; Ctrl-C ends it early, and what came so far is kept."""
    generation = model.generate(messages, **options)
    try:
        for piece in generation:
            console.out(piece, end="", highlight=False)
    except KeyboardInterrupt:
        console.print(" [dim](stopped)[/dim]", end="")
    finally:
        generation.close()
    console.print()
    return generation.text
