"""What ``train.py`` adds to a training step: Lightning, callbacks and loggers, against a bare loop.

    python -m vit_attn.bench step
    python -m vit_attn.bench step --batch-sizes 32 --rounds 20

Both loops run in one process and take turns, an epoch each, over the same batches of the same epoch, augmented alike,
with the same model, loss, optimizer, schedule and clipping: on a CPU they end with the same weights, up to rounding.
A measurement is the mean time from the beginning of a step to that of the next; the first two steps of an epoch,
validation, checkpoints and set-up are left out. The model has 64 tokens and 0.45 M parameters, as in the demo.
"""

import argparse
import copy
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from omegaconf import DictConfig

from vit_attn.arguments import whole
from vit_attn.bench.output import Column, ConsoleProgress, Spread, Table, milliseconds
from vit_attn.bench.timing import Timing, quartiles, synchronize
from vit_attn.config import plain
from vit_attn.data import ImageData, Images
from vit_attn.tracking.loggers import finish_loggers
from vit_attn.training.build import build_data, build_loss, build_module, build_net, build_trainer
from vit_attn.training.folder import RunFolder
from vit_attn.training.module import build_optimizer, build_schedule, step_seed
from vit_attn.training.stopping import StopSignals

QUICK = {"batch_sizes": [4], "steps": 22}
TARGET = 3.0  # percent
_CONF = Path(__file__).parents[2] / "conf"
_UNCOUNTED = 2  # steps at the beginning of an epoch
_MODEL = ("model.embed_dim=96", "model.depth=4", "model.num_heads=3", "model.class_token=false")


class RandomImages(ImageData):
    """``num_images`` training images of noise, 32 pixels per side, in ten classes; 32 for validation and test each."""

    default_image_size = 32
    default_mean = (0.5, 0.5, 0.5)
    default_std = (0.25, 0.25, 0.25)

    def __init__(self, *, num_images: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.num_images = num_images

    def find_classes(self) -> list[str]:
        """0 to 9."""
        return [str(number) for number in range(10)]

    def has_val(self) -> bool:
        """Nothing is carved from the training images."""
        return True

    def load_train(self) -> Images:
        """``num_images`` of them."""
        return self._noise(self.num_images)

    def load_val(self) -> Images:
        """32 images."""
        return self._noise(32)

    def load_test(self) -> Images:
        """32 images."""
        return self._noise(32)

    def _noise(self, count: int) -> Images:
        draw = torch.Generator().manual_seed(self.seed)
        pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=draw)
        return self.in_memory(pixels, torch.randint(0, 10, (count,), generator=draw))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    parser.add_argument("--batch-sizes", type=_batch_sizes, default=[32, 128], help="images (default: 32,128)")
    # Two steps more than twice the loggers' interval, so that their share of the time is what it is in a long run.
    parser.add_argument("--steps", type=whole(4, 10_000), default=42, help="per epoch (default: %(default)s)")


def _batch_sizes(text: str) -> list[int]:
    return list(dict.fromkeys(whole(1, 4096)(size.strip()) for size in text.split(",")))


def run(args: argparse.Namespace) -> list[Table]:
    """Measure every batch size."""
    columns = (
        *(Column("batch"), Column("bare loop", "ms/step"), Column("train.py", "ms/step")),
        *(Column("overhead", "%"), Column("target", "%"), Column("met", words=True)),
    )
    table = Table("training step: train.py against a bare loop", columns)
    table.note(f"{args.steps - _UNCOUNTED} steps per measurement; default callbacks, CSV and W&B (offline) loggers.")
    for batch_size in args.batch_sizes:
        bare, full = measure(batch_size, steps=args.steps, rounds=args.rounds, seed=args.seed, device=args.device)
        ratios = zip(full.seconds, bare.seconds, strict=True)
        overhead = Spread(*quartiles([100 * (mine / plainly - 1) for mine, plainly in ratios]))
        cells = {"batch": batch_size, "bare loop": milliseconds(bare), "train.py": milliseconds(full)}
        met = "yes" if overhead.median <= TARGET else "no"
        table.add({**cells, "overhead": overhead, "target": TARGET, "met": met}, [bare, full])
    return [table]


def measure(batch_size: int, *, steps: int, rounds: int, seed: int, device: torch.device) -> tuple[Timing, Timing]:
    """Seconds per step of the bare loop and of ``train.py``, one number per epoch, after one epoch of warm-up."""
    with tempfile.TemporaryDirectory(prefix="vit_attn_bench_") as folder, StopSignals() as signals, _quiet():
        config = _config(folder, batch_size, steps=steps, epochs=rounds + 1, seed=seed, device=device)
        data = build_data(config.data, seed)
        data.setup("fit")
        seed_everything(seed, verbose=False)
        net = build_net(plain(config.model), num_classes=data.num_classes, image_size=data.image_size)
        turns = Turns(BareLoop(config, data, copy.deepcopy(net), device), f"batches of {batch_size}", rounds + 1)
        place = RunFolder.of(config)
        place.create(config)
        trainer = build_trainer(config, place, None, signals)
        trainer.callbacks.append(turns)  # type: ignore[attr-defined]  # last: its clock starts after the others
        trainer.fit(build_module(config, net, data), datamodule=data)
        finish_loggers(trainer.loggers, failed=False)
    return Timing("bare loop", tuple(turns.bare[1:])), Timing("train.py", tuple(turns.full[1:]))


def _config(folder: str, batch_size: int, *, steps: int, epochs: int, seed: int, device: torch.device) -> DictConfig:
    with initialize_config_dir(str(_CONF), version_base="1.3"):
        return compose(
            "config",
            [
                *_MODEL,
                "model.global_pool=avg",
                "data._target_=vit_attn.bench.step.RandomImages",
                f"+data.num_images={batch_size * steps}",
                f"data.batch_size={batch_size}",
                f"trainer={'gpu' if device.type == 'cuda' else 'cpu'}",
                "trainer.precision=32-true",
                "trainer.enable_progress_bar=false",
                f"trainer.max_epochs={epochs}",
                f"experiments_dir={folder}",
                "logger.mode=offline",
                f"seed={seed}",
            ],
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that a run writes per epoch."""
    log = logging.getLogger("vit_attn")
    handlers, level = list(log.handlers), log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
        for handler in [handler for handler in log.handlers if handler not in handlers]:
            log.removeHandler(handler)
            handler.close()


class BareLoop:
    """The same training in a dozen lines of torch: no logging, no checkpoints."""

    def __init__(self, config: DictConfig, data: ImageData, net: torch.nn.Module, device: torch.device) -> None:
        self.net, self.device, self.seed = net.to(device).train(), device, config.seed
        self.loader, self.augment = data.train_dataloader(), data.make_augment()
        self.normalize, self.criterion = data.make_normalize().to(device), build_loss(config.loss)
        self.clip = config.trainer.gradient_clip_val
        self.optimizer = build_optimizer(self.net, config.optimizer)
        # in the optimizer's order, as Lightning has them: the norm's last bit depends on it
        self.clipped = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        total = len(self.loader) * config.trainer.max_epochs
        self.schedule = build_schedule(self.optimizer, config.lr_schedule, total=total)

    def epoch(self, number: int) -> list[float]:
        """Train for an epoch; return when each step began."""
        self.loader.sampler.set_epoch(number)  # type: ignore[attr-defined]  # see ImageData.train_dataloader
        began = []
        for step, batch in enumerate(self.loader):
            began.append(_now(self.device))
            torch.manual_seed(step_seed(self.seed, number, step, 0))
            images, targets = self.augment(*(part.to(self.device) for part in batch))
            loss = self.criterion(self.net(self.normalize(images)), targets)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.clipped, self.clip)
            self.optimizer.step()
            self.schedule.step()
        return began


class Turns(Callback):
    """After each epoch of the Trainer, the bare loop's turn over the same batches.

    Attributes:
        full: seconds per step of the Trainer, one number per epoch.
        bare: those of the bare loop.
    """

    def __init__(self, loop: BareLoop, title: str, epochs: int) -> None:
        self.loop, self.full, self.bare = loop, [], []  # type: ignore[var-annotated]
        self.began: list[float] = []
        self.progress = ConsoleProgress(title)
        self.progress.start(epochs)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.began.append(_now(self.loop.device))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.full.append(_mean_step(self.began))
        self.began = []
        self.bare.append(_mean_step(self.loop.epoch(trainer.current_epoch)))
        self.progress.step(f"epoch {trainer.current_epoch + 1}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.progress.stop()


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


def _mean_step(began: list[float]) -> float:
    durations = [after - before for before, after in pairwise(began[_UNCOUNTED:])]
    return sum(durations) / len(durations)
