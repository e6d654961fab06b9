"""generation_config.json: where an answer ends, and how its tokens are chosen where nobody says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from qwen_common.errors import UserError
from qwen_common.files import read_json
from qwen_runtime.template import TOKENIZER_CONFIG
from qwen_runtime.tokenizer import TOKENIZER_FILE, Tokenizer

from qwen_export.architecture.models.qwen3_5 import TextConfig
from qwen_export.checkpoint.config import in_words

GENERATION_CONFIG = "generation_config.json"

TokenId = Annotated[int, Field(ge=0)]


class GenerationConfig(BaseModel):
    """The fields that are used here, as transformers' GenerationConfig calls them; null is as good as absent.

    `eos_token_id` of `read_generation_config` holds all ends, from whichever file.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)

    eos_token_id: TokenId | Annotated[list[TokenId], Field(min_length=1)] | None = None
    bos_token_id: TokenId | None = None
    pad_token_id: TokenId | None = None
    do_sample: bool | None = None
    temperature: float | None = Field(default=None, ge=0)
    top_k: int | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, ge=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0)

    def search(self) -> dict[str, Any]:
        """What ONNX Runtime GenAI's search options call the same, of what is set."""
        names = ("temperature", "top_k", "top_p", "do_sample", "repetition_penalty")
        found = {name: getattr(self, name) for name in names}
        if self.temperature == 0:  # the likeliest token
            found |= {"temperature": None, "do_sample": False}
        return {name: value for name, value in found.items() if value is not None}


def read_generation_config(root: Path, config: TextConfig) -> GenerationConfig:
    """The checkpoint's in the folder `root`, with every token that ends an answer.

    An answer ends at what generation_config.json names, at what config.json does, and at the tokenizer's
    `eos_token`: published files name only one of them, and not always the one that ends a turn.

    Raises:
        UserError: a file is malformed, a value is out of range, or no file says where an answer ends.
    """
    try:
        found = GenerationConfig.model_validate(_json(root / GENERATION_CONFIG))
    except ValidationError as error:
        of_ends = error.errors()[0]["loc"][0] == "eos_token_id"  # a union, whose branches say nothing
        reason = "eos_token_id must be the id of a token, or a list of ids" if of_ends else in_words(error)
        raise UserError(f"{root / GENERATION_CONFIG}: {reason}: correct it, or remove it") from error
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        _check_ids(getattr(found, name), config.vocab_size, root / GENERATION_CONFIG, name)
        _check_ids(getattr(config, name), config.vocab_size, root / "config.json", name)
    named, ends = found.eos_token_id, list(dict.fromkeys(_ids(found.eos_token_id)))
    ends = list(dict.fromkeys([*ends, *_ids(config.eos_token_id), *_ids(_tokenizer_end(root))]))
    if not ends:
        raise UserError(
            f"{root} does not say where an answer ends: put eos_token_id into {GENERATION_CONFIG}"
        )
    update: dict[str, Any] = {}
    if not isinstance(named, list) or set(named) != set(ends):
        update["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    if found.top_k is not None:  # as transformers does
        update["top_k"] = min(found.top_k, config.vocab_size)
    return found.model_copy(update=update)


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; {} if there is no such file."""
    return read_json(path, "download it again") if path.is_file() else {}


def _ids(value: int | list[int] | None) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _check_ids(value: int | list[int] | None, vocab_size: int, path: Path, name: str) -> None:
    for token in _ids(value):
        if not 0 <= token < vocab_size:
            raise UserError(
                f"{path}: {name} has the id {token}, and the vocabulary's go from 0 to {vocab_size - 1}"
            )


def _tokenizer_end(root: Path) -> int | None:
    """The id of the tokenizer's `eos_token`; None where no tokenizer is at hand or it has none."""
    token = _json(root / TOKENIZER_CONFIG).get("eos_token")
    if isinstance(token, dict):  # how older files write it
        token = token.get("content")
    if token is None or not (root / TOKENIZER_FILE).is_file():
        return None
    found = Tokenizer.open(root).id_of(token) if isinstance(token, str) else None
    if found is None:
        raise UserError(f"{root / TOKENIZER_CONFIG}: eos_token {token!r} is no token of {TOKENIZER_FILE}")
    return found
