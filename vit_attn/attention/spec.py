"""Attention specs: "entmax+strided" → (normalizer, pattern), and every error message about them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from vit_attn.attention.functional import choose_implementation
from vit_attn.attention.names import unknown_name
from vit_attn.attention.normalizers import NORMALIZERS, check_alpha
from vit_attn.attention.patterns import PATTERNS, Pattern, make_pattern, pattern_options


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Options of every mechanism; None means the mechanism's own default, and one that has no use for it ignores it.

    Args:
        alpha: entmax's α in (1, 2]; default 1.5. Where α is learned, its start.
        learnable_alpha: learn one α per head and layer; entmax only; default false.
        anneal_alpha_from: where α starts, in (1, 2], to end at ``alpha``; entmax only; default: α does not move.
        window, stride, dilation, causal: see :mod:`vit_attn.attention.patterns`.
        implementation: auto, dense, fused or blocks; default auto.

    Raises:
        ValueError: a value out of its range, or an α that is both annealed and learned.
    """

    alpha: float | None = None
    learnable_alpha: bool | None = None
    anneal_alpha_from: float | None = None
    window: int | None = None
    stride: int | None = None
    dilation: int | None = None
    causal: bool | None = None
    implementation: str | None = None

    def __post_init__(self) -> None:
        if self.alpha is not None:
            check_alpha(self.alpha)
        if self.anneal_alpha_from is not None:
            try:
                check_alpha(self.anneal_alpha_from)
            except ValueError as error:
                raise ValueError(f"anneal_alpha_from: {error}") from error
        for name in ("window", "stride", "dilation"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        for name in ("learnable_alpha", "causal"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, not {value!r}")
        if self.learnable_alpha and self.anneal_alpha_from is not None:
            raise ValueError(
                f"anneal_alpha_from={self.anneal_alpha_from} and learnable_alpha=true exclude each other: choose one"
            )

    @classmethod
    def from_mapping(cls, options: Mapping[str, object] | None) -> "AttentionOptions":
        """Build from plain keys and values.

        Raises:
            ValueError: an unknown key, or a value out of its range.
        """
        options = dict(options or {})
        names = [field.name for field in fields(cls)]
        for key in options:
            if key not in names:
                raise ValueError(unknown_name("attention option", key, names))
        return cls(**options)  # type: ignore[arg-type]  # __post_init__ checks them


@dataclass(frozen=True)
class Mechanism:
    """One layer's attention: a normalizer, a pattern and their options."""

    normalizer: str
    pattern: str
    options: AttentionOptions = AttentionOptions()

    def __post_init__(self) -> None:
        choose_implementation(self.implementation, self.normalizer)

    def __str__(self) -> str:
        """The spec in full: normalizer+pattern."""
        return f"{self.normalizer}+{self.pattern}"

    @property
    def alpha(self) -> float:
        """Entmax's α: where a learned one starts, where an annealed one ends."""
        return 1.5 if self.options.alpha is None else float(self.options.alpha)

    @property
    def learnable_alpha(self) -> bool:
        """Whether each head learns its α."""
        return self.normalizer == "entmax" and bool(self.options.learnable_alpha)

    @property
    def anneal_alpha_from(self) -> float | None:
        """Where an annealed α starts; None where α is not annealed."""
        start = self.options.anneal_alpha_from
        return float(start) if self.normalizer == "entmax" and start is not None else None

    @property
    def implementation(self) -> str:
        """The implementation asked for; auto by default."""
        return self.options.implementation or "auto"

    def unused_options(self) -> set[str]:
        """List the options that are set and that this mechanism has no use for."""
        used = {*pattern_options(self.pattern), "implementation"}
        if self.normalizer == "entmax":
            used |= {"alpha", "learnable_alpha", "anneal_alpha_from"}
        return {field.name for field in fields(self.options) if getattr(self.options, field.name) is not None} - used

    def make_pattern(self, num_tokens: int, num_prefix_tokens: int, grid_size: tuple[int, int] | None) -> Pattern:
        """Lay the pattern over a patch grid.

        Raises:
            ValueError: options that do not fit the grid.
        """
        return make_pattern(
            self.pattern,
            num_tokens=num_tokens,
            num_prefix_tokens=num_prefix_tokens,
            grid_size=grid_size,
            window=self.options.window,
            stride=self.options.stride,
            dilation=self.options.dilation,
            causal=self.options.causal,
        )


def parse_spec(spec: str, options: AttentionOptions | None = None) -> Mechanism:
    """Read one spec: a normalizer, a pattern, or both as ``normalizer+pattern``.

    Raises:
        ValueError: not a spec; the message names the nearest right spelling.
    """
    options = options or AttentionOptions()
    parts = [part.strip() for part in str(spec).split("+")]
    if len(parts) == 1:
        if parts[0] in NORMALIZERS:
            return Mechanism(parts[0], "full", options)
        if parts[0] in PATTERNS:
            return Mechanism("softmax", parts[0], options)
        raise ValueError(unknown_name("attention", spec, [*NORMALIZERS, *PATTERNS]) + " Or normalizer+pattern.")
    if len(parts) == 2 and parts[0] in PATTERNS and parts[1] in NORMALIZERS:
        raise ValueError(f"attention {spec!r}: the normalizer comes first: {parts[1]}+{parts[0]}")
    if len(parts) != 2:
        raise ValueError(f"attention {spec!r} is not normalizer+pattern, such as entmax+strided")
    if parts[0] not in NORMALIZERS:
        raise ValueError(f"attention {spec!r}: " + unknown_name("normalizer", parts[0], NORMALIZERS))
    if parts[1] not in PATTERNS:
        raise ValueError(f"attention {spec!r}: " + unknown_name("pattern", parts[1], PATTERNS))
    return Mechanism(parts[0], parts[1], options)


def parse_attention(
    attention: str | Sequence[str], options: AttentionOptions | Mapping[str, object] | None = None
) -> list[Mechanism]:
    """Read ``model.attention``: one spec, or a list of specs that the layers cycle through.

    Raises:
        ValueError: not a spec, an empty list, or options out of their range.
    """
    if not isinstance(options, AttentionOptions):
        options = AttentionOptions.from_mapping(options)
    specs = [attention] if isinstance(attention, str) else attention
    if not isinstance(specs, Sequence) or not specs or not all(isinstance(spec, str) for spec in specs):
        raise ValueError(f"attention must be a spec or a list of specs, such as [strided, full], not {attention!r}")
    return [parse_spec(spec, options) for spec in specs]
