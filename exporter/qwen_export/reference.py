"""Qwen3.5's text model in numpy float32, layer by layer, its weights read from their files as they are used.

Memory holds one tile of one weight and the activations, whatever the model's size. The recurrence is written
token by token, as the paper defines it, so that it shares no algebra with the graphs that are compared to it.
It also says names and order of the tensors itself, where the graphs read them from the tables of
`architecture`. What both share is the reading: the configuration, the checkpoint's tensors, and the rotary
embedding's frequencies (`architecture.yarn`).
Source: transformers' Qwen3_5Model and Qwen3_5MoeModel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from qwen_export.architecture.models.qwen3_5 import TextConfig
from qwen_export.architecture.models.qwen3_5_moe import MoeTextConfig
from qwen_export.architecture.yarn import inverse_frequencies
from qwen_export.checkpoint.tensors.tensor import CheckpointTensor, float32

_TILE_ELEMENTS = 16 * 1024 * 1024
# Of recurrent states and activations worked on at a time, so that they stay in the CPU's cache.
_CACHED_ELEMENTS = 1024 * 1024
_L2_EPSILON = 1e-6  # transformers' l2norm
# query and key [batch, T, heads, key size], value [batch, T, heads, size], beta and logarithms of decay
# [batch, T, heads] -> like value, from a state of zeros on.
DeltaRule = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class Weights:
    """Tensors by their names in the checkpoint, as what a model does with them; all results are float32."""

    def __init__(self, tensors: Mapping[str, CheckpointTensor]) -> None:
        self._tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def whole(self, name: str) -> np.ndarray:
        """A small tensor."""
        return float32(self._tensors[name].read(0, self._tensors[name].shape[0]))

    def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        """Rows [K] of a tensor [N, K] by `ids` [...] -> [..., K]."""
        different, places = np.unique(ids, return_inverse=True)
        read = np.concatenate([self._tensors[name].read(int(row), int(row) + 1) for row in different])
        return float32(read)[places.reshape(ids.shape)]

    def linear(self, name: str, x: np.ndarray, expert: int | None = None) -> np.ndarray:
        """x [..., K] times the transpose of a tensor [N, K], or of one `expert` of [experts, N, K]."""
        tensor = self._tensors[name]
        n, k = tensor.shape[-2:]
        if expert is not None:
            return x @ float32(tensor.read(expert, expert + 1))[0].T
        inputs = x.reshape(-1, k)  # one product, where stacked ones would be many small ones
        result = np.empty((len(inputs), n), np.float32)
        step = max(1, _TILE_ELEMENTS // k)
        for start in range(0, n, step):
            stop = min(start + step, n)
            np.matmul(inputs, float32(tensor.read(start, stop)).T, out=result[:, start:stop])
        return result.reshape(*x.shape[:-1], n)


def embed(config: TextConfig, weights: Weights, ids: np.ndarray) -> np.ndarray:
    """ids [batch, sequence] -> hidden states [batch, sequence, hidden]."""
    return weights.rows("model.embed_tokens.weight", ids)


def logits(config: TextConfig, weights: Weights, hidden: np.ndarray) -> np.ndarray:
    """The last layer's hidden states [..., hidden] -> logits [..., vocab]."""
    return weights.linear(head_name(config), last_norm(config, weights, hidden))


def head_name(config: TextConfig) -> str:
    return "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"


def last_norm(config: TextConfig, weights: Weights, hidden: np.ndarray) -> np.ndarray:
    """What lm_head is given: [..., hidden] -> the same shape."""
    return rms_norm(config, weights, "model.norm.weight", hidden)


def delta_rule(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, beta: np.ndarray, log_decay: np.ndarray
) -> np.ndarray:
    """A `DeltaRule`, token by token."""
    output, decay = np.empty_like(value), np.exp(log_decay)
    batch, length, heads, key_size = key.shape
    state = np.zeros((batch, heads, key_size, value.shape[-1]), np.float32)
    for t in range(length):
        k = key[:, t, :, :, None]
        state *= decay[:, t, :, None, None]
        seen = (k.swapaxes(-1, -2) @ state)[..., 0, :]
        state += k * (beta[:, t, :, None] * (value[:, t] - seen))[..., None, :]
        output[:, t] = (query[:, t, :, None, :] @ state)[..., 0, :]
    return output


def layer(
    config: TextConfig,
    weights: Weights,
    index: int,
    hidden: np.ndarray,
    recurrence: DeltaRule = delta_rule,
) -> np.ndarray:
    """Hidden states before layer `index` -> after it, both [batch, sequence, hidden], from position 0 on.

    Args:
        recurrence: of Gated DeltaNet.
    """
    name = f"model.layers.{index}"
    normed = rms_norm(config, weights, f"{name}.input_layernorm.weight", hidden)
    if config.layer_types[index] == "full_attention":
        hidden = hidden + _attention(config, weights, name, normed)
    else:
        hidden = hidden + _gated_delta_net(config, weights, name, normed, recurrence)
    normed = rms_norm(config, weights, f"{name}.post_attention_layernorm.weight", hidden)
    if isinstance(config, MoeTextConfig) and f"{name}.mlp.gate.weight" in weights:
        return hidden + _mixture_of_experts(config, weights, f"{name}.mlp", normed)
    return hidden + _mlp(weights, f"{name}.mlp", normed)


def forward(config: TextConfig, weights: Weights, ids: np.ndarray) -> Iterator[np.ndarray]:
    """Hidden states [batch, sequence, hidden] of `ids` [batch, sequence]: embedded, then after each layer."""
    hidden = embed(config, weights, ids)
    yield hidden
    for index in range(config.num_hidden_layers):
        hidden = layer(config, weights, index, hidden)
        yield hidden


def _mlp(weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    activated = _silu(weights.linear(f"{name}.gate_proj.weight", x))
    activated *= weights.linear(f"{name}.up_proj.weight", x)
    return weights.linear(f"{name}.down_proj.weight", activated)


def _mixture_of_experts(config: MoeTextConfig, weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    tokens = x.reshape(-1, x.shape[-1])
    probabilities = softmax(weights.linear(f"{name}.gate.weight", tokens))
    chosen = np.argsort(-probabilities, axis=-1, kind="stable")[:, : config.num_experts_per_tok]
    share = np.take_along_axis(probabilities, chosen, -1)
    if config.norm_topk_prob:
        share /= share.sum(-1, keepdims=True)
    routed = np.zeros_like(tokens)
    for expert in np.unique(chosen):
        token, place = np.nonzero(chosen == expert)
        both = weights.linear(f"{name}.experts.gate_up_proj", tokens[token], int(expert))
        gate, up = np.split(both, 2, axis=-1)
        found = weights.linear(f"{name}.experts.down_proj", _silu(gate) * up, int(expert))
        routed[token] += found * share[token, place, None]
    shared = _mlp(weights, f"{name}.shared_expert", tokens)
    shared *= _sigmoid(weights.linear(f"{name}.shared_expert_gate.weight", tokens))
    return (routed + shared).reshape(x.shape)


def _attention(config: TextConfig, weights: Weights, layer: str, x: np.ndarray) -> np.ndarray:
    name, (batch, length, _) = f"{layer}.self_attn", x.shape
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    both = weights.linear(f"{name}.q_proj.weight", x).reshape(batch, length, heads, 2, dim)
    query, gate = both[..., 0, :], both[..., 1, :].reshape(batch, length, heads * dim)
    key = weights.linear(f"{name}.k_proj.weight", x).reshape(batch, length, kv_heads, dim)
    value = weights.linear(f"{name}.v_proj.weight", x).reshape(batch, length, kv_heads, dim)
    query = _rotate(config, rms_norm(config, weights, f"{name}.q_norm.weight", query))
    key = _rotate(config, rms_norm(config, weights, f"{name}.k_norm.weight", key))

    output, seen = np.empty_like(query), np.tri(length, dtype=bool)
    for text in range(batch):
        q, k, v = (part[text].swapaxes(0, 1) for part in (query, key, value))  # heads before tokens
        k, v = (np.repeat(part, heads // kv_heads, axis=0) for part in (k, v))
        scores = q @ k.swapaxes(-1, -2) * np.float32(dim**-0.5)
        output[text] = (softmax(np.where(seen, scores, -np.inf)) @ v).swapaxes(0, 1)
    gate = _sigmoid(gate)
    gate *= output.reshape(gate.shape)
    return weights.linear(f"{name}.o_proj.weight", gate)


def _rotate(config: TextConfig, x: np.ndarray) -> np.ndarray:
    """Text has the same position on all three axes, so mRoPE is plain rotation. x [batch, T, heads, dim]."""
    frequencies, factor = inverse_frequencies(config)
    angles = np.arange(x.shape[1], dtype=np.float32)[:, None, None] * frequencies
    cos, sin = np.cos(angles) * np.float32(factor), np.sin(angles) * np.float32(factor)
    half = len(frequencies)
    left, right, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([left * cos - right * sin, right * cos + left * sin, rest], axis=-1)


def _gated_delta_net(
    config: TextConfig, weights: Weights, layer: str, x: np.ndarray, recurrence: DeltaRule
) -> np.ndarray:
    name, (batch, length, _) = f"{layer}.linear_attn", x.shape
    key_heads, heads = config.linear_num_key_heads, config.linear_num_value_heads
    projected = weights.linear(f"{name}.in_proj_qkv.weight", x)
    kernel = weights.whole(f"{name}.conv1d.weight")
    beta = _sigmoid(weights.linear(f"{name}.in_proj_b.weight", x))
    a = weights.linear(f"{name}.in_proj_a.weight", x) + weights.whole(f"{name}.dt_bias")
    log_decay = -np.exp(weights.whole(f"{name}.A_log")) * np.logaddexp(a, np.float32(0))

    key_size, value_size = config.linear_key_head_dim, config.linear_value_head_dim
    output = np.empty((batch, length, heads, value_size), np.float32)
    together = max(1, _CACHED_ELEMENTS // (heads * key_size * value_size))
    for start in range(0, batch, together):
        some = slice(start, start + together)
        mixed = _causal_conv(projected[some], kernel)
        query, key, value = np.split(mixed, [config.key_dim, 2 * config.key_dim], axis=-1)
        query, key = (
            np.repeat(_l2_norm(part.reshape(-1, length, key_heads, key_size)), heads // key_heads, axis=2)
            for part in (query, key)
        )
        query *= np.float32(key_size**-0.5)
        value = value.reshape(-1, length, heads, value_size)
        output[some] = recurrence(query, key, value, beta[some], log_decay[some])

    gate = _silu(weights.linear(f"{name}.in_proj_z.weight", x)).reshape(output.shape)
    gate *= _normed(output, config.rms_norm_eps) * weights.whole(f"{name}.norm.weight")
    return weights.linear(f"{name}.out_proj.weight", gate.reshape(batch, length, -1))


def _causal_conv(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Depthwise, with SiLU: x [batch, T, channels], kernel [channels, 1, taps]."""
    taps, length = kernel.shape[-1], x.shape[1]
    padded = np.pad(x, ((0, 0), (taps - 1, 0), (0, 0)))
    return _silu(sum(padded[:, tap : tap + length] * kernel[:, 0, tap] for tap in range(taps)))


def rms_norm(config: TextConfig, weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return _normed(x, config.rms_norm_eps) * (1 + weights.whole(name))


def _normed(x: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(epsilon))


def _l2_norm(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + np.float32(_L2_EPSILON))


def softmax(x: np.ndarray) -> np.ndarray:
    raised = np.exp(x - x.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In place, over the last axis."""
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return logits


def _sigmoid(x: np.ndarray) -> np.ndarray:
    raised = x / 2
    np.tanh(raised, out=raised)  # does not overflow
    raised += 1
    raised /= 2
    return raised


def _silu(x: np.ndarray) -> np.ndarray:
    """In place."""
    step = max(1, _CACHED_ELEMENTS * len(x) // max(1, x.size))
    for start in range(0, len(x), step):
        some = x[start : start + step]
        some *= _sigmoid(some)
    return x
