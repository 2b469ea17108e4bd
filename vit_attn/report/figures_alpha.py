"""What α does, where the mechanisms of a comparison are of the entmax family: softmax is α = 1, sparsemax α = 2."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.lines import Line2D

from vit_attn.attention import Masked, parse_spec
from vit_attn.attention.normalizers.entmax import Entmax, alpha_of
from vit_attn.explain.style import house_style, new_figure
from vit_attn.report.compare import Comparison, Group
from vit_attn.report.figures import Styles
from vit_attn.report.figures_common import Drawing, finite, score_key, seeds_note, split_of, step_axis, tidy, wrapped
from vit_attn.report.summary import Row

MIN_MEMBERS = 3  # fewer points of α make no line
_ANNEALING = "callbacks.alpha_annealing."  # how α moves, where it is annealed
_ALPHA_CURVE = re.compile(r"attention/alpha/layer_(\d+)/head_(\d+)")
_MAX_PANELS = 6
_COLUMNS = 3

Kind = Literal["fixed", "annealed", "learned"]


@dataclass(frozen=True)
class Member:
    """A mechanism of the entmax family.

    Args:
        alpha: the one it ends with; where it is learned, the mean over runs, layers and heads.
        low, high: the smallest and the largest of those.
    """

    row: Row
    kind: Kind
    alpha: float
    low: float
    high: float


def entmax_family(rows: Sequence[Row]) -> list[Member]:
    """Find the largest set of mechanisms that differ in α alone, by α; empty where it is too small for a study."""
    keyed = [(where, row) for row in rows if (where := _pattern(row.group)) is not None]
    if not keyed:
        return []
    chosen = Counter(where for where, _ in keyed).most_common(1)[0][0]
    members = [member for where, row in keyed if where == chosen and (member := _member(row)) is not None]
    return sorted(members, key=lambda member: member.alpha) if len(members) >= MIN_MEMBERS else []


def _pattern(group: Group) -> tuple[str, ...] | None:
    """Name the pattern with its options; None where the group is no member of a comparison of α alone."""
    if any(not key.startswith(_ANNEALING) for key in group.differences):
        return None
    mechanism = _mechanism(group)
    if mechanism is None or alpha_of(mechanism.normalizer) is None:
        return None
    own = mechanism.pattern.options()
    return mechanism.pattern.name, *(f"{key}={value}" for key, value in group.options.items() if key in own)


def _mechanism(group: Group) -> Masked | None:
    """The mechanism of all layers, where it has a normalizer and a pattern."""
    try:
        mechanism = parse_spec(group.attention, group.options)
    except ValueError:  # one spec per layer, or of another version of this project
        return None
    return mechanism if isinstance(mechanism, Masked) else None


def _member(row: Row) -> Member | None:
    mechanism = _mechanism(row.group)
    assert mechanism is not None
    normalizer, alpha = mechanism.normalizer, alpha_of(mechanism.normalizer)
    assert alpha is not None
    if not isinstance(normalizer, Entmax):
        return Member(row, "fixed", alpha, alpha, alpha)
    if normalizer.learnable_alpha:
        finals = [
            points[-1][1]
            for run in row.group.runs
            for name, points in run.curves.items()
            if _ALPHA_CURVE.fullmatch(name) and points
        ]
        return Member(row, "learned", float(np.mean(finals)), min(finals), max(finals)) if finals else None
    kind: Kind = "annealed" if normalizer.anneal_alpha_from is not None else "fixed"
    return Member(row, kind, alpha, alpha, alpha)


@house_style()
def alpha_figure(comparison: Comparison, rows: Sequence[Row], styles: Styles) -> Drawing | None:
    """Draw α against zeros, accuracy and deletion AUC over the entmax family."""
    members = entmax_family(rows)
    if not members:
        return None
    key = score_key(rows)
    panels = {
        "attention/zeros": "exact zeros (% of weights)",
        key: f"{split_of(key)} accuracy (%)",
        "deletion_auc/attention": "deletion AUC, attention map",
    }
    panels = {name: axis for name, axis in panels.items() if any(finite(m.row.estimates[name].mean) for m in members)}
    if not panels:
        return None
    fig = new_figure(max(3.5 * len(panels), 5.0), 4.0)
    fig.set_layout_engine("constrained")
    for ax, (name, axis) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _draw_study(ax, members, name, styles)
        ax.set(xlabel="α", ylabel=axis, xlim=(0.95, 2.05))
        if name != "deletion_auc/attention":
            ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}")
        tidy(ax)
    kinds = [kind for kind in ("fixed", "annealed", "learned") if any(member.kind == kind for member in members)]
    fig.legend(
        handles=[Line2D([], [], linestyle="None", label=f"α {kind}", **_marker(kind, "#555555")) for kind in kinds],
        loc="outside lower center",
        ncols=len(kinds),
        fontsize=10,
    )
    mechanism = _mechanism(members[0].row.group)
    assert mechanism is not None
    return Drawing(
        "alpha",
        "What α does",
        f"The mechanisms over the pattern {mechanism.pattern.name!r} that differ in α alone: softmax is α = 1, "
        "entmax15 is 1.5, sparsemax is 2. Means over seeds; vertical lines: standard deviations. Learned α is drawn at "
        "its mean over layers, heads and seeds at the end of training, the horizontal line from the smallest to the "
        "largest; annealed α at its end. "
        "The grey line joins the fixed ones. " + seeds_note([member.row.group for member in members]),
        "Plots of α against "
        + ", ".join(panels.values())
        + ": "
        + "; ".join(f"{member.row.group.label} at {member.alpha:.2f}" for member in members)
        + ".",
        fig,
    )


def _marker(kind: str, color: str) -> dict[str, Any]:
    """Full circles for fixed, open squares for annealed, open diamonds for learned."""
    marks = {"fixed": "o", "annealed": "s", "learned": "D"}
    return {"marker": marks[kind], "ms": 8, "mec": color, "mfc": color if kind == "fixed" else "white", "mew": 1.6}


def _draw_study(ax: Axes, members: Sequence[Member], name: str, styles: Styles) -> None:
    shown = [member for member in members if finite(member.row.estimates[name].mean)]
    fixed = [member for member in shown if member.kind == "fixed"]
    ax.plot([m.alpha for m in fixed], [m.row.estimates[name].mean for m in fixed], color="#bbbbbb", linewidth=1.2)
    for member in shown:
        estimate, color = member.row.estimates[name], styles[member.row.group.label].color
        std = estimate.std if finite(estimate.std) else 0
        ax.plot([member.low, member.high], [estimate.mean] * 2, color=color, linewidth=1, alpha=0.6)
        ax.errorbar(member.alpha, estimate.mean, yerr=std, ecolor=color, elinewidth=1, **_marker(member.kind, color))


@house_style()
def alpha_training_figure(comparison: Comparison, rows: Sequence[Row], styles: Styles) -> Drawing | None:
    """Draw α of every head over the training, for the mechanisms whose α moves."""
    moving = [row.group for row in rows if _alpha_curves(row.group)]
    if not moving:
        return None
    shown = moving[:_MAX_PANELS]
    columns = min(_COLUMNS, len(shown))
    lines = ceil(len(shown) / columns)
    depth = 1 + max(layer for group in shown for layer, _ in _alpha_curves(group))
    colors = colormaps["viridis"].resampled(depth)
    norm = BoundaryNorm(np.arange(depth + 1) - 0.5, depth)
    fig = new_figure(max(3.6 * columns + 1.0, 6.0), 3.2 * lines + 0.4)
    fig.set_layout_engine("constrained")
    grid = fig.subplots(lines, columns, squeeze=False, sharey=True)
    for ax, group in zip(grid.flat, shown, strict=False):
        for (layer, head), points in _alpha_curves(group).items():
            steps, values = zip(*points, strict=True)
            ax.plot(steps, values, color=colors(norm(layer)), linestyle=("-", "--", ":", "-.")[head % 4], linewidth=1.3)
        ax.set_title(wrapped(group.label, 28, lines=2), fontsize=10)
        step_axis(ax)
        tidy(ax)
    for ax in grid[:, 0]:
        ax.set_ylabel("α")
    for ax in grid.flat[len(shown) :]:
        ax.set_visible(False)
    fig.colorbar(ScalarMappable(norm, colors), ax=grid, label="layer", ticks=range(0, depth, ceil(depth / 12)))
    left_out = f" Drawn are {len(shown)} of {len(moving)} mechanisms." if len(shown) < len(moving) else ""
    return Drawing(
        "alpha_training",
        "α over the training",
        "One line per head, coloured by layer; the first seed only, since heads of different seeds do not correspond. "
        "α near 1 is dense, 2 is sparsemax. Learned and annealed α alike." + left_out,
        f"Line plots of α per head over the training, for {', '.join(group.label for group in shown)}.",
        fig,
    )


def _alpha_curves(group: Group) -> dict[tuple[int, int], list[tuple[int, float]]]:
    """(layer, head) → α over the steps, of the group's first run."""
    return {
        (int(match[1]), int(match[2])): points
        for name, points in sorted(group.runs[0].curves.items())
        if (match := _ALPHA_CURVE.fullmatch(name)) and points
    }
