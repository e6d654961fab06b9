"""The checkpoint as transformers' own model, over weights that stay in their files.

A tensor that is stored as floats is mapped: PyTorch and OpenVINO both work on the file's pages, which the
system may drop again. Only what a checkpoint stores in another form (FP8, GPTQ, AWQ) is read into memory.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from qwen_export.checkpoint import MTP, Checkpoint
from qwen_export.sources import Source, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_CHECKED_BYTES = 64 * 1024 * 1024  # read at a time


def load_model(checkpoint: Checkpoint) -> Any:
    """A transformers.PreTrainedModel, in the dtype in which the checkpoint stores its embedding.

    Raises:
        UserError: a tensor holds NaN or Inf.
    """
    import transformers

    content = json.loads((checkpoint.root / "config.json").read_text(encoding="utf-8"))
    text = content.get("text_config", content)
    for section in (content, text):
        section.pop("quantization_config", None)  # what is read below are floats
    if checkpoint.config.rope_parameters.rope_type == "yarn":
        text["rope_parameters"] = checkpoint.config.rope_parameters.model_dump(exclude_none=True)
    moe = "Moe" if checkpoint.config.num_experts else ""
    if checkpoint.vision:
        model_class = getattr(transformers, f"Qwen3_5{moe}ForConditionalGeneration")
        prefix, config = "model.language_model.", model_class.config_class(**content)
    else:
        model_class = getattr(transformers, f"Qwen3_5{moe}ForCausalLM")
        prefix, tied = "model.", checkpoint.config.tie_word_embeddings
        config = model_class.config_class(**{**text, "tie_word_embeddings": tied})
    weights = {
        _renamed(name, prefix): _tensor(source)
        for name, source in checkpoint.tensors.items()
        if not name.startswith(MTP) and (checkpoint.vision or not name.startswith("model.visual."))
    }
    dtype = weights[f"{prefix}embed_tokens.weight"].dtype
    model = model_class.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    for name, parameter in model.named_parameters():
        # Published checkpoints keep a few tensors in float32, which would be rounded to the others' dtype.
        if name in weights and weights[name].dtype != parameter.dtype:
            parameter.data = weights[name]
    # Where optimum-intel looks for the tokenizer; without it it asks the hub for a model called None.
    model.config._name_or_path = model.name_or_path = str(checkpoint.root)
    return model.eval()


def _renamed(name: str, prefix: str) -> str:
    """Our names are those of a text model, whatever it is wrapped in."""
    if name.startswith("model.") and not name.startswith("model.visual."):
        return prefix + name.removeprefix("model.")
    return name


def _tensor(source: Source) -> Tensor:

    rows = max(1, _CHECKED_BYTES * source.shape[0] // source.nbytes)
    parts = (
        source.read(start, min(start + rows, source.shape[0])) for start in range(0, source.shape[0], rows)
    )
    if not isinstance(source, TensorInfo):
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
