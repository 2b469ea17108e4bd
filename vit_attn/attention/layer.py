"""The nn.Module that replaces timm's ``Attention``, and a way to look at its weights."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Optional, Protocol  # torch.jit reads Optional

import torch
from torch import Tensor, nn

from vit_attn.attention.masked import MaskedCore
from vit_attn.attention.mechanism import AttentionCost, Mechanism, Tokens
from vit_attn.attention.patterns import Pattern
from vit_attn.attention.scripted import attend, refuse_mask

# The submodules and numbers of timm's Attention, kept under their names: state-dict keys and attention extractors
# go on working.
_KEPT = (
    *("num_heads", "head_dim", "attn_dim", "scale", "fused_attn"),
    *("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"),
)

# In older checkpoints α was the layer's own.
_OLD_KEY = re.compile(r"(?<!normalizer\.)\b(alpha_logit|annealed_alpha)$")

Observer = Callable[[int, Tensor], None]


def current_key(key: str) -> str:
    """A key of a model's state dict as it is now, given one of any version."""
    return _OLD_KEY.sub(r"core.normalizer.\1", key)


class HasGrid(Protocol):
    """What tells the patch grid's (height, width) as it is now: timm's ``PatchEmbed``."""

    @property
    def grid_size(self) -> tuple[int, int]: ...


class Attention(nn.Module):
    """Multi-head self-attention with a chosen mechanism, around the submodules of a timm ``Attention``.

    Under softmax over all keys it computes what timm computes, bit for bit.

    Args:
        source: the timm ``Attention`` whose submodules are shared.
        mechanism: what computes the output from q, k and v.
        num_prefix_tokens: tokens before the patch grid.
        grid: tells the patch grid's size at every forward, so that ``set_input_size`` needs no second call.
        layer: index of the block, passed to observers.

    Raises:
        ValueError: dropout on weights that the mechanism does not form.
    """

    num_heads: int
    head_dim: int
    attn_dim: int
    fused_attn: bool
    if TYPE_CHECKING:  # torch.jit would take them for interfaces
        qkv: nn.Linear
        q_norm: nn.Module
        k_norm: nn.Module
        attn_drop: nn.Dropout
        norm: nn.Module
        gate: nn.Module | None
        proj: nn.Module
        proj_drop: nn.Module

    __jit_unused_properties__ = ["grid_size", "forms_weights"]  # noqa: RUF012  # of torch.jit

    def __init__(
        self,
        source: nn.Module,
        mechanism: Mechanism,
        *,
        num_prefix_tokens: int,
        grid: HasGrid,
        layer: int = 0,
    ) -> None:
        super().__init__()
        weight: Tensor = source.qkv.weight  # type: ignore[union-attr, assignment]
        drop: float = source.attn_drop.p  # type: ignore[union-attr, assignment]
        if drop > 0 and not mechanism.drops_weights:
            raise ValueError(
                f"attn_drop_rate={drop}: {mechanism.name} forms no weights to drop; use proj_drop_rate instead"
            )
        # First, so that its parameters stand where they stood when they were the layer's own.
        self.core = mechanism.build(source.num_heads, source.head_dim, layer).to(weight.device)  # type: ignore[arg-type]
        for name in _KEPT:
            setattr(self, name, getattr(source, name))
        self.mechanism = mechanism
        self.spec, self.asked = str(mechanism), mechanism.asked
        self.num_prefix_tokens = num_prefix_tokens
        self.layer = layer
        # In a tuple, so that the patch embedding does not become a submodule of every block.
        self._grid = (grid,)
        self._scripted_grid = (0, 0)
        self.observer: Observer | None = None
        self.train(source.training)

    @property
    def grid_size(self) -> tuple[int, int]:
        """(height, width) of the patch grid as it is now."""
        height, width = self._grid[0].grid_size
        return height, width

    def tokens(self, size: int | None = None) -> Tokens:
        """What the mechanism is told of positions.

        Args:
            size: N, tokens that come in; default: what the grid holds.

        Raises:
            ValueError: N tokens that are not the grid's, so that positions would be guessed.
        """
        tokens = Tokens(self.grid_size, self.num_prefix_tokens)
        if size is None or size == tokens.size:
            return tokens
        if not self.mechanism.positional:
            return Tokens((1, size), 0)
        height, width = tokens.grid
        raise ValueError(
            f"{self.mechanism}: {size} tokens came in, but {self.num_prefix_tokens} prefix tokens and a patch "
            f"grid of {height}x{width} make {tokens.size}"
        )

    def pattern(self) -> Pattern | None:
        """The pattern over the patch grid as it is now; None where the mechanism has none.

        Raises:
            ValueError: options that do not fit the grid.
        """
        return self.core.pattern(self.tokens()) if isinstance(self.core, MaskedCore) else None

    @property
    def forms_weights(self) -> bool:
        """Whether the weights are formed where attn_drop can be hooked: timm's own switch, which its users turn off."""
        return not self.fused_attn and self.mechanism.asked == "auto"

    def cost(self) -> AttentionCost:
        """What the attention of one image takes, from q, k and v to the output, over the grid as it is now."""
        tokens = self.tokens()
        cost = self.core.cost(tokens, self.qkv.weight.device)
        if not self.forms_weights:
            return cost
        flops = 4 * tokens.size**2 * self.attn_dim
        return AttentionCost(
            flops=flops,
            needed_flops=min(cost.needed_flops, flops),
            entries=cost.entries,
            implementation="dense",
            why="fused_attn is off",
        )

    def forward(self, x: Tensor, attn_mask: Optional[Tensor] = None, is_causal: bool = False) -> Tensor:  # noqa: UP045
        """Map tokens (B, N, dim) to (B, N, dim).

        Raises:
            ValueError: a mask at call time: the pattern is part of the module.
        """
        B, N, _ = x.shape
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # each (B, H, N, D)
        q, k = self.q_norm(q), self.k_norm(k)

        if torch.jit.is_scripting():
            height, width = self._scripted_grid
            dropout = self.attn_drop.p if self.attn_drop.training else 0.0
            where = (height, width, self.num_prefix_tokens)
            tensors = self.core.tensors()
            x = torch.ops.vit_attn.attend(q, k, v, self.spec, self.asked, where, tensors, dropout, attn_mask, is_causal)
        else:
            x = self._attend(q, k, v, N, attn_mask, is_causal)

        x = x.transpose(1, 2).reshape(B, N, self.attn_dim)
        x = self.norm(x)
        if gate is not None:
            x = x * gate
        return self.proj_drop(self.proj(x))

    @torch.jit.unused
    def _attend(self, q: Tensor, k: Tensor, v: Tensor, size: int, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        if isinstance(q, torch.fx.Proxy):  # torch.fx: nothing has a value as yet, and what follows is one node
            where = (*self.grid_size, self.num_prefix_tokens)
            dropout = self.attn_drop.p if self.attn_drop.training else 0.0
            tensors = self.core.tensors()
            return attend(q, k, v, self.spec, self.asked, where, tensors, dropout, attn_mask, is_causal)
        refuse_mask(attn_mask, is_causal)
        tokens = self.tokens(size)
        if self.observer is None and not self.forms_weights:
            return self.core(q, k, v, tokens, self.attn_drop)
        out, weights = self.core.forward_with_weights(q, k, v, tokens, self.attn_drop)
        if self.observer is not None:
            self.observer(self.layer, weights)
        return out

    def __prepare_scriptable__(self) -> "Attention":
        """Called by torch.jit.script, whose code cannot ask the patch embedding."""
        self._scripted_grid = self.grid_size
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix) and key != current_key(key)]:
            state_dict[current_key(key)] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def attention_layers(model: nn.Module) -> list[Attention]:
    """List the swapped attention layers of ``model``, in order of depth."""
    return [module for module in model.modules() if isinstance(module, Attention)]


@contextmanager
def observe_attention(
    model: nn.Module, observer: Observer, layers: list[int] | None = None, *, keep_graph: bool = False
) -> Iterator[None]:
    """Within the block, show the weights of each forward to ``observer(layer, weights (B, H, N, N))``.

    Args:
        model: a model from ``create_vit``.
        observer: called in every forward, once a layer; keep what you need of the weights, they are large.
        layers: indices of the layers to watch; default all.
        keep_graph: show the very tensors that the output is computed from, so that a gradient can be taken with
            respect to them; they keep the forward's memory as long as they are kept.
    """

    def detached(layer: int, weights: Tensor) -> None:
        observer(layer, weights.detach())

    watched = [layer for layer in attention_layers(model) if layers is None or layer.layer in layers]
    before = [layer.observer for layer in watched]
    for layer in watched:
        layer.observer = observer if keep_graph else detached
    try:
        yield
    finally:
        for layer, previous in zip(watched, before, strict=True):
            layer.observer = previous
