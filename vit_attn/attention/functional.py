"""attention(q, k, v, …): one front door, several exact implementations behind it.

    weights = normalizer(q kᵀ · scale, over the keys that the pattern allows);  out = weights v

Every implementation that accepts a case gives the same answer; one that does not, refuses by name. A new one is
a function with the signature of :func:`_dense` and a line in :data:`IMPLEMENTATIONS`.
"""

from collections.abc import Callable
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_attn.attention.blocks import make_plan
from vit_attn.attention.engine import blocks
from vit_attn.attention.names import unknown_name
from vit_attn.attention.normalizers import ALPHAS, NORMALIZERS, check_alpha, check_normalizer, working_dtype
from vit_attn.attention.patterns import Full, Pattern, make_pattern


def _is_full(pattern: Pattern | None) -> bool:
    return pattern is None or (isinstance(pattern, Full) and not pattern.causal)


def allowed_mask(pattern: Pattern | None, device: torch.device) -> Tensor | None:
    """(N, N) bool of what ``pattern`` allows, kept with the pattern; None where nothing is forbidden."""
    if pattern is None or _is_full(pattern):
        return None
    mask = pattern.masks.get(device)
    if mask is None:
        mask = pattern.masks[device] = pattern.allowed(device)
    return mask


def _factor(q: Tensor, scale: float | None) -> float:
    return float(q.shape[-1] ** -0.5) if scale is None else scale


def _dropout_p(attn_drop: nn.Dropout | None) -> float:
    return attn_drop.p if attn_drop is not None and attn_drop.training else 0.0


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    normalizer: str,
    pattern: Pattern | None,
    alpha: float | Tensor,
    scale: float | None,
    attn_drop: nn.Dropout | None,
    return_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Masked scores, in fp32 whatever autocast says: the reference, and the one whose weights can be seen."""
    with torch.autocast(q.device.type, enabled=False):
        wide = working_dtype(q.dtype)
        scores = (q.to(wide) * _factor(q, scale)) @ k.to(wide).transpose(-2, -1)
        mask = allowed_mask(pattern, q.device)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        if isinstance(alpha, Tensor):
            alpha = alpha[:, None, None]
        weights = NORMALIZERS[normalizer](scores, alpha)
        if attn_drop is not None:
            weights = attn_drop(weights)
        return (weights @ v.to(wide)).to(v.dtype), weights


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    normalizer: str,
    pattern: Pattern | None,
    alpha: float | Tensor,
    scale: float | None,
    attn_drop: nn.Dropout | None,
    return_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """torch's scaled_dot_product_attention, which never shows its weights."""
    mask = allowed_mask(pattern, q.device)
    dropout_p = _dropout_p(attn_drop)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale), None


def _blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    normalizer: str,
    pattern: Pattern | None,
    alpha: float | Tensor,
    scale: float | None,
    attn_drop: nn.Dropout | None,
    return_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """The sparse engine: allowed entries alone, see :mod:`vit_attn.attention.engine`."""
    known = ALPHAS[normalizer]
    pattern = None if _is_full(pattern) else pattern
    number = alpha if known is None else known
    return blocks(q, k, v, pattern, number, _factor(q, scale), _dropout_p(attn_drop), return_weights)


IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "dense": _dense,
    "fused": _fused,
    "blocks": _blocks,
}


# `auto` takes the engine where it computes at most this share of the N x N scores; measured, see docs/benchmarks.md.
_MOST_SCORES = 1 / 3
# On a GPU a fused kernel has more of a lead, and this is a guess until it is measured.
_MOST_SCORES_ON_GPU = 1 / 8
# Above so many keys the dense scores of a normalizer other than softmax take too much memory: the engine's do not.
_MOST_DENSE_KEYS = 1024


def _choose(normalizer: str, pattern: Pattern | None, device: torch.device, num_keys: int) -> str:
    if normalizer in ALPHAS:
        if pattern is not None and pattern.layout() is not None:
            most = _MOST_SCORES if device.type == "cpu" else _MOST_SCORES_ON_GPU
            if make_plan(pattern, device).scores <= most * pattern.size**2:
                return "blocks"
        if normalizer != "softmax" and num_keys > _MOST_DENSE_KEYS:
            return "blocks"
    return "fused" if normalizer == "softmax" else "dense"


def choose_implementation(
    implementation: str,
    normalizer: str,
    pattern: Pattern | None = None,
    *,
    device: torch.device | None = None,
    num_keys: int = 0,
    return_weights: bool = False,
) -> str:
    """Resolve ``auto``, and refuse what an implementation cannot do.

    Args:
        pattern, device, num_keys: what ``auto`` decides by, see ``docs/benchmarks.md``.

    Returns:
        A key of :data:`IMPLEMENTATIONS`.

    Raises:
        ValueError: an unknown name, or a case that the implementation does not take.
    """
    if implementation == "auto":
        if return_weights:
            return "dense"
        return _choose(normalizer, pattern, device or torch.device("cpu"), num_keys)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(unknown_name("implementation", implementation, ["auto", *IMPLEMENTATIONS]))
    if implementation == "fused" and normalizer != "softmax":
        raise ValueError(f"implementation 'fused' computes softmax only, not {normalizer!r}: use 'auto' or 'dense'")
    if implementation == "fused" and return_weights:
        raise ValueError("implementation 'fused' never forms the weights: use 'auto' or 'dense' to see them")
    if implementation == "blocks" and normalizer not in ALPHAS:
        raise ValueError(f"implementation 'blocks' computes softmax and entmax, not {normalizer!r}: use 'dense'")
    return implementation


def explain_choice(chosen: str, pattern: Pattern | None, device: torch.device) -> str:
    """Say in a few words why ``auto`` chose as it did."""
    if pattern is None or pattern.layout() is None:
        reasons = {"blocks": "whole rows, a few at a time", "dense": "whole rows", "fused": "torch's own kernel"}
        return reasons[chosen]
    share = make_plan(pattern, device).scores / pattern.size**2
    if chosen == "blocks":
        return f"computes {100 * share:.1f} % of the scores"
    return f"blocks would compute {100 * share:.0f} % of the scores: too many to gain"


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    normalizer: str = ...,
    pattern: Pattern | str | None = ...,
    alpha: float | Tensor = ...,
    scale: float | None = ...,
    implementation: str = ...,
    attn_drop: nn.Dropout | None = ...,
    return_weights: Literal[False] = ...,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    normalizer: str = ...,
    pattern: Pattern | str | None = ...,
    alpha: float | Tensor = ...,
    scale: float | None = ...,
    implementation: str = ...,
    attn_drop: nn.Dropout | None = ...,
    *,
    return_weights: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    normalizer: str = "softmax",
    pattern: Pattern | str | None = None,
    alpha: float | Tensor = 1.5,
    scale: float | None = None,
    implementation: str = "auto",
    attn_drop: nn.Dropout | None = None,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of queries over the keys that a pattern allows.

    Args:
        q, k, v: (B, H, N, D).
        normalizer: softmax, sparsemax, entmax15 or entmax.
        pattern: from :func:`make_pattern`, of size N; a name stands for that pattern with its defaults over N patch
            tokens in a square grid; None allows every key.
        alpha: for ``entmax`` only: a number in (1, 2], or a tensor of shape (H,), which then gets a gradient.
        scale: factor on the scores; default D^-0.5.
        implementation: auto, dense, fused or blocks.
        attn_drop: dropout on the weights, acting when it is in training mode.
        return_weights: return the weights beside the output, (B, H, N, N), after dropout; rows sum to 1 without it.

    Returns:
        (B, H, N, D) in v's dtype, or that and the weights.

    Raises:
        ValueError: names, shapes, α or an implementation that do not fit.
    """
    check_normalizer(normalizer)
    if isinstance(pattern, str):
        pattern = make_pattern(pattern, num_tokens=q.shape[-2])
    if pattern is not None and not q.shape[-2] == k.shape[-2] == pattern.size:
        raise ValueError(f"a pattern over {pattern.size} tokens met {q.shape[-2]} queries, {k.shape[-2]} keys")
    if normalizer == "entmax":
        if isinstance(alpha, Tensor):
            if alpha.numel() not in (1, q.shape[1]):
                raise ValueError(f"alpha has {alpha.numel()} values for {q.shape[1]} heads")
            alpha = alpha.reshape(-1).expand(q.shape[1])
        else:
            check_alpha(alpha)
    chosen = choose_implementation(
        implementation, normalizer, pattern, device=q.device, num_keys=k.shape[-2], return_weights=return_weights
    )
    out, weights = IMPLEMENTATIONS[chosen](q, k, v, normalizer, pattern, alpha, scale, attn_drop, return_weights)
    if not return_weights:
        return out
    assert weights is not None
    return out, weights
