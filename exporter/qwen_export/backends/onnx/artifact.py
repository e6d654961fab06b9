"""An artifact for ONNX Runtime GenAI: graphs built, weights streamed, configuration written."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
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
    Destination,
    Step,
    Wanted,
    in_step,
    source_files,
    write_weights,
)
from qwen_export.backends.onnx.switched import check_switched, write_switched
from qwen_export.backends.protocol import ExportOptions, Written
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.checkpoint.dequantised import dequantised
from qwen_export.graph.attention import check_heads
from qwen_export.graph.builder import DATA_FILE
from qwen_export.graph.kv_cache import cache_specs
from qwen_export.graph.recipe import check_layers
from qwen_export.output import STAGED
from qwen_export.progress import Progress
from qwen_export.quantize.calibrated_codes import with_codes
from qwen_export.quantize.calibration import calibration_samples
from qwen_export.quantize.gptq import SAMPLES
from qwen_export.quantize.kv_cache import CACHE_SAMPLES, find_cache_scales, with_cache_scales

_SPARE_BYTES = 64 * 1024 * 1024  # graph, tokenizer, manifest


@dataclass(frozen=True)
class OnnxWrite:
    """Writes one artifact: `begin`, then the weights (`write_together`), then `finish`.

    Attributes:
        text: int64 [samples, tokens] for GPTQ; None: codes are found from the weights alone.
        cache_text: the same for the scales of an INT8 KV cache; None: it is in floating point.
    """

    checkpoint: Checkpoint
    profile: Profile
    graphs: Graphs
    all_logits: bool
    text: np.ndarray | None
    cache_text: np.ndarray | None

    def __call__(self, work: Path, progress: Progress) -> Written:
        """See `Write`."""
        ((_, written),) = write_together([(self, work)], progress)
        if isinstance(written, Exception):
            raise written
        return written

    def begin(self, work: Path, progress: Progress) -> Destination:
        texts = [text for text in (self.text, self.cache_text) if text is not None]
        text = np.concatenate(texts) if texts else None
        mark = fingerprint(self.checkpoint, self.profile, self.graphs, text)
        journal = open_journal(work, mark, progress)
        data = work / STAGED / DATA_FILE
        return Destination(self.checkpoint, self.graphs.placed, data, self.graphs.data_bytes, journal)

    def finish(self, work: Path) -> Written:
        checkpoint, graphs, staged = self.checkpoint, self.graphs, work / STAGED
        copy_files(checkpoint.root, staged)
        write_switched(checkpoint, graphs, staged)
        for name, graph in graphs.every_file.items():
            onnx.save(model_proto(graph), staged / name)
        if checkpoint.vision:
            (staged / PROCESSOR_CONFIG).write_bytes(as_json(processor_config(checkpoint.vision)))
        config = genai_config(checkpoint, self.profile)
        (staged / GENAI_CONFIG).write_bytes(as_json(config))
        context = config["model"]["context_length"]
        runs_on: RunsOn = {"lowering": graphs.target.name, "onnxruntime": graphs.onnxruntime()}
        if graphs.further:
            runs_on["further_graphs"] = [
                _further(checkpoint, other, context, staged) for other in graphs.further
            ]
        return Written(
            runs_on=runs_on,
            context_length=context,
            bytes_by_role=graphs.bytes_by_role(),
            all_logits=self.all_logits,
            image_prompt_tokens=_image_prompt_tokens(checkpoint, graphs, context),
            carried_over=graphs.prequantized_roles(),
        )


def prepare(
    checkpoint: Checkpoint, profile: Profile, options: ExportOptions, progress: Progress
) -> OnnxWrite:
    """See `ExportBackend.prepare`."""
    for target in targets(profile).values():
        check_heads(checkpoint.config, target)
    check_layers(profile.layer_weights, checkpoint.config.tensors())
    graphs = build_graphs(checkpoint, profile, options.all_logits, _has_mtp(checkpoint, profile, progress))
    check_switched(checkpoint, graphs)
    if profile.cache_dtype == "int8":
        checkpoint = with_cache_scales(checkpoint)
    sources = graphs.sources()
    for line in dequantised(
        {name: checkpoint.tensors[name] for name in sources},
        [name for name, kept in sources.items() if kept],
        *([] if profile.carry_over else ["as carry_over = false asks"]),
    ):
        progress.note(line)
    text = None
    if profile.compression in ("gptq", "gptaq"):
        text = calibration_samples(checkpoint, options.calibration, SAMPLES)
    cache_text = None
    if profile.cache_dtype == "int8":
        cache_text = calibration_samples(checkpoint, options.calibration, CACHE_SAMPLES)
    return OnnxWrite(checkpoint, profile, graphs, options.all_logits, text, cache_text)


def write_together(
    writes: Sequence[tuple[OnnxWrite, Path]], progress: Progress
) -> Iterator[tuple[int, Written | Exception]]:
    """See `ExportBackend.write_together`. Those for GPTQ and GPTAQ, whose weights come in the order in which
    the model runs, are written one by one."""
    together = [index for index, (write, _) in enumerate(writes) if write.text is None]
    alone = [[index] for index in range(len(writes)) if index not in together]
    for indices in filter(None, [together, *alone]):
        yield from zip(indices, _written([writes[index] for index in indices], progress), strict=True)


def _written(writes: Sequence[tuple[OnnxWrite, Path]], progress: Progress) -> list[Written | Exception]:
    """All of `writes` in step, or the one for GPTQ or GPTAQ."""
    destinations = [write.begin(work, progress) for write, work in writes]
    steps: Iterable[Step] = in_step(destinations)
    _require_space(destinations, list(steps))
    progress.start(sum(one.source_bytes(weight) for one in destinations for weight, _ in one.placed))
    for one in destinations:
        progress.advance(sum(one.source_bytes(weight) for weight, _ in one.placed if one.has(weight)))
    for (write, _), one in zip(writes, destinations, strict=True):
        if write.cache_text is not None and one.fault is None:
            with one.faults():
                _find_cache_scales(one, write.cache_text, progress)
    text = writes[0][0].text
    if text is not None:
        asymmetric = writes[0][0].profile.compression == "gptaq"
        times, name = ("twice", "GPTAQ") if asymmetric else ("once", "GPTQ")
        progress.note(
            f"{text.size} tokens of text go through the model in float32 {times}, layer by layer, for {name}"
        )
        steps = calibrated_steps(destinations[0], text, asymmetric)
    write_weights(destinations, steps, progress.advance)
    if streamed := destinations[0].checkpoint.streamed:
        streamed.reserved = lambda: 0
    written: list[Written | Exception] = []
    for (write, work), destination in zip(writes, destinations, strict=True):
        if destination.fault is None:
            with destination.faults():
                written.append(write.finish(work))
        if destination.fault is not None:
            written.append(destination.fault)
    return written


def _find_cache_scales(destination: Destination, text: np.ndarray, progress: Progress) -> None:
    """Where an earlier run did not write all of them."""
    checkpoint = destination.checkpoint
    scales = cache_specs(checkpoint.config)
    made = (weight for weight, _ in destination.placed if weight.rows[0].tensor in scales)
    if all(destination.has(weight) for weight in made):
        return
    progress.note(f"{text.size} tokens of text go through the model in float32 for the KV cache's scales")
    find_cache_scales(checkpoint.config, checkpoint.tensors, text)


def calibrated_steps(destination: Destination, text: np.ndarray, asymmetric: bool) -> Iterator[Step]:
    """In the order in which the model runs."""
    checkpoint, placed = destination.checkpoint, destination.placed
    if not asymmetric:  # no codes follow from those that are written already
        placed = [one for one in placed if not destination.has(one.weight)]
    found = with_codes(checkpoint.config, checkpoint.tensors, placed, text, asymmetric)
    return ([Wanted(destination, *one)] for one in found if not destination.has(one[0].weight))


def _require_space(destinations: Sequence[Destination], steps: Sequence[Step]) -> None:
    """Refuse before the work, not after it: whom there is no room for, beside those before it.

    Raises:
        UserError: there is no room for the shards that are fetched.
    """
    streamed = destinations[0].checkpoint.streamed
    beside_shards = []
    needed: Counter[int] = Counter()  # by disk
    for destination in destinations:
        folder = destination.path.parent
        disk = folder.stat().st_dev
        if streamed and disk == streamed.root.stat().st_dev:
            beside_shards.append(destination)
            continue
        needed[disk] += _unwritten(destination) + _SPARE_BYTES
        if (free := shutil.disk_usage(folder).free) < needed[disk]:
            destination.fault = UserError(
                f"the artifact needs {needed[disk] / 1e9:.1f} GB more and {folder.parent.parent} has "
                f"{free / 1e9:.1f} GB free: free some space, or choose another disk with -o"
            )
    if streamed:
        files = [(wanted, source_files(step)) for step in steps for wanted in step]
        most = streamed.expect({wanted.destination.key(wanted.weight): read for wanted, read in files})
        streamed.reserved = lambda: sum(map(_unwritten, beside_shards))
        streamed.require(most)


def _unwritten(destination: Destination) -> int:
    """Bytes; the data file is sparse until it is written."""
    if not destination.path.exists():
        return destination.size
    status = destination.path.stat()
    # Windows gives a file the place of its length at once.
    present = status.st_blocks * 512 if hasattr(os.stat_result, "st_blocks") else status.st_size
    return max(0, destination.size - present)


def _image_prompt_tokens(checkpoint: Checkpoint, graphs: Graphs | FurtherGraphs, context: int) -> int | None:
    return min(graphs.max_run_tokens or context, context) if checkpoint.vision else None


def _further(checkpoint: Checkpoint, further: FurtherGraphs, context: int, staged: Path) -> FurtherEntry:
    overlay = provider_file(GENAI_CONFIG, further.providers[0])
    (staged / overlay).write_bytes(as_json(genai_overlay(checkpoint, further.target.name, further.replaced)))
    entry: FurtherEntry = {
        "providers": list(further.providers),
        "lowering": further.target.name,
        "onnxruntime": further.onnxruntime(),
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
    if checkpoint.switched_adapters:
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
