"""One export, start to finish: plan, stream the weights, describe, and put in place.

Everything is made in a hidden folder beside the output and renamed at the end, so that a folder with the
output's name is always whole. A killed export leaves only the hidden folder; the next one of the same
checkpoint and profile goes on where the journal ends.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
from filelock import FileLock, Timeout
from qwen_common.errors import UserError
from qwen_common.manifest import BackendName, Manifest
from qwen_common.version import own_version
from qwen_profiles.schema import Profile

from qwen_export.architecture.mtp import MTP, declares_mtp, mtp_tensors
from qwen_export.backends.onnx import package
from qwen_export.backends.onnx.plan import Plan, plan
from qwen_export.backends.onnx.stream import Journal, StoredWith, nearest, source_bytes, write_weights
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.describe import describe, model_name
from qwen_export.graph.builder import DATA_FILE
from qwen_export.output import check_output, put_in_place, work_folder
from qwen_export.progress import Progress
from qwen_export.quantize.calibration import pieces
from qwen_export.quantize.gptq import PIECES, with_feedbacks

_SPARE_BYTES = 64 * 1024 * 1024  # graph, tokenizer, manifest


def _has_mtp(checkpoint: Checkpoint, profile: Profile, progress: Progress) -> bool:
    """Whether the MTP head is exported; where the checkpoint's is not, a line says why."""
    reason = checkpoint.mtp_problem
    if reason is None and not any(name.startswith(MTP) for name in checkpoint.tensors):
        return False
    config = checkpoint.config
    if not profile.mtp:
        reason = f"profile {profile.name}'s runtime cannot use it"
    elif reason is None and not declares_mtp(config):
        reason = "it is not one layer that shares the model's embedding"
    elif reason is None:
        try:
            checkpoint.check(mtp_tensors(config))
            return True
        except UserError as error:
            reason = str(error)
    progress.note(f"no MTP head, so no speculative decoding: {reason}")
    return False


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
    if max_context is not None:
        config = checkpoint.config.reaching(max_context)
        if config is not checkpoint.config:
            progress.note(
                f"YaRN stretches the context by {config.rope_parameters.factor:.3g}, for short prompts too: "
                "they are answered a little worse than without --max-context"
            )
        checkpoint = replace(checkpoint, config=config)
        profile = profile.model_copy(update={"context_length": max_context})
    check_output(output, checkpoint.root, force)
    checkpoint.check(checkpoint.config.tensors())
    if checkpoint.vision:
        checkpoint.check(checkpoint.vision.tensors())
    if profile.backend == BackendName.OPENVINO:
        from qwen_export.backends.openvino.artifact import require_libraries, write_artifact

        require_libraries()
        write = partial(write_artifact, checkpoint, profile, calibration)
    else:
        planned = plan(checkpoint, profile, all_logits, _has_mtp(checkpoint, profile, progress))
        text = pieces(checkpoint, profile, calibration, PIECES) if profile.compression == "gptq" else None
        write = partial(_export, checkpoint, profile, planned, all_logits, text)
    work = work_folder(output)
    try:
        with FileLock(work / "lock", timeout=0):
            written = write(work, progress)
            put_in_place(work / package.STAGED, output)
    except Timeout as error:
        raise UserError(f"another export is writing {output}: wait for it to end") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left on the disk of {output}: free some and run the same command to go on"
            ) from error
        raise
    shutil.rmtree(work)
    return written


def _export(
    checkpoint: Checkpoint,
    profile: Profile,
    planned: Plan,
    all_logits: bool,
    text: np.ndarray | None,
    work: Path,
    progress: Progress,
) -> Manifest:
    staged = work / package.STAGED
    journal = _begin(work, _fingerprint(checkpoint, profile, planned, text), progress)
    data = staged / DATA_FILE
    _check_space(data, planned.data_bytes)

    progress.start(sum(source_bytes(checkpoint, weight) for weight, _ in planned.stored))
    stored: Iterable[StoredWith] = ((*entry, nearest) for entry in planned.stored)
    if text is not None:
        progress.note(f"{text.size} tokens of text go through the model in float32, layer by layer, for GPTQ")
        stored = with_feedbacks(checkpoint.config, checkpoint.tensors, planned.stored, text)
    write_weights(checkpoint, stored, data, planned.data_bytes, journal, progress.advance)

    package.copy_files(checkpoint.root, staged)
    for name, model in planned.models.items():
        ir.save(model, staged / name)
    if checkpoint.vision:
        processor = package.processor_config(checkpoint.vision)
        package.write_json(staged / package.PROCESSOR_CONFIG, processor)
    config = package.genai_config(checkpoint, profile, package.generation_config(checkpoint.root))
    package.write_json(work / package.GENAI_CONFIG, config)
    paths = [*sorted(staged.iterdir()), work / package.GENAI_CONFIG]
    context = config["model"]["context_length"]
    manifest = describe(
        checkpoint,
        profile,
        staged,
        runs_on={"lowering": planned.target.name, "onnxruntime": planned.target.onnxruntime},
        context_length=context,
        files=paths,
        bytes_by_role=planned.bytes_by_role(),
        carried_over=planned.prequantized_roles(),
        all_logits=all_logits,
        image_prompt_tokens=min(planned.max_run_tokens or context, context),
    )
    # Nothing loads without this file, so it goes in last.
    os.replace(work / package.GENAI_CONFIG, staged / package.GENAI_CONFIG)
    return manifest


def _begin(work: Path, fingerprint: str, progress: Progress) -> Journal:
    """Open the journal of an earlier export of the same thing, or start over."""
    staged, journal_path, mark = work / package.STAGED, work / "journal.jsonl", work / "fingerprint"
    if mark.exists() and mark.read_text() == fingerprint and (staged / DATA_FILE).exists():
        journal = Journal(journal_path)
        progress.note(f"an earlier export did not finish: going on after {len(journal.done)} weights")
    else:
        if mark.exists():
            progress.note("an earlier export of something else did not finish: starting over")
        mark.unlink(missing_ok=True)
        shutil.rmtree(staged, ignore_errors=True)
        journal_path.unlink(missing_ok=True)
        staged.mkdir()
        mark.write_text(fingerprint)
        journal = Journal(journal_path)
    for path in staged.iterdir():
        if path.name != DATA_FILE:
            path.unlink()
    return journal


def _fingerprint(checkpoint: Checkpoint, profile: Profile, planned: Plan, text: np.ndarray | None) -> str:
    """Changes when any byte of the data file could: shards, profile, layout, calibration text, our code."""
    shards = sorted({file for source in checkpoint.tensors.values() for file in source.files})
    identity = {
        "qwen_edge": own_version(),
        "shards": [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in shards],
        "profile": profile.model_dump(),
        "layout": [repr(entry) for _, tensors in planned.stored for entry in tensors],
        "text": None if text is None else text.tolist(),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _check_space(data: Path, data_bytes: int) -> None:
    """Refuse before the work, not after it. The data file is sparse until it is written."""
    present = data.stat().st_blocks * 512 if data.exists() and hasattr(os.stat_result, "st_blocks") else 0
    needed = data_bytes - present + _SPARE_BYTES
    free = shutil.disk_usage(data.parent).free
    if free < needed:
        raise UserError(
            f"the artifact needs {needed / 1e9:.1f} GB more and {data.parent.parent.parent} has "
            f"{free / 1e9:.1f} GB free: free some space, or choose another disk with -o"
        )


def default_output(checkpoint: Checkpoint, profile: Profile) -> Path:
    """artifacts/<model>-<profile> in the current folder."""
    return Path("artifacts") / f"{Path(model_name(checkpoint)).name}-{profile.name}"
