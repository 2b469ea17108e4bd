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
    "(Tensor q, Tensor k, Tensor v, str spec, str asked, int[] where, Tensor[] tensors, float dropout, "
    "Tensor? attn_mask, bool is_causal) -> Tensor",
)
attend = torch.ops.vit_attn.attend


@torch.library.impl("vit_attn::attend", "CompositeImplicitAutograd")
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: str,
    asked: str,
    where: list[int],
    tensors: list[Tensor],
    dropout: float,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """Attention by the mechanism ``spec``.

    Args:
        q, k, v: (B, H, N, D).
        spec: ``str(mechanism)``.
        asked: for which implementation.
        where: height and width of the patch grid, prefix tokens.
        tensors: ``Core.tensors()``.
        dropout: probability that a weight is dropped.
        attn_mask, is_causal: of timm's interface; refused.
    """
    refuse_mask(attn_mask, is_causal)
    core = _core(spec, asked, q.shape[1], q.shape[-1])
    height, width, prefix = where
    tokens = Tokens((height, width), prefix)
    if q.shape[-2] != tokens.size:  # where positions do not matter
        tokens = Tokens((1, q.shape[-2]), 0)
    drop = nn.Dropout(dropout) if dropout > 0 else None
    own = dict(zip(core.state_dict(), tensors, strict=True))
    return torch.func.functional_call(core, own, (q, k, v, tokens, drop))


def refuse_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    """Refuse a mask at call time: the pattern is part of the module.

    Raises:
        ValueError: there is one.
    """
    if attn_mask is not None or is_causal:
        raise ValueError("attn_mask and is_causal are not taken at call time: choose model.attention instead")


@lru_cache(maxsize=64)
def _core(spec: str, asked: str, num_heads: int, head_dim: int) -> Core:
    return parse_spec(spec, {"implementation": asked}).build(num_heads, head_dim)
