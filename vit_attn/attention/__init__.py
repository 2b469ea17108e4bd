"""Attention: normalizers × patterns, and mechanisms with a rule of their own. Imports torch and nothing of the project.

    weights = normalizer(q kᵀ · scale, over the keys that the pattern allows);  out = weights v

Every normalizer, pattern and mechanism is a file of its own in ``normalizers``, ``patterns`` and ``kinds``, registered
by being there; ``python -m vit_attn.attention`` lists them with their options.
"""

from vit_attn.attention import kinds  # noqa: F401  # registers them
from vit_attn.attention.functional import IMPLEMENTATIONS, attention
from vit_attn.attention.layer import Attention, attention_layers, observe_attention
from vit_attn.attention.masked import Masked
from vit_attn.attention.mechanism import MECHANISMS, AttentionCost, Core, Mechanism, Tokens
from vit_attn.attention.normalizers import NORMALIZERS, Normalizer
from vit_attn.attention.normalizers.entmax import entmax, entmax15, sparsemax
from vit_attn.attention.normalizers.softmax import softmax
from vit_attn.attention.options import option, option_names, register
from vit_attn.attention.patterns import LABEL_NAMES, PATTERNS, Pattern, make_pattern
from vit_attn.attention.spec import parse_attention, parse_spec, unused_options

__all__ = [
    "IMPLEMENTATIONS",
    "LABEL_NAMES",
    "MECHANISMS",
    "NORMALIZERS",
    "PATTERNS",
    "Attention",
    "AttentionCost",
    "Core",
    "Masked",
    "Mechanism",
    "Normalizer",
    "Pattern",
    "Tokens",
    "attention",
    "attention_layers",
    "entmax",
    "entmax15",
    "make_pattern",
    "observe_attention",
    "option",
    "option_names",
    "parse_attention",
    "parse_spec",
    "register",
    "softmax",
    "sparsemax",
    "unused_options",
]
