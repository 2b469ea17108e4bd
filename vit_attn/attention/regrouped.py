"""The patch queries of some heads: the components of a pattern as batched products over strided views of buffers.

q, k, v are laid into buffers whose rows follow the plan, with empty rows between heads, so that every block, every
window of keys around a block of queries and every window of queries around a block of keys is a strided view. What
lies between the products is a few passes over the scores, which ``torch.compile`` makes of these lines.

Below, C heads are computed together, T patch tokens each; x (C, T, D) are their queries, keys, values or gradients.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vit_attn.attention import kernels
from vit_attn.attention.blocks import Regrouped
from vit_attn.attention.call import wide
from vit_attn.attention.compiled import compiled
from vit_attn.attention.kernels import Excess


def _to_classes(part: Regrouped, x: Tensor) -> Tensor:
    """(C, T, D) → (C, step, n, D): the tokens of each residue class, filled up with zeros."""
    x = F.pad(x, (0, 0, 0, part.step * part.class_size - part.tokens))
    return x.unflatten(1, (part.class_size, part.step)).transpose(1, 2)


def _from_classes(part: Regrouped, x: Tensor) -> Tensor:
    """(C, step, n, D) → (C, T, D)."""
    return x.transpose(1, 2).flatten(1, 2)[:, : part.tokens]


@dataclass(frozen=True)
class _Operand:
    """One of q, k, v or the output's gradient, as the components need it."""

    buffer: Tensor  # (pad + C · L, D)
    classes: Tensor | None  # (C · step, n, D)

    @classmethod
    def of(cls, part: Regrouped, x: Tensor) -> "_Operand":
        """Lay out x (C, T, D)."""
        grouped = _to_classes(part, x) if part.classes or part.layout.regroup else None
        if part.layout.regroup:
            assert grouped is not None
            x = grouped.flatten(1, 2)
        rows = F.pad(x, (0, 0, 0, part.length - x.shape[1])).flatten(0, 1)
        classes = None if grouped is None or not part.classes else grouped.flatten(0, 1)
        return cls(F.pad(rows, (0, 0, part.pad, 0)), classes)


class _Views:
    """Strided views over the buffers of C heads.

    The empty rows after the last head make no blocks, so that no window reaches past the end.
    """

    def __init__(self, part: Regrouped, heads: int) -> None:
        self.part, self.heads = part, heads
        self.num_blocks = (heads * part.length - part.pad) // part.block

    def rows(self, x: _Operand) -> Tensor:
        """(C, L, D)."""
        return x.buffer[self.part.pad :].unflatten(0, (self.heads, self.part.length))

    def blocks(self, x: _Operand) -> Tensor:
        """(blocks, b, D): each block's own rows."""
        part, dim = self.part, x.buffer.shape[1]
        return x.buffer.as_strided((self.num_blocks, part.block, dim), (part.block * dim, dim, 1), part.pad * dim)

    def _windows(self, x: _Operand, before: int) -> Tensor:
        part, dim = self.part, x.buffer.shape[1]
        size, stride = (self.num_blocks, part.window, dim), (part.block * dim, dim, 1)
        return x.buffer.as_strided(size, stride, (part.pad - before) * dim)

    def around_queries(self, x: _Operand) -> Tensor:
        """(blocks, K, D): the keys of each block of queries."""
        return self._windows(x, self.part.before)

    def around_keys(self, x: _Operand) -> Tensor:
        """(blocks, K, D): the queries of each block of keys."""
        return self._windows(x, self.part.after)

    def placed(self, scores: Tensor) -> Tensor:
        """(C, L, W): scores (blocks, b, K) as they stand in rows; slanted rows begin before a block's first score."""
        part = self.part
        b, K, W = part.block, part.window, part.width
        if not part.slanted:
            return F.pad(scores, (0, W - K)).view(self.heads, part.length, W)
        flat = F.pad(scores.flatten(), (b - 1, W - K + part.pad * K))
        size, stride = (self.heads, part.length // b, b, W), (part.length * K, b * K, K + 1, 1)
        return flat.as_strided(size, stride).flatten(1, 2)

    def band(self, rows: Tensor) -> Tensor:
        """(blocks, b, K): the band's weights of each block of queries, in rows (C, L, pitch)."""
        part = self.part
        size = (self.num_blocks, part.block, part.window)
        start = part.band_start + part.slanted * (part.block - 1)
        return rows.as_strided(size, (part.block * part.pitch, part.pitch - part.slanted, 1), start)

    def band_of_keys(self, rows: Tensor) -> Tensor:
        """(blocks, b, K): those of each block of keys, transposed."""
        part = self.part
        size, row = (self.num_blocks, part.block, part.window), part.pitch - part.slanted
        start = part.band_start + part.slanted * (part.block - 1)
        if part.slanted:
            start += part.before - part.after * row + part.after * part.pitch
            if part.after:  # the queries before the first head's first key
                rows = F.pad(rows.flatten(), (part.after * part.pitch, 0))
        return rows.as_strided(size, (part.block * part.pitch, 1, row), start)

    def classes(self, rows: Tensor) -> Tensor:
        """(C · step, n, n): the classes' weights in rows (C, L, pitch)."""
        part = self.part
        grid = rows[:, : part.step * part.class_size, : part.class_size].unflatten(1, (part.class_size, part.step))
        return grid.transpose(1, 2).flatten(0, 1)

    def products(self, queries: _Operand, keys: _Operand, columns: Tensor) -> Tensor:
        """Rows (C, L, pitch) of the products of queries with their keys, of forbidden ones too."""
        part = self.part
        components = []
        if part.classes:
            assert queries.classes is not None
            assert keys.classes is not None
            scores = torch.bmm(queries.classes, keys.classes.mT).unflatten(0, (self.heads, part.step))
            scores = scores.transpose(1, 2).flatten(1, 2)  # (C, step · n, n)
            components.append(F.pad(scores, (0, 0, 0, part.length - scores.shape[1])))
        if part.num_columns:
            components.append(torch.bmm(self.rows(queries), columns.mT))
        components.append(self.placed(torch.bmm(self.blocks(queries), self.around_queries(keys).mT)))
        return torch.cat(components, -1)

    def tokens(self, blocks: Tensor, classes: Tensor | None, columns: Tensor | None) -> Tensor:
        """Sum what came of the components: (C, T, D)."""
        part = self.part
        rows = F.pad(blocks.flatten(0, 1), (0, 0, 0, part.pad)).unflatten(0, (self.heads, part.length))
        if columns is not None:
            rows = rows + columns
        if part.layout.regroup:
            grouped = rows[:, : part.step * part.class_size].unflatten(1, (part.step, part.class_size))
            return _from_classes(part, grouped)
        rows = rows[:, : part.tokens]
        return rows if classes is None else rows + _from_classes(part, classes.unflatten(0, (-1, part.step)))

    def to_queries(self, weights: Tensor, keys: _Operand, columns: Tensor) -> Tensor:
        """Sum keys by the weights (C, L, pitch) of each query: (C, T, D)."""
        part = self.part
        return self.tokens(
            torch.bmm(self.band(weights), self.around_queries(keys)),
            torch.bmm(self.classes(weights), keys.classes) if keys.classes is not None else None,
            torch.bmm(weights[..., part.key_columns], columns) if part.num_columns else None,
        )

    def to_keys(self, weights: Tensor, queries: _Operand) -> tuple[Tensor, Tensor]:
        """Sum queries by the weights that they give to each key: (C, T, D), and to each column: (C, M, D)."""
        part = self.part
        tokens = self.tokens(
            torch.bmm(self.band_of_keys(weights), self.around_keys(queries)),
            torch.bmm(self.classes(weights).mT, queries.classes) if queries.classes is not None else None,
            None,
        )
        rows = self.rows(queries)
        if not part.num_columns:
            return tokens, rows[:, :0]
        return tokens, torch.bmm(weights[..., part.key_columns].mT, rows)


@dataclass(frozen=True)
class _Heads:
    """q, k, v of some heads, in the working dtype."""

    q: _Operand
    k: _Operand
    v: _Operand
    k_columns: Tensor  # (C, M, D)
    v_columns: Tensor

    @classmethod
    def of(cls, part: Regrouped, dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, scale: float) -> "_Heads":
        """Lay out q, k, v (Cb, Ch, N, D)."""
        q, k, v = (wide(x, dtype) for x in (q, k, v))
        of_q, of_k, of_v = (_Operand.of(part, x[:, part.prefix :]) for x in (q * scale, k, v))
        return cls(of_q, of_k, of_v, k[:, part.columns], v[:, part.columns])


@compiled
def forward(
    part: Regrouped,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e: Excess,
    scale: float,
    keep: Tensor | None,
    bounds: Tensor,
    out: Tensor,
    kept: Tensor,
    rounds: int | None = None,
) -> Tensor:
    """Attention of the patch queries of C = Cb · Ch heads.

    Args:
        q, k, v: (Cb, Ch, N, D).
        e: the normalizer, see ``kernels.attempt``; (C, 1, 1) where each head has its own.
        scale: factor on the scores.
        keep: (C, L, pitch), what dropout multiplies the weights by.
        bounds: (L, pitch), see ``Regrouped.bounds``.
        out: gets the outputs (Cb, Ch, T, D).
        kept: gets the weights (C, L, pitch), before dropout.
        rounds: see ``kernels.attempt``.

    Returns:
        ``kernels.attempt``'s error.
    """
    x = _Heads.of(part, bounds.dtype, q, k, v, scale)
    views = _Views(part, kept.shape[0])
    scores = torch.minimum(views.products(x.q, x.k, x.k_columns), bounds)
    weights, _, error = kernels.attempt(scores, e, rounds)
    kept.copy_(weights)
    result = views.to_queries(weights if keep is None else weights * keep, x.v, x.v_columns)
    out.copy_(result.view(out.shape))
    return error


@compiled
def backward(
    part: Regrouped,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e: Excess,
    scale: float,
    keep: Tensor | None,
    weights: Tensor,
    d_out: Tensor,
    d_weights: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward`.

    Args:
        weights: (C, L, pitch), what it kept; from their storage's first entry on, since views are made by strides.
        d_out: (Cb, Ch, T, D).
        d_weights: (C, L, pitch), to the weights after dropout, where they were looked at.
        dq, dk, dv: get the gradients to the patch tokens (Cb, Ch, T, D).

    Returns:
        What the columns get of the gradients to k and v (C, M, D), and the gradient to each row's α (C, L, 1), empty
        where heads share one.
    """
    x = _Heads.of(part, weights.dtype, q, k, v, scale)
    g = _Operand.of(part, wide(d_out, weights.dtype))
    views = _Views(part, weights.shape[0])
    gradient = views.products(g, x.v, x.v_columns)
    if d_weights is not None:
        gradient = gradient + d_weights
    left = weights
    if keep is not None:
        gradient, left = gradient * keep, weights * keep
    d_scores = kernels.scores_gradient(weights, gradient, e)
    if isinstance(e, Tensor) and e.dim() == 3:
        d_alpha = kernels.alpha_gradient(weights, gradient, e)
    else:
        d_alpha = weights.new_empty(0)
    dq.copy_((views.to_queries(d_scores, x.k, x.k_columns) * scale).view(dq.shape))
    to_keys, dk_columns = views.to_keys(d_scores, x.q)
    dk.copy_(to_keys.view(dk.shape))
    to_values, dv_columns = views.to_keys(left, g)
    dv.copy_(to_values.view(dv.shape))
    return dk_columns, dv_columns, d_alpha
