"""Fixed attention (Child et al., 2019, arXiv:1904.10509), causal as published."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vit_attn.attention.mechanism import Tokens
from vit_attn.attention.options import option, register
from vit_attn.attention.patterns.base import Pattern, Places
from vit_attn.attention.patterns.components import Blocks, Columns, Component


@register
@dataclass(frozen=True, kw_only=True)
class Fixed(Pattern):
    """The query's own block of ``window`` keys, and the last key of every other: i//w = j//w; j mod w = w-1."""

    name = "fixed"
    causal_by_default = True

    window: int = option(least=1, help="tokens; default: the width of the patch grid")

    def defaults(self, tokens: Tokens) -> dict[str, Any]:
        return {"window": tokens.grid[1]}

    def local(self, q: Places, k: Places) -> Tensor:
        return q.token // self.window == k.token // self.window

    def second(self, q: Places, k: Places) -> Tensor:
        return k.token % self.window == self.window - 1

    def components(self) -> list[Component]:
        ends = range(self.window - 1, self.num_tokens, self.window)
        return [Blocks(size=self.window), Columns(tokens=tuple(ends))]
