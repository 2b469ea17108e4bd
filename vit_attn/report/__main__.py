"""Compare the runs of an experiment and write a report.

    python -m vit_attn.report experiments/demo                                  # → experiments/demo/report/report.html
    python -m vit_attn.report experiments/demo --baseline strided --out pages   # another baseline, another place
    python -m vit_attn.report experiments/demo experiments/more                 # several experiments → report/

Writes report.html (one file, no network needed), report.md with figures/*.png beside it, and results.csv with one row
per run. Only finished runs are averaged; the others are listed with the reason.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as ConsoleTable

from vit_attn.arguments import Parser
from vit_attn.errors import UserError
from vit_attn.report.blocks import Table
from vit_attn.report.tables import scores_table
from vit_attn.report.words import answer
from vit_attn.report.write import default_out, load, write


def _parser() -> Parser:
    parser = Parser(
        prog="python -m vit_attn.report", description="Compare the runs of an experiment.", allow_abbrev=False
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="experiments/<experiment>, or runs")
    parser.add_argument("--baseline", metavar="LABEL", help="what the others are compared with (default: softmax)")
    parser.add_argument("--out", type=Path, help="folder (default: report in the experiment's folder)")
    return parser


def _print(table: Table, console: Console) -> None:
    """Print the columns of the page's main table that fit beside each other, without the notes."""
    kept = [index for index, header in enumerate(table.headers) if index < 3 or index >= len(table.headers) - 3]
    shown = ConsoleTable(title=table.name, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for index in kept:
        header = table.headers[index]
        if index == 0:
            shown.add_column(escape(header.title), overflow="fold")
            continue
        # Numbers stay on one line, long labels give way.
        justify: Literal["left", "right"] = "right" if header.numeric else "left"
        shown.add_column(escape(header.title.replace(" ", "\n")), justify=justify, no_wrap=True)
    for row in table.rows:
        shown.add_row(*(escape(row[index].text) for index in kept))
    console.print(shown)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, or 2 after one line about what was wrong."""
    console = Console(highlight=False)
    try:
        args = _parser().parse_args(argv)
        comparison, rows = load(args.folders, args.baseline)
        page = write(comparison, rows, args.out if args.out is not None else default_out(args.folders))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _print(scores_table(comparison, rows), console)
    console.print(escape(answer(comparison, rows)[0]))
    for warning in comparison.warnings:
        console.print(f"warning    {escape(warning)}", soft_wrap=True)
    for run in comparison.left_out:
        console.print(f"left out   {escape(f'{run.name}: {run.reason}')}", soft_wrap=True)
    for path in (page, page.with_name("report.md"), page.with_name("results.csv")):
        console.print(f"report     {escape(str(path))}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
