"""Patterns: which keys a query may see, fixed by position. One file per pattern, registered by being here.

``python -m vit_attn.attention`` lists them with their options.
"""

from vit_attn.attention.options import import_modules
from vit_attn.attention.patterns.base import (
    FORBIDDEN,
    GLOBAL,
    LABEL_NAMES,
    LOCAL,
    PATTERNS,
    SECOND,
    SELF,
    Pattern,
    Places,
    make_pattern,
)
from vit_attn.attention.patterns.components import Band, Blocks, Classes, Columns, Component, Tiles

import_modules(__name__, __path__)

__all__ = [
    "FORBIDDEN",
    "GLOBAL",
    "LABEL_NAMES",
    "LOCAL",
    "PATTERNS",
    "SECOND",
    "SELF",
    "Band",
    "Blocks",
    "Classes",
    "Columns",
    "Component",
    "Pattern",
    "Places",
    "Tiles",
    "make_pattern",
]
