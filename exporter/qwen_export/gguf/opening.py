"""A GGUF file, and perhaps its vision tower's, as a checkpoint.

What the rest of the export reads from files (config.json, tokenizer, chat template) is written to a folder of
its own, which is removed when the program ends.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from qwen_common.errors import UserError

from qwen_export.architecture.models.qwen3_5 import TextConfig
from qwen_export.architecture.registry import config_class
from qwen_export.architecture.vision import VisionConfig
from qwen_export.checkpoint.checkpoint import Checkpoint, listed
from qwen_export.checkpoint.config import in_words
from qwen_export.checkpoint.generation_config import GENERATION_CONFIG
from qwen_export.checkpoint.head import settle_head
from qwen_export.checkpoint.identity import identity
from qwen_export.gguf.file import GgufFile, read_gguf
from qwen_export.gguf.layout import lay_out
from qwen_export.gguf.metadata import sampling, text_config
from qwen_export.gguf.tokenizer import GgufTokenizer, read_tokenizer
from qwen_export.gguf.vision import image_tokens, processor, vision_config, vision_tensors

_Config = TypeVar("_Config")
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []  # removed at the program's end


def open_gguf(source: str, mmproj: Path | None = None, text_only: bool = False) -> Checkpoint:
    """The model in the file `source`; reads no weight but, of Q4_1, the blocks' minima.

    Args:
        mmproj: the vision tower's file; None leaves it out.
        text_only: leave it out, too.

    Raises:
        UserError: a file is damaged, or of another model, a part is missing, or something in it is not
            supported.
    """
    return open_files(source, mmproj, text_only)[0]


def open_files(
    source: str, mmproj: Path | None = None, text_only: bool = False
) -> tuple[Checkpoint, list[GgufFile]]:
    """The same, and the files' headers."""
    if mmproj and text_only:
        raise UserError("--text-only leaves the vision tower out, which --mmproj names: give one of them")
    file = read_gguf(Path(source))
    read = [file]
    text = text_config(file)
    tokenizer = read_tokenizer(file)
    if not tokenizer.ends:
        raise UserError(
            f"{file.path} has no tokenizer.ggml.eos_token_id, and so does not say where an answer ends: give "
            "a file that does"
        )
    if len(tokenizer.tokens) > text["vocab_size"]:
        raise UserError(
            f"{file.path} has {len(tokenizer.tokens)} tokens, and an embedding of {text['vocab_size']}: "
            "download it again"
        )
    text["eos_token_id"] = tokenizer.ends
    config = _checked(file, lambda: config_class(text["model_type"])(**text))
    tensors, unread = lay_out(file.tensors, config)
    notes = []
    vision: VisionConfig | None = None
    files = {"config.json": text, GENERATION_CONFIG: _generation(file, tokenizer)}
    if mmproj:
        if not config.has_text_section:
            raise UserError(
                f"{file.path} is of {text['model_type']}, which has no vision tower: leave --mmproj off"
            )
        read.append(tower := read_gguf(mmproj))
        vision, files["config.json"] = _with_tower(file, tower, config, text, tokenizer)
        files["preprocessor_config.json"] = processor(tower)
        of_tower, strange = vision_tensors(tower)
        tensors |= of_tower
        unread += strange
    elif not text_only and (beside := sorted(file.path.parent.glob("*mmproj*.gguf"))):
        notes.append(
            f"{beside[0].name} lies beside the file: if it is this model's vision tower, --mmproj "
            f"{beside[0]} takes images, too"
        )
    if unread:
        notes.append(f"not read, because the model has no such tensors: {listed(unread)}")
    checkpoint = Checkpoint(
        _folder(file.name, files, tokenizer),
        source,
        None,
        settle_head(config, tensors),
        tensors,
        vision,
        None,
        f"GGUF, {file.architecture}",
        tuple(notes),
        identity=identity({path for tensor in tensors.values() for path in tensor.files}, ()),
    )
    return checkpoint, read


def _with_tower(
    file: GgufFile, tower: GgufFile, config: TextConfig, text: dict[str, Any], tokenizer: GgufTokenizer
) -> tuple[VisionConfig, dict[str, Any]]:
    """The tower's configuration, and config.json's content with both."""
    fields, ids = vision_config(tower), image_tokens(tokenizer.ids, file.path)
    content = {**fields, **ids, "processor": processor(tower)}
    vision = _checked(tower, lambda: VisionConfig.model_validate(content))
    if vision.out_hidden_size != config.hidden_size:
        raise UserError(
            f"{tower.path} gives features of {vision.out_hidden_size}, and {file.path} takes "
            f"{config.hidden_size}: they are not of the same model"
        )
    return vision, {
        "model_type": text["model_type"].removesuffix("_text"),
        "text_config": text,
        "vision_config": fields,
        **ids,
        "tie_word_embeddings": text["tie_word_embeddings"],
    }


def _checked(file: GgufFile, make: Callable[[], _Config]) -> _Config:
    try:
        return make()
    except ValidationError as error:
        raise UserError(f"{file.path}: {in_words(error)}") from error


def _generation(file: GgufFile, tokenizer: GgufTokenizer) -> dict[str, Any]:
    ids = {"bos_token_id": tokenizer.special.get("bos"), "pad_token_id": tokenizer.special.get("padding")}
    return {**sampling(file), "eos_token_id": tokenizer.ends, **ids}


def _folder(name: str, files: dict[str, dict[str, Any]], tokenizer: GgufTokenizer) -> Path:
    """A folder of that name, with what a checkpoint has beside its weights."""
    made = tempfile.TemporaryDirectory(prefix="qwen-edge-gguf-")
    _FOLDERS.append(made)
    folder = Path(made.name) / name
    folder.mkdir()
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content, indent=2), encoding="utf-8")
    tokenizer.write(folder)
    return folder
