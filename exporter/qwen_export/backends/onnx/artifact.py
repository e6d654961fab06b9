"""An artifact for ONNX Runtime GenAI: graphs built, weights streamed, configuration written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from qwen_common.errors import UserError
from qwen_common.files import as_json
from qwen_common.manifest import GENAI_CONFIG, RunsOn
from qwen_common.manifest import FurtherGraphs as FurtherEntry
from qwen_profiles.schema import Profile

from qwen_export.architecture.mtp import MTP, declares_mtp, mtp_tensors
from qwen_export.backends.copied_files import copy_files
from qwen_export.backends.onnx.files import PROCESSOR_CONFIG, provider_file
from qwen_export.backends.onnx.genai_config import genai_config, genai_overlay
from qwen_export.backends.onnx.graphs import FurtherGraphs, Graphs, build_graphs, targets
from qwen_export.backends.onnx.processor_config import processor_config
from qwen_export.backends.onnx.proto import model_proto
from qwen_export.backends.onnx.resume import fingerprint, open_journal
from qwen_export.backends.onnx.stream import (
    Compensated,
    by_shard,
    source_bytes,
    source_files,
    write_weights,
)
from qwen_export.backends.onnx.switched import check_switched, write_switched
from qwen_export.backends.protocol import ExportOptions, Write, Written
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.checkpoint.dequantised import dequantised
from qwen_export.graph.attention import check_heads
from qwen_export.graph.builder import DATA_FILE
from qwen_export.output import STAGED
from qwen_export.progress import Progress
from qwen_export.quantize.calibration import calibration_samples
from qwen_export.quantize.gptq import SAMPLES, nearest, with_compensations

_SPARE_BYTES = 64 * 1024 * 1024  # graph, tokenizer, manifest


def prepare(checkpoint: Checkpoint, profile: Profile, options: ExportOptions, progress: Progress) -> Write:
    """See `ExportBackend.prepare`."""
    for target in targets(profile).values():
        check_heads(checkpoint.config, target)
    graphs = build_graphs(checkpoint, profile, options.all_logits, _has_mtp(checkpoint, profile, progress))
    check_switched(checkpoint, graphs)
    sources = graphs.sources()
    for line in dequantised(
        {name: checkpoint.tensors[name] for name in sources},
        [name for name, kept in sources.items() if kept],
        *([] if profile.carry_over else ["as carry_over = false asks"]),
    ):
        progress.note(line)
    text = None
    if profile.compression == "gptq":
        text = calibration_samples(checkpoint, options.calibration, SAMPLES)
    return partial(_write, checkpoint, profile, graphs, options.all_logits, text)


def _write(
    checkpoint: Checkpoint,
    profile: Profile,
    graphs: Graphs,
    all_logits: bool,
    text: np.ndarray | None,
    work: Path,
    progress: Progress,
) -> Written:
    staged = work / STAGED
    journal = open_journal(work, fingerprint(checkpoint, profile, graphs, text), progress)
    data = staged / DATA_FILE
    placed = graphs.placed
    if streamed := checkpoint.streamed:
        if text is None:
            placed = by_shard(checkpoint, placed, streamed)
        left = [weight for weight, _ in placed if weight.name not in journal.done]
        most = streamed.expect({weight.name: source_files(checkpoint, weight) for weight in left})
        if streamed.root.stat().st_dev == staged.stat().st_dev:
            streamed.reserved = partial(_unwritten, data, graphs.data_bytes)
        else:
            _check_space(data, graphs.data_bytes)
        streamed.require(most)
    else:
        _check_space(data, graphs.data_bytes)

    progress.start(sum(source_bytes(checkpoint, weight) for weight, _ in graphs.placed))
    weights: Iterable[Compensated] = ((one, nearest) for one in placed)
    if text is not None:
        progress.note(f"{text.size} tokens of text go through the model in float32, layer by layer, for GPTQ")
        weights = with_compensations(checkpoint.config, checkpoint.tensors, graphs.placed, text)
    write_weights(checkpoint, weights, data, graphs.data_bytes, journal, progress.advance)
    if streamed:
        streamed.reserved = lambda: 0

    copy_files(checkpoint.root, staged)
    write_switched(checkpoint, graphs, staged)
    for name, graph in graphs.every_file.items():
        onnx.save(model_proto(graph), staged / name)
    if checkpoint.vision:
        (staged / PROCESSOR_CONFIG).write_bytes(as_json(processor_config(checkpoint.vision)))
    config = genai_config(checkpoint, profile)
    (staged / GENAI_CONFIG).write_bytes(as_json(config))
    context = config["model"]["context_length"]
    runs_on: RunsOn = {"lowering": graphs.target.name, "onnxruntime": graphs.onnxruntime()}
    if graphs.further:
        runs_on["further_graphs"] = [_further(checkpoint, other, context, staged) for other in graphs.further]
    return Written(
        runs_on=runs_on,
        context_length=context,
        bytes_by_role=graphs.bytes_by_role(),
        all_logits=all_logits,
        image_prompt_tokens=_image_prompt_tokens(checkpoint, graphs, context),
        carried_over=graphs.prequantized_roles(),
    )


def _image_prompt_tokens(checkpoint: Checkpoint, graphs: Graphs | FurtherGraphs, context: int) -> int | None:
    return min(graphs.max_run_tokens or context, context) if checkpoint.vision else None


def _further(checkpoint: Checkpoint, further: FurtherGraphs, context: int, staged: Path) -> FurtherEntry:
    overlay = provider_file(GENAI_CONFIG, further.providers[0])
    (staged / overlay).write_bytes(as_json(genai_overlay(checkpoint, further.target.name, further.replaced)))
    entry: FurtherEntry = {
        "providers": list(further.providers),
        "lowering": further.target.name,
        "onnxruntime": further.target.onnxruntime,
        "files": further.replaced,
        "overlay": overlay,
    }
    if (tokens := _image_prompt_tokens(checkpoint, further, context)) is not None:
        entry["image_prompt_tokens"] = tokens
    return entry


def _has_mtp(checkpoint: Checkpoint, profile: Profile, progress: Progress) -> bool:
    """Whether the MTP head is exported; where the checkpoint's is not, a line says why."""
    reason = checkpoint.mtp_problem
    if reason is None and not any(name.startswith(MTP) for name in checkpoint.tensors):
        return False
    config = checkpoint.config
    if checkpoint.kept_apart:
        reason = "its graphs take no adapter at run time"
    elif not profile.mtp:
        reason = f"profile {profile.name}'s runtime cannot use it"
    elif reason is None and not declares_mtp(config):
        reason = "it is not one layer that shares the model's embedding"
    elif reason is None:
        try:
            checkpoint.check(mtp_tensors(config))
            return True
        except UserError as error:
            reason = str(error)
    progress.note(f"no MTP head to draft tokens: {reason}")
    return False


def _check_space(data: Path, data_bytes: int) -> None:
    """Refuse before the work, not after it. The data file is sparse until it is written."""
    needed = _unwritten(data, data_bytes) + _SPARE_BYTES
    free = shutil.disk_usage(data.parent).free
    if free < needed:
        raise UserError(
            f"the artifact needs {needed / 1e9:.1f} GB more and {data.parent.parent.parent} has "
            f"{free / 1e9:.1f} GB free: free some space, or choose another disk with -o"
        )


def _unwritten(data: Path, data_bytes: int) -> int:
    if not data.exists():
        return data_bytes
    status = data.stat()
    # Windows gives a file the place of its length at once.
    present = status.st_blocks * 512 if hasattr(os.stat_result, "st_blocks") else status.st_size
    return max(0, data_bytes - present)
