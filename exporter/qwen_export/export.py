"""One export, start to finish: check, write the backend's files, describe them, and put all in place.

Everything is made in a hidden folder beside the output and renamed at the end, so that a folder with the
output's name is always whole. A killed export leaves only the hidden folder; the next one of the same
checkpoint and profile goes on where the journal ends.
"""

from __future__ import annotations

import errno
import shutil
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout
from qwen_common.errors import UserError
from qwen_common.manifest import Manifest
from qwen_common.replacing import put_in_place
from qwen_profiles.schema import Profile

from qwen_export.backends.protocol import ExportOptions
from qwen_export.backends.registry import export_backend
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.checkpoint.text_files import check_text_files
from qwen_export.describe import describe, model_name
from qwen_export.output import ADVICE, STAGED, check_output, work_folder
from qwen_export.progress import Progress


def export(
    checkpoint: Checkpoint,
    profile: Profile,
    output: Path,
    progress: Progress,
    *,
    force: bool = False,
    all_logits: bool = False,
    max_context: int | None = None,
    calibration: Path | None = None,
) -> Manifest:
    """Write the artifact of `checkpoint` for `profile` to the folder `output`; returns its manifest.

    Args:
        max_context: tokens, instead of the profile's `context_length`; more than the checkpoint was made for
            turns on YaRN.
        calibration: UTF-8 text for a profile's `compression` that looks at activations; None takes the
            shipped one.

    Raises:
        UserError: the checkpoint contradicts its config or holds NaN, the output exists or is not an artifact
            (see `check_output`), the disk is full, another export is writing to the same place, `max_context`
            is out of reach, or the profile's backend is not installed.
    """
    notes = list(checkpoint.notes)
    if max_context is not None:
        config = checkpoint.config.reaching(max_context)
        if config is not checkpoint.config:
            notes.append(
                f"YaRN stretches the context by {config.rope_parameters.factor:.3g}, for short prompts too: "
                "they are answered a little worse than without --max-context"
            )
        checkpoint = replace(checkpoint, config=config)
        profile = profile.model_copy(update={"context_length": max_context})
    elif profile.context_length > (limit := checkpoint.config.positions):
        notes.append(
            f"the context is {limit} tokens, the checkpoint's own limit, and not {profile.context_length}: "
            "--max-context reaches further, by YaRN"
        )
    check_output(output, checkpoint.root, force)
    check_text_files(checkpoint)
    if checkpoint.streamed:
        checkpoint.streamed.say = progress.note
    checkpoint.check(checkpoint.config.tensors())
    if checkpoint.vision:
        checkpoint.check(checkpoint.vision.tensors())
    write = export_backend(profile.backend).prepare(
        checkpoint, profile, ExportOptions(all_logits, calibration), progress
    )
    for note in notes:  # a refusal is one line, without them
        progress.note(note)
    work = work_folder(output)
    try:
        with FileLock(work / "lock", timeout=0):
            staged = work / STAGED
            manifest = describe(checkpoint, profile, staged, write(work, progress))
            put_in_place(staged, output, ADVICE)
    except Timeout as error:
        raise UserError(f"another export is writing {output}: wait for it to end") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left on the disk of {output}: free some and run the same command to go on"
            ) from error
        raise
    shutil.rmtree(work)
    return manifest


def default_output(checkpoint: Checkpoint, profile: Profile) -> Path:
    """artifacts/<model>-<profile> in the current folder."""
    return Path("artifacts") / f"{Path(model_name(checkpoint)).name}-{profile.name}"
