"""Routed experts in bfloat16, all in two grouped products: PyTorch's autocast leaves those in float32."""

from __future__ import annotations

import torch
from torch.nn.functional import grouped_mm
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "grouped_bfloat16"


def forward(
    module: torch.nn.Module, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """
    Args:
        hidden: [tokens, hidden]
        chosen: [tokens, k], the experts of each token.
        weights: [tokens, k]

    Returns:
        [tokens, hidden], in the dtype of `hidden`.
    """
    tokens, k = chosen.shape
    order = chosen.flatten().argsort()
    ends = chosen.flatten().bincount(minlength=module.num_experts).cumsum(0).int()
    rows = hidden.bfloat16()[order // k]
    gate, up = grouped_mm(rows, module.gate_up_proj.bfloat16().mT, offs=ends).chunk(2, dim=-1)
    down = grouped_mm(module.act_fn(gate) * up, module.down_proj.bfloat16().mT, offs=ends)
    scattered = torch.empty_like(down).index_copy(0, order, down)
    return (scattered.view(tokens, k, -1) * weights[..., None]).sum(1).to(hidden.dtype)


ALL_EXPERTS_FUNCTIONS.register(NAME, forward)
