"""What the attention suite compares: the project's mechanisms, and the kernels of others that they stand against."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import isqrt
from typing import Any

import entmax as entmax_package
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from vit_attn.attention import MECHANISMS, Core, Pattern, Tokens, attention, make_pattern
from vit_attn.attention.functional import check_implementation
from vit_attn.attention.patterns.strided import Strided

PASSES = ("forward", "forward+backward")
SDPA = "SDPA"
# The pattern in which the masked kernels of others are measured.
REFERENCE_PATTERN = "strided"
# Tokens: beyond, one backward pass of the entmax package takes minutes and tens of gigabytes.
ENTMAX_PACKAGE_MAX = 2048

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Inputs:
    """q, k, v and the gradient of the output, each (B, H, N, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor

    @property
    def size(self) -> int:
        """N."""
        return self.q.shape[-2]


@dataclass(frozen=True)
class Case:
    """One candidate.

    Args:
        normalizer, pattern: what it computes; of a mechanism with a rule of its own the name and nothing.
        implementation: a key of ``IMPLEMENTATIONS``, a mechanism's own, or a kernel of others.
        entries: share of the N² entries that the pattern allows; None where no weights are formed.
        attend: (q, k, v) to the output, each (B, H, N, D).
        skipped: why it is not measured, or nothing.
    """

    normalizer: str
    pattern: str
    implementation: str
    entries: float | None
    attend: Attend
    skipped: str = ""

    @property
    def mechanism(self) -> str:
        """normalizer+pattern, or the mechanism's name."""
        return "+".join(filter(None, (self.normalizer, self.pattern)))

    @property
    def name(self) -> str:
        """Mechanism and implementation; alone in its run."""
        return f"{self.mechanism} ({self.implementation})"


def make_inputs(shape: tuple[int, int, int, int], *, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Draw standard normal inputs of ``shape`` (B, H, N, D)."""
    generator = torch.Generator().manual_seed(seed)
    return Inputs(*(torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4)))


def step(attend: Attend, inputs: Inputs, which: str) -> Callable[[], object]:
    """One call to measure: the output, or the gradients to q, k and v.

    Args:
        which: one of :data:`PASSES`.
    """
    if which == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return attend(inputs.q, inputs.k, inputs.v)

        return forward
    q, k, v = (tensor.detach().clone().requires_grad_() for tensor in (inputs.q, inputs.k, inputs.v))
    return lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), inputs.grad)


def own_cases(
    size: int, normalizers: Sequence[str], patterns: Sequence[str], implementations: Sequence[str]
) -> list[Case]:
    """Every mechanism with every implementation that takes it, over ``size`` tokens in a square grid."""
    cases = []
    for name in patterns:
        pattern = _pattern(name, size)
        for normalizer in normalizers:
            for implementation in implementations:
                try:
                    check_implementation(implementation, normalizer)
                except ValueError:
                    continue  # not offered
                attend = partial(attention, normalizer=normalizer, pattern=pattern, implementation=implementation)
                cases.append(Case(normalizer, name, implementation, 1 - pattern.sparsity, attend))
    return cases


def mechanism_cases(size: int, names: Sequence[str], head_dim: int, heads: int, device: torch.device) -> list[Case]:
    """Every mechanism with a rule of its own, over ``size`` tokens in a square grid."""
    side = isqrt(size)
    tokens = Tokens((side, side))
    cases = []
    for name in names:
        core = MECHANISMS[name]().build(heads, head_dim).to(device)
        implementation = core.cost(tokens, device).implementation
        cases.append(Case(name, "", implementation, None, partial(_by_core, core, tokens)))
    return cases


def _by_core(core: Core, tokens: Tokens, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return core(q, k, v, tokens)


def rival_cases(size: int, which: str, device: torch.device, *, quick: bool = False) -> Iterator[Case]:
    """The kernels of others: over all keys, and under the strided mask.

    Args:
        which: one of :data:`PASSES`.
        quick: leave out what compiles for long.
    """
    pattern = _pattern(REFERENCE_PATTERN, size)
    assert isinstance(pattern, Strided)
    share = 1 - pattern.sparsity
    mask = pattern.allowed(device)
    yield Case("softmax", "full", SDPA, 1.0, F.scaled_dot_product_attention)
    masked = partial(F.scaled_dot_product_attention, attn_mask=mask)
    yield Case("softmax", pattern.name, "SDPA masked", share, masked)
    if quick:
        skipped = "left out by --quick: it compiles for long"
    elif device.type == "cpu" and which != "forward":
        skipped = "it has no backward pass on the CPU"
    else:
        skipped = ""
    yield Case("softmax", pattern.name, "FlexAttention", share, _flex_attention(pattern, device, skipped), skipped)
    too_large = f"above N={ENTMAX_PACKAGE_MAX:,} it takes minutes per call" if size > ENTMAX_PACKAGE_MAX else ""
    for name in ("entmax15", "sparsemax"):
        attend = partial(_packaged, getattr(entmax_package, name), mask)
        yield Case(name, pattern.name, "entmax package", share, attend, too_large)


@cache
def _pattern(name: str, size: int) -> Pattern:
    return make_pattern(name, num_tokens=size)


def _packaged(normalize: Callable[..., Tensor], mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention with a function of the ``entmax`` package, in fp32 as the project's own."""
    scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-2, -1)  # (B, H, N, N)
    weights = normalize(scores.masked_fill(~mask, float("-inf")), dim=-1)
    return (weights @ v.float()).to(v.dtype)


def _flex_attention(pattern: Strided, device: torch.device, skipped: str) -> Attend:
    """Compile torch's FlexAttention for the pattern; at the first call, which may fail."""
    compiled: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        d = i - j
        return (d >= 0) & ((d <= pattern.window) | (d % pattern.stride == 0))

    if skipped:
        return compiled
    blocks = create_block_mask(allowed, None, None, pattern.size, pattern.size, device=device)
    return partial(compiled, block_mask=blocks)
