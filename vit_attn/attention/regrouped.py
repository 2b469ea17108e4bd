"""The patch queries of some heads: the components of a pattern as batched products over strided views of buffers.

q, k, v are copied into buffers whose rows follow the plan, with empty rows between heads, so that every block, every
window of keys around a block of queries and every window of queries around a block of keys is a strided view.
"""

from functools import lru_cache

import torch
from torch import Tensor

from vit_attn.attention import kernels
from vit_attn.attention.blocks import Regrouped
from vit_attn.attention.call import Call, Chunk, wide

View = tuple[tuple[int, ...], tuple[int, ...], int]  # sizes, strides, offset


class _Geometry:
    """Views over the buffers of C heads: C · L rows after ``pad`` empty ones.

    The empty rows after the last head make no blocks, so that no window reaches past the end.
    """

    def __init__(self, part: Regrouped, heads: int) -> None:
        self.part, self.heads = part, heads
        self.num_rows = heads * part.length
        self.num_blocks = (self.num_rows - part.pad) // part.block
        # Weights of the band: by blocks of queries, and by blocks of keys, transposed.
        b, K, pitch, first = part.block, part.window, part.pitch, part.pad * part.pitch + part.band_start
        row = pitch - part.slanted
        start = first + part.slanted * (b - 1)
        self.by_queries: View = (self.num_blocks, b, K), (b * pitch, row, 1), start
        start += part.slanted * (part.before - part.after * row)
        self.by_keys: View = (self.num_blocks, b, K), (b * pitch, 1, row), start
        # Scores of the band, as they stand in rows: slanted rows begin before a block's first score.
        self.slack = part.slanted * (b - 1)
        self.num_scores = self.num_rows * K
        self.placed: View = (heads, part.length // b, b, part.width), (part.length * K, b * K, K + part.slanted, 1), 0

    def rows(self, buffer: Tensor) -> Tensor:
        """(C, L, D) of a buffer."""
        return buffer[self.part.pad :].view(self.heads, self.part.length, -1)

    def windows(self, buffer: Tensor, before: int) -> Tensor:
        """(blocks, K, D): rows around each block, from ``before`` rows before it."""
        part, dim = self.part, buffer.shape[1]
        size, stride = (self.num_blocks, part.window, dim), (part.block * dim, dim, 1)
        return buffer.as_strided(size, stride, (part.pad - before) * dim)

    def multiply(self, weights: Tensor, view: View, windows: Tensor) -> Tensor:
        """Weighted sums of the windows: (C, L, D)."""
        part = self.part
        out = windows.new_empty(self.num_rows, windows.shape[-1])
        blocks = out[: self.num_rows - part.pad].view(self.num_blocks, part.block, -1)
        size, stride, start = view
        torch.bmm(weights.as_strided(size, stride, weights.storage_offset() + start), windows, out=blocks)
        return out.view(self.heads, part.length, -1)


@lru_cache(maxsize=256)
def _geometry(part: Regrouped, heads: int) -> _Geometry:
    return _Geometry(part, heads)


def _spread(dst: Tensor, src: Tensor, step: int) -> None:
    """Copy tokens (C, T, D) to classes (C, step, n, D), the last of which may be one short."""
    whole, rest = divmod(src.shape[1], step)
    dst[:, :, :whole].copy_(src[:, : whole * step].unflatten(1, (whole, step)).transpose(1, 2))
    if rest:
        dst[:, :rest, whole].copy_(src[:, whole * step :])
        dst[:, rest:, whole].zero_()


def _gather(dst: Tensor, src: Tensor, step: int) -> None:
    """Add classes (C, step, n, D) to tokens (C, T, D)."""
    whole, rest = divmod(dst.shape[1], step)
    dst[:, : whole * step].unflatten(1, (whole, step)).add_(src[:, :, :whole].transpose(1, 2))
    if rest:
        dst[:, whole * step :].add_(src[:, :rest, whole])


def _place(scores: Tensor, bound: Tensor | None, target: Tensor) -> None:
    if bound is None:
        target.copy_(scores)
    else:
        torch.minimum(scores, bound, out=target)


class _Operand:
    """One of q, k, v or the output's gradient, as the components need it.

    Args:
        x: patch tokens (Cb, Ch, T, D); they are multiplied by ``scale``.
        columns: (C, M, D), the keys of all queries; None where x is not the keys' side.
    """

    def __init__(self, geometry: _Geometry, x: Tensor, like: Tensor, scale: float, columns: Tensor | None) -> None:
        part = geometry.part
        self.geometry, self.columns = geometry, columns
        self.buffer = like.new_empty(part.pad + geometry.num_rows, x.shape[-1])
        self.buffer[: part.pad] = 0
        self.rows = geometry.rows(self.buffer)
        self.rows[:, part.tokens :] = 0
        if part.layout.regroup:
            grouped = self.rows[:, : part.step * part.class_size].unflatten(1, (part.step, -1))
            _spread(grouped, x.flatten(0, 1), part.step)
            if scale != 1.0:
                self.rows.mul_(scale)
        else:
            tokens = self.rows[:, : part.tokens].view(x.shape)
            if scale != 1.0 and x.dtype == tokens.dtype:
                torch.mul(x, scale, out=tokens)
            else:
                tokens.copy_(x)
                if scale != 1.0:
                    tokens.mul_(scale)
        if part.classes:
            classes = like.new_empty(geometry.heads, part.step, part.class_size, x.shape[-1])
            _spread(classes, self.rows[:, : part.tokens], part.step)
            self.classes = classes.flatten(0, 1)  # (C · step, n, D)

    def blocks(self) -> Tensor:
        """(blocks, b, D): each block's own rows."""
        part, geometry = self.geometry.part, self.geometry
        rows = self.buffer[part.pad : geometry.num_rows]
        return rows.view(geometry.num_blocks, part.block, -1)

    def around_queries(self) -> Tensor:
        """(blocks, K, D): the keys of each block of queries."""
        return self.geometry.windows(self.buffer, self.geometry.part.before)

    def around_keys(self) -> Tensor:
        """(blocks, K, D): the queries of each block of keys."""
        return self.geometry.windows(self.buffer, self.geometry.part.after)


class RegroupedChunk:
    """Patch queries of one chunk of heads."""

    def __init__(self, call: Call, part: Regrouped, chunk: Chunk) -> None:
        self.call, self.part, self.chunk = call, part, chunk
        images, heads, *_ = call.q[chunk].shape
        self.geometry = _geometry(part, images * heads)
        self.q = self.operand(call.q, scale=call.scale)
        self.k, self.v = (self.operand(x, columns=True) for x in (call.k, call.v))

    def operand(self, x: Tensor, scale: float = 1.0, columns: bool = False) -> _Operand:
        """Load the patch tokens of x (B, H, N, D)."""
        part, x = self.part, x[self.chunk]
        taken = wide(x[:, :, part.columns], self.call.dtype) if columns and part.num_columns else None
        return _Operand(self.geometry, x[:, :, part.prefix :], self.call.like, scale, taken)

    def products(self, queries: _Operand, keys: _Operand, bounded: bool) -> Tensor:
        """Rows (C, L, pitch) of the products of queries and keys; where ``bounded``, forbidden ones are the lowest."""
        part, geometry, like = self.part, self.geometry, self.call.like
        bounds = part.bounds(like.dtype) if bounded else (None, None, None)
        rows = like.new_empty(geometry.heads, part.length, part.pitch)

        # The scores that no product fills are read too, and must be numbers.
        flat = like.new_empty(geometry.slack + geometry.num_scores + part.width - part.window)
        filled = geometry.slack + geometry.num_blocks * part.block * part.window
        flat[: geometry.slack] = 0
        flat[filled:] = 0
        blocks = flat[geometry.slack : filled].view(-1, part.block, part.window)
        torch.bmm(queries.blocks(), keys.around_queries().mT, out=blocks)
        placed = rows[..., part.band_start :].unflatten(1, (-1, part.block))
        _place(flat.as_strided(*geometry.placed), bounds[2], placed)
        if part.classes:
            classes = torch.bmm(queries.classes, keys.classes.mT).unflatten(0, (geometry.heads, part.step))
            _place(classes, bounds[0], self.classes_of(rows))
            rows[:, part.step * part.class_size :, part.class_columns] = kernels.lowest(like.dtype) if bounded else 0
        if keys.columns is not None:
            _place(torch.bmm(queries.rows, keys.columns.mT), bounds[1], rows[..., part.key_columns])
        return rows

    def classes_of(self, rows: Tensor) -> Tensor:
        """(C, step, n, n): the places of the classes in rows (C, L, pitch)."""
        part = self.part
        grid = rows[:, : part.step * part.class_size, part.class_columns]
        return grid.unflatten(1, (part.class_size, part.step)).transpose(1, 2)

    def copy_classes(self, weights: Tensor) -> Tensor | None:
        """(C · step, n, n): the weights of the classes in a buffer of rows; None without classes."""
        if not self.part.classes:
            return None
        return self.classes_of(self.geometry.rows(weights)).contiguous().flatten(0, 1)

    def to_queries(self, weights: Tensor, classes: Tensor | None, keys: _Operand) -> Tensor:
        """Sum keys by the weights of each query: (C, L, D)."""
        geometry = self.geometry
        out = geometry.multiply(weights, geometry.by_queries, keys.around_queries())
        if keys.columns is not None:
            out.baddbmm_(geometry.rows(weights)[..., self.part.key_columns], keys.columns)
        if classes is not None:
            self.add_classes(out, torch.bmm(classes, keys.classes))
        return out

    def to_keys(self, weights: Tensor, classes: Tensor | None, queries: _Operand) -> Tensor:
        """Sum queries by the weights that they give to each key of band and classes: (C, L, D)."""
        out = self.geometry.multiply(weights, self.geometry.by_keys, queries.around_keys())
        if classes is not None:
            self.add_classes(out, torch.bmm(classes.mT, queries.classes))
        return out

    def add_classes(self, out: Tensor, classes: Tensor) -> None:
        """Add what came of the classes to rows (C, L, D)."""
        part = self.part
        _gather(out[:, : part.tokens], classes.unflatten(0, (-1, part.step)), part.step)

    def put(self, target: Tensor, rows: Tensor) -> None:
        """Write rows (C, L, D) to the patch tokens of ``target`` (B, H, N, D)."""
        part = self.part
        patches = target[self.chunk][:, :, part.prefix :]
        if part.layout.regroup:
            tokens = rows.new_zeros(rows.shape[0], part.tokens, rows.shape[2])
            _gather(tokens, rows[:, : part.step * part.class_size].unflatten(1, (part.step, -1)), part.step)
        else:
            tokens = rows[:, : part.tokens]
        patches.copy_(tokens.view(patches.shape))

    def dropped(self, buffer: Tensor, keep: Tensor | None) -> Tensor:
        """Buffer of the weights that dropout leaves."""
        if keep is None:
            return buffer
        weights = buffer.clone()
        self.geometry.rows(weights).mul_(keep)
        return weights

    def forward(self, buffer: Tensor, out: Tensor, seen: Tensor | None) -> None:
        """Fill the rows of ``buffer`` with weights, and the patch tokens of ``out`` and ``seen``."""
        part, call = self.part, self.call
        scores = self.products(self.q, self.k, bounded=True)
        rows = self.geometry.rows(buffer)
        kernels.normalize(scores.flatten(0, 1), call.alpha_of(self.chunk, part.length), rows.flatten(0, 1))
        weights = self.dropped(buffer, call.keep(rows))
        self.put(out, self.to_queries(weights, self.copy_classes(weights), self.v))
        if seen is not None:
            places, entries = part.entries
            values = self.geometry.rows(weights).flatten(1)[:, places]
            seen[self.chunk].flatten(0, 1).flatten(1)[:, entries] = values

    def backward(
        self,
        buffer: Tensor,
        d_out: Tensor,
        d_seen: Tensor | None,
        gradients: tuple[Tensor, Tensor, Tensor],
        d_alphas: Tensor | None,
    ) -> None:
        """Fill the patch tokens of ``gradients`` to q, k, v (B, H, N, D), add to their columns and to ``d_alphas``."""
        part, call, geometry = self.part, self.call, self.geometry
        rows = geometry.rows(buffer)
        g = self.operand(d_out)
        d_weights = self.products(g, self.v, bounded=False)
        if d_seen is not None:
            places, entries = part.entries
            d_weights.flatten(1)[:, places] += d_seen[self.chunk].flatten(0, 1).flatten(1)[:, entries]
        keep = call.keep(rows)
        weights = self.dropped(buffer, keep)
        if keep is not None:
            d_weights.mul_(keep)
        d_scores = torch.empty_like(buffer)
        d_scores[: part.pad] = 0
        p, g_rows, alpha = rows.flatten(0, 1), d_weights.flatten(0, 1), call.alpha_of(self.chunk, part.length)
        kernels.scores_gradient(p, g_rows, alpha, geometry.rows(d_scores).flatten(0, 1))
        if d_alphas is not None:
            call.add_alpha_gradient(d_alphas, self.chunk, p, g_rows, alpha)

        classes, d_classes = self.copy_classes(weights), self.copy_classes(d_scores)
        dq, dk, dv = gradients
        self.put(dq, self.to_queries(d_scores, d_classes, self.k).mul_(call.scale))
        self.put(dk, self.to_keys(d_scores, d_classes, self.q))
        self.put(dv, self.to_keys(weights, classes, g))
        if part.num_columns:
            for gradient, values, queries in ((dk, d_scores, self.q), (dv, weights, g)):
                columns = torch.bmm(geometry.rows(values)[..., part.key_columns].mT, queries.rows)
                target = gradient[self.chunk]
                target.index_add_(2, part.columns, columns.view(*target.shape[:2], *columns.shape[1:]))
