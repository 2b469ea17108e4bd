"""Normalizers: how scores become weights that are non-negative and sum to 1.

α-entmax (Peters et al., 2019, arXiv:1905.05702) is p = [(α-1) x - τ]₊^β with β = 1/(α-1), and τ such that Σp = 1.
α → 1 is softmax, α = 1.5 entmax15, α = 2 sparsemax (Martins & Astudillo, 2016, arXiv:1602.02068). The lower end
of a row gets exact zeros as soon as α > 1. How it is computed, without a sort: :mod:`vit_attn.attention.kernels`.

The arithmetic is fp32 (fp64 for fp64 scores) whatever autocast says; the weights come back in the scores' dtype.
A score of -inf is a forbidden entry: its weight and its gradient are exactly 0.

A new normalizer is one function and one line in :data:`NORMALIZERS`; one line in :data:`ALPHAS` where it is an
α-entmax, so that the sparse engine can run it too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vit_attn.attention import kernels
from vit_attn.attention.names import unknown_name


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all arithmetic on scores and weights."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Custom operators, so that torch.compile sees one node where kernels stop at a convergence that depends on the data.


@torch.library.custom_op("vit_attn::entmax", mutates_args=())
def _entmax(x: Tensor, alpha: float, alphas: Tensor | None) -> Tensor:
    """Rows x (R, K) to weights; ``alphas`` (R, 1) stands in for ``alpha``."""
    return kernels.normalize_rows(x, kernels.excess(alpha if alphas is None else alphas, x))


@_entmax.register_fake
def _(x: Tensor, alpha: float, alphas: Tensor | None) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("vit_attn::entmax_backward", mutates_args=())
def _entmax_backward(p: Tensor, g: Tensor, alpha: float, alphas: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients to x (R, K) and to ``alphas`` (R, 1), empty without."""
    e = kernels.excess(alpha if alphas is None else alphas, p)
    return kernels.rows_gradient(p, g.contiguous(), e, to_alpha=alphas is not None)


@_entmax_backward.register_fake
def _(p: Tensor, g: Tensor, alpha: float, alphas: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(p), p.new_empty(0) if alphas is None else torch.empty_like(alphas)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.alpha, alphas = inputs
    ctx.save_for_backward(output, alphas)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, Tensor | None]:
    p, alphas = ctx.saved_tensors
    d_x, d_alphas = _entmax_backward(p, g, ctx.alpha, alphas)
    return d_x, None, None if alphas is None else d_alphas


_entmax.register_autograd(_backward, setup_context=_keep_for_backward)


def softmax(scores: Tensor, dim: int = -1) -> Tensor:
    """Softmax over ``dim`` in fp32 or fp64; weights in the scores' dtype."""
    return torch.softmax(scores, dim, dtype=working_dtype(scores.dtype)).to(scores.dtype)


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
    if not isinstance(alpha, Tensor):
        check_alpha(alpha)
    scores = scores.movedim(dim, -1)
    rows = scores.to(working_dtype(scores.dtype)).reshape(-1, scores.shape[-1])
    alphas = None
    if isinstance(alpha, Tensor):
        alpha = alpha.to(rows.dtype).expand([1] * (scores.dim() - alpha.dim()) + list(alpha.shape)).movedim(dim, -1)
        alphas = alpha.expand(*scores.shape[:-1], 1).reshape(-1, 1)
    weights = _entmax(rows, 1.5 if alphas is not None else float(alpha), alphas)
    return weights.view(scores.shape).to(scores.dtype).movedim(-1, dim)


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

# The α of each normalizer that is an α-entmax; None where it is the caller's.
ALPHAS: dict[str, float | None] = {"softmax": 1.0, "sparsemax": 2.0, "entmax15": 1.5, "entmax": None}


def check_normalizer(name: str) -> None:
    """Refuse a name that is no normalizer.

    Raises:
        ValueError: no such normalizer.
    """
    if name not in NORMALIZERS:
        raise ValueError(unknown_name("normalizer", name, NORMALIZERS))
