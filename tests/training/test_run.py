"""A run: what it leaves on disk, how it goes on, what it never reads."""

import csv
import itertools
import json
import math
import signal
import statistics

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from vit_attn.attention import make_pattern
from vit_attn.config import plain
from vit_attn.data.digits import Digits
from vit_attn.errors import UserError
from vit_attn.training.build import build_net
from vit_attn.training.callbacks import EpochLines
from vit_attn.training.early_stopping import ResumableEarlyStopping
from vit_attn.training.module import Classifier

STRIDED = ("model.attention=strided", "trainer.max_epochs=2", "data.batch_size=128", "run_name=strided")


class StoppedError(Exception):
    """Ends a training as a crash would."""


def read_rows(run):
    with (run.root / "logs" / "metrics.csv").open() as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def load(path):
    return torch.load(path, weights_only=True)


def same(left, right):
    """Whether two nests of containers hold the same, tensors bit for bit."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(same(*pair) for pair in zip(left, right, strict=True))
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


@pytest.fixture(scope="module")
def run(train_in, tmp_path_factory):
    """A finished run of two epochs, with a picture in each, and explanations."""
    return train_in(
        tmp_path_factory.mktemp("runs"),
        *STRIDED,
        *("experiment_name=layout", "callbacks.attention_probe.pictures_every_n_epochs=1", "explain_images=4"),
    )


def test_a_run_leaves_the_documented_layout_and_nothing_else(run):
    pictures = [f"layer_{layer:02d}{epoch}.png" for layer in (0, 1) for epoch in ("", "_epoch_0001", "_epoch_0002")]
    assert run.root.parts[-2:] == ("layout", "strided")
    assert sorted(str(path.relative_to(run.root)) for path in run.root.rglob("*") if path.is_file()) == sorted(
        [
            *(".lock", "config.yaml", "logs/metrics.csv", "logs/train.log"),
            *(f"checkpoints/{name}.ckpt" for name in ("best", "last", "previous")),
            *("results/metrics.json", "results/status.json"),
            *(f"results/attention/{name}" for name in [*pictures, "mask_strided.png"]),
            "results/explanations.npz",
            *(f"results/explanations/{name}.png" for name in ("methods", "curves", "layers", "receptive_field")),
            *(f"results/explanations/heads_layer_{layer:02d}.png" for layer in (0, 1)),
        ]
    )


def test_config_yaml_holds_everything_resolved(run):
    text = (run.root / "config.yaml").read_text()
    assert "${" not in text
    assert yaml.safe_load(text) == plain(run.config)


@pytest.mark.parametrize("name", ["best", "last"])
def test_checkpoints_are_plain_data_that_rebuild_the_model(run, name):
    checkpoint = load(run.root / "checkpoints" / f"{name}.ckpt")
    saved = checkpoint["vit_attn"]
    assert saved["config"] == plain(run.config)
    assert saved["data"]["class_names"] == [str(digit) for digit in range(10)]
    assert saved["data"]["num_images"] == {"train": 1293, "val": 144, "test": 360}
    net = build_net(saved["config"]["model"], num_classes=10, image_size=saved["data"]["image_size"])
    net.load_state_dict({key.removeprefix("net."): value for key, value in checkpoint["state_dict"].items()})
    assert checkpoint["global_step"] <= 20


def test_metrics_csv_has_the_documented_names_in_order_of_steps(run):
    rows = read_rows(run)
    names = set().union(*rows)
    layers = [
        f"attention/{kind}/layer_{layer}"
        for kind in ("zeros", "entropy", "support", "distance")
        for layer in ("00", "01")
    ]
    epochs = {"val/loss", "val/acc", "val/ece", *layers}
    assert names == {
        *("step", "epoch", "train/loss", "train/acc", "train/lr", "speed/images_per_second"),
        *epochs,
        *("test/acc", "test/loss", "test/top5", "test/ece"),
    }
    assert [int(row["step"]) for row in rows] == [*range(20), 20]
    assert [int(row["step"]) for row in rows if "train/loss" in row] == list(range(20))
    assert [int(row["step"]) for row in rows if epochs <= row.keys()] == [9, 19]
    assert [int(row["step"]) for row in rows if "test/acc" in row] == [20]
    assert [row["epoch"] for row in rows[:20]] == ["0"] * 10 + ["1"] * 10
    assert all(float(row["speed/images_per_second"]) > 0 for row in rows if "speed/images_per_second" in row)


def test_logged_learning_rates_are_those_of_their_steps(run):
    # 20 steps, of which 5 % = 1 is warm-up; from the second, a cosine over 19 from lr to 1 % of it.
    cosine = [1e-3 * (0.01 + 0.99 * (1 + math.cos(math.pi * step / 19)) / 2) for step in range(19)]
    rates = {int(row["step"]): float(row["train/lr"]) for row in read_rows(run) if "train/lr" in row}
    assert rates == pytest.approx(dict(enumerate([1e-3, *cosine])), rel=1e-6)


def test_zeros_of_softmax_over_a_pattern_are_its_sparsity(run):
    pattern = make_pattern("strided", num_tokens=64, num_prefix_tokens=1)
    rows = [row for row in read_rows(run) if "val/acc" in row]
    for row in rows:
        for layer in ("00", "01"):
            assert float(row[f"attention/zeros/layer_{layer}"]) == pytest.approx(pattern.sparsity, abs=1e-6)
            assert float(row[f"attention/support/layer_{layer}"]) == pytest.approx(pattern.entries / 65, abs=1e-4)
            assert float(row[f"attention/zeros/layer_{layer}"]) > 0.5
    written = json.loads((run.root / "results" / "metrics.json").read_text())
    assert written["attention_statistics"]["1"]["zeros"] == pytest.approx(pattern.sparsity, abs=1e-12)
    assert written["cost"]["sparsity"] == [pattern.sparsity] * 2


def test_metrics_json_is_what_train_returned_and_agrees_with_the_csv(run):
    written = json.loads((run.root / "results" / "metrics.json").read_text())
    assert written == json.loads(json.dumps(run.results))
    rows = read_rows(run)
    assert written["test"]["acc"] == pytest.approx(float(rows[-1]["test/acc"]))
    assert sum(map(sum, written["test"]["confusion"])) == 360
    accuracies = [float(row["val/acc"]) for row in rows if "val/acc" in row]
    best = max(range(2), key=accuracies.__getitem__)
    assert (written["best_epoch"], written["val"]["acc"]) == (best + 1, pytest.approx(accuracies[best]))
    assert (written["epochs"], written["steps"], written["seed"], written["attention"]) == (2, 20, 1, "strided")
    assert (written["run"], written["experiment"], written["checkpoint"]) == ("strided", "layout", "best.ckpt")


def test_train_log_says_what_was_done(run):
    text = (run.root / "logs" / "train.log").read_text()
    for said in ("1,293 train, 144 val, 360 test", "softmax+strided", "epoch   2/2", "test       accuracy"):
        assert said in text


def test_config_yaml_is_there_before_training_begins(train, no_pictures, monkeypatch, tmp_path):
    stop_before_batch(monkeypatch, 0)
    with pytest.raises(StoppedError):
        train("run_name=early", "seed=7")
    (config,) = tmp_path.rglob("config.yaml")
    assert OmegaConf.load(config).seed == 7


def status(root):
    return json.loads((root / "results" / "status.json").read_text())


def test_status_says_running_then_finished(train, no_pictures, monkeypatch, tmp_path):
    seen = []
    step = Classifier.training_step

    def look(self, *args):
        (path,) = tmp_path.rglob("status.json")
        seen.append(json.loads(path.read_text()))
        return step(self, *args)

    monkeypatch.setattr(Classifier, "training_step", look)
    run = train("trainer.limit_train_batches=1", "test=false")
    assert [(entry["state"], entry["error"]) for entry in seen] == [("running", None)]
    after = status(run.root)
    assert (after["state"], after["error"], after["started"]) == ("finished", None, seen[0]["started"])


def test_status_names_what_a_run_failed_of_until_it_goes_on(train, no_pictures, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train("run_name=crashes", "trainer.limit_train_batches=1")
    (path,) = tmp_path.rglob("status.json")
    assert json.loads(path.read_text())["error"] == "ZeroDivisionError: division by zero"
    assert json.loads(path.read_text())["state"] == "failed"
    run = train("run_name=crashes", "trainer.limit_train_batches=1")
    assert (status(run.root)["state"], status(run.root)["error"]) == ("finished", None)


def test_speed_is_the_median_of_the_intervals_after_the_first(run, train_in):
    speed = run.results["speed"]
    logged = [float(row["speed/images_per_second"]) for row in read_rows(run) if "speed/images_per_second" in row]
    assert len(logged) == 20  # one a step
    assert speed["images_per_second"] == pytest.approx(statistics.median(logged[1:]))
    assert speed["step_seconds"] == pytest.approx(128 / statistics.median(logged[1:]))
    assert (speed["batch_size"], speed["devices"], speed["device"]) == (128, 1, "cpu")


def test_memory_of_a_step_grows_with_the_batch_and_is_the_same_each_time(train, no_pictures):
    def memory(batch_size, name):
        run = train(f"data.batch_size={batch_size}", f"run_name={name}", "trainer.limit_train_batches=1", "test=false")
        return run.results["speed"]["peak_memory_bytes"]

    assert memory(32, "a") == memory(32, "b")
    # The scores' gradients are in it: 2 layers x 2 heads x 65 x 32 numbers per image are a fraction of an activation.
    assert 1.8 < memory(64, "c") / memory(32, "a2") < 2.2


def test_validation_ece_is_that_of_the_best_checkpoint(run, build_best):
    confidences, correct = build_best(run)
    edges = torch.linspace(0, 1, 16)
    expected = 0.0
    for low, high in itertools.pairwise(edges):
        inside = (confidences > low) & (confidences <= high)
        if inside.any():
            gap = correct[inside].float().mean() - confidences[inside].mean()
            expected += float(inside.float().mean() * gap.abs())
    assert run.results["val"]["ece"] == pytest.approx(expected, abs=1e-4)


@pytest.fixture
def build_best():
    """A function of a run: confidence in the predicted class, and whether it is right, of each validation image."""

    def predict(run):
        data = Digits(**{"image_size": None, "seed": 1})
        data.setup("fit")
        images, labels = data.sample("val", 10_000)
        net = build_net(plain(run.config)["model"], num_classes=10, image_size=32).eval()
        state = load(run.best)["state_dict"]
        net.load_state_dict({k.removeprefix("net."): v for k, v in state.items() if k.startswith("net.")})
        with torch.no_grad():
            probabilities = net(data.make_normalize()(images)).softmax(1)
        confidences, predicted = probabilities.max(1)
        return confidences, predicted == labels

    return predict


# Going on


FULL = (
    *("run_name=exact", "data.batch_size=32", "trainer.limit_train_batches=10", "trainer.max_epochs=3"),
    *("trainer.accumulate_grad_batches=2", "callbacks.checkpoint_every_n_steps=2", "callbacks.ema.enabled=true"),
    *("callbacks.ema.decay=0.9", "data.augment.mixup=0.4", "data.augment.policy=rand_augment"),
    *("data.augment.erasing=0.3", "model.drop_path_rate=0.2", "model.attention=entmax+strided"),
    *("model.attention_options.learnable_alpha=true", "model.proj_drop_rate=0.1"),
)


def stop_before_batch(monkeypatch, count):
    """Crash where the training's ``count``-th batch (from 0) would begin."""
    step, seen = Classifier.training_step, []

    def counted(self, *args):
        if len(seen) == count:
            raise StoppedError
        seen.append(args)
        return step(self, *args)

    monkeypatch.setattr(Classifier, "training_step", counted)
    return seen


@pytest.fixture(scope="module")
def uninterrupted(train_in, tmp_path_factory):
    return train_in(tmp_path_factory.mktemp("uninterrupted"), *FULL)


def without_speed(rows):
    return [{name: value for name, value in row.items() if not name.startswith("speed/")} for row in rows]


# Of 30 batches, two to a step, five steps to an epoch, checkpoints after steps 2, 4, 6, … and after each epoch.
@pytest.mark.parametrize(
    "stops",
    [
        [5],  # amid an accumulation, one step after a checkpoint
        [9],  # in the last step of an epoch
        [10],  # before the first batch of the second epoch
        [14, 6],  # in the second epoch, then amid what was done again
        [23, 3],  # twice amid an accumulation, one batch after the step where the second session began to save
        [29],  # in the very last batch
    ],
    ids=str,
)
def test_a_stopped_run_ends_as_if_it_had_not_been_stopped(train, no_pictures, monkeypatch, uninterrupted, stops):
    for stop in stops:
        with monkeypatch.context() as patch:
            stop_before_batch(patch, stop)
            with pytest.raises(StoppedError):
                train(*FULL)
    with monkeypatch.context() as patch:
        redone = stop_before_batch(patch, -1)
        resumed = train(*FULL)
    assert 0 < len(redone) < 30  # it went on rather than begin anew
    for name in ("last", "best"):
        ours, theirs = (load(run.root / "checkpoints" / f"{name}.ckpt") for run in (resumed, uninterrupted))
        assert same(ours["state_dict"], theirs["state_dict"])
        assert ours["global_step"] == theirs["global_step"]
        assert ours["epoch"] == theirs["epoch"]
    ours, theirs = load(resumed.last), load(uninterrupted.last)
    for part in ("current_model_state", "optimizer_states", "lr_schedulers", "averaging_state"):
        assert same(ours[part], theirs[part]), part
    assert without_speed(read_rows(resumed)) == without_speed(read_rows(uninterrupted))
    for run in (resumed, uninterrupted):
        assert sorted(path.name for path in run.last.parent.iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    for part in ("test", "val", "best_epoch", "steps", "epochs"):
        assert resumed.results[part] == uninterrupted.results[part]


def test_a_second_seed_ends_elsewhere(train, no_pictures, uninterrupted):
    other = train(*FULL, "seed=2")
    assert not same(load(other.last)["state_dict"], load(uninterrupted.last)["state_dict"])


def test_a_finished_run_repeats_nothing(train, no_pictures, monkeypatch):
    settings = ("run_name=done", "trainer.limit_train_batches=3", "model.attention=strided")
    first = train(*settings)
    before, rows = load(first.last), read_rows(first)
    steps = stop_before_batch(monkeypatch, -1)
    again = train(*settings)
    assert steps == []
    after = load(again.last)
    assert after["global_step"] == before["global_step"] == again.results["steps"] == 3
    assert same(after["state_dict"], before["state_dict"])
    assert without_speed(read_rows(again)) == without_speed(rows)
    assert again.results["test"] == first.results["test"]
    assert again.results["speed"] == first.results["speed"]


def test_more_epochs_go_on_with_a_named_run(train, no_pictures, monkeypatch):
    settings = ("run_name=longer", "trainer.limit_train_batches=3")
    train(*settings, "trainer.max_epochs=1")
    steps = stop_before_batch(monkeypatch, -1)
    longer = train(*settings, "trainer.max_epochs=2")
    assert len(steps) == 3
    assert (longer.results["epochs"], longer.results["steps"]) == (2, 6)
    assert [row["step"] for row in read_rows(longer) if "train/loss" in row] == list("012345")
    # What the shorter run scored at its end is not left amid the longer one.
    assert [row["step"] for row in read_rows(longer) if "test/acc" in row] == ["6"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("model.attention=fixed", "model.attention: strided → fixed"),
        ("optimizer.lr=5e-3", "optimizer.lr: 0.001 → 0.005"),
        ("callbacks.ema.enabled=true", "callbacks.ema"),
    ],
)
def test_another_configuration_under_the_same_name_is_refused_naming_the_key(train_in, run, change, named):
    before = {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="holds a run with another configuration") as refusal:
        train_in(run.root.parent.parent, *STRIDED, "experiment_name=layout", change)
    assert named in str(refusal.value)
    assert "overwrite=true" in str(refusal.value)
    assert {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()} == before


def test_overwrite_starts_anew_in_an_empty_folder(train, no_pictures, monkeypatch):
    settings = ("run_name=anew", "trainer.limit_train_batches=3")
    first = train(*settings)
    (first.root / "results" / "left_over").touch()
    steps = stop_before_batch(monkeypatch, -1)
    second = train(*settings, "optimizer.lr=5e-3", "overwrite=true")
    assert len(steps) == 3
    assert not (first.root / "results" / "left_over").exists()
    assert yaml.safe_load((second.root / "config.yaml").read_text())["optimizer"]["lr"] == 5e-3
    assert len(read_rows(second)) == 4


def test_overwrite_leaves_a_folder_that_is_no_run_alone(train, no_pictures, tmp_path):
    folder = tmp_path / "runs" / "default" / "mine"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("precious")
    train("run_name=mine", "overwrite=true", "trainer.limit_train_batches=1")
    assert (folder / "thesis.txt").read_text() == "precious"


# What it computes


def test_best_checkpoint_holds_the_averaged_weights(uninterrupted):
    last = load(uninterrupted.last)
    averaged = last["state_dict"]
    raw = last["current_model_state"]
    assert averaged.keys() == {key.removeprefix("module.") for key in raw}
    gaps = [(averaged[key] - raw[key]).abs().max() for key in raw if raw[key].is_floating_point()]
    assert max(gaps) > 1e-4


def test_averaged_weights_are_the_decayed_sum_of_the_steps(train, no_pictures, monkeypatch):
    history = []

    def remember(self, trainer, pl_module, *args):
        history.append({key: value.detach().clone() for key, value in pl_module.net.named_parameters()})

    monkeypatch.setattr(EpochLines, "on_train_batch_end", remember, raising=False)
    run = train("callbacks.ema.enabled=true", "callbacks.ema.decay=0.7", "trainer.limit_train_batches=4")
    average = history[0]
    for weights in history[1:]:
        average = {key: 0.7 * average[key] + 0.3 * weights[key] for key in average}
    saved = load(run.best)["state_dict"]
    for key, value in average.items():
        torch.testing.assert_close(saved[f"net.{key}"], value, atol=1e-6, rtol=1e-5)
        assert key == "blocks.0.norm1.bias" or not torch.equal(value, history[-1][key]), key


@pytest.mark.parametrize(("key", "value"), [("patience", "x"), ("wait_count", None), ("best_score", [1])])
def test_early_stopping_refuses_what_it_would_stumble_over_at_the_end_of_an_epoch(key, value):
    callback = ResumableEarlyStopping(monitor="val/acc", mode="max")
    state = callback.state_dict()
    callback.load_state_dict(state)
    with pytest.raises(TypeError):
        callback.load_state_dict({**state, key: value})


def test_early_stopping_stops(train, no_pictures):
    run = train(
        *("trainer.max_epochs=50", "trainer.limit_train_batches=2", "optimizer.lr=0.0", "test=false"),
        *("callbacks.early_stopping.enabled=true", "callbacks.early_stopping.patience=2"),
    )
    assert run.results["epochs"] == 3  # the first sets the mark, two more do not beat it


def test_fit_never_reads_the_test_split_and_test_reads_it_once(train, no_pictures, monkeypatch):
    asked, loader, fitting = [], Digits.test_dataloader, [True]
    end = Classifier.on_train_end

    def counted(self):
        asked.append("fit" if fitting[0] else "test")
        return loader(self)

    def ended(self):
        fitting[0] = False
        return end(self)

    monkeypatch.setattr(Digits, "test_dataloader", counted)
    monkeypatch.setattr(Classifier, "on_train_end", ended)
    train("trainer.limit_train_batches=2", "run_name=tested")
    assert asked == ["test"]
    asked.clear()
    fitting[0] = True
    untested = train("trainer.limit_train_batches=2", "test=false", "run_name=untested")
    assert asked == []
    assert "test" not in untested.results
    assert not any(name.startswith("test/") for row in read_rows(untested) for name in row)


def test_ctrl_c_is_one_line_and_status_130(command, tiny, tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)

    def interrupt(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Classifier, "training_step", interrupt)
    try:
        done = command("train", *tiny, f"experiments_dir={tmp_path}")
    except SystemExit as ended:
        pytest.fail(f"ended with status {ended.code} and without a word")
    finally:
        signal.signal(signal.SIGINT, handler)
    assert done.status == 130
    assert done.err == "interrupted: the same command goes on from the last checkpoint\n"
