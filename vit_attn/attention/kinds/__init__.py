"""Mechanisms that are more than normalizer and pattern: a rule of their own from q, k, v to the output.

One file per mechanism, registered by being here. ``python -m vit_attn.attention`` lists them with their options.
"""

from vit_attn.attention.options import import_modules

import_modules(__name__, __path__)
