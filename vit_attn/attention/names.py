"""One wording for every "I do not know that name" in the project."""

from collections.abc import Iterable
from difflib import get_close_matches

_LONGEST = 200  # characters of a wrong name that are shown


def unknown_name(kind: str, value: object, allowed: Iterable[str]) -> str:
    """Say in one line what was wrong, the nearest right spelling and, in a short list, what is allowed."""
    names = [str(name) for name in allowed]
    text = str(value) if len(str(value)) <= _LONGEST else f"{str(value)[:_LONGEST]}…"
    close = get_close_matches(text.lower(), names, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    listed = f" Allowed: {', '.join(names)}." if len(names) <= 40 else ""
    return f"unknown {kind} {text!r}.{hint}{listed}"
