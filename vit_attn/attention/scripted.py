"""vit_attn::attend: any mechanism as one operator, for graphs that cannot hold Python: torch.jit.script and torch.fx.

It takes the mechanism as the text of its spec, so that a graph means the same in another process that has imported
``vit_attn``. It is made of the operators beneath it, which autograd and other transforms see through.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn

from vit_attn.attention.mechanism import Core, Tokens
from vit_attn.attention.spec import parse_spec

torch.library.define(
    "vit_attn::attend",
    "(Tensor q, Tensor k, Tensor v, str spec, str asked, int[] where, Tensor[] tensors, float dropout) -> Tensor",
)
attend = torch.ops.vit_attn.attend


@torch.library.impl("vit_attn::attend", "CompositeImplicitAutograd")
def _attend(
    q: Tensor, k: Tensor, v: Tensor, spec: str, asked: str, where: list[int], tensors: list[Tensor], dropout: float
) -> Tensor:
    """Attention by the mechanism ``spec``.

    Args:
        q, k, v: (B, H, N, D).
        spec: ``str(mechanism)``.
        asked: for which implementation.
        where: height and width of the patch grid, prefix tokens.
        tensors: ``Core.tensors()``.
        dropout: probability that a weight is dropped.
    """
    core = _core(spec, asked, q.shape[1], q.shape[-1])
    height, width, prefix = where
    tokens = Tokens((height, width), prefix)
    if q.shape[-2] != tokens.size:  # where positions do not matter
        tokens = Tokens((1, q.shape[-2]), 0)
    drop = nn.Dropout(dropout) if dropout > 0 else None
    own = dict(zip(core.state_dict(), tensors, strict=True))
    return torch.func.functional_call(core, own, (q, k, v, tokens, drop))


@lru_cache(maxsize=64)
def _core(spec: str, asked: str, num_heads: int, head_dim: int) -> Core:
    return parse_spec(spec, {"implementation": asked}).build(num_heads, head_dim)
