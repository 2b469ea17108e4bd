"""What a model costs: parameters, floating-point operations, attention entries; and the machine it ran on."""

import os
import platform
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vit_attn import __version__
from vit_attn.attention import attention_layers
from vit_attn.attention.blocks import make_plan


@torch.no_grad()
def model_cost(net: nn.Module, image_size: int, in_chans: int = 3) -> dict[str, Any]:
    """Count the cost of one image's forward pass.

    Returns:
        ``parameters``; ``flops``: multiplications and additions, as computed; ``attention_flops``: attention's two
        products among them; ``flops_by_entries``: what is left when forbidden entries cost nothing; ``entries``,
        ``sparsity``: allowed entries and share of forbidden ones, per layer; ``layers``: mechanism and
        implementation, per layer; ``why``: why that implementation, per layer.
    """
    layers = attention_layers(net)
    device = next(net.parameters()).device
    training = net.training
    net.eval()
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, in_chans, image_size, image_size, device=device))
    net.train(training)
    attention_flops, allowed_flops, entries, sparsity = 0, 0.0, [], []
    for layer in layers:
        pattern = layer.pattern()
        assert pattern is not None
        blocks = layer.chosen_implementation() == "blocks"
        scores = make_plan(pattern, device).scores if blocks else pattern.size**2
        attention_flops += 4 * scores * layer.attn_dim
        allowed_flops += 4 * pattern.entries * layer.attn_dim
        entries.append(pattern.entries)
        sparsity.append(pattern.sparsity)
    flops = counter.get_total_flops()
    return {
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "flops": flops,
        "attention_flops": attention_flops,
        "flops_by_entries": round(flops - attention_flops + allowed_flops),
        "entries": entries,
        "sparsity": sparsity,
        "layers": [f"{layer.mechanism} ({layer.chosen_implementation()})" for layer in layers],
        "why": [layer.why_chosen() for layer in layers],
    }


def environment() -> dict[str, Any]:
    """Name the versions and the hardware that a number was measured with."""
    packages = ("torch", "torchvision", "lightning", "timm", "numpy")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "vit_attn": __version__,
        **{package: version(package) for package in packages},
    }
