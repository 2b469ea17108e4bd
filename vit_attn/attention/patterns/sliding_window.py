"""Sliding windows over the tokens in raster order (Beltagy et al., 2020, arXiv:2004.05150)."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vit_attn.attention.mechanism import Tokens
from vit_attn.attention.options import option, register
from vit_attn.attention.patterns.base import Pattern, Places
from vit_attn.attention.patterns.components import Band, Component


@register
@dataclass(frozen=True, kw_only=True)
class SlidingWindow(Pattern):
    """``window`` keys in all, half on each side: 1 <= |d| <= window / 2."""

    name = "sliding_window"

    window: int = option(least=1, help="tokens; default: the width of the patch grid")

    def defaults(self, tokens: Tokens) -> dict[str, Any]:
        return {"window": tokens.grid[1]}

    def local(self, q: Places, k: Places) -> Tensor:
        return 2 * (q.token - k.token).abs() <= self.window

    def components(self) -> list[Component]:
        return [Band(before=self.window // 2, after=0 if self.causal else self.window // 2)]
