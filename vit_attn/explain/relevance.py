"""How much of each token reaches each other one through all layers: rollout, and gradient × attention."""

from collections.abc import Sequence

import torch
from torch import Tensor


def attention_rollout(weights: Sequence[Tensor]) -> Tensor:
    """Follow the attention through the layers (Abnar & Zuidema, 2020, arXiv:2005.00928).

    A layer is the mean over its heads, mixed half and half with the identity, which stands for the residual, and
    normalized by rows; the layers are multiplied, later ones from the left.

    Args:
        weights: of each layer, from the first on: (B, H, N, N), rows are queries.

    Returns:
        (B, N, N), at least fp32, each row sums to 1: the share of token j in what token i has become.
    """
    rolled: Tensor | None = None
    for layer in weights:
        mixed = 0.5 * _wide(layer.detach()).mean(dim=1) + 0.5 * _identity(layer)
        mixed = mixed / mixed.sum(dim=-1, keepdim=True)  # rows sum to 1 up to rounding, which layers would add up
        rolled = mixed if rolled is None else mixed @ rolled
    assert rolled is not None, "a model has layers"
    return rolled


def gradient_attention(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Follow the attention that raises a score (Chefer, Gur & Wolf, 2021, arXiv:2103.15679: self-attention).

    Ā = mean over heads of (∇A ⊙ A)⁺, and R ← R + Ā R from R = I, from the first layer to the last.

    Args:
        weights: of each layer, from the first on: (B, H, N, N), rows are queries.
        gradients: of the score with respect to each of them, of the same shapes.

    Returns:
        R (B, N, N), at least fp32: the relevance of token j for token i.
    """
    relevance: Tensor | None = None
    for layer, gradient in zip(weights, gradients, strict=True):
        raising = (_wide(layer.detach()) * _wide(gradient)).clamp(min=0).mean(dim=1)
        relevance = _identity(layer) if relevance is None else relevance
        relevance = relevance + raising @ relevance
    assert relevance is not None, "a model has layers"
    return relevance


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _identity(weights: Tensor) -> Tensor:
    """(1, N, N), for weights (B, H, N, N)."""
    return torch.eye(weights.shape[-1], dtype=_wide(weights[:0]).dtype, device=weights.device)[None]
