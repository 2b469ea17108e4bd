"""Efficient attention (Shen et al., WACV 2021, arXiv:1812.01243)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vit_attn.attention.kernelized import kernel_cost
from vit_attn.attention.mechanism import AttentionCost, Core, Mechanism, Tokens, in_working_dtype
from vit_attn.attention.options import register


@register
@dataclass(frozen=True, kw_only=True)
class Efficient(Mechanism):
    """weights = softmax of q over its features, times softmax of k over the tokens: rows sum to 1 as they are.

    No scale, as published; the projections and the residual of the paper's block are the Vision Transformer's own.
    """

    name = "efficient"

    def build(self, num_heads: int, head_dim: int, layer: int = 0) -> Core:
        return EfficientCore(num_heads, head_dim)


class EfficientCore(Core):
    """Efficient attention in one layer."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim

    @in_working_dtype
    def forward(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, drop: nn.Dropout | None = None) -> Tensor:
        context = k.softmax(-2).mT @ v  # (B, H, D, D)
        return q.softmax(-1) @ context

    def cost(self, tokens: Tokens, device: torch.device) -> AttentionCost:
        return kernel_cost(self.num_heads, tokens.size, self.head_dim, self.head_dim)
