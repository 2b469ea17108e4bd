"""The commands as a user runs them, each in a process of its own."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent


def start(program, folder, *arguments, **environment):
    """Start train.py or evaluate.py in ``folder``, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / f"{program}.py"), *map(str, arguments)],
        **{"cwd": folder, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        start_new_session=True,
    )


def run(program, folder, *arguments, timeout=240):
    """Run a command to its end; returns what it printed."""
    process = start(program, folder, *arguments)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        kill(process)
    assert (process.returncode, err) == (0, "")
    return out


def kill(process):
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def read_rows(root):
    with (root / "logs" / "metrics.csv").open() as file:
        rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    return [{name: value for name, value in row.items() if not name.startswith("speed/")} for row in rows]


def test_train_then_evaluate(tmp_path, tiny):
    settings = ("model.attention=strided", "run_name=mine", "trainer.limit_train_batches=3")
    printed = run("train", tmp_path, *tiny, *settings)
    root = tmp_path / "experiments" / "default" / "mine"
    trained = json.loads((root / "results" / "metrics.json").read_text())
    assert f"test       accuracy {100 * trained['test']['acc']:.2f} %" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["experiments"]

    printed = run("evaluate", tmp_path, "ckpt=experiments/default/mine", "accelerator=cpu", "data.eval_batch_size=50")
    evaluated = json.loads((root / "results" / "metrics.json").read_text())
    assert evaluated["test"]["confusion"] == trained["test"]["confusion"]
    assert evaluated["val"] == trained["val"]
    assert f"{100 * trained['test']['acc']:.2f} %" in printed
    assert "softmax+strided" in printed
    for path in (root / "results" / "confusion.png", root / "results" / "attention" / "layer_01_test.png"):
        assert path.exists()
        assert str(path.relative_to(tmp_path)) in printed
    assert [path.name for path in tmp_path.iterdir()] == ["experiments"]


def test_a_multirun_makes_a_run_of_every_combination(tmp_path, tiny):
    limits = ("trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "test=false", "experiment_name=many")
    printed = run("train", tmp_path, *tiny, *limits, "-m", "model.attention=softmax,entmax", "seed=1,2")
    report = tmp_path / "experiments" / "many" / "report"
    assert f"report     {report.relative_to(tmp_path) / 'report.html'}" in printed
    with (report / "results.csv").open() as file:
        compared = [(row["mechanism"], row["seed"], row["state"]) for row in csv.DictReader(file)]
    assert compared == [(name, seed, "finished") for name in ("softmax", "entmax") for seed in "12"]
    folders = sorted(path for path in report.parent.iterdir() if path.is_dir() and path != report)
    assert [folder.name.rpartition("_")[0] for folder in folders] == [
        f"{attention}_seed{seed}" for attention in ("entmax", "softmax") for seed in (1, 2)
    ]
    losses = set()
    for folder in folders:
        results = json.loads((folder / "results" / "metrics.json").read_text())
        assert folder.name.startswith(f"{results['attention']}_seed{results['seed']}_")
        assert results["steps"] == 2
        losses.add(results["val"]["loss"])
        assert "epoch   1/1" in (folder / "logs" / "train.log").read_text()
        assert (folder / "logs" / "train.log").read_text().count("model  ") == 1  # its own lines alone
    assert len(losses) == 4


@pytest.mark.slow
def test_a_run_killed_amid_training_ends_as_if_it_had_not_been(tmp_path, tiny):
    settings = (
        *(*tiny, "run_name=killed", "data.batch_size=16", "trainer.max_epochs=3", "callbacks.ema.enabled=true"),
        *("callbacks.checkpoint_every_n_steps=7", "data.augment.mixup=0.2", "model.drop_path_rate=0.1"),
    )
    roots = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        roots.append(tmp_path / name / "experiments" / "default" / "killed")
    whole, killed = roots
    run("train", tmp_path / "whole", *settings)

    process = start("train", tmp_path / "killed", *settings)
    last, deadline = killed / "checkpoints" / "last.ckpt", time.monotonic() + 120
    first = None  # killed a little after a second checkpoint, so amid an epoch
    while time.monotonic() < deadline and process.poll() is None:
        if last.exists():
            first = first or last.stat().st_mtime_ns
            if last.stat().st_mtime_ns != first:
                break
        time.sleep(0.005)
    time.sleep(0.05)
    kill(process)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    stopped_at = torch.load(last, weights_only=True)["global_step"]
    assert 7 <= stopped_at < 240
    assert not (killed / "results" / "metrics.json").exists()

    printed = run("train", tmp_path / "killed", *settings)
    assert f"at step {stopped_at}" in printed
    for name in ("best", "last"):
        ours, theirs = (
            torch.load(root / "checkpoints" / f"{name}.ckpt", weights_only=True) for root in (killed, whole)
        )
        assert ours["global_step"] == theirs["global_step"]
        assert ours["state_dict"].keys() == theirs["state_dict"].keys()
        assert all(torch.equal(value, ours["state_dict"][key]) for key, value in theirs["state_dict"].items())
    assert read_rows(killed) == read_rows(whole)


@pytest.fixture
def odd_images(tmp_path):
    """Bright and dark images of 8 x 8 pixels, hard to tell apart; 21 to test on, an odd number for two processes."""
    rng = np.random.default_rng(0)
    for split, counts in (("train", (20, 20)), ("test", (10, 11))):
        for level, count in enumerate(counts):
            folder = tmp_path / "images" / split / ("dark", "bright")[level]
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = (rng.random((8, 8, 3)) * 235 + 20 * level).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return tmp_path / "images"


@pytest.mark.slow
def test_two_processes_are_one_run_and_test_each_image_once(tmp_path, tiny, odd_images, evaluate):
    settings = [setting for setting in tiny if setting not in ("trainer=cpu", "data=digits")]
    printed = run(
        *("train", tmp_path, *settings, "trainer=ddp_cpu", "data=imagefolder", f"data.root={odd_images}"),
        *(
            "data.batch_size=4",
            "data.eval_batch_size=3",
            "trainer.max_epochs=2",
            "data.val_fraction=0.25",
            "run_name=two",
        ),
        "optimizer.lr=1e-2",
    )
    root = tmp_path / "experiments" / "default" / "two"
    assert list((tmp_path / "experiments").rglob("*.csv")) == [root / "logs" / "metrics.csv"]
    assert list((tmp_path / "experiments" / "default").iterdir()) == [root]
    assert printed.count("results    ") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["experiments", "images"]

    trained = json.loads((root / "results" / "metrics.json").read_text())
    assert [sum(row) for row in trained["test"]["confusion"]] == [11, 10]  # bright, dark: each image once
    assert trained["steps"] == 2 * (30 // 8)
    rows = read_rows(root)
    assert [int(row["step"]) for row in rows] == [*range(6), 6]

    alone = evaluate(f"ckpt={root}", f"output={tmp_path / 'alone'}")
    assert alone["test"]["confusion"] == trained["test"]["confusion"]
    for key in ("acc", "loss", "ece"):
        assert alone["test"][key] == pytest.approx(trained["test"][key], abs=1e-5)
    assert float(rows[-1]["test/acc"]) == pytest.approx(alone["test"]["acc"], abs=1e-6)


@pytest.mark.slow
def test_a_multirun_of_two_processes_each_runs_every_job_once(tmp_path, tiny):
    settings = [setting for setting in tiny if setting != "trainer=cpu"]
    limits = ("trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "test=false")
    printed = run("train", tmp_path, *settings, *limits, "trainer=ddp_cpu", "-m", "seed=1,2")
    folders = sorted((tmp_path / "experiments" / "default").glob("softmax*"))
    assert [folder.name.rpartition("_")[0] for folder in folders] == ["softmax_seed1", "softmax_seed2"]
    assert printed.count("results    ") == 2
    for folder in folders:
        assert json.loads((folder / "results" / "metrics.json").read_text())["steps"] == 2
