"""Scores and costs of the mechanisms as pictures: dots for seeds, marks for means, no bar that hides the spread."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from scipy.stats import spearmanr

from vit_attn.explain.style import house_style, new_figure
from vit_attn.report.compare import Comparison
from vit_attn.report.figures_common import (
    NOTE_COLOR,
    Drawing,
    GroupStyle,
    add_legend,
    finite,
    legend_height,
    score_key,
    seeds_note,
    split_of,
    tidy,
    wrapped,
)
from vit_attn.report.statistics import pareto
from vit_attn.report.summary import Row, value

Styles = dict[str, GroupStyle]
# Fewer mechanisms than this, and a rank correlation over them says nothing.
MIN_RANKED = 5
# Whole numbers would hide how spread a share of a percent is; a flat axis would make noise look large.
_MIN_RANGE = 0.02


@house_style()
def accuracy_figure(comparison: Comparison, rows: Sequence[Row], styles: Styles) -> Drawing | None:
    """Draw every seed's accuracy, and the mean with its 95 % interval, one line per mechanism."""
    key = score_key(rows)
    rows = [row for row in rows if finite(row.estimates[key].mean)]
    if not rows:
        return None
    labels = [wrapped(row.group.label) for row in rows]
    height = sum(0.38 + 0.19 * (1 + label.count("\n")) for label in labels)
    fig = new_figure(8, height + 1.0)
    ax = fig.add_subplot()
    scores = [[value(run, key) for run in row.group.runs] for row in rows]
    low, high = _accuracy_limits([score for group in scores for score in group if finite(score)])
    for y, (row, seeds) in enumerate(zip(rows, scores, strict=True)):
        style, mean = styles[row.group.label], row.estimates[key]
        ax.plot(seeds, [y + 0.24] * len(seeds), linestyle="", marker="o", ms=5, mfc="none", mec=style.color, mew=1)
        if finite(mean.low, mean.high):
            _interval(ax, y, mean.low, mean.high, (low, high), style.color)
        ax.plot(mean.mean, y, marker=style.marker, ms=10, color=style.color, markeredgecolor="white", zorder=4)
    at_baseline = [row.estimates[key].mean for row in rows if row.group.label == comparison.baseline]
    if at_baseline:
        ax.axvline(at_baseline[0], color=NOTE_COLOR, linestyle=":", linewidth=1)
    ax.set_yticks(range(len(rows)), labels)
    ax.set(ylim=(len(rows) - 0.5, -0.5), xlim=(low, high), xlabel=f"{split_of(key)} accuracy (%)")
    ax.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g}")
    tidy(ax, grid="x")
    best = max(rows, key=lambda row: row.estimates[key].mean)
    numbers = "; ".join(f"{row.group.label} {100 * row.estimates[key].mean:.2f} %" for row in rows)
    return Drawing(
        "accuracy",
        f"{split_of(key).capitalize()} accuracy by mechanism",
        "Small circles: one run each. Large mark: their mean; line: its 95 % interval (Student's t, over seeds), with "
        "an arrow where it leaves the picture. Dotted: the baseline's mean. The axis does not begin at 0. "
        + seeds_note([row.group for row in rows]),
        f"Dot plot of {split_of(key)} accuracy. Highest mean: {best.group.label}. Means: {numbers}.",
        fig,
    )


def _accuracy_limits(scores: Sequence[float]) -> tuple[float, float]:
    """Frame the runs' scores with room for intervals: one of two seeds may be many times as wide as its runs."""
    room = max(0.6 * (max(scores) - min(scores)), _MIN_RANGE / 2)
    return max(min(scores) - room, -0.005), min(max(scores) + room, 1.005)


def _interval(ax: Axes, y: float, low: float, high: float, limits: tuple[float, float], color: str) -> None:
    """Draw a horizontal interval; an end outside the limits becomes an arrow at the edge."""
    ends = np.clip([low, high], *limits)
    ax.plot(ends, [y, y], color=color, linewidth=2.2, solid_capstyle="butt", zorder=3)
    for end, exact, mark in ((ends[0], low, "<"), (ends[1], high, ">")):
        outside = end != exact
        ax.plot(end, y, marker=mark if outside else "|", ms=9, mew=2, color=color, clip_on=False, zorder=3)


@dataclass(frozen=True)
class _Cost:
    key: str
    axis: str
    scale: float


_COSTS = (
    _Cost("cost/flops", "GFLOPs per image, as computed", 1e-9),
    _Cost("speed/step_seconds", "time per training step (ms)", 1e3),
)


@house_style()
def cost_figure(comparison: Comparison, rows: Sequence[Row], styles: Styles) -> Drawing | None:
    """Draw accuracy against each cost that was measured, with the Pareto front."""
    key = score_key(rows)
    costs = [cost for cost in _COSTS if len(_both(rows, cost.key, key)) > 1]
    if not costs:
        return None
    columns = 2 if len(costs) == 1 else 3
    fig = new_figure(4.7 * len(costs) if len(costs) > 1 else 6.2, 4.0 + legend_height(rows, columns))
    fig.set_layout_engine("constrained")
    sentences = []
    for index, (ax, cost) in enumerate(zip(fig.subplots(1, len(costs), squeeze=False)[0], costs, strict=True)):
        front = _draw_cost(ax, _both(rows, cost.key, key), cost, key, styles)
        if index == 0:
            ax.set_ylabel(f"{split_of(key)} accuracy (%)")
        sentences.append(f"On the front by {cost.axis}: {', '.join(front)}.")
    add_legend(fig, rows, styles, lines=False, columns=columns)
    return Drawing(
        "cost",
        "Accuracy against cost",
        "Means over seeds; lines: standard deviations. Ringed and joined by the grey line: the Pareto front, where no "
        "other mechanism costs as little and scores as well. It goes by the means alone: points whose "
        "lines overlap may change places with other seeds. The axes do not begin at 0. "
        + seeds_note([row.group for row in rows]),
        "Scatter plots of accuracy against cost. " + " ".join(sentences),
        fig,
    )


def _both(rows: Sequence[Row], x: str, y: str) -> list[Row]:
    """Keep the rows that have both numbers."""
    return [row for row in rows if finite(row.estimates[x].mean, row.estimates[y].mean)]


def _error(row: Row, key: str) -> float:
    std = row.estimates[key].std
    return std if finite(std) else 0.0


def _point(ax: Axes, row: Row, x: str, y: str, style: GroupStyle, *, scale: float = 1.0) -> None:
    """Draw a mechanism at its means, with the standard deviations both ways."""
    ax.errorbar(
        row.estimates[x].mean * scale,
        row.estimates[y].mean,
        xerr=_error(row, x) * scale,
        yerr=_error(row, y),
        color=style.color,
        marker=style.marker,
        markersize=8,
        elinewidth=1,
        markeredgecolor="white",
    )


def _draw_cost(ax: Axes, rows: Sequence[Row], cost: _Cost, key: str, styles: Styles) -> list[str]:
    """Draw one panel and return the labels on the front, cheapest first."""
    costs = [row.estimates[cost.key].mean for row in rows]
    scores = [row.estimates[key].mean for row in rows]
    front = sorted(
        (x * cost.scale, y, row.group.label)
        for x, y, row, on in zip(costs, scores, rows, pareto(costs, scores), strict=True)
        if on
    )
    ax.plot([x for x, _, _ in front], [y for _, y, _ in front], color="#cccccc", linewidth=4, zorder=1)
    for x, y, _ in front:
        ax.plot(x, y, marker="o", ms=17, mfc="none", mec="#999999", mew=1.2)
    for row in rows:
        _point(ax, row, cost.key, key, styles[row.group.label], scale=cost.scale)
    ax.set_xlabel(cost.axis)
    if max(costs) > 8 * min(costs) > 0:
        ax.set_xscale("log")
    else:
        span = max(max(costs) - min(costs), 0.2 * max(costs))
        ax.set_xlim(max(0, min(costs) - 0.3 * span) * cost.scale, (max(costs) + 0.3 * span) * cost.scale)
    ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}")
    tidy(ax)
    return [label for _, _, label in front]


@house_style()
def gain_figure(comparison: Comparison, rows: Sequence[Row], styles: Styles) -> Drawing | None:
    """Draw what exact zeros go with: accuracy, and how faithful the attention map is (deletion)."""
    key = score_key(rows)
    panels = {key: f"{split_of(key)} accuracy (%)", "deletion_auc/attention": "deletion AUC of the attention map"}
    panels = {name: axis for name, axis in panels.items() if len(_both(rows, "attention/zeros", name)) > 1}
    if not panels:
        return None
    columns = 2 if len(panels) == 1 else 3
    fig = new_figure(4.7 * len(panels) if len(panels) > 1 else 6.2, 3.9 + legend_height(rows, columns))
    fig.set_layout_engine("constrained")
    for ax, (name, axis) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for row in _both(rows, "attention/zeros", name):
            _point(ax, row, "attention/zeros", name, styles[row.group.label])
        ax.set(xlabel="exact zeros (% of weights, mean over layers)", ylabel=axis, xlim=(-0.04, 1.04))
        ax.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g}")
        if name == key:
            ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}")
        tidy(ax)
    add_legend(fig, rows, styles, lines=False, columns=columns)
    sentence = gain_sentence(rows)
    return Drawing(
        "zeros",
        "Do sparse mechanisms gain?",
        f"{sentence} Means over seeds; lines: standard deviations. Deletion AUC: lower is a more faithful map. "
        + seeds_note([row.group for row in rows]),
        f"Scatter plots of the share of exact zeros against {' and '.join(panels.values())}. {sentence}",
        fig,
    )


def gain_sentence(rows: Sequence[Row]) -> str:
    """Say how the share of zeros and the scores go together over the mechanisms, or that they are too few."""
    parts = []
    key = score_key(rows)
    for name, title in ((key, f"{split_of(key)} accuracy"), ("deletion_auc/attention", "deletion AUC")):
        both = _both(rows, "attention/zeros", name)
        if len(both) >= MIN_RANKED:
            x, y = ([row.estimates[of].mean for row in both] for of in ("attention/zeros", name))
            # Equal numbers have no ranks, and scipy warns of them.
            rho = spearmanr(x, y).statistic if len(set(x)) > 1 and len(set(y)) > 1 else math.nan
            if finite(rho):
                parts.append(f"{rho:+.2f} with {title} (over {len(both)} mechanisms)")
    if not parts:
        return f"Fewer than {MIN_RANKED} mechanisms to rank: too few for a correlation."
    return (
        f"Spearman's rank correlation of exact zeros is {' and '.join(parts)}; mechanisms differ in more than zeros, "
        "so this is no effect of zeros alone."
    )
