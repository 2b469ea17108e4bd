"""Performer, or FAVOR+ (Choromanski et al., 2021, arXiv:2009.14794): softmax by random features."""

import hashlib
import math
from dataclasses import dataclass
from typing import List  # noqa: UP035  # torch.jit reads List

import torch
from torch import Tensor, nn

from vit_attn.attention.kernelized import kernel_attention, kernel_cost, log_kernel_attention
from vit_attn.attention.mechanism import AttentionCost, Core, Mechanism, Tokens, in_working_dtype
from vit_attn.attention.options import option, register

_RELU_EPSILON = 1e-3  # as published


@register
@dataclass(frozen=True, kw_only=True)
class Performer(Mechanism):
    """weights = φ(q) φ(k)ᵀ divided by the sums of its rows, with random features whose mean is softmax's exp(q·k).

    With x' = x D^-¼ and orthogonal Ω (m, D): φ(x) = exp(Ω x' - |x'|²/2), or for ``feature_map`` relu
    max(Ω x', 0) + 1e-3, which approximates nothing. Public implementations add 1e-4 to every feature, which at large
    scores becomes all of it, so that the output is the mean of v; here the features are exact.
    """

    name = "performer"

    features: int | None = option(least=1, help="random features m; default: D ln D, 266 for heads of 64")
    feature_map: str = option("softmax", choices=("softmax", "relu"), help="φ")
    redraw: int = option(1000, least=0, help="optimizer steps from one draw of the features to the next; 0: one draw")

    def build(self, num_heads: int, head_dim: int, layer: int = 0) -> Core:
        return PerformerCore(self, num_heads, head_dim, layer)


class PerformerCore(Core):
    """Performer in one layer. Its features are a buffer, written as a function of seed, layer and redraw alone."""

    features: Tensor

    def __init__(self, mechanism: Performer, num_heads: int, head_dim: int, layer: int) -> None:
        super().__init__()
        self.feature_map, self.redraw = mechanism.feature_map, mechanism.redraw
        self.num_heads, self.head_dim = num_heads, head_dim
        self.num_features = mechanism.features or max(1, round(head_dim * math.log(head_dim)))
        self._drawn: tuple[int, int, int] | None = None
        # Of the seed that was last given to torch, so that nothing is drawn from its generator.
        self.register_buffer("features", self._draw(torch.initial_seed(), layer, 0))  # (m, D)

    def _draw(self, seed: int, layer: int, number: int) -> Tensor:
        digest = hashlib.sha256(f"performer {seed} {layer} {number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return orthogonal_features(self.num_features, self.head_dim, generator)

    def on_step(self, step: int, *, seed: int, layer: int) -> None:
        wanted = (seed, layer, step // self.redraw) if self.redraw else self._drawn
        if wanted is not None and wanted != self._drawn:
            self.features.copy_(self._draw(*wanted))
            self._drawn = wanted

    @in_working_dtype
    def forward(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, drop: nn.Dropout | None = None) -> Tensor:
        features = self.features.to(q.dtype)
        q, k = (x * self.head_dim**-0.25 for x in (q, k))
        on_q, on_k = q @ features.mT, k @ features.mT  # (B, H, N, m)
        if self.feature_map == "relu":
            return kernel_attention(on_q.relu() + _RELU_EPSILON, on_k.relu() + _RELU_EPSILON, v)
        # |q'|² is one factor of all features of a query, and cancels.
        return log_kernel_attention(on_q, on_k - k.square().sum(-1, keepdim=True) / 2, v)

    def cost(self, tokens: Tokens, device: torch.device) -> AttentionCost:
        sizes = self.num_heads, tokens.size, self.head_dim, self.num_features
        return kernel_cost(*sizes, per_token=4 * self.num_features * self.head_dim)

    def tensors(self) -> List[Tensor]:  # noqa: UP006
        return [self.features]


def orthogonal_features(num_features: int, dim: int, generator: torch.Generator) -> Tensor:
    """(num_features, dim) fp32 on the CPU: blocks of orthogonal rows, as long as rows of N(0, I) are."""
    blocks = []
    for _ in range(-(-num_features // dim)):
        # In fp64, so that machines differ in the last digits of the decomposition at most where fp32 has none.
        q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
        blocks.append((q * r.diagonal().sign()).mT)  # without the signs, not uniform over the rotations
    lengths = torch.randn(num_features, dim, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
    return (torch.cat(blocks)[:num_features] * lengths).float()
