"""Every kind of picture that the project draws, each as a matplotlib ``Figure`` for ``save_figure``."""

from collections.abc import Sequence
from math import ceil, log2
from textwrap import fill, shorten

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, MultipleLocator
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vit_attn.attention.options import text
from vit_attn.attention.patterns import LABEL_NAMES, Pattern
from vit_attn.explain.style import (
    DPI,
    MASK_COLORS,
    SHARE_COLORMAP,
    WEIGHT_COLORMAP,
    ZERO_COLOR,
    house_style,
    new_figure,
)

Array = Tensor | ArrayLike


def to_numpy(values: Array) -> NDArray:
    """A tensor on any device, or anything that NumPy takes, as an array."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values  # NumPy knows no bfloat16
    return np.asarray(values)


@house_style()
def attention_panel(
    images: Array,
    maps: Array,
    *,
    title: str,
    captions: Sequence[str] | None = None,
    max_images: int = 4,
    max_heads: int = 12,
) -> Figure:
    """Draw one row per image: the image, the map of each head, their mean, and the mean over the image.

    A row has one linear colour scale from 0, so its heads can be compared. It ends at the row's largest weight,
    or, with an arrow, at three times a typical head's largest, so that one head does not leave all others dark.
    Exactly 0 is grey. Over the image, the mean has a scale of its own.

    Args:
        images: (n, H, W, 3) or (n, H, W, 1), float in [0, 1] or uint8.
        maps: (n, heads, gh, gw) attention weights, as ``patch_maps`` returns them.
        title: what is shown ("layer 3 · softmax+strided · epoch 10").
        captions: n texts, one beside each image.
        max_images, max_heads: draw the first so many. The mean is over all heads, drawn or not.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    pictures, weights = _checked(images, maps, captions)
    rows, heads = min(max_images, len(pictures)), min(max_heads, weights.shape[1])
    names = ["image", *(f"head {head}" for head in range(heads)), "mean", "mean\nover image"]
    if heads < weights.shape[1]:
        names[-2] = f"mean of {weights.shape[1]}"

    cell = 1.5 if heads <= 6 else 1.2  # inches
    width = cell * len(names) + (2.6 if captions else 1.0)
    fig = new_figure(width, cell * min(pictures.shape[1] / pictures.shape[2], 3) * rows + 1.6)
    fig.suptitle(wrapped(title, width / 0.12))
    grid = fig.subplots(rows, len(names), squeeze=False)
    for row, axes in enumerate(grid):
        _attention_row(axes, pictures[row], weights[row], heads)
        axes[0].set_ylabel(
            wrapped(captions[row], 20) if captions else "", rotation=0, ha="right", va="center", fontsize=10
        )
    for ax, name in zip(grid[0], names, strict=True):
        ax.set_title(name)
    grey = " Grey: exactly 0." if (weights[:rows] == 0).any() else ""
    note = f"Colour: attention weight, one scale per row; over the image, the mean on its own scale.{grey}"
    fig.supxlabel(wrapped(note, width / 0.09), fontsize=10)
    return fig


def _checked(images: Array, maps: Array, captions: Sequence[str] | None) -> tuple[NDArray, NDArray]:
    """Return images as floats in [0, 1], and maps; refuse what does not fit."""
    pictures, weights = to_numpy(images), to_numpy(maps)
    if pictures.ndim != 4 or pictures.shape[-1] not in (1, 3) or weights.ndim != 4 or 0 in weights.shape:
        raise ValueError(
            f"images must be (n, H, W, 3) and maps (n, heads, gh, gw), not {pictures.shape}, {weights.shape}"
        )
    if len(weights) != len(pictures) or len(captions or pictures) != len(pictures):
        raise ValueError(f"{len(pictures)} images need as many maps, and as many captions or none")
    return as_pictures(pictures), weights


def as_pictures(images: NDArray) -> NDArray:
    """Images (n, H, W, C), uint8 or float, as floats in [0, 1]."""
    return images / 255 if images.dtype == np.uint8 else images.clip(0, 1)


def wrapped(text: str, characters: float) -> str:
    """Break lines that are longer than ``characters``; keep the breaks that are there."""
    return "\n".join(fill(line, max(12, int(characters))) for line in text.splitlines())


def _attention_row(axes: Sequence[Axes], picture: NDArray, weights: NDArray, heads: int) -> None:
    """Draw one image (H, W, C) and its maps (all heads, gh, gw), the first ``heads`` of them, into ``axes``."""
    height, width, _ = picture.shape
    extent = (0, width, height, 0)  # every map covers the image, patch on patch
    mean = weights.mean(axis=0)
    peaks = weights.max(axis=(1, 2))
    seen = peaks[peaks > 0]  # a head may give the patches nothing
    upper = min(seen.max(), 3 * np.median(seen)) if seen.size else 1.0
    axes[0].imshow(np.broadcast_to(picture, (height, width, 3)), extent=extent)
    axes[-1].imshow(picture.mean(axis=-1), cmap="gray", vmin=0, vmax=1, extent=extent)
    for ax, values in zip(axes[1:-1], [*weights[:heads], mean], strict=True):
        ax.set_facecolor(ZERO_COLOR)  # seen through the entries that are masked
        drawn = ax.imshow(
            np.ma.masked_equal(values, 0, copy=False),
            cmap=WEIGHT_COLORMAP,
            vmin=0,
            vmax=upper,
            extent=extent,
            interpolation="nearest",
        )
    axes[-1].imshow(mean, cmap=WEIGHT_COLORMAP, vmin=0, alpha=0.55, extent=extent, interpolation="nearest")
    for ax in axes:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    # Beside the last picture, and exactly as high.
    colorbar = axes[-1].figure.colorbar(
        drawn, cax=axes[-1].inset_axes((1.08, 0, 0.07, 1)), extend="max" if peaks.max() > upper else "neither"
    )
    colorbar.locator = MaxNLocator(4)


def describe_pattern(pattern: Pattern) -> str:
    """The options that ``pattern`` is in force with, in one line: "window 8 · stride 8 · causal"."""
    parts = [f"{key} {text(getattr(pattern, key))}" for key in pattern.options() if key != "causal"]
    parts.append("causal" if pattern.causal else "bidirectional")
    if pattern.num_prefix_tokens:
        parts.append(f"{pattern.num_prefix_tokens} prefix token{'s' * (pattern.num_prefix_tokens > 1)}")
    return " · ".join(parts)


@house_style()
def mask_figure(pattern: Pattern, caption: str | None = None) -> Figure:
    """Draw the labelled mask of one pattern, one colour per label.

    Args:
        pattern: N x N, at one pixel or more per entry.
        caption: the text under the pattern's name, instead of its options and sparsity.
    """
    return _masks([pattern], side=6.0, caption=caption)


@house_style()
def masks_side_by_side(patterns: Sequence[Pattern]) -> Figure:
    """Draw several patterns, best of the same size, in one figure with one legend, at most three in a row."""
    return _masks(patterns, side=4.0 if len(patterns) > 1 else 6.0)


def _masks(patterns: Sequence[Pattern], *, side: float, caption: str | None = None) -> Figure:
    """Place panels of ``side`` inches by hand, so that each entry is a whole number of pixels.

    Any other layout would resample the mask, and lines that are one entry wide would come and go.
    """
    columns = min(3, len(patterns)) if len(patterns) != 4 else 2
    rows = ceil(len(patterns) / columns)
    size = max(pattern.size for pattern in patterns)
    panel = size * max(1, round(side * DPI / size))  # pixels
    dpi = panel / side
    left, right, top, bottom, legend = (round(inches * dpi) for inches in (0.85, 0.25, 0.85, 0.65, 0.5))
    width, height = columns * (left + panel + right), rows * (top + panel + bottom) + legend
    # A hair more than whole pixels, because matplotlib rounds down.
    fig = new_figure((width + 0.01) / dpi, (height + 0.01) / dpi, dpi=dpi, placed=False)
    occurring: set[int] = set()
    for index, pattern in enumerate(patterns):
        row, column = divmod(index, columns)
        x = column * (left + panel + right) + left
        y = height - (row + 1) * (top + panel) - row * bottom
        ax = fig.add_axes((x / width, y / height, panel / width, panel / height))
        text = caption or f"{describe_pattern(pattern)}\nsparsity {100 * pattern.sparsity:.4f} %"
        occurring |= _draw_mask(ax, pattern, text)
    names = {**LABEL_NAMES, **(patterns[0].label_names if len(patterns) == 1 else {})}
    handles = [Patch(color=MASK_COLORS[label], label=names[label]) for label in sorted(occurring)]
    one_line = columns > 1 or len(handles) <= 3
    fig.legend(handles=handles, loc="lower center", ncols=len(handles) if one_line else ceil(len(handles) / 2))
    return fig


def _draw_mask(ax: Axes, pattern: Pattern, text: str) -> set[int]:
    """Draw one mask and return the labels that occur in it."""
    labels = pattern.labels().numpy()
    colors = np.array([to_rgb(MASK_COLORS[label]) for label in sorted(MASK_COLORS)])
    ax.imshow((colors * 255).round().astype(np.uint8)[labels], interpolation="nearest")
    ax.annotate(text, (0.5, 1), (0, 5), "axes fraction", "offset points", ha="center", va="bottom", fontsize=10)
    ax.set_title(pattern.name, weight="bold", pad=9 + 14 * len(text.splitlines()))
    prefix = " (prefix tokens first)" if pattern.num_prefix_tokens else ""
    ax.set(xlabel=f"key j{prefix}", ylabel=f"query i{prefix}")
    ax.spines[:].set_visible(False)  # a frame, or a tick that touches, would cover the outer entries
    ax.spines[["left", "bottom"]].set_position(("outward", 2))
    step = max(1, 2 ** round(log2(pattern.size / 8)))
    ax.xaxis.set_major_locator(MultipleLocator(step))
    ax.yaxis.set_major_locator(MultipleLocator(step))
    return set(np.unique(labels).tolist())


@house_style()
def confusion_figure(matrix: Array, class_names: Sequence[str], *, title: str) -> Figure:
    """Draw a confusion matrix: colour is the share of the true class, text the count (up to 20 classes).

    Args:
        matrix: (C, C) counts, rows are true classes.
        class_names: C names; where rows are too thin for text, only some are written.

    Raises:
        ValueError: another shape, or another number of names.
    """
    counts = to_numpy(matrix)
    classes = len(class_names)
    if counts.shape != (classes, classes):
        raise ValueError(f"{classes} class names need a ({classes}, {classes}) matrix, not {counts.shape}")
    shares = counts / counts.sum(axis=1, keepdims=True).clip(1)  # a class without examples stays empty
    side = min(max(0.55 * classes, 3.5), 11)
    fig = new_figure(side + 2.6, side + 1.8)
    ax = fig.add_subplot()
    drawn = ax.imshow(shares, cmap=SHARE_COLORMAP, vmin=0, vmax=1, interpolation="nearest")
    fig.colorbar(drawn, ax=ax, label="share of the true class", aspect=30)
    ax.set(title=wrapped(title, side / 0.1), xlabel="predicted class", ylabel="true class")
    points = 72 * side / classes  # height of a row
    shown = range(0, classes, ceil(6 / points))
    labels = [shorten(class_names[k], 24, placeholder="…") for k in shown]
    fontsize = min(10, max(5.5, 0.8 * points))
    ax.set_xticks(shown, labels, rotation=90, fontsize=fontsize)
    ax.set_yticks(shown, labels, fontsize=fontsize)
    if classes <= 20:
        for (true, predicted), count in np.ndenumerate(counts):
            color = "white" if shares[true, predicted] > 0.5 else "black"
            ax.text(predicted, true, f"{count:.0f}", ha="center", va="center", color=color, fontsize=10)
    return fig


@house_style()
def reliability_figure(confidences: Array, correct: Array, *, ece: float, title: str, bins: int = 15) -> Figure:
    """Draw accuracy against confidence in equal bins (lo, hi], and how many predictions each bin holds.

    Args:
        confidences: (n,) probability of the predicted class.
        correct: (n,) whether that class is the true one.
        ece: expected calibration error, a share, written into the figure as it is.
        bins: number of bins over [0, 1].

    Raises:
        ValueError: lengths that differ.
    """
    confidence, hit = to_numpy(confidences), to_numpy(correct)
    if confidence.ndim != 1 or confidence.shape != hit.shape:
        raise ValueError(f"confidences and correct must be (n,), not {confidence.shape} and {hit.shape}")
    edges = np.linspace(0, 1, bins + 1)
    index = (np.searchsorted(edges, confidence) - 1).clip(0, bins - 1)
    counts = np.bincount(index, minlength=bins)
    accuracy = np.bincount(index, weights=hit, minlength=bins) / counts.clip(1)
    fig = new_figure(5.6, 6.6)
    upper, lower = fig.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.bar(edges[:-1], accuracy, 1 / bins, align="edge", edgecolor="white", color=MASK_COLORS[2])
    upper.plot([0, 1], [0, 1], "--", color="black", label="perfectly calibrated")
    upper.set(title=wrapped(title, 46), ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    upper.legend(loc="upper left", title=f"ECE {ece:.4f}", title_fontsize=11, alignment="left")
    share = counts / max(1, len(confidence))
    lower.bar(edges[:-1], share, 1 / bins, align="edge", edgecolor="white", color=MASK_COLORS[3])
    lower.set(xlabel="confidence", ylabel="share of\npredictions")
    return fig
