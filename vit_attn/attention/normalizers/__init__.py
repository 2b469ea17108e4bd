"""Normalizers: how a row of scores becomes weights. One file per normalizer, registered by being here."""

from vit_attn.attention.normalizers.base import NORMALIZERS, Normalizer, NormalizerCore, RowKernel
from vit_attn.attention.options import import_modules

import_modules(__name__, __path__)

__all__ = ["NORMALIZERS", "Normalizer", "NormalizerCore", "RowKernel"]
