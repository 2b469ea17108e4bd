"""The nn.Module that replaces timm's ``Attention``, and a way to look at its weights."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vit_attn.attention.functional import attention, choose_implementation, explain_choice
from vit_attn.attention.patterns import Pattern
from vit_attn.attention.spec import Mechanism

# A learned α stays in this range: the gradient to α divides by (α-1)².
ALPHA_MIN, ALPHA_MAX = 1.01, 2.0
# The submodules and numbers of timm's Attention, kept under their names: state-dict keys and attention extractors
# go on working.
_KEPT = (
    *("num_heads", "head_dim", "attn_dim", "scale", "fused_attn"),
    *("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"),
)

Observer = Callable[[int, Tensor], None]


@lru_cache(maxsize=256)
def _lay(mechanism: Mechanism, num_prefix_tokens: int, grid_size: tuple[int, int]) -> Pattern:
    """One pattern, and so one mask, for all layers that ask for the same."""
    return mechanism.make_pattern(grid_size[0] * grid_size[1], num_prefix_tokens, grid_size)


class HasGrid(Protocol):
    """What tells the patch grid's (height, width) as it is now: timm's ``PatchEmbed``."""

    @property
    def grid_size(self) -> tuple[int, int]: ...


class Attention(nn.Module):
    """Multi-head self-attention with a chosen mechanism, around the submodules of a timm ``Attention``.

    Under softmax over all keys it computes what timm computes, bit for bit.

    Args:
        source: the timm ``Attention`` whose submodules are shared.
        mechanism: normalizer, pattern and options.
        num_prefix_tokens: tokens before the patch grid.
        grid: tells the patch grid's size at every forward, so that ``set_input_size`` needs no second call.
        layer: index of the block, passed to observers.
    """

    num_heads: int
    head_dim: int
    attn_dim: int
    fused_attn: bool
    annealed_alpha: Tensor
    qkv: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module
    attn_drop: nn.Dropout
    norm: nn.Module
    gate: nn.Module | None
    proj: nn.Module
    proj_drop: nn.Module

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
        for name in _KEPT:
            setattr(self, name, getattr(source, name))
        self.mechanism = mechanism
        self.num_prefix_tokens = num_prefix_tokens
        self.layer = layer
        # In a tuple, so that the patch embedding does not become a submodule of every block.
        self._grid = (grid,)
        # The pattern last used and what it was made for: a plain attribute check, which torch.compile can trace.
        self._laid: tuple[tuple[int, int], Pattern | None] = ((0, 0), None)
        self._chosen: tuple[object, str] = (None, "")
        self.observer: Observer | None = None
        if mechanism.learnable_alpha:
            self.alpha_logit = nn.Parameter(self._initial_alpha_logit())
        elif mechanism.anneal_alpha_from is not None:
            # A buffer, so that checkpoints have it and a new value is no new constant to torch.compile; of every head,
            # as a learned one is, so that what reads or draws α knows one shape.
            start = torch.full((self.num_heads,), mechanism.anneal_alpha_from, dtype=torch.float32)
            self.register_buffer("annealed_alpha", start.to(self.qkv.weight.device))
        self.train(source.training)

    def _initial_alpha_logit(self) -> Tensor:
        # Short of the ends, where the sigmoid has no gradient.
        share = (self.mechanism.alpha - ALPHA_MIN) / (ALPHA_MAX - ALPHA_MIN)
        share = min(max(share, 0.01), 0.99)
        weight = self.qkv.weight
        return torch.full((self.num_heads,), math.log(share / (1 - share)), dtype=weight.dtype, device=weight.device)

    @property
    def alpha(self) -> float | Tensor:
        """Entmax's α: a number, or a tensor (H,): in (1.01, 2) where it is learned, as it stands where annealed."""
        if self.mechanism.learnable_alpha:
            return ALPHA_MIN + (ALPHA_MAX - ALPHA_MIN) * self.alpha_logit.float().sigmoid()
        return self.annealed_alpha.float() if self.anneals else self.mechanism.alpha

    @property
    def anneals(self) -> bool:
        """Whether α is moved by :meth:`anneal_alpha`."""
        return self.mechanism.anneal_alpha_from is not None

    @torch.no_grad()
    def anneal_alpha(self, progress: float) -> None:
        """Move an annealed α to this share, from 0 to 1, of the way to ``alpha``; not between forward and backward."""
        start = self.mechanism.anneal_alpha_from
        assert start is not None
        assert 0 <= progress <= 1
        # Exact at both ends.
        self.annealed_alpha.fill_((1 - progress) * start + progress * self.mechanism.alpha)

    def alpha_has_arrived(self) -> bool:
        """Whether α is what ``alpha`` says; waits for the device where it is annealed."""
        return not self.anneals or bool((self.annealed_alpha == self.mechanism.alpha).all())

    @property
    def grid_size(self) -> tuple[int, int]:
        """(height, width) of the patch grid as it is now."""
        height, width = self._grid[0].grid_size
        return height, width

    def pattern(self, size: int | None = None) -> Pattern | None:
        """The pattern over the patch grid as it is now; None where every key is allowed.

        Args:
            size: N, tokens that come in; default: what the grid holds.

        Raises:
            ValueError: N tokens that are not the grid's, so that positions would be guessed.
        """
        height, width = self.grid_size
        if size is None:
            size = self.num_prefix_tokens + height * width
        elif size != self.num_prefix_tokens + height * width:
            if self.mechanism.pattern == "full" and not self.mechanism.options.causal:
                return None
            raise ValueError(
                f"{self.mechanism}: {size} tokens came in, but {self.num_prefix_tokens} prefix tokens and a patch "
                f"grid of {height}x{width} make {self.num_prefix_tokens + height * width}"
            )
        if self._laid[0] != (height, width):
            self._laid = (height, width), _lay(self.mechanism, self.num_prefix_tokens, (height, width))
        return self._laid[1]

    def chosen_implementation(self, size: int | None = None) -> str:
        """Which implementation runs when nobody looks at the weights, for N tokens (default: what the grid holds)."""
        pattern = self.pattern(size)
        asked = self.mechanism.implementation
        # timm's own switch: its users turn it off to hook the weights behind attn_drop.
        if asked == "auto" and not self.fused_attn:
            return "dense"
        device = self.qkv.weight.device
        case = (pattern, size, device)
        if self._chosen[0] != case:
            num_keys = pattern.size if pattern is not None else size or 0
            chosen = choose_implementation(asked, self.mechanism.normalizer, pattern, device=device, num_keys=num_keys)
            self._chosen = case, chosen
        return self._chosen[1]

    def why_chosen(self) -> str:
        """Say in a few words why that implementation runs."""
        if self.mechanism.implementation != "auto":
            return "asked for"
        if not self.fused_attn:
            return "fused_attn is off"
        return explain_choice(self.chosen_implementation(), self.pattern(), self.qkv.weight.device)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map tokens (B, N, dim) to (B, N, dim).

        Raises:
            ValueError: a mask at call time: the pattern is part of the module.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask and is_causal are not taken at call time: choose model.attention instead")
        B, N, _ = x.shape
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # each (B, H, N, D)
        q, k = self.q_norm(q), self.k_norm(k)

        kwargs: dict[str, Any] = {
            "normalizer": self.mechanism.normalizer,
            "pattern": self.pattern(N),
            "alpha": self.alpha,
            "attn_drop": self.attn_drop,
        }
        if self.observer is None:
            out = attention(q, k, v, implementation=self.chosen_implementation(N), **kwargs)
        else:
            out, weights = attention(q, k, v, implementation="dense", return_weights=True, **kwargs)
            self.observer(self.layer, weights)

        x = out.transpose(1, 2).reshape(B, N, self.attn_dim)
        x = self.norm(x)
        if gate is not None:
            x = x * gate
        return self.proj_drop(self.proj(x))


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
