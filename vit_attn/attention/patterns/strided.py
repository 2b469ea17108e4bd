"""Strided attention (Child et al., 2019, arXiv:1904.10509), causal as published."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vit_attn.attention.mechanism import Tokens
from vit_attn.attention.options import option, register
from vit_attn.attention.patterns.base import Pattern, Places
from vit_attn.attention.patterns.components import Band, Classes, Component


@register
@dataclass(frozen=True, kw_only=True)
class Strided(Pattern):
    """The last ``window`` keys, and every ``stride``-th before: 1 <= d <= window; d mod stride = 0.

    With stride = the width of the patch grid, the second component is the column above the query.
    """

    name = "strided"
    causal_by_default = True

    window: int = option(least=1, help="tokens; default: the width of the patch grid")
    stride: int = option(least=1, help="tokens; default: the width of the patch grid")

    def defaults(self, tokens: Tokens) -> dict[str, Any]:
        return {"window": tokens.grid[1], "stride": tokens.grid[1]}

    def local(self, q: Places, k: Places) -> Tensor:
        return (q.token - k.token).abs() <= self.window

    def second(self, q: Places, k: Places) -> Tensor:
        return (q.token - k.token) % self.stride == 0

    def components(self) -> list[Component]:
        return [Band(before=self.window, after=0 if self.causal else self.window), Classes(step=self.stride)]
