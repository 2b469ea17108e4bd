"""Early stopping that a resumed run keeps to."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from vit_attn.training.described import is_score


class ResumableEarlyStopping(EarlyStopping):
    """Lightning's ``EarlyStopping``, whose decision to stop is kept in the checkpoint.

    Lightning forgets it: a run killed between its last checkpoint and its end would train an epoch more.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._stopped = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.should_stop or self._stopped

    def _run_early_stopping_check(self, trainer: Trainer) -> None:
        super()._run_early_stopping_check(trainer)
        self._stopped = trainer.should_stop

    def state_dict(self) -> dict[str, Any]:
        """Lightning's, and whether the run has stopped."""
        return {**super().state_dict(), "stopped": self._stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take both up again.

        Raises:
            TypeError: what should be numbers are none.
            KeyError: something is missing.
        """
        counts = [state_dict[key] for key in ("wait_count", "patience", "stopped_epoch")]
        if not all(isinstance(count, int) for count in counts) or not is_score(state_dict["best_score"]):
            raise TypeError("what it says of early stopping are no numbers")
        super().load_state_dict(state_dict)
        self._stopped = state_dict.get("stopped", False)
