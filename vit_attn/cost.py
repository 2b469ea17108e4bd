"""What a model costs: parameters, operations, attention entries, memory; and the machine it ran on."""

import gc
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from vit_attn import __version__
from vit_attn.attention import Attention, AttentionCost, attention_layers

# torch 2.11 does not count its fused kernel on the CPU.
_COUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}


@torch.no_grad()
def model_cost(net: nn.Module, image_size: int, in_chans: int = 3) -> dict[str, Any]:
    """Count the cost of one image's forward pass.

    Returns:
        ``parameters``; ``flops``: multiplications and additions, as computed; ``attention_flops``: those from q, k and
        v to attention's output among them; ``flops_by_entries``: what is left when forbidden entries cost nothing;
        per layer ``entries``, ``sparsity``: allowed entries and share of forbidden ones, None where a mechanism forms
        no weights; ``layers``: mechanism and implementation; ``why``: why that implementation.
    """
    layers = attention_layers(net)
    device = next(net.parameters()).device
    training = net.training
    net.eval()
    with FlopCounterMode(display=False, custom_mapping=_COUNTED) as counter:
        net(torch.zeros(1, in_chans, image_size, image_size, device=device))
    net.train(training)
    costs = [layer.cost() for layer in layers]
    sizes = [layer.tokens().size ** 2 for layer in layers]
    flops, attention_flops = counter.get_total_flops(), sum(cost.flops for cost in costs)
    return {
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "flops": flops,
        "attention_flops": attention_flops,
        "flops_by_entries": flops - attention_flops + sum(cost.needed_flops for cost in costs),
        "entries": [cost.entries for cost in costs],
        "sparsity": [
            None if cost.entries is None else 1 - cost.entries / size for cost, size in zip(costs, sizes, strict=True)
        ],
        "layers": [f"{layer.mechanism} ({cost.implementation})" for layer, cost in zip(layers, costs, strict=True)],
        "why": [
            _why(cost, 4 * size * layer.attn_dim, layer) for cost, size, layer in zip(costs, sizes, layers, strict=True)
        ],
    }


def _why(cost: AttentionCost, full: int, layer: Attention) -> str:
    if cost.flops <= full:
        return cost.why
    return (
        f"{cost.why}; {cost.flops / full:.1f} times the operations of full attention over {layer.tokens().size} tokens"
    )


def describe_attention(cost: dict[str, Any]) -> list[str]:
    """A line per kind of layer in what ``model_cost`` gave: how many, who computes them and why, what is forbidden."""
    kinds = dict.fromkeys(zip(cost["layers"], cost["sparsity"], cost["entries"], cost["why"], strict=True))
    lines = []
    for name, sparsity, entries, why in kinds:
        forbidden = "" if entries is None else f"{entries} entries, {100 * sparsity:.1f} % forbidden; "
        lines.append(f"{cost['layers'].count(name)} x {name}: {forbidden}{why}")
    return lines


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


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Within the block, Python frees nothing at moments of its own choice."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def peak_memory(function: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call of ``function`` holds at most, beyond what was held before; what it returns counts.

    On a GPU the caching allocator knows; on the CPU the events of torch's allocator are added up, in order. Memory of
    custom operators and of compiled code is among them; scratch space that MKL and oneDNN take for themselves is not.
    Call the function once before if its first call compiles or fills caches.
    """
    with no_garbage_collection():  # which would free what others held before
        return _peak_on_gpu(function, device) if device.type == "cuda" else _peak_on_cpu(function)


def _peak_on_gpu(function: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(function: Callable[[], object]) -> int:
    # The profiler's library speaks of its stages, and of an error where there is no GPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        held = function()
    del held
    # The profiler's public events leave out allocations inside an operator's children; kineto's own have all.
    results: Any = profiled.profiler
    events = [
        e for e in results.kineto_results.events() if e.name() == "[memory]" and e.device_type() == DeviceType.CPU
    ]
    current = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak
