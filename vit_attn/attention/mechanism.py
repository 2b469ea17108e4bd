"""The interface of a mechanism: what it is told of positions, what it builds, and what others may ask of it.

A mechanism is one file with one registered class. Everything that looks at attention (layer, probe, explanations,
cost, benchmark, report, trackers) asks the :class:`Core` that the mechanism builds, never its name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import ClassVar, List, NamedTuple  # noqa: UP035  # torch.jit reads List

import torch
from torch import Tensor, nn

from vit_attn.attention.options import Named, new_registry


class Tokens(NamedTuple):
    """All that a mechanism may know of positions.

    Args:
        grid: (height, width) of the patch grid, in raster order.
        prefix: tokens before the grid, such as class token and registers.
    """

    grid: tuple[int, int]
    prefix: int = 0

    @property
    def patches(self) -> int:
        """Number of tokens in the grid."""
        return self.grid[0] * self.grid[1]

    @property
    def size(self) -> int:
        """N: all tokens."""
        return self.prefix + self.patches


@dataclass(frozen=True, kw_only=True)
class AttentionCost:
    """What one layer's attention takes for one image, all heads together.

    Args:
        flops: multiplications and additions of q, k, v to the output, as computed.
        entries: weights per head that are not forbidden; None where the mechanism forms none.
        needed_flops: what is left of ``flops`` when forbidden entries cost nothing.
        implementation: what computes it.
        why: in a few words, why that.
    """

    flops: int
    needed_flops: int
    entries: int | None
    implementation: str
    why: str


MECHANISMS: dict[str, type["Mechanism"]] = new_registry()


@dataclass(frozen=True, kw_only=True)
class Mechanism(Named):
    """A rule from q, k, v to the output, with its options; registered subclasses have a name that is a whole spec.

    Attributes:
        drops_weights: whether there are weights that ``attn_drop`` can act on.
    """

    registry: ClassVar = MECHANISMS
    what: ClassVar[str] = "mechanism"
    drops_weights: ClassVar[bool] = False

    @property
    def positional(self) -> bool:
        """Whether the output depends on where a token stands in the grid."""
        return False

    @property
    def asked(self) -> str:
        """The implementation that the user has asked for; "auto" where none."""
        return "auto"

    def build(self, num_heads: int, head_dim: int, layer: int = 0) -> "Core":
        """The module that computes it in one layer.

        Args:
            layer: index of the layer, for what is random.
        """
        raise NotImplementedError

    def check(self, tokens: Tokens) -> None:
        """Refuse a grid that the options do not fit.

        Raises:
            ValueError: naming the option and what is allowed.
        """

    def terms(self) -> tuple[Named, ...]:
        """The named parts of the spec."""
        return (self,)

    def read_options(self) -> set[str]:
        """The names of the options that this mechanism has a use for."""
        return {key for term in self.terms() for key in term.options()}


class LayerModule(nn.Module):
    """What a mechanism or a normalizer holds in one layer: its parameters and buffers, and what others ask of them."""

    def scalars(self) -> dict[str, Tensor]:
        """Numbers per head, (H,) each, that are worth a curve: name → values."""
        return {}

    def settled(self) -> bool:
        """Whether it is what the options say, and not on its way there; may wait for the device."""
        return True

    def inherits(self, name: str) -> bool:
        """Whether a new model takes this entry of the state dict from the checkpoint that its weights come from."""
        return True

    def tensors(self) -> List[Tensor]:  # noqa: UP006
        """Every parameter and buffer, in the order of the state dict; written out, for torch.jit."""
        found: List[Tensor] = []  # noqa: UP006
        return found


class Core(LayerModule):
    """Attention over the heads of one layer; owns its parameters and buffers.

    Subclasses write :meth:`forward`, linear in v, and :meth:`cost`; the rest follows.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # torch.jit.script leaves it out: a scripted layer calls the operator vit_attn::attend.
        cls.forward = torch.jit.unused(cls.forward)  # type: ignore[method-assign]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, drop: nn.Dropout | None = None) -> Tensor:
        """q, k, v (B, H, N, D) to the output (B, H, N, D), in v's dtype."""
        raise NotImplementedError

    def weights(self, q: Tensor, k: Tensor, tokens: Tokens) -> Tensor:
        """(B, H, N, N) in the compute dtype: the weights that the output is the product of with v.

        A mechanism that never forms them has them all the same: they are what it does to v = I.
        """
        identity = torch.eye(k.shape[-2], dtype=working_dtype(q.dtype), device=q.device)
        return self.forward(q, k, identity.expand(*k.shape[:2], -1, -1), tokens)

    def forward_with_weights(
        self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, drop: nn.Dropout | None = None
    ) -> tuple[Tensor, Tensor]:
        """The output (B, H, N, D), computed from weights (B, H, N, N) that it returns too, after dropout."""
        return apply_weights(self.weights(q, k, tokens), v, drop)

    def reach(self, tokens: Tokens) -> Tensor | None:
        """(N, N) bool, rows are queries: which keys can matter at all; None: every one."""
        return None

    def cost(self, tokens: Tokens, device: torch.device) -> AttentionCost:
        """What it takes for one image."""
        raise NotImplementedError

    def on_step(self, step: int, *, seed: int, layer: int) -> None:
        """Bring what is a function of the optimizer step up to it, before the step's forward pass.

        Args:
            step: from 0.
            seed: of the run.
            layer: index of the layer.
        """


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all arithmetic on scores and weights: fp64 for fp64, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def apply_weights(weights: Tensor, v: Tensor, drop: nn.Dropout | None) -> tuple[Tensor, Tensor]:
    """The output (B, H, N, D) in v's dtype, and the weights (B, H, N, N), after dropout."""
    with torch.autocast(v.device.type, enabled=False):
        if drop is not None:
            weights = drop(weights)
        return (weights @ v.to(weights.dtype)).to(v.dtype), weights


Forward = Callable[..., Tensor]


def in_working_dtype(forward: Forward) -> Forward:
    """Decorate a core's ``forward``: q, k, v come in fp32 or fp64 whatever autocast says, the output leaves as v."""

    @wraps(forward)
    def run(self: Core, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, drop: nn.Dropout | None = None) -> Tensor:
        dtype = working_dtype(q.dtype)
        with torch.autocast(q.device.type, enabled=False):
            return forward(self, q.to(dtype), k.to(dtype), v.to(dtype), tokens, drop).to(v.dtype)

    return run
