"""The names of a checkpoint's tensors, whatever the model was wrapped in when it was saved.

The model's are those of transformers' text model, `model.X` and `lm_head.weight`, its vision tower
`model.visual.X`, its multi-token-prediction head `mtp.X`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from qwen_common.errors import UserError

# What wraps a module and adds a part to its names, anywhere: torch.compile, fully sharded and data-parallel
# training, activation checkpointing, Lightning's Fabric.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|module)\."
)
# What a name begins with, and with what the model's does: the first that fits, again until none does.
_PREFIXES = (
    ("base_model.model.", ""),  # PEFT
    ("pretrained_model.", ""),  # TRL's model with a value head
    ("model.model.", "model."),  # a trainer's own class, whose `model` is transformers'
    ("model.lm_head.", "lm_head."),
    ("model.mtp.", "mtp."),
    ("model.language_model.", "model."),  # the text model in transformers' vision-language model
    ("language_model.model.", "model."),  # its older layout, and other libraries'
    ("language_model.lm_head.", "lm_head."),
    ("language_model.mtp.", "mtp."),
    ("language_model.", "model."),  # the vision-language model without its head
    ("visual.", "model.visual."),
    ("vision_tower.", "model.visual."),  # MLX-VLM
    ("embed_tokens.", "model.embed_tokens."),  # the text model without its head
    ("layers.", "model.layers."),
    ("norm.", "model.norm."),
)
_LORA = re.compile(r"\.(?:lora_\w+|base_layer|modules_to_save|original_module)\b|^prompt_encoder\.")


def tensor_name(stored: str) -> str:
    """What the model calls the tensor that a checkpoint stores as `stored`."""
    name = _WRAPPERS.sub("", stored)
    while found := next((row for row in _PREFIXES if name.startswith(row[0])), None):
        prefix, ours = found
        name = ours + name.removeprefix(prefix)
    return name


def refuse_strange_names(stored: Iterable[str]) -> None:
    """Names that tell of another model than the one that would be exported.

    Raises:
        UserError: an adapter that is not merged.
    """
    for name in stored:
        if _LORA.search(name):
            raise UserError(
                f"tensor {name} belongs to an adapter that is not merged: load the checkpoint with PEFT, "
                "call merge_and_unload(), save that, and give its folder; or save the adapter apart from its "
                "model, and name it with --adapter"
            )
