"""Files: SHA-256, replacement in one step, JSON that is read with errors of one line."""

from __future__ import annotations

import hashlib
import json
import os
import tomllib
from pathlib import Path
from typing import Any

from qwen_common.errors import UserError


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal; a block of it in memory at a time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def partial(path: Path) -> Path:
    """Where `replace` writes before `path` is replaced; what is left there was interrupted."""
    return path.with_name(f".{path.name}.partial")


def replace(path: Path, content: bytes) -> None:
    """Write `content` to `path` in one step: whatever interrupts it, the file is the old one or the new one.

    Its bytes are on the disk before its name is. A link that somebody put where they are written first is not
    followed.
    """
    temporary = partial(path)
    with open(temporary, "wb", opener=_no_link) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def as_json(content: Any) -> bytes:
    """UTF-8, indented by two, keys in their own order."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def parse_json(data: bytes, where: Path, advice: str) -> dict[str, Any]:
    """The JSON object (RFC 8259) in `data`.

    Args:
        where: the file that it came from, for the message.
        advice: what to do where it is none.

    Raises:
        UserError: not UTF-8, not JSON (NaN is not), nested too deeply, not an object, or a name stands twice
            in one: of those, readers take the first, the last, or both.
    """
    try:
        content = json.loads(data.decode(), parse_constant=_refuse, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {advice}") from error
    if not isinstance(content, dict):
        raise UserError(f"{where} is not a JSON object: {advice}")
    return content


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """The JSON object in the file `path`.

    Raises:
        UserError: as `parse_json`, and where the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): {advice}") from error
    return parse_json(data, path, advice)


def read_text(path: Path, where: str) -> str:
    """The UTF-8 text in a file of the user's, without the mark that Windows' editors put first.

    Args:
        where: what it is, for the message.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {where}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {where}: it is not UTF-8: save it as that") from error


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """The TOML table in `text`; `where` as for `read_text`.

    Raises:
        UserError: it is not TOML, or nested too deeply.
    """
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{where} is not valid TOML: {error}") from error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name stands twice in an object")
    return content
