"""llama.cpp's names, orders and numbers of a text model's tensors, and the model's.

llama.cpp stores 1 + w for the norms that multiply by it, -exp(A_log) for A_log, and, but for qwen3next, value
heads of Gated DeltaNet by their place in a group: first the first head of every group, then the second ones.
qwen3next's projections may be fused as its checkpoint has them.
Source: llama.cpp's conversion/qwen.py and src/models/qwen35.cpp and qwen3next.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from qwen_common.errors import UserError

from qwen_export.architecture.models.qwen3_5 import EMBEDDING, LM_HEAD, TextConfig
from qwen_export.architecture.mtp import MTP
from qwen_export.checkpoint.tensors.experts import stack_experts
from qwen_export.checkpoint.tensors.fused import split_fused
from qwen_export.checkpoint.tensors.tensor import CheckpointTensor
from qwen_export.gguf.file import Stored
from qwen_export.gguf.tensors import Mapped, joined, rows, tensor

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_NAMES = {
    "token_embd.weight": EMBEDDING,
    "output_norm.weight": "model.norm.weight",
    "output.weight": LM_HEAD,
}
# Of a layer.
_PARTS = {
    "attn_norm.weight": "input_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_qkv.weight": "linear_attn.in_proj_qkv.weight",
    "attn_gate.weight": "linear_attn.in_proj_z.weight",
    "ssm_in.weight": "linear_attn.in_proj_qkvz.weight",
    "ssm_ba.weight": "linear_attn.in_proj_ba.weight",
    "ssm_alpha.weight": "linear_attn.in_proj_a.weight",
    "ssm_beta.weight": "linear_attn.in_proj_b.weight",
    "ssm_conv1d.weight": "linear_attn.conv1d.weight",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_a": "linear_attn.A_log",
    "ssm_norm.weight": "linear_attn.norm.weight",
    "ssm_out.weight": "linear_attn.out_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "ffn_gate_inp_shexp.weight": "mlp.shared_expert_gate.weight",
    "ffn_gate_shexp.weight": "mlp.shared_expert.gate_proj.weight",
    "ffn_up_shexp.weight": "mlp.shared_expert.up_proj.weight",
    "ffn_down_shexp.weight": "mlp.shared_expert.down_proj.weight",
}
# Stacks of all experts, and what each expert's rows are.
_EXPERTS = {
    "ffn_gate_exps.weight": ("gate",),
    "ffn_up_exps.weight": ("up",),
    "ffn_gate_up_exps.weight": ("gate", "up"),
    "ffn_down_exps.weight": ("down",),
}
# Of the layer after the last, which predicts one token more.
_NEXTN = {
    "nextn.eh_proj.weight": "fc.weight",
    "nextn.enorm.weight": "pre_fc_norm_embedding.weight",
    "nextn.hnorm.weight": "pre_fc_norm_hidden.weight",
    "nextn.shared_head_norm.weight": "norm.weight",
}
# Parts whose rows are value heads, or end with them.
_VALUE_ROWS = re.compile(r"linear_attn\.(in_proj_(qkv|z|a|b)\.weight|conv1d\.weight|dt_bias|A_log)")
_ONE_ROW = ("in_proj_a.weight", "in_proj_b.weight", "dt_bias", "A_log")  # of a head
_AFTER_KEYS = ("in_proj_qkv.weight", "conv1d.weight")  # queries and keys come first
_ADDED_ONE = re.compile(r"(?<!linear_attn\.)(?:norm|layernorm|norm_embedding|norm_hidden)\.weight")
_SCALES = (".scale", ".input_scale")  # NVFP4's, beside a weight


class Layout(NamedTuple):
    """What a file's tensors are.

    Attributes:
        tensors: the model's, and those of its MTP head, by name.
        unread: llama.cpp's names of those that are none of the model's.
    """

    tensors: dict[str, CheckpointTensor]
    unread: list[str]


def lay_out(stored: Mapping[str, Stored], config: TextConfig) -> Layout:
    """The model's tensors from those of a file.

    Raises:
        UserError: a tensor has a type that cannot be read, or another shape than the metadata say, or an
            expert is missing.
    """
    reader = _Reader(config)
    unread = [name for name, found in stored.items() if not reader.take(name, found)]
    for name in unread:
        if name.endswith(_SCALES):
            raise UserError(
                f"{stored[name].file}: {name} is a scale of NVFP4's, which is not supported yet: give a file "
                "in another quantisation"
            )
    return Layout(stack_experts(split_fused(reader.tensors, config.fused)), unread)


class _Reader:
    def __init__(self, config: TextConfig) -> None:
        self._config = config
        self.tensors: dict[str, CheckpointTensor] = {}

    def take(self, name: str, stored: Stored) -> bool:
        """Whether `stored` is one of the model's."""
        if ours := _NAMES.get(name):
            self._put(ours, stored)
            return True
        if not (found := _BLOCK.fullmatch(name)):
            return False
        layer, part = int(found[1]), found[2]
        if layer < self._config.num_hidden_layers:
            prefix = f"model.layers.{layer}."
        elif layer == self._config.num_hidden_layers:
            prefix = f"{MTP}layers.0."
            if part in _NEXTN:
                self._put(MTP + _NEXTN[part], stored)
                return True
        else:
            return False
        if part in _EXPERTS:
            self._experts(f"{prefix}mlp.experts.", _EXPERTS[part], stored)
        elif part == "attn_qkv.weight" and self._attends(layer):
            self._fused_attention(prefix, stored)
        elif part in _PARTS:
            self._put(prefix + _PARTS[part], stored)
        else:
            return False
        return True

    def _attends(self, layer: int) -> bool:
        types = self._config.layer_types
        return layer >= len(types) or types[layer] == "full_attention"

    def _put(self, name: str, stored: Stored) -> None:
        self.tensors[name] = self._read(name, stored)

    def _experts(self, prefix: str, kinds: tuple[str, ...], stored: Stored) -> None:
        if len(stored.shape) != 3 or stored.shape[1] % len(kinds):
            raise _wrong_shape(stored)
        count, height = stored.shape[0], stored.shape[1] // len(kinds)
        for expert in range(count):
            whole = replace(rows(stored, expert, expert + 1), shape=stored.shape[1:])
            for place, kind in enumerate(kinds):
                part = rows(whole, place * height, (place + 1) * height)
                self._put(f"{prefix}{expert}.{kind}_proj.weight", part)

    def _fused_attention(self, prefix: str, stored: Stored) -> None:
        sizes = (self._config.query_gate_dim, self._config.kv_dim, self._config.kv_dim)
        if stored.shape[0] != sum(sizes):
            raise _wrong_shape(stored)
        start = 0
        for kind, height in zip("qkv", sizes, strict=True):
            part = rows(stored, start, start + height)
            self._put(f"{prefix}self_attn.{kind}_proj.weight", part)
            start += height

    def _read(self, name: str, stored: Stored) -> CheckpointTensor:
        if _VALUE_ROWS.search(name):
            found = self._value_rows(name, stored)
        elif name.endswith("linear_attn.out_proj.weight"):
            if stored.shape[-1] != self._config.value_dim:
                raise _wrong_shape(stored)
            found = tensor(stored, stored.shape, self._heads())
        elif name.endswith("shared_expert_gate.weight"):
            found = tensor(stored, (1, stored.shape[-1]))
        else:
            found = tensor(stored, stored.shape)
        if undo := _undo(name):
            return Mapped(found, undo)
        return found

    def _value_rows(self, name: str, stored: Stored) -> CheckpointTensor:
        """Rows of all value heads in the model's order; what comes before them stays."""
        config, shape = self._config, stored.shape
        height = 1 if name.endswith(_ONE_ROW) else config.linear_value_head_dim
        before = 2 * config.key_dim if name.endswith(_AFTER_KEYS) else 0
        if shape[0] != before + height * config.linear_num_value_heads:
            raise _wrong_shape(stored)
        if name.endswith("conv1d.weight") and len(shape) == 2:
            stored = replace(stored, shape=(shape[0], 1, shape[1]))
        heads = self._heads()
        if not heads:
            return tensor(stored, stored.shape)
        parts = [rows(stored, 0, before)] if before else []
        parts += [rows(stored, before + head * height, before + (head + 1) * height) for head in heads]
        return joined([tensor(part, part.shape) for part in parts])

    def _heads(self) -> tuple[int, ...]:
        """Where in the file each value head stands; () where that is its own place."""
        if self._config.fused:  # its fused projections go by key head, and so does all else
            return ()
        groups, heads = self._config.linear_num_key_heads, self._config.linear_num_value_heads
        each = heads // groups
        return tuple(head % each * groups + head // each for head in range(heads)) if each > 1 else ()


def _undo(name: str) -> Callable[[np.ndarray], np.ndarray] | None:
    if name.endswith("A_log"):
        return _logarithm
    return _less_one if _ADDED_ONE.search(name) else None


def _less_one(values: np.ndarray) -> np.ndarray:
    return values - np.float32(1)


def _logarithm(values: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):  # the caller looks for NaN
        return np.log(-values.astype(np.float64)).astype(np.float32)


def _wrong_shape(stored: Stored) -> UserError:
    return UserError(
        f"{stored.file}: tensor {stored.name} has the shape {stored.shape}, which the file's metadata do not "
        "allow: download it again"
    )
