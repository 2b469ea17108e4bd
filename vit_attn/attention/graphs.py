"""What goes on around a computation: graphs that are being recorded, and transforms of torch.func."""

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


def forward_mode() -> bool:
    """Whether a forward-mode derivative is being taken, by torch.func.jvp or torch.autograd.forward_ad."""
    return torch.autograd.forward_ad._current_level >= 0


def transformed() -> bool:
    """Whether torch.func's transforms or forward-mode derivatives are at work, which custom operators do not take:
    the former they refuse, tangents they drop without a word. An ``autograd.Function`` around one takes both.
    """
    return not torch.compiler.is_compiling() and (torch._C._are_functorch_transforms_active() or forward_mode())
