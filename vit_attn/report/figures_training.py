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
        f"mixed batches, averaged over at most {LOSS_BINS} equal parts of the training, and so no measure beside the "
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
            _draw_layers(ax, layers, _beside(index, len(lines)), styles[row.group.label])
        ax.set(xlabel="layer", ylabel=_STATISTICS[name])
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        ax.set_ylim(0, 1.08 * max(ax.dataLim.y1, 1e-3))
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


_REACH = {
    "receptive_field_without_relays": "over patches alone",
    "receptive_field": "prefix tokens pass on",
}


@house_style()
def reach_figure(comparison: Comparison, rows: Sequence[Row], styles: Styles) -> Drawing | None:
    """Draw which share of the patches a patch can depend on after each layer, by the pattern alone."""
    rows, note = drawn_rows(comparison, rows)
    reach = {name: [(row, shares) for row in rows if (shares := _reach(row, name))] for name in _REACH}
    # Without prefix tokens the two are the same.
    panels = {
        name: lines
        for name, lines in reach.items()
        if lines and (name == "receptive_field" or lines != reach["receptive_field"])
    }
    # Where every mechanism sees all at once there is nothing to draw.
    if all(min(shares) == 1 for lines in panels.values() for _, shares in lines):
        return None
    fig = new_figure(9.4 if len(panels) > 1 else 6.2, 3.6 + legend_height(rows, _LEGEND_COLUMNS))
    fig.set_layout_engine("constrained")
    for ax, (name, lines) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for index, (row, shares) in enumerate(lines):
            layers = [Estimate(share, 0.0, share, share, 1) for share in shares]
            _draw_layers(ax, layers, 1 + _beside(index, len(lines)), styles[row.group.label])
        ax.set(xlabel="layers passed", ylabel="share of the patches (%)", ylim=(-0.04, 1.06))
        ax.set_title(_REACH[name] if len(panels) > 1 else "")
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}")
        tidy(ax)
    add_legend(fig, rows, styles, lines=True, columns=_LEGEND_COLUMNS)
    return Drawing(
        "reach",
        "Receptive field over depth",
        "Share of the patches that a patch's output can depend on, mean over patches: what the pattern allows, the "
        "residual path included. A class token sees all and is seen by all, so that it passes on from the second layer "
        "what patches alone never see. Sparse normalizers do not change it: which weights they make zero depends on "
        f"the image. {note}".strip(),
        "Line plots of the receptive field by layer. After the last: "
        + "; ".join(f"{row.group.label} {100 * shares[-1]:.0f} %" for row, shares in next(iter(panels.values())))
        + ".",
        fig,
    )


def _reach(row: Row, name: str) -> list[float]:
    """The receptive field by layer: the same in every run of a group."""
    for run in row.group.runs:
        found = (run.results or {}).get("explanations")
        shares = found.get(name) if isinstance(found, dict) else None
        if isinstance(shares, list) and shares and all(isinstance(share, (int, float)) for share in shares):
            return shares
    return []


def _beside(index: int, count: int) -> float:
    """A little beside each other: lines that coincide would hide each other's marks."""
    return 0.16 * (index - (count - 1) / 2) / count


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
