"""Dilated sliding windows over the tokens in raster order (Beltagy et al., 2020, arXiv:2004.05150)."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vit_attn.attention.mechanism import Tokens
from vit_attn.attention.options import option, register
from vit_attn.attention.patterns.base import Pattern, Places
from vit_attn.attention.patterns.components import Band, Component


@register
@dataclass(frozen=True, kw_only=True)
class DilatedSlidingWindow(Pattern):
    """``window`` keys in all, ``dilation`` apart: |d| = k * dilation with 1 <= k <= window / 2.

    The reach on each side is therefore window / 2 * dilation tokens.
    """

    name = "dilated_sliding_window"

    window: int = option(least=1, help="tokens; default: the width of the patch grid")
    dilation: int = option(2, least=1, help="tokens from one key to the next; default 2")

    def defaults(self, tokens: Tokens) -> dict[str, Any]:
        return {"window": tokens.grid[1]}

    def local(self, q: Places, k: Places) -> Tensor:
        distance = (q.token - k.token).abs()
        return (distance % self.dilation == 0) & (2 * (distance // self.dilation) <= self.window)

    def components(self) -> list[Component]:
        reach = self.window // 2
        return [Band(before=reach, after=0 if self.causal else reach, step=self.dilation)]
