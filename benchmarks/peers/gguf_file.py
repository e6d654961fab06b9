"""A GGUF file of a Qwen3.5 geometry with random weights in Q4_0: the right bytes for llama.cpp, no download.

Names and keys are those that llama.cpp's loaders of `qwen35` and `qwen35moe` ask for (src/models/qwen35.cpp,
src/models/qwen35moe.cpp). What else llama.cpp can quantise it makes of that file
(benchmarks.peers.llama_quantize).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import quantize
from qwen_export.architecture.models.qwen3_5 import TextConfig
from qwen_export.architecture.models.qwen3_5_moe import MoeTextConfig

_BLOCK_ROWS = 64  # rows of random weights that are quantised; every tensor repeats them

Shape = tuple[int, ...]


def write_gguf(path: Path, config: TextConfig) -> Path:
    """Write every projection, the embedding too, as Q4_0 (block 32, float16 scales: 4.5 bits).

    Routers are random in every row: rows that repeat would send every token to the same experts.
    """
    writer = open_writer(path, config)
    rng = np.random.default_rng(0)
    for name, shape, quantised in _tensors(config):
        if not quantised:
            values = 0.02 * rng.standard_normal(shape, dtype=np.float32)
            writer.add_tensor(name, values + ("norm" in name))
            continue
        rows = 0.02 * rng.standard_normal((min(_BLOCK_ROWS, shape[-2]), shape[-1]), dtype=np.float32)
        packed = quantize(rows, GGMLQuantizationType.Q4_0)
        whole = np.resize(packed, (*shape[:-1], packed.shape[1]))
        writer.add_tensor(name, whole, raw_dtype=GGMLQuantizationType.Q4_0)
    finish(writer)
    return path


def bytes_read(file: Path, config: TextConfig) -> int:
    """Bytes of the weights that a token needs: of routed experts the chosen ones, no untied embedding."""
    total = 0
    tensors = GGUFReader(file).tensors
    untied = any(tensor.name == "output.weight" for tensor in tensors)
    for tensor in tensors:
        size = int(tensor.n_bytes)
        if "_exps." in tensor.name:
            assert isinstance(config, MoeTextConfig)
            size = size * config.num_experts_per_tok // config.num_experts
        if not (untied and tensor.name == "token_embd.weight"):
            total += size
    return total


def open_writer(path: Path, config: TextConfig) -> GGUFWriter:
    """A writer that has all but the tensors."""
    mixture = isinstance(config, MoeTextConfig)
    writer = GGUFWriter(path, "qwen35moe" if mixture else "qwen35")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters.rope_theta)
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_rope_dimension_sections([*config.rope_parameters.mrope_section, 0])
    writer.add_full_attention_interval(config.layer_types.index("full_attention") + 1)
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_inner_size(config.value_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    if isinstance(config, MoeTextConfig):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    return writer


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(config: TextConfig) -> Iterator[tuple[str, Shape, bool]]:
    """(name, shape [..., out, in], whether it is quantised)"""
    hidden, dim = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    yield "token_embd.weight", (config.vocab_size, hidden), True
    if not config.tie_word_embeddings:
        yield "output.weight", (config.vocab_size, hidden), True
    yield "output_norm.weight", (hidden,), False
    for layer, kind in enumerate(config.layer_types):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", (hidden,), False
        yield f"{block}.post_attention_norm.weight", (hidden,), False
        if kind == "full_attention":
            yield f"{block}.attn_q.weight", (2 * heads * dim, hidden), True
            yield f"{block}.attn_k.weight", (kv_heads * dim, hidden), True
            yield f"{block}.attn_v.weight", (kv_heads * dim, hidden), True
            yield f"{block}.attn_output.weight", (hidden, heads * dim), True
            yield f"{block}.attn_q_norm.weight", (dim,), False
            yield f"{block}.attn_k_norm.weight", (dim,), False
        else:
            value_heads = config.linear_num_value_heads
            yield f"{block}.attn_qkv.weight", (config.conv_dim, hidden), True
            yield f"{block}.attn_gate.weight", (config.value_dim, hidden), True
            yield f"{block}.ssm_conv1d.weight", (config.conv_dim, config.linear_conv_kernel_dim), False
            yield f"{block}.ssm_dt.bias", (value_heads,), False
            yield f"{block}.ssm_a", (value_heads,), False
            yield f"{block}.ssm_beta.weight", (value_heads, hidden), True
            yield f"{block}.ssm_alpha.weight", (value_heads, hidden), True
            yield f"{block}.ssm_norm.weight", (config.linear_value_head_dim,), False
            yield f"{block}.ssm_out.weight", (hidden, config.value_dim), True
        if isinstance(config, MoeTextConfig):
            yield from _experts(block, config)
        else:
            yield from _feed_forward(block, "", hidden, config.intermediate_size)


def _feed_forward(
    block: str, suffix: str, hidden: int, inner: int, *stack: int
) -> Iterator[tuple[str, Shape, bool]]:
    yield f"{block}.ffn_gate{suffix}.weight", (*stack, inner, hidden), True
    yield f"{block}.ffn_up{suffix}.weight", (*stack, inner, hidden), True
    yield f"{block}.ffn_down{suffix}.weight", (*stack, hidden, inner), True


def _experts(block: str, config: MoeTextConfig) -> Iterator[tuple[str, Shape, bool]]:
    hidden = config.hidden_size
    yield f"{block}.ffn_gate_inp.weight", (config.num_experts, hidden), False
    yield f"{block}.ffn_gate_inp_shexp.weight", (hidden,), False
    yield from _feed_forward(block, "_exps", hidden, config.moe_intermediate_size, config.num_experts)
    yield from _feed_forward(block, "_shexp", hidden, config.shared_expert_intermediate_size)
