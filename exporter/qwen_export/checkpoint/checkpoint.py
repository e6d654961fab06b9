"""A Hugging Face checkpoint: its shards validated, and rows of its tensors on demand.

Files are read, not mapped: mapped pages would count in the process's memory, which an export promises to
bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from qwen_common.errors import UserError
from qwen_common.manifest import MergedAdapter

from qwen_export.architecture.models.qwen3_5 import TextConfig
from qwen_export.architecture.mtp import MTP
from qwen_export.architecture.tensors import TensorSpec
from qwen_export.architecture.vision import VISION, VisionConfig
from qwen_export.checkpoint.config import (
    language_model_only,
    load_config,
    load_vision_config,
    quantization_config,
)
from qwen_export.checkpoint.forms.registry import assemble, method_name
from qwen_export.checkpoint.generation_config import GenerationConfig, read_generation_config
from qwen_export.checkpoint.head import settle_head
from qwen_export.checkpoint.hub import download, hub_id, refuse_links_out, stream, text_files
from qwen_export.checkpoint.identity import identity
from qwen_export.checkpoint.refused import refuse_adapter, refuse_gguf
from qwen_export.checkpoint.shards import shard_tensors, written_by_mlx
from qwen_export.checkpoint.streamed import StreamedShards
from qwen_export.checkpoint.tensors.fused import split_fused
from qwen_export.checkpoint.tensors.plain import FLOATS, PlainTensor
from qwen_export.checkpoint.tensors.tensor import CheckpointTensor

if TYPE_CHECKING:
    from qwen_export.adapters.updates import SwitchedAdapter

_NAMED = 10  # of the tensors or files that are not read


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, its shards validated.

    Attributes:
        root: the folder.
        source: what the user named: a folder or a hub id.
        revision: the commit that a hub id was resolved to; None for a folder.
        config: the text model's configuration; embedding and lm_head are tied where the tensors are, too.
        tensors: every tensor by the model's name for it, whatever the model was wrapped in, and in the
            model's shape whatever form it is stored in; what no weight can be stays as it is stored.
        vision: the vision tower's configuration; None where there is none, or it is left out.
        mtp_problem: why the multi-token-prediction head is not among the tensors, though the shards have one.
        quantization: the method that config.json names, in words for a message.
        notes: what is not as its files say, or not read: a line for each.
        adapters: what is merged into `tensors`, in this order.
        adapter_folders: where each of these lies.
        switched_adapters: adapters that an artifact has beside its weights.
        streamed: the shards, where they are fetched when they are read.
        identity: of a folder or file, as `identity` has it; None with a revision.
    """

    root: Path
    source: str
    revision: str | None
    config: TextConfig
    tensors: Mapping[str, CheckpointTensor]
    vision: VisionConfig | None = None
    mtp_problem: str | None = None
    quantization: str = "no quantization_config"
    notes: tuple[str, ...] = ()
    adapters: tuple[MergedAdapter, ...] = ()
    adapter_folders: tuple[Path, ...] = ()
    switched_adapters: tuple[SwitchedAdapter, ...] = ()
    streamed: StreamedShards | None = None
    identity: str | None = None

    @classmethod
    def open(
        cls, source: str, revision: str | None = None, text_only: bool = False, streaming: bool = False
    ) -> Checkpoint:
        """Open a local folder, or download a hub id such as `Qwen/Qwen3.5-0.8B`.

        Reads no weight but embedding and lm_head, where both are stored and config.json ties them.

        Args:
            revision: branch, tag or commit of a hub id, which may have it at its end, too: `org/name@main`.
            text_only: leave the vision tower out.
            streaming: fetch the shards of a hub id one by one, when they are read; `streamed.finish` deletes
                them.

        Raises:
            UserError: no such folder or hub id, not a supported model, an adapter, a shard missing,
                truncated, listed outside the folder or linked to from it, or tensors in a form that is not
                supported.
        """
        local, streamed = Path(source), None
        refuse_gguf(local)
        if local.is_dir():
            root, commit = local.resolve(), None
        else:
            if streaming:
                root, streamed = stream(source, revision)
            else:
                root = download(source, revision)
            source, commit = hub_id(source, revision)[0], root.name
        refuse_links_out(root)
        refuse_adapter(root)
        config = load_config(root)
        quantization = quantization_config(root)
        stored = shard_tensors(root, streamed)
        if quantization is None and written_by_mlx(root, streamed):
            quantization = {"quant_method": "mlx"}
        shards = {tensor.file for tensor in stored.values()}
        unlisted = {path.name for path in root.glob("*.safetensors")}
        unlisted -= {path.name for path in shards}
        head = {name: stored.pop(name) for name in list(stored) if name.startswith(MTP)}
        (tensors, notes), mtp_problem = assemble(stored, quantization), None
        try:
            of_head = assemble(head, quantization)
            tensors |= of_head.tensors
            notes += [f"in the MTP head, {note}" for note in of_head.notes]
        except UserError as error:  # the model does without it
            mtp_problem = str(error)
        tensors = split_fused(tensors, config.fused)
        text_only = text_only or language_model_only(root)
        vision = None if text_only else load_vision_config(root)
        as_declared, config = config, settle_head(config, tensors)
        if config is not as_declared:
            notes.append(
                "lm_head.weight and the embedding differ, though config.json says tie_word_embeddings: each "
                "is exported as it is stored"
            )
        expected = {**config.tensors(), **(vision.tensors() if vision else {})}
        left_out = (MTP, VISION) if text_only else (MTP,)
        if unread := [name for name in tensors if name not in expected and not name.startswith(left_out)]:
            notes.append(f"not read, because the model has no such tensors: {listed(unread)}")
        if unlisted:
            notes.append(f"not read, because they are not among the shards: {listed(sorted(unlisted))}")
        return cls(
            root,
            source,
            commit,
            config,
            tensors,
            vision,
            mtp_problem,
            method_name(quantization),
            tuple(notes),
            streamed=streamed,
            identity=None if commit else identity(shards, text_files(root)),
        )

    @property
    def model_type(self) -> str:
        """With a vision tower, without `_text` at its end."""
        return self.config.model_type.removesuffix("_text") if self.vision else self.config.model_type

    @property
    def genai_type(self) -> str:
        """What ONNX Runtime GenAI runs it as."""
        return self.config.genai_type.removesuffix("_text") if self.vision else self.config.genai_type

    @cached_property
    def generation(self) -> GenerationConfig:
        """As `read_generation_config` gives it, and raises."""
        return read_generation_config(self.root, self.config)

    def check(self, expected: Mapping[str, TensorSpec]) -> None:
        """Compare names and shapes with what the configuration asks for.

        Raises:
            UserError: a tensor is missing or has another shape; names the first one.
        """
        for name, spec in expected.items():
            found = self.tensors.get(name)
            if found is None:
                raise UserError(self._why_missing(name))
            if isinstance(found, PlainTensor) and found.dtype not in FLOATS:
                raise UserError(self._why_not_floats(found))
            if found.shape != spec.shape:
                raise UserError(
                    f"tensor {name} has shape {found.shape} where config.json says {spec.shape}: "
                    "config and weights are not of the same model"
                )

    def _why_missing(self, name: str) -> str:
        module = name.rpartition(".")[0] + "."
        for other, found in self.tensors.items():
            if other.startswith(module) and isinstance(found, PlainTensor) and found.dtype not in FLOATS:
                return self._why_not_floats(found)
        if name.startswith(VISION) and not any(other.startswith(VISION) for other in self.tensors):
            return (
                "config.json has a vision_config, and the shards have no vision tower: export the text model "
                "alone with --text-only"
            )
        missing = f"the checkpoint has no tensor {name}"
        if unknown := self.unknown():
            return f"{missing}, and names that the model has not: {listed(unknown)}: is it another model's?"
        return f"{missing}: is a shard missing from {self.source}?"

    def unknown(self) -> list[str]:
        """Names of tensors that no model of these configurations has."""
        expected = self.config.tensors().keys() | (self.vision.tensors().keys() if self.vision else set())
        return [name for name in self.tensors if name not in expected and not name.startswith((MTP, VISION))]

    def _why_not_floats(self, tensor: PlainTensor) -> str:
        return (
            f"tensor {tensor.name} is {tensor.dtype} without its scales, and config.json says "
            f"{self.quantization}: is a shard missing, or config.json of another checkpoint?"
        )

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of axis 0 of one tensor; see `CheckpointTensor.read`."""
        return self.tensors[name].read(start, stop)


def listed(names: Sequence[str]) -> str:
    """The first of `names`, for a message, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"
