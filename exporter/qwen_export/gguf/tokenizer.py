"""The tokenizer in a GGUF file, as Hugging Face's files.

Source of the expressions that split a text into words: tokenizer.json of Qwen2.5 and Qwen3.5, which
llama.cpp's src/llama-vocab.cpp calls `qwen2` and `qwen35`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import Keys, TokenType
from qwen_common.errors import UserError
from qwen_runtime.template import TEMPLATE_FILE, TOKENIZER_CONFIG
from qwen_runtime.tokenizer import TOKENIZER_FILE
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from qwen_export.gguf.file import GgufFile

_WORDS = {
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ),
    "qwen35": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
_MODEL = "gpt2"  # byte-level BPE
_END = ("eos", "eot", "eom")  # as the file calls tokens that end an answer, a turn, a message
_ENDS = ("<|im_end|>", "<|endoftext|>")  # whatever the file says, as in llama.cpp
_NAMED_TEMPLATE = Keys.Tokenizer.CHAT_TEMPLATE + "."


@dataclass(frozen=True)
class GgufTokenizer:
    """Lists of a file, checked.

    Attributes:
        tokens: every token's text, by its id.
        kinds: what each is, a `TokenType`.
        merges: pairs, the first ones first.
        words: the expression that splits a text.
        special: ids by the file's names for them: eos, eot, eom, bos, padding.
        templates: chat templates by transformers' names.
    """

    path: Path
    tokens: list[str]
    kinds: list[int]
    merges: list[tuple[str, str]]
    words: str
    special: Mapping[str, int]
    templates: Mapping[str, str]

    @property
    def ends(self) -> list[int]:
        """Ids of the tokens that end an answer."""
        named = [self.special.get(name) for name in _END]
        found = [*named, *(self.ids.get(token) for token in _ENDS)]
        return list(dict.fromkeys(id for id in found if id is not None))

    @property
    def ids(self) -> dict[str, int]:
        return {token: id for id, token in enumerate(self.tokens)}

    def write(self, folder: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and the chat template.

        Raises:
            UserError: the lists do not belong together.
        """
        self._built().save(str(folder / TOKENIZER_FILE))
        settings: dict[str, Any] = {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_bos_token": False,
            "add_prefix_space": False,
            "bos_token": None,
            "eos_token": self._text("eos"),
            "pad_token": self._text("padding"),
            "unk_token": None,
            "errors": "replace",
            "clean_up_tokenization_spaces": False,
        }
        if len(self.templates) > 1:
            named = [{"name": name, "template": text} for name, text in self.templates.items()]
            settings["chat_template"] = named
        elif template := next(iter(self.templates.values()), None):
            (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
        (folder / TOKENIZER_CONFIG).write_text(json.dumps(settings, indent=2), encoding="utf-8")

    def _built(self) -> Tokenizer:
        normal, added = self._of(TokenType.NORMAL), self._of(TokenType.CONTROL, TokenType.USER_DEFINED)
        # The library numbers added tokens after the others; where they stand elsewhere, they are listed.
        in_row = sorted(added.values()) == list(range(len(normal), len(normal) + len(added)))
        vocabulary = normal if in_row else normal | added
        for first, second in self.merges:  # the library ends the program, or raises a bare Exception
            if not {first, second, first + second} <= vocabulary.keys():
                raise UserError(
                    f"{self.path}: its merge of {first!r} and {second!r} is not of its tokens: download it "
                    "again"
                )
        built = Tokenizer(models.BPE(vocabulary, self.merges))
        built.normalizer = normalizers.NFC()
        built.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(self.words), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        built.decoder = decoders.ByteLevel()
        built.add_tokens(
            [
                AddedToken(token, normalized=False, special=self.kinds[id] == TokenType.CONTROL)
                for token, id in sorted(added.items(), key=lambda item: item[1])
            ]
        )
        return built

    def _of(self, *kinds: TokenType) -> dict[str, int]:
        return {token: id for id, token in enumerate(self.tokens) if self.kinds[id] in kinds}

    def _text(self, name: str) -> str | None:
        return self.tokens[self.special[name]] if name in self.special else None


def read_tokenizer(file: GgufFile) -> GgufTokenizer:
    """Raises:
    UserError: there is none, it is of another kind than Qwen's, or its lists do not belong together.
    """
    kind, words = (file.metadata.get(key) for key in (Keys.Tokenizer.MODEL, Keys.Tokenizer.PRE))
    if kind in (None, "none", "no_vocab"):
        raise UserError(f"{file.path} has no tokenizer, which an artifact needs: give a file that has one")
    if kind != _MODEL or words not in _WORDS:
        raise UserError(
            f"{file.path}: its tokenizer is {kind}, {words}, which is not Qwen's: supported are "
            f"{_MODEL} with {' or '.join(_WORDS)}"
        )
    for key in (Keys.Tokenizer.ADD_BOS, Keys.Tokenizer.ADD_EOS, Keys.Tokenizer.ADD_PREFIX):
        if file.metadata.get(key):
            raise UserError(f"{file.path}: {key} is true, and Qwen's models have it false: not supported")
    tokens, merges = _texts(file, Keys.Tokenizer.LIST), _texts(file, Keys.Tokenizer.MERGES)
    kinds = file.metadata.get(Keys.Tokenizer.TOKEN_TYPE)
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise UserError(
            f"{file.path}: {Keys.Tokenizer.TOKEN_TYPE} is no list as long as that of the tokens: download it "
            "again"
        )
    if twice := [token for token, count in Counter(tokens).items() if count > 1]:
        raise UserError(f"{file.path} has the token {twice[0]!r} twice: download it again")
    pairs = [merge.partition(" ") for merge in merges]
    return GgufTokenizer(
        file.path,
        tokens,
        kinds,
        [(first, second) for first, _, second in pairs],
        _WORDS[words],
        _special(file, len(tokens)),
        _templates(file),
    )


def _texts(file: GgufFile, key: str) -> list[str]:
    found = file.metadata.get(key)
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise UserError(f"{file.path}: {key} is no list of texts: download it again")
    return found


def _special(file: GgufFile, count: int) -> dict[str, int]:
    found = {}
    for name in (*_END, "bos", "padding"):
        key = f"tokenizer.ggml.{name}_token_id"
        if (id := file.metadata.get(key)) is None:
            continue
        if not isinstance(id, int) or not 0 <= id < count:
            raise UserError(f"{file.path}: {key} is {str(id)[:60]}, and its tokens go from 0 to {count - 1}")
        found[name] = id
    return found


def _templates(file: GgufFile) -> dict[str, str]:
    named = [key for key in file.metadata if key.startswith(_NAMED_TEMPLATE)]
    found = {"default": file.metadata.get(Keys.Tokenizer.CHAT_TEMPLATE)}
    found |= {key.removeprefix(_NAMED_TEMPLATE): file.metadata[key] for key in named}
    return {name: text for name, text in found.items() if isinstance(text, str) and text}
