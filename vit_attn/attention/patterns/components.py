"""Where the entries of a pattern lie, said in components that small dense products cover.

A pattern's entries lie in a union of components, which may overlap and may hold forbidden entries too: the engine
(:mod:`vit_attn.attention.engine`) computes each allowed entry once, under one normalizer. Tokens are counted over the
patch grid in raster order; prefix tokens are the engine's own business.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Component:
    """Part of a pattern."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Band(Component):
    """Keys up to ``before`` tokens before and ``after`` tokens after the query, counted among every ``step``-th."""

    before: int
    after: int
    step: int = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Blocks(Component):
    """Keys in the query's own block.

    Args:
        size: of blocks of consecutive tokens; or
        tokens: (blocks, size) int64, every patch token once, -1 at empty places.
    """

    size: int = 0
    tokens: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Classes(Component):
    """Keys of the query's own residue mod ``step``: with the grid's width, its column."""

    step: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Columns(Component):
    """A few ``tokens`` that all queries are scored against."""

    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Tiles(Component):
    """Groups of queries, each against a list of keys of its own: any static pattern.

    Args:
        queries: (tiles, t) int64, every patch token once, -1 at empty places.
        keys: (tiles, m) int64, -1 at empty places.
    """

    queries: Tensor
    keys: Tensor


# Queries per side of a tile: small ones compute fewer forbidden entries, large ones multiply faster and share keys.
_TILE_SIDES = (4, 8)
# What a key in a tile's table takes, in scores: it is copied there, and its gradient back. Measured.
_SCORES_PER_KEY = 48


@dataclass(frozen=True, kw_only=True, eq=False)
class Axis:
    """Rows or columns of the patch grid, n of them.

    Args:
        allowed: (n, n) bool, which positions a position may see.
        groups: all positions, in groups that no tile may straddle; neighbours in a group should see much the same.
    """

    allowed: Tensor
    groups: Sequence[Sequence[int]]

    def cut(self, side: int) -> tuple[Tensor, Tensor]:
        """Pieces (pieces, side), and the positions that each may see (pieces, most); -1 at empty places."""
        pieces = [list(group[start : start + side]) for group in self.groups for start in range(0, len(group), side)]
        seen = [self.allowed[piece].any(0).nonzero()[:, 0].tolist() for piece in pieces]
        return _padded(pieces), _padded(seen)


def tiles_of_axes(rows: Axis, columns: Axis) -> Tiles:
    """Tiles of a pattern that is a product of two axes: a query sees a key whose row and column it may see.

    Returns:
        The tiles that take the least work.
    """
    found, width = [], len(columns.allowed)
    for side in _TILE_SIDES:
        (y, seen_y), (x, seen_x) = rows.cut(side), columns.cut(side)
        found.append(Tiles(queries=_product(y, x, width), keys=_product(seen_y, seen_x, width)))
    return min(found, key=lambda each: each.queries.numel() * each.keys.shape[1] + _SCORES_PER_KEY * each.keys.numel())


def _padded(rows: list[list[int]]) -> Tensor:
    most = max(map(len, rows))
    return torch.tensor([row + [-1] * (most - len(row)) for row in rows])


def _product(y: Tensor, x: Tensor, width: int) -> Tensor:
    """(Ty, a), (Tx, b) positions to (Ty · Tx, a · b) tokens."""
    y, x = y[:, None, :, None], x[None, :, None, :]
    return torch.where((y >= 0) & (x >= 0), y * width + x, -1).flatten(2).flatten(0, 1)
