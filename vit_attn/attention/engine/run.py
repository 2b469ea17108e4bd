"""Runs a plan: heads are independent, and a few are computed at a time, so that their scores stay in the cores' caches.

No (N, N) tensor exists unless the weights are asked for. Whole rows are computed again in the backward pass rather than
saved for it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vit_attn.attention.compiled import compiled
from vit_attn.attention.engine.parts import ColumnPart, Operand
from vit_attn.attention.engine.plan import PatchRows, Plan, WholeRows, lowest
from vit_attn.attention.mechanism import working_dtype
from vit_attn.attention.normalizers.base import Parameter, RowKernel
from vit_attn.attention.normalizers.entmax import converged

# Scores of all heads that are in the works at a time: 2 MiB in fp32, so that they stay in the cores' caches.
_CHUNK_ENTRIES = 2**19

Chunk = tuple[slice, slice]


def _chunks(batch: int, heads: int, entries: int) -> Iterator[Chunk]:
    """Cut (B, H) into chunks of about ``_CHUNK_ENTRIES``, given the entries of one head.

    All have the same size, so that one compiled kernel does for them, but for the last where B is no multiple.
    """
    together = max(1, _CHUNK_ENTRIES // entries)
    images, step = 1, heads
    if together >= heads:
        images = max(1, min(batch, together // heads))
    else:
        step = max(size for size in range(1, together + 1) if heads % size == 0)
    for image in range(0, batch, images):
        for head in range(0, heads, step):
            yield slice(image, image + images), slice(head, head + step)


def to_compute_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(Cb, Ch, n, D) → (C, n, D)."""
    return x.to(dtype).flatten(0, 1)


@dataclass
class Context:
    """What all chunks of one forward or backward pass share.

    Args:
        q, k, v: (B, H, N, D).
        kernel: of the normalizer.
        number: of every head, or ``numbers`` (H,) of each: see ``RowKernel.parameter``.
        scale: factor on the scores.
        dropout: probability; ``seed`` makes the same weights drop in the backward pass.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    plan: Plan
    kernel: RowKernel
    number: float
    numbers: Tensor | None
    scale: float
    dropout: float
    seed: Tensor | None

    def __post_init__(self) -> None:
        self.dtype = working_dtype(self.q.dtype)
        self.like = self.q.new_empty(0, dtype=self.dtype)
        self.generator = None
        if self.seed is not None:
            self.generator = torch.Generator(self.q.device).manual_seed(int(self.seed))

    def chunks(self, entries: int) -> Iterator[Chunk]:
        """Heads that are computed together, given the entries of one."""
        return _chunks(self.q.shape[0], self.q.shape[1], entries)

    def parameter(self, chunk: Chunk, rows: int | None = None) -> Parameter:
        """The kernel's parameter for a chunk's heads: (C, 1, 1), or (C · rows, 1) for ``rows`` rows of each."""
        if self.numbers is None:
            return self.kernel.parameter(self.number, self.like)
        images = len(range(self.q.shape[0])[chunk[0]])
        e = self.kernel.parameter(self.numbers[chunk[1]], self.like)
        assert isinstance(e, Tensor)
        e = e.repeat(images)
        return e[:, None, None] if rows is None else e[:, None].expand(-1, rows).reshape(-1, 1)

    def dropout_mask(self, *shape: int) -> Tensor | None:
        """What dropout multiplies the weights by: 0 or 1 / (1 - p)."""
        if self.generator is None:
            return None
        return self.like.new_empty(shape).bernoulli_(1 - self.dropout, generator=self.generator).div_(1 - self.dropout)

    def add_number_gradient(self, d_numbers: Tensor, chunk: Chunk, d_rows: Tensor) -> None:
        """Add the gradients of a chunk's rows to those of its heads (H,)."""
        images, heads = (len(range(size)[part]) for part, size in zip(chunk, self.q.shape[:2], strict=True))
        d_numbers[chunk[1]] += d_rows.view(images, heads, -1).sum((0, 2))


@dataclass
class Gradients:
    """Room for the gradients: q, k, v (B, H, N, D) and, where heads have numbers of their own, those (H,)."""

    q: Tensor
    k: Tensor
    v: Tensor
    numbers: Tensor | None


def run_forward(context: Context, out: Tensor, weights: Tensor | None, saved: Tensor) -> None:
    """Fill the outputs (B, H, N, D), the weights (B, H, N, N) where they are wanted, and what backward needs."""
    patches = context.plan.patches
    if patches is not None:
        for chunk in context.chunks(patches.length * patches.pitch):
            _PatchChunk(context, patches, chunk).forward(out, weights, saved)
    for rows in context.plan.rows:
        for chunk in context.chunks(rows.scores):
            _WholeRowsChunk(context, rows, chunk).forward(out, weights)


def run_backward(context: Context, d_out: Tensor, d_weights: Tensor | None, saved: Tensor, into: Gradients) -> None:
    """Fill the gradients."""
    patches = context.plan.patches
    # The patch queries come first and write; what adds to them comes after.
    for gradient in (into.k, into.v):
        (gradient if patches is None else gradient[:, :, : patches.prefix]).zero_()
    if patches is not None:
        for chunk in context.chunks(patches.length * patches.pitch):
            _PatchChunk(context, patches, chunk).backward(d_out, d_weights, saved, into)
    for rows in context.plan.rows:
        for chunk in context.chunks(rows.scores):
            _WholeRowsChunk(context, rows, chunk).backward(d_out, d_weights, into)


class _PatchChunk:
    """Queries of all patch tokens, of one chunk of heads."""

    def __init__(self, context: Context, rows: PatchRows, chunk: Chunk) -> None:
        self.context, self.rows, self.chunk = context, rows, chunk
        self.patches = (*chunk, slice(rows.prefix, None))
        q, k, v = (x[chunk] for x in (context.q, context.k, context.v))
        self.heads = q.shape[0] * q.shape[1]
        self.dropout_mask = context.dropout_mask(self.heads, rows.length, rows.pitch)
        self.operands = context.kernel, q, k, v, context.parameter(chunk), context.scale, self.dropout_mask

    def _weights(self, saved: Tensor) -> Tensor:
        """The chunk's rows (C, L, pitch) of what is saved of all heads."""
        heads = self.context.q.shape[1]
        start = range(self.context.q.shape[0])[self.chunk[0]][0] * heads + self.chunk[1].start
        return saved[start : start + self.heads]

    def forward(self, out: Tensor, wanted: Tensor | None, saved: Tensor) -> None:
        """Fill the patch queries of the outputs (B, H, N, D), and of the weights that are wanted and saved."""
        rows, weights = self.rows, self._weights(saved)
        arguments = rows, *self.operands, rows.bounds(self.context.dtype), out[self.patches], weights
        *attempts, last = self.context.kernel.attempts
        if not any(converged(forward(*arguments, rounds)) for rounds in attempts):
            forward(*arguments, last)
        if wanted is not None:
            places, entries = rows.entries
            values = (weights if self.dropout_mask is None else weights * self.dropout_mask).flatten(1)[:, places]
            wanted[self.chunk].flatten(0, 1).flatten(1)[:, entries] = values

    def backward(self, d_out: Tensor, d_wanted: Tensor | None, saved: Tensor, into: Gradients) -> None:
        """Fill the patch tokens of the gradients, and add to their columns and to those of numbers."""
        rows, weights = self.rows, self._weights(saved)
        if weights.storage_offset():  # views are made by strides, from the storage's first entry on
            weights = weights.clone()
        d_weights = None
        if d_wanted is not None:
            places, entries = rows.entries
            d_weights = torch.zeros_like(weights)
            d_weights.flatten(1)[:, places] = d_wanted[self.chunk].flatten(0, 1).flatten(1)[:, entries]
        targets = (gradient[self.patches] for gradient in (into.q, into.k, into.v))
        *columns, d_rows = backward(rows, *self.operands, weights, d_out[self.patches], d_weights, *targets)
        if rows.num_columns:
            for gradient, values in zip((into.k, into.v), columns, strict=True):
                target = gradient[self.chunk]
                target.index_add_(2, rows.columns, values.view(*target.shape[:2], *values.shape[1:]))
        if into.numbers is not None:
            self.context.add_number_gradient(into.numbers, self.chunk, d_rows)


class _WholeRowsChunk:
    """Queries of one :class:`WholeRows`, of one chunk of heads, over all of their keys."""

    def __init__(self, context: Context, rows: WholeRows, chunk: Chunk) -> None:
        self.context, self.rows, self.chunk = context, rows, chunk
        self.queries = slice(rows.start, rows.stop)
        self.q = to_compute_dtype(context.q[chunk][:, :, self.queries], context.dtype) * context.scale
        self.k, self.v = (to_compute_dtype(x[chunk][:, :, : rows.width], context.dtype) for x in (context.k, context.v))
        self.parameter = context.parameter(chunk, rows.stop - rows.start)

    def _weights(self) -> Tensor:
        """(C, queries, keys)."""
        rows = self.rows
        scores = torch.bmm(self.q, self.k.mT)
        if rows.forbidden is not None:
            scores[..., rows.first :].masked_fill_(rows.forbidden, lowest(scores.dtype))
        x, p, state = scores.flatten(0, 1), scores, None
        for rounds in self.context.kernel.attempts:
            p, state, error = attempt_rows(self.context.kernel, x, self.parameter, rounds, state)
            if rounds == self.context.kernel.attempts[-1] or converged(error):
                break
        return p.view(scores.shape)

    def forward(self, out: Tensor, wanted: Tensor | None) -> None:
        """Fill the outputs (B, H, N, D), and what is wanted of the weights (B, H, N, N)."""
        weights = self._weights()
        mask = self.context.dropout_mask(*weights.shape)
        if mask is not None:
            weights = weights * mask
        target = out[self.chunk][:, :, self.queries]
        target.copy_(torch.bmm(weights, self.v).view(target.shape))
        if wanted is not None:
            target = wanted[self.chunk][:, :, self.queries, : self.rows.width]
            target.copy_(weights.view(target.shape))

    def backward(self, d_out: Tensor, d_wanted: Tensor | None, into: Gradients) -> None:
        """Fill the queries of the gradients to q, add to those to k, v and to numbers."""
        g = to_compute_dtype(d_out[self.chunk][:, :, self.queries], self.context.dtype)
        weights = self._weights()
        d_weights = torch.bmm(g, self.v.mT)
        if d_wanted is not None:
            d_weights += d_wanted[self.chunk][:, :, self.queries, : self.rows.width].flatten(0, 1)
        mask = self.context.dropout_mask(*weights.shape)
        if mask is not None:
            d_weights.mul_(mask)
        rows = weights.flatten(0, 1), d_weights.flatten(0, 1)
        d_scores = scores_gradient_rows(self.context.kernel, *rows, self.parameter).view(weights.shape)
        if into.numbers is not None:
            d_rows = parameter_gradient_rows(self.context.kernel, *rows, self.parameter)
            self.context.add_number_gradient(into.numbers, self.chunk, d_rows)
        if mask is not None:
            weights = weights * mask
        dq, dk, dv = (gradient[self.chunk] for gradient in (into.q, into.k, into.v))
        dq = dq[:, :, self.queries]
        dq.copy_(torch.bmm(d_scores, self.k).mul_(self.context.scale).view(dq.shape))
        for target, value in ((dk, torch.bmm(d_scores.mT, self.q)), (dv, torch.bmm(weights.mT, g))):
            target = target[:, :, : self.rows.width]
            target.add_(value.view(target.shape))


@compiled
def attempt_rows(
    kernel: RowKernel, x: Tensor, parameter: Parameter, rounds: int | None, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``RowKernel.attempt`` on rows (R, K)."""
    return kernel.attempt(x, parameter, rounds, state)


@compiled
def scores_gradient_rows(kernel: RowKernel, p: Tensor, g: Tensor, parameter: Parameter) -> Tensor:
    """``RowKernel.scores_gradient`` on rows (R, K)."""
    return kernel.scores_gradient(p, g, parameter)


@compiled
def parameter_gradient_rows(kernel: RowKernel, p: Tensor, g: Tensor, parameter: Any) -> Tensor:
    """``RowKernel.parameter_gradient`` on rows (R, K)."""
    return kernel.parameter_gradient(p, g, parameter)


@dataclass(frozen=True)
class _Heads:
    """q, k, v of some heads, in the compute dtype."""

    q: Operand
    k: Operand
    v: Operand

    @classmethod
    def of(cls, rows: PatchRows, dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, scale: float) -> "_Heads":
        """Lay out q, k, v (Cb, Ch, N, D)."""
        q, k, v = (to_compute_dtype(x, dtype) for x in (q, k, v))
        of_k, of_v = (Operand(rows, x[:, rows.prefix :], x) for x in (k, v))
        return cls(Operand(rows, (q * scale)[:, rows.prefix :]), of_k, of_v)


def _products(rows: PatchRows, q: Operand, k: Operand) -> Tensor:
    """Rows (C, L, pitch) of the products of queries with their keys, of forbidden ones too."""
    return torch.cat([part.products(q, k) for part in rows.parts], -1)


def _to_tokens(rows: PatchRows, at_home: list[Tensor], elsewhere: list[Tensor]) -> Tensor:
    """Sum what came of the components, (C, L, D) and (C, T, D), to (C, T, D)."""
    total: Any = None
    if at_home:
        total = rows.in_raster_order(sum(at_home[1:], at_home[0]))
    for each in elsewhere:
        total = each if total is None else total + each
    return total


def _to_queries(rows: PatchRows, weights: Tensor, k: Operand) -> Tensor:
    """Sum keys by the weights (C, L, pitch) of each query: (C, T, D)."""
    found = [(part.queries_at_home, part.to_queries(weights, k)) for part in reversed(rows.parts)]
    return _to_tokens(rows, [x for home, x in found if home], [x for home, x in found if not home])


def _to_keys(rows: PatchRows, weights: Tensor, q: Operand) -> tuple[Tensor, Tensor]:
    """Sum queries by the weights that they give to each key: (C, T, D), and to each column: (C, M, D)."""
    columns = q.tokens[:, :0]
    at_home: list[Tensor] = []
    elsewhere: list[Tensor] = []
    for part in reversed(rows.parts):
        if isinstance(part, ColumnPart):
            columns = part.to_columns(weights, q)
        else:
            (at_home if part.keys_at_home else elsewhere).append(part.to_keys(weights, q))
    return _to_tokens(rows, at_home, elsewhere), columns


@compiled
def forward(
    rows: PatchRows,
    kernel: RowKernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parameter: Parameter,
    scale: float,
    dropout_mask: Tensor | None,
    bounds: Tensor,
    out: Tensor,
    saved: Tensor,
    rounds: int | None = None,
) -> Tensor:
    """Attention of the patch queries of C = Cb · Ch heads.

    Args:
        q, k, v: (Cb, Ch, N, D).
        parameter: of the kernel; (C, 1, 1) where each head has its own.
        scale: factor on the scores.
        dropout_mask: (C, L, pitch), what the weights are multiplied by.
        bounds: (L, pitch), see ``PatchRows.bounds``.
        out: gets the outputs (Cb, Ch, T, D).
        saved: gets the weights (C, L, pitch), before dropout.
        rounds: see ``RowKernel.attempt``.

    Returns:
        The error of ``RowKernel.attempt``.
    """
    x = _Heads.of(rows, bounds.dtype, q, k, v, scale)
    scores = _products(rows, x.q, x.k)
    # A row holds scores of its neighbours at forbidden places, and NaN there must not count: a minimum would keep it.
    scores = torch.where(bounds > 0, scores, bounds)
    weights, _, error = kernel.attempt(scores, parameter, rounds)
    saved.copy_(weights)
    result = _to_queries(rows, weights if dropout_mask is None else weights * dropout_mask, x.v)
    out.copy_(result.view(out.shape))
    return error


@compiled
def backward(
    rows: PatchRows,
    kernel: RowKernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parameter: Parameter,
    scale: float,
    dropout_mask: Tensor | None,
    weights: Tensor,
    d_out: Tensor,
    d_weights: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward`.

    Args:
        weights: (C, L, pitch), what it saved; from their storage's first entry on, since views are made by strides.
        d_out: (Cb, Ch, T, D).
        d_weights: (C, L, pitch), to the weights after dropout, where they were wanted.
        dq, dk, dv: get the gradients to the patch tokens (Cb, Ch, T, D).

    Returns:
        What the columns get of the gradients to k and v (C, M, D), and the gradient to each row's number (C, L, 1),
        empty where heads share one.
    """
    x = _Heads.of(rows, weights.dtype, q, k, v, scale)
    g = Operand(rows, to_compute_dtype(d_out, weights.dtype))
    gradient = _products(rows, g, x.v)
    if d_weights is not None:
        gradient = gradient + d_weights
    left = weights
    if dropout_mask is not None:
        gradient, left = gradient * dropout_mask, weights * dropout_mask
    d_scores = kernel.scores_gradient(weights, gradient, parameter)
    if isinstance(parameter, Tensor) and parameter.dim() == 3:
        d_number = kernel.parameter_gradient(weights, gradient, parameter)
    else:
        d_number = weights.new_empty(0)
    dq.copy_((_to_queries(rows, d_scores, x.k) * scale).view(dq.shape))
    to_keys, dk_columns = _to_keys(rows, d_scores, x.q)
    dk.copy_(to_keys.view(dk.shape))
    to_values, dv_columns = _to_keys(rows, left, g)
    dv.copy_(to_values.view(dv.shape))
    return dk_columns, dv_columns, d_number
