"""A loss or a gradient that is NaN or infinite: found before it is saved, and the batch that caused it named."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, distributed

from vit_attn.errors import UserError
from vit_attn.training.module import Classifier

ON_NAN = ("stop", "rewind")
# A training that leaves out more than this does not have bad batches, it diverges.
MOST_SKIPPED = 10


class NotFiniteError(UserError):
    """A step whose loss or gradient is NaN or infinite.

    Args:
        what: "the loss is nan".
        step: the optimizer step, from 0.
        epoch: from 0.
        batches: of the epoch, from 0, that may have caused it; more than one where gradients are accumulated.
    """

    def __init__(self, what: str, *, step: int, epoch: int, batches: range) -> None:
        which = f"batch {batches[0] + 1}" if len(batches) == 1 else f"batches {batches[0] + 1} to {batches[-1] + 1}"
        super().__init__(f"{what} in step {step} ({which} of epoch {epoch + 1})")
        self.step, self.epoch, self.batches = step, epoch, batches


class FiniteGuard(Callback):
    """Note of each batch whether loss and gradient are finite, and look at the notes now and then.

    Looking makes a GPU catch up with Python, so it happens where numbers are logged anyway, and before every save.
    With fp16 the gradient may overflow: its scaler leaves such steps out by itself.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[int, int, int]] = []  # step, epoch, batch
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []  # of the gradients; 0 where a batch ends no step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget()

    def _forget(self) -> None:
        self._batches, self._losses, self._norms = [], [], []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batches.append((trainer.global_step, trainer.current_epoch, batch_idx))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"].detach().float()
        assert isinstance(pl_module, Classifier)
        norm = pl_module.take_gradient_norm()
        self._losses.append(loss)
        self._norms.append(norm if norm is not None else torch.zeros_like(loss))
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by the Trainer's logger connector
        costs_nothing = loss.device.type == "cpu" and trainer.world_size == 1
        if costs_nothing or (batch_idx + 1) % every == 0 or trainer.is_last_batch:
            self.check(trainer)

    def check(self, trainer: Trainer) -> None:
        """Look at the batches since the last time, on all ranks together.

        Raises:
            NotFiniteError: naming the first that is not finite.
        """
        if not self._losses:
            return
        batches = self._batches[: len(self._losses)]
        seen = torch.stack([torch.stack(self._losses), torch.stack(self._norms).float()], 1)
        good = seen.isfinite().int()
        if trainer.world_size > 1:  # a bad loss of one is a bad gradient of all: they must see the same
            distributed.all_reduce(good, op=distributed.ReduceOp.MIN)
        if not good.all():
            first = int((good.amin(1) == 0).nonzero()[0])
            step, epoch, batch = batches[first]
            which = 0 if not good[first, 0] else 1
            value = seen[first, which]
            is_what = "not finite on another rank" if value.isfinite() else f"{value.item()}"
            window = batch % trainer.accumulate_grad_batches if which else 0
            raise NotFiniteError(
                f"the {('loss', 'gradient')[which]} is {is_what}",
                step=step,
                epoch=epoch,
                batches=range(batch - window, batch + 1),
            )
        self._batches = self._batches[len(batches) :]
        self._losses, self._norms = [], []
