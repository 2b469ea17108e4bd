"""Time against N on logarithmic axes, one panel per :class:`Plot`, all panels with the same lines and scales."""

from collections.abc import Sequence
from itertools import cycle
from math import ceil
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from vit_attn.bench.output import Line, Plot
from vit_attn.explain.style import CATEGORY_COLORS, CATEGORY_MARKERS, REFERENCE_COLOR, house_style, new_figure

_MAX_COLUMNS = 3

Style = tuple[str, str]  # colour, marker


@house_style()
def times_figure(plots: Sequence[Plot], *, title: str) -> Figure:
    """Draw the plots, at most three beside each other, over one legend.

    Lines of one ``group`` share a colour, and every line has its own marker, in all panels alike.

    Args:
        plots: at least one.
        title: what was measured, and on what.
    """
    styles = _styles([line for plot in plots for line in plot.lines])
    columns = min(_MAX_COLUMNS, len(plots))
    rows = ceil(len(plots) / columns)
    legend_rows = ceil(len(styles) / _legend_columns(columns))
    fig = new_figure(max(7.0, 4.6 * columns), 3.7 * rows + 0.26 * legend_rows + 0.9)
    fig.set_layout_engine("constrained")
    grid = fig.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for ax, plot in zip(grid.flat, plots, strict=False):
        _draw(ax, plot, styles)
    for ax in grid.flat[len(plots) :]:
        ax.set_axis_off()
    _label_axes(grid.tolist(), plots)
    fig.suptitle(title)
    handles = [_handle(name, style) for name, style in styles.items()]
    fig.legend(handles=handles, loc="outside lower center", ncols=_legend_columns(columns), fontsize=10)
    return fig


def save_plot(fig: Figure, path: Path) -> None:
    """Write the figure in the format that the path's ending names.

    Raises:
        OSError: the file cannot be written.
    """
    with house_style():
        fig.savefig(path, format=path.suffix.removeprefix(".").lower(), dpi="figure")


def _legend_columns(columns: int) -> int:
    return 2 if columns == 1 else 2 * columns - 1


def _styles(lines: Sequence[Line]) -> dict[str, Style]:
    """Colour and marker of every line, by its name, in order of appearance; what is computed comes last."""
    colors, markers = cycle(CATEGORY_COLORS), cycle(CATEGORY_MARKERS)
    groups: dict[str, str] = {}
    styles: dict[str, Style] = {}
    for line in sorted(lines, key=lambda line: line.computed):
        if line.name in styles:
            continue
        if line.computed:
            styles[line.name] = (REFERENCE_COLOR, "")
            continue
        if line.group not in groups:
            groups[line.group] = next(colors)
        styles[line.name] = (groups[line.group], next(markers))
    return styles


def _handle(name: str, style: Style) -> Line2D:
    color, marker = style
    return Line2D([], [], color=color, marker=marker or "None", linestyle="-" if marker else "--", label=name)


def _draw(ax: Axes, plot: Plot, styles: dict[str, Style]) -> None:
    for line in plot.lines:
        color, marker = styles[line.name]
        milliseconds = [1e3 * spread.median for spread in line.seconds]
        if line.computed:
            ax.plot(line.sizes, milliseconds, color=color, linestyle="--", linewidth=1.4)
            continue
        ax.plot(line.sizes, milliseconds, color=color, marker=marker, markersize=6, linewidth=1.6)
        low = [1e3 * spread.low for spread in line.seconds]
        high = [1e3 * spread.high for spread in line.seconds]
        ax.fill_between(line.sizes, low, high, color=color, alpha=0.2, linewidth=0)
    ax.set_title(plot.title)
    ax.grid(color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)


def _label_axes(grid: Sequence[Sequence[Axes]], plots: Sequence[Plot]) -> None:
    """Put the measured N, and plain milliseconds, on the shared logarithmic axes."""
    sizes = sorted({size for plot in plots for line in plot.lines for size in line.sizes})
    first = grid[0][0]
    first.set_xscale("log")
    first.set_yscale("log")
    first.xaxis.set_ticks(sizes)
    first.xaxis.set_minor_locator(NullLocator())
    first.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    first.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    for row in grid:
        row[0].set_ylabel("time (ms)")
    for column in range(len(grid[0])):
        lowest = [row[column] for index, row in enumerate(grid) if index * len(row) + column < len(plots)][-1]
        lowest.set_xlabel("tokens N")
        lowest.tick_params(labelbottom=True)
