"""Callbacks: throughput, a line per epoch, and a look at the attention of a fixed batch."""

import logging
import time
from pathlib import Path
from statistics import median
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from vit_attn.attention import attention_layers
from vit_attn.data.checks import whole
from vit_attn.errors import UserError
from vit_attn.explain.probe import default_layers, look, write_panels
from vit_attn.tracking.loggers import log_pictures
from vit_attn.training.module import Classifier
from vit_attn.training.sharding import whole_net

log = logging.getLogger("vit_attn")


class Throughput(Callback):
    """Log ``speed/images_per_second`` over all processes, validation and checkpoints left out."""

    def __init__(self) -> None:
        self.images = self.steps = 0
        self.since = 0.0
        self.intervals: list[tuple[float, float]] = []  # images per second, seconds per batch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(time.perf_counter())

    def _begin(self, now: float) -> None:
        self.images, self.steps, self.since = 0, 0, now

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.images += len(batch[0]) * trainer.world_size
        self.steps += 1
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by the Trainer's logger connector
        if (batch_idx + 1) % every == 0 or trainer.is_last_batch:
            now = time.perf_counter()
            taken = now - self.since
            self.intervals.append((self.images / taken, taken / self.steps))
            pl_module.log("speed/images_per_second", self.images / taken, prog_bar=True)
            self._begin(now)

    def medians(self) -> dict[str, float]:
        """``images_per_second`` and ``step_seconds``, over the logging intervals since this process began.

        The first interval, in which kernels are compiled and caches filled, counts only where there is no other.
        """
        intervals = self.intervals[1:] or self.intervals
        if not intervals:
            return {}
        images, seconds = zip(*intervals, strict=True)
        return {"images_per_second": median(images), "step_seconds": median(seconds)}


class EpochLines(Callback):
    """Write a line per epoch to the log, which is all that a terminal without a progress bar shows."""

    @rank_zero_only
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        shown = [f"{name} {metrics[name]:.4f}" for name in ("train/loss", "val/loss", "val/acc") if name in metrics]
        shown.append(f"{metrics.get('speed/images_per_second', 0):,.0f} images/s")
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else "?"
        log.info("epoch %3d/%s  %s", trainer.current_epoch + 1, epochs, "  ".join(shown))


class AttentionProbe(Callback):
    """Look at the attention of a fixed batch of validation images after validation.

    Logs per layer ``attention/zeros``, ``attention/entropy`` (nats), ``attention/support`` (keys per query) and,
    where it is learned, ``attention/alpha`` per head. Draws heatmap panels now and then.

    Args:
        num_images: images of the probe batch, spread evenly over the validation split.
        every_n_epochs: how often the numbers are logged.
        pictures_every_n_epochs: how often panels are drawn.
        picture_images: images on a panel.
        layers: indices of the layers that are drawn; None: the first, the middle and the last.
        folder: where panels go; set by the run.

    Raises:
        UserError: numbers below 1, or a layer that the model does not have.
    """

    def __init__(
        self,
        *,
        num_images: int = 8,
        every_n_epochs: int = 1,
        pictures_every_n_epochs: int = 10,
        picture_images: int = 4,
        layers: list[int] | None = None,
        folder: str | Path = "attention",
    ) -> None:
        counts = {
            "num_images": num_images,
            "every_n_epochs": every_n_epochs,
            "pictures_every_n_epochs": pictures_every_n_epochs,
            "picture_images": picture_images,
        }
        for name, value in counts.items():
            whole(name, value, least=1, prefix="callbacks.attention_probe.")
        self.num_images, self.picture_images = num_images, min(picture_images, num_images)
        self.every, self.pictures_every = every_n_epochs, pictures_every_n_epochs
        self.layers = None if layers is None else list(layers)
        self.folder = Path(folder)

    def check_layers(self, net: nn.Module) -> None:
        """Refuse layers that ``net`` does not have.

        Raises:
            UserError: naming the first of them.
        """
        depth = len(attention_layers(net))
        wrong = [layer for layer in self.layers or [] if not 0 <= layer < depth]
        if wrong:
            raise UserError(f"callbacks.attention_probe.layers: there is no layer {wrong[0]} in 0 … {depth - 1}")

    # Before on_validation_epoch_end of the EMA callback, which takes the averaged weights away again.
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        epoch = trainer.current_epoch + 1
        draw = epoch % self.pictures_every == 0
        # After the fit, the best weights are validated once more: that is no epoch.
        if trainer.state.fn == TrainerFn.FITTING and (draw or epoch % self.every == 0):
            self._look(trainer, pl_module, whole_net(pl_module.net), epoch=epoch, draw=draw)

    @rank_zero_only
    def _look(self, trainer: Trainer, pl_module: Classifier, net: nn.Module, *, epoch: int, draw: bool) -> None:
        images, _ = trainer.datamodule.sample("val", self.num_images)  # type: ignore[attr-defined]
        layers = self.layers if self.layers is not None else default_layers(net)
        seen = look(net, pl_module.normalize, images, layers=layers if draw else [])
        pl_module.log_dict(seen.metrics(), rank_zero_only=True)
        if draw:
            names = {"note": f"epoch {epoch}", "suffix": f"_epoch_{epoch:04d}"}
            paths = write_panels(seen, images, self.folder, count=self.picture_images, **names)
            for layer, path in paths.items():
                log_pictures(trainer.loggers, f"attention/layer_{layer:02d}", [path], step=trainer.global_step)
