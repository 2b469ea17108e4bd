"""Look at a model's attention on some images: numbers for every layer, maps for some, pictures of both."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vit_attn.attention import Attention, attention_layers, observe_attention
from vit_attn.explain.figures import attention_panel, mask_figure
from vit_attn.explain.maps import patch_maps, reads_class_token
from vit_attn.explain.statistics import AttentionStatistics
from vit_attn.explain.style import save_figure

# Weights (B, H, N, N) that exist at a time: a quarter of a GiB in fp32, and a few copies of it while they are made.
_MAX_ENTRIES = 2**26


@dataclass
class Look:
    """What was seen.

    Args:
        layers: the attention layers of the model.
        statistics: layer → zeros, entropy, support, distance.
        maps: layer → (B, H, gh, gw), for the layers that were asked for.
        query: whose attention the maps show.
    """

    layers: list[Attention]
    query: str
    statistics: dict[int, dict[str, float]] = field(default_factory=dict)
    maps: dict[int, Tensor] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Flat names for loggers: attention/zeros/layer_00, …."""
        numbers = {
            f"attention/{name}/layer_{layer:02d}": value
            for layer, values in self.statistics.items()
            for name, value in values.items()
        }
        for layer in self.layers:
            for name, values in layer.core.scalars().items():
                for head, value in enumerate(values.tolist()):
                    numbers[f"attention/{name}/layer_{layer.layer:02d}/head_{head}"] = value
        return numbers


def default_layers(net: nn.Module) -> list[int]:
    """First, middle and last attention layer."""
    depth = len(attention_layers(net))
    return sorted({0, depth // 2, depth - 1})


def weight_entries(net: nn.Module) -> int:
    """Number of attention weights of one image in the layer that has most."""
    layers = attention_layers(net)
    return max(layer.num_heads * (layer.num_prefix_tokens + prod(layer.grid_size)) ** 2 for layer in layers)


@torch.no_grad()
def look(net: nn.Module, normalize: nn.Module, images: Tensor, *, layers: Sequence[int]) -> Look:
    """Run ``net`` over raw images (B, C, H, W), in evaluation mode and fp32, and watch its attention.

    Args:
        layers: indices of the layers whose maps are kept; numbers are of all.
    """
    device = next(net.parameters()).device
    has_class_token = reads_class_token(net)
    seen = Look(attention_layers(net), "from the class token" if has_class_token else "mean over all patches")
    statistics = AttentionStatistics()
    maps: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    by_index = {layer.layer: layer for layer in seen.layers}

    def observe(layer: int, weights: Tensor) -> None:
        owner = by_index[layer]
        place: dict[str, Any] = {"num_prefix_tokens": owner.num_prefix_tokens, "grid_size": owner.grid_size}
        statistics.update(layer, weights, **place)
        if layer in maps:
            maps[layer].append(patch_maps(weights, has_class_token=has_class_token, **place).cpu())

    batch_size = max(1, min(32, _MAX_ENTRIES // weight_entries(net)))
    training = net.training
    net.eval()
    try:
        # A compiled network would be compiled again around the observer.
        with torch.compiler.set_stance("force_eager"), observe_attention(net, observe):
            for batch in images.split(batch_size):
                net(normalize(batch.to(device)))
    finally:
        net.train(training)
    seen.statistics = statistics.compute()
    seen.maps = {layer: torch.cat(parts) for layer, parts in maps.items()}
    return seen


def write_panels(
    seen: Look,
    images: Tensor,
    folder: Path,
    *,
    count: int,
    note: str,
    suffix: str = "",
    captions: Sequence[str] | None = None,
) -> dict[int, Path]:
    """Draw a heatmap panel per layer with maps: folder/layer_00<suffix>.png.

    Args:
        seen: maps of these images.
        images: (n, C, H, W) uint8.
        count: how many of them are drawn, spread evenly.
        note: ends the title, such as "epoch 3".
        captions: a line for each image.
    """
    count = min(count, len(images))
    rows = [index * len(images) // count for index in range(count)]
    pictures = images[rows].permute(0, 2, 3, 1)  # (count, H, W, C)
    lines = None if captions is None else [captions[row] for row in rows]
    paths = {}
    for layer, maps in seen.maps.items():
        mechanism = next(owner.mechanism for owner in seen.layers if owner.layer == layer)
        title = f"layer {layer} · {mechanism} · {seen.query} · {note}"
        figure = attention_panel(pictures, maps[rows], title=title, captions=lines, max_images=count)
        paths[layer] = save_figure(figure, folder / f"layer_{layer:02d}{suffix}.png")
    return paths


def write_masks(net: nn.Module, folder: Path) -> list[Path]:
    """Draw each pattern that the layers of ``net`` use, once: folder/mask_<pattern>.png, numbered where one name has
    several sets of options. A mechanism without a pattern has no mask.
    """
    patterns = dict.fromkeys(pattern for layer in attention_layers(net) if (pattern := layer.pattern()) is not None)
    paths = []
    for name in sorted({pattern.name for pattern in patterns}):
        alike = [pattern for pattern in patterns if pattern.name == name]
        for number, pattern in enumerate(alike, start=1):
            suffix = f"_{number}" if len(alike) > 1 else ""
            paths.append(save_figure(mask_figure(pattern), folder / f"mask_{name}{suffix}.png"))
    return paths
