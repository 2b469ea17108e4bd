"""The engine as custom operators, forward and backward, so that torch.compile sees one node.

They take text for the pattern and the normalizer, so that a graph that holds them means the same in another process.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vit_attn.attention.engine.plan import Plan, make_plan, whole_plan
from vit_attn.attention.engine.run import Context, Gradients, run_backward, run_forward
from vit_attn.attention.graphs import transformed
from vit_attn.attention.mechanism import working_dtype
from vit_attn.attention.normalizers.base import NORMALIZERS, RowKernel
from vit_attn.attention.patterns.base import pattern_of

_USE_DENSE = "implementation 'blocks' has no {}: use implementation 'dense'"


def _plan(pattern: str, q: Tensor, k: Tensor) -> Plan:
    return make_plan(pattern_of(pattern), q.device) if pattern else whole_plan(q.shape[-2], k.shape[-2])


def _kernel(normalizer: str) -> RowKernel:
    kernel = NORMALIZERS[normalizer].kernel
    assert kernel is not None
    return kernel


def _empty_saved(pattern: str, q: Tensor) -> Tensor:
    """Room for the weights that the backward pass needs: (B · H, L, pitch)."""
    # Without a pattern nothing is saved, and sizes may be symbols, of which no plan can be made.
    patches = make_plan(pattern_of(pattern), q.device).patches if pattern else None
    shape = (0,) if patches is None else (q.shape[0] * q.shape[1], patches.length, patches.pitch)
    return q.new_empty(shape, dtype=working_dtype(q.dtype))


@torch.library.custom_op("vit_attn::blocks", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: str,
    normalizer: str,
    number: float,
    numbers: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    return_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (B, H, N, D), weights (B, H, N, N) or empty where not wanted, and what the backward pass needs."""
    context = Context(q, k, v, _plan(pattern, q, k), _kernel(normalizer), number, numbers, scale, dropout, seed)
    out, weights = _empty_outputs(q, k, v, return_weights)
    saved = _empty_saved(pattern, q)
    run_forward(context, out, weights.zero_() if return_weights else None, saved)
    return out, weights, saved


def _empty_outputs(q: Tensor, k: Tensor, v: Tensor, return_weights: bool) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = q.shape
    # Laid out as (B, N, H, D), so that the heads of a token can be joined without a copy.
    out = v.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)
    shape = (batch, heads, queries, k.shape[-2]) if return_weights else (0,)
    return out, q.new_empty(shape, dtype=working_dtype(q.dtype))


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, pattern: str, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return *_empty_outputs(q, k, v, options[-1]), _empty_saved(pattern, q)


@torch.library.custom_op("vit_attn::blocks_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    d_weights: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    saved: Tensor,
    pattern: str,
    normalizer: str,
    number: float,
    numbers: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to q, k, v in the compute dtype, and to ``numbers``, empty without."""
    context = Context(q, k, v, _plan(pattern, q, k), _kernel(normalizer), number, numbers, scale, dropout, seed)
    d_numbers = None if numbers is None else context.like.new_zeros(q.shape[1])
    into = Gradients(*_empty_gradients(q, k, v), d_numbers)
    run_backward(context, d_out, d_weights, saved, into)
    return into.q, into.k, into.v, context.like if d_numbers is None else d_numbers


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = working_dtype(q.dtype)
    dq, dk, dv = (torch.empty(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv


@_backward.register_fake
def _(
    d_out: Tensor, d_weights: Tensor | None, q: Tensor, k: Tensor, v: Tensor, saved: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    numbers = options[3]
    return *_empty_gradients(q, k, v), saved.new_empty(0 if numbers is None else q.shape[1])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, pattern, normalizer, number, numbers, scale, dropout, seed, return_weights = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2 if return_weights else 1 :])
    ctx.save_for_backward(q, k, v, output[2], numbers, seed)
    ctx.options = pattern, normalizer, number, scale, dropout


def _autograd(ctx: Any, d_out: Tensor | None, d_weights: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    q, k, v, saved, numbers, seed = ctx.saved_tensors
    pattern, normalizer, number, scale, dropout = ctx.options
    if d_out is None:
        d_out = v.new_zeros(*q.shape[:-1], v.shape[-1])
    run = _BlocksBackward.apply if transformed() else _backward
    *gradients, d_numbers = run(
        d_out, d_weights, q, k, v, saved, pattern, normalizer, number, numbers, scale, dropout, seed
    )
    dq, dk, dv = (gradient.to(x.dtype) for gradient, x in zip(gradients, (q, k, v), strict=True))
    d_numbers = None if numbers is None else d_numbers.to(numbers.dtype)
    return dq, dk, dv, None, None, None, d_numbers, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_save_for_backward)


def _no_second_derivative(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(_USE_DENSE.format("second derivative"))


def _no_tangent(ctx: Any, *tangents: Any) -> None:
    raise RuntimeError(_USE_DENSE.format("forward-mode derivative"))


_backward.register_autograd(_no_second_derivative)


class _Blocks(torch.autograd.Function):
    """The operator where it is ``transformed``; forward-mode derivatives are refused."""

    generate_vmap_rule = True
    setup_context = staticmethod(_save_for_backward)
    backward = staticmethod(_autograd)
    jvp = staticmethod(_no_tangent)

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _forward(*inputs)


class _BlocksBackward(torch.autograd.Function):
    """Likewise its gradient, of which there is none."""

    generate_vmap_rule = True
    backward = staticmethod(_no_second_derivative)
    jvp = staticmethod(_no_tangent)

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is saved."""


def _fold(info: Any, in_dims: tuple[Any, ...], tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Tensors whose first dimension is the batch of images, with that which vmap goes over folded into it."""
    folded: list[Tensor | None] = []
    for x, dim in zip(tensors, in_dims, strict=True):
        if x is not None:
            x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            x = x.flatten(0, 1)
        folded.append(x)
    return folded


def _refuse_batched(dim: int | None, what: str) -> None:
    if dim is not None:
        raise RuntimeError(_USE_DENSE.format(f"vmap over {what}"))


@_forward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    _refuse_batched(in_dims[6], "alpha")
    _refuse_batched(in_dims[9], "dropout")
    out = _forward(*_fold(info, in_dims[:3], inputs[:3]), *inputs[3:])
    unfolded = tuple(
        x.unflatten(0, (info.batch_size, -1)) if x.numel() else x.expand(info.batch_size, *x.shape) for x in out
    )
    return unfolded, (0, 0, 0)


@_backward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    _refuse_batched(in_dims[9], "alpha")
    if inputs[9] is not None:
        raise RuntimeError(_USE_DENSE.format("vmap over a gradient to alpha"))
    *gradients, d_numbers = _backward(*_fold(info, in_dims[:6], inputs[:6]), *inputs[6:])
    return (*(x.unflatten(0, (info.batch_size, -1)) for x in gradients), d_numbers), (0, 0, 0, None)


@register_flop_formula(torch.ops.vit_attn.blocks, get_raw=True)
def _forward_flops(
    q: Tensor, k: Tensor, v: Tensor, pattern: str, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    scores = q.shape[0] * q.shape[1] * _plan(pattern, q, k).scores
    return 2 * scores * (q.shape[-1] + v.shape[-1])


@register_flop_formula(torch.ops.vit_attn.blocks_backward, get_raw=True)
def _backward_flops(
    d_out: Tensor, d_weights: Any, q: Tensor, k: Tensor, v: Tensor, saved: Any, pattern: str, *args: Any, **kwargs: Any
) -> int:
    plan = _plan(pattern, q, k)
    again = sum(rows.scores for rows in plan.rows) * q.shape[-1]
    return 2 * q.shape[0] * q.shape[1] * (2 * plan.scores * (q.shape[-1] + v.shape[-1]) + again)


def blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: str,
    normalizer: str,
    number: float | Tensor,
    scale: float,
    dropout: float,
    return_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention by the engine.

    Args:
        q, k, v: (B, H, N, D).
        pattern: the key of a pattern over N tokens; empty: every key is allowed.
        normalizer: a name whose normalizer has a kernel.
        number: of the normalizer, or (H,).
        scale: factor on the scores.
        dropout: probability that a weight is dropped.
        return_weights: return the weights too.

    Returns:
        (B, H, N, D) in v's dtype, and (B, H, N, N) or None.

    Raises:
        RuntimeError: a forward-mode or second derivative, which the engine does not have.
    """
    # Drawn from torch's generator and kept, so that the backward pass drops the same weights.
    seed = torch.randint(2**62, ()) if dropout > 0 else None
    numbers = number if isinstance(number, Tensor) else None
    each = 0.0 if isinstance(number, Tensor) else float(number)
    with torch.autocast(q.device.type, enabled=False):  # the products inside would follow it
        run = _Blocks.apply if transformed() else _forward
        out, weights, _ = run(q, k, v, pattern, normalizer, each, numbers, scale, dropout, seed, return_weights)
    return out, weights if return_weights else None
