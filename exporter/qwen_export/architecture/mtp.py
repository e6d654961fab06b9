"""The multi-token-prediction head: one full-attention layer of the model's family, and what leads into it."""

from __future__ import annotations

from dataclasses import replace

from qwen_export.architecture.models.qwen3_5 import TextConfig
from qwen_export.architecture.tensors import Table, TensorSpec, expand, floats, matrix

MTP = "mtp."  # begins the names of its tensors
_LAYER = "mtp.layers.0."
_TABLE: Table = (
    matrix("mtp.fc.weight", "attention", "hidden_size", "mtp_input_dim"),
    floats("mtp.pre_fc_norm_embedding.weight", "norm", "hidden_size"),
    floats("mtp.pre_fc_norm_hidden.weight", "norm", "hidden_size"),
    floats("mtp.norm.weight", "norm", "hidden_size"),
)


def declares_mtp(config: TextConfig) -> bool:
    """Whether config.json tells of a head of one layer that shares the model's embedding."""
    return config.mtp_num_hidden_layers == 1 and not config.mtp_use_dedicated_embeddings


def mtp_tensors(config: TextConfig) -> dict[str, TensorSpec]:
    """The tensors of a head of one layer, which shares embedding and lm_head."""
    second = "sparse" if any(row.index == "sparse" for row in config.table) else "dense"
    layer = tuple(
        replace(row, name=_LAYER + row.name.partition("}.")[2])
        for row in config.table
        if row.index in ("layer", "full_attention", second)
    )
    return expand((*_TABLE, *layer), config, {})
