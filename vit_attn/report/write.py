"""From run folders to a report on disk."""

import os
from collections.abc import Sequence
from pathlib import Path

from vit_attn.errors import user_errors
from vit_attn.explain.style import save_figure
from vit_attn.report.compare import Comparison, compare
from vit_attn.report.page import build_page, draw, render
from vit_attn.report.runs import read_runs
from vit_attn.report.summary import Row, summarize, write_csv

StrPath = str | os.PathLike[str]


def write_report(paths: Sequence[StrPath], out: StrPath | None = None, baseline: str | None = None) -> Path:
    """Compare the runs in these folders and write report.html, report.md, results.csv and figures/*.png.

    Args:
        paths: experiment folders, or folders of single runs.
        out: default: ``report`` in the experiment's folder, or in the current one where there are several.
        baseline: the label or the attention that the others are compared with; default: softmax where there is one.

    Returns:
        The path of report.html.

    Raises:
        UserError: no finished run, an unknown baseline, or a folder that cannot be written.
    """
    comparison, rows = load(paths, baseline)
    return write(comparison, rows, Path(out) if out is not None else default_out(paths))


def load(paths: Sequence[StrPath], baseline: str | None = None) -> tuple[Comparison, list[Row]]:
    """Read and compare; nothing is written.

    Raises:
        UserError: as :func:`write_report`.
    """
    folders = [Path(path).expanduser() for path in paths]
    name = ", ".join(dict.fromkeys(_experiment(folder).name for folder in folders))
    comparison = compare(read_runs(folders), baseline=baseline, name=name)
    return comparison, summarize(comparison)


def _experiment(folder: Path) -> Path:
    """The experiment's folder: of a run's folder, the one it is in."""
    folder = folder.absolute()
    return folder.parent if (folder / "config.yaml").is_file() else folder


def default_out(paths: Sequence[StrPath]) -> Path:
    """Where the report goes when nothing else is said."""
    experiments = {_experiment(Path(path).expanduser()): Path(path).expanduser() for path in paths}
    if len(experiments) > 1:
        return Path("report")
    path = next(iter(experiments.values()))
    return (path.parent if (path / "config.yaml").is_file() else path) / "report"


def write(comparison: Comparison, rows: Sequence[Row], out: Path) -> Path:
    """Write the report's files and return the path of report.html; figures of an older report go.

    Raises:
        UserError: they cannot be written.
    """
    with user_errors(f"cannot write the report to {os.fspath(out)!r}"):
        drawn = draw(comparison, rows)
        files = {
            drawing.name: save_figure(drawing.figure, out / "figures" / f"{drawing.name}.png")
            for drawings in drawn.values()
            for drawing in drawings
        }
        for old in set((out / "figures").glob("*.png")) - set(files.values()):
            old.unlink()
        write_csv(comparison, out / "results.csv")
        page = build_page(comparison, rows, drawn, files)
        for name in ("report.md", "report.html"):
            _write_text(out / name, render(page, name))
    return out / "report.html"


def _write_text(path: Path, text: str) -> None:
    """Write in one move: a reader never meets half a page."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
