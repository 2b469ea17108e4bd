"""Explanations of the same test images side by side, and how faithful they are."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import shorten

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from vit_attn.explain.explanations import METHOD_TITLES, METHODS, Explanations
from vit_attn.explain.style import WEIGHT_COLORMAP, ZERO_COLOR, house_style, new_figure
from vit_attn.report.compare import Comparison
from vit_attn.report.figures import Styles
from vit_attn.report.figures_common import Drawing, drawn_rows, finite, seeds_note, tidy, wrapped
from vit_attn.report.runs import Run
from vit_attn.report.summary import Row

MAX_IMAGES = 6
# The gradient of attention differs from attention little enough that a third grid of it would only repeat.
DRAWN_METHODS = ("attention", "rollout", "gradcam")
_MAX_BARS = 12
_METHOD_MARKERS = dict(zip((*METHODS, "random"), ("o", "s", "^", "D", "x"), strict=True))
_RIGHT, _WRONG = "#0072b2", "#d55e00"


@dataclass(frozen=True)
class Shared:
    """What mechanisms have explained of the same images.

    Args:
        seed: that most mechanisms have, the lowest of several.
        columns: label and explanations of that seed, the first one's images deciding.
        class_names: of the data; empty where no run tells them.
        other_images, missing: labels of those whose images differ, and of those without readable explanations.
    """

    seed: int
    columns: list[tuple[str, Explanations]]
    class_names: list[str]
    other_images: list[str]
    missing: list[str]


def shared_explanations(rows: Sequence[Row]) -> Shared | None:
    """Load the explanations of one seed; None where no run has any."""
    found = {
        (row.group.label, run.seed): run
        for row in rows
        for run in row.group.runs
        if run.explanations_path is not None and run.seed is not None
    }
    if not found:
        return None
    counts = Counter(seed for _, seed in found)
    names = next((names for run in found.values() if (names := _class_names(run))), [])
    shared = Shared(min(counts, key=lambda seed: (-counts[seed], seed)), [], names, [], [])
    for label in (row.group.label for row in rows):
        run = found.get((label, shared.seed))
        path = None if run is None else run.explanations_path
        try:
            explained = None if path is None else Explanations.load(path)
        except (OSError, ValueError):
            explained = None
        if explained is None:
            shared.missing.append(label)
        elif shared.columns and not np.array_equal(shared.columns[0][1].images, explained.images):
            shared.other_images.append(label)
        else:
            shared.columns.append((label, explained))
    return shared


def _class_names(run: Run) -> list[str]:
    data = (run.results or {}).get("data")
    names = data.get("class_names") if isinstance(data, dict) else None
    return [str(name) for name in names] if isinstance(names, list) else []


def pictures(comparison: Comparison, rows: Sequence[Row]) -> list[Drawing]:
    """Draw one grid per method: rows are test images, columns mechanisms."""
    rows, note = drawn_rows(comparison, rows)
    shared = shared_explanations(rows)
    if shared is None:
        return []
    if shared.other_images:
        note += f" Left out, because other images were explained: {', '.join(shared.other_images)}."
    if shared.missing:
        note += f" Without explanations of seed {shared.seed}: {', '.join(shared.missing)}."
    drawings = []
    for method in DRAWN_METHODS:
        columns = [(label, explained) for label, explained in shared.columns if method in explained.maps]
        if columns:
            drawings.append(_grid(method, shared, columns, note.strip()))
    return drawings


@house_style()
def _grid(method: str, shared: Shared, columns: Sequence[tuple[str, Explanations]], note: str) -> Drawing:
    images, truth = columns[0][1].images, columns[0][1].labels
    count = min(MAX_IMAGES, len(images))
    # Spread evenly: data sets are often in the order of their classes.
    chosen = [index * len(images) // count for index in range(count)]
    title = METHOD_TITLES[method]
    names = [wrapped(label, 16, lines=4) for label, _ in columns]
    cell = 1.25  # inches
    height = (cell + 0.28) * count + 0.2 * max(name.count("\n") + 1 for name in names) + 0.7
    fig = new_figure(max(cell * (len(columns) + 1) + 1.2, 4.2), height)
    fig.set_layout_engine("constrained")
    grid = fig.subplots(count, len(columns) + 1, squeeze=False)
    for index, axes in zip(chosen, grid, strict=True):
        picture = images[index]
        extent = (0, picture.shape[1], picture.shape[0], 0)
        axes[0].imshow(np.broadcast_to(picture, (*picture.shape[:2], 3)), extent=extent)
        axes[0].set_xlabel(_name(shared, truth[index]), fontsize=10)
        for ax, (_, explained) in zip(axes[1:], columns, strict=True):
            _draw_map(ax, explained.maps[method][index], extent)
            right = explained.predictions[index] == truth[index]
            predicted = f"{_name(shared, explained.predictions[index])} ({100 * explained.confidences[index]:.0f} %)"
            ax.set_xlabel(f"{'✓' if right else '✗'} {predicted}", fontsize=10, color=_RIGHT if right else _WRONG)
    for ax in grid.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for ax, name in zip(grid[0], ["test image", *names], strict=True):
        ax.set_title(name, fontsize=9)
    fig.suptitle(f"{title} · seed {shared.seed}", fontsize=12)
    right = "; ".join(
        f"{label} {int((explained.predictions[chosen] == truth[chosen]).sum())} of {count} right"
        for label, explained in columns
    )
    return Drawing(
        f"pictures_{method}",
        f"The same test images: {title}",
        f"{count} of the {len(images)} test images that were explained, spread evenly, not picked; seed "
        f"{shared.seed} only, other seeds look different. Every map has its own linear scale from 0 (dark) to its "
        "largest value (yellow), so shapes can be compared, not heights; grey is exactly 0. Below a map: ✓ or ✗, the "
        f"predicted class and its probability. {note}".strip(),
        f"Grid of {count} test images by {len(columns)} mechanisms with {title} maps. Predictions: {right}.",
        fig,
    )


def _name(shared: Shared, index: int) -> str:
    """A class as a reader knows it, cut short where it would not fit below a picture."""
    return shorten(shared.class_names[index], 14, placeholder="…") if shared.class_names else f"class {index}"


def _draw_map(ax: Axes, values: NDArray, extent: tuple[int, int, int, int]) -> None:
    values = values.astype(float)
    ax.set_facecolor(ZERO_COLOR)  # seen through the entries that are masked
    upper = values.max() if values.max() > 0 else 1.0
    ax.imshow(
        np.ma.masked_less_equal(values, 0),
        cmap=WEIGHT_COLORMAP,
        vmin=0,
        vmax=upper,
        extent=extent,
        interpolation="nearest",
    )
    ax.set(xlim=extent[:2], ylim=extent[2:])


@house_style()
def faithfulness_figure(comparison: Comparison, rows: Sequence[Row], styles: Styles) -> Drawing | None:
    """Draw the deletion and insertion AUC of every mechanism and method, beside a random order of the patches."""
    rows, note = drawn_rows(comparison, rows, _MAX_BARS)
    methods = [
        method
        for method in (*METHODS, "random")
        if any(finite(row.estimates[f"{test}_auc/{method}"].mean) for row in rows for test in ("deletion", "insertion"))
    ]
    rows = [row for row in rows if any(finite(row.estimates[f"deletion_auc/{method}"].mean) for method in methods)]
    if not rows:
        return None
    fig = new_figure(9.4, (0.14 * len(methods) + 0.25) * len(rows) + 1.7)
    fig.set_layout_engine("constrained")
    axes = fig.subplots(1, 2, sharey=True)
    for ax, test, hint in zip(axes, ("deletion", "insertion"), ("lower", "higher"), strict=True):
        for y, row in enumerate(rows):
            _draw_methods(ax, y, row, test, methods, styles[row.group.label].color)
        ax.set_xlabel(f"{test} AUC ({hint} is more faithful)")
        tidy(ax, grid="x")
        ax.xaxis.set_major_locator(MaxNLocator(5))
        for y in range(1, len(rows)):
            ax.axhline(y - 0.5, color="#eeeeee", linewidth=0.8)
    axes[0].set_yticks(range(len(rows)), [wrapped(row.group.label, 24) for row in rows])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    handles = [
        Line2D([], [], color="#555555", marker=_METHOD_MARKERS[method], linestyle="None", label=_method_title(method))
        for method in methods
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=10)
    return Drawing(
        "faithfulness",
        "How faithful the explanations are",
        "Patches are removed (deletion) or shown (insertion) in the order of the map, the most important first; the "
        "number is the mean probability of the class that the model predicted, over the steps and the explained "
        "images. A map that says what the model looks at beats the random order (grey crosses) of the same "
        "mechanism; between mechanisms, confidence alone shifts both. Marks: means over seeds; lines: standard "
        f"deviations. {note} {seeds_note([row.group for row in rows])}".replace("  ", " "),
        "Dot plots of deletion and insertion AUC for "
        + ", ".join(row.group.label for row in rows)
        + f"; methods: {', '.join(map(_method_title, methods))}.",
        fig,
    )


def _method_title(method: str) -> str:
    return "random order" if method == "random" else METHOD_TITLES[method]


def _draw_methods(ax: Axes, y: int, row: Row, test: str, methods: Sequence[str], color: str) -> None:
    for method, offset in zip(methods, np.linspace(-0.3, 0.3, len(methods)), strict=True):
        estimate = row.estimates[f"{test}_auc/{method}"]
        if not finite(estimate.mean):
            continue
        ax.errorbar(
            estimate.mean,
            y + offset,
            xerr=estimate.std if finite(estimate.std) else 0,
            marker=_METHOD_MARKERS[method],
            ms=6,
            elinewidth=1,
            color="#777777" if method == "random" else color,
        )
