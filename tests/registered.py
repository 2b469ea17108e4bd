"""What the contract is tested on: everything that is registered, with every option changed once.

A new mechanism, normalizer or pattern is tested by being there; nothing here names one.
"""

from collections.abc import Iterator
from typing import Any

import torch

from vit_attn.attention import MECHANISMS, NORMALIZERS, PATTERNS, Core, Pattern, Tokens, parse_spec
from vit_attn.attention.options import Named, text

TOKENS = Tokens((4, 4), 1)
GRIDS = [
    *(Tokens((4, 4), 1), Tokens((6, 9), 0), Tokens((8, 8), 2)),
    *(Tokens((7, 7), 0), Tokens((1, 31), 1), Tokens((9, 12), 3)),
]
HEADS, DIM = 2, 4


def changed(cls: type[Named], key: str) -> Iterator[Any]:
    """Other values of an option than its default."""
    field = cls.options()[key]
    if field.metadata["choices"]:
        yield from (choice for choice in field.metadata["choices"] if choice != field.default)
    elif field.metadata["check"] is not None:  # α
        yield from (1.3, 2.0)
    elif key == "causal" or isinstance(field.default, bool):
        yield not getattr(cls, f"{key}_by_default", field.default)
    else:
        yield from (2, 3)


def terms(cls: type[Named]) -> list[str]:
    """The name, alone and with each option changed."""
    return [cls.name] + [f"{cls.name}:{key}:{text(value)}" for key in cls.options() for value in changed(cls, key)]


def fits(spec: str, tokens: Tokens = TOKENS) -> bool:
    """Whether a spec's options fit a grid; kernels may be larger, blocks may not divide it."""
    try:
        parse_spec(spec).check(tokens)
    except ValueError:
        return False
    return True


def specs(tokens: Tokens = TOKENS) -> list[str]:
    """Every name, and every name with one option changed, that fits a grid."""
    registered = [cls for registry in (MECHANISMS, NORMALIZERS, PATTERNS) for cls in registry.values()]
    found = [term for cls in registered for term in terms(cls)]
    return [spec for spec in found if fits(spec, tokens)]


NAMES = [name for registry in (MECHANISMS, NORMALIZERS, PATTERNS) for name in registry]
SPECS = specs()


def patterns(name: str) -> list[Pattern]:
    """A pattern over every grid that takes it, with every option changed once."""
    found = []
    for tokens in GRIDS:
        for term in terms(PATTERNS[name]):
            if fits(term, tokens):
                found.append(parse_spec(term).pattern.on(tokens))
    return found


def build(spec: str, heads: int = HEADS, dim: int = DIM) -> Core:
    """The core of a spec, its parameters away from where they start."""
    core = parse_spec(spec).build(heads, dim).double()
    generator = torch.Generator().manual_seed(3)
    for parameter in core.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return core


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(
    tokens: Tokens = TOKENS, *, images: int = 2, dtype: torch.dtype = torch.float64, scale: float = 1.5
) -> list[torch.Tensor]:
    """q, k, v (B, H, N, D), of scores that spread."""
    shape = (images, HEADS, tokens.size, DIM)
    return [(factor * draw(*shape, seed=seed)).to(dtype) for seed, factor in enumerate((scale, scale, 1.0))]
