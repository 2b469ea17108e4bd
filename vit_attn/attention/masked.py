"""Masked attention: any normalizer over any pattern, one mechanism with two choices."""

from dataclasses import dataclass
from typing import ClassVar, List  # noqa: UP035  # torch.jit reads List

import torch
from torch import Tensor, nn

from vit_attn.attention.engine import make_plan
from vit_attn.attention.functional import (
    IMPLEMENTATIONS,
    Rule,
    check_implementation,
    choose_implementation,
    dense_weights,
    explain_choice,
    key_of,
)
from vit_attn.attention.mechanism import AttentionCost, Core, Mechanism, Tokens
from vit_attn.attention.normalizers import Normalizer
from vit_attn.attention.options import Named, option, register_options
from vit_attn.attention.patterns import Pattern


@register_options
@dataclass(frozen=True, kw_only=True)
class Masked(Mechanism):
    """weights = normalizer(q kᵀ D^-0.5, over the keys that the pattern allows); out = weights v.

    Args:
        normalizer, pattern: instances of registered classes; the pattern as yet without tokens.
    """

    name: ClassVar[str] = "normalizer+pattern"
    drops_weights: ClassVar[bool] = True

    normalizer: Normalizer
    pattern: Pattern
    implementation: str = option(
        "auto", choices=("auto", *IMPLEMENTATIONS), help="who computes it; auto decides by the share of scores"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_implementation(self.implementation, self.normalizer.name)

    @property
    def asked(self) -> str:
        return self.implementation

    @property
    def positional(self) -> bool:
        return not self.pattern.is_full

    def __str__(self) -> str:
        """The spec in full: normalizer+pattern, each with its options."""
        return f"{self.normalizer}+{self.pattern}"

    def terms(self) -> tuple[Named, ...]:
        return (self.normalizer, self.pattern)

    def read_options(self) -> set[str]:
        return super().read_options() | set(self.options())

    def check(self, tokens: Tokens) -> None:
        self.pattern.on(tokens)

    def build(self, num_heads: int, head_dim: int, layer: int = 0) -> Core:
        return MaskedCore(self, num_heads, head_dim)


class MaskedCore(Core):
    """Masked attention in one layer."""

    def __init__(self, mechanism: Masked, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.mechanism = mechanism
        self.num_heads, self.head_dim = num_heads, head_dim
        self.normalizer = mechanism.normalizer.build(num_heads)
        # What was last used and what it was made for: plain attribute checks, which torch.compile can trace.
        self._key: tuple[Tokens | None, str] = (None, "")
        self._implementation: tuple[object, str] = (None, "")

    def pattern(self, tokens: Tokens) -> Pattern:
        """The pattern over these tokens.

        Raises:
            ValueError: options that do not fit the grid.
        """
        return self.mechanism.pattern.on(tokens)

    def key(self, tokens: Tokens) -> str:
        """The key of the pattern over these tokens; empty where it allows every key."""
        if self._key[0] != tokens:
            self._key = tokens, _key_on(self.mechanism.pattern, *tokens.grid, tokens.prefix)
        return self._key[1]

    def implementation(self, tokens: Tokens, device: torch.device) -> str:
        """Which implementation runs when nobody looks at the weights."""
        if self._implementation[0] != (tokens, device):
            asked, normalizer = self.mechanism.asked, self.mechanism.normalizer.name
            key = self.key(tokens)
            chosen = choose_implementation(asked, normalizer, key, device=str(device), num_keys=tokens.size)
            self._implementation = (tokens, device), chosen
        return self._implementation[1]

    def _rule(self, tokens: Tokens) -> Rule:
        return Rule(self.mechanism.normalizer, self.normalizer.number(), self.key(tokens))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, drop: nn.Dropout | None = None) -> Tensor:
        run = IMPLEMENTATIONS[self.implementation(tokens, q.device)]
        out, _ = run(q, k, v, self._rule(tokens), drop, False)
        return out

    def weights(self, q: Tensor, k: Tensor, tokens: Tokens) -> Tensor:
        return dense_weights(q, k, self._rule(tokens))

    def reach(self, tokens: Tokens) -> Tensor | None:
        pattern = self.pattern(tokens)
        return None if pattern.is_full else pattern.allowed()

    def cost(self, tokens: Tokens, device: torch.device) -> AttentionCost:
        pattern, implementation = self.pattern(tokens), self.implementation(tokens, device)
        scores = make_plan(pattern, device).scores if implementation == "blocks" else pattern.size**2
        asked = self.mechanism.asked != "auto"
        each = 4 * self.num_heads * self.head_dim  # two products, each of a multiplication and an addition
        return AttentionCost(
            flops=each * scores,
            needed_flops=each * pattern.entries,
            entries=pattern.entries,
            implementation=implementation,
            why="asked for" if asked else explain_choice(implementation, self.key(tokens), str(device)),
        )

    def scalars(self) -> dict[str, Tensor]:
        return self.normalizer.scalars()

    def settled(self) -> bool:
        return self.normalizer.settled()

    def inherits(self, name: str) -> bool:
        return self.normalizer.inherits(name.removeprefix("normalizer."))

    def tensors(self) -> List[Tensor]:  # noqa: UP006
        return self.normalizer.tensors()


@torch.compiler.assume_constant_result
def _key_on(pattern: Pattern, height: int, width: int, prefix: int) -> str:
    return key_of(pattern.on(Tokens((height, width), prefix)))
