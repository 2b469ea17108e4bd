"""The components of a pattern as batched products, and where their scores stand in a query's row.

q, k, v are laid into buffers whose rows follow the plan, with empty rows between heads, so that every block, every
window of keys around a block of queries and every window of queries around a block of keys is a strided view. What
lies between the products is a few passes over the scores, which ``torch.compile`` makes of these lines.

Below, C heads are computed together, T patch tokens each; x (C, T, D) are their queries, keys, values or gradients, L
the positions of the buffer of one head.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vit_attn.attention.patterns.components import Band, Blocks, Classes, Component, Tiles

if TYPE_CHECKING:
    from vit_attn.attention.engine.plan import PatchRows

# Queries per block of the band. Smaller blocks compute fewer forbidden entries, larger ones multiply faster.
_SMALLEST_BLOCK, _LARGEST_BLOCK = 8, 16


def round_up(number: int, step: int) -> int:
    """The next multiple of ``step``."""
    return -(-number // step) * step


def _residues(tokens: int, step: int) -> Tensor:
    """(step, n) tokens of each residue mod ``step``, -1 where the last is missing."""
    step = min(step, tokens)
    table = torch.arange(round_up(tokens, step)).view(-1, step).T
    return torch.where(table < tokens, table, -1).contiguous()


def order_of(component: Component, tokens: int) -> Tensor | None:
    """(positions,) int64: the patch tokens in the order in which a component is made of blocks, -1 at empty places;
    None where that is raster order.
    """
    if isinstance(component, Band) and component.step > 1:
        return _residues(tokens, component.step).flatten()
    if isinstance(component, Blocks) and component.tokens is not None:
        return component.tokens.flatten()
    return component.queries.flatten() if isinstance(component, Tiles) else None


def tables_of(component: Component, tokens: int) -> tuple[Tensor, Tensor]:
    """Groups of queries (tiles, t), and the keys of each (tiles, m)."""
    if isinstance(component, Tiles):
        return component.queries, component.keys
    if isinstance(component, Classes):
        table = _residues(tokens, component.step)
    else:
        assert isinstance(component, Blocks)
        table = component.tokens  # type: ignore[assignment]
        if table is None:
            table = torch.arange(round_up(tokens, component.size)).view(-1, component.size)
            table = torch.where(table < tokens, table, -1)
    return table, table


def gathered(x: Tensor, places: Tensor) -> Tensor:
    """(C, len(places), D): the rows of x (C, T, D) at these places, zeros at T."""
    return F.pad(x, (0, 0, 0, 1)).index_select(1, places)


def by_residue(x: Tensor, step: int) -> Tensor:
    """(C, T, D) → (C, step, n, D): the tokens of each residue mod ``step``, filled up with zeros."""
    size = -(-x.shape[1] // step)
    return F.pad(x, (0, 0, 0, step * size - x.shape[1])).unflatten(1, (size, step)).transpose(1, 2)


def from_residues(x: Tensor, tokens: int) -> Tensor:
    """(C, step, n, D) → (C, T, D)."""
    return x.transpose(1, 2).flatten(1, 2)[:, :tokens]


class Operand:
    """One of q, k, v or the output's gradient of C heads, as the components need it.

    Args:
        tokens: (C, T, D), the patch tokens.
        every: (C, N, D), with the prefix tokens; of keys and values.
    """

    def __init__(self, rows: "PatchRows", tokens: Tensor, every: Tensor | None = None) -> None:
        self.layout, self.tokens, self.every = rows, tokens, every
        self.heads = tokens.shape[0]
        ordered = rows.in_order(self.tokens)
        ordered = F.pad(ordered, (0, 0, 0, rows.length - ordered.shape[1])).flatten(0, 1)
        self.buffer = F.pad(ordered, (0, 0, rows.pad, 0)) if rows.pad else ordered  # (pad + C · L, D)
        self._made: dict[int, Tensor] = {}

    def rows(self) -> Tensor:
        """(C, L, D)."""
        return self.buffer[self.layout.pad :].unflatten(0, (self.heads, self.layout.length))

    def once(self, part: "Part", make: Callable[["Operand"], Tensor]) -> Tensor:
        """What ``make`` gives, made once for each component."""
        if part.start not in self._made:
            self._made[part.start] = make(self)
        return self._made[part.start]


class Part:
    """One component's places in the rows.

    Attributes:
        start, width: of its places in a row.
        positions: how many positions of the buffer it needs.
        scores: how many scores of one head are computed.
        queries_at_home, keys_at_home: whether what it sums for queries, and for keys, stands in the order of the
            buffer, not in raster order.
    """

    start: int = 0
    width: int
    positions: int = 0
    scores: int = 0
    queries_at_home: bool = True
    keys_at_home: bool = False

    def __init__(self, rows: "PatchRows") -> None:
        self.layout = rows

    def here(self, rows: Tensor) -> Tensor:
        """The component's places (C, L, width) of rows (C, L, pitch)."""
        return rows[..., self.start : self.start + self.width]

    def keys(self, queries: Tensor) -> Tensor:
        """(L, width) int64: the key, counted over all N, at each place; -1 where there is none. queries: (L,)."""
        raise NotImplementedError

    def products(self, q: Operand, k: Operand) -> Tensor:
        """(C, L, width): products of queries with their keys, of forbidden ones too."""
        raise NotImplementedError

    def to_queries(self, rows: Tensor, k: Operand) -> Tensor:
        """Sum keys by the weights (C, L, pitch) of each query: (C, L, D) at home, (C, T, D) elsewhere."""
        raise NotImplementedError

    def to_keys(self, rows: Tensor, q: Operand) -> Tensor:
        """Sum queries by the weights that they give to each key: (C, L, D) at home, (C, T, D) elsewhere.

        Not of columns, which all queries of the plan share: see :meth:`ColumnPart.to_columns`.
        """
        raise NotImplementedError


class BandPart(Part):
    """Blocks of queries against the keys around them, in the order of the buffer; or against the block itself.

    Attributes:
        block: b, queries per block.
        before, after: tokens around a block that it is scored against, whole blocks of them.
        window: K = before + b + after, the keys of a block.
        slanted: whether the band stands in a row by the distance of its keys; so the weights of a block of keys, too,
            are a matrix of constant strides.
    """

    keys_at_home = True

    def __init__(self, rows: "PatchRows", component: Band | Blocks) -> None:
        super().__init__(rows)
        before, after, block = 0, 0, 0
        if isinstance(component, Band):
            before, after = min(component.before, rows.tokens), min(component.after, rows.tokens)
        else:
            block = min(component.size, rows.tokens) if component.tokens is None else component.tokens.shape[1]
        self.block = block or _block_size(max(before, after))
        self.before, self.after = round_up(before, self.block), round_up(after, self.block)
        self.window = self.before + self.block + self.after
        self.slanted = self.window > self.block
        self.pad = max(self.before, self.after)
        self.width = self.window + self.block - 1 if self.slanted else self.block

    @property
    def scores(self) -> int:  # type: ignore[override]
        """How many scores of one head are computed."""
        return self.layout.length * self.window

    def keys(self, queries: Tensor) -> Tensor:
        length = self.layout.length
        position = torch.arange(length, device=queries.device)[:, None]
        place = torch.arange(self.width, device=queries.device)
        block = position // self.block * self.block
        at = position + place - (self.before + self.block - 1) if self.slanted else block + place
        # A slanted row is longer than the window of its block; what stands outside is of another query.
        inside = (at >= 0) & (at < length) & (at >= block - self.before) & (at < block + self.block + self.after)
        return torch.where(inside, queries[at.clamp(0, length - 1)], -1)

    def _num_blocks(self, heads: int) -> int:
        # The empty rows after the last head make no blocks, so that no window reaches past the end.
        return (heads * self.layout.length - self.layout.pad) // self.block

    def _blocks(self, x: Operand) -> Tensor:
        """(blocks, b, D): each block's own rows."""
        b, dim = self.block, x.buffer.shape[1]
        size = (self._num_blocks(x.heads), b, dim)
        return x.buffer.as_strided(size, (b * dim, dim, 1), self.layout.pad * dim)

    def _windows(self, x: Operand, before: int) -> Tensor:
        """(blocks, K, D): the rows around each block, from ``before`` rows before it on."""
        b, dim = self.block, x.buffer.shape[1]
        size = (self._num_blocks(x.heads), self.window, dim)
        return x.buffer.as_strided(size, (b * dim, dim, 1), (self.layout.pad - before) * dim)

    def _placed(self, scores: Tensor, heads: int) -> Tensor:
        """(C, L, W): scores (blocks, b, K) as they stand in rows; slanted rows begin before a block's first score."""
        b, K, W, length = self.block, self.window, self.width, self.layout.length
        if not self.slanted:
            return F.pad(scores, (0, W - K)).view(heads, length, W)
        flat = F.pad(scores.flatten(), (b - 1, W - K + self.layout.pad * K))
        size, stride = (heads, length // b, b, W), (length * K, b * K, K + 1, 1)
        return flat.as_strided(size, stride).flatten(1, 2)

    def _of_queries(self, rows: Tensor) -> Tensor:
        """(blocks, b, K): the weights of each block of queries, in rows (C, L, pitch)."""
        pitch = self.layout.pitch
        size = (self._num_blocks(rows.shape[0]), self.block, self.window)
        start = self.start + self.slanted * (self.block - 1)
        return rows.as_strided(size, (self.block * pitch, pitch - self.slanted, 1), start)

    def _of_keys(self, rows: Tensor) -> Tensor:
        """(blocks, b, K): those of each block of keys, transposed."""
        pitch = self.layout.pitch
        size, row = (self._num_blocks(rows.shape[0]), self.block, self.window), pitch - self.slanted
        start = self.start + self.slanted * (self.block - 1)
        if self.slanted:
            start += self.before - self.after * row + self.after * pitch
            if self.after:  # the queries before the first head's first key
                rows = F.pad(rows.flatten(), (self.after * pitch, 0))
        return rows.as_strided(size, (self.block * pitch, 1, row), start)

    def _in_rows(self, blocks: Tensor, heads: int) -> Tensor:
        """(C, L, D): what came of blocks (blocks, b, D)."""
        rows = F.pad(blocks.flatten(0, 1), (0, 0, 0, self.layout.pad))
        return rows.unflatten(0, (heads, self.layout.length))

    def products(self, q: Operand, k: Operand) -> Tensor:
        return self._placed(torch.bmm(self._blocks(q), self._windows(k, self.before).mT), q.heads)

    def to_queries(self, rows: Tensor, k: Operand) -> Tensor:
        return self._in_rows(torch.bmm(self._of_queries(rows), self._windows(k, self.before)), k.heads)

    def to_keys(self, rows: Tensor, q: Operand) -> Tensor:
        return self._in_rows(torch.bmm(self._of_keys(rows), self._windows(q, self.after)), q.heads)


def _block_size(reach: int) -> int:
    block = _SMALLEST_BLOCK
    while block < min(_LARGEST_BLOCK, reach / 2):
        block *= 2
    return block


class ColumnPart(Part):
    """Keys that all queries are scored against: prefix tokens, and the block ends of ``fixed``."""

    def __init__(self, rows: "PatchRows") -> None:
        super().__init__(rows)
        self.width = rows.num_columns

    @property
    def scores(self) -> int:  # type: ignore[override]
        """How many scores of one head are computed."""
        return self.layout.length * self.width

    def keys(self, queries: Tensor) -> Tensor:
        return self.layout.columns.expand(len(queries), -1)

    def _columns(self, x: Operand) -> Tensor:
        """(C, M, D)."""
        assert x.every is not None
        return x.every[:, self.layout.columns]

    def products(self, q: Operand, k: Operand) -> Tensor:
        return torch.bmm(q.rows(), k.once(self, self._columns).mT)

    def to_queries(self, rows: Tensor, k: Operand) -> Tensor:
        return torch.bmm(self.here(rows), k.once(self, self._columns))

    def to_columns(self, rows: Tensor, q: Operand) -> Tensor:
        """Sum queries by the weights that they give to each column: (C, M, D)."""
        return torch.bmm(self.here(rows).mT, q.rows())


class ClassPart(Part):
    """Tokens of one residue mod ``step`` see each other, in a buffer in raster order.

    Attributes:
        step, size: residue classes, and n, the tokens of one, the last of which may be missing.
    """

    queries_at_home = False

    def __init__(self, rows: "PatchRows", component: Classes) -> None:
        super().__init__(rows)
        self.step = min(component.step, rows.tokens)
        self.size = self.width = -(-rows.tokens // self.step)
        self.positions = self.step * self.size
        self.scores = self.step * self.size**2

    def keys(self, queries: Tensor) -> Tensor:
        tokens = self.layout.tokens
        position = torch.arange(len(queries), device=queries.device)[:, None]
        token = position % self.step + self.step * torch.arange(self.size, device=queries.device)
        return torch.where((token < tokens) & (position < tokens), token + self.layout.prefix, -1)

    def _grouped(self, x: Operand) -> Tensor:
        """(C · step, n, D): the tokens of each class."""
        return by_residue(x.tokens, self.step).flatten(0, 1)

    def _of_classes(self, rows: Tensor) -> Tensor:
        """(C · step, n, n): the classes' weights in rows (C, L, pitch)."""
        grid = self.here(rows)[:, : self.positions].unflatten(1, (self.size, self.step))
        return grid.transpose(1, 2).flatten(0, 1)

    def _in_tokens(self, classes: Tensor) -> Tensor:
        """(C · step, n, D) → (C, T, D)."""
        return from_residues(classes.unflatten(0, (-1, self.step)), self.layout.tokens)

    def products(self, q: Operand, k: Operand) -> Tensor:
        scores = torch.bmm(q.once(self, self._grouped), k.once(self, self._grouped).mT).unflatten(
            0, (q.heads, self.step)
        )
        scores = scores.transpose(1, 2).flatten(1, 2)  # (C, step · n, n)
        return F.pad(scores, (0, 0, 0, self.layout.length - scores.shape[1]))

    def to_queries(self, rows: Tensor, k: Operand) -> Tensor:
        return self._in_tokens(torch.bmm(self._of_classes(rows), k.once(self, self._grouped)))

    def to_keys(self, rows: Tensor, q: Operand) -> Tensor:
        return self._in_tokens(torch.bmm(self._of_classes(rows).mT, q.once(self, self._grouped)))


class TilePart(Part):
    """Groups of t queries, each against a table of m keys.

    Sums over the tiles that hold a key are taken through the table turned round: for every key the slots where it
    stands. So nothing is added to one place from several, and the result is the same however many threads there are.

    Args:
        queries: (tiles, t) int64, every patch token once, -1 at empty places.
        keys: (tiles, m) int64, -1 at empty places.
        home: whether the queries in this order are that of the buffer.
    """

    def __init__(self, rows: "PatchRows", queries: Tensor, keys: Tensor, *, home: bool) -> None:
        super().__init__(rows)
        self.home = home
        self.tiles, self.block = queries.shape
        self.width = self.num_keys = keys.shape[1]
        self.scores = self.tiles * self.block * self.num_keys
        self.positions = self.tiles * self.block if home else 0
        self.pad, self.tokens = 0, rows.tokens
        empty = rows.tokens
        self.queries_table = torch.where(queries < 0, empty, queries).flatten().to(rows.device)
        self.keys_table = torch.where(keys < 0, empty, keys).flatten().to(rows.device)
        self.slots, self.filled = (x.to(rows.device) for x in _slots(keys.flatten(), rows.tokens))
        if not home:
            place = torch.zeros(rows.tokens + 1, dtype=torch.int64)
            place[self.queries_table.cpu()] = torch.arange(self.tiles * self.block)
            position = torch.arange(rows.tokens) if rows.position is None else rows.position.cpu()
            # Which row of the tiles stands at each position of the buffer, and the other way round.
            self.from_tiles = torch.zeros(int(position.max()) + 1, dtype=torch.int64)
            self.from_tiles[position] = place[:-1]
            self.to_tiles = torch.zeros(self.tiles * self.block, dtype=torch.int64)
            self.to_tiles[place[:-1]] = position
            self.from_tiles, self.to_tiles = self.from_tiles.to(rows.device), self.to_tiles.to(rows.device)

    def keys(self, queries: Tensor) -> Tensor:
        keys = self.keys_table.view(self.tiles, 1, -1).expand(-1, self.block, -1).flatten(0, 1)  # (tiles · t, m)
        if not self.home:
            keys = keys[self.from_tiles]
        keys = torch.where(keys < self.tokens, keys + self.layout.prefix, -1)
        return F.pad(keys, (0, self.width - self.num_keys, 0, len(queries) - len(keys)), value=-1)

    def _queries(self, x: Operand) -> Tensor:
        """(C · tiles, t, D)."""
        if self.home:
            return x.rows()[:, : self.positions].unflatten(1, (self.tiles, self.block)).flatten(0, 1)
        return gathered(x.tokens, self.queries_table).unflatten(1, (self.tiles, self.block)).flatten(0, 1)

    def _gathered_keys(self, x: Operand) -> Tensor:
        """(C · tiles, m, D)."""
        return gathered(x.tokens, self.keys_table).unflatten(1, (self.tiles, self.num_keys)).flatten(0, 1)

    def _of_tiles(self, rows: Tensor) -> Tensor:
        """(C · tiles, t, m): the weights of each tile in rows (C, L, pitch)."""
        weights = rows[..., self.start : self.start + self.num_keys]
        weights = weights[:, : self.positions] if self.home else weights.index_select(1, self.to_tiles)
        return weights.unflatten(1, (self.tiles, self.block)).flatten(0, 1)

    def _in_rows(self, tiles: Tensor, heads: int) -> Tensor:
        """(C, L, …): what came of the queries of tiles (C · tiles, t, …)."""
        rows = tiles.unflatten(0, (heads, self.tiles)).flatten(1, 2)
        if not self.home:
            rows = rows.index_select(1, self.from_tiles)
        return F.pad(rows, (0, 0, 0, self.layout.length - rows.shape[1]))

    def products(self, q: Operand, k: Operand) -> Tensor:
        scores = torch.bmm(self._queries(q), k.once(self, self._gathered_keys).mT)
        return F.pad(self._in_rows(scores, q.heads), (0, self.width - self.num_keys))

    def to_queries(self, rows: Tensor, k: Operand) -> Tensor:
        return self._in_rows(torch.bmm(self._of_tiles(rows), k.once(self, self._gathered_keys)), k.heads)

    def to_keys(self, rows: Tensor, q: Operand) -> Tensor:
        """(C, T, D), in raster order."""
        slots = torch.bmm(self._of_tiles(rows).mT, self._queries(q))  # (C · tiles, m, D)
        slots = slots.unflatten(0, (q.heads, self.tiles)).flatten(1, 2)
        total = torch.zeros_like(slots[:, :1])
        for places, filled in zip(self.slots, self.filled, strict=True):  # sums over a gather compile badly
            total = total + slots.index_select(1, places) * filled.to(slots.dtype)
        return total


def _slots(keys: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """(most, T), the slots of the table where each key stands, and (most, T, 1), whether there is one: 0 or 1."""
    count = torch.bincount(keys[keys >= 0], minlength=tokens)
    order = torch.where(keys < 0, tokens, keys).argsort(stable=True)
    ends = count.cumsum(0)
    place = torch.arange(int(count.max()))
    filled = place < count[:, None]
    slots = torch.where(filled, order[((ends - count)[:, None] + place).clamp_max(len(order) - 1)], 0)
    return slots.T.contiguous(), filled.T[..., None].float()


HomePart = BandPart | TilePart


def home_part(rows: "PatchRows", component: Component) -> HomePart:
    """The component that the order of the buffer is that of."""
    if isinstance(component, Tiles):
        return TilePart(rows, component.queries, component.keys, home=True)
    assert isinstance(component, (Band, Blocks))
    return BandPart(rows, component)
