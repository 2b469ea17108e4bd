"""Pictures of explanations: heads, layers and methods over images, curves, and how far patches see."""

from collections.abc import Sequence
from math import ceil, sqrt
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from vit_attn.explain.curves import area_under_curve, patch_counts
from vit_attn.explain.explanations import METHOD_TITLES, METHODS, RANDOM, Explanations
from vit_attn.explain.figures import as_pictures, to_numpy, wrapped
from vit_attn.explain.style import (
    CATEGORY_COLORS,
    REFERENCE_COLOR,
    WEIGHT_COLORMAP,
    ZERO_COLOR,
    house_style,
    new_figure,
)

_OPACITY = 0.55  # of a map over its image
_NEVER_COLOR = "#ebebeb"
_QUERY_COLOR = "#d55e00"
_RANDOM_STYLE = {"color": REFERENCE_COLOR, "linestyle": "--", "label": "random order"}
_DASHES = ("-", (0, (6, 1.5)), (0, (3, 1, 1, 1)), (0, (1.2, 1.2)))


def overlay(image: ArrayLike, values: ArrayLike, size: int = 224) -> NDArray:
    """Lay a map over its image, ready to be written as a PNG.

    The map is scaled from its smallest value to its largest; a constant one takes the lowest colour.

    Args:
        image: (H, W, 3) or (H, W, 1), uint8 or float in [0, 1].
        values: (gh, gw).
        size: pixels of the longer side; no pixel is blended with its neighbours.

    Returns:
        (S, S', 3) uint8, of the image's aspect ratio.
    """
    picture = as_pictures(np.asarray(image)[None])[0].mean(axis=-1)  # (H, W)
    height, width = picture.shape
    shape = tuple(max(1, round(size * side / max(height, width))) for side in (height, width))
    grey = 0.25 + 0.5 * _nearest(picture, shape)[..., None]  # black and white would take the colours away
    color = colormaps[WEIGHT_COLORMAP](_nearest(_scaled(to_numpy(values)), shape))[..., :3]
    return ((1 - _OPACITY) * 255 * grey + _OPACITY * 255 * color).round().astype(np.uint8)


def _scaled(values: NDArray) -> NDArray:
    """From its smallest value to its largest, in [0, 1]; 0 where it is constant."""
    spread = float(np.ptp(values))
    return (values - values.min()) / spread if spread > 0 else np.zeros(values.shape)


def _nearest(values: NDArray, shape: tuple[int, ...]) -> NDArray:
    """(h, w) to ``shape`` by picking the nearest value."""
    rows, columns = (np.arange(new) * old // new for new, old in zip(shape, values.shape, strict=True))
    return values[np.ix_(rows, columns)]


def _show(ax: Axes, picture: NDArray) -> None:
    """Draw an image (H, W, C) without ticks or frame."""
    height, width, _ = picture.shape
    ax.imshow(np.broadcast_to(picture, (height, width, 3)), extent=(0, width, height, 0))
    _bare(ax)


def _bare(ax: Axes) -> None:
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def _show_weights(ax: Axes, values: NDArray, upper: float, shape: tuple[int, int]) -> None:
    """Draw weights (gh, gw) over the area of the image, from 0 to ``upper``; exact zeros are grey."""
    ax.set_facecolor(ZERO_COLOR)
    extent = (0, shape[1], shape[0], 0)
    shown = np.ma.masked_equal(values, 0, copy=False)
    ax.imshow(shown, cmap=WEIGHT_COLORMAP, vmin=0, vmax=upper, extent=extent, interpolation="nearest")
    _bare(ax)


def _color_bar(ax: Axes, label: str) -> None:
    """A colour bar of the axes' last image, beside it and exactly as high."""
    bar = ax.figure.colorbar(ax.images[-1], cax=ax.inset_axes((1.06, 0, 0.07, 1)), label=label)
    bar.locator = MaxNLocator(4)


@house_style()
def heads_figure(image: ArrayLike, maps: ArrayLike, *, title: str) -> Figure:
    """Draw all heads of one layer for one image, over the image's own patch grid, in one colour scale.

    Args:
        image: (H, W, C), float in [0, 1] or uint8.
        maps: (heads, gh, gw) attention weights.
        title: what is shown.
    """
    picture, weights = as_pictures(to_numpy(image)[None])[0], to_numpy(maps)
    count = len(weights) + 1
    columns = ceil(sqrt(count)) if count > 5 else count
    rows = ceil(count / columns)
    cell = 2.0
    width = max(cell * columns + 1.4, 6.5)
    fig = new_figure(width, (cell + 0.3) * rows * min(picture.shape[0] / picture.shape[1], 2) + 1.5)
    fig.suptitle(wrapped(title, width / 0.12))
    axes = fig.subplots(rows, columns, squeeze=False).ravel()
    upper = float(weights.max()) or 1.0
    _show(axes[0], picture)
    axes[0].set_title("image")
    for head, (ax, values) in enumerate(zip(axes[1:], weights, strict=False)):
        _show_weights(ax, values, upper, picture.shape[:2])
        ax.set_title(f"head {head}")
    for ax in axes[count:]:
        ax.set_visible(False)
    _color_bar(axes[min(columns, count) - 1], "attention weight")
    grid = f"{weights.shape[1]}×{weights.shape[2]} patches"
    grey = " Grey: exactly 0." if (weights == 0).any() else ""
    fig.supxlabel(wrapped(f"{grid}; one colour scale for all heads.{grey}", width / 0.09), fontsize=10)
    return fig


@house_style()
def layers_figure(
    images: ArrayLike, maps: ArrayLike, *, mechanisms: Sequence[str], captions: Sequence[str], title: str
) -> Figure:
    """Draw one row per image: the image, and every layer's attention, mean over its heads.

    Args:
        images: (n, H, W, C), float in [0, 1] or uint8.
        maps: (n, layers, gh, gw).
        mechanisms: of each layer.
        captions: n texts, one beside each image.
        title: what is shown.
    """
    pictures, weights = as_pictures(to_numpy(images)), to_numpy(maps)
    rows, layers = weights.shape[:2]
    # Deep models take several lines per image, so that a map stays large enough to be seen.
    per_line = min(layers, 12)
    lines = ceil(layers / per_line)
    cell = 1.9 if per_line <= 6 else 1.3
    width = max(cell * (per_line + 1) + 2.8, 7.0)
    ratio = min(pictures.shape[1] / pictures.shape[2], 2)
    fig = new_figure(width, cell * ratio * rows * lines + 1.9)
    fig.suptitle(wrapped(title, width / 0.12))
    grid = fig.subplots(rows * lines, per_line + 1, squeeze=False)
    for index, (row, line) in enumerate(np.ndindex(rows, lines)):
        axes, upper = grid[index], float(weights[row].max()) or 1.0
        first = line * per_line
        if line == 0:
            _show(axes[0], pictures[row])
            axes[0].set_ylabel(wrapped(captions[row], 20), rotation=0, ha="right", va="center", fontsize=10)
        for place, ax in enumerate(axes[1:], start=first):
            if place >= layers:
                ax.set_visible(False)
                continue
            _show_weights(ax, weights[row, place], upper, pictures.shape[1:3])
            if row == 0:
                ax.set_title(
                    f"layer {place}\n{wrapped(mechanisms[place].replace('+', ' + '), cell / 0.1)}", fontsize=10
                )
        if line:
            axes[0].set_visible(False)
        else:
            _color_bar(axes[per_line], "")
    grey = " Grey: exactly 0." if (weights == 0).any() else ""
    note = f"Colour: attention weight, mean over the heads; one scale per image.{grey}"
    fig.supxlabel(wrapped(note, width / 0.09), fontsize=10)
    return fig


@house_style()
def methods_figure(found: Explanations, rows: Sequence[int], *, class_names: Sequence[str], title: str) -> Figure:
    """Draw one row per image: the image, and the map of each method over it, with the true and predicted class.

    Args:
        found: explanations.
        rows: indices of the images to draw.
        class_names: one per class.
        title: what is shown.
    """
    cell = 1.9
    width = cell * (len(METHODS) + 1) + 2.6
    ratio = min(found.images.shape[1] / found.images.shape[2], 2)
    fig = new_figure(width, cell * ratio * len(rows) + 1.6)
    fig.suptitle(wrapped(title, width / 0.12))
    grid = fig.subplots(len(rows), len(METHODS) + 1, squeeze=False)
    for axes, row in zip(grid, rows, strict=True):
        _show(axes[0], as_pictures(found.images[row][None])[0])
        label = class_label(found, row, class_names)
        axes[0].set_ylabel(wrapped(label, 22), rotation=0, ha="right", va="center", fontsize=10)
        for ax, method in zip(axes[1:], METHODS, strict=True):
            ax.imshow(overlay(found.images[row], found.maps[method][row], size=448), interpolation="nearest")
            _bare(ax)
    for ax, name in zip(grid[0], ["image", *(METHOD_TITLES[method] for method in METHODS)], strict=True):
        ax.set_title(wrapped(name, 16), fontsize=11)
    note = "For the predicted class. Dark to bright: each map from its own smallest value to its own largest."
    fig.supxlabel(wrapped(note, width / 0.09), fontsize=10)
    return fig


def class_label(found: Explanations, row: int, class_names: Sequence[str]) -> str:
    """True and predicted class of one image in words; a label of -1 is not known."""
    predicted, label = int(found.predictions[row]), int(found.labels[row])
    said = f"predicted {class_names[predicted]} ({100 * found.confidences[row]:.0f} %)"
    return said if label < 0 else f"true {class_names[label]}\n{said}"


@house_style()
def curves_figure(found: Explanations, *, title: str) -> Figure:
    """Draw the deletion and insertion curves of every method and of a random order, mean over the images."""
    width = 10.5
    fig = new_figure(width, 5.4)
    fig.suptitle(wrapped(title, width / 0.12))
    left, right = fig.subplots(1, 2, sharey=True)
    patches = found.grid_size[0] * found.grid_size[1]
    drawn = (
        (left, found.deletion, "Deletion (lower is better)", "share of patches set to the data's mean"),
        (right, found.insertion, "Insertion (higher is better)", "share of patches uncovered from a blurred image"),
    )
    for ax, curves, name, label in drawn:
        for method, curve in curves.items():
            mean = curve.mean(axis=0)
            style: dict[str, Any] = dict(_RANDOM_STYLE)
            if method != RANDOM:
                index = METHODS.index(method)
                style = {"color": CATEGORY_COLORS[index], "label": METHOD_TITLES[method], "linewidth": 2}
                style["linestyle"] = _DASHES[index]
            style["label"] = f"{style['label']}: {area_under_curve(mean, patches):.3f}"
            ax.plot(patch_counts(patches, len(mean) - 1) / patches, mean, **style)
        ax.set(title=name, xlabel=label, xlim=(0, 1), ylim=(0, 1))
        # Below, so that it covers no curve.
        ax.legend(title="area under the curve", loc="upper center", bbox_to_anchor=(0.5, -0.17), title_fontsize=11)
    left.set_ylabel("probability of the predicted class")
    return fig


@house_style()
def receptive_field_figure(
    by_patches: ArrayLike,
    with_relays: ArrayLike,
    *,
    shares: tuple[Sequence[float], Sequence[float]],
    query: int,
    num_prefix_tokens: int,
    title: str,
) -> Figure:
    """Draw after how many layers a query's output can depend on each patch, and the mean share over depth.

    Args:
        by_patches, with_relays: (gh, gw), from ``first_reached``, without and with prefix tokens as relays.
        shares: share of the patches after each layer, without and with relays.
        query: index of the patch in raster order, marked in the pictures.
        num_prefix_tokens: where there are none, relays are not drawn.
        title: what is shown.
    """
    first = [to_numpy(by_patches), to_numpy(with_relays)][: 2 if num_prefix_tokens else 1]
    names = ["over patches alone", "prefix tokens pass on"]
    depth = len(shares[0])
    colors = ListedColormap([_NEVER_COLOR, "white", *colormaps[WEIGHT_COLORMAP](np.linspace(0.95, 0.1, depth))])
    norm = BoundaryNorm(np.arange(-1.5, depth + 1), colors.N)
    width = 4.0 * len(first) + 5.0
    fig = new_figure(width, 5.2)
    fig.suptitle(wrapped(title, width / 0.12))
    *maps, ax = fig.subplots(1, len(first) + 1)
    for panel, values, name in zip(maps, first, names, strict=False):
        drawn = panel.imshow(values, cmap=colors, norm=norm, interpolation="nearest")
        row, column = divmod(query, values.shape[1])
        panel.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=_QUERY_COLOR, linewidth=2.5))
        panel.set(title=name, xlabel="column of patches", ylabel="row of patches")
        panel.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        panel.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    step = ceil(depth / 12)
    bar = fig.colorbar(drawn, ax=maps, ticks=[-1, 0, *range(step, depth + 1, step)], shrink=0.85)
    bar.ax.set_yticklabels(["never", "query", *(f"{layer}" for layer in range(step, depth + 1, step))])
    bar.ax.set_title("layers", fontsize=10)
    note = "Colour: how many layers it takes until the output at the marked patch can depend on a patch."
    fig.supxlabel(wrapped(note, width / 0.09), fontsize=10)
    for curve, name, color, marker in zip(shares, names, CATEGORY_COLORS, "os", strict=False):
        if name == names[0] or num_prefix_tokens:
            ax.plot(range(1, depth + 1), curve, marker=marker, color=color, label=name, clip_on=False, zorder=3)
    ax.set(title="mean over all queries", xlabel="layers", ylabel="share of the patches", xlim=(0.5, depth + 0.5))
    ax.set_ylim(0, 1.02)
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17))
    return fig
