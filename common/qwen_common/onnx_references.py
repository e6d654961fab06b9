"""What an ONNX file has the runtime open or run: files of its external data, and its operators' domains.

Sources: onnx.proto for the fields, protobuf's description of its wire format. `onnx` and `protobuf` are not
there on a device, and every field that names something is visited, wherever in the file it stands.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}
_MOST_NESTED = 64  # messages inside of messages
_LARGEST_TAG = 2**32 - 1  # protobuf's own readers cut off the bits above, and would see another field

# By message, what each field holds that matters here: another message, or a text that is collected.
_MESSAGES: Mapping[str, Mapping[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "NodeProto": {4: "operator", 5: "AttributeProto", 7: "domain"},
    "AttributeProto": {
        **{5: "TensorProto", 10: "TensorProto"},
        **{6: "GraphProto", 11: "GraphProto"},
        **{22: "SparseTensorProto", 23: "SparseTensorProto"},
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {13: "StringStringEntryProto"},
    "StringStringEntryProto": {1: "key", 2: "value"},
}


@dataclass
class References:
    """Attributes:
    locations: files of external data, as the tensors name them.
    operators: kinds of nodes.
    domains: of the operators; "" is ONNX's own.
    """

    locations: set[str] = field(default_factory=set)
    operators: set[str] = field(default_factory=set)
    domains: set[str] = field(default_factory=set)


def references(path: Path) -> References:
    """What the ONNX file `path` refers to.

    Raises:
        ValueError: it is no ONNX file.
    """
    found = References()
    if path.stat().st_size:  # an empty file cannot be mapped
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            _visit(content, 0, len(content), "ModelProto", found, 0)
    return found


def _visit(data: mmap.mmap, start: int, end: int, kind: str, found: References, depth: int) -> None:
    if depth > _MOST_NESTED:
        raise ValueError("nested too deeply")
    wanted, entry = _MESSAGES[kind], {"key": "", "value": ""}
    for number, begin, stop in _fields(data, start, end):
        part = wanted.get(number)
        if part is None:
            continue
        if part in _MESSAGES:
            _visit(data, begin, stop, part, found, depth + 1)
            continue
        text = data[begin:stop].decode()
        if part == "operator":
            found.operators.add(text)
        elif part == "domain":
            found.domains.add(text)
        else:
            entry[part] = text
    if kind == "StringStringEntryProto" and entry["key"] == "location":
        found.locations.add(entry["value"])


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, begin, end) of each field of a message that is text, bytes or another message."""
    at = start
    while at < end:
        tag, at = _varint(data, at, end)
        if tag > _LARGEST_TAG or tag < 8:
            raise ValueError("a field without a number")
        wire = tag & 7
        if wire == _BYTES:
            length, at = _varint(data, at, end)
            if length > end - at:
                raise ValueError("a field that is longer than its message")
            yield tag >> 3, at, at + length
            at += length
        elif wire == _VARINT:
            _, at = _varint(data, at, end)
        elif wire in _FIXED:
            at += _FIXED[wire]
        else:
            raise ValueError("a kind of field that ONNX has not")
    if at != end:
        raise ValueError("it ends in the middle of a field")


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """A number of seven bits in each byte, the lowest first, and where it ends."""
    value = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("a number without an end")
