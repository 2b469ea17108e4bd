"""Attention specs: "entmax:alpha:1.3+strided" → a mechanism, and every error message about them.

A spec is the name of a mechanism, of a normalizer or of a pattern, or normalizer+pattern. Behind each name its own
options may stand as name:option:value:option:value; others come from ``model.attention_options``, which are defaults
for every layer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from vit_attn.attention.masked import Masked
from vit_attn.attention.mechanism import MECHANISMS, Mechanism
from vit_attn.attention.names import unknown_name
from vit_attn.attention.normalizers import NORMALIZERS
from vit_attn.attention.options import Named, check_options, parsed
from vit_attn.attention.patterns import PATTERNS


def parse_term(term: str) -> tuple[str, dict[str, Any]]:
    """Read "strided:window:4" as ("strided", {"window": 4}).

    Raises:
        ValueError: an option without a value, or one that the name does not have.
    """
    name, *words = (word.strip() for word in term.split(":"))
    cls: type[Named] | None = next((each[name] for each in (MECHANISMS, NORMALIZERS, PATTERNS) if name in each), None)
    if cls is None or not words:
        return name, {}
    if len(words) % 2:
        raise ValueError(f"{term!r}: options are written {name}:option:value")
    options: dict[str, Any] = {}
    for key, word in zip(words[::2], words[1::2], strict=True):
        if key not in cls.options():
            raise ValueError(f"{term!r}: " + _unknown_option(cls, key))
        options[key] = parsed(cls, key, word)
    return name, options


def _unknown_option(cls: type[Named], key: str) -> str:
    own = cls.options()
    if not own:
        return f"{cls.name} has no options"
    return unknown_name(f"option of {cls.name}", key, own)


def parse_spec(spec: str, options: Mapping[str, Any] | None = None) -> Mechanism:
    """Read one spec.

    Args:
        options: of any mechanism; what stands in the spec itself goes before them.

    Raises:
        ValueError: not a spec, or a wrong option; the message names the nearest right spelling.
    """
    given = check_options(options or {})
    terms = [parse_term(part) for part in str(spec).split("+")]
    names = [name for name, _ in terms]

    def made(registry: Mapping[str, type], term: tuple[str, dict[str, Any]]) -> Any:
        name, own = term
        cls = registry[name]
        try:
            return cls(**{key: value for key, value in given.items() if key in cls.options()} | own)  # type: ignore[attr-defined]
        except ValueError as error:
            raise ValueError(f"attention {spec!r}: {error}" if own else str(error)) from None

    def masked(normalizer: tuple[str, dict[str, Any]], pattern: tuple[str, dict[str, Any]]) -> Mechanism:
        rest = {key: value for key, value in given.items() if key in Masked.options()}
        return Masked(normalizer=made(NORMALIZERS, normalizer), pattern=made(PATTERNS, pattern), **rest)

    if len(terms) == 1:
        if names[0] in MECHANISMS:
            return made(MECHANISMS, terms[0])
        if names[0] in NORMALIZERS:
            return masked(terms[0], ("full", {}))
        if names[0] in PATTERNS:
            return masked(("softmax", {}), terms[0])
        known = [*MECHANISMS, *NORMALIZERS, *PATTERNS]
        raise ValueError(unknown_name("attention", names[0], known) + " Or normalizer+pattern.")
    whole = next((name for name in names if name in MECHANISMS), None)
    if whole is not None:
        raise ValueError(f"attention {spec!r}: {whole} is a mechanism of its own, which takes no normalizer or pattern")
    if len(terms) == 2 and names[0] in PATTERNS and names[1] in NORMALIZERS:
        raise ValueError(f"attention {spec!r}: the normalizer comes first: {names[1]}+{names[0]}")
    if len(terms) != 2:
        raise ValueError(f"attention {spec!r} is not normalizer+pattern, such as entmax+strided")
    if names[0] not in NORMALIZERS:
        raise ValueError(f"attention {spec!r}: " + unknown_name("normalizer", names[0], NORMALIZERS))
    if names[1] not in PATTERNS:
        raise ValueError(f"attention {spec!r}: " + unknown_name("pattern", names[1], PATTERNS))
    return masked(terms[0], terms[1])


def parse_attention(attention: str | Sequence[str], options: Mapping[str, Any] | None = None) -> list[Mechanism]:
    """Read ``model.attention``: one spec, or a list of specs that the layers cycle through.

    Args:
        options: ``model.attention_options``: defaults for every layer; what a mechanism has no use for is ignored.

    Raises:
        ValueError: not a spec, an empty list, or options out of their range.
    """
    specs = [attention] if isinstance(attention, str) else attention
    if not isinstance(specs, Sequence) or not specs or not all(isinstance(spec, str) for spec in specs):
        raise ValueError(f"attention must be a spec or a list of specs, such as [strided, full], not {attention!r}")
    return [parse_spec(spec, options) for spec in specs]


def unused_options(mechanisms: Sequence[Mechanism], options: Mapping[str, Any] | None) -> list[str]:
    """The options that are set and that none of the mechanisms has a use for."""
    read = {key for mechanism in mechanisms for key in mechanism.read_options()}
    return sorted(key for key, value in (options or {}).items() if value is not None and key not in read)
