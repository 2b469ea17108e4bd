"""List every mechanism, normalizer and pattern, with its options.

python -m vit_attn.attention
"""

import sys
from collections.abc import Mapping
from textwrap import fill

from vit_attn.attention import MECHANISMS, NORMALIZERS, PATTERNS, Masked
from vit_attn.attention.options import Named, text

_WIDTH = 100
_HEADINGS: dict[str, Mapping[str, type[Named]]] = {
    "mechanisms, each a spec of its own": MECHANISMS,
    "normalizers, over every pattern": NORMALIZERS,
    "patterns, under every normalizer": PATTERNS,
}


def _options(cls: type[Named]) -> str:
    lines = []
    for key, each in cls.options().items():
        value = getattr(cls, f"{key}_by_default", each.default)
        default = "" if value is None or "default" in each.metadata["help"] else f"; default {text(value)}"
        choices = f", one of {', '.join(each.metadata['choices'])}" if each.metadata["choices"] else ""
        about = f"{key}: {each.metadata['help']}{choices}{default}"
        lines.append(fill(about, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 10))
    return "\n".join(lines)


def main() -> int:
    """Print the list."""
    for heading, registry in _HEADINGS.items():
        print(f"{heading}:")
        for name, cls in registry.items():
            print(fill(f"{name}: {cls.summary()}", _WIDTH, initial_indent="  ", subsequent_indent="      "))
            if cls.options():
                print(_options(cls))
        print()
    print("normalizer+pattern, such as entmax+strided:")
    print(_options(Masked))
    return 0


if __name__ == "__main__":
    sys.exit(main())
