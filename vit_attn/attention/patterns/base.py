"""What a pattern is: a rule over the patch grid, labelled masks of it, and where its entries lie.

Labels: 0 forbidden, 1 self, 2 local, 3 the second component, 4 global. Global are the rows and columns of the
prefix tokens (class token, registers), which stand outside the patch grid: they see, and are seen by, all.

A new pattern is one file with one registered subclass of :class:`Pattern`; its fields are its options.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from math import isqrt
from numbers import Integral
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from vit_attn.attention.mechanism import Tokens
from vit_attn.attention.names import unknown_name
from vit_attn.attention.options import Named, check_options, new_registry, option
from vit_attn.attention.patterns.components import Component

FORBIDDEN, SELF, LOCAL, SECOND, GLOBAL = range(5)
LABEL_NAMES = {
    FORBIDDEN: "forbidden",
    SELF: "self",
    LOCAL: "local",
    SECOND: "second component",
    GLOBAL: "global (prefix tokens)",
}
PATTERNS: dict[str, type["Pattern"]] = new_registry()
# Every pattern over tokens by its ``key``, for what cannot hold an object: the engine's operators.
_BY_KEY: dict[str, "Pattern"] = {}
# Rows labelled at a time where only counts are wanted, so that counting never holds an (N, N) tensor.
_ROWS_PER_CHUNK = 1024


class Places(NamedTuple):
    """Where tokens stand: int64 tensors that broadcast with each other, of tokens in raster order."""

    token: Tensor
    row: Tensor
    column: Tensor


@dataclass(frozen=True, kw_only=True)
class Pattern(Named):
    """A static sparsity pattern. Subclasses say :meth:`local`, and what else they need.

    A pattern has options alone; :meth:`on` lays it over tokens, which fills in the defaults that depend on the grid.
    Both are hashable and equal by what they are.

    Attributes:
        causal_by_default: whether keys after the query are forbidden where ``causal`` is not given.
        needs_grid: whether rows and columns matter, so that a number of tokens does not suffice.
        label_names: what the labels are called where "local" and "second component" say too little.
    """

    registry: ClassVar = PATTERNS
    what: ClassVar[str] = "pattern"
    causal_by_default: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = False
    label_names: ClassVar[Mapping[int, str]] = {}

    causal: bool | None = option(help="see only keys at or before the query, in raster order")
    tokens: Tokens | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens is None and self.causal is self.causal_by_default:
            object.__setattr__(self, "causal", None)  # one pattern, however it was written

    def defaults(self, tokens: Tokens) -> dict[str, Any]:
        """What stands for options that are None, over these tokens."""
        return {}

    def check(self, tokens: Tokens) -> None:
        """Refuse options that do not fit the grid; called with every option filled in.

        Raises:
            ValueError: naming the option and what is allowed.
        """

    def local(self, q: Places, k: Places) -> Tensor:
        """Tell which entries the first component allows: bool of the broadcast shape; of self it may say anything."""
        raise NotImplementedError

    def second(self, q: Places, k: Places) -> Tensor | None:
        """Tell which entries the second component allows where the first does not; None without one."""
        return None

    def components(self) -> list[Component] | None:
        """Components that hold all entries between patch tokens; None: whole rows are computed."""
        return None

    @property
    def has_components(self) -> bool:
        """Whether the engine can leave forbidden entries out."""
        return type(self).components is not Pattern.components

    def on(self, tokens: Tokens) -> Self:
        """Lay the pattern over tokens: the same object for the same tokens, with its masks.

        Raises:
            ValueError: options that do not fit the grid.
        """
        return _laid(self, tokens)  # type: ignore[return-value]  # of the same class

    @property
    def is_full(self) -> bool:
        """Whether every key is allowed whatever the tokens."""
        return False

    # What follows is of a pattern over tokens.

    @property
    def size(self) -> int:
        """N: all tokens, prefix tokens included."""
        return self._tokens.size

    @property
    def num_tokens(self) -> int:
        """Patch tokens."""
        return self._tokens.patches

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patch grid."""
        return self._tokens.prefix

    @property
    def _tokens(self) -> Tokens:
        assert self.tokens is not None, "lay the pattern over tokens first: pattern.on(tokens)"
        return self.tokens

    @cached_property
    def key(self) -> str:
        """Text that stands for this pattern over these tokens, the same in every process: see :func:`pattern_of`.

        Of a class that is not registered, in this process alone.
        """
        (height, width), prefix = self._tokens
        term = str(self) if PATTERNS.get(self.name) is type(self) else repr(self)
        return f"{term}@{height}x{width}+{prefix}"

    @cached_property
    def masks(self) -> dict[str, Tensor]:
        """What :meth:`allowed` gave, by device, for whoever needs it in every forward."""
        return {}

    def places(self, token: Tensor) -> Places:
        """Where patch tokens stand, given their index in raster order."""
        width = self._tokens.grid[1]
        return Places(token, token // width, token % width)

    def labels_at(self, i: Tensor, j: Tensor) -> Tensor:
        """Label the entries of queries i and keys j, counted over all N tokens: uint8 of their broadcast shape."""
        i, j = i - self.num_prefix_tokens, j - self.num_prefix_tokens
        q, k = self.places(i), self.places(j)
        labels = torch.zeros(torch.broadcast_shapes(i.shape, j.shape), dtype=torch.uint8, device=i.device)
        second = self.second(q, k)
        if second is not None:
            labels.masked_fill_(second, SECOND)
        labels.masked_fill_(self.local(q, k), LOCAL)
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


@lru_cache(maxsize=256)
def _laid(pattern: Pattern, tokens: Tokens) -> Pattern:
    found = pattern.defaults(tokens) | {"causal": pattern.causal_by_default}
    missing = {key: value for key, value in found.items() if getattr(pattern, key) is None}
    laid = replace(pattern, tokens=tokens, **missing)
    laid.check(tokens)
    _BY_KEY[laid.key] = laid
    return laid


def pattern_of(key: str) -> Pattern:
    """The pattern over tokens that has this ``key``, made in this process or in another one."""
    if key not in _BY_KEY:
        from vit_attn.attention.spec import parse_term  # which knows the patterns

        term, _, tokens = key.partition("@")
        grid, _, prefix = tokens.partition("+")
        height, _, width = grid.partition("x")
        pattern_from(*parse_term(term)).on(Tokens((int(height), int(width)), int(prefix)))
    return _BY_KEY[key]


def pattern_from(name: str, options: dict[str, Any]) -> Pattern:
    """Build a pattern by name, of options that are all its own.

    Raises:
        ValueError: unknown name, or an option out of its range.
    """
    if name not in PATTERNS:
        raise ValueError(unknown_name("pattern", name, PATTERNS))
    return PATTERNS[name](**options)


def make_pattern(
    name: str,
    *,
    num_tokens: int,
    num_prefix_tokens: int = 0,
    grid_size: tuple[int, int] | None = None,
    **options: Any,
) -> Pattern:
    """Build a pattern over tokens by name. Options that the pattern has no use for are ignored, so that one call, or
    one sweep, can range over patterns; ``None`` means the pattern's own default.

    Args:
        name: a key of :data:`PATTERNS`.
        num_tokens: patch tokens; the pattern covers ``num_prefix_tokens + num_tokens``.
        grid_size: (height, width) of the patch grid; without it a square grid is assumed.
        options: fields of the registered patterns: ``window``, ``stride``, ``kernel``, ….

    Raises:
        ValueError: unknown name or option, an option out of its range, or no grid where one is needed.
    """
    for key, value, least in (("num_tokens", num_tokens, 1), ("num_prefix_tokens", num_prefix_tokens, 0)):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise ValueError(f"{key} must be a whole number of at least {least}, not {value!r}")
    own = PATTERNS[name].options() if name in PATTERNS else {}
    pattern = pattern_from(name, {key: value for key, value in check_options(options).items() if key in own})
    return pattern.on(Tokens(_grid(pattern, int(num_tokens), grid_size), int(num_prefix_tokens)))


def _grid(pattern: Pattern, num_tokens: int, grid_size: tuple[int, int] | None) -> tuple[int, int]:
    if grid_size is not None:
        if grid_size[0] * grid_size[1] != num_tokens:
            raise ValueError(f"a grid of {grid_size[0]}x{grid_size[1]} does not hold {num_tokens} tokens")
        return int(grid_size[0]), int(grid_size[1])
    width = isqrt(num_tokens)
    if width * width == num_tokens:
        return width, width
    row, give = (1, num_tokens), "grid_size="
    if not pattern.needs_grid:
        missing = [key for key in pattern.defaults(Tokens(row)) if getattr(pattern, key) is None]
        if not missing:
            return row
        give = f"{missing[0]}= or grid_size="
    raise ValueError(f"{pattern.name}: {num_tokens} tokens are no square grid: give {give}")
