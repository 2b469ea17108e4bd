"""What a run's configuration says of its attention, under one name however it was spelled."""

from collections.abc import Mapping, Sequence
from typing import Any

from vit_attn.attention import Masked, Mechanism, parse_attention
from vit_attn.attention.normalizers.entmax import Entmax
from vit_attn.attention.options import text

_ALPHA = tuple(Entmax.options())  # said in words of their own


def read_mechanism(model: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Read ``model.attention`` and ``model.attention_options``.

    Options that are null, at their default or of no use to any layer's mechanism are left out; "softmax+strided" is
    "strided", "full" and "softmax+full" are "softmax", and a list that repeats itself is its first period. It makes
    no difference whether an option stands in the spec or in ``attention_options``, unless layers differ in it.

    Returns:
        The spec, "[strided, softmax]" where it is a list, and the options that all layers that read them share.
    """
    attention = model["attention"]
    specs = [attention] if isinstance(attention, str) else list(attention)
    options = {str(key): value for key, value in (model.get("attention_options") or {}).items() if value is not None}
    try:
        mechanisms = parse_attention(specs, options)
    except ValueError:  # of another version of this project: taken as it is written
        return _joined([str(spec) for spec in specs]), options
    shared = _shared(mechanisms)
    own = {key: value for each in mechanisms for key, value in _given(each).items() if key in shared}
    return _joined(_period([_short(each, shared) for each in mechanisms])), own


def _given(mechanism: Mechanism) -> dict[str, Any]:
    """All options of a mechanism that are not at their default."""
    rest = mechanism.given() if isinstance(mechanism, Masked) else {}
    return {key: value for term in mechanism.terms() for key, value in term.given().items()} | rest


def _shared(mechanisms: Sequence[Mechanism]) -> set[str]:
    """The options that have one value in all layers that read them."""
    values: dict[str, set[Any]] = {}
    for each in mechanisms:
        given = _given(each)
        for key in each.read_options():
            values.setdefault(key, set()).add(given.get(key))
    return {key for key, found in values.items() if len(found) == 1}


def mechanism_label(spec: str, options: Mapping[str, Any]) -> str:
    """Name a mechanism for people: "entmax α=1.3", "entmax α 1.01→1.5", "strided window=4 stride=8"."""
    rest = {key: value for key, value in options.items() if key not in _ALPHA}
    alpha = show(options.get("alpha", Entmax().alpha))
    words = [spec]
    if options.get("anneal_alpha_from") is not None:
        words.append(f"α {show(options['anneal_alpha_from'])}→{alpha}")
    elif options.get("learnable_alpha"):
        words.append("α learned" + (f" from {alpha}" if "alpha" in options else ""))
    elif "alpha" in options:
        words.append(f"α={alpha}")
    return " ".join([*words, *(f"{key}={show(value)}" for key, value in rest.items())])


def show(value: Any) -> str:
    """Write a value of the configuration as the command line takes it, a dotted ``_target_`` by its last name."""
    if value is None:
        return "null"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(show(each) for each in value)}]"
    return text(value)


def _short(mechanism: Mechanism, shared: set[str]) -> str:
    """The spec without what is understood, and without the options that layers share."""
    terms = mechanism.terms()
    if isinstance(mechanism, Masked):
        if mechanism.pattern.name == "full":
            terms = (mechanism.normalizer,) if "causal" in shared or mechanism.pattern.is_full else terms
        elif mechanism.normalizer.name == "softmax":
            terms = (mechanism.pattern,)
    return "+".join(
        ":".join([term.name, *(f"{key}:{text(value)}" for key, value in term.given().items() if key not in shared)])
        for term in terms
    )


def _period(names: list[str]) -> list[str]:
    """Shorten a list that cycles through the layers to what it repeats."""
    for length in range(1, len(names)):
        if len(names) % length == 0 and names == names[:length] * (len(names) // length):
            return names[:length]
    return names


def _joined(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"[{', '.join(names)}]"
