"""`--auto-precision` on the command line: what was asked for, the choice, and what is said of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from qwen_common.errors import UserError

if TYPE_CHECKING:
    from qwen_profiles.schema import Profile

    from qwen_export.checkpoint.checkpoint import Checkpoint
    from qwen_export.quantize.auto_precision import Chosen, Limits

# Not pydantic's ByteSize, which ignores what follows ("18GB;x") and knows bits.
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_USED = 0.97  # of a bound, at least, where something finer would fit
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def byte_count(text: str, option: str) -> int:
    """`11GB`, `11GiB`, `900 MB` or plain bytes.

    Raises:
        UserError: none of these.
    """
    found = _SIZE.fullmatch(text.strip())
    if not found or (found[3] and not found[2]):
        raise UserError(f"{option} '{text}' is no size: write 18GB, 17GiB, 900MB, or bytes")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** _POWERS[found[2].lower()])


def limits(size: str | None, memory: str | None, bits: float | None, fit: bool) -> Limits:
    """What the command line asks for.

    Raises:
        UserError: it is nothing, too much, or no size.
    """
    from qwen_export.quantize.auto_precision import Limits

    if size is None and memory is None and bits is None:
        raise UserError(
            "--auto-precision needs a size to spend: give --size 18GB, --memory 20GB or --bits 4.8"
        )
    if size is not None and bits is not None:
        raise UserError("--size and --bits say the same: give one of them")
    if bits is not None and not math.isfinite(bits):
        raise UserError(f"--bits {bits} is no number of bits: write 4.8")
    return Limits(
        None if size is None else byte_count(size, "--size"),
        None if memory is None else byte_count(memory, "--memory"),
        bits,
        fit,
    )


def reach(checkpoint: Checkpoint, profile: Profile) -> dict[str, tuple[int, int]]:
    """Bytes at least and at most of what each option bounds; reads no weight.

    Raises:
        UserError: the profile's backend has one format for each role.
    """
    from qwen_export.quantize.auto_precision import candidates

    _require_formats_by_layer(profile)
    found = candidates(checkpoint, profile)
    least, leanest, most = map(found.estimate, (found.smallest, found.leanest, found.largest))
    return {"size": (least.disk, most.disk), "memory": (leanest.resident, most.resident)}


def _require_formats_by_layer(profile: Profile) -> None:
    from qwen_export.backends.registry import export_backend

    if not export_backend(profile.backend).formats_by_layer:
        raise UserError("--auto-precision is for ONNX Runtime: choose precisions with --set weights.ROLE=...")


def choose_precision(
    checkpoint: Checkpoint, profile: Profile, asked: Limits, calibration: Path | None, progress: bool
) -> Chosen:
    """Measure and choose, with a progress bar; says on stderr what was chosen.

    Raises:
        UserError: as `qwen_export.quantize.auto_precision.auto_precision`, or the profile's backend has one
            format for each role, or not even the smallest choice fits the profile's memory.
    """
    from qwen_export.cli.progress import STEPS, progress_bar
    from qwen_export.planner.predictions import require_memory
    from qwen_export.quantize.auto_precision import auto_precision, candidates

    _require_formats_by_layer(profile)
    checkpoint.check(checkpoint.config.tensors())
    found = candidates(checkpoint, profile)
    if asked.fit:
        require_memory(checkpoint, found.leanest)
    with progress_bar(progress, "sensitivity", STEPS) as shown:
        chosen = auto_precision(found, calibration, shown, asked)
    for line in _told(chosen, asked, profile):
        click.echo(line, err=True)
    return chosen


def as_json(chosen: Chosen) -> dict[str, Any]:
    """For `--json`: bytes as `plan` predicts them, and of each role the number of layers in each format."""
    return {
        "disk": chosen.estimate.disk,
        "resident": chosen.estimate.resident,
        "expected_kl_divergence": chosen.divergence,
        "largest": chosen.largest,
        "layers": chosen.layers(),
    }


def _told(chosen: Chosen, asked: Limits, profile: Profile) -> Iterator[str]:
    from qwen_export.quantize.auto_precision import amount

    taken = chosen.estimate
    yield (
        f"auto-precision: {amount(taken.disk)} of files, {amount(taken.resident)} of memory once loaded, "
        f"KL divergence {chosen.divergence:.2g} expected"
    )
    used = max(taken.disk / (asked.size or math.inf), taken.resident / (asked.memory or math.inf))
    if chosen.largest:
        yield "note: every weight has its best form, there is no larger choice"
    elif asked.bits is None and used < _USED:
        yield f"note: profile {profile.name}'s memory allows no more, --ignore-memory takes all"
