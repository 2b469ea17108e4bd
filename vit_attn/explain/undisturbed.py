"""Gradients of a network that leave no trace in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def undisturbed(net: Any) -> Iterator[None]:
    """Within the block ``net`` is in evaluation mode, not compiled, and frozen; gradients can be taken by its input.

    Afterwards every module's mode, every parameter's gradient and whether it wants one are as they were. A compiled
    network would be compiled again around each hook, and gradient checkpointing would show hooks everything twice.
    """
    modes = [(module, module.training) for module in net.modules()]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in net.parameters()]
    checkpointing = getattr(net, "grad_checkpointing", False)
    net.eval()
    for parameter, _, _ in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    if checkpointing:
        net.grad_checkpointing = False
    try:
        with torch.compiler.set_stance("force_eager"), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        if checkpointing:
            net.grad_checkpointing = checkpointing
        for module, training in modes:
            module.training = training
        for parameter, wanted, gradient in parameters:
            parameter.requires_grad_(wanted)
            parameter.grad = gradient
