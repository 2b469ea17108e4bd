"""Attention as one equation with two choices: a normalizer and a pattern. Imports torch and nothing of the project.

weights = normalizer(q kᵀ · scale, over the keys that the pattern allows);  out = weights v
"""

from vit_attn.attention.functional import IMPLEMENTATIONS, attention
from vit_attn.attention.layer import Attention, attention_layers, observe_attention
from vit_attn.attention.normalizers import NORMALIZERS, entmax, entmax15, softmax, sparsemax
from vit_attn.attention.patterns import LABEL_NAMES, PATTERNS, Pattern, make_pattern
from vit_attn.attention.spec import AttentionOptions, Mechanism, parse_attention, parse_spec

__all__ = [
    "IMPLEMENTATIONS",
    "LABEL_NAMES",
    "NORMALIZERS",
    "PATTERNS",
    "Attention",
    "AttentionOptions",
    "Mechanism",
    "Pattern",
    "attention",
    "attention_layers",
    "entmax",
    "entmax15",
    "make_pattern",
    "observe_attention",
    "parse_attention",
    "parse_spec",
    "softmax",
    "sparsemax",
]
