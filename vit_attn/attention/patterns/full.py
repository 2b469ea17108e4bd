"""Every key, or every key up to the query."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vit_attn.attention.options import register
from vit_attn.attention.patterns.base import Pattern, Places


@register
@dataclass(frozen=True, kw_only=True)
class Full(Pattern):
    """Every key: local is every j != i."""

    name = "full"

    @property
    def is_full(self) -> bool:
        return not (self.causal_by_default if self.causal is None else self.causal)

    def local(self, q: Places, k: Places) -> Tensor:
        return torch.ones_like(q.token == k.token)


@register
@dataclass(frozen=True, kw_only=True)
class Causal(Full):
    """Every key before the query: d >= 1 ("normal" in some mask sets)."""

    name = "causal"
    causal_by_default = True
