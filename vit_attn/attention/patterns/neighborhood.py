"""Neighborhood attention (Hassani et al., 2023, arXiv:2204.07143), dilated as in DiNAT (2022, arXiv:2209.15001)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vit_attn.attention.mechanism import Tokens
from vit_attn.attention.options import option, register
from vit_attn.attention.patterns.base import Pattern, Places
from vit_attn.attention.patterns.components import Axis, Component, tiles_of_axes

_PUBLISHED, _SMALL = 7, 3
_SMALL_GRID = 14  # tokens per side below which the small kernel is the default


@register
@dataclass(frozen=True, kw_only=True)
class Neighborhood(Pattern):
    """The ``kernel`` x ``kernel`` tokens of the patch grid nearest to the query, every ``dilation``-th.

    NATTEN's rule, on each axis: among the tokens of the query's residue mod ``dilation`` the window starts
    ``kernel // 2`` before the query and is moved inwards at the edges, so that every query has kernel² keys. It is
    therefore not symmetric. An even kernel reaches one further back than ahead.
    """

    name = "neighborhood"
    needs_grid = True

    kernel: int = option(least=1, help="tokens per side; default 7, or 3 where a side of the grid is below 14")
    dilation: int = option(1, least=1, help="tokens from one key to the next; default 1")

    def defaults(self, tokens: Tokens) -> dict[str, Any]:
        side = min(tokens.grid)
        kernel = _PUBLISHED if side >= _SMALL_GRID else _SMALL
        return {"kernel": min(kernel, max(side // self.dilation, 1))}

    def check(self, tokens: Tokens) -> None:
        if self.kernel * self.dilation > min(tokens.grid):
            height, width = tokens.grid
            raise ValueError(
                f"kernel={self.kernel} with dilation={self.dilation} spans {self.kernel * self.dilation} tokens, more "
                f"than a patch grid of {height}x{width} has on its shorter side: kernel times dilation must be at most "
                f"{min(tokens.grid)}"
            )

    def _sees(self, i: Tensor, j: Tensor, length: int) -> Tensor:
        """Tell whether position i of an axis has position j in its window."""
        kernel, dilation = self.kernel, self.dilation
        residue, place = i % dilation, i // dilation
        members = (length - residue + dilation - 1) // dilation
        start = torch.minimum((place - kernel // 2).clamp_min(0), members - kernel)
        offset = j // dilation - start
        return (j % dilation == residue) & (offset >= 0) & (offset < kernel)

    def local(self, q: Places, k: Places) -> Tensor:
        height, width = self._tokens.grid
        return self._sees(q.row, k.row, height) & self._sees(q.column, k.column, width)

    def components(self) -> list[Component]:
        rows, columns = (
            Axis(
                allowed=self._sees(torch.arange(length)[:, None], torch.arange(length), length),
                groups=[range(residue, length, self.dilation) for residue in range(self.dilation)],
            )
            for length in self._tokens.grid
        )
        return [tiles_of_axes(rows, columns)]
