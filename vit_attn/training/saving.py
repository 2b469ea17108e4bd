"""When a run saves: at the end of every epoch, every so many steps or minutes, and before it stops at a signal."""

import logging
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, distributed

from vit_attn.tracking.loggers import CsvLogger
from vit_attn.training.finite import FiniteGuard
from vit_attn.training.stopping import Stopped, StopSignals

log = logging.getLogger("vit_attn")


class Agreement:
    """The greatest of what the ranks say, without waiting for one another: an answer is that of the step before.

    Signals and clocks differ between processes; a checkpoint needs all of them at the same step.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._asked: tuple[Tensor, Any] | None = None

    def ask(self, values: list[int], *, now: bool = False) -> list[int]:
        """Give this rank's ``values``, whole numbers, and take what all ranks gave at the last call.

        Args:
            values: as many in every call.
            now: wait for what all ranks give in this call.
        """
        if not distributed.is_initialized() or distributed.get_world_size() == 1:
            return values
        if self._group is None:
            self._group = distributed.new_group(backend="gloo")  # no business of the GPUs
        answer = self._answer(values)
        told = torch.tensor(values)
        work = distributed.all_reduce(told, op=distributed.ReduceOp.MAX, group=self._group, async_op=True)
        self._asked = told, work
        if now:
            answer = [max(pair) for pair in zip(answer, self._answer(values), strict=True)]
        return answer

    def _answer(self, values: list[int]) -> list[int]:
        if self._asked is None:
            return [0] * len(values)
        (told, work), self._asked = self._asked, None
        work.wait()
        return told.tolist()


class LastCheckpoint(Checkpoint):
    """Keep the newest state of the training in one file.

    Amid an epoch it saves between two steps, before the first batch of the next one: then no gradient is pending, and
    all of the steps before is in the logs. So a run that goes on from there lacks no step and has none twice.

    Args:
        path: the file.
        every_n_steps: save each time this many optimizer steps are done; None: not by steps.
        every_n_minutes: save when this many minutes have passed since the last time; None: not by time.
        signals: ask for a last save and an end.
        guard: is asked whether the state is worth saving.
        step: of the checkpoint that the run goes on from; -1: none.
    """

    def __init__(
        self,
        path: Path,
        *,
        every_n_steps: int | None,
        every_n_minutes: float | None,
        signals: StopSignals,
        guard: FiniteGuard,
        step: int = -1,
    ) -> None:
        self.path, self.step = path, step
        self.every_n_steps, self.every_n_minutes = every_n_steps, every_n_minutes
        self._signals, self._guard = signals, guard
        self._agreement = Agreement()
        self._saved_at = 0.0
        self._amid_epoch = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_at = time.monotonic()  # the clock on the wall may go back
        self._signals.reclaim()
        self._signals.patient = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._signals.patient = False
        self._stop(self._agreed(now=True)[0])

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._signals.patient = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches:
            return
        signum, time_is_up = self._agreed()
        due = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        if (due or time_is_up or signum) and batch_idx and trainer.global_step != self.step:
            self._amid_epoch = True
            try:
                self._save(trainer)
            finally:
                self._amid_epoch = False
        self._stop(signum)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)
        self._stop(self._agreed(now=True)[0])

    def _agreed(self, *, now: bool = False) -> list[int]:
        minutes = (time.monotonic() - self._saved_at) / 60
        time_is_up = self.every_n_minutes is not None and minutes >= self.every_n_minutes
        return self._agreement.ask([self._signals.received or 0, int(time_is_up)], now=now)

    def _stop(self, signum: int) -> None:
        if signum:
            raise Stopped(signum, self.step if self.step >= 0 else None)

    def _save(self, trainer: Trainer) -> None:
        self._guard.check(trainer)
        for logger in trainer.loggers:
            if isinstance(logger, CsvLogger):
                logger.write()  # before the checkpoint: what it counts as done is logged
        trainer.save_checkpoint(self.path)
        self.step, self._saved_at = trainer.global_step, time.monotonic()
        for logger in trainer.loggers:
            logger.after_save_checkpoint(self)  # type: ignore[arg-type]  # ours takes any

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Amid an epoch, count the batch that is about to begin as not begun."""
        if self._amid_epoch:
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
            progress["is_last_batch"] = False
            for counts in (progress["total"], progress["current"]):
                counts["ready"] = counts["completed"]
