"""A bound on what the aliases of a YAML file unfold into.

``a: &a [x, x]``, ``b: &b [*a, *a]`` and so on: forty such lines are 10¹² entries, and OmegaConf makes each of them.
"""

from typing import Any

import yaml

MOST_ENTRIES = 1_000_000


def bound_aliases() -> None:
    """Let every loader that derives from ``yaml.SafeLoader``, such as OmegaConf's, refuse to make more than that."""
    loader: Any = yaml.SafeLoader
    loader.compose_document = _compose_document


def _compose_document(self: Any) -> yaml.Node:
    node = yaml.composer.Composer.compose_document(self)
    assert node is not None  # it is only called where there is one
    if _unfolded(node, {}) > MOST_ENTRIES:
        problem = f"its aliases unfold into more than {MOST_ENTRIES:,} entries"
        raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
    return node


def _unfolded(node: yaml.Node, known: dict[int, int]) -> int:
    """How many entries ``node`` stands for; of a node that several aliases name, ``known`` keeps the answer."""
    if id(node) not in known:
        known[id(node)] = MOST_ENTRIES + 1  # until it is counted: one that holds itself has no end
        count = 1
        if not isinstance(node, yaml.ScalarNode):
            for part in node.value:
                for inner in part if isinstance(part, tuple) else (part,):
                    count += _unfolded(inner, known)
        known[id(node)] = count
    return known[id(node)]
