"""What a release takes, before any of it is begun: every combination is looked at before one is made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from qwen_common.errors import UserError
from qwen_common.manifest import BackendName

from qwen_export.adapters.merge import with_adapters
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.checkpoint.text_files import require_tokenizer
from qwen_export.export import Export, check
from qwen_export.matrix.changes import Todo, todo
from qwen_export.matrix.combinations import Combination, groups
from qwen_export.matrix.target import check_target
from qwen_export.opening import open_checkpoint
from qwen_export.planner.estimate import Estimate
from qwen_export.planner.predictions import predict, require_memory

_EXPORT_BYTES = 500_000_000  # of an export's process, whatever the model's size (docs/export.md)
_TRACED_BYTES = 3_000_000_000  # with PyTorch and OpenVINO in it


@dataclass(frozen=True)
class Planned:
    """One combination, and what is to be done for it.

    Attributes:
        memory: bytes that this takes on the machine that does it.
    """

    combination: Combination
    todo: Todo
    estimate: Estimate
    memory: int

    @property
    def needs_work(self) -> bool:
        """Whether a checkpoint must be read for it."""
        return bool(self.todo.reasons) or self.todo.verify

    def as_json(self) -> dict[str, Any]:
        one = self.combination
        return {
            "label": one.label,
            "checkpoint": one.source,
            "adapters": list(one.adapters),
            "profile": one.profile.name,
            "output": str(one.output),
            "push": one.push,
            "make": bool(self.todo.reasons),
            "reasons": list(self.todo.reasons),
            "verify": self.todo.verify,
            "disk": self.estimate.disk,
            "resident": self.estimate.resident,
            "memory": self.memory,
        }


def plan(found: Sequence[Combination]) -> list[list[Planned]]:
    """Look at every combination, in the groups in which they are worked on; reads no weight.

    Raises:
        UserError: of the first one that cannot be: its checkpoint does not open, an adapter or the profile's
            memory does not fit, something else is in its output folder, or its backend refuses it.
    """
    planned = []
    for group in groups(found):
        opened = open_group(group)
        planned.append([_plan(one, opened) for one in group])
    return planned


def open_group(group: Sequence[Combination]) -> Checkpoint:
    """The checkpoint that all of `group` read, as it lies there.

    Raises:
        UserError: as `open_checkpoint`; names the first of `group`.
    """
    first = group[0]
    with _naming(first):
        text_only = all(one.text_only for one in group)
        return open_checkpoint(first.source, None, text_only, first.mmproj, streaming=True)


def checkpoint_of(one: Combination, opened: Checkpoint) -> Checkpoint:
    """What `one` is made of."""
    checkpoint = replace(opened, vision=None) if one.text_only else opened
    return with_adapters(checkpoint, one.adapters)


def export_of(one: Combination, checkpoint: Checkpoint) -> Export:
    return Export(checkpoint, one.profile, one.output, force=True, max_context=one.max_context)


@contextmanager
def _naming(one: Combination) -> Iterator[None]:
    """A UserError raised in it says of which combination it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{one.label}: {error}") from error


def _plan(one: Combination, opened: Checkpoint) -> Planned:
    with _naming(one):
        if one.push:
            check_target(one.push)
        checkpoint = checkpoint_of(one, opened)
        found = (
            predict(checkpoint, one.profile) if one.ignore_memory else require_memory(checkpoint, one.profile)
        )
        what = todo(one, checkpoint)
        if one.checks.verify:
            require_tokenizer(checkpoint)
        if what.reasons:
            check(export_of(one, checkpoint))
        return Planned(one, what, found.estimate, _memory(one, checkpoint, found.estimate))


def _memory(one: Combination, checkpoint: Checkpoint, estimate: Estimate) -> int:
    """Bytes of an export, and of the artifact's own when it is verified."""
    traced = one.profile.backend == BackendName.OPENVINO
    least = _TRACED_BYTES if traced else _EXPORT_BYTES
    if traced and one.profile.compression != "data-free":  # the whole model, in float32
        least += 4 * sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    return least + (estimate.load if one.checks.verify else 0)
