"""Loggers: the CSV's rows, W&B's decisions and its offline file read back, no secret anywhere."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vit_attn.config import plain, without_secrets
from vit_attn.errors import UserError
from vit_attn.tracking.loggers import CsvLogger, wandb_mode

SECRET = "0123456789abcdef0123456789abcdef01234567"


def read_csv(path):
    with path.open() as file:
        return list(csv.DictReader(file))


# The CSV


def test_metrics_of_one_step_share_a_row_and_rows_are_in_order(tmp_path):
    logger = CsvLogger(tmp_path / "metrics.csv")
    logger.log_metrics({"b": 2.0}, step=5)
    logger.log_metrics({"a": torch.tensor(0.25), "epoch": 0}, step=1)
    logger.log_metrics({"c": 3.0, "b": 4.0}, step=5)
    logger.save()
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["step,epoch,a,b,c", "1,0,0.25,,", "5,,,4.0,3.0"]


def test_nothing_logged_is_a_header(tmp_path):
    CsvLogger(tmp_path / "metrics.csv").finalize("success")
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["step,epoch"]


@pytest.mark.parametrize(("resume_step", "kept"), [(-1, []), (0, [0]), (2, [0, 2]), (3, [0, 2]), (99, [0, 2, 4])])
def test_a_resumed_file_keeps_the_rows_up_to_its_step(tmp_path, resume_step, kept):
    path = tmp_path / "metrics.csv"
    first = CsvLogger(path)
    for step in (0, 2, 4):
        first.log_metrics({"loss": float(step), "epoch": 0}, step=step)
    first.save()
    second = CsvLogger(path, resume_step=resume_step)
    second.log_metrics({"new": 1.0}, step=5)
    second.save()
    rows = read_csv(path)
    assert [int(row["step"]) for row in rows] == [*kept, 5]
    assert [float(row["loss"]) for row in rows[:-1]] == kept
    assert rows[-1]["new"] == "1.0"


def test_saving_replaces_the_file_in_one_move(tmp_path, monkeypatch):
    path = tmp_path / "metrics.csv"
    logger = CsvLogger(path)
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.save()
    before = path.read_text()
    logger.log_metrics({"loss": 2.0}, step=1)

    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(csv.DictWriter, "writerows", fail)
        with pytest.raises(OSError, match="disk full"):
            logger.save()
    assert path.read_text() == before
    logger.save()
    assert len(read_csv(path)) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.csv"]


# Secrets


@pytest.mark.parametrize("name", ["api_key", "apikey", "WANDB_API_KEY", "token", "hf_tokens", "password", "secret"])
@pytest.mark.parametrize("value", ["abc", 123456])
def test_values_under_a_secrets_name_are_hidden(name, value):
    hidden = without_secrets({"logger": {name: value, "project": "p"}, "tags": [{name: value}]})
    assert hidden == {"logger": {name: "<hidden>", "project": "p"}, "tags": [{name: "<hidden>"}]}


def test_a_secret_of_the_environment_is_hidden_wherever_it_stands(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    monkeypatch.setenv("HARMLESS", "harmless-value")
    config = {"note": f"my key is {SECRET}!", "tags": ["a", SECRET], "plain": "harmless-value"}
    assert without_secrets(config) == {"note": "<hidden>", "tags": ["a", "<hidden>"], "plain": "harmless-value"}


def test_what_is_no_secret_stays_as_it_is(compose, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "1")  # too short to be one; would hide half of the configuration
    config = plain(compose("model.class_token=false", "model.reg_tokens=4", "model.global_pool=avg"))
    assert without_secrets(config) == config


# W&B: online or offline


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


# W&B: what a run writes, read back with W&B's own reader


def wandb_records(run):
    """Each record of the run's .wandb file, as W&B's own command reads them."""
    (file,) = (run.root / "logs" / "wandb").glob("offline-run-*/*.wandb")
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def wandb_history(run):
    """Rows of what was logged: name → value."""
    rows = []
    for record in wandb_records(run):
        if record["type"] == "history":
            rows.append(flat(record["history"]))
    return rows


def flat(history):
    items = history.get("item", history)
    if isinstance(items, list):
        return {
            item.get("key") or "/".join(item["nested_key"]): item.get("value", item.get("value_json")) for item in items
        }
    return items


WANDB = (
    *("logger=wandb", "logger.mode=offline", "experiment_name=tracked", "trainer.max_epochs=2", "seed=3"),
    *("callbacks.attention_probe.pictures_every_n_epochs=1", "trainer.limit_train_batches=3", "logger.tags=[one,two]"),
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


def test_wandb_gets_every_metric_of_the_csv_at_its_step(tracked):
    for run in tracked:
        history = wandb_history(run)
        numbers = {}
        for row in history:
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


def test_wandb_shows_the_pictures(tracked):
    for run in tracked:
        kinds = {
            name.partition(".")[0]: value
            for row in wandb_history(run)
            for name, value in row.items()
            if "_type" in name
        }
        assert kinds == dict.fromkeys(
            [f"attention/{best}layer_0{layer}" for best in ("", "best_") for layer in (0, 1)], "images/separated"
        )
        shown = list((run.root / "logs" / "wandb").rglob("media/images/attention/*.png"))
        drawn = {path.read_bytes() for path in (run.root / "results" / "attention").glob("layer_*.png")}
        assert len(shown) == 6  # two layers, after each of two epochs and of the best
        assert {path.read_bytes() for path in shown} <= drawn


def wandb_config(run):
    (file,) = (run.root / "logs" / "wandb").glob("offline-run-*/*.wandb")
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--summary", "--json", str(file)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)["config"]


def test_wandb_holds_the_resolved_configuration(tracked):
    for run in tracked:
        config = {key: value for key, value in wandb_config(run).items() if not key.startswith("_")}
        assert config == json.loads(json.dumps(without_secrets({**plain(run.config), "note": f"{SECRET}"}))) | {
            "note": "<hidden>"
        }
        assert config["logger"]["group"] == "tracked"


def test_two_wandb_runs_in_one_process_do_not_mix(tracked):
    ids, files = set(), set()
    for run, rate in zip(tracked, (1e-3, 2e-3), strict=True):
        (record,) = [r["run"] for r in wandb_records(run) if r["type"] == "run" and "display_name" in r["run"]]
        assert record["display_name"] == run.root.name
        assert (record["run_group"], record["project"], record["tags"]) == ("tracked", "vit_attn", ["one", "two"])
        assert wandb_config(run)["optimizer"]["lr"] == rate
        assert len([row for row in wandb_history(run) if "test/acc" in row]) == 1
        ids.add(record["run_id"])
        files.add(next((run.root / "logs" / "wandb").glob("offline-run-*/*.wandb")))
    assert len(ids) == len(files) == 2


def test_a_run_that_crashed_takes_no_part_in_the_next(train, no_pictures, monkeypatch, tmp_path):
    def crash(*args):
        raise ZeroDivisionError

    settings = ("logger=wandb", "trainer.limit_train_batches=1", "trainer.limit_val_batches=1", "test=false")
    with monkeypatch.context() as patch:
        patch.setattr("vit_attn.training.module.Classifier.training_step", crash)
        with pytest.raises(ZeroDivisionError):
            train(*settings, "run_name=crashed")
    run = train(*settings, "run_name=next")
    assert {r["run"].get("display_name", "next") for r in wandb_records(run) if r["type"] == "run"} == {"next"}
    assert any("val/acc" in row for row in wandb_history(run))
    crashed = SimpleNamespace(root=tmp_path / "runs" / "default" / "crashed")
    assert not wandb_history(crashed)


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
    names = ("run_name=again", f"+note=key-{SECRET}", "trainer.limit_train_batches=1")
    first = train_in(folder, *names)
    assert train_in(folder, *names).results["test"] == first.results["test"]


def test_the_same_run_folder_is_the_same_wandb_run(train, no_pictures):
    settings = ("logger=wandb", "run_name=one", "trainer.limit_train_batches=1")
    for epochs in (1, 2):
        run = train(*settings, f"trainer.max_epochs={epochs}")
    files = list((run.root / "logs" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1
    anew = train(*settings, "overwrite=true")
    (file,) = (anew.root / "logs" / "wandb").glob("offline-run-*/*.wandb")
    assert file.name != files[0].name


def test_offline_the_log_says_how_to_sync(tracked):
    text = (tracked[0].root / "logs" / "train.log").read_text()
    (folder,) = (tracked[0].root / "logs" / "wandb").glob("offline-run-*")
    assert f"W&B        offline; to upload it: wandb sync {folder}" in text


# TensorBoard


def test_tensorboard_gets_scalars_and_pictures(train):
    settings = ("trainer.limit_train_batches=3", "callbacks.attention_probe.pictures_every_n_epochs=1")
    run = train("logger=tensorboard", "model.attention=strided", *settings)
    events = EventAccumulator(str(run.root / "logs" / "tensorboard")).Reload()
    tags = events.Tags()
    rows = read_csv(run.root / "logs" / "metrics.csv")
    names = set(rows[0]) - {"step", "epoch"}
    assert names <= set(tags["scalars"])
    for name in ("train/loss", "val/acc", "attention/zeros/layer_01"):
        logged = {int(row["step"]): float(row[name]) for row in rows if row[name]}
        assert {event.step: event.value for event in events.Scalars(name)} == pytest.approx(logged, rel=1e-6)
    assert {"attention/layer_00", "attention/best_layer_01"} <= set(tags["images"])
    picture = events.Images("attention/best_layer_01")[0]
    assert min(picture.width, picture.height) > 100
