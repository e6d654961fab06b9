"""A conversation in the terminal."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen_common.errors import UserError
from rich.console import Console

from qwen_runtime.model import Model
from qwen_runtime.request import Message, Request

_HELP = "Ctrl-C stops an answer; /help lists the commands; Ctrl-D leaves."


def chat(model: Model, system: str | None, request: Request) -> None:
    """Read turns from stdin and answer them until the end of input.

    Args:
        request: how each is answered; it has no prompt yet.
    """
    with contextlib.suppress(ImportError):  # Windows' console edits lines by itself
        import readline  # noqa: F401 - arrow keys and history for `input`
    _Chat(model, system, request).loop()


class _Chat:
    def __init__(self, model: Model, system: str | None, request: Request) -> None:
        self._model = model
        self._request = request
        self._console = Console(highlight=False)
        self._system = system
        self._turns: list[Message] = []
        self._images: list[Path] = []
        self._commands: dict[str, tuple[Callable[[str], None], str]] = {
            "/clear": (self._clear, "forget the conversation"),
            "/exit": (self._exit, "leave"),
            "/help": (self._help, "this list"),
            "/image": (self._image, "FILE: show an image with the next message"),
            "/quit": (self._exit, "leave"),
            "/save": (self._save, "FILE: write the conversation as JSON"),
            "/system": (self._set_system, "TEXT: change the system message, and start again"),
        }

    def loop(self) -> None:
        self._say(f"{self._model.info.name}. {_HELP}")
        while True:
            try:
                text = self._read()
                name, _, argument = text.partition(" ")
                if name in self._commands:
                    self._commands[name][0](argument.strip())
                elif text:
                    self._ask(text)
            except EOFError:
                return
            except KeyboardInterrupt:
                self._say(f"\n{_HELP}")

    def _read(self) -> str:
        """One message; a line that ends with a backslash goes on in the next one.

        Raises:
            EOFError: the input has ended.
        """
        lines = []
        prompt = "> "
        try:
            # Not the console's own, whose prompt readline would not know of, and write over.
            while (line := input(prompt)).endswith("\\"):
                lines.append(line[:-1])
                prompt = ". "
        except EOFError:
            self._console.print()
            raise
        return "\n".join([*lines, line]).strip()

    def _ask(self, text: str) -> None:
        parts: list[dict[str, Any]] = [{"type": "image", "image": path} for path in self._images]
        question: Message = {
            "role": "user",
            "content": [*parts, {"type": "text", "text": text}] if parts else text,
        }
        try:
            answer = self._answer([*self._messages, question])
        except UserError as error:
            if not self._turns and not parts and not self._console.is_terminal:
                raise
            # Most likely the context is full, or a file is no image. What was said so far is not lost.
            self._say(f"{error}; /clear forgets the conversation")
        else:
            self._turns += [question, {"role": "assistant", "content": answer}]
        self._images = []

    @property
    def _messages(self) -> list[Message]:
        return [*([{"role": "system", "content": self._system}] if self._system else []), *self._turns]

    def _answer(self, messages: list[Message]) -> str:
        """Stream one answer; Ctrl-C ends it early, and what came so far is kept."""
        begun = time.perf_counter()
        first = None
        generation = self._model.answer(replace(self._request, prompt=messages))
        try:
            for piece in generation:
                first = first or time.perf_counter()
                self._console.out(piece, end="", highlight=False)
        except KeyboardInterrupt:
            self._console.print(" [dim](stopped)[/dim]", end="")
        finally:
            generation.close()
        self._console.print()
        if first is not None and self._console.is_terminal:
            rate = (len(generation.tokens) - 1) / max(1e-9, time.perf_counter() - first)
            self._say(
                f"{len(generation.tokens)} tokens, {rate:.1f} a second, first after {first - begun:.1f} s"
            )
        return generation.text

    def _clear(self, argument: str) -> None:
        self._turns, self._images = [], []

    def _exit(self, argument: str) -> None:
        raise EOFError

    def _help(self, argument: str) -> None:
        for name, (_, what) in self._commands.items():
            self._say(f"{name:8} {what}")
        self._say("A line that ends with \\ goes on in the next one.")

    def _image(self, name: str) -> None:
        path = Path(name).expanduser()
        if not self._model.info.images:
            self._say("this model has no vision tower: export a vision-language checkpoint")
        elif not path.is_file():
            self._say(f"there is no file {path}")
        else:
            self._images.append(path)
            self._say(f"{path.name} goes with the next message")

    def _set_system(self, text: str) -> None:
        self._system = text or None
        self._clear("")

    def _save(self, name: str) -> None:
        if not name:
            self._say("write the file's name after /save")
            return
        try:
            text = json.dumps(self._messages, ensure_ascii=False, indent=2, default=str)
            Path(name).expanduser().write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            self._say(f"cannot write {name}: {error.strerror}")
        else:
            self._say(f"{len(self._messages)} messages are in {name}")

    def _say(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False)
