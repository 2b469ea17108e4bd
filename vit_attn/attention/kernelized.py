"""Attention with a kernel: weights φ(q) φ(k)ᵀ divided by the sums of their rows, in O(N) and never formed.

Shared by the mechanisms whose similarity is an inner product of features; see :mod:`vit_attn.attention.kinds`.
"""

from torch import Tensor

from vit_attn.attention.mechanism import AttentionCost


def kernel_attention(q: Tensor, k: Tensor, v: Tensor, epsilon: float = 0.0) -> Tensor:
    """Output (B, H, N, D) of features that are not negative.

    Args:
        q, k: φ(q), φ(k), (B, H, N, m).
        v: (B, H, N, D).
        epsilon: added to the sum of each row.
    """
    total = q @ k.sum(-2)[..., None]  # (B, H, N, 1)
    return q @ (k.mT @ v) / (total + epsilon)


def log_kernel_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Output (B, H, N, D) of features that are given by their logarithms, without overflow or a sum of 0.

    Each key feature is divided by its largest value over the keys, and the query feature multiplied by it; then each
    query's features are divided by their largest. Both cancel in the quotient, so the result is exact, and every sum is
    at least 1. One maximum for all key features, as usual, lets the sums of distant queries underflow instead.

    Args:
        q, k: log φ(q), log φ(k), (B, H, N, m).
        v: (B, H, N, D).
    """
    largest = k.detach().amax(-2, keepdim=True)  # (B, H, 1, m)
    q = q + largest
    return kernel_attention((q - q.detach().amax(-1, keepdim=True)).exp(), (k - largest).exp(), v)


def kernel_cost(num_heads: int, num_tokens: int, head_dim: int, features: int, per_token: int = 0) -> AttentionCost:
    """What the two products of a mechanism with a kernel take for one image.

    Args:
        features: m.
        per_token: multiplications and additions per token and head that make the features of q and k.
    """
    flops = num_heads * num_tokens * (4 * features * head_dim + per_token)
    why = f"{features} features per token, no weights are formed"
    return AttentionCost(flops=flops, needed_flops=flops, entries=None, implementation="kernel", why=why)
