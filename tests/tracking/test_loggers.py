"""Loggers: the CSV's rows, what TensorBoard shows, and what counts as a secret."""

import csv

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vit_attn.config import plain, without_secrets
from vit_attn.errors import UserError
from vit_attn.tracking.loggers import CsvLogger, tensorboard_logger

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
        with pytest.raises(UserError, match=r"metrics\.csv cannot be written: disk full; what it held is whole"):
            logger.write()
    assert path.read_text() == before
    logger.write()
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


# TensorBoard


def test_tensorboard_shows_a_step_that_is_done_again_once(tmp_path):
    for steps, resume_step in ((range(5), -1), (range(3, 6), 2)):
        logger = tensorboard_logger(tmp_path, "run", resume_step=resume_step)
        for step in steps:
            logger.log_metrics({"loss": float(step)}, step)
        logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "logs" / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(step, step) for step in range(6)]


def test_tensorboard_gets_scalars_and_pictures(train):
    settings = (
        "trainer.limit_train_batches=3",
        "callbacks.attention_probe.pictures_every_n_epochs=1",
        "explain_images=0",
    )
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
