"""Qwen3.5's multi-token-prediction head in PyTorch, which transformers leaves out.

Written after vLLM's Qwen3_5MultiTokenPredictor from transformers' own layers. Row t sees the embedding of
token t + 1, then the decoder's hidden state of token t after its final norm, at position t; it predicts token
t + 2. Embedding and lm_head are the decoder's.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM, Qwen3NextForCausalLM
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer, Qwen3_5RMSNorm
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeDecoderLayer
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextDecoderLayer

CausalLM = Qwen3_5ForCausalLM | Qwen3_5MoeForCausalLM | Qwen3NextForCausalLM
_LAYERS = {
    "qwen3_5_text": Qwen3_5DecoderLayer,
    "qwen3_5_moe_text": Qwen3_5MoeDecoderLayer,
    "qwen3_next": Qwen3NextDecoderLayer,
}


class MtpHead(nn.Module):
    """The tensors `mtp.*` of a checkpoint, named as there."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        config = copy.deepcopy(model.config)
        config.num_hidden_layers, config.layer_types = 1, ["full_attention"]
        config._attn_implementation = "sdpa"  # causal where it is given no mask
        size, epsilon = config.hidden_size, config.rms_norm_eps
        layer = _LAYERS[config.model_type]
        self.fc = nn.Linear(2 * size, size, bias=False)
        self.pre_fc_norm_embedding = Qwen3_5RMSNorm(size, eps=epsilon)
        self.pre_fc_norm_hidden = Qwen3_5RMSNorm(size, eps=epsilon)
        self.layers = nn.ModuleList([layer(config, 0)])
        self.norm = Qwen3_5RMSNorm(size, eps=epsilon)

    def forward(self, model: CausalLM, next_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [batch, sequence, vocab] from tokens 1, 2, ... [batch, sequence], and `model`'s hidden
        states of tokens 0, 1, ... [batch, sequence, hidden_size]."""
        return model.lm_head(self.states(model, next_ids, hidden))

    def states(self, model: CausalLM, next_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Its own hidden states [batch, sequence, hidden_size] of the same."""
        embedded = self.pre_fc_norm_embedding(model.get_input_embeddings()(next_ids))
        x = self.fc(torch.cat([embedded, self.pre_fc_norm_hidden(hidden)], dim=-1))
        positions = torch.arange(next_ids.shape[1]).expand(len(next_ids), -1)
        if model.config.model_type != "qwen3_next":  # one for each axis of an image
            positions = positions.expand(3, -1, -1)
        x = self.layers[0](x, position_embeddings=model.model.rotary_emb(x, positions))
        return self.norm(x)

    def guesses(
        self, model: CausalLM, next_ids: torch.Tensor, hidden: torch.Tensor, count: int
    ) -> tuple[list[int], float]:
        """The `count` likeliest tokens after the last of `next_ids` [1, sequence], each after the one before,
        with the head's own states in place of `model`'s; and the least distance of a best logit from the
        next. All is computed anew for each."""
        found, margin = [], float("inf")
        for _ in range(count):
            own = self.states(model, next_ids, hidden)[:, -1:]
            best = model.lm_head(own)[0, -1].topk(2)
            margin = min(margin, float(best.values[0] - best.values[1]))
            found.append(int(best.indices[0]))
            next_ids = torch.cat([next_ids, best.indices[None, :1]], dim=1)
            hidden = torch.cat([hidden, own], dim=1)
        return found, margin
