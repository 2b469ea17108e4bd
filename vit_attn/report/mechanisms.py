"""What a run's configuration says of its attention, under one name however it was spelled."""

from collections.abc import Mapping, Sequence
from typing import Any

from vit_attn.attention import Mechanism, parse_attention

# Their defaults are the width of the patch grid, which the configuration alone does not tell.
_BY_GRID = ("window", "stride")


def read_mechanism(model: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Read ``model.attention`` and ``model.attention_options``.

    Options that are null, at their default or of no use to any layer's mechanism are left out; "softmax+strided" is
    "strided", "full" and "softmax+full" are "softmax", and a list that repeats itself is its first period.

    Returns:
        The spec, "[strided, softmax]" where it is a list, and the options that are left.
    """
    attention = model["attention"]
    specs = [attention] if isinstance(attention, str) else list(attention)
    options = {str(key): value for key, value in (model.get("attention_options") or {}).items() if value is not None}
    try:
        mechanisms = parse_attention(specs, options)
    except ValueError:  # of another version of this project: taken as it is written
        return _joined([str(spec) for spec in specs]), options
    used = {
        key: value
        for key, value in options.items()
        if any(key not in each.unused_options() and value != _default(each, key) for each in mechanisms)
    }
    return _joined(_period([_short(each) for each in mechanisms])), used


def mechanism_label(spec: str, options: Mapping[str, Any]) -> str:
    """Name a mechanism for people: "entmax α=1.3", "entmax α 1.01→1.5", "strided window=4 stride=8"."""
    rest = {
        key: value for key, value in options.items() if key not in ("alpha", "learnable_alpha", "anneal_alpha_from")
    }
    alpha = show(options.get("alpha", Mechanism("entmax", "full").alpha))
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
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(show(each) for each in value)}]"
    return str(value)


def _short(mechanism: Mechanism) -> str:
    if mechanism.pattern == "full":
        return mechanism.normalizer
    return mechanism.pattern if mechanism.normalizer == "softmax" else str(mechanism)


def _default(mechanism: Mechanism, option: str) -> Any:
    """What the mechanism takes where ``option`` is null."""
    bare = Mechanism(mechanism.normalizer, mechanism.pattern)
    if option in _BY_GRID:
        return None
    pattern = bare.make_pattern(num_tokens=1, num_prefix_tokens=0, grid_size=(1, 1))
    return getattr(bare, option, getattr(pattern, option, None))


def _period(names: list[str]) -> list[str]:
    """Shorten a list that cycles through the layers to what it repeats."""
    for length in range(1, len(names)):
        if len(names) % length == 0 and names == names[:length] * (len(names) // length):
            return names[:length]
    return names


def _joined(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"[{', '.join(names)}]"
