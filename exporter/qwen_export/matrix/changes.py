"""What is to be done for an artifact that may be there: its own manifest says what it was made from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

from qwen_common.artifact_folder import open_folder
from qwen_common.errors import UserError
from qwen_common.manifest import Manifest
from qwen_common.version import own_version

from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.describe import source_of
from qwen_export.matrix.combinations import Combination
from qwen_export.verify.verification import REPORT_JSON

_NAMED = 3  # fields of a profile


@dataclass(frozen=True)
class Todo:
    """What is to be done for one artifact.

    Attributes:
        reasons: why it is made; none: it is there, whole, and of the same inputs.
        verify: whether it is compared with its checkpoint.
        passed: what the report says that is there; None without one.
    """

    reasons: tuple[str, ...]
    verify: bool
    passed: bool | None = None


def todo(combination: Combination, checkpoint: Checkpoint) -> Todo:
    """Compare what is there with what is wanted.

    Args:
        checkpoint: that of `combination`, with its adapters.
    """
    wanted = combination.checks.verify
    if not combination.output.is_dir() or not any(combination.output.iterdir()):
        return Todo(("new",), wanted)
    try:
        manifest = open_folder(combination.output)
    except UserError as error:
        return Todo((f"damaged: {error}",), wanted)
    reasons = tuple(_changes(manifest, combination, checkpoint))
    if reasons:
        return Todo(reasons, wanted)
    if REPORT_JSON not in manifest["files"]:
        return Todo((), wanted)
    passed = json.loads((combination.output / REPORT_JSON).read_text(encoding="utf-8")).get("passed") is True
    return Todo((), False, passed)


def _changes(manifest: Manifest, combination: Combination, checkpoint: Checkpoint) -> Iterator[str]:
    if manifest["qwen_edge"] != own_version():
        yield f"exporter changed: qwen-edge {manifest['qwen_edge']} made it"
    source = source_of(checkpoint)
    if manifest["source"] != source:
        was, now = (str(found["revision"] or "")[:12] for found in (manifest["source"], source))
        yield f"checkpoint changed: {was} to {now}" if was and now else "checkpoint changed"
    if manifest.get("adapters", []) != list(checkpoint.adapters) or "switched_adapters" in manifest:
        yield "adapter changed"
    if manifest["model"]["model_type"] != checkpoint.model_type:
        yield "text_only changed"
    profile = combination.profile
    if combination.max_context is not None:
        profile = profile.model_copy(update={"context_length": combination.max_context})
    settings = cast(Mapping[str, Any], manifest["settings"])
    if fields := list(_different(settings, profile.model_dump(mode="json"))):
        more = f" and {len(fields) - _NAMED} more" if len(fields) > _NAMED else ""
        yield f"profile changed: {', '.join(fields[:_NAMED])}{more}"
    if manifest["all_logits"] and manifest["backend"] == "onnx":
        yield "made with --all-logits"


def _different(one: Mapping[str, Any], other: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Dotted names of the fields that differ."""
    for key in dict.fromkeys(chain(one, other)):
        mine, its = one.get(key), other.get(key)
        if isinstance(mine, Mapping) and isinstance(its, Mapping):
            yield from _different(mine, its, f"{above}{key}.")
        elif mine != its:
            yield f"{above}{key}"
