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
