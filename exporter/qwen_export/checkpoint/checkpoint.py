"""A Hugging Face checkpoint: its shards validated, and rows of its tensors on demand.

Files are read, not mapped: mapped pages would count in the process's memory, which an export promises to
bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from qwen_common.errors import UserError

from qwen_export.architecture.models.qwen3_5 import TextConfig
from qwen_export.architecture.mtp import MTP
from qwen_export.architecture.tensors import TensorSpec
from qwen_export.architecture.vision import VisionConfig
from qwen_export.checkpoint.config import load_config, load_vision_config, quantization_config
from qwen_export.checkpoint.generation_config import GenerationConfig, read_generation_config
from qwen_export.checkpoint.hub import download, refuse_links_out
from qwen_export.checkpoint.quantization import assemble
from qwen_export.checkpoint.shards import refuse_gguf, shard_tensors
from qwen_export.checkpoint.tensor import CheckpointTensor


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, its shards validated.

    Attributes:
        root: the folder.
        source: what the user named: a folder or a hub id.
        revision: the commit that a hub id was resolved to; None for a folder.
        config: the text model's configuration.
        tensors: every tensor by name, text models' as `model.X` whatever they are wrapped in, and in the
            model's shapes whatever form they are stored in.
        vision: the vision tower's configuration; None where there is none, or it is left out.
        mtp_problem: why the multi-token-prediction head is not among the tensors, though the shards have one.
    """

    root: Path
    source: str
    revision: str | None
    config: TextConfig
    tensors: Mapping[str, CheckpointTensor]
    vision: VisionConfig | None = None
    mtp_problem: str | None = None

    @classmethod
    def open(cls, source: str, revision: str | None = None, text_only: bool = False) -> Checkpoint:
        """Open a local folder, or download a hub id such as `Qwen/Qwen3.5-0.8B`. Reads no weight.

        Args:
            text_only: leave the vision tower out.

        Raises:
            UserError: no such folder or hub id, not a supported model, a shard missing, truncated, listed
                outside the folder or linked to from it, or tensors in a form that is not supported.
        """
        local = Path(source)
        refuse_gguf(local)
        if local.is_dir():
            root, commit = local.resolve(), None
        else:
            root = download(source, revision)
            commit = root.name
        refuse_links_out(root)
        config = load_config(root)
        stored, quantization = shard_tensors(root), quantization_config(root)
        head = {name: stored.pop(name) for name in list(stored) if name.startswith(MTP)}
        tensors, mtp_problem = assemble(stored, quantization), None
        try:
            tensors |= assemble(head, quantization)
        except UserError as error:  # the model does without it
            mtp_problem = str(error)
        vision = None if text_only else load_vision_config(root)
        return cls(root, source, commit, config, tensors, vision, mtp_problem)

    @property
    def model_type(self) -> str:
        """As ONNX Runtime GenAI calls it: with a vision tower, without `_text` at its end."""
        return self.config.model_type.removesuffix("_text") if self.vision else self.config.model_type

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
            if name not in self.tensors:
                raise UserError(f"the checkpoint has no tensor {name}: is a shard missing from {self.root}?")
            found = self.tensors[name].shape
            if found != spec.shape:
                raise UserError(
                    f"tensor {name} has shape {found} where config.json says {spec.shape}: "
                    "config and weights are not of the same model"
                )

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of axis 0 of one tensor; see `CheckpointTensor.read`."""
        return self.tensors[name].read(start, stop)
