"""Row kernels: scores (R, K) → weights (R, K), and their backward passes, for every normalizer.

Rows are independent and contiguous, fp32 or fp64, at least one finite score in each. A forbidden entry is a score of
:func:`lowest`, or -inf: its weight is exactly 0.

Each kernel is plain PyTorch. Where there is a C++ compiler (Triton on CUDA) and enough rows to pay for it,
``torch.compile`` makes one pass of it; elsewhere the same lines run as they are.

α-entmax without a sort: with z = (α-1)(x - max x), β = 1/(α-1) and w = (α-1) max x - τ, the norm ‖[z + w]₊‖_β is
convex in w and rises with it, so Newton's method on it from w = 1, where it is at least 1, comes down to the root
without passing it: Michelot's algorithm for α = 2, one exact step where all scores tie. For α = 1.5 the quadratic
that the current support gives is solved exactly instead, which needs fewer rounds but has no such proof: whatever a
first batch of rounds leaves unsolved, Newton finishes.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

# Compiling takes seconds, once per kind of row: not for fewer entries than this.
COMPILE_FROM = 2**18
# Newton needs 2 to 15 rounds; the limit is for rows whose sum rounding keeps above the tolerance.
MAX_ROUNDS = 40
# Rounds of the first batch, in one pass, by α-1; most rows need no more.
_FIRST_ROUNDS = {1.0: 6, 0.5: 5}
_ROUNDS = 5

Number = float | Tensor  # a number, or one for each row: (R, 1), or (1, 1) for all


def lowest(dtype: torch.dtype) -> float:
    """A score that no allowed entry has: finite, so that no arithmetic on it gives NaN."""
    return torch.finfo(dtype).min / 4


class _Compiled:
    """A kernel, compiled where that pays: once per width of rows and kind of arguments, for any number of rows.

    Args:
        function: takes rows first; further tensors have as many rows, or one.
    """

    works = True  # until a compiler was missing, for all kernels

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.compiled = torch.compile(function)

    def __call__(self, rows: Tensor, *args: Any) -> Any:
        if not _Compiled.works or rows.numel() < COMPILE_FROM:
            return self.function(rows, *args)
        for tensor in (rows, *args):
            if isinstance(tensor, Tensor) and tensor.shape[0] > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        try:
            # A model may have rows of many widths, and each is faster when its width is a constant.
            with torch._dynamo.config.patch(recompile_limit=256, automatic_dynamic_shapes=False):
                return self.compiled(rows, *args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler or its absence may raise; the plain lines raise what is real
            result = self.function(rows, *args)
            _Compiled.works = False
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.warning("attention runs without compiled kernels, which is slower: %s", reason)
            return result


def _rounds(
    z: Tensor, w: Tensor, out: Tensor, beta: Number, count: int, quadratic: bool = False
) -> tuple[Tensor, Tensor]:
    """Take ``count`` steps from ``w`` (R, 1), and write [z + w]₊^β, normalized, to ``out``.

    Returns:
        The new w, and the largest distance of a row's sum from 1 before normalizing.
    """
    for _ in range(count):
        u = (z + w).clamp_min(0)
        if quadratic:  # β = 2: Σ_S (z + w)² = 1 solved on the support S as it is
            size, total = (u > 0).to(u.dtype).sum(-1, keepdim=True), u.sum(-1, keepdim=True)
            excess = (u * u).sum(-1, keepdim=True) - 1
            w = w - excess / (total + (total * total - size * excess).clamp_min(0).sqrt())
            continue
        p, slope = _powers(u, beta)
        total = p.sum(-1, keepdim=True)
        # Newton on ‖u‖_β - 1; Σp - (Σp)^(1-1/β) = Σp·(1 - Σp^(-1/β)), written so that it is exact near Σp = 1.
        w = w + total * torch.expm1(-total.log() / beta) / slope.sum(-1, keepdim=True)
    p, _ = _powers((z + w).clamp_min(0), beta)
    total = p.sum(-1, keepdim=True)
    out.copy_(p / total)
    return w, (total - 1).abs().amax()


def _powers(u: Tensor, beta: Number) -> tuple[Tensor, Tensor]:
    """Compute u^β and u^(β-1) of u >= 0, exactly 0 where u is 0."""
    if isinstance(beta, float):
        if beta == 1.0:
            return u, (u > 0).to(u.dtype)
        if beta == 2.0:
            return u * u, u
    tiny = u.clamp_min(torch.finfo(u.dtype).tiny)
    p = torch.where(u > 0, torch.exp(beta * tiny.log()), 0)
    # u^0 is 1 outside the support too (β = 1), hence the mask.
    return p, torch.where(u > 0, p / tiny, 0)


# Below, e = α-1: in fp32, α itself would lose the digits of an e that is small.


def _first(x: Tensor, out: Tensor, e: Number) -> tuple[Tensor, Tensor]:
    z = (x - x.amax(-1, keepdim=True)) * e
    w = torch.ones_like(z[:, :1])
    if isinstance(e, float):
        return _rounds(z, w, out, 1 / e, _FIRST_ROUNDS[e], quadratic=e == 0.5)
    return _rounds(z, w, out, 1 / e, _ROUNDS)


def _further(x: Tensor, out: Tensor, w: Tensor, e: Number) -> tuple[Tensor, Tensor]:
    z = (x - x.amax(-1, keepdim=True)) * e
    return _rounds(z, w.clamp_max(1), out, 1 / e, _ROUNDS)


def _sensitivity(p: Tensor, e: Number) -> Tensor:
    """Compute p^(2-α) on the support, 0 elsewhere."""
    if isinstance(e, float):
        return (p > 0).to(p.dtype) if e == 1.0 else p.sqrt()
    return torch.where(p > 0, torch.exp((1 - e) * p.clamp_min(torch.finfo(p.dtype).tiny).log()), 0)


def _entmax_backward(p: Tensor, g: Tensor, out: Tensor, e: Number) -> None:
    s = _sensitivity(p, e)
    sg = s * g
    out.copy_(sg - s * (sg.sum(-1, keepdim=True) / s.sum(-1, keepdim=True)))


def _alpha_backward(p: Tensor, g: Tensor, e: Tensor) -> Tensor:
    s = _sensitivity(p, e)
    share = s / s.sum(-1, keepdim=True)
    plogp = p * p.clamp_min(torch.finfo(p.dtype).tiny).log()
    entropy = plogp.sum(-1, keepdim=True)
    rate = (p - share) / e**2 - (plogp - share * entropy) / e
    return (g * rate).sum(-1, keepdim=True)


_first_rounds, _further_rounds = _Compiled(_first), _Compiled(_further)
_entmax_gradient, _alpha_gradient = _Compiled(_entmax_backward), _Compiled(_alpha_backward)


def _e(alpha: Number, x: Tensor) -> Number:
    if isinstance(alpha, Tensor):
        return alpha.to(x.dtype) - 1
    # These two have kernels of their own; the others share one, which takes its α as data.
    return alpha - 1 if alpha in (1.5, 2.0) else torch.full((1, 1), alpha - 1, dtype=x.dtype, device=x.device)


def normalize(x: Tensor, alpha: Number, out: Tensor) -> Tensor:
    """Write the weights of each row of scores x to ``out``, both (R, K): α-entmax, softmax for α = 1.

    Args:
        alpha: in [1, 2], or a tensor (R, 1) in (1, 2].

    Returns:
        ``out``.
    """
    if isinstance(alpha, float) and alpha == 1.0:
        return torch.softmax(x, -1, out=out)
    e = _e(alpha, x)
    w, error = _first_rounds(x, out, e)
    rounds = _ROUNDS
    while error > 32 * torch.finfo(x.dtype).eps and rounds < MAX_ROUNDS:
        w, error = _further_rounds(x, out, w, e)
        rounds += _ROUNDS
    return out


def scores_gradient(p: Tensor, g: Tensor, alpha: Number, out: Tensor) -> Tensor:
    """Write the gradient to the scores of rows with weights p to ``out``, given that to the weights; all (R, K).

    Returns:
        ``out``.
    """
    if isinstance(alpha, float) and alpha == 1.0:
        return torch.ops.aten._softmax_backward_data.out(g, p, -1, p.dtype, grad_input=out)
    _entmax_gradient(p, g, out, _e(alpha, p))
    return out


def alpha_gradient(p: Tensor, g: Tensor, alpha: Tensor) -> Tensor:
    """Gradient to each row's α, (R, 1): Correia et al., 2019, arXiv:1909.00015, proposition 1."""
    e = _e(alpha, p)
    assert isinstance(e, Tensor)
    return _alpha_gradient(p, g, e)
