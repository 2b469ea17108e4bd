"""A pattern as an execution plan of small dense products: what the sparse engine runs.

A query's scores stand in one row of a fixed pitch, [class | columns | band], and one normalizer runs over that row:

- band: the local component. Queries are cut into blocks, each against the keys around it: (L/b, b, K).
- class: the second component of ``strided``. Tokens of one residue mod ``step`` see each other: (step, n, n).
- columns: keys that all queries are scored against: prefix tokens, and the block ends of ``fixed``. (L, M).

Queries of prefix tokens, and patterns without a :class:`Layout`, are computed over whole rows of keys.

The components are disjoint and :meth:`Regrouped.keys` says where every place of a row belongs, so a plan can be
scattered back: it covers each allowed entry of the pattern once, and nothing else.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from vit_attn.attention import kernels
from vit_attn.attention.patterns import FORBIDDEN, GLOBAL, LOCAL, SECOND, SELF, Layout, Pattern

# Scores of one head that are computed at a time where rows are whole: 2 MiB in fp32, about what a core caches.
_ROW_ENTRIES = 2**19
# Queries per block of the band. Smaller blocks compute fewer forbidden entries, larger ones multiply faster.
_SMALLEST_BLOCK, _LARGEST_BLOCK = 8, 16
# Rows are multiples of this many entries: whole vector registers, and rows aligned for the kernels.
_ALIGNMENT = 16


def _block_size(reach: int) -> int:
    block = _SMALLEST_BLOCK
    while block < min(_LARGEST_BLOCK, reach / 2):
        block *= 2
    return block


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


@dataclass(frozen=True, eq=False)
class Rows:
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
    def of(cls, pattern: Pattern, start: int, stop: int, device: torch.device) -> "Rows":
        """Rows ``start:stop`` of a pattern, without the keys that none of them sees at the end."""
        allowed = pattern.label_rows(start, stop, device) != FORBIDDEN
        # In quarters, so that few widths need a compiled kernel each.
        quarter = -(-pattern.size // 4)
        width = min(_round_up(int(allowed.any(0).nonzero().max()) + 1, quarter), pattern.size)
        mixed = (~allowed[:, :width].all(0)).nonzero()
        if not len(mixed):
            return cls(start, stop, width, width, None)
        first = int(mixed.min())
        return cls(start, stop, width, first, ~allowed[:, first:width])

    @property
    def scores(self) -> int:
        """How many scores of one head are computed."""
        return (self.stop - self.start) * self.width


class Regrouped:
    """Queries of all patch tokens over the components of their pattern's layout.

    Positions are those of a buffer of ``length`` rows per head: the patch tokens in raster order, or class by class
    where ``regroup``, and then ``pad`` empty ones, which part the heads when buffers of several lie end to end.

    Attributes:
        pattern, layout: over all N tokens, and of its patch tokens.
        tokens: T, patch tokens.
        block: b, queries per block of the band.
        before, after: tokens around a block that it is scored against, whole blocks of them.
        window: K = before + b + after, the keys of a block.
        slanted: whether the band stands in a row by the distance of its keys; so the weights of a block of keys, too,
            are a matrix of constant strides.
        step, class_size: residue classes of the tokens, and n, the tokens of one, the last of which may be missing.
        classes: whether the second component lies in them, and there is any.
        columns: (M,) int64, keys counted over all N that every query is scored against.
        pad, length: see above.
        width: W, entries of the band in a row, from ``band_start`` to the row's end.
        pitch: entries of a row: classes, columns, band.

    Args:
        pattern, layout: see above.
        device: of masks and indices.
    """

    def __init__(self, pattern: Pattern, layout: Layout, device: torch.device) -> None:
        self.pattern, self.layout, self.device = pattern, layout, device
        self.tokens, self.prefix = pattern.num_tokens, pattern.num_prefix_tokens
        before, after = min(layout.before, self.tokens), min(layout.after, self.tokens)
        self.block = _block_size(max(before, after)) if layout.block is None else min(layout.block, self.tokens)
        self.before, self.after = _round_up(before, self.block), _round_up(after, self.block)
        self.window = self.before + self.block + self.after
        self.slanted = self.window > self.block
        self.step = min(layout.step, self.tokens)
        self.class_size = -(-self.tokens // self.step)
        self.classes = layout.classes and self._any_in_classes()
        columns = [*range(self.prefix), *(self.prefix + column for column in layout.columns)]
        self.columns = torch.tensor(columns, dtype=torch.int64, device=device)
        self.num_columns = len(columns)
        self.pad = max(self.before, self.after)
        grouped = layout.regroup or self.classes
        self.length = _round_up(self.class_size * self.step if grouped else self.tokens, self.block) + self.pad
        in_classes = self.class_size if self.classes else 0
        self.class_columns = slice(0, in_classes)
        self.key_columns = slice(in_classes, in_classes + self.num_columns)
        self.band_start = in_classes + self.num_columns
        needed = self.window + self.block - 1 if self.slanted else self.block
        self.pitch = _round_up(self.band_start + needed, _ALIGNMENT)
        self.width = self.pitch - self.band_start

    def _any_in_classes(self) -> bool:
        first = torch.arange(0, self.tokens, self.step, device=self.device) + self.prefix
        return bool((self.pattern.labels_at(first[:, None], first) == SECOND).any())

    @property
    def scores(self) -> int:
        """How many scores of one head are computed."""
        in_classes = self.classes * self.step * self.class_size**2
        return self.length * (self.window + self.num_columns) + in_classes

    def queries(self) -> Tensor:
        """(L,) int64: the token, counted over all N, at each position; -1 at an empty one."""
        position = torch.arange(self.length, device=self.device)
        token = position
        if self.layout.regroup:
            token = position % self.class_size * self.step + position // self.class_size
            token = token.masked_fill(position >= self.class_size * self.step, self.tokens)
        return torch.where(token < self.tokens, token + self.prefix, -1)

    def keys(self) -> Tensor:
        """(L, pitch) int64: the key, counted over all N, at each place of the rows; -1 where there is none."""
        queries = self.queries()
        keys = queries.new_full((self.length, self.pitch), -1)
        position = torch.arange(self.length, device=self.device)[:, None]
        place = torch.arange(self.width, device=self.device)
        if self.slanted:
            at = position + place - (self.before + self.block - 1)
        else:
            at = position // self.block * self.block + place
        inside = (at >= 0) & (at < self.length)
        if not self.slanted:
            inside &= place < self.block
        keys[:, self.band_start :] = torch.where(inside, queries[at.clamp(0, self.length - 1)], -1)
        if self.classes:
            token = position % self.step + self.step * torch.arange(self.class_size, device=self.device)
            exists = (token < self.tokens) & (position < self.tokens)
            keys[:, self.class_columns] = torch.where(exists, token + self.prefix, -1)
        keys[:, self.key_columns] = self.columns
        return keys

    @cached_property
    def allowed(self) -> Tensor:
        """(L, pitch) bool: which places of the rows the pattern allows."""
        queries, keys = self.queries()[:, None], self.keys()
        labels = self.pattern.labels_at(queries.clamp_min(0), keys.clamp_min(0))
        allowed = torch.zeros_like(keys, dtype=torch.bool)
        band = labels[:, self.band_start :]
        allowed[:, self.band_start :] = (band == SELF) | (band == LOCAL)
        allowed[:, self.class_columns] = labels[:, self.class_columns] == SECOND
        columns = labels[:, self.key_columns]
        allowed[:, self.key_columns] = (columns == SECOND) | (columns == GLOBAL)
        return allowed & (queries >= 0) & (keys >= 0)

    @lru_cache(maxsize=4)  # noqa: B019  # plans are few, and kept anyway
    def bounds(self, dtype: torch.dtype) -> Tensor:
        """(L, pitch): upper bounds of the scores, none where allowed, the lowest score where forbidden.

        A minimum with them forbids in one vectorized pass, where a mask of bool takes many times as long.
        """
        bounds = torch.full(self.allowed.shape, kernels.lowest(dtype), dtype=dtype, device=self.device)
        return bounds.masked_fill_(self.allowed, torch.finfo(dtype).max)

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
        regrouped: the patch queries; None where the pattern has no layout.
        rows: the other queries.
    """

    regrouped: Regrouped | None
    rows: tuple[Rows, ...]

    @property
    def scores(self) -> int:
        """How many scores of one head are computed: allowed ones, and the forbidden ones inside of blocks."""
        return sum(part.scores for part in (self.regrouped, *self.rows) if part is not None)


def _row_ranges(end: int, keys: int) -> list[tuple[int, int]]:
    step = max(1, _ROW_ENTRIES // keys)
    return [(start, min(start + step, end)) for start in range(0, end, step)]


@lru_cache(maxsize=64)
def make_plan(pattern: Pattern, device: torch.device) -> Plan:
    """Derive the plan of ``pattern``; its masks live on ``device``."""
    layout = pattern.layout()
    regrouped = None if layout is None else Regrouped(pattern, layout, device)
    end = pattern.size if layout is None else pattern.num_prefix_tokens
    ranges = _row_ranges(end, pattern.size)
    return Plan(regrouped, tuple(Rows.of(pattern, start, stop, device) for start, stop in ranges))


@lru_cache(maxsize=64)
def whole_plan(queries: int, keys: int) -> Plan:
    """Plan of queries that see every key."""
    return Plan(None, tuple(Rows(start, stop, keys, keys, None) for start, stop in _row_ranges(queries, keys)))
