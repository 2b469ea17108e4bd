"""Data that change, losses that are no numbers, too little memory, a folder in use, a clock that goes back."""

import json
import os
import re
import resource
import shutil
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jobs
import pytest
import torch
from PIL import Image

from vit_attn.training.checkpoint import load_checkpoint


def last_line(ended, status=2):
    """What a command that failed said of it, which is one line on top of what it had logged."""
    assert ended.status == status, ended.said
    assert "Traceback" not in ended.said
    return ended.said.splitlines()[-1]


def last_step(folder):
    return load_checkpoint(jobs.folder_of(folder) / "checkpoints" / "last.ckpt")["global_step"]


# Data


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of images: 2 classes of 48 to train, 8 to test."""
    root = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 48), ("test", 8)):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(folder / f"{number:02d}.png")
    return root


# Read from the disk in every epoch; 2 epochs of 5 steps of 8 images.
STREAMED = (
    *("data=imagefolder", "data.cache_budget=0", "data.batch_size=8", "trainer.limit_train_batches=5"),
    *("trainer.max_epochs=2", "trainer.accumulate_grad_batches=1", "callbacks.checkpoint_every_n_steps=1"),
)


@pytest.fixture(scope="module")
def undisturbed_photos(tmp_path_factory, photos):
    folder = tmp_path_factory.mktemp("undisturbed_photos")
    ended = jobs.run(folder, *jobs.EVERYTHING, *STREAMED, f"data.root={photos}")
    assert ended.status == 0, ended.said
    return folder


@dataclass
class SpoilPhotos:
    """What happens to every second training image, and so to some of any batch."""

    root: Path
    how: str

    def __call__(self):
        for path in sorted((self.root / "train").rglob("*.png"))[::2]:
            if self.how == "gone":
                path.unlink()
            elif self.how == "cut short":
                path.write_bytes(path.read_bytes()[:100])
            else:
                Image.new("RGB", (16, 16), "red").save(path)


@pytest.mark.faults("data files gone, cut short or replaced amid a run")
@pytest.mark.parametrize("workers", [pytest.param(0, marks=jobs.SLOW), 2])
@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("replaced", "has changed since"),
        pytest.param("gone", "No such file", marks=jobs.SLOW),
        pytest.param("cut short", "has changed since", marks=jobs.SLOW),
    ],
)
def test_data_that_change_stop_the_run_until_they_are_back(tmp_path, photos, undisturbed_photos, how, why, workers):
    ours = tmp_path / "photos"
    shutil.copytree(photos, ours)
    settings = (*jobs.EVERYTHING, *STREAMED, f"data.num_workers={workers}", f"data.root={ours}")
    ended = jobs.run(tmp_path, *settings, faults=[jobs.BeforeBatch(6, SpoilPhotos(ours, how))])
    assert re.search(rf"^error: .*image {ours}/train/(cat|dog)/\d\d\.png.*{why}", last_line(ended))
    assert last_step(tmp_path) >= 6  # amid the second epoch
    if how == "replaced":  # between two runs, too: the sizes are not what they were
        assert "the train images are not those that this run began with" in last_line(jobs.run(tmp_path, *settings))
    shutil.rmtree(ours)
    shutil.copytree(photos, ours)
    assert jobs.run(tmp_path, *settings).status == 0
    ours, theirs = (jobs.checkpoint(folder, "last.ckpt") for folder in (tmp_path, undisturbed_photos))
    for part in ("state_dict", "optimizer_states", "current_model_state"):
        assert jobs.differences(ours[part], theirs[part]) == []


# Losses that are no numbers


@dataclass
class Poison:
    """Make a loss, or the gradient only, of one batch something that is no number, unless the batch is left out."""

    epoch: int
    batch: int
    value: float
    what: str = "loss"

    def __call__(self):
        from vit_attn.training.module import Classifier

        step = Classifier.training_step

        def poisoned(module, batch, batch_idx):
            loss = step(module, batch, batch_idx)
            place = (module.current_epoch, batch_idx)
            if place == (self.epoch, self.batch) and place not in module.left_out:
                if self.what == "loss":
                    return loss * self.value
                loss.register_hook(lambda gradient: gradient * self.value)
            return loss

        Classifier.training_step = poisoned


def leave_out(places):
    """Leave batches out from the beginning, without the run's own means."""
    from vit_attn.training.module import Classifier

    Classifier.left_out = property(lambda module: places, lambda module, value: None)


BAD = [("loss", "nan"), pytest.param("loss", "inf", marks=jobs.SLOW), pytest.param("gradient", "nan", marks=jobs.SLOW)]


@pytest.mark.faults("loss or gradient NaN or infinite")
@pytest.mark.parametrize(("what", "value"), BAD)
def test_a_loss_that_is_no_number_stops_with_the_step_and_keeps_what_is_good(tmp_path, undisturbed, what, value):
    ended = jobs.run(tmp_path, *jobs.EVERYTHING, faults=[Poison(1, 5, float(value), what)])
    # The sixth batch of the second epoch, in the step after 5 of the first epoch and 2 of this one.
    which = "batches 5 to 6" if what == "gradient" else "batch 6"
    found = f"the {what} is {value} in step 7 ({which}"
    last = jobs.folder_of(tmp_path) / "checkpoints" / "last.ckpt"
    message = last_line(ended)
    assert message.startswith(f"error: {found} of epoch 2); {last} is from before it. ")
    assert "trainer.on_nan=rewind goes back and leaves the batch out" in message
    assert last_step(tmp_path) == 6
    status = json.loads((jobs.folder_of(tmp_path) / "results" / "status.json").read_text())
    assert status["state"] == "failed"
    assert found in status["error"]
    assert jobs.run(tmp_path, *jobs.EVERYTHING).status == 0
    jobs.assert_same(tmp_path, undisturbed)


@pytest.mark.faults("loss or gradient NaN or infinite, trainer.on_nan=rewind")
@pytest.mark.parametrize(("what", "value"), BAD)
def test_rewinding_is_the_same_as_never_having_seen_the_batch(tmp_path, what, value):
    poison = Poison(1, 5, float(value), what)
    skipped = {(1, 4), (1, 5)} if what == "gradient" else {(1, 5)}
    rewound = jobs.run(tmp_path / "rewound", *jobs.EVERYTHING, "trainer.on_nan=rewind", faults=[poison])
    assert rewound.status == 0, rewound.said
    assert re.search(
        rf"^rewind     the {what} is {value} in step 7 .*: left out from now on; .*last\.ckpt", rewound.said, re.M
    )
    without = jobs.run(tmp_path / "without", *jobs.EVERYTHING, faults=[partial(leave_out, skipped)])
    assert without.status == 0, without.said
    for name in ("last.ckpt", "best.ckpt"):
        ours, theirs = (jobs.checkpoint(tmp_path / folder, name) for folder in ("rewound", "without"))
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "current_model_state", "global_step"):
            assert jobs.differences(ours[part], theirs[part]) == []
    assert jobs.rows(tmp_path / "rewound") == jobs.rows(tmp_path / "without")
    results = json.loads((jobs.folder_of(tmp_path / "rewound") / "results" / "metrics.json").read_text())
    assert {(entry["epoch"], entry["batch"]) for entry in results["skipped_batches"]} == skipped


@pytest.mark.slow
@pytest.mark.faults("loss or gradient NaN or infinite, trainer.on_nan=rewind")
def test_a_training_that_diverges_is_not_rewound_for_ever(tmp_path):
    ended = jobs.run(tmp_path, *jobs.EVERYTHING, "trainer.on_nan=rewind", "optimizer.lr=1e30")
    assert re.search(r"after \d+ batches that were left out for the same: this training diverges", last_line(ended))


# Memory


def little_memory():
    """Leave this process a quarter of a GiB of address space more than it has."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**28, -1))


@pytest.mark.faults("out of memory")
def test_no_memory_is_one_line_that_says_what_to_change(tmp_path):
    big = (
        "data.batch_size=1200",
        "model.attention=softmax",
        "model.embed_dim=128",
        "trainer.accumulate_grad_batches=1",
    )
    ended = jobs.run(tmp_path, *jobs.EVERYTHING, *big, faults=[jobs.BeforeBatch(0, little_memory)])
    message = last_line(ended)
    assert message.startswith("error: out of memory (")
    assert "data.batch_size=600 with trainer.accumulate_grad_batches=2 sees as many images per step" in message
    assert "trainer.precision=bf16-mixed" in message


# One folder, two processes


def wait_for_ever():
    print("waiting", flush=True)
    time.sleep(600)


@pytest.mark.faults("two processes on one run folder")
def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path, undisturbed):
    first = jobs.Job(tmp_path, *jobs.EVERYTHING, faults=[jobs.BeforeBatch(12, wait_for_ever)])
    first.wait_for("waiting")
    before = {path: path.read_bytes() for path in jobs.folder_of(tmp_path).rglob("*") if path.is_file()}
    second = jobs.run(tmp_path / "second", *jobs.EVERYTHING, f"experiments_dir={tmp_path}")
    assert re.search(
        rf"^error: .*default/run: this run is going on already, in process {first.process.pid} on \S+ since \d{{4}}-",
        last_line(second, 75),
    )
    also = jobs.run(tmp_path / "second", *jobs.EVERYTHING, f"experiments_dir={tmp_path}", "overwrite=true")
    assert "going on already" in last_line(also, 75)
    assert {path: path.read_bytes() for path in jobs.folder_of(tmp_path).rglob("*") if path.is_file()} == before
    first.send(signal.SIGKILL)
    assert first.end().status == -signal.SIGKILL
    assert jobs.run(tmp_path, *jobs.EVERYTHING).status == 0
    jobs.assert_same(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.faults("two processes on one run folder")
def test_the_readers_that_a_dead_owner_leaves_do_not_keep_its_lock(tmp_path, photos):
    settings = (*jobs.EVERYTHING, *STREAMED, "data.num_workers=2", f"data.root={photos}")
    first = jobs.Job(tmp_path, *settings, faults=[jobs.BeforeBatch(6, wait_for_ever)])
    first.wait_for("waiting")
    first.send(signal.SIGKILL)
    first.end()
    assert jobs.run(tmp_path, *settings).status == 0


# The clock


def clock_that_goes_back():
    """Each look at the clock on the wall finds it an hour earlier than the one before."""
    start = time.time()
    looks = [0]

    def earlier():
        looks[0] += 1
        return start - 3600.0 * looks[0]

    time.time = earlier
    time.time_ns = lambda: int(earlier() * 1e9)


@pytest.mark.slow
@pytest.mark.faults("clock going backwards")
def test_a_clock_that_goes_back_changes_nothing(tmp_path, undisturbed):
    by_time = ("callbacks.checkpoint_every_n_steps=null", "callbacks.checkpoint_every_n_minutes=0.01")
    slow = jobs.BeforeBatch(16, partial(time.sleep, 1))  # longer than the time between two checkpoints
    killed = jobs.run(
        tmp_path,
        *(*jobs.EVERYTHING, *by_time),
        faults=[clock_that_goes_back, slow, jobs.BeforeBatch(19, partial(os._exit, 7))],
    )
    assert killed.status == 7, killed.said
    assert last_step(tmp_path) > 5  # so there was one amid the second epoch, by time
    assert jobs.run(tmp_path, *jobs.EVERYTHING, faults=[clock_that_goes_back]).status == 0
    jobs.assert_same(tmp_path, undisturbed)
