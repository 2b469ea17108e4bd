"""Axial attention (Ho et al., 2019, arXiv:1912.12180), as the criss-cross of Huang et al. (2019, arXiv:1811.11721)."""

from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from vit_attn.attention.options import register
from vit_attn.attention.patterns.base import LOCAL, SECOND, Pattern, Places
from vit_attn.attention.patterns.components import Blocks, Classes, Component


@register
@dataclass(frozen=True, kw_only=True)
class Axial(Pattern):
    """The query's own row and column of the patch grid: h + w - 1 keys under one normalizer.

    Ho et al. alternate layers of rows and of columns, or add up two attentions; this is their union.
    """

    name = "axial"
    needs_grid = True
    label_names = MappingProxyType({LOCAL: "row", SECOND: "column"})

    def local(self, q: Places, k: Places) -> Tensor:
        return q.row == k.row

    def second(self, q: Places, k: Places) -> Tensor:
        return q.column == k.column

    def components(self) -> list[Component]:
        _, width = self._tokens.grid
        return [Blocks(size=width), Classes(step=width)]
