"""Windows of Swin Transformers (Liu et al., 2021, arXiv:2103.14030)."""

from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor

from vit_attn.attention.mechanism import Tokens
from vit_attn.attention.options import option, register
from vit_attn.attention.patterns.base import Pattern, Places
from vit_attn.attention.patterns.components import Blocks, Component

_SWIN = 7  # tokens per side of a window, as published
_DEFAULTS = (_SWIN, 8, 6, 5, 4, 3, 2)


@register
@dataclass(frozen=True, kw_only=True)
class BlockLocal(Pattern):
    """Keys in the query's own block of ``block`` x ``block`` tokens of the patch grid.

    With ``shift`` the grid is rolled by half a block first, and tokens that met by wrapping round an edge do not see
    each other; an axis that one block fills is not rolled. Swin alternates layers of both:
    ``[block_local, block_local:shift:true]``. There is no relative position bias.
    """

    name = "block_local"
    needs_grid = True

    block: int = option(
        least=1, help="tokens per side; default: 7 where it divides the grid, else the largest up to 8 that does"
    )
    shift: bool = option(False, help="roll the grid by half a block")

    def defaults(self, tokens: Tokens) -> dict[str, Any]:
        side, (height, width) = gcd(*tokens.grid), tokens.grid
        found = [block for block in _DEFAULTS if side % block == 0]
        if self.block is None and not found:
            raise ValueError(f"no block of 2 to 8 tokens divides a patch grid of {height}x{width}: give block=")
        # One block that is the whole grid would be full attention.
        return {"block": next((block for block in found if block < max(tokens.grid)), (found or [1])[0])}

    def check(self, tokens: Tokens) -> None:
        side = gcd(*tokens.grid)
        if side % self.block:
            allowed = ", ".join(str(size) for size in range(1, side + 1) if side % size == 0)
            height, width = tokens.grid
            raise ValueError(f"block={self.block} does not divide a patch grid of {height}x{width}: one of {allowed}")

    def _rolled(self, position: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The block of a position on an axis, and whether it came round the edge."""
        shift = self.block // 2 if self.shift and self.block < length else 0
        return (position - shift) % length // self.block, position < shift

    def local(self, q: Places, k: Places) -> Tensor:
        height, width = self._tokens.grid
        same = torch.ones_like(q.token == k.token)
        for i, j, length in ((q.row, k.row, height), (q.column, k.column, width)):
            for mine, its in zip(self._rolled(i, length), self._rolled(j, length), strict=True):
                same &= mine == its
        return same

    def components(self) -> list[Component]:
        height, width = self._tokens.grid
        rows, columns = (self._rolled(torch.arange(length), length)[0] for length in (height, width))
        block = rows[:, None] * width + columns  # (h, w)
        return [Blocks(tokens=block.flatten().argsort(stable=True).view(-1, self.block**2))]
