"""A pattern as an execution plan of small dense products: what the sparse engine runs.

All scores of a query stand in one row of a fixed pitch, component after component, and one normalizer runs over that
row. Prefix tokens are columns that every patch query is scored against; their own queries, and patterns without
components, are computed over whole rows of keys.

:meth:`PatchRows.keys` says which key every place of a row belongs to; where a key stands at several, the last counts.
So a plan can be scattered back: it covers each allowed entry of the pattern once, and nothing else.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from vit_attn.attention.engine import parts
from vit_attn.attention.graphs import outside_of_graphs
from vit_attn.attention.patterns.base import FORBIDDEN, Pattern
from vit_attn.attention.patterns.components import Band, Blocks, Classes, Columns, Component, Tiles

# Scores of one head that are computed at a time where rows are whole: 2 MiB in fp32, about what a core caches.
_ROW_ENTRIES = 2**19
# Rows are multiples of this many entries: whole vector registers, and rows aligned for the kernels.
_ALIGNMENT = 16


def lowest(dtype: torch.dtype) -> float:
    """A score that no allowed entry has: finite, so that no arithmetic on it gives NaN."""
    return torch.finfo(dtype).min / 4


@dataclass(frozen=True, eq=False)
class WholeRows:
    """Queries ``start:stop`` over keys ``0:width``, as one dense product.

    Args:
        start, stop, width: see above.
        first: the first key that not all of the queries see.
        forbidden: (stop - start, width - first) bool of keys ``first:width``; None where all are allowed.
    """

    start: int
    stop: int
    width: int
    first: int
    forbidden: Tensor | None

    @classmethod
    def of(cls, pattern: Pattern, start: int, stop: int, device: torch.device) -> "WholeRows":
        """Rows ``start:stop`` of a pattern, without the keys that none of them sees at the end."""
        allowed = pattern.label_rows(start, stop, device) != FORBIDDEN
        # In quarters, so that few widths need a compiled kernel each.
        quarter = -(-pattern.size // 4)
        width = min(parts.round_up(int(allowed.any(0).nonzero().max()) + 1, quarter), pattern.size)
        mixed = (~allowed[:, :width].all(0)).nonzero()
        if not len(mixed):
            return cls(start, stop, width, width, None)
        first = int(mixed.min())
        return cls(start, stop, width, first, ~allowed[:, first:width])

    @property
    def scores(self) -> int:
        """How many scores of one head are computed."""
        return (self.stop - self.start) * self.width


class PatchRows:
    """Queries of all patch tokens over the components of their pattern.

    Positions are those of a buffer of ``length`` rows per head: the patch tokens in raster order, or in the order that
    a component asks for, with empty ones where that has holes; and then ``pad`` more, which part the heads when
    buffers of several lie end to end.

    Attributes:
        pattern: over all N tokens.
        tokens, prefix: T, patch tokens; tokens before them.
        order: (positions,) int64, the patch token at each position, T at an empty one; None: raster order.
        position: (T,) int64, the position of each patch token; None: raster order.
        residues: where the order is that of the residues mod this number; else 1.
        parts: the components, in the order in which they stand in a row; the one that asks for the order is last.
        columns: (M,) int64, keys counted over all N that every query is scored against.
        pad, length, pitch: see above.
    """

    def __init__(self, pattern: Pattern, components: list[Component], device: torch.device) -> None:
        self.pattern, self.device = pattern, device
        self.tokens, self.prefix = pattern.num_tokens, pattern.num_prefix_tokens
        home = next((each for each in components if isinstance(each, (Band, Blocks, Tiles))), Band(before=0, after=0))
        self.order = self.position = None
        order = parts.order_of(home, self.tokens)
        self.residues = min(home.step, self.tokens) if isinstance(home, Band) else 1
        if order is not None:
            self.order = torch.where(order < 0, self.tokens, order).to(device)
            places = torch.arange(len(order))
            self.position = torch.empty(self.tokens, dtype=torch.int64)
            self.position[order[order >= 0]] = places[order >= 0]
            self.position = self.position.to(device)
        others = [each for each in components if each is not home and not isinstance(each, Columns)]
        found = [self._part(each) for each in others]
        columns = [*range(self.prefix)]
        columns += [self.prefix + token for each in components if isinstance(each, Columns) for token in each.tokens]
        self.columns = torch.tensor(columns, dtype=torch.int64, device=device)
        self.num_columns = len(columns)
        if columns:
            found.append(parts.ColumnPart(self))
        self.home = parts.home_part(self, home)
        self.parts: list[parts.Part] = [*found, self.home]
        self._others = dict(zip(others, self.parts, strict=False))
        self.pad = self.home.pad
        needed = max([self.tokens if order is None else len(order), *(part.positions for part in self.parts)])
        self.length = parts.round_up(needed, self.home.block) + self.pad
        start = 0
        for part in self.parts:
            part.start = start
            start += part.width
        self.pitch = parts.round_up(start, _ALIGNMENT)
        self.home.width += self.pitch - start

    def _part(self, component: Component) -> "parts.Part":
        """A component that is not the one that asks for the order."""
        if isinstance(component, Band):
            raise ValueError("a pattern has one band, and it is the first of bands, blocks and tiles")
        if isinstance(component, Classes) and self.order is None:
            return parts.ClassPart(self, component)
        return parts.TilePart(self, *parts.tables_of(component, self.tokens), home=False)

    def unused(self) -> list[Component]:
        """The components whose allowed entries are all in others, too, so that they need not be computed."""
        allowed = {
            each: self.allowed[:, part.start : part.start + part.width].any() for each, part in self._others.items()
        }
        return [each for each, any_of_them in allowed.items() if not any_of_them]

    @property
    def scores(self) -> int:
        """How many scores of one head are computed."""
        return sum(part.scores for part in self.parts)

    def in_order(self, x: Tensor) -> Tensor:
        """(C, T, D) → (C, positions, D), zeros at empty ones."""
        if self.residues > 1:  # faster than a gather
            return parts.by_residue(x, self.residues).flatten(1, 2)
        return x if self.order is None else parts.gathered(x, self.order)

    def in_raster_order(self, x: Tensor) -> Tensor:
        """(C, L, D) → (C, T, D)."""
        if self.residues > 1:
            size = -(-self.tokens // self.residues)
            return parts.from_residues(x[:, : self.residues * size].unflatten(1, (self.residues, size)), self.tokens)
        return x[:, : self.tokens] if self.position is None else x.index_select(1, self.position)

    def queries(self) -> Tensor:
        """(L,) int64: the token, counted over all N, at each position; -1 at an empty one."""
        position = torch.arange(self.length, device=self.device)
        token = position
        if self.order is not None:
            token = torch.full_like(position, self.tokens)
            token[: len(self.order)] = self.order
        return torch.where(token < self.tokens, token + self.prefix, -1)

    def keys(self) -> Tensor:
        """(L, pitch) int64: the key, counted over all N, at each place of the rows; -1 where there is none."""
        queries = self.queries()
        return torch.cat([part.keys(queries) for part in self.parts], 1)

    @cached_property
    def allowed(self) -> Tensor:
        """(L, pitch) bool: which places of the rows the pattern allows, each entry at one of them."""
        queries, keys = self.queries()[:, None], self.keys()
        labels = self.pattern.labels_at(queries.clamp_min(0), keys.clamp_min(0))
        allowed = (labels != FORBIDDEN) & (queries >= 0) & (keys >= 0)
        # The last place of each key in a row: sorted in reverse, the first of those that are alike.
        ordered, places = torch.where(allowed, keys, -1).flip(1).sort(dim=1, stable=True)
        first = torch.ones_like(allowed)
        first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        return allowed & torch.zeros_like(allowed).scatter_(1, places, first).flip(1)

    @lru_cache(maxsize=4)  # noqa: B019  # plans are few, and kept anyway
    def bounds(self, dtype: torch.dtype) -> Tensor:
        """(L, pitch): the lowest score where an entry is forbidden, its negative where it is allowed.

        Numbers of the scores' size, because compiled code reads a mask of bool many times slower.
        """
        bounds = torch.full(self.allowed.shape, lowest(dtype), dtype=dtype, device=self.device)
        return bounds.masked_fill_(self.allowed, -lowest(dtype))

    @cached_property
    def entries(self) -> tuple[Tensor, Tensor]:
        """Where the allowed entries stand: in the rows (L · pitch) and in an (N, N) matrix, flat int64 indices."""
        places = self.allowed.flatten().nonzero()[:, 0]
        keys = self.keys().flatten()[places]
        return places, self.queries()[places // self.pitch] * self.pattern.size + keys


@dataclass(frozen=True)
class Plan:
    """What computes all queries, each in one part.

    Args:
        patches: the patch queries; None where the pattern has no components.
        rows: the other queries.
    """

    patches: PatchRows | None
    rows: tuple[WholeRows, ...]

    @property
    def scores(self) -> int:
        """How many scores of one head are computed: allowed ones, and the forbidden ones inside of blocks."""
        return sum(part.scores for part in (self.patches, *self.rows) if part is not None)


def _row_ranges(end: int, keys: int) -> list[tuple[int, int]]:
    step = max(1, _ROW_ENTRIES // keys)
    return [(start, min(start + step, end)) for start in range(0, end, step)]


@lru_cache(maxsize=64)
def make_plan(pattern: Pattern, device: torch.device) -> Plan:
    """Derive the plan of a pattern over tokens; its masks live on ``device``."""
    with outside_of_graphs():
        components = pattern.components()
        patches = None if components is None else PatchRows(pattern, components, device)
        if patches is not None and (unused := patches.unused()):
            patches = PatchRows(pattern, [each for each in components or [] if each not in unused], device)
        end = pattern.size if components is None else pattern.num_prefix_tokens
        ranges = _row_ranges(end, pattern.size)
        return Plan(patches, tuple(WholeRows.of(pattern, start, stop, device) for start, stop in ranges))


@lru_cache(maxsize=64)
def whole_plan(queries: int, keys: int) -> Plan:
    """Plan of queries that see every key."""
    return Plan(None, tuple(WholeRows(start, stop, keys, keys, None) for start, stop in _row_ranges(queries, keys)))
