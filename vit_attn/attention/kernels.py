"""Row kernels: scores (…, K) → weights (…, K), and their backward passes, for every normalizer.

The arithmetic is fp32 or fp64, that of the scores; each row needs one score that is finite. A forbidden entry is a
score of :func:`lowest`, or -inf: its weight is exactly 0, and so is its gradient.

A normalizer is its α, by way of its excess e = α - 1, whose digits would be lost in an α near 1: 0 is softmax, ½ is
entmax15, 1 is sparsemax.

α-entmax without a sort: with z = e (x - max x), β = 1/e and w = e max x - τ, the norm ‖[z + w]₊‖_β is convex in w and
rises with it, so Newton's method on it from w = 1, where it is at least 1, comes down to the root without passing
it: Michelot's algorithm for e = 1, one exact step where all scores tie. For e = ½ the quadratic that the current
support gives is solved exactly instead, which needs fewer rounds but has no such proof. A first attempt takes as many
rounds as nearly all rows need and says how far off it is; where that is too far, the second takes many, of Newton's.
"""

import torch
from torch import Tensor

from vit_attn.attention.compiled import compiled

# A float where the kernel has lines of its own: 0, ½ or 1. Otherwise data, broadcastable to the rows.
Excess = float | Tensor

# Rounds of the first attempt; of any row, at most: 3 to 7 are usual, and rounding can keep a sum from its tolerance.
_ROUNDS = {0.5: 5, 1.0: 7}
_ROUNDS_OF_DATA = 6
_MANY_ROUNDS = 50


def lowest(dtype: torch.dtype) -> float:
    """A score that no allowed entry has: finite, so that no arithmetic on it gives NaN."""
    return torch.finfo(dtype).min / 4


def excess(alpha: float | Tensor, like: Tensor) -> Excess:
    """e of an α in [1, 2], in the dtype of ``like``; a number that has no lines of its own as a tensor (1, 1)."""
    if isinstance(alpha, Tensor):
        return alpha.to(like.dtype) - 1
    return alpha - 1.0 if alpha in (1.0, 1.5, 2.0) else like.new_full((1, 1), alpha - 1.0)


def converged(error: Tensor) -> bool:
    """Whether an attempt's rows sum to 1 up to rounding; waits for the device."""
    return not bool(error > 32 * torch.finfo(error.dtype).eps)


def attempt(x: Tensor, e: Excess, thorough: bool = False) -> tuple[Tensor, Tensor]:
    """Weights of scores x (…, K), in a fixed number of rounds.

    Args:
        thorough: take as many rounds as any row needs.

    Returns:
        Weights, and the largest distance of a row's sum from 1 before it was divided by it.
    """
    if isinstance(e, float) and e == 0.0:
        return x.softmax(-1), x.new_zeros(())
    z = (x - x.amax(-1, keepdim=True)) * e
    w = torch.ones_like(z[..., :1])
    if isinstance(e, float) and e == 0.5 and not thorough:
        for _ in range(_ROUNDS[e]):
            # Σ_S (z + w)² = 1 on the support S as it is
            u = (z + w).clamp_min(0)
            size, total = (u > 0).to(u.dtype).sum(-1, keepdim=True), u.sum(-1, keepdim=True)
            over = (u * u).sum(-1, keepdim=True) - 1
            w = w - over / (total + (total * total - size * over).clamp_min(0).sqrt())
    else:
        rounds = _ROUNDS[e] if isinstance(e, float) else _ROUNDS_OF_DATA
        for _ in range(_MANY_ROUNDS if thorough else rounds):
            p, slope = _powers((z + w).clamp_min(0), e)
            total = p.sum(-1, keepdim=True)
            # Newton on ‖u‖_β - 1; Σp - (Σp)^(1-1/β) = Σp·(1 - Σp^(-1/β)), written so that it is exact near Σp = 1.
            w = w + total * torch.expm1(-total.log() * e) / slope.sum(-1, keepdim=True)
    p, _ = _powers((z + w).clamp_min(0), e)
    total = p.sum(-1, keepdim=True)
    return p / total, (total - 1).abs().amax()


def _powers(u: Tensor, e: Excess) -> tuple[Tensor, Tensor]:
    """Compute u^β and u^(β-1) of u >= 0, exactly 0 where u is 0."""
    if isinstance(e, float):
        return (u, (u > 0).to(u.dtype)) if e == 1.0 else (u * u, u)
    tiny = u.clamp_min(torch.finfo(u.dtype).tiny)
    p = torch.where(u > 0, torch.exp(tiny.log() / e), 0)
    # u^0 is 1 outside the support too (β = 1), hence the mask.
    return p, torch.where(u > 0, p / tiny, 0)


def scores_gradient(p: Tensor, g: Tensor, e: Excess) -> Tensor:
    """Gradient to the scores of rows with weights p, given that to the weights; all (…, K)."""
    s = _sensitivity(p, e)
    sg = s * g
    # Softmax's weights sum to 1 as they are.
    total = 1.0 if isinstance(e, float) and e == 0.0 else s.sum(-1, keepdim=True)
    return sg - s * (sg.sum(-1, keepdim=True) / total)


def _sensitivity(p: Tensor, e: Excess) -> Tensor:
    """Compute p^(2-α) on the support, 0 elsewhere."""
    if isinstance(e, float):
        return {0.0: lambda: p, 0.5: p.sqrt, 1.0: lambda: (p > 0).to(p.dtype)}[e]()
    return torch.where(p > 0, torch.exp((1 - e) * p.clamp_min(torch.finfo(p.dtype).tiny).log()), 0)


def alpha_gradient(p: Tensor, g: Tensor, e: Tensor) -> Tensor:
    """Gradient to each row's α, (…, 1): Correia et al., 2019, arXiv:1909.00015, proposition 1."""
    s = _sensitivity(p, e)
    share = s / s.sum(-1, keepdim=True)
    plogp = p * p.clamp_min(torch.finfo(p.dtype).tiny).log()
    entropy = plogp.sum(-1, keepdim=True)
    rate = (p - share) / e**2 - (plogp - share * entropy) / e
    return (g * rate).sum(-1, keepdim=True)


_attempt_rows = compiled(attempt)
_scores_gradient_rows = compiled(scores_gradient)
_alpha_gradient_rows = compiled(alpha_gradient)


def normalize_rows(x: Tensor, e: Excess) -> Tensor:
    """Weights of each row of scores x (R, K); e is a number, (1, 1) or (R, 1)."""
    if isinstance(e, float) and e == 0.0:
        return x.softmax(-1)
    p, error = _attempt_rows(x, e)
    return p if converged(error) else attempt(x, e, thorough=True)[0]


def rows_gradient(p: Tensor, g: Tensor, e: Excess, to_alpha: bool) -> tuple[Tensor, Tensor]:
    """Gradients to the scores (R, K) of rows with weights p, and to α (R, 1), empty unless asked for."""
    d_alpha = p.new_empty(0)
    if to_alpha:
        assert isinstance(e, Tensor)
        d_alpha = _alpha_gradient_rows(p, g, e)
    return _scores_gradient_rows(p, g, e), d_alpha
