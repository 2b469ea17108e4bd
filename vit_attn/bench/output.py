"""What a benchmark found, as one plain model, and the ways to show it: terminal, JSON, Markdown.

    table = Table("attention", (Column("N"), Column("time", "ms")))
    table.add({"N": 64, "time": milliseconds(timing)}, timings=[timing])

A suite returns tables; :mod:`vit_attn.bench.plot` draws the :class:`Plot` that a table may carry.
"""

import datetime
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import rich.table
import torch
from rich.console import Console
from rich.markup import escape
from tqdm import tqdm

from vit_attn.bench.timing import Failed, Timing, ratio
from vit_attn.console import shows_progress_bar
from vit_attn.cost import environment


@dataclass(frozen=True)
class Spread:
    """A number over the rounds: median and quartiles, shown as "median (low–high)"."""

    median: float
    low: float
    high: float


# Characters.
_WIDEST, _WIDEST_COLUMN = 400, 72

Cell = str | int | float | Spread | None


@dataclass(frozen=True)
class Column:
    """A heading, and the unit of its numbers; words stand to the left, numbers to the right."""

    name: str
    unit: str = ""
    words: bool = False

    @property
    def heading(self) -> str:
        """Name and unit: "time (ms)"."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Args:
        cells: by column name; a column that is left out stays empty.
        timings: what the cells were computed from, kept in full for the JSON file.
    """

    cells: Mapping[str, Cell]
    timings: tuple[Timing, ...] = ()


@dataclass(frozen=True)
class Line:
    """One candidate of a plot: seconds against N.

    Args:
        name: in the legend.
        group: lines of one group share a colour.
        sizes: N, ascending.
        seconds: for each of them; quartiles are drawn as a band.
        computed: not measured but derived, hence dashed and without a band.
    """

    name: str
    group: str
    sizes: tuple[int, ...]
    seconds: tuple[Spread, ...]
    computed: bool = False


@dataclass(frozen=True)
class Plot:
    """One panel: a title and its lines."""

    title: str
    lines: tuple[Line, ...]


@dataclass
class Table:
    """A titled table; ``notes`` are lines below it."""

    title: str
    columns: tuple[Column, ...]
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)

    def add(self, cells: Mapping[str, Cell], timings: Sequence[Timing] = ()) -> None:
        """Append a row.

        Raises:
            ValueError: a cell under no column.
        """
        unknown = cells.keys() - {column.name for column in self.columns}
        if unknown:
            raise ValueError(f"table {self.title!r} has no column {', '.join(sorted(unknown))}")
        self.rows.append(Row(dict(cells), tuple(timings)))

    def note(self, text: str) -> None:
        """Append a line below the table, once."""
        if text not in self.notes:
            self.notes.append(text)


def milliseconds(timing: Timing) -> Spread:
    """Milliseconds of one call."""
    return Spread(1e3 * timing.median, 1e3 * timing.low, 1e3 * timing.high)


def per_second(timing: Timing, items: float) -> Spread:
    """Items per second of a call that handles ``items``; low is the slower end."""
    return Spread(items / timing.median, items / timing.high, items / timing.low)


def times_faster(timing: Timing, reference: Timing) -> Spread:
    """How many times faster than ``reference`` (its time divided by this one's), round by round."""
    return Spread(*ratio(reference, timing))


def times_longer(timing: Timing, reference: Timing) -> Spread:
    """How many times as long as ``reference`` it takes, round by round."""
    return Spread(*ratio(timing, reference))


def reason(result: Timing | Failed) -> str | None:
    """Why there is no timing; None where there is one."""
    return result.reason if isinstance(result, Failed) else None


def show_number(value: float) -> str:
    """Three significant digits; whole numbers, and what is above 100, to the unit."""
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value) or value == 0:
        return f"{value:.0f}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def show_cell(value: Cell) -> str:
    """The text of a cell, the same in every form of output."""
    if value is None:
        return ""
    if isinstance(value, Spread):
        return f"{show_number(value.median)} ({show_number(value.low)}–{show_number(value.high)})"
    return value if isinstance(value, str) else show_number(value)


def print_tables(tables: Sequence[Table], console: Console | None = None) -> None:
    """Print to the terminal."""
    # Rows stay on one line: too wide for the terminal is easier to read than folded into columns of six letters.
    console = console or Console(highlight=False, width=_WIDEST)
    for table in tables:
        drawn = rich.table.Table(title=table.title, title_justify="left")
        for column in table.columns:
            drawn.add_column(column.heading, justify="left" if column.words else "right", max_width=_WIDEST_COLUMN)
        for row in table.rows:
            drawn.add_row(*(escape(show_cell(row.cells.get(column.name))) for column in table.columns))
        console.print(drawn)
        for note in table.notes:
            console.print(note, markup=False)


def describe_run(command: str, *, device: torch.device, seed: int) -> dict[str, Any]:
    """Say what a number was measured with: command, date, device, threads, seed and versions."""
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "seed": seed,
        "environment": environment(),
    }


def write_json(path: Path, tables: Sequence[Table], run: Mapping[str, Any]) -> None:
    """Write everything: the run, each table, and per row the raw seconds of every round.

    Raises:
        OSError: the file cannot be written.
    """
    content = {**run, "tables": [_table_as_json(table) for table in tables]}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _table_as_json(table: Table) -> dict[str, Any]:
    return {
        "title": table.title,
        "columns": [{"name": column.name, "unit": column.unit} for column in table.columns],
        "rows": [
            {
                **{name: asdict(cell) if isinstance(cell, Spread) else cell for name, cell in row.cells.items()},
                "seconds": {timing.name: list(timing.seconds) for timing in row.timings},
            }
            for row in table.rows
        ],
        "notes": table.notes,
    }


def write_markdown(path: Path, tables: Sequence[Table], run: Mapping[str, Any]) -> None:
    """Write the tables under the command and the machine that made them, to be pasted into docs/benchmarks.md.

    Raises:
        OSError: the file cannot be written.
    """
    seen = run["environment"]
    machine = (
        f"{run['date'][:10]}, {run['device']}, {run['threads']} threads of {seen['cpu_count']} CPUs, "
        f"torch {seen['torch']}, {seen['platform']}, seed {run['seed']}. Cells: median (quartiles) over the rounds."
    )
    blocks = [f"```bash\n{run['command']}\n```", machine]
    for table in tables:
        blocks += [f"### {table.title}", _table_as_markdown(table), *table.notes]
    path.write_text("\n\n".join(blocks) + "\n")


def _table_as_markdown(table: Table) -> str:
    lines = [[column.heading for column in table.columns], ["---" if c.words else "---:" for c in table.columns]]
    lines += [[show_cell(row.cells.get(column.name)) for column in table.columns] for row in table.rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


class ConsoleProgress:
    """A bar where a person watches; in a log file, one line per measurement.

    Args:
        title: what is being measured, such as "N=1024 forward".
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._bar: Any = None

    def start(self, total: int) -> None:
        """Announce ``total`` steps."""
        if shows_progress_bar():
            self._bar = tqdm(total=total, desc=self.title, leave=False, file=sys.stderr)
        else:
            print(f"measuring  {self.title}", file=sys.stderr, flush=True)

    def step(self, name: str) -> None:
        """Show that ``name`` is next."""
        if self._bar is not None:
            self._bar.set_postfix_str(name, refresh=False)
            self._bar.update()

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
