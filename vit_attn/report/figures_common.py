"""What the figures of the report share: one look per mechanism, which mechanisms are drawn, means over seeds."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from vit_attn.explain.style import CATEGORY_COLORS, CATEGORY_MARKERS, REFERENCE_COLOR, house_style
from vit_attn.report.compare import Comparison, Group
from vit_attn.report.summary import Row

MAX_LINES = 8  # lines that can be told apart in one panel
# Where a label may go on in the next line, besides spaces: not inside "1.5".
BREAKS = r"(?<=[+_=])|(?<=\.)(?=\D)"
GRID_COLOR = "#dddddd"
NOTE_COLOR = "#555555"
Line = Literal["-", "--", ":", "-.", "None"]
_LINES: tuple[Line, ...] = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class GroupStyle:
    """How one mechanism looks in every figure."""

    color: str
    marker: str
    line: Line


@dataclass(frozen=True)
class Drawing:
    """A figure of the report.

    Args:
        name: the file's stem.
        title: the heading above it.
        caption: what is drawn, in which units, over what; goes below it.
        alt: for those who do not see it: what kind of picture, and its main numbers.
    """

    name: str
    title: str
    caption: str
    alt: str
    figure: Figure = field(repr=False)


def group_styles(comparison: Comparison) -> dict[str, GroupStyle]:
    """Label → look: black circles for the baseline, then a colour, a marker and a line for each other mechanism."""
    others = [group.label for group in comparison.groups if group.label != comparison.baseline]
    markers = CATEGORY_MARKERS[1:]
    return {comparison.baseline: GroupStyle(REFERENCE_COLOR, CATEGORY_MARKERS[0], _LINES[0])} | {
        label: GroupStyle(
            color=CATEGORY_COLORS[index % len(CATEGORY_COLORS)],
            marker=markers[index % len(markers)],
            line=_LINES[index // len(CATEGORY_COLORS) % len(_LINES)],
        )
        for index, label in enumerate(others)
    }


def score_key(rows: Sequence[Row]) -> str:
    """The accuracy that the report speaks of: the test split's, or validation's where no run was scored on test."""
    scored = any(math.isfinite(row.estimates["test/acc"].mean) for row in rows)
    return "test/acc" if scored else "val/acc"


def split_of(key: str) -> str:
    """The split that a score's key names, for people."""
    return {"test": "test", "val": "validation"}[key.split("/")[0]]


def drawn_rows(comparison: Comparison, rows: Sequence[Row], limit: int = MAX_LINES) -> tuple[list[Row], str]:
    """Choose what fits into one panel: the baseline and the best mean accuracies.

    Returns:
        The rows, in the order of the report, and a sentence about what was left out; empty where nothing was.
    """
    if len(rows) <= limit:
        return list(rows), ""
    key = score_key(rows)

    def rank(row: Row) -> tuple[bool, float]:
        mean = row.estimates[key].mean
        return row.group.label != comparison.baseline, -mean if math.isfinite(mean) else math.inf

    kept = {row.group.label for row in sorted(rows, key=rank)[:limit]}
    note = f"Drawn are {limit} of {len(rows)} mechanisms: the baseline and those with the best mean accuracy."
    return [row for row in rows if row.group.label in kept], note


def seeds_note(groups: Sequence[Group]) -> str:
    """Say over how many runs a figure's means are: "n = 3 seeds per mechanism"."""
    counts = sorted({len(group.runs) for group in groups})
    if counts == [1]:
        return "n = 1 seed per mechanism: there is no spread to show."
    number = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"n = {number} seeds per mechanism."


def wrapped(text: str, characters: int = 30, lines: int = 3) -> str:
    """Break a label into lines of so many characters, where its parts meet if it can.

    What does not fit ends in an ellipsis.
    """
    broken = [""]
    for piece in re.split(rf"(?<=\s)|{BREAKS}", text):
        if broken[-1] and len(broken[-1] + piece.rstrip()) > characters:
            broken.append("")
        broken[-1] += piece
        while len(broken[-1].rstrip()) > characters:
            broken[-1:] = [broken[-1][:characters], broken[-1][characters:]]
    kept = [line.strip() for line in broken[:lines]]
    if len(broken) > lines:
        kept[-1] = kept[-1][: characters - 1] + "…"
    return "\n".join(kept)


@dataclass(frozen=True)
class Curve:
    """A metric over training: mean, lowest and highest over the runs, at steps that all of them logged; each (n,)."""

    steps: NDArray
    mean: NDArray
    low: NDArray
    high: NDArray


def mean_curve(group: Group, metric: str, bins: int | None = None) -> Curve | None:
    """Average one metric over a group's runs.

    Args:
        group: runs that did not log the metric are left out.
        metric: a column of logs/metrics.csv.
        bins: average each run over so many equal parts of the training first, if it has more values.

    Returns:
        None where no step was logged by every run.
    """
    logged = [dict(run.curves[metric]) for run in group.runs if run.curves.get(metric)]
    if not logged:
        return None
    steps = np.array(sorted(set(logged[0]).intersection(*logged[1:])))
    if not steps.size:
        return None
    values = np.array([[run[step] for step in steps] for run in logged], dtype=float)  # (runs, steps)
    if bins is not None and len(steps) > bins:
        parts = np.array_split(np.arange(len(steps)), bins)
        values = np.stack([values[:, part].mean(axis=1) for part in parts], axis=1)
        steps = np.array([steps[part].mean() for part in parts])
    return Curve(steps, values.mean(axis=0), values.min(axis=0), values.max(axis=0))


@house_style()
def add_legend(fig: Figure, rows: Sequence[Row], styles: dict[str, GroupStyle], *, lines: bool, columns: int) -> None:
    """Put the mechanisms' names below all panels.

    Args:
        lines: the figure has lines; otherwise only markers.
        columns: names beside each other.
    """
    handles = []
    for row in rows:
        style = styles[row.group.label]
        text = wrapped(row.group.label, 44 if columns < 3 else 30)
        line: Line = style.line if lines else "None"
        handles.append(Line2D([], [], color=style.color, marker=style.marker, linestyle=line, label=text))
    fig.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(handles)), fontsize=10)


def legend_height(rows: Sequence[Row], columns: int) -> float:
    """Inches that the legend takes."""
    labels = [wrapped(row.group.label, 44 if columns < 3 else 30).count("\n") + 1 for row in rows]
    return 0.2 * sum(max(labels[k : k + columns]) for k in range(0, len(labels), columns)) + 0.15


def tidy(ax: Axes, *, grid: str = "both") -> None:
    """Give a panel its light grid, below the data, and few ticks."""
    ax.grid(axis=grid, color=GRID_COLOR, linewidth=0.6)  # type: ignore[arg-type]
    ax.set_axisbelow(True)


def step_axis(ax: Axes) -> None:
    """Label the axis of a training's progress."""
    ax.set_xlabel("optimizer step")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def listed(names: Sequence[str]) -> str:
    """Join for a sentence: "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def finite(*values: float) -> bool:
    """Whether all are numbers."""
    return all(math.isfinite(value) for value in values)
