"""The sparse engine: attention whose forbidden entries are not computed, exactly, forward and backward.

plan.py        a pattern as an execution plan: components, whole rows, masks
parts.py       each kind of component as small dense products over strided views
run.py         the plan, a few heads at a time, so that their scores stay in the cores' caches
operators.py   the plan as two custom operators, so that torch.compile sees one node
"""

from vit_attn.attention.engine.operators import blocks
from vit_attn.attention.engine.plan import Plan, make_plan, whole_plan

__all__ = ["Plan", "blocks", "make_plan", "whole_plan"]
