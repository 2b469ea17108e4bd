"""Run folders read back: their state, why they did not finish, and whatever can be broken in them."""

import csv
import json
import math

import pytest

from vit_attn.errors import UserError
from vit_attn.report.runs import read_runs


def read_one(folder):
    (run,) = read_runs([folder])
    return run


def test_a_finished_run(make_run):
    root = make_run(attention="strided", seed=7, acc=0.875, explain=True)
    run = read_one(root)
    assert (run.path, run.name, run.state, run.reason, run.seed) == (root, root.name, "finished", "", 7)
    assert run.config["model"]["attention"] == "strided"
    assert run.results["test"]["acc"] == 0.875
    assert run.explanations_path == root / "results/explanations.npz"


def test_a_run_that_was_stopped_tells_how_far_it_came(make_run):
    run = read_one(make_run(state="running", stopped_after=20))
    assert (run.state, run.results, run.explanations_path) == ("unfinished", None, None)
    assert run.reason == "at step 20, in epoch 2 of 5: stopped, or still going on"


def test_a_run_of_so_many_steps_tells_them(make_run):
    run = read_one(make_run(state="running", stopped_after=15, overrides=("trainer.max_steps=400",)))
    assert run.reason.startswith("at step 15 of 400")


def test_a_run_that_was_stopped_before_it_logged(make_run):
    run = read_one(make_run(state="running", stopped_after=0))
    assert (run.state, run.curves) == ("unfinished", {})
    assert "before the first logged step" in run.reason


def test_a_run_that_goes_on_is_unfinished_whatever_it_scored_before(make_run):
    root = make_run()
    status = root / "results/status.json"
    status.write_text(status.read_text().replace("finished", "running"))
    run = read_one(root)
    assert run.results is not None
    assert run.state == "unfinished"


def test_a_failed_run_tells_its_error_in_one_line(make_run):
    run = read_one(make_run(state="failed", stopped_after=5, error="loss is NaN:\n  lower optimizer.lr"))
    assert (run.state, run.reason) == ("failed", "loss is NaN: lower optimizer.lr")


@pytest.mark.parametrize(
    ("results", "state"),
    [({}, "finished"), ({"steps": None}, "unfinished"), ({"val": None}, "unfinished")],
)
def test_old_runs_are_judged_by_their_scores(make_run, results, state):
    assert read_one(make_run(state=None, results=results)).state == state


def test_an_old_run_without_scores_is_unfinished(make_run):
    run = read_one(make_run(state=None, stopped_after=10))
    assert run.state == "unfinished"
    assert run.reason.startswith("at step 10")


def test_a_run_said_to_be_finished_without_scores_failed(make_run):
    root = make_run()
    (root / "results/metrics.json").unlink()
    run = read_one(root)
    assert run.state == "failed"
    assert "metrics.json" in run.reason


@pytest.mark.parametrize("state", ["finished", "running"])
@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("results/metrics.json", b'{"steps": 50, "val"'),
        ("results/metrics.json", b"[1, 2]"),
        ("results/metrics.json", b""),
        ("results/metrics.json", b"\xff\xfe\x00"),
        ("results/status.json", b"{"),
        ("results/status.json", b'"finished"'),
        ("config.yaml", b"model: {attention: softmax"),
        ("config.yaml", b"- a\n- b\n"),
        ("config.yaml", b"just words"),
        ("config.yaml", b""),
        ("config.yaml", b"seed: 1\nseed: 2\n"),
        ("config.yaml", b"seed: 1\nmodel: softmax\n"),
        ("config.yaml", b"seed: 1\nmodel: {attention: 3}\n"),
        ("config.yaml", b"seed: 1\nmodel: {attention: []}\n"),
        ("config.yaml", b"seed: 1\nmodel: {attention: strided, attention_options: 3}\n"),
        ("config.yaml", b"seed: 1\nmodel: {attention: [strided, {a: 1}]}\n"),
        ("config.yaml", b"seed: ${oc.env:HOME\n"),
        ("config.yaml", b"\xff\xfe\x00"),
        ("logs/metrics.csv", b"step,epoch,val/acc\n4,0\n"),
        ("logs/metrics.csv", b"step,epoch,val/acc\n4,0,0.5,0.6\n"),
        ("logs/metrics.csv", b"step,epoch,val/acc\n4,0,high\n"),
        ("logs/metrics.csv", b"epoch,val/acc\n0,0.5\n"),
        ("logs/metrics.csv", b"step,epoch\n4.5,0\n"),
        ("logs/metrics.csv", b"step,epoch\n\xff,0\n"),
    ],
)
def test_a_broken_file_makes_the_run_failed_and_is_named(make_run, file, content, state):
    root = make_run(state=state, curves=False)
    (root / file).write_bytes(content)
    run = read_one(root)
    assert run.state == "failed"
    assert run.reason.startswith(("config.yaml", file))
    assert len(run.reason.splitlines()) == 1


def test_a_folder_in_the_place_of_a_file_is_broken_too(make_run):
    root = make_run()
    (root / "results/metrics.json").unlink()
    (root / "results/metrics.json").mkdir()
    assert read_one(root).state == "failed"


def test_a_state_of_another_version_is_named(make_run):
    run = read_one(make_run(state="sleeping"))
    assert run.state == "failed"
    assert "'sleeping'" in run.reason


def test_interpolations_are_not_followed(make_run, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "hunter2")
    root = make_run()
    with (root / "config.yaml").open("a") as file:
        file.write("note: ${oc.env:MY_SECRET}\n")
    assert read_one(root).config["note"] == "${oc.env:MY_SECRET}"


def test_curves_are_those_of_the_file(make_run):
    root = make_run()
    with (root / "logs/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    run = read_one(root)
    assert set(run.curves) == set(rows[0]) - {"step"}
    for name, points in run.curves.items():
        assert points == [(int(row["step"]), float(row[name])) for row in rows if row[name] != ""]
    assert len(run.curves["train/loss"]) == 2 * len(run.curves["val/acc"])  # the file is sparse


def test_curves_rise_in_their_steps_and_keep_what_is_not_a_number(make_run):
    root = make_run()
    (root / "logs/metrics.csv").write_text("step,epoch,train/loss\n9,0,nan\n4,0,0.5\n14,1,\n")
    points = read_one(root).curves["train/loss"]
    assert [step for step, _ in points] == [4, 9]
    assert points[0][1] == 0.5
    assert math.isnan(points[1][1])


def test_a_run_without_a_log_has_no_curves(make_run):
    run = read_one(make_run(curves=False))
    assert (run.state, run.curves) == ("finished", {})


def test_experiment_and_run_named_together_give_each_run_once(make_run, tmp_path):
    runs = [make_run(seed=seed) for seed in (2, 1)]
    folder = tmp_path / "experiment"
    expected = sorted(runs)
    assert [run.path for run in read_runs([folder])] == expected
    assert [run.path for run in read_runs([runs[1]])] == [runs[1]]
    named_again = folder / ".." / folder.name / runs[0].name
    assert [run.path for run in read_runs([runs[0], folder, runs[1], named_again])] == expected


def test_several_experiments(make_run, tmp_path):
    runs = [make_run(tmp_path / name) for name in ("b", "a")]
    assert [run.path for run in read_runs([tmp_path / "b", tmp_path / "a"])] == sorted(runs)


def test_what_is_no_run_is_passed_over(make_run, tmp_path):
    root = make_run()
    folder = tmp_path / "experiment"
    (folder / "report/figures").mkdir(parents=True)
    (folder / "report/report.html").touch()
    (folder / "multirun.yaml").write_text("hydra: {}\n")
    (folder / ".cache").mkdir()
    assert [run.path for run in read_runs([folder])] == [root]


@pytest.mark.parametrize("place", ["nowhere", "empty", "file"])
def test_a_folder_without_runs_is_refused_in_one_line(tmp_path, place):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    problem = {"nowhere": "no such folder", "empty": "no runs in it", "file": "not a folder"}[place]
    with pytest.raises(UserError, match=rf"{place}: {problem}") as caught:
        read_runs([tmp_path / place])
    assert "\n" not in str(caught.value)


def test_the_folder_of_all_experiments_points_to_those_in_it(make_run, tmp_path):
    make_run()
    with pytest.raises(UserError, match=rf"did you mean {tmp_path / 'experiment'}\?"):
        read_runs([tmp_path])


def test_no_folder_at_all_is_refused():
    with pytest.raises(UserError, match="no folder of runs"):
        read_runs([])


def test_when_a_run_was_updated(make_run):
    root = make_run()
    assert read_one(root).updated == 1767265200.0  # 2026-01-01T11:00:00+00:00
    (root / "results/status.json").write_text(json.dumps({"state": "finished", "updated": "yesterday"}))
    assert read_one(root).updated == (root / "results/metrics.json").stat().st_mtime
