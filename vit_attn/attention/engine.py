"""The sparse engine: runs a plan of small dense products, forward and backward, exactly, for every α-entmax.

Heads are independent, and a few are computed at a time, so that their scores stay in the cores' caches. No (N, N)
tensor exists unless the weights are asked for. Whole rows are computed again in the backward pass rather than kept.

One custom operator each for forward and backward, so that torch.compile sees one node.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vit_attn.attention import kernels, regrouped
from vit_attn.attention.blocks import Plan, Regrouped, Rows, make_plan, whole_plan
from vit_attn.attention.call import Call, Chunk, wide
from vit_attn.attention.normalizers import working_dtype
from vit_attn.attention.patterns import MADE, Pattern


def _plan(pattern: str, q: Tensor, k: Tensor) -> Plan:
    if not pattern:
        return whole_plan(q.shape[-2], k.shape[-2])
    return make_plan(MADE[pattern], q.device)


def _fake_plan(pattern: str, q: Tensor) -> Plan:
    """The plan as far as shapes depend on it: sizes may be symbols, which no plan can be made of."""
    return make_plan(MADE[pattern], q.device) if pattern else Plan(None, ())


class _RegroupedChunk:
    """Queries of all patch tokens, of one chunk of heads."""

    def __init__(self, call: Call, part: Regrouped, chunk: Chunk) -> None:
        self.call, self.part, self.chunk = call, part, chunk
        self.patches = (*chunk, slice(part.prefix, None))
        q, k, v = (x[chunk] for x in (call.q, call.k, call.v))
        self.heads = q.shape[0] * q.shape[1]
        self.keep = call.keep(self.heads, part.length, part.pitch)
        self.operands = q, k, v, call.excess(chunk), call.scale, self.keep

    def _weights(self, kept: Tensor) -> Tensor:
        """The chunk's rows (C, L, pitch) of what is ``kept`` of all heads."""
        heads = self.call.q.shape[1]
        start = range(self.call.q.shape[0])[self.chunk[0]][0] * heads + self.chunk[1].start
        return kept[start : start + self.heads]

    def forward(self, out: Tensor, seen: Tensor | None, kept: Tensor) -> None:
        """Fill the patch queries of the outputs (B, H, N, D) and of the weights that are ``seen`` and ``kept``."""
        part, weights = self.part, self._weights(kept)
        arguments = part, *self.operands, part.bounds(self.call.dtype), out[self.patches], weights
        for rounds in kernels.ROUNDS:
            if kernels.converged(regrouped.forward(*arguments, rounds)):
                break
        if seen is not None:
            places, entries = part.entries
            values = (weights if self.keep is None else weights * self.keep).flatten(1)[:, places]
            seen[self.chunk].flatten(0, 1).flatten(1)[:, entries] = values

    def backward(
        self,
        d_out: Tensor,
        d_seen: Tensor | None,
        kept: Tensor,
        gradients: tuple[Tensor, Tensor, Tensor],
        d_alphas: Tensor | None,
    ) -> None:
        """Fill the patch tokens of the gradients (B, H, N, D), add to their columns and to ``d_alphas``."""
        part, weights = self.part, self._weights(kept)
        if weights.storage_offset():
            weights = weights.clone()
        d_weights = None
        if d_seen is not None:
            places, entries = part.entries
            d_weights = torch.zeros_like(weights)
            d_weights.flatten(1)[:, places] = d_seen[self.chunk].flatten(0, 1).flatten(1)[:, entries]
        targets = (gradient[self.patches] for gradient in gradients)
        *columns, d_rows = regrouped.backward(part, *self.operands, weights, d_out[self.patches], d_weights, *targets)
        if part.num_columns:
            for gradient, values in zip(gradients[1:], columns, strict=True):
                target = gradient[self.chunk]
                target.index_add_(2, part.columns, values.view(*target.shape[:2], *values.shape[1:]))
        if d_alphas is not None:
            self.call.add_alpha_gradient(d_alphas, self.chunk, d_rows)


class _RowsChunk:
    """Queries of one :class:`Rows`, of one chunk of heads, over all of their keys."""

    def __init__(self, call: Call, part: Rows, chunk: Chunk) -> None:
        self.call, self.part, self.chunk = call, part, chunk
        self.queries = slice(part.start, part.stop)
        self.q = wide(call.q[chunk][:, :, self.queries], call.dtype) * call.scale
        self.k, self.v = (wide(x[chunk][:, :, : part.width], call.dtype) for x in (call.k, call.v))
        self.excess = call.excess(chunk, part.stop - part.start)

    def _weights(self) -> Tensor:
        """(C, queries, keys)."""
        part = self.part
        scores = torch.bmm(self.q, self.k.mT)
        if part.forbidden is not None:
            scores[..., part.first :].masked_fill_(part.forbidden, kernels.lowest(scores.dtype))
        return kernels.normalize_rows(scores.flatten(0, 1), self.excess).view(scores.shape)

    def forward(self, out: Tensor, seen: Tensor | None) -> None:
        """Fill the outputs (B, H, N, D), and what is ``seen`` of the weights (B, H, N, N)."""
        weights = self._weights()
        keep = self.call.keep(*weights.shape)
        if keep is not None:
            weights = weights * keep
        target = out[self.chunk][:, :, self.queries]
        target.copy_(torch.bmm(weights, self.v).view(target.shape))
        if seen is not None:
            target = seen[self.chunk][:, :, self.queries, : self.part.width]
            target.copy_(weights.view(target.shape))

    def backward(
        self,
        d_out: Tensor,
        d_seen: Tensor | None,
        gradients: tuple[Tensor, Tensor, Tensor],
        d_alphas: Tensor | None,
    ) -> None:
        """Fill the queries of the gradients to q, add to those to k, v (all (B, H, N, D)) and to ``d_alphas``."""
        g = wide(d_out[self.chunk][:, :, self.queries], self.call.dtype)
        weights = self._weights()
        d_weights = torch.bmm(g, self.v.mT)
        if d_seen is not None:
            d_weights += d_seen[self.chunk][:, :, self.queries, : self.part.width].flatten(0, 1)
        keep = self.call.keep(*weights.shape)
        if keep is not None:
            d_weights.mul_(keep)
        rows = weights.flatten(0, 1), d_weights.flatten(0, 1)
        d_scores, d_rows = kernels.rows_gradient(*rows, self.excess, to_alpha=d_alphas is not None)
        d_scores = d_scores.view(weights.shape)
        if d_alphas is not None:
            self.call.add_alpha_gradient(d_alphas, self.chunk, d_rows)
        if keep is not None:
            weights = weights * keep
        dq, dk, dv = (gradient[self.chunk] for gradient in gradients)
        dq = dq[:, :, self.queries]
        dq.copy_(torch.bmm(d_scores, self.k).mul_(self.call.scale).view(dq.shape))
        for target, value in ((dk, torch.bmm(d_scores.mT, self.q)), (dv, torch.bmm(weights.mT, g))):
            target = target[:, :, : self.part.width]
            target.add_(value.view(target.shape))


def _empty_kept(plan: Plan, q: Tensor) -> Tensor:
    """Room for the weights that the backward pass needs: (B · H, L, pitch)."""
    part = plan.regrouped
    shape = (0,) if part is None else (q.shape[0] * q.shape[1], part.length, part.pitch)
    return q.new_empty(shape, dtype=working_dtype(q.dtype))


@torch.library.custom_op("vit_attn::blocks", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: str,
    alpha: float,
    alphas: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    see: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (B, H, N, D), weights (B, H, N, N) or empty where not to ``see``, and what the backward pass needs."""
    call = Call(q, k, v, _plan(pattern, q, k), alpha, alphas, scale, dropout, seed)
    out, seen = _empty_outputs(q, k, v, see)
    weights = seen.zero_() if see else None
    kept = _empty_kept(call.plan, q)
    part = call.plan.regrouped
    if part is not None:
        for chunk in call.chunks(part.length * part.pitch):
            _RegroupedChunk(call, part, chunk).forward(out, weights, kept)
    for rows in call.plan.rows:
        for chunk in call.chunks(rows.scores):
            _RowsChunk(call, rows, chunk).forward(out, weights)
    return out, seen, kept


def _empty_outputs(q: Tensor, k: Tensor, v: Tensor, see: bool) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = q.shape
    # Laid out as (B, N, H, D), so that the heads of a token can be joined without a copy.
    out = v.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)
    shape = (batch, heads, queries, k.shape[-2]) if see else (0,)
    return out, q.new_empty(shape, dtype=working_dtype(q.dtype))


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, pattern: str, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, see = options
    return *_empty_outputs(q, k, v, see), _empty_kept(_fake_plan(pattern, q), q)


@torch.library.custom_op("vit_attn::blocks_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    d_seen: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    pattern: str,
    alpha: float,
    alphas: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to q, k, v (B, H, N, D) in the working dtype, and to ``alphas`` (H,), empty without."""
    call = Call(q, k, v, _plan(pattern, q, k), alpha, alphas, scale, dropout, seed)
    part = call.plan.regrouped
    gradients = dq, dk, dv = _empty_gradients(q, k, v)
    # The patch queries come first and write; what adds to them comes after.
    for gradient in (dk, dv):
        (gradient if part is None else gradient[:, :, : part.prefix]).zero_()
    d_alphas = None if alphas is None else call.like.new_zeros(q.shape[1])
    if part is not None:
        for chunk in call.chunks(part.length * part.pitch):
            _RegroupedChunk(call, part, chunk).backward(d_out, d_seen, kept, gradients, d_alphas)
    for rows in call.plan.rows:
        for chunk in call.chunks(rows.scores):
            _RowsChunk(call, rows, chunk).backward(d_out, d_seen, gradients, d_alphas)
    return dq, dk, dv, call.like if d_alphas is None else d_alphas


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = working_dtype(q.dtype)
    dq, dk, dv = (torch.empty(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv


@_backward.register_fake
def _(
    d_out: Tensor,
    d_seen: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    pattern: str,
    alpha: float,
    alphas: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_empty_gradients(q, k, v), kept.new_empty(0 if alphas is None else q.shape[1])


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, pattern, alpha, alphas, scale, dropout, seed, see = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2 if see else 1 :])
    ctx.save_for_backward(q, k, v, output[2], alphas, seed)
    ctx.options = pattern, alpha, scale, dropout


def _autograd(ctx: Any, d_out: Tensor | None, d_seen: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    q, k, v, kept, alphas, seed = ctx.saved_tensors
    pattern, alpha, scale, dropout = ctx.options
    if d_out is None:
        d_out = v.new_zeros(*q.shape[:-1], v.shape[-1])
    *gradients, d_alphas = _backward(d_out, d_seen, q, k, v, kept, pattern, alpha, alphas, scale, dropout, seed)
    dq, dk, dv = (gradient.to(x.dtype) for gradient, x in zip(gradients, (q, k, v), strict=True))
    d_alphas = None if alphas is None else d_alphas.to(alphas.dtype)
    return dq, dk, dv, None, None, d_alphas, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_keep_for_backward)


@register_flop_formula(torch.ops.vit_attn.blocks, get_raw=True)
def _forward_flops(
    q: Tensor, k: Tensor, v: Tensor, pattern: str, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    scores = q.shape[0] * q.shape[1] * _plan(pattern, q, k).scores
    return 2 * scores * (q.shape[-1] + v.shape[-1])


@register_flop_formula(torch.ops.vit_attn.blocks_backward, get_raw=True)
def _backward_flops(
    d_out: Tensor, d_seen: Any, q: Tensor, k: Tensor, v: Tensor, kept: Any, pattern: str, *args: Any, **kwargs: Any
) -> int:
    plan = _plan(pattern, q, k)
    again = sum(rows.scores for rows in plan.rows) * q.shape[-1]
    return 2 * q.shape[0] * q.shape[1] * (2 * plan.scores * (q.shape[-1] + v.shape[-1]) + again)


def blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | None,
    alpha: float | Tensor,
    scale: float,
    dropout: float,
    see: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention by the engine.

    Args:
        q, k, v: (B, H, N, D).
        alpha: of the normalizer: 1 for softmax; in (1, 2], or (H,), for entmax.
        scale: factor on the scores.
        dropout: probability that a weight is dropped.
        see: return the weights too.

    Returns:
        (B, H, N, D) in v's dtype, and (B, H, N, N) or None.
    """
    name = "" if pattern is None else pattern.key
    # Drawn from torch's generator and kept, so that the backward pass drops the same weights.
    seed = torch.randint(2**62, ()) if dropout > 0 else None
    alphas = alpha if isinstance(alpha, Tensor) else None
    number = 1.5 if isinstance(alpha, Tensor) else float(alpha)
    with torch.autocast(q.device.type, enabled=False):  # the products inside would follow it
        out, weights, _ = _forward(q, k, v, name, number, alphas, scale, dropout, seed, see)
    return out, weights if see else None
