"""Patterns: which keys a query may see, fixed by position.

Notation: i = query, j = key, both counted over the patch tokens in raster order; d = i - j.
Every pattern is written here in its symmetric form, in |d|; ``causal=True`` keeps the entries with d >= 0.
`strided`, `fixed` and `causal` are causal as published (Child et al., 2019, arXiv:1904.10509), the windows
(Beltagy et al., 2020, arXiv:2004.05150) are not: that is their default, and ``causal`` overrides it.

Labels: 0 forbidden, 1 self, 2 local, 3 the second component, 4 global. Global are the rows and columns of the
prefix tokens (class token, registers), which stand outside the patch grid: they see, and are seen by, all.

A new pattern is one subclass of :class:`Pattern` and one line in :data:`PATTERNS`. Where it has a :class:`Layout`,
its forbidden entries cost nothing; without one it is computed over whole rows.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from math import isqrt
from typing import Any, ClassVar

import torch
from torch import Tensor

from vit_attn.attention.names import unknown_name

FORBIDDEN, SELF, LOCAL, SECOND, GLOBAL = range(5)
LABEL_NAMES = {
    FORBIDDEN: "forbidden",
    SELF: "self",
    LOCAL: "local",
    SECOND: "second component",
    GLOBAL: "global (prefix tokens)",
}
# Every pattern made so far by its ``key``, for what cannot hold an object: the engine's operators.
MADE: dict[str, "Pattern"] = {}
# Rows labelled at a time where only counts are wanted, so that counting never holds an (N, N) tensor.
_ROWS_PER_CHUNK = 1024


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the entries of a pattern lie, so that small dense products cover them.

    The patch tokens are taken in raster order, or where ``regroup`` in the order of their residues mod ``step``: all
    of residue 0, then all of residue 1, …

    Args:
        before, after: the local component lies within so many tokens of the query, in that order; or
        block: in the query's own block of so many tokens.
        step: see above; and of ``classes``.
        regroup: see above.
        classes: the second component lies among the tokens of the query's own residue mod ``step``.
        columns: tokens that hold the second component of every query.
    """

    before: int = 0
    after: int = 0
    block: int | None = None
    step: int = 1
    regroup: bool = False
    classes: bool = False
    columns: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """A static sparsity pattern over ``num_prefix_tokens + num_tokens`` tokens; hashable, so usable as a key.

    Args:
        num_tokens: patch tokens.
        num_prefix_tokens: tokens before the patch grid, visible to all and seeing all.
        causal: keep only keys at or before the query.

    Raises:
        ValueError: an option out of its range.
    """

    name: ClassVar[str]
    causal_by_default: ClassVar[bool] = False
    masks: ClassVar[dict[torch.device, Tensor]]  # an instance has its own
    key: ClassVar[str]  # likewise: its text, the same in every process

    num_tokens: int
    num_prefix_tokens: int = 0
    causal: bool = False

    def __post_init__(self) -> None:
        # What `allowed` gave, by device, for whoever needs it in every forward; no field, so no part of equality.
        object.__setattr__(self, "masks", {})
        object.__setattr__(self, "key", repr(self))
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "causal":
                if not isinstance(value, bool):
                    raise ValueError(f"causal must be true or false, not {value!r}")
                continue
            lowest = 0 if field.name == "num_prefix_tokens" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ValueError(f"{field.name} must be a whole number of at least {lowest}, not {value!r}")
        MADE[self.key] = self

    @property
    def size(self) -> int:
        """N: all tokens, prefix tokens included."""
        return self.num_prefix_tokens + self.num_tokens

    def local(self, i: Tensor, j: Tensor) -> Tensor:
        """Tell which (i, j) the first component allows; broadcast positions in, bool out. d = 0 is ignored."""
        raise NotImplementedError

    def second(self, i: Tensor, j: Tensor) -> Tensor | None:
        """Tell which (i, j) the second component allows where the first does not; None without one."""
        return None

    def layout(self) -> Layout | None:
        """Tell where the entries of the patch tokens lie; None where no regrouping makes them dense."""
        return None

    def labels_at(self, i: Tensor, j: Tensor) -> Tensor:
        """Label the entries of queries i and keys j, counted over all N tokens: uint8 of their broadcast shape."""
        i, j = i - self.num_prefix_tokens, j - self.num_prefix_tokens
        labels = torch.zeros(torch.broadcast_shapes(i.shape, j.shape), dtype=torch.uint8, device=i.device)
        second = self.second(i, j)
        if second is not None:
            labels.masked_fill_(second, SECOND)
        labels.masked_fill_(self.local(i, j), LOCAL)
        if self.causal:
            labels.masked_fill_(i < j, FORBIDDEN)
        labels.masked_fill_(i == j, SELF)
        labels.masked_fill_((i < 0) | (j < 0), GLOBAL)
        return labels

    def label_rows(self, start: int, stop: int, device: torch.device | str | None = None) -> Tensor:
        """Label the query rows ``start:stop`` of all N: (stop - start, N) uint8."""
        tokens = torch.arange(self.size, device=device)
        return self.labels_at(tokens[start:stop, None], tokens)

    def labels(self, device: torch.device | str | None = None) -> Tensor:
        """(N, N) uint8, rows are queries: 0 forbidden, 1 self, 2 local, 3 second component, 4 global."""
        return self.label_rows(0, self.size, device)

    def allowed(self, device: torch.device | str | None = None) -> Tensor:
        """(N, N) bool, rows are queries: True where the query may see the key."""
        return self.labels(device) != FORBIDDEN

    @cached_property
    def entries(self) -> int:
        """How many of the N x N entries are allowed."""
        starts = range(0, self.size, _ROWS_PER_CHUNK)
        chunks = (self.label_rows(s, min(s + _ROWS_PER_CHUNK, self.size)) for s in starts)
        return sum(int(chunk.count_nonzero()) for chunk in chunks)

    @property
    def sparsity(self) -> float:
        """Share of the N x N entries that are forbidden, in [0, 1)."""
        return 1.0 - self.entries / self.size**2


@dataclass(frozen=True, kw_only=True)
class Full(Pattern):
    """Every key: local is every j != i."""

    name = "full"

    def local(self, i: Tensor, j: Tensor) -> Tensor:
        return i != j


@dataclass(frozen=True, kw_only=True)
class Causal(Full):
    """Every key before the query: d >= 1 ("normal" in some mask sets)."""

    name = "causal"
    causal_by_default = True


@dataclass(frozen=True, kw_only=True)
class Strided(Pattern):
    """The last ``window`` keys, and every ``stride``-th before: 1 <= d <= window; d mod stride = 0.

    With stride = the width of the patch grid, the second component is the column above the query.
    """

    name = "strided"
    causal_by_default = True

    window: int
    stride: int

    def local(self, i: Tensor, j: Tensor) -> Tensor:
        return (i - j).abs() <= self.window

    def second(self, i: Tensor, j: Tensor) -> Tensor:
        return (i - j) % self.stride == 0

    def layout(self) -> Layout:
        return Layout(before=self.window, after=0 if self.causal else self.window, step=self.stride, classes=True)


@dataclass(frozen=True, kw_only=True)
class Fixed(Pattern):
    """The query's own block of ``window`` keys, and the last key of every other: i//w = j//w; j mod w = w-1."""

    name = "fixed"
    causal_by_default = True

    window: int

    def local(self, i: Tensor, j: Tensor) -> Tensor:
        return i // self.window == j // self.window

    def second(self, i: Tensor, j: Tensor) -> Tensor:
        return j % self.window == self.window - 1

    def layout(self) -> Layout:
        return Layout(block=self.window, columns=tuple(range(self.window - 1, self.num_tokens, self.window)))


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(Pattern):
    """``window`` keys in all, half on each side: 1 <= |d| <= window / 2."""

    name = "sliding_window"

    window: int

    def local(self, i: Tensor, j: Tensor) -> Tensor:
        return 2 * (i - j).abs() <= self.window

    def layout(self) -> Layout:
        return Layout(before=self.window // 2, after=0 if self.causal else self.window // 2)


@dataclass(frozen=True, kw_only=True)
class DilatedSlidingWindow(Pattern):
    """``window`` keys in all, ``dilation`` apart: |d| = k * dilation with 1 <= k <= window / 2.

    The reach on each side is therefore window / 2 * dilation tokens.
    """

    name = "dilated_sliding_window"

    window: int
    dilation: int = 2

    def local(self, i: Tensor, j: Tensor) -> Tensor:
        distance = (i - j).abs()
        return (distance % self.dilation == 0) & (2 * (distance // self.dilation) <= self.window)

    def layout(self) -> Layout:
        reach = self.window // 2
        return Layout(before=reach, after=0 if self.causal else reach, step=self.dilation, regroup=True)


PATTERNS: dict[str, type[Pattern]] = {
    cls.name: cls for cls in (Full, Causal, Strided, Fixed, SlidingWindow, DilatedSlidingWindow)
}
# Options that default to the width of the patch grid, so that a stride steps from row to row.
_GRID_WIDTH_OPTIONS = ("window", "stride")


def pattern_class(name: str) -> type[Pattern]:
    """Look a pattern up by name.

    Raises:
        ValueError: no such pattern.
    """
    if name not in PATTERNS:
        raise ValueError(unknown_name("pattern", name, PATTERNS))
    return PATTERNS[name]


def pattern_options(name: str) -> tuple[str, ...]:
    """List the options that the pattern ``name`` reads, ``causal`` included, sizes excluded."""
    sizes = {"num_tokens", "num_prefix_tokens"}
    return tuple(field.name for field in fields(pattern_class(name)) if field.name not in sizes)


def make_pattern(
    name: str,
    *,
    num_tokens: int,
    num_prefix_tokens: int = 0,
    grid_size: tuple[int, int] | None = None,
    window: int | None = None,
    stride: int | None = None,
    dilation: int | None = None,
    causal: bool | None = None,
) -> Pattern:
    """Build a pattern by name. Options that the pattern has no use for are ignored, so that one call, or one
    sweep, can range over patterns; ``None`` means the pattern's own default.

    Args:
        name: a key of :data:`PATTERNS`.
        num_tokens: patch tokens; the pattern covers ``num_prefix_tokens + num_tokens``.
        grid_size: (height, width) of the patch grid; without it a square grid is assumed.
        window, stride: in tokens; default: the width of the patch grid.
        dilation: in tokens; default 2.
        causal: see the module's text.

    Raises:
        ValueError: unknown name, option out of range, or no grid width to take a default from.
    """
    cls = pattern_class(name)
    given = {"window": window, "stride": stride, "dilation": dilation, "causal": causal}
    options: dict[str, Any] = {
        key: value for key, value in given.items() if key in pattern_options(name) and value is not None
    }
    options.setdefault("causal", cls.causal_by_default)
    for key in _GRID_WIDTH_OPTIONS:
        if key in pattern_options(name) and key not in options:
            options[key] = _grid_width(name, key, num_tokens, grid_size)
    return cls(num_tokens=num_tokens, num_prefix_tokens=num_prefix_tokens, **options)


def _grid_width(name: str, option: str, num_tokens: int, grid_size: tuple[int, int] | None) -> int:
    if grid_size is not None:
        if grid_size[0] * grid_size[1] != num_tokens:
            raise ValueError(f"a grid of {grid_size[0]}x{grid_size[1]} does not hold {num_tokens} tokens")
        return grid_size[1]
    width = isqrt(max(num_tokens, 0))
    if width * width != num_tokens:
        raise ValueError(f"{name}: {num_tokens} tokens are no square grid: give {option}= or grid_size=")
    return width
