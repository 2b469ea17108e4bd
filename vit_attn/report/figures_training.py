"""How training went, and what attention came out of it, layer by layer."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from vit_attn.explain.style import house_style, new_figure
from vit_attn.report.compare import Comparison
from vit_attn.report.figures import Styles
from vit_attn.report.figures_common import (
    Drawing,
    GroupStyle,
    add_legend,
    drawn_rows,
    finite,
    legend_height,
    mean_curve,
    seeds_note,
    step_axis,
    tidy,
)
from vit_attn.report.statistics import Estimate
from vit_attn.report.summary import Row, by_layer

# Parts of a training over which the loss of single batches is averaged: few enough that lines can be followed.
LOSS_BINS = 40
_CURVES = {"val/acc": "validation accuracy (%)", "train/loss": "training loss"}
_STATISTICS = {
    "zeros": "exact zeros (% of weights)",
    "entropy": "entropy (nats)",
    "support": "keys per query with weight > 0",
    "distance": "mean distance (patches)",
}
_LEGEND_COLUMNS = 3


@house_style()
def curves_figure(comparison: Comparison, rows: Sequence[Row], styles: Styles) -> Drawing | None:
    """Draw validation accuracy and training loss over the training, mean and range over seeds."""
    rows, note = drawn_rows(comparison, rows)
    panels = [name for name in _CURVES if any(run.curves.get(name) for row in rows for run in row.group.runs)]
    if not panels:
        return None
    fig = new_figure(9.4 if len(panels) > 1 else 6.2, 3.9 + legend_height(rows, _LEGEND_COLUMNS))
    fig.set_layout_engine("constrained")
    for ax, name in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for row in rows:
            _draw_curve(ax, row, name, styles[row.group.label])
        ax.set_ylabel(_CURVES[name])
        step_axis(ax)
        if name == "val/acc":
            ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}")
        tidy(ax)
    add_legend(fig, rows, styles, lines=True, columns=_LEGEND_COLUMNS)
    return Drawing(
        "curves",
        "Learning curves",
        "Lines: means over seeds; bands: lowest to highest seed. The training loss is that of augmented, smoothed or "
        f"mixed batches, averaged over {LOSS_BINS} equal parts of the training, and so no measure beside the "
        f"validation's. {note} {seeds_note([row.group for row in rows])}".replace("  ", " "),
        f"Line plots of {' and '.join(_CURVES[name] for name in panels)} against the optimizer step, for "
        + ", ".join(row.group.label for row in rows)
        + ".",
        fig,
    )


def _draw_curve(ax: Axes, row: Row, name: str, style: GroupStyle) -> None:
    curve = mean_curve(row.group, name, bins=LOSS_BINS if name == "train/loss" else None)
    if curve is None:
        return
    every = max(1, len(curve.steps) // 6)
    ax.plot(
        curve.steps,
        curve.mean,
        color=style.color,
        linestyle=style.line,
        linewidth=1.6,
        marker=style.marker,
        ms=5,
        markevery=every,
    )
    ax.fill_between(curve.steps, curve.low, curve.high, color=style.color, alpha=0.15, linewidth=0)


@house_style()
def layers_figure(comparison: Comparison, rows: Sequence[Row], styles: Styles) -> Drawing | None:
    """Draw four numbers about attention by layer, mean and standard deviation over seeds."""
    rows, note = drawn_rows(comparison, rows)
    found = {name: [(row, layers) for row in rows if (layers := by_layer(row.group, name))] for name in _STATISTICS}
    if not any(found.values()):
        return None
    fig = new_figure(9.4, 6.6 + legend_height(rows, _LEGEND_COLUMNS))
    fig.set_layout_engine("constrained")
    for ax, (name, lines) in zip(fig.subplots(2, 2).flat, found.items(), strict=True):
        for index, (row, layers) in enumerate(lines):
            # A little beside each other: lines that coincide would hide each other's marks.
            shift = 0.16 * (index / max(1, len(lines) - 1) - 0.5)
            _draw_layers(ax, layers, shift, styles[row.group.label])
        ax.set(xlabel="layer", ylabel=_STATISTICS[name])
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
        if name == "zeros":
            ax.set_ylim(-0.04, 1.04)
            ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}")
        tidy(ax)
    add_legend(fig, rows, styles, lines=True, columns=_LEGEND_COLUMNS)
    return Drawing(
        "layers",
        "Attention by layer",
        "Means over seeds; vertical lines: standard deviations. Zeros: weights that are exactly 0, forbidden or not. "
        "Entropy of a query's weights, and how many keys it looks at, over all tokens; distance between query and key "
        f"on the patch grid, weighted by attention. {note} {seeds_note([row.group for row in rows])}".replace(
            "  ", " "
        ),
        "Four line plots by layer: exact zeros, entropy, keys per query and distance. Exact zeros, mean over layers: "
        + "; ".join(f"{row.group.label} {100 * row.estimates['attention/zeros'].mean:.1f} %" for row in rows)
        + ".",
        fig,
    )


def _draw_layers(ax: Axes, layers: Sequence[Estimate], shift: float, style: GroupStyle) -> None:
    ax.errorbar(
        np.arange(len(layers)) + shift,
        [layer.mean for layer in layers],
        yerr=[layer.std if finite(layer.std) else 0 for layer in layers],
        color=style.color,
        linestyle=style.line,
        linewidth=1.4,
        elinewidth=1,
        marker=style.marker,
        ms=6,
        markeredgecolor="white",
        markeredgewidth=0.6,
    )
