"""Where a graph is being recorded: what must not stand in it, and what must."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def outside_of_graphs() -> Iterator[None]:
    """Within the block, tensors are real and nothing is recorded, whatever records a graph: for masks and plans.

    They are made once and kept, so they must not be the stand-ins of one graph, nor nodes of it.
    """
    tracing = torch._C._get_tracing_state()  # torch.jit.trace's
    if tracing is not None:
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]  # of the C module, which has no stubs for it
    try:
        with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        if tracing is not None:
            torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]


def records_operators() -> bool:
    """Whether a graph is being recorded that is to hold operators, not calls of Python."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()
