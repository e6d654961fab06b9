"""The header of a GGUF file: its metadata, and where each tensor lies.

Constants are the package gguf's. Its reader is not used: it maps the file and keeps two arrays for every
token and merge of the vocabulary, where an export promises to stay in little memory.
Source: ggml's docs/gguf.md.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFValueType,
    Keys,
)
from qwen_common.errors import UserError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_AXES = 4
_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_NUMBERS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class Stored:
    """One tensor of a file.

    Attributes:
        kind: how its numbers are stored.
        shape: the last axis is the one whose values follow each other.
        offset: of its first byte, from the beginning of `file`.
    """

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def row_bytes(self) -> int:
        """Of one run along the last axis."""
        values, size = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // values * size

    @property
    def nbytes(self) -> int:
        return self.row_bytes * math.prod(self.shape[:-1])


@dataclass(frozen=True)
class GgufFile:
    """A file, or all parts of a split one.

    Attributes:
        path: of the file, or the first part.
        metadata: by key; arrays as lists.
        tensors: by llama.cpp's name.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Stored]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get(Keys.General.ARCHITECTURE, ""))

    @property
    def name(self) -> str:
        """The file's, without its end and the number of a part."""
        split = _SPLIT_NAME.fullmatch(self.path.name)
        return split["stem"] if split else self.path.stem


def read_gguf(path: Path) -> GgufFile:
    """Read the header of `path`, and of the other parts where it is one of several.

    Raises:
        UserError: it is no GGUF file, damaged, truncated, of another byte order, has a tensor of a type that
            is not known or past the file's end, or a part is missing.
    """
    first, *others = (_one(part) for part in _parts(path))
    tensors = dict(first.tensors)
    for other in others:
        for name, tensor in other.tensors.items():
            if name in tensors:
                raise UserError(f"{other.path} and another part hold {name}: download the parts again")
            tensors[name] = tensor
    counted = first.metadata.get(Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT)
    if others and counted is not None and counted != len(tensors):
        raise UserError(
            f"{first.path} says that its parts have {counted} tensors, and they have {len(tensors)}: "
            "download them again"
        )
    return GgufFile(first.path, first.metadata, tensors)


def _parts(path: Path) -> list[Path]:
    split = _SPLIT_NAME.fullmatch(path.name)
    if split is None:
        return [path]
    count = int(split["count"])
    parts = [path.with_name(f"{split['stem']}-{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)]
    for part in parts:
        if not part.is_file():
            raise UserError(f"{path.name} is one of {count} parts, and {part} is missing: download it, too")
    return parts or [path]


def _one(path: Path) -> GgufFile:
    try:
        with path.open("rb") as file:
            return _Header(path, file).read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


class _Header:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._size = path.stat().st_size
        self._at = 0

    def read(self) -> GgufFile:
        if self._file.read(len(_MAGIC)) != _MAGIC:
            raise UserError(f"{self._path} is not a GGUF file: it does not begin with GGUF")
        self._at = len(_MAGIC)
        version = self._number(GGUFValueType.UINT32)
        if version not in _VERSIONS:
            why = "big-endian" if version & 0xFFFF == 0 else f"of version {version}"
            raise UserError(
                f"{self._path} is {why}, which is not supported: convert it with llama.cpp to version 3, "
                "little-endian"
            )
        tensor_count, key_count = self._count(), self._count()
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._string()
            if key in metadata:
                raise self._damaged(f"its key {key} stands twice")
            metadata[key] = self._value(self._type())
        infos = [self._tensor() for _ in range(tensor_count)]
        alignment = metadata.get(Keys.General.ALIGNMENT, GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise self._damaged(f"{Keys.General.ALIGNMENT} is {alignment}")
        data = -(-self._at // alignment) * alignment
        tensors: dict[str, Stored] = {}
        for name, kind, shape, offset in infos:
            if name in tensors:
                raise self._damaged(f"its tensor {name} stands twice")
            tensor = Stored(name, kind, shape, self._path, data + offset)
            if offset % alignment:
                raise self._damaged(f"its tensor {name} does not lie at a multiple of {alignment} bytes")
            if tensor.offset + tensor.nbytes > self._size:
                raise self._damaged(f"its tensor {name} goes past the end of the file")
            tensors[name] = tensor
        return GgufFile(self._path, metadata, tensors)

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self._path} is truncated or damaged ({what}): download it again")

    def _take(self, count: int) -> bytes:
        if count > self._size - self._at:
            raise self._damaged("its header goes past the end of the file")
        self._at += count
        found = self._file.read(count)
        if len(found) < count:
            raise self._damaged("its header goes past the end of the file")
        return found

    def _number(self, kind: GGUFValueType) -> Any:
        form = "<" + _NUMBERS[kind]
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _count(self) -> int:
        """Of things that take a byte at least each."""
        count: int = self._number(GGUFValueType.UINT64)
        if count > self._size - self._at:
            raise self._damaged("its header goes past the end of the file")
        return count

    def _string(self) -> str:
        octets = self._take(self._count())
        try:
            return octets.decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"a text in its header is not UTF-8: {octets[:20]!r}") from error

    def _type(self) -> GGUFValueType:
        number = self._number(GGUFValueType.UINT32)
        try:
            return GGUFValueType(number)
        except ValueError as error:
            raise self._damaged(f"its header has a value of type {number}") from error

    def _value(self, kind: GGUFValueType) -> Any:
        if kind is GGUFValueType.STRING:
            return self._string()
        if kind is not GGUFValueType.ARRAY:
            return self._number(kind)
        inner, count = self._type(), self._count()
        if inner is GGUFValueType.STRING:
            return [self._string() for _ in range(count)]
        if inner is GGUFValueType.ARRAY:
            raise self._damaged("an array of arrays in its header")
        dtype = np.dtype("<" + _NUMBERS[inner])
        return np.frombuffer(self._take(count * dtype.itemsize), dtype).tolist()

    def _tensor(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        name, axes = self._string(), self._number(GGUFValueType.UINT32)
        if not 1 <= axes <= _MOST_AXES:
            raise self._damaged(f"its tensor {name} has {axes} axes")
        shape = tuple(reversed([self._number(GGUFValueType.UINT64) for _ in range(axes)]))
        number, offset = self._number(GGUFValueType.UINT32), self._number(GGUFValueType.UINT64)
        try:
            kind = GGMLQuantizationType(number)
        except ValueError as error:
            raise UserError(
                f"{self._path}: tensor {name} is of type {number}, which the installed package gguf does not "
                "know: update it, or give a file in another quantisation"
            ) from error
        if 0 in shape or shape[-1] % GGML_QUANT_SIZES[kind][0]:
            raise self._damaged(f"its tensor {name} has the shape {shape}, which {kind.name} cannot have")
        return name, kind, shape, offset
