"""Tables say the same on the terminal, in JSON and in Markdown; plots hold the numbers they were given."""

import io
import json

import pytest
import torch
from matplotlib.colors import to_rgb
from rich.console import Console

from vit_attn.bench.output import (
    Column,
    ConsoleProgress,
    Line,
    Plot,
    Spread,
    Table,
    describe_run,
    milliseconds,
    per_second,
    print_tables,
    show_cell,
    show_number,
    times_faster,
    times_longer,
    write_json,
    write_markdown,
)
from vit_attn.bench.plot import save_plot, times_figure
from vit_attn.bench.timing import Timing

FAST = Timing("fast", (0.001, 0.002, 0.003))
SLOW = Timing("slow", (0.004, 0.004, 0.006))


@pytest.fixture
def table():
    made = Table("attention", (Column("N"), Column("kernel", words=True), Column("time", "ms"), Column("note")))
    made.add({"N": 1024, "kernel": "a|b [x]", "time": milliseconds(FAST)}, [FAST])
    made.add({"N": 4096, "kernel": "broken", "note": "no such kernel"})
    made.note("below the table")
    made.note("below the table")
    return made


@pytest.fixture
def run():
    return describe_run("python -m vit_attn.bench attention --quick", device=torch.device("cpu"), seed=3)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *((None, ""), ("text", "text"), (12345, "12,345"), (0.0, "0"), (1.5, "1.50"), (0.012345, "0.0123")),
        *((12.345, "12.3"), (123.45, "123"), (12345.6, "12,346"), (Spread(2.0, 1.0, 30.0), "2.00 (1.00–30.0)")),
    ],
)
def test_cells_have_three_digits_and_their_quartiles(value, shown):
    assert show_cell(value) == shown


def test_show_number_keeps_the_sign():
    assert show_number(-0.5) == "-0.500"


def test_derived_numbers_keep_low_below_high():
    assert milliseconds(FAST) == Spread(2.0, 1.5, 2.5)
    speed = per_second(FAST, items=10)
    assert (speed.median, speed.low, speed.high) == pytest.approx((5000, 4000, 10 / 0.0015))
    assert times_faster(FAST, SLOW) == Spread(*(pytest.approx(x) for x in (2.0, 2.0, 3.0)))  # 4, 2 and 2
    longer = times_longer(FAST, SLOW)
    assert (longer.median, longer.low, longer.high) == pytest.approx((0.5, 0.375, 0.5))


def test_a_cell_under_no_column_is_refused(table):
    with pytest.raises(ValueError, match=r"table 'attention' has no column colour"):
        table.add({"colour": "red"})


def test_the_terminal_shows_a_row_on_one_line_brackets_and_all(table):
    shown = io.StringIO()
    print_tables([table], Console(file=shown, width=200))
    lines = shown.getvalue().splitlines()
    assert lines[0].strip() == "attention"
    (first,) = [line for line in lines if "1,024" in line]
    assert [cell.strip() for cell in first.split("│")[1:-1]] == ["1,024", "a|b [x]", "2.00 (1.50–2.50)", ""]
    assert lines[-1].strip() == "below the table"
    assert sum("below the table" in line for line in lines) == 1


def test_a_pipe_gets_whole_rows(table, capsys):
    table.add({"kernel": " ".join(["words"] * 10), "note": "n" * 70})
    print_tables([table])
    assert "words " * 9 + "words" in capsys.readouterr().out


def test_json_holds_the_run_every_cell_and_the_seconds_of_every_round(table, run, tmp_path):
    write_json(tmp_path / "results.json", [table], run)
    read = json.loads((tmp_path / "results.json").read_text())
    assert read["command"] == "python -m vit_attn.bench attention --quick"
    assert (read["device"], read["seed"], read["threads"]) == ("cpu", 3, torch.get_num_threads())
    assert read["environment"]["torch"].startswith(torch.__version__.split("+")[0])
    assert read["date"][:2] == "20"
    (saved,) = read["tables"]
    assert saved["columns"][2] == {"name": "time", "unit": "ms"}
    assert saved["rows"][0] == {
        "N": 1024,
        "kernel": "a|b [x]",
        "time": {"median": 2.0, "low": 1.5, "high": 2.5},
        "seconds": {"fast": [0.001, 0.002, 0.003]},
    }
    assert saved["rows"][1]["note"] == "no such kernel"
    assert saved["notes"] == ["below the table"]


def test_markdown_has_the_command_the_machine_and_a_table_that_renders(table, run, tmp_path):
    write_markdown(tmp_path / "results.md", [table], run)
    text = (tmp_path / "results.md").read_text()
    assert text.startswith("```bash\npython -m vit_attn.bench attention --quick\n```\n")
    assert f"{torch.get_num_threads()} threads" in text
    assert "seed 3" in text
    lines = text.splitlines()
    start = lines.index("### attention") + 2
    assert lines[start : start + 4] == [
        "| N | kernel | time (ms) | note |",
        "| ---: | --- | ---: | ---: |",
        r"| 1,024 | a\|b [x] | 2.00 (1.50–2.50) |  |",
        "| 4,096 | broken |  | no such kernel |",
    ]
    assert lines[-1] == "below the table"


def test_progress_without_a_terminal_is_one_plain_line(capsys):
    progress = ConsoleProgress("N=64, forward")
    progress.start(3)
    for name in "abc":
        progress.step(name)
    progress.stop()
    streams = capsys.readouterr()
    assert streams.err == "measuring  N=64, forward\n"
    assert streams.out == ""


def spreads(*medians):
    return tuple(Spread(median, 0.9 * median, 1.2 * median) for median in medians)


PLOTS = [
    Plot(
        title,
        (
            Line("SDPA", "torch", (64, 256, 1024), spreads(0.001, 0.004, 0.05)),
            Line("softmax (dense)", "softmax", (64, 256), spreads(0.002, 0.009)),
            Line("softmax (fused)", "softmax", (64, 256), spreads(0.001, 0.003)),
            Line("floor", "", (64, 256, 1024), spreads(1e-4, 3e-4, 2e-3), computed=True),
        ),
    )
    for title in ("strided, forward", "strided, forward+backward")
]


def test_a_plot_draws_median_and_quartiles_on_logarithmic_axes_with_units():
    fig = times_figure(PLOTS, title="attention · cpu")
    fig.draw_without_rendering()
    first, second = fig.axes
    assert (first.get_title(), second.get_title()) == ("strided, forward", "strided, forward+backward")
    assert (first.get_xscale(), first.get_yscale()) == ("log", "log")
    assert (first.get_xlabel(), first.get_ylabel()) == ("tokens N", "time (ms)")
    assert [tick.get_text() for tick in first.get_xticklabels()] == ["64", "256", "1,024"]
    sdpa, dense, fused, floor = first.get_lines()
    assert sdpa.get_xdata().tolist() == [64, 256, 1024]
    assert sdpa.get_ydata() == pytest.approx([1, 4, 50])
    band = first.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((0.9, 60))
    assert len(first.collections) == 3  # what is computed has no band
    assert floor.get_linestyle() == "--"
    assert len({line.get_marker() for line in (sdpa, dense, fused, floor)}) == 4
    assert dense.get_color() == fused.get_color() != sdpa.get_color()
    (legend,) = fig.legends
    entries = {text.get_text(): handle for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)}
    assert list(entries) == ["SDPA", "softmax (dense)", "softmax (fused)", "floor"]
    for name, line in zip(entries, (sdpa, dense, fused, floor), strict=True):
        assert to_rgb(entries[name].get_color()) == to_rgb(line.get_color())


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_plot_is_written_in_the_format_of_its_ending(tmp_path, ending, start):
    path = tmp_path / f"times.{ending}"
    save_plot(times_figure(PLOTS[:1], title="attention"), path)
    assert path.read_bytes().startswith(start)
