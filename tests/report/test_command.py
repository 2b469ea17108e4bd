"""python -m vit_attn.report, as a user runs it, in this process."""

import csv

import pytest

from vit_attn.report.__main__ import main
from vit_attn.report.write import write_report

BARE = {"attention_statistics": None, "cost": None}  # nothing to draw but accuracies


@pytest.fixture
def experiment(make_run, tmp_path):
    for attention in ("softmax", "strided"):
        for seed in (1, 2):
            make_run(attention=attention, seed=seed, curves=False, results=BARE)
    return tmp_path / "experiment"


def refused(capsys, *arguments):
    """The one line that a command is refused with."""
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line


def test_command_writes_the_report_into_the_experiment(experiment, capsys):
    assert main([str(experiment)]) == 0
    folder = experiment / "report"
    out = capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"report.html", "report.md", "results.csv", "figures"}
    for name in ("report.html", "report.md", "results.csv"):
        assert f"report     {folder / name}" in out
    assert "cannot tell" in out
    assert "highest mean test accuracy" in out
    with (folder / "results.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 4


def test_a_second_report_takes_the_place_of_the_first(experiment, capsys):
    figures = experiment / "report/figures"
    assert main([str(experiment)]) == 0
    (figures / "of_an_older_report.png").touch()
    before = sorted(path.name for path in figures.iterdir())
    assert main([str(experiment)]) == 0  # the report's own folder is no run
    assert sorted(path.name for path in figures.iterdir()) == [name for name in before if "older" not in name]
    assert not list((experiment / "report").rglob("*.tmp"))


def test_baseline_and_out(experiment, tmp_path, capsys):
    assert main([str(experiment), "--baseline", "strided", "--out", str(tmp_path / "there")]) == 0
    assert "baseline is strided" in (tmp_path / "there/report.md").read_text()
    assert not (experiment / "report").exists()


def test_several_experiments_go_to_a_folder_here(experiment, make_run, tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "more", attention="fixed")
    monkeypatch.chdir(tmp_path)
    assert main(["experiment", "more"]) == 0
    text = (tmp_path / "report/report.md").read_text()
    assert "experiment, more" in text.splitlines()[0]
    assert "report     report/report.html" in capsys.readouterr().out


def test_a_single_run_is_reported_beside_it(experiment, capsys):
    run = next(path for path in experiment.iterdir() if path.name.startswith("strided_seed1"))
    assert write_report([run]) == experiment / "report/report.html"


def test_warnings_and_runs_left_out_are_printed(experiment, make_run, capsys):
    make_run(attention="fixed", seed=1, state="failed", error="out of [bold]memory", run_name="gone")
    make_run(attention="causal", seed=1)
    assert main([str(experiment)]) == 0
    out = capsys.readouterr().out
    assert "left out   gone: out of [bold]memory" in out
    assert "warning    " in out


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    assert str(tmp_path) in refused(capsys, tmp_path)
    assert "nowhere" in refused(capsys, tmp_path / "nowhere")


def test_nothing_but_unfinished_runs_is_refused(make_run, tmp_path, capsys):
    make_run(state="running", stopped_after=3)
    assert "no finished run" in refused(capsys, tmp_path / "experiment")
    assert not (tmp_path / "experiment/report").exists()


def test_an_unknown_baseline_is_refused(experiment, capsys):
    assert "Did you mean 'strided'?" in refused(capsys, experiment, "--baseline", "stridet")


def test_a_place_that_cannot_be_written_is_refused(experiment, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert "cannot write the report" in refused(capsys, experiment, "--out", tmp_path / "file")


def test_wrong_arguments_are_refused_in_one_line(capsys):
    assert "FOLDER" in refused(capsys)
    assert "--basline" in refused(capsys, "x", "--basline", "softmax")
