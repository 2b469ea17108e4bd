"""Normalizers: how scores become weights that are non-negative and sum to 1.

α-entmax (Peters et al., 2019, arXiv:1905.05702) is p = [(α-1) x - τ]₊^β with β = 1/(α-1), and τ such that Σp = 1.
α → 1 is softmax, α = 1.5 entmax15, α = 2 sparsemax (Martins & Astudillo, 2016, arXiv:1602.02068). The lower end
of a row gets exact zeros as soon as α > 1.

No sort: with z = (α-1)(x - max x) and w = (α-1) max x - τ, the norm ‖[z + w]₊‖_β is convex in w and rises with it, so
Newton's method on it from w = 1, where it is at least 1, comes down to the root without ever passing it. It is one
exact step where all scores tie, Michelot's algorithm for α = 2, and a handful of rounds otherwise.

The arithmetic is fp32 (fp64 for fp64 scores) whatever autocast says; the weights come back in the scores' dtype.
A score of -inf is a forbidden entry: its weight and its gradient are exactly 0.

A new normalizer is one function and one line in :data:`NORMALIZERS`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vit_attn.attention.names import unknown_name

# Newton needs 2 to 15 rounds; the limit is for rows whose sum rounding keeps above the tolerance.
_MAX_ROUNDS = 30


def _working_dtype(scores: Tensor) -> torch.dtype:
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def _powers(u: Tensor, beta: float | Tensor) -> tuple[Tensor, Tensor]:
    """Compute u^β and u^(β-1) of u >= 0, exactly 0 where u is 0."""
    if isinstance(beta, Tensor):
        p = u**beta
        # u^0 is 1 outside the support too (β = 1), hence the mask.
        return p, torch.where(u > 0, p / u.clamp_min(torch.finfo(u.dtype).tiny), 0)
    if beta == 1.0:
        return u, (u > 0).to(u.dtype)
    if beta == 2.0:
        return u * u, u
    p = u**beta
    return p, torch.where(u > 0, p / u.clamp_min(torch.finfo(u.dtype).tiny), 0)


def _solve(z: Tensor, beta: float | Tensor) -> Tensor:
    """Weights [z + w]₊^β with the w that makes the rows of the last dimension sum to 1.

    Args:
        z: (α-1) times the scores, shifted so that each row's largest is 0; -inf is forbidden.
        beta: 1/(α-1), a number or broadcastable to the rows.
    """
    # w itself, and not 1 - w: it is small where many scores are close, and a small number has fine steps.
    w = torch.ones_like(z[..., :1])
    tolerance = 32 * torch.finfo(z.dtype).eps
    for _ in range(_MAX_ROUNDS):
        p, slope = _powers((z + w).clamp_min(0), beta)
        total = p.sum(-1, keepdim=True)
        # Below 1 only by the rounding of a large step: from there Newton returns too.
        away = (total - 1).abs() > tolerance
        if not away.any():
            break
        # Newton on ‖u‖_β - 1; Σp - (Σp)^(1-1/β) = Σp·(1 - Σp^(-1/β)), written so that it is exact near Σp = 1.
        step = total * torch.expm1(-total.log() / beta) / slope.sum(-1, keepdim=True)
        w = w + torch.where(away, step, 0)
    return p / total


class _Entmax(torch.autograd.Function):
    """α-entmax over the last dimension; the backward pass needs the weights alone."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, alpha: Tensor | float) -> Tensor:
        with torch.autocast(scores.device.type, enabled=False):
            x = scores.to(_working_dtype(scores))
            a = alpha.to(x.dtype) if isinstance(alpha, Tensor) else alpha
            z = (x - x.amax(-1, keepdim=True)) * (a - 1)
            p = _solve(z, 1 / (a - 1))
        ctx.alpha = alpha if not isinstance(alpha, Tensor) else None
        ctx.save_for_backward(p, *([alpha] if isinstance(alpha, Tensor) else []))
        ctx.dtype = scores.dtype
        return p.to(scores.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        p, *rest = ctx.saved_tensors
        alpha = rest[0] if rest else ctx.alpha
        g = grad.to(p.dtype)
        a = alpha.to(p.dtype) if isinstance(alpha, Tensor) else alpha
        support = p > 0
        s = torch.where(support, p ** (2 - a), 0)
        share = s / s.sum(-1, keepdim=True)
        d_scores = s * g - share * (s * g).sum(-1, keepdim=True)
        d_alpha = None
        if isinstance(alpha, Tensor) and ctx.needs_input_grad[1]:
            # Correia et al., 2019, arXiv:1909.00015, proposition 1.
            plogp = torch.where(support, p * p.clamp_min(torch.finfo(p.dtype).tiny).log(), 0)
            entropy = plogp.sum(-1, keepdim=True)
            rate = (p - share) / (a - 1) ** 2 - (plogp - share * entropy) / (a - 1)
            d_alpha = (g * rate).sum_to_size(alpha.shape).to(alpha.dtype)
        return d_scores.to(ctx.dtype), d_alpha


def softmax(scores: Tensor, dim: int = -1) -> Tensor:
    """Softmax over ``dim`` in fp32 or fp64; weights in the scores' dtype."""
    return torch.softmax(scores, dim, dtype=_working_dtype(scores)).to(scores.dtype)


def sparsemax(scores: Tensor, dim: int = -1) -> Tensor:
    """Sparsemax, the Euclidean projection onto the simplex: entmax with α = 2."""
    return entmax(scores, 2.0, dim)


def entmax15(scores: Tensor, dim: int = -1) -> Tensor:
    """1.5-entmax."""
    return entmax(scores, 1.5, dim)


def entmax(scores: Tensor, alpha: float | Tensor = 1.5, dim: int = -1) -> Tensor:
    """α-entmax over ``dim``, exact, with gradients to the scores and to ``alpha``.

    Args:
        scores: any shape; -inf marks forbidden entries, of which no row may consist.
        alpha: in (1, 2], a number or a tensor that broadcasts with ``scores`` and has size 1 in ``dim``
            (one per head: shape (H, 1, 1) for scores (B, H, N, N)).
        dim: the dimension that sums to 1.

    Raises:
        ValueError: a number ``alpha`` outside (1, 2]. A tensor is not checked: that would wait for the GPU.
    """
    if isinstance(alpha, Tensor):
        if dim not in (-1, scores.dim() - 1):
            alpha = alpha.expand([1] * (scores.dim() - alpha.dim()) + list(alpha.shape)).movedim(dim, -1)
    else:
        check_alpha(alpha)
    if dim in (-1, scores.dim() - 1):
        return _Entmax.apply(scores, alpha)
    return _Entmax.apply(scores.movedim(dim, -1), alpha).movedim(-1, dim)


def check_alpha(alpha: float) -> None:
    """Refuse an α that entmax has no meaning for here.

    Raises:
        ValueError: α outside (1, 2].
    """
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 1 < alpha <= 2:
        raise ValueError(f"alpha must lie in (1, 2], not {alpha!r}; alpha = 1 is the softmax normalizer")


# Each takes (scores, alpha) and normalizes the last dimension; only entmax reads alpha.
NORMALIZERS: dict[str, Callable[[Tensor, float | Tensor], Tensor]] = {
    "softmax": lambda scores, alpha: softmax(scores),
    "sparsemax": lambda scores, alpha: sparsemax(scores),
    "entmax15": lambda scores, alpha: entmax15(scores),
    "entmax": entmax,
}


def check_normalizer(name: str) -> None:
    """Refuse a name that is no normalizer.

    Raises:
        ValueError: no such normalizer.
    """
    if name not in NORMALIZERS:
        raise ValueError(unknown_name("normalizer", name, NORMALIZERS))
