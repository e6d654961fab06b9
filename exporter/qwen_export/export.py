"""One export, start to finish: check, write the backend's files, describe them, and put all in place.

Everything is made in a hidden folder beside the output and renamed at the end, so that a folder with the
output's name is always whole. A killed export leaves only the hidden folder; the next one of the same
checkpoint and profile goes on where the journal ends.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout
from qwen_common.errors import UserError
from qwen_common.manifest import Manifest
from qwen_common.replacing import put_in_place
from qwen_profiles.schema import Profile

from qwen_export.architecture.yarn import shorter_context
from qwen_export.backends.protocol import ExportOptions, Write, Written
from qwen_export.backends.registry import export_backend
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.checkpoint.text_files import check_text_files
from qwen_export.describe import describe, model_name
from qwen_export.output import ADVICE, STAGED, check_output, work_folder
from qwen_export.progress import Progress, Silent


@dataclass(frozen=True)
class Export:
    """What is to be exported, and to which folder.

    Attributes:
        force: an older artifact may be replaced.
        all_logits: logits for every position, for evaluation.
        max_context: tokens, instead of the profile's `context_length`; more than the checkpoint was made for
            turns on YaRN.
        calibration: UTF-8 text for a profile's `compression` that looks at activations; None takes the
            shipped one.
    """

    checkpoint: Checkpoint
    profile: Profile
    output: Path
    force: bool = False
    all_logits: bool = False
    max_context: int | None = None
    calibration: Path | None = None


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
    """Write the artifact of `checkpoint` for `profile` to the folder `output`; returns its manifest. See
    `Export` for the arguments.

    Raises:
        UserError: the checkpoint contradicts its config or holds NaN, the output exists or is not an artifact
            (see `check_output`), the disk is full, another export is writing to the same place, `max_context`
            is out of reach, or the profile's backend is not installed.
    """
    one = Export(checkpoint, profile, output, force, all_logits, max_context, calibration)
    ((_, made),) = export_together([one], progress)
    if isinstance(made, Exception):
        raise made
    return made


def export_together(
    exports: Sequence[Export], progress: Progress
) -> Iterator[tuple[int, Manifest | Exception]]:
    """Export one checkpoint, with or without adapters, several times; what all read is read once, where their
    backend can do that.

    Yields:
        Index in `exports`, and the manifest or what `export` raises, as soon as it is there. One that fails
        does not stop the others.
    """
    by_backend: dict[str, dict[int, _Prepared]] = {}
    notes: dict[str, None] = {}
    for index, one in enumerate(exports):
        try:
            prepared = _prepare(one, notes, progress)
        except Exception as error:
            yield index, error
        else:
            by_backend.setdefault(one.profile.backend, {})[index] = prepared
    for note in notes:  # a refusal is one line, without them
        progress.note(note)
    for backend, found in by_backend.items():
        with ExitStack() as every:
            held: dict[int, ExitStack] = {}
            writes: list[tuple[Write, Path]] = []
            for index, prepared in found.items():
                lock = every.enter_context(ExitStack())
                try:
                    work = lock.enter_context(_held(prepared.output))
                except Exception as error:
                    yield index, error
                else:
                    held[index] = lock
                    writes.append((prepared.write, work))
            indices = list(held)
            for place, written in export_backend(backend).write_together(writes, progress):
                index = indices[place]
                made = _finish(found[index], writes[place][1], written)
                held[index].close()  # an older artifact goes away with the hidden folder
                yield index, made


def check(one: Export) -> None:
    """All that `export` refuses before it writes anything.

    Raises:
        UserError: as `export`.
    """
    _prepare(one, {}, Silent())


@dataclass(frozen=True)
class _Prepared:
    """An export of which nothing is written yet, and nothing but the work is left to fail."""

    checkpoint: Checkpoint
    profile: Profile
    output: Path
    write: Write


def _prepare(one: Export, notes: dict[str, None], progress: Progress) -> _Prepared:
    """Raises: as `export`. Adds to `notes` what is to be told if the work begins."""
    checkpoint, profile, own = one.checkpoint, one.profile, list(one.checkpoint.notes)
    if one.max_context is not None:
        config = checkpoint.config.reaching(one.max_context)
        if config is not checkpoint.config:
            own.append(
                f"YaRN stretches the context by {config.rope_parameters.factor:.3g}, for short prompts too: "
                "they are answered a little worse than without --max-context"
            )
        checkpoint = replace(checkpoint, config=config)
        profile = profile.model_copy(update={"context_length": one.max_context})
    elif shorter := shorter_context(checkpoint.config.positions, profile.context_length):
        own.append(shorter)
    check_output(one.output, checkpoint.root, one.force)
    check_text_files(checkpoint)
    if checkpoint.streamed:
        checkpoint.streamed.say = progress.note
    checkpoint.check(checkpoint.config.tensors())
    if checkpoint.vision:
        checkpoint.check(checkpoint.vision.tensors())
    options = ExportOptions(one.all_logits, one.calibration)
    write = export_backend(profile.backend).prepare(checkpoint, profile, options, progress)
    notes.update(dict.fromkeys(own))
    return _Prepared(checkpoint, profile, one.output, write)


@contextmanager
def _held(output: Path) -> Iterator[Path]:
    """The hidden folder of `output`, which no other export uses meanwhile.

    Raises:
        UserError: one does, or `work_folder`.
    """
    work = work_folder(output)
    lock = FileLock(work / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"another export is writing {output}: wait for it to end") from error
    try:
        yield work
    finally:
        lock.release()
        if not (work / STAGED).exists():
            shutil.rmtree(work)


def _finish(one: _Prepared, work: Path, written: Written | Exception) -> Manifest | Exception:
    """Describe what was written, and put it in place."""
    try:
        if isinstance(written, Exception):
            raise written
        staged = work / STAGED
        manifest = describe(one.checkpoint, one.profile, staged, written)
        put_in_place(staged, one.output, ADVICE)
        return manifest
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            full = UserError(
                f"no space left on the disk of {one.output}: free some and run the same command to go on"
            )
            full.__cause__ = error
            return full
        return error
    except Exception as error:
        return error


def default_output(checkpoint: Checkpoint, profile: Profile) -> Path:
    """artifacts/<model>-<profile> in the current folder."""
    return Path("artifacts") / f"{Path(model_name(checkpoint)).name}-{profile.name}"
