"""The OCI image manifest of a folder: one layer for each file, whose title is its name.

As the OCI image specification 1.1 has artifacts: an artifactType, and an empty configuration. `oras pull`
makes the same folder of it.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from qwen_common.errors import UserError, one_line
from qwen_common.files import parse_json
from qwen_common.manifest import FileEntry

TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPES = ("application/vnd.oci.image.index.v1+json",)
ARTIFACT_TYPE = "application/vnd.qwen-edge.artifact.v1"
TITLE = "org.opencontainers.image.title"
MOST_BYTES = 4 * 1024 * 1024  # of a manifest, which is what registries take
EMPTY = b"{}"
EMPTY_ENTRY: FileEntry = {"size": len(EMPTY), "sha256": hashlib.sha256(EMPTY).hexdigest()}
_EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
_MEDIA_TYPES = {
    ".jinja": "text/plain",
    ".json": "application/json",
    ".md": "text/markdown",
    ".png": "image/png",
    ".txt": "text/plain",
    ".xml": "application/xml",
}
_OTHER = "application/octet-stream"
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
# What Windows takes for a device, or does not take; the slashes and `..` of every system are among them.
_DEVICE = re.compile(r"(?:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)[0-9¹²³])(?:\..*)?", re.IGNORECASE)
_REFUSED = re.compile(r'[\x00-\x1f\x7f<>:"/\\|?*]')
_MOST_NAME = 200  # bytes of a name: systems take 255, and ours are written under longer ones first
_SHOWN = 80


def build(files: Mapping[str, FileEntry], annotations: Mapping[str, str]) -> bytes:
    """The manifest of `files`, with layers in the order of their names: the same files, the same bytes."""
    layers = [
        _descriptor(_MEDIA_TYPES.get(PurePath(name).suffix, _OTHER), entry) | {"annotations": {TITLE: name}}
        for name, entry in sorted(files.items())
    ]
    content = {
        "schemaVersion": 2,
        "mediaType": TYPE,
        "artifactType": ARTIFACT_TYPE,
        "config": _descriptor(_EMPTY_TYPE, EMPTY_ENTRY),
        "layers": layers,
        "annotations": dict(annotations),
    }
    return json.dumps(content, ensure_ascii=False).encode()


def _descriptor(media_type: str, entry: FileEntry) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": f"sha256:{entry['sha256']}", "size": entry["size"]}


def read(data: bytes, where: str) -> dict[str, FileEntry]:
    """The files that the manifest in `data` names, whoever wrote it.

    Args:
        where: it came from, for messages.

    Raises:
        UserError: it is no image manifest, or has a layer that is no file, or one that no folder should get.
    """
    content = parse_json(data, Path(where.partition("://")[2]), "push the artifact again")
    layers = content.get("layers")
    if not isinstance(layers, list):
        what = "an index of several" if "manifests" in content else "no image manifest"
        raise UserError(f"{where} is {what}: give the name of an artifact that qwen-export pushed")
    files: dict[str, FileEntry] = {}
    taken: set[str] = set()
    for layer in layers:
        fields = layer if isinstance(layer, dict) else {}
        notes, digest, size = fields.get("annotations"), fields.get("digest"), fields.get("size")
        name = notes.get(TITLE) if isinstance(notes, dict) else None
        found = _DIGEST.fullmatch(digest) if isinstance(digest, str) else None
        if not isinstance(name, str):
            raise UserError(f"{where} has a layer without a name: it is no artifact that qwen-export pushed")
        if found is None or type(size) is not int or size < 0:
            raise UserError(f"{where} has no valid size and SHA-256 of {_shown(name)}: push it again")
        same = unicodedata.normalize("NFC", name).casefold()  # to Windows and macOS
        if not _fits(name) or same in taken:
            why = "twice" if same in taken else "whose name no folder should get"
            raise UserError(f"{where} has a file {why}, '{_shown(name)}': it is not pulled")
        taken.add(same)
        files[name] = {"size": size, "sha256": found[1]}
    return files


def _shown(name: str) -> str:
    return one_line(name[:_SHOWN])


def _fits(name: str) -> bool:
    """Whether a file can have that name in a folder of any system, and stays in it."""
    try:
        short = 0 < len(name.encode()) <= _MOST_NAME
    except UnicodeEncodeError:
        return False
    return short and not (_REFUSED.search(name) or _DEVICE.fullmatch(name) or name.endswith((" ", ".")))
