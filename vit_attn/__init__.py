"""vit_attn: which attention should my Vision Transformer use?"""

__version__ = "0.1.0"
