"""Row kernels: scores (…, K) → weights (…, K), and their backward passes, for every normalizer.

The arithmetic is fp32 or fp64, that of the scores; each row needs one score that is finite. A forbidden entry is a
score of :func:`lowest`, or -inf: its weight is exactly 0, and so is its gradient.

A normalizer is its α, by way of its excess e = α - 1, whose digits would be lost in an α near 1: 0 is softmax, ½ is
entmax15, 1 is sparsemax.

α-entmax without a sort: with z = e (x - max x), β = 1/e and w = e max x - τ, the norm ‖[z + w]₊‖_β is convex in w and
rises with it, so Newton's method on it from w = 1, where it is at least 1, comes down to the root without passing
it: Michelot's algorithm for e = 1, one exact step where all scores tie. For e = ½ the quadratic that the current
support gives is solved exactly instead, which needs fewer rounds but has no such proof. An attempt takes as many rounds
as most rows need and says how far off it is; where that is too far, Newton goes on from there, in longer attempts.
"""

import torch
from torch import Tensor

from vit_attn.attention.compiled import compiled

# A float where the kernel has lines of its own: 0, ½ or 1. Otherwise data, broadcastable to the rows.
Excess = float | Tensor

# Rounds of attempts, one after the other until rows converge: 3 to 9 are usual, and rounding can keep a sum from its
# tolerance. Where α is data, a round costs a logarithm and an exponential per entry.
ROUNDS = (None, 8, 32)
_FIRST_ROUNDS = {0.5: 5, 1.0: 7}
_FIRST_ROUNDS_OF_DATA = 5


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
    # NaN is not: it may come of one row and hide the others.
    return bool(error <= 32 * torch.finfo(error.dtype).eps)


def attempt(x: Tensor, e: Excess, rounds: int | None = None, w: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of scores x (…, K), in a fixed number of rounds.

    Args:
        rounds: of Newton; None: those of a first attempt.
        w: (…, 1) to go on from.

    Returns:
        Weights, the w reached, and the largest distance of a row's sum from 1 before it was divided by it.
    """
    if isinstance(e, float) and e == 0.0:
        return x.softmax(-1), x.new_zeros(()), x.new_zeros(())
    z = (x - x.amax(-1, keepdim=True)) * e
    if w is None:
        w = torch.ones_like(z[..., :1]) if isinstance(e, float) else _upper_bound(z, e)
    if isinstance(e, float) and e == 0.5 and rounds is None:
        for _ in range(_FIRST_ROUNDS[e]):
            # Σ_S (z + w)² = 1 on the support S as it is
            u = (z + w).clamp_min(0)
            size, total = (u > 0).to(u.dtype).sum(-1, keepdim=True), u.sum(-1, keepdim=True)
            over = (u * u).sum(-1, keepdim=True) - 1
            w = w - over / (total + (total * total - size * over).clamp_min(0).sqrt())
    else:
        if rounds is None:
            rounds = _FIRST_ROUNDS[e] if isinstance(e, float) else _FIRST_ROUNDS_OF_DATA
        for _ in range(rounds):
            p, slope = _powers((z + w).clamp_min(0), e)
            total = p.sum(-1, keepdim=True)
            # Newton on ‖u‖_β - 1; Σp - (Σp)^(1-1/β) = Σp·(1 - Σp^(-1/β)), written so that it is exact near Σp = 1.
            w = (w + total * torch.expm1(-total.log() * e) / slope.sum(-1, keepdim=True)).clamp_max(1)
    p, _ = _powers((z + w).clamp_min(0), e)
    total = p.sum(-1, keepdim=True)
    return p / total, w, (total - 1).abs().amax()


def _upper_bound(z: Tensor, e: Tensor) -> Tensor:
    """A w that is not below the root: 1, or n^(-e) less the mean of the n scores above -1, which alone can count.

    That is the power mean inequality, and close where scores are.
    """
    near = z > -1
    size = near.to(z.dtype).sum(-1, keepdim=True)
    mean = torch.where(near, z, 0).sum(-1, keepdim=True) / size
    return (torch.exp(-size.log() * e) - mean).clamp_max(1)


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
    p, w = x, None
    for rounds in ROUNDS:
        p, w, error = _attempt_rows(x, e, rounds, w)
        if converged(error):
            break
    return p


def rows_gradient(p: Tensor, g: Tensor, e: Excess, to_alpha: bool) -> tuple[Tensor, Tensor]:
    """Gradients to the scores (R, K) of rows with weights p, and to α (R, 1), empty unless asked for."""
    d_alpha = p.new_empty(0)
    if to_alpha:
        assert isinstance(e, Tensor)
        d_alpha = _alpha_gradient_rows(p, g, e)
    return _scores_gradient_rows(p, g, e), d_alpha
