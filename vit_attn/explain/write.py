"""Explanations of a model as files: the numbers, and pictures of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vit_attn.attention import attention_layers
from vit_attn.explain.explanation_figures import (
    class_label,
    curves_figure,
    heads_figure,
    layers_figure,
    methods_figure,
    receptive_field_figure,
)
from vit_attn.explain.explanations import Explanations, explain_images
from vit_attn.explain.probe import default_layers, look
from vit_attn.explain.receptive_field import first_reached, receptive_field
from vit_attn.explain.style import save_figure


def write_explanations(
    net: nn.Module,
    normalize: nn.Module,
    probabilities: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    folder: Path,
    *,
    class_names: Sequence[str],
    note: str,
    layers: Sequence[int] | None = None,
    picture_images: int = 4,
    seed: int = 0,
) -> tuple[dict[str, Any], list[Path]]:
    """Explain images; write folder/explanations.npz and pictures in folder/explanations.

    Args:
        net, normalize, probabilities, images, labels, seed: see ``explain_images``.
        folder: for results; made if need be.
        class_names: one per class.
        note: ends every title, such as "epoch 3 · test images".
        layers: whose heads are drawn, for the first picture's image; default: the first, the middle and the last.
        picture_images: how many images are drawn, spread evenly.

    Returns:
        What results/metrics.json holds under "explanations", and the files that were written.

    Raises:
        OSError: a file cannot be written.
    """
    found = explain_images(net, normalize, probabilities, images, labels, seed=seed)
    numbers = found.summary()
    numbers["receptive_field"] = receptive_field(net)
    numbers["receptive_field_without_relays"] = receptive_field(net, relays=False)
    paths = [found.save(folder / "explanations.npz")]
    drawn = draw_images(
        net,
        normalize,
        images,
        found,
        folder / "explanations",
        class_names=class_names,
        note=note,
        layers=layers,
        picture_images=picture_images,
    )
    return numbers, [*paths, *drawn, draw_receptive_field(net, folder / "explanations")]


def draw_images(
    net: nn.Module,
    normalize: nn.Module,
    images: Tensor,
    found: Explanations,
    folder: Path,
    *,
    class_names: Sequence[str],
    note: str,
    layers: Sequence[int] | None = None,
    picture_images: int = 4,
) -> list[Path]:
    """Draw the methods, the curves, every layer, and the heads of some: folder/methods.png, …; returns the paths.

    See :func:`write_explanations` for the arguments; ``found`` are the explanations of ``images``.
    """
    count = min(picture_images, len(images))
    rows = [index * len(images) // count for index in range(count)]
    owners = {layer.layer: layer for layer in attention_layers(net)}
    seen = look(net, normalize, images[rows], layers=list(owners))
    mechanisms = [str(owner.mechanism) for owner in owners.values()]
    title = f"{_mechanism(net)} · {note}"
    pictures = images[rows].permute(0, 2, 3, 1)
    captions = [class_label(found, row, class_names) for row in rows]
    number = "1 image" if len(images) == 1 else f"mean over {len(images)} images"
    means = torch.stack([seen.maps[layer].mean(dim=1) for layer in owners], dim=1)  # (count, layers, gh, gw)
    figures = {
        "methods": methods_figure(found, rows, class_names=class_names, title=title),
        "curves": curves_figure(found, title=f"{title} · {number}"),
        "layers": layers_figure(
            pictures, means, mechanisms=mechanisms, captions=captions, title=f"all layers · {seen.query} · {note}"
        ),
    }
    for layer in default_layers(net) if layers is None else layers:
        caption = captions[0].replace("\n", ", ")
        about = f"layer {layer} · {mechanisms[layer]} · {seen.query}\n{note}\n{caption}"
        figures[f"heads_layer_{layer:02d}"] = heads_figure(pictures[0], seen.maps[layer][0], title=about)
    return [save_figure(figure, folder / f"{name}.png") for name, figure in figures.items()]


def draw_receptive_field(net: nn.Module, folder: Path) -> Path:
    """Draw how far the middle patch can see, and patches on average: folder/receptive_field.png."""
    layer = attention_layers(net)[0]
    height, width = layer.grid_size
    query = (height // 2) * width + width // 2
    figure = receptive_field_figure(
        first_reached(net, query, relays=False),
        first_reached(net, query),
        shares=(receptive_field(net, relays=False), receptive_field(net)),
        query=query,
        num_prefix_tokens=layer.num_prefix_tokens,
        title=f"what a patch can depend on · {_mechanism(net)}",
    )
    return save_figure(figure, folder / "receptive_field.png")


def _mechanism(net: nn.Module) -> str:
    """The mechanisms of the layers, each once, in the order of depth."""
    return ", ".join(dict.fromkeys(str(layer.mechanism) for layer in attention_layers(net)))
