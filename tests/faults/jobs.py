"""Runs of the training command that a test can break: each in a process of its own, forked with everything imported."""

import csv
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import vit_attn.training.run
from vit_attn.console import run_command
from vit_attn.training.module import Classifier

ROOT = Path(__file__).parent.parent.parent
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["pytest", "sklearn.datasets", "vit_attn.training.run"])

SLOW = pytest.mark.slow
# All that a run that goes on must take up again: 3 epochs of 5 optimizer steps, of 2 batches each.
EVERYTHING = (
    *("data=digits", "trainer=cpu", "logger=none", "model.depth=2", "model.embed_dim=32", "model.num_heads=2"),
    *("run_name=run", "data.batch_size=32", "trainer.limit_train_batches=10", "trainer.max_epochs=3"),
    *("trainer.log_every_n_steps=1", "trainer.accumulate_grad_batches=2", "callbacks.checkpoint_every_n_steps=2"),
    *("callbacks.ema.enabled=true", "callbacks.ema.decay=0.9", "data.augment.mixup=0.4", "data.augment.erasing=0.3"),
    *("model.drop_path_rate=0.2", "model.proj_drop_rate=0.1", "model.attention=entmax+strided"),
    *("model.attention_options.learnable_alpha=true", "callbacks.early_stopping.enabled=true"),
    *("callbacks.early_stopping.patience=3", "explain_images=0", "callbacks.attention_probe.num_images=2"),
    "callbacks.attention_probe.pictures_every_n_epochs=1000",
)

going_on: list["Job"] = []


@dataclass
class Ended:
    """How a command ended: its status, negative for the signal that killed it, and all that it said."""

    status: int
    said: str


class Job:
    """A command that is going on.

    Args:
        folder: for the run, and for what the command says.
        overrides: of its configuration.
        faults: called in its process before it begins.
    """

    def __init__(self, folder: Path, *overrides: str, faults: Sequence[Callable[[], object]] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.output = folder / "said.txt"
        self.output.unlink(missing_ok=True)
        arguments = (f"experiments_dir={folder}", *overrides)
        self.process = _processes.Process(target=_command, args=(arguments, self.output, tuple(faults)))
        self.process.start()
        going_on.append(self)

    @property
    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def send(self, signum: int) -> None:
        """Send a signal to the process, unless it has ended."""
        if self.process.is_alive():
            os.kill(self.process.pid, signum)

    def wait_for(self, words: str, seconds: float = 60) -> None:
        """Wait until the command has said ``words``."""
        end = time.monotonic() + seconds
        while words not in self.said:
            assert time.monotonic() < end, f"{words!r} never came: {self.said}"
            assert self.process.is_alive(), f"it ended before {words!r}: {self.said}"
            time.sleep(0.01)

    def kill(self) -> None:
        """Kill the process, and those that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()

    def end(self, seconds: float = 240) -> Ended:
        """Wait for its end."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.kill()
            raise AssertionError(f"it hangs: {self.said}")
        return Ended(self.process.exitcode, self.said)


def _command(arguments: tuple[str, ...], output: Path, faults: tuple[Callable[[], object], ...]) -> None:
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # of the readers, as in a command of its own
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    sys.argv = ["train.py", *arguments]
    for picture in ("write_panels", "write_masks"):  # half of the time of so small a run
        setattr(vit_attn.training.run, picture, lambda *_, **__: {})
    for fault in faults:
        fault()
    sys.exit(run_command(lambda: vit_attn.training.run.train(_compose(arguments))))


def _compose(arguments: tuple[str, ...]) -> Any:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", list(arguments))


def run(folder: Path, *overrides: str, faults: Sequence[Callable[[], object]] = ()) -> Ended:
    """Run the command to its end."""
    return Job(folder, *overrides, faults=faults).end()


# Faults that are pickled into a job


@dataclass
class KillAtFileEvent:
    """SIGKILL before the ``number``-th time (from 1) that the process changes what is in a folder.

    0 kills at none, and writes how many there were into ``count``.
    """

    folder: Path
    number: int
    count: Path | None = None

    def __call__(self) -> None:
        seen = 0
        inside = str(self.folder)

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event == "open":
                changes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            else:
                changes = event in ("os.rename", "os.remove", "os.mkdir")
            if not changes or not isinstance(arguments[0], (str, Path)) or not str(arguments[0]).startswith(inside):
                return
            seen += 1
            if seen == self.number:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.count is not None:
                descriptor = os.open("/dev/null", os.O_RDONLY)
                os.close(descriptor)
                Path(self.count).write_text(str(seen))

        sys.addaudithook(watch)


@dataclass
class BeforeBatch:
    """Call ``fault`` before the ``number``-th training batch of the process, from 0."""

    number: int
    fault: Callable[[], object]

    def __call__(self) -> None:
        step, seen = Classifier.training_step, []

        def counted(module: Classifier, *batch: Any) -> Any:
            if len(seen) == self.number:
                self.fault()
            seen.append(1)
            return step(module, *batch)

        Classifier.training_step = counted


# What a run has left


def folder_of(folder: Path) -> Path:
    """The run folder of a job."""
    return folder / "default" / "run"


def rows(folder: Path) -> list[dict[str, str]]:
    """The run's logs/metrics.csv without the columns that say how fast it was."""
    with (folder_of(folder) / "logs" / "metrics.csv").open(newline="") as file:
        return [
            {name: value for name, value in row.items() if not name.startswith("speed/")}
            for row in csv.DictReader(file)
        ]


def checkpoint(folder: Path, name: str) -> dict[str, Any]:
    """A checkpoint of the run, in which the run folder is named "RUN", and which does not say how often it is saved."""
    loaded = torch.load(folder_of(folder) / "checkpoints" / name, weights_only=True)
    for key in ("checkpoint_every_n_steps", "checkpoint_every_n_minutes"):
        del loaded["vit_attn"]["config"]["callbacks"][key]
    return _renamed(loaded, str(folder))


def _renamed(value: Any, folder: str) -> Any:
    if isinstance(value, dict):
        return {_renamed(key, folder): _renamed(each, folder) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_renamed(each, folder) for each in value]
    return value.replace(folder, "RUN") if isinstance(value, str) else value


def differences(ours: Any, theirs: Any, where: str = "") -> list[str]:
    """Names of what is not the same to the bit in two checkpoints."""
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        same = ours.dtype == theirs.dtype and ours.shape == theirs.shape
        return [] if same and ours.numpy().tobytes() == theirs.numpy().tobytes() else [where]
    if isinstance(ours, dict) and isinstance(theirs, dict):
        missing = [f"{where}.{key}: only one has it" for key in ours.keys() ^ theirs.keys()]
        return missing + [
            found
            for key in ours.keys() & theirs.keys()
            for found in differences(ours[key], theirs[key], f"{where}.{key}")
        ]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [
            found
            for place, pair in enumerate(zip(ours, theirs, strict=True))
            for found in differences(*pair, f"{where}[{place}]")
        ]
    return [] if ours == theirs else [f"{where}: {ours!r} and {theirs!r}"]


def assert_same(ours: Path, theirs: Path) -> None:
    """Assert that two runs ended the same: checkpoints, logs and results, to the bit, and nothing half-made is left."""
    for name in ("last.ckpt", "best.ckpt"):
        assert differences(checkpoint(ours, name), checkpoint(theirs, name)) == []
    assert rows(ours) == rows(theirs)
    results = [json.loads((folder_of(folder) / "results" / "metrics.json").read_text()) for folder in (ours, theirs)]
    for name in ("val", "test", "epochs", "steps", "best_epoch", "best_step", "checkpoint", "attention_statistics"):
        assert results[0][name] == results[1][name], name
    assert json.loads((folder_of(ours) / "results" / "status.json").read_text())["state"] == "finished"
    assert list(folder_of(ours).rglob("*.part")) == []
