"""Text to tokens and back, by the checkpoint's tokenizer.json and the library that it is written for.

ONNX Runtime GenAI 0.18 reads the same file, but applies no normaliser, splits some white space otherwise,
stops at a NUL character, and loses text after a broken character.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_common.errors import UserError, check_unicode

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FileTokenizer

TOKENIZER_FILE = "tokenizer.json"
_BROKEN = "\ufffd"  # what bytes that are not UTF-8 are decoded to, one for each longest piece of a character
_LONGEST_PIECE = 3  # bytes of a character that is not whole yet, and so tokens, for each has a byte at least


def _byte_alphabet() -> dict[str, int]:
    """How byte-level tokenizers write bytes: as the character of that number where it shows, and else as one
    of those from 256 on, in order. Source: GPT-2's encoder."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + at): byte for at, byte in enumerate(others)}


_BYTES = _byte_alphabet()

# GPT-2's characters for bytes: printable ones for themselves, and the others from 256 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + at): byte for at, byte in enumerate(_OTHERS)}


class Tokenizer:
    """Text to tokens and back. Safe to use from several threads."""

    def __init__(self, tokenizer: FileTokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def open(cls, root: Path) -> Tokenizer:
        """The tokenizer of the artifact or checkpoint in the folder `root`.

        Raises:
            UserError: there is no tokenizer.json, or it cannot be read.
        """
        import tokenizers  # most of a command's start-up needs none

        path = root / TOKENIZER_FILE
        try:
            tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"{root} has no {TOKENIZER_FILE}: put the model's own there") from error
        # The library raises a bare Exception for whatever is wrong in the file.
        except Exception as error:
            raise UserError(
                f"{path} is no tokenizer that can be read ({error}): download it again"
            ) from error
        # As they were left by whoever saved the file; transformers goes by its own arguments too.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer)

    @property
    def largest_id(self) -> int:
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def longest_token(self) -> int:
        """Bytes that the longest one stands for, at most, and so characters."""
        return max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)), default=1)

    def bytes_of_tokens(self, count: int) -> tuple[list[bytes], list[int]]:
        """What each of the first `count` tokens stands for, and the ids of those that stand for no text.

        Of byte-level BPE, which writes each byte as a character of its own.
        """
        found = [b""] * count
        for token, id in self._tokenizer.get_vocab(with_added_tokens=False).items():
            if id < count:
                found[id] = bytes(_BYTES[character] for character in token if character in _BYTES)
        special = []
        for id, added in self._tokenizer.get_added_tokens_decoder().items():
            if id < count:
                found[id] = added.content.encode()
                if added.special:
                    special.append(id)
        return found, special

    def id_of(self, token: str) -> int | None:
        """None where there is no such token."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Ids; special tokens written in `text` are recognised.

        Raises:
            UserError: half of a surrogate pair is in it.
        """
        check_unicode(text, "the text", "convert it first")
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int], special: bool = False) -> str:
        """Text, with U+FFFD for bytes that are not UTF-8; of tokens like <|im_end|> only if `special`."""
        return self._tokenizer.decode(tokens, skip_special_tokens=not special)

    def raw(self, token: int) -> bytes:
        """The bytes that `token` stands for, which may be a part of a character; b"" where there is no such
        token."""
        written = self._tokenizer.id_to_token(token)
        if written is None:
            return b""
        if token not in self._added and all(character in _BYTES for character in written):
            return bytes(_BYTES[character] for character in written)
        return written.encode()

    @cached_property
    def _added(self) -> frozenset[int]:
        """Ids of tokens that are written as they are."""
        return frozenset(self._tokenizer.get_added_tokens_decoder())

    def create_stream(self, special: bool = False) -> TokenStream:
        """Args:
        special: tokens like <|im_end|> become text too.
        """
        return TokenStream(self, special)


class TokenStream:
    """Tokens to text, one after the other: all pieces together are `Tokenizer.decode` of all tokens.

    The library's own DecodeStream holds text back while it ends in a broken character, also at the end.
    """

    def __init__(self, tokenizer: Tokenizer, special: bool = False) -> None:
        self._decode = partial(tokenizer.decode, special=special)
        self._held: list[int] = []  # tokens of which the last character may not be whole
        self._told = 0  # characters of their text that were given out

    def decode(self, token: int) -> str:
        """The text that is certain with `token`; "" in the middle of a character."""
        if not self._decode([token]):  # like <|im_end|>, which says nothing
            return ""
        self._held.append(token)
        text = self._decode(self._held)
        certain = text.removesuffix(_BROKEN)
        piece = certain[self._told :]
        self._told = len(certain)
        if certain == text:
            self._held, self._told = [], 0
        elif len(self._held) > _LONGEST_PIECE:
            self._forget(text)
        return piece

    def flush(self) -> str:
        """What is left when the tokens have ended: U+FFFD for a character that stayed unfinished, or ""."""
        rest = self._decode(self._held)[self._told :]
        self._held, self._told = [], 0
        return rest

    def _forget(self, text: str) -> None:
        """Let go of the tokens before the unfinished character, which runs of broken ones would pile up.

        A cut inside of a character shows: its two parts have more U+FFFD than it has.
        """
        for size in range(1, _LONGEST_PIECE + 1):
            gone, kept = (self._decode(part) for part in (self._held[:-size], self._held[-size:]))
            if gone + kept == text:
                self._held, self._told = self._held[-size:], self._told - len(gone)
                return
