"""W&B offline: what a run writes, read back with W&B's own reader; which mode it gets; no secret anywhere."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_attn.config import plain, without_secrets
from vit_attn.errors import UserError
from vit_attn.tracking import loggers as tracking
from vit_attn.tracking.background import Background, within
from vit_attn.tracking.wandb import log_report, wandb_mode
from vit_attn.training.check import check_config

SECRET = "0123456789abcdef0123456789abcdef01234567"


def read_csv(path):
    with path.open() as file:
        return list(csv.DictReader(file))


# Online or offline


@pytest.mark.parametrize(
    ("environment", "asked", "mode"),
    [
        ({}, None, "offline"),
        ({"WANDB_API_KEY": SECRET}, None, "online"),
        ({"WANDB_API_KEY": ""}, None, "offline"),
        ({"WANDB_IDENTITY_TOKEN_FILE": "/token"}, None, "online"),
        ({"WANDB_API_KEY": SECRET}, "offline", "offline"),
        ({"WANDB_API_KEY": SECRET, "WANDB_MODE": "offline"}, None, "offline"),
        ({"WANDB_MODE": "offline"}, "online", "online"),
        ({"WANDB_MODE": "disabled"}, None, "disabled"),
        ({"WANDB_MODE": ""}, None, "offline"),
    ],
)
def test_wandb_is_online_where_the_user_is_logged_in_or_asks_for_it(monkeypatch, environment, asked, mode):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(asked) == mode


@pytest.mark.parametrize(
    ("content", "base_url", "mode"),
    [
        (f"machine api.wandb.ai login user password {SECRET}\n", None, "online"),
        (f"machine github.com login user password {SECRET}\n", None, "offline"),
        (f"machine wandb.here login user password {SECRET}\n", "https://wandb.here", "online"),
        (f"machine api.wandb.ai login user password {SECRET}\n", "https://wandb.here", "offline"),
        ("machine\nnonsense", None, "offline"),
        (None, None, "offline"),
    ],
)
def test_a_login_in_netrc_counts_for_its_host(monkeypatch, tmp_path, content, base_url, mode):
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if content is not None:
        (tmp_path / "netrc").write_text(content)
    if base_url:
        monkeypatch.setenv("WANDB_BASE_URL", base_url)
    assert wandb_mode() == mode


@pytest.mark.parametrize(("environment", "asked"), [({}, "ofline"), ({"WANDB_MODE": "ofline"}, None)])
def test_a_wrong_mode_is_refused_with_the_nearest_right_one(monkeypatch, environment, asked):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"'ofline'.*Did you mean 'offline'"):
        wandb_mode(asked)


# A run


WANDB = (
    *("logger=wandb", "logger.mode=offline", "experiment_name=tracked", "trainer.max_epochs=2", "seed=3"),
    *("callbacks.attention_probe.pictures_every_n_epochs=1", "trainer.limit_train_batches=3", "logger.tags=[one,two]"),
    "explain_images=0",
)


@pytest.fixture(scope="module")
def tracked(train_in, tmp_path_factory):
    """Two offline runs in one process, a secret in the environment and in the configuration."""
    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", SECRET)
        # W&B keeps the command line too.
        patch.setattr(sys, "argv", ["train.py", f"+note=key-{SECRET}", "+api_key=mine-77"])
        return [
            train_in(
                folder, *WANDB, f"run_name={name}", f"optimizer.lr={rate}", f"+note=key-{SECRET}", "+api_key=mine-77"
            )
            for name, rate in (("first", "1e-3"), ("second", "2e-3"))
        ]


def test_wandb_gets_every_metric_of_the_csv_at_its_step(tracked, written):
    for run in tracked:
        numbers = {}
        for row in written(run.root / "logs").history:
            step = row.get("trainer/global_step")
            for name, value in row.items():
                of_a_picture = "." in name  # its width, height and so on
                if name != "epoch" and not name.startswith(("_", "trainer/")) and not of_a_picture:
                    numbers[step, name] = value
        logged = {
            (int(row["step"]), name): float(value)
            for row in read_csv(run.root / "logs" / "metrics.csv")
            for name, value in row.items()
            if value and name not in ("step", "epoch")
        }
        assert numbers.keys() == logged.keys()
        assert numbers == pytest.approx(logged, rel=1e-6)
        assert {name for _, name in numbers} >= {"train/loss", "val/acc", "test/acc", "attention/zeros/layer_01"}


def test_wandb_shows_the_pictures_under_one_name_at_every_step(tracked, written):
    for run in tracked:
        steps = {}
        for row in written(run.root / "logs").history:
            for name, value in row.items():
                if name.endswith("._type") and value == "images/separated":
                    steps.setdefault(name.removesuffix("._type"), []).append(row["trainer/global_step"])
        assert {name: steps[name] for name in ("attention/layer_00", "attention/layer_01")} == {
            name: [3, 6] for name in ("attention/layer_00", "attention/layer_01")
        }
        shown = list((run.root / "logs" / "wandb").rglob("media/images/attention/layer_*.png"))
        drawn = {path.read_bytes() for path in (run.root / "results" / "attention").glob("layer_*.png")}
        assert len(shown) == 4
        assert {path.read_bytes() for path in shown} <= drawn


def test_wandb_holds_the_configuration_under_flat_keys(tracked, written):
    def leaves(node, prefix=""):
        for key, value in node.items():
            if isinstance(value, dict) and value:
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    for run in tracked:
        config = written(run.root / "logs").summary["config"]
        expected = json.loads(json.dumps(dict(leaves(without_secrets(plain(run.config)))))) | {"note": "<hidden>"}
        assert {key: config.get(key, "is not there") for key in expected} == expected
        assert config["model.attention"] == "softmax"


def test_two_wandb_runs_in_one_process_do_not_mix(tracked, written):
    ids = set()
    for run, rate in zip(tracked, (1e-3, 2e-3), strict=True):
        file = written(run.root / "logs")
        (record,) = [record for record in file.of("run") if "display_name" in record]
        assert record["display_name"] == run.root.name
        assert (record["run_group"], record["project"], record["job_type"]) == ("tracked", "vit_attn", "train")
        assert record["tags"] == ["one", "two", "softmax", "full", "digits"]
        assert file.summary["config"]["optimizer.lr"] == rate
        assert len([row for row in file.history if "test/acc" in row]) == 1
        assert (file.summary["state"], file.summary["exit_code"]) == ("finished", 0)
        ids.add(record["run_id"])
    assert len(ids) == 2


def test_a_run_that_crashed_is_marked_and_takes_no_part_in_the_next(train, no_pictures, monkeypatch, tmp_path, written):
    def crash(*args):
        raise ZeroDivisionError

    settings = (
        "logger=wandb",
        "trainer.limit_train_batches=1",
        "trainer.limit_val_batches=1",
        "test=false",
        "explain_images=0",
    )
    with monkeypatch.context() as patch:
        patch.setattr("vit_attn.training.module.Classifier.training_step", crash)
        with pytest.raises(ZeroDivisionError):
            train(*settings, "run_name=crashed")
    run = train(*settings, "run_name=next")
    file = written(run.root / "logs")
    assert {record.get("display_name", "next") for record in file.of("run")} == {"next"}
    assert any("val/acc" in row for row in file.history)
    assert (file.summary["state"], file.summary["exit_code"]) == ("finished", 0)
    crashed = written(tmp_path / "runs" / "default" / "crashed" / "logs")
    assert (crashed.summary["state"], crashed.summary["exit_code"]) == ("failed", 1)
    assert not crashed.history


def test_no_secret_is_in_any_file_of_a_run(tracked):
    for run in tracked:
        files = [path for path in run.root.rglob("*") if path.is_file()]
        assert any(path.suffix == ".wandb" for path in files)
        for path in files:
            content = path.read_bytes()
            assert SECRET.encode() not in content, path
            assert b"mine-77" not in content, path
    # Where it was is still to be seen.
    assert "note: <hidden>" in (run.root / "config.yaml").read_text()


def test_a_run_with_a_secret_in_its_configuration_goes_on(tracked, train_in, no_pictures, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    folder = tracked[0].root.parent.parent
    names = ("run_name=again", f"+note=key-{SECRET}", "trainer.limit_train_batches=1", "explain_images=0")
    first = train_in(folder, *names)
    assert train_in(folder, *names).results["test"] == first.results["test"]


def test_the_log_says_how_to_upload_all_parts_of_a_run(tracked):
    text = (tracked[0].root / "logs" / "train.log").read_text()
    assert f"W&B        offline; to upload it: wandb sync {tracked[0].root / 'logs' / 'wandb'}\n" in text


def test_a_wrong_choice_of_checkpoints_is_refused_early(compose, tiny):
    with pytest.raises(UserError, match=r"logger.log_checkpoints 'bset'.*Did you mean 'best'"):
        check_config(compose(*tiny, "logger=wandb", "logger.log_checkpoints=bset"))


# What a run shows, by direct calls


def prediction(true="cat", predicted="cat"):
    image = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    overlays = {"attention": image[::-1].copy(), "Grad-CAM": image[:, ::-1].copy()}
    return tracking.Prediction(image, overlays, true, predicted, 0.75)


def test_tables_files_and_pictures_are_whole_offline(start, written, tmp_path):
    logger, folder = start()
    csv_logger = tracking.CsvLogger(folder / "logs" / "metrics.csv")  # can show none of it, and is left alone
    loggers = [csv_logger, logger]
    picture, mask = tmp_path / "p.png", tmp_path / "mask strided.png"
    mask.write_bytes(b"first")
    for step in (3, 6):
        Image.new("RGB", (5, 4), (step, 0, 0)).save(picture)
        tracking.log_pictures(loggers, "attention/layer_00", [picture], step=step)
        logger.finalize("success")
    tracking.log_predictions(loggers, [prediction(), prediction(predicted="dog")])
    tracking.log_files(loggers, "masks of a/run", "masks", [mask, tmp_path / "missing.png"])
    mask.write_bytes(b"overwritten later")
    tracking.finish_loggers(loggers, failed=False)

    file = written(folder / "logs")
    rows = [row for row in file.history if row.get("attention/layer_00._type") == "images/separated"]
    assert [row["trainer/global_step"] for row in rows] == [3, 6]
    artifacts = {artifact["type"]: artifact for artifact in file.of("artifact")}
    parts = {entry["path"]: Path(entry["local_path"]) for entry in artifacts["run_table"]["manifest"]["contents"]}
    content = json.loads(parts["predictions.table.json"].read_text())
    assert content["columns"] == ["image", "attention", "Grad-CAM", "true", "predicted", "confidence", "correct"]
    assert [row[3:] for row in content["data"]] == [["cat", "cat", 0.75, True], ["cat", "dog", 0.75, False]]
    one = prediction()
    for row in content["data"]:
        for cell, pixels in zip(row[:3], (one.image, *one.overlays.values()), strict=True):
            with Image.open(parts[cell["path"]]) as shown:
                np.testing.assert_array_equal(np.asarray(shown.convert("RGB")), pixels)
    artifact = artifacts["masks"]
    assert artifact["name"] == f"masks-of-a-run-{logger.experiment.id}"
    (entry,) = artifact["manifest"]["contents"]
    assert entry["path"] == "mask strided.png"
    # Uploaded later, from a copy inside the run's folder.
    assert Path(entry["local_path"]).read_bytes() == b"first"
    assert (folder / "logs" / "wandb").absolute() in Path(entry["local_path"]).parents


def test_configuration_and_facts_are_flat_and_the_summary_keeps_the_best(start, written):
    logger, folder = start(tags=["a", "b", "a", "x" * 80, " "], job_type="train")
    tracking.log_config([logger], {"model": {"attention": "strided"}, "seed": 3}, {"parameters": 7})
    for step, (acc, loss) in enumerate([(0.5, 2.0), (0.75, 1.0), (0.25, 3.0)]):
        logger.log_metrics({"val/acc": acc, "val/loss": loss, "train/loss": loss}, step)
    tracking.finish_loggers([logger], failed=False)
    summary = written(folder / "logs").summary
    assert summary["config"] == {"model.attention": "strided", "seed": 3, "parameters": 7}
    assert summary["summary"]["val/acc"] == {"max": 0.75, "last": 0.25}
    assert summary["summary"]["val/loss"] == {"min": 1.0, "last": 3.0}
    assert summary["summary"]["train/loss"] == 3.0
    assert summary["tags"] == ["a", "b", "x" * 64]


@pytest.mark.parametrize(
    ("choice", "uploaded"),
    [
        ("none", []),
        ("best", [("best.ckpt", {"latest", "best", "step2"})]),
        ("last", [("last.ckpt", {"latest", "last", "step5"})]),
        (
            "all",
            [
                *(("last.ckpt", {"latest", "last", f"step{step}"}) for step in (2, 4)),
                ("best.ckpt", {"latest", "best", "step2"}),
                ("last.ckpt", {"latest", "last", "step5"}),
            ],
        ),
    ],
)
def test_checkpoints_are_uploaded_as_asked(start, written, tmp_path, choice, uploaded):
    from lightning.pytorch.callbacks import ModelCheckpoint

    logger, folder = start(log_checkpoints=choice)
    best, last = tmp_path / "best.ckpt", tmp_path / "last.ckpt"
    callback = ModelCheckpoint(filename="last")
    for step in (2, 4):
        last.write_bytes(b"last%d" % step)
        os.utime(last, ns=(step, step))
        logger.log_metrics({"val/acc": step / 10}, step)
        callback.best_model_path, callback._last_global_step_saved = str(last), step
        logger.after_save_checkpoint(callback)
    best.write_bytes(b"best")
    last.write_bytes(b"last5")
    numbers = {"best_numbers": {"val/acc": 0.9}, "last_numbers": {"val/acc": 0.7}}
    for _ in range(2):  # the second time there is nothing new
        tracking.log_checkpoints([logger], best=best, last=last, best_step=2, last_step=5, **numbers)
    tracking.finish_loggers([logger], failed=False)
    artifacts = written(folder / "logs").of("artifact")
    seen = [(artifact["manifest"]["contents"][0]["path"], set(artifact["aliases"])) for artifact in artifacts]
    assert seen == uploaded
    for artifact in artifacts:
        assert (artifact["type"], artifact["name"]) == ("model", f"model-{logger.experiment.id}")
        assert json.loads(artifact["metadata"])["val/acc"] in (0.2, 0.4, 0.7, 0.9)
        content = Path(artifact["manifest"]["contents"][0]["local_path"]).read_bytes().decode()
        assert content == (
            "best" if "best" in artifact["aliases"] else f"last{json.loads(artifact['metadata'])['step']}"
        )


def test_a_failed_run_is_marked_and_so_is_one_that_nobody_ended(start, written):
    first, folder = start("first")
    tracking.finish_loggers([first], failed=True)
    _, forgotten = start("forgotten")
    last, ended = start("last")
    tracking.finish_loggers([last], failed=False)
    states = [written(one / "logs").summary["exit_code"] for one in (folder, forgotten, ended)]
    assert states == [1, 1, 0]


def test_a_run_that_a_signal_has_stopped_is_marked_as_such_and_does_not_wait(start, written):
    stopped, folder = start("stopped", finish_timeout=600)
    began = time.perf_counter()
    tracking.finish_loggers([stopped], failed=True, stopped=True)
    assert time.perf_counter() - began < 15
    assert len(written(folder / "logs").of("preempting")) == 1
    failed, other = start("failed")
    tracking.finish_loggers([failed], failed=True)
    assert written(other / "logs").of("preempting") == []


def test_the_same_run_folder_is_the_same_wandb_run(start):
    names = []
    for _ in range(2):
        logger, folder = start()
        names.append(logger.experiment.id)
        tracking.finish_loggers([logger], failed=False)
    assert len(list((folder / "logs" / "wandb").glob("offline-run-*/*.wandb"))) == 2
    (folder / "config.yaml").unlink()
    (folder / "config.yaml").write_text("seed: 1\n")  # written anew, as overwrite=true does
    logger, _ = start()
    assert names[0] == names[1] != logger.experiment.id


def test_a_report_is_a_run_of_its_own(fresh_wandb, written, tmp_path):
    page, table = tmp_path / "report.html", tmp_path / "tables" / "table.csv"
    page.write_text("<h1>Which attention?</h1>")
    table.parent.mkdir()
    table.write_text("a,b\n")
    log_report(page, [table], experiment="sweep one", project="p", entity=None, mode="offline")
    file = written(tmp_path)
    (run,) = [record for record in file.of("run") if "display_name" in record]
    assert (run["job_type"], run["run_group"], run["display_name"]) == ("report", "sweep one", "sweep one report")
    (shown,) = (tmp_path / "wandb").rglob("media/html/report*.html")
    assert "<h1>Which attention?</h1>" in shown.read_text()
    (artifact,) = file.of("artifact")
    assert (artifact["name"], artifact["type"]) == ("report-sweep-one", "report")
    assert sorted(entry["path"] for entry in artifact["manifest"]["contents"]) == ["report.html", "tables/table.csv"]


@pytest.mark.parametrize(
    "remote",
    [
        "https://user:SECRET@host.example/me/repo.git",
        "https://SECRET@host.example/me/repo.git",
        "https://SECRET:x-oauth-basic@host.example/me/repo.git",
        "https://host.example/me/repo.git?token=SECRET",
    ],
)
def test_a_secret_in_the_address_of_origin_reaches_no_file(start, monkeypatch, tmp_path, remote, written):
    repository = tmp_path / "repository"
    repository.mkdir()
    monkeypatch.chdir(repository)
    for name in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{name}_NAME", "n")
        monkeypatch.setenv(f"{name}_EMAIL", "n@example.org")
    for command in (
        *(["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "m"]),
        ["remote", "add", "origin", remote.replace("SECRET", SECRET)],
    ):
        subprocess.run(["git", *command], check=True)
    (repository / "uncommitted.py").write_text("x = 1")
    logger, folder = start()
    tracking.finish_loggers([logger], failed=False)
    file = written(folder / "logs")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    (run,) = [record for record in file.of("run") if "display_name" in record]
    assert run["git"] == {"remote_url": "https://host.example/me/repo.git", "commit": commit}
    for path in folder.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
        assert path.suffix not in (".patch", ".diff")
        assert path.name != "uncommitted.py"


# Trouble


def core():
    """The process of W&B that this one has started."""
    found = subprocess.run(["pgrep", "-P", str(os.getpid()), "wandb-core"], capture_output=True, text=True, check=True)
    return [int(line) for line in found.stdout.split()]


@pytest.mark.faults("W&B dying amid a run")
def test_training_goes_on_when_wandb_core_is_killed(start, said, written):
    logger, _ = start("killed")
    logger.log_metrics({"loss": 1.0}, 0)
    logger.finalize("success")
    for process in core():
        os.kill(process, signal.SIGKILL)
    time.sleep(0.3)
    began = time.perf_counter()
    for step in range(1, 4):
        logger.log_metrics({"loss": 1.0}, step)
        tracking.log_predictions([logger], [prediction()])
    assert time.perf_counter() - began < 0.5
    tracking.finish_loggers([logger], failed=False)
    assert time.perf_counter() - began < 15
    warnings = [record.getMessage() for record in said.records if record.levelname == "WARNING"]
    assert len(warnings) <= 2
    assert sum("training goes on without it" in line or "not all of the run" in line for line in warnings) == 1
    # The next run has a wandb-core of its own.
    after, folder = start("after")
    after.log_metrics({"loss": 2.0}, 7)
    tracking.finish_loggers([after], failed=False)
    assert [row["loss"] for row in written(folder / "logs").history] == [2.0]


@pytest.mark.faults("W&B hanging")
def test_a_call_that_hangs_costs_the_caller_nothing():
    errors, made = [], []
    background = Background(errors.append)
    began = time.perf_counter()
    background.put(lambda: time.sleep(60))
    for number in range(3):
        background.put(lambda number=number: made.append(number))
    assert not background.wait(0.2)
    assert not within(0.2, lambda: time.sleep(60))
    assert time.perf_counter() - began < 5
    assert not made
    assert not errors


def test_the_first_error_is_told_once_and_ends_the_calls():
    errors, made = [], []
    background = Background(errors.append)

    def fail():
        raise SystemExit(3)

    for call in (lambda: made.append(1), fail, fail, lambda: made.append(2)):
        background.put(call)
    assert background.wait(5)
    assert made == [1]
    assert [type(error) for error in errors] == [SystemExit]


@pytest.mark.faults("W&B unreachable")
def test_where_wandb_cannot_start_at_all_there_is_a_logger_that_does_nothing(start, said, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("vit_attn.tracking.wandb._init", fail)
    logger, _ = start()
    logger.log_metrics({"loss": 1.0}, 0)
    tracking.log_predictions([logger], [prediction()])
    tracking.finish_loggers([logger], failed=False)
    assert "no space left" in said.text
