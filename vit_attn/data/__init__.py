"""Data: one shared pipeline (``pipeline.py``) and one module per data set."""

from vit_attn.data.augment import Augment, Normalize
from vit_attn.data.images import Images
from vit_attn.data.pipeline import ImageData, check_same_data

__all__ = ["Augment", "ImageData", "Images", "Normalize", "check_same_data"]
