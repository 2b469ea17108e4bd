"""Linear attention (Katharopoulos et al., 2020, arXiv:2006.16236), every token seeing every other."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vit_attn.attention.kernelized import kernel_attention, kernel_cost, log_kernel_attention
from vit_attn.attention.mechanism import AttentionCost, Core, Mechanism, Tokens, in_working_dtype
from vit_attn.attention.options import option, register

_EPSILON = 1e-6  # in the denominator, as published
_RELU_EPSILON = 1e-6  # added to relu's features, of which a token could have none; rows then sum to 1 without the other


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1: x + 1 above 0, exp(x) below; F.elu(x) + 1 rounds to 0 below -17 in fp32."""
    return x.relu() + x.clamp_max(0).exp()


@register
@dataclass(frozen=True, kw_only=True)
class Linear(Mechanism):
    """weights = φ(q) φ(k)ᵀ divided by the sums of its rows, with φ(x) = elu(x) + 1; no scale on the scores.

    Every key gets a weight above 0, and the weights have at most rank D: parallel queries get equal rows.
    """

    name = "linear"

    feature_map: str = option("elu", choices=("elu", "relu", "exp"), help="φ: elu(x)+1, relu(x)+1e-6 or exp(x)")

    def build(self, num_heads: int, head_dim: int, layer: int = 0) -> Core:
        return LinearCore(self, num_heads, head_dim)


class LinearCore(Core):
    """Linear attention in one layer."""

    def __init__(self, mechanism: Linear, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.feature_map = mechanism.feature_map
        self.num_heads, self.head_dim = num_heads, head_dim

    @in_working_dtype
    def forward(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, drop: nn.Dropout | None = None) -> Tensor:
        if self.feature_map == "exp":
            return log_kernel_attention(q, k, v)
        if self.feature_map == "relu":
            return kernel_attention(q.relu() + _RELU_EPSILON, k.relu() + _RELU_EPSILON, v)
        return kernel_attention(elu_plus_one(q), elu_plus_one(k), v, _EPSILON)

    def cost(self, tokens: Tokens, device: torch.device) -> AttentionCost:
        return kernel_cost(self.num_heads, tokens.size, self.head_dim, self.head_dim)
