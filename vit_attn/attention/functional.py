"""attention(q, k, v, …): one front door, several exact implementations behind it.

    weights = normalizer(q kᵀ · scale, over the keys that the pattern allows);  out = weights v

Every implementation that accepts a case gives the same answer; one that does not, refuses by name. A new one is
a function with the signature of :func:`_dense` and a line in :data:`IMPLEMENTATIONS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_attn.attention.engine import blocks, make_plan
from vit_attn.attention.graphs import forward_mode, outside_of_graphs
from vit_attn.attention.mechanism import apply_weights, working_dtype
from vit_attn.attention.names import unknown_name
from vit_attn.attention.normalizers import NORMALIZERS, Normalizer
from vit_attn.attention.normalizers.entmax import check_alpha
from vit_attn.attention.patterns import Pattern, make_pattern
from vit_attn.attention.patterns.base import pattern_of


@dataclass(frozen=True, eq=False)
class Rule:
    """How scores become weights.

    Args:
        normalizer: see :mod:`vit_attn.attention.normalizers`.
        number: of the normalizer, such as α, or (H,).
        pattern: the key of a pattern over N tokens; empty where every key is allowed.
        scale: factor on the scores; None: D^-0.5.
    """

    normalizer: Normalizer
    number: float | Tensor
    pattern: str = ""
    scale: float | None = None

    def factor(self, q: Tensor) -> float:
        """The factor on the scores."""
        return float(q.shape[-1] ** -0.5) if self.scale is None else self.scale


# What follows is told of patterns by their keys: torch.compile runs it once and takes the result for a constant, of
# which arguments must be constants, too.


@torch.compiler.assume_constant_result
def key_of(pattern: Pattern) -> str:
    """The key of a pattern over tokens; empty where it allows every key."""
    return "" if pattern.is_full else pattern.key


@torch.compiler.assume_constant_result
def allowed_mask(pattern: str, device: str) -> Tensor:
    """(N, N) bool of what the pattern of this key allows, kept with the pattern."""
    masks = pattern_of(pattern).masks
    if device not in masks:
        with outside_of_graphs():
            masks[device] = pattern_of(pattern).allowed(device)
    return masks[device]


def dense_weights(q: Tensor, k: Tensor, rule: Rule) -> Tensor:
    """(B, H, N, N) in fp32 or fp64: masked scores, normalized."""
    with torch.autocast(q.device.type, enabled=False):
        dtype = working_dtype(q.dtype)
        scores = (q.to(dtype) * rule.factor(q)) @ k.to(dtype).transpose(-2, -1)
        if rule.pattern:
            scores = scores.masked_fill(~allowed_mask(rule.pattern, str(q.device)), float("-inf"))
        return rule.normalizer.weights(scores, rule.number)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, rule: Rule, attn_drop: nn.Dropout | None, return_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Masked scores, in fp32 whatever autocast says: the reference, and the one whose weights can be seen."""
    return apply_weights(dense_weights(q, k, rule), v, attn_drop)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, rule: Rule, attn_drop: nn.Dropout | None, return_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """torch's scaled_dot_product_attention, which never shows its weights."""
    mask = allowed_mask(rule.pattern, str(q.device)) if rule.pattern else None
    dropout_p = _dropout_p(attn_drop)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=rule.scale), None


def _blocks(
    q: Tensor, k: Tensor, v: Tensor, rule: Rule, attn_drop: nn.Dropout | None, return_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """The sparse engine: allowed entries alone, see :mod:`vit_attn.attention.engine`."""
    name, factor = rule.normalizer.name, rule.factor(q)
    return blocks(q, k, v, rule.pattern, name, rule.number, factor, _dropout_p(attn_drop), return_weights)


def _dropout_p(attn_drop: nn.Dropout | None) -> float:
    return attn_drop.p if attn_drop is not None and attn_drop.training else 0.0


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


@torch.compiler.assume_constant_result
def choose_implementation(
    implementation: str,
    normalizer: str,
    pattern: str = "",
    *,
    device: str = "cpu",
    num_keys: int = 0,
    return_weights: bool = False,
) -> str:
    """Resolve ``auto``, and refuse what an implementation cannot do.

    Args:
        pattern: its key; empty where every key is allowed.
        device, num_keys: what ``auto`` decides by, see ``docs/benchmarks.md``.

    Returns:
        A key of :data:`IMPLEMENTATIONS`.

    Raises:
        ValueError: an unknown name, or a case that the implementation does not take.
    """
    kernel = NORMALIZERS[normalizer].kernel
    if implementation == "auto":
        if return_weights:
            return "dense"
        if kernel is not None:
            share = score_share(pattern, device)
            if share is not None and share <= (_MOST_SCORES if device.startswith("cpu") else _MOST_SCORES_ON_GPU):
                return "blocks"
            if normalizer != "softmax" and num_keys > _MOST_DENSE_KEYS:
                return "blocks"
        return "fused" if normalizer == "softmax" else "dense"
    check_implementation(implementation, normalizer)
    if implementation == "fused" and return_weights:
        raise ValueError("implementation 'fused' never forms the weights: use 'auto' or 'dense' to see them")
    return implementation


def check_implementation(implementation: str, normalizer: str) -> None:
    """Refuse an implementation that does not exist, or does not take this normalizer.

    Raises:
        ValueError: naming both.
    """
    if implementation not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(unknown_name("implementation", implementation, ["auto", *IMPLEMENTATIONS]))
    if implementation == "fused" and normalizer != "softmax":
        raise ValueError(f"implementation 'fused' computes softmax only, not {normalizer!r}: use 'auto' or 'dense'")
    if implementation == "blocks" and NORMALIZERS[normalizer].kernel is None:
        raise ValueError(f"implementation 'blocks' has no kernel for {normalizer!r}: use 'auto' or 'dense'")


def score_share(pattern: str, device: str) -> float | None:
    """Share of the N x N scores that the engine computes; None where it computes whole rows."""
    laid = pattern_of(pattern) if pattern else None
    if laid is None or not laid.has_components:
        return None
    return make_plan(laid, torch.device(device)).scores / laid.size**2


def explain_choice(chosen: str, pattern: str, device: str) -> str:
    """Say in a few words why ``auto`` chose as it did."""
    share = score_share(pattern, device)
    if share is None:
        reasons = {"blocks": "whole rows, a few at a time", "dense": "whole rows", "fused": "torch's own kernel"}
        return reasons[chosen]
    if chosen == "blocks":
        return f"computes {100 * share:.1f} % of the scores"
    return f"blocks would compute {100 * share:.0f} % of the scores: too many to gain"


@cache
def _default(normalizer: str) -> Normalizer:
    return NORMALIZERS[normalizer]()


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
        normalizer: a key of ``NORMALIZERS``: softmax, sparsemax, entmax15, entmax, ….
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
        RuntimeError: a derivative that the implementation does not have; ``dense`` has all.
    """
    if normalizer not in NORMALIZERS:
        raise ValueError(unknown_name("normalizer", normalizer, NORMALIZERS))
    if isinstance(pattern, str):
        pattern = make_pattern(pattern, num_tokens=q.shape[-2])
    if pattern is not None and not q.shape[-2] == k.shape[-2] == pattern.size:
        raise ValueError(f"a pattern over {pattern.size} tokens met {q.shape[-2]} queries, {k.shape[-2]} keys")
    rows = _default(normalizer)
    number: float | Tensor = rows.number()
    if "alpha" in rows.options():
        check_alpha(alpha)
        if isinstance(alpha, Tensor):
            if alpha.numel() not in (1, q.shape[1]):
                raise ValueError(f"alpha has {alpha.numel()} values for {q.shape[1]} heads")
            number = alpha.reshape(-1).expand(q.shape[1])
        else:
            number = float(alpha)
    if implementation == "auto" and forward_mode():
        implementation = "dense"  # the one that has these derivatives
    key = "" if pattern is None else key_of(pattern)
    chosen = choose_implementation(
        implementation, normalizer, key, device=str(q.device), num_keys=k.shape[-2], return_weights=return_weights
    )
    rule = Rule(rows, number, key, scale)
    out, weights = IMPLEMENTATIONS[chosen](q, k, v, rule, attn_drop, return_weights)
    if not return_weights:
        return out
    assert weights is not None
    return out, weights
