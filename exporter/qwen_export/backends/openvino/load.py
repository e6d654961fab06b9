"""The checkpoint as transformers' own model, over weights that stay in their files.

What will be compressed is a placeholder (see `placeholder`). Any other tensor that is stored as floats is
mapped: PyTorch and OpenVINO both work on the file's pages, which the system may drop again. Only what a
checkpoint stores in another form (FP8, GPTQ, AWQ) and the recipe keeps as floats is read into memory.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from qwen_profiles.schema import Role

from qwen_export.architecture.models.qwen3_5 import EMBEDDING
from qwen_export.architecture.vision import VISION
from qwen_export.backends.openvino.placeholder import Placeholders, TensorSlice
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.checkpoint.tensors.plain import PlainTensor
from qwen_export.checkpoint.tensors.tensor import CheckpointTensor

if TYPE_CHECKING:
    from torch import Tensor

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_MATRIX_AXES = (2, 3)  # the patch embedding has 5: NNCF takes no convolutions
_CHECKED_BYTES = 64 * 1024 * 1024  # read at a time


def load_model(checkpoint: Checkpoint, left_out: Collection[Role] = ()) -> tuple[Any, Placeholders]:
    """A transformers.PreTrainedModel, in the dtype in which the checkpoint stores its embedding.

    Args:
        left_out: roles whose weights are not read, but found in the IR by the second value.

    Raises:
        UserError: a tensor that is read holds NaN or Inf.
    """
    import transformers

    content = json.loads((checkpoint.root / "config.json").read_text(encoding="utf-8"))
    text = content.get("text_config", content)
    for section in (content, text):
        section.pop("quantization_config", None)  # what is read below are floats
    text["mtp_num_hidden_layers"] = 0  # else optimum-intel exports the head, too
    if checkpoint.config.rope_parameters.rope_type == "yarn":
        text["rope_parameters"] = checkpoint.config.rope_parameters.model_dump(exclude_none=True)
    # As the tensors are, whatever the file says.
    content["tie_word_embeddings"] = text["tie_word_embeddings"] = checkpoint.config.tie_word_embeddings
    family = checkpoint.config.transformers_name
    if checkpoint.vision:
        model_class = getattr(transformers, f"{family}ForConditionalGeneration")
        prefix, config = "model.language_model.", model_class.config_class(**content)
    else:
        model_class = getattr(transformers, f"{family}ForCausalLM")
        prefix, config = "model.", model_class.config_class(**text)
    specs = {**checkpoint.config.tensors(), **(checkpoint.vision.tensors() if checkpoint.vision else {})}
    sources = {name: checkpoint.tensors[name] for name in specs}
    chosen = {
        name: spec.recipe_role
        for name, spec in specs.items()
        if spec.recipe_role and spec.recipe_role in left_out and len(spec.shape) in _MATRIX_AXES
    }
    sizes = [int(np.prod(sources[name].shape, dtype=np.int64)) for name in chosen]
    placeholders = Placeholders(max(sizes, default=0), 2 * len(chosen))
    dtype = _as_torch(sources[EMBEDDING].read(0, 1)).dtype
    weights = {}
    for name, source in sources.items():
        if name not in chosen:
            weights[_renamed(name, prefix)] = _tensor(source)
        elif chosen[name] == "experts":  # see _part_experts
            weights[_renamed(name, prefix)] = placeholders.plain(source.shape, dtype)
        else:
            whole = TensorSlice(name, chosen[name], source, 0, source.shape[0])
            weights[_renamed(name, prefix)] = placeholders.tensor(whole, dtype)
    model = model_class.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    for name, parameter in model.named_parameters():
        # Published checkpoints keep a few tensors in float32, which would be rounded to the others' dtype.
        if name in weights and weights[name].dtype != parameter.dtype:
            parameter.data = weights[name]
    if "experts" in chosen.values():
        _part_experts(model, sources, placeholders, prefix)
    # Where optimum-intel looks for the tokenizer; without it it asks the hub for a model called None.
    model.config._name_or_path = model.name_or_path = str(checkpoint.root)
    return model.eval(), placeholders


def _part_experts(
    model: Any, sources: dict[str, CheckpointTensor], placeholders: Placeholders, prefix: str
) -> None:
    """Gate and up projection of all experts as weights of their own.

    optimum-intel's patched forward halves the stack of both, which OpenVINO would fold into two copies. They
    are float32, because OpenVINO traces experts in that and would make it of anything else.
    """
    import torch

    def placeholder(name: str, first: int, last: int) -> torch.nn.Parameter:
        tensor = placeholders.tensor(TensorSlice(name, "experts", sources[name], first, last), torch.float32)
        return torch.nn.Parameter(tensor, requires_grad=False)

    for index, layer in enumerate(model.get_submodule(prefix.rstrip(".")).layers):
        name, experts = f"model.layers.{index}.mlp.experts", layer.mlp.experts
        middle = sources[f"{name}.gate_up_proj"].shape[1] // 2
        del experts.gate_up_proj
        experts.gate_proj = placeholder(f"{name}.gate_up_proj", 0, middle)
        experts.up_proj = placeholder(f"{name}.gate_up_proj", middle, 2 * middle)
        experts.gate_up_proj = _Halves(experts.gate_proj, experts.up_proj)
        experts.down_proj = placeholder(f"{name}.down_proj", 0, sources[f"{name}.down_proj"].shape[1])


@dataclass(frozen=True)
class _Halves:
    """In the place of a stack of two weights, for a forward that only takes it apart."""

    first: Tensor
    second: Tensor

    def chunk(self, count: int, dim: int) -> tuple[Tensor, Tensor]:
        if (count, dim) != (2, -2):
            raise NotImplementedError("optimum-intel takes experts apart in another way than before")
        return self.first, self.second


def _renamed(name: str, prefix: str) -> str:
    """Our names are those of a text model, whatever it is wrapped in."""
    if name.startswith("model.") and not name.startswith(VISION):
        return prefix + name.removeprefix("model.")
    return name


def _tensor(source: CheckpointTensor) -> Tensor:

    rows = max(1, _CHECKED_BYTES * source.shape[0] // source.nbytes)
    parts = (
        source.read(start, min(start + rows, source.shape[0])) for start in range(0, source.shape[0], rows)
    )
    if not isinstance(source, PlainTensor):
        return _as_torch(np.concatenate(list(parts)))
    for _ in parts:  # which refuses NaN and Inf
        pass
    # Copy on write, because PyTorch knows no tensors that are read only; nothing is written.
    return _as_torch(np.memmap(source.file, source.dtype, "c", source.offset, source.shape))


def _as_torch(values: np.ndarray) -> Tensor:
    """The same memory; PyTorch does not know ml_dtypes' bfloat16."""
    import torch

    if values.dtype == _BFLOAT16:
        return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(values)
