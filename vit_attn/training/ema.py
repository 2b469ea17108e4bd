"""An average of the weights over the steps, of models that are shared out over processes too."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from vit_attn.training.module import Classifier
from vit_attn.training.sharding import gathered, is_sharded, parts_of, shard


class Ema(EMAWeightAveraging):
    """Lightning's ``EMAWeightAveraging``, whose average is sharded as the model is, and is on the model's device.

    Checkpoints hold the whole average.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the model, before it is sharded: that could not be copied."""
        if stage == "fit":
            self._average_model = AveragedModel(pl_module, use_buffers=self._use_buffers, **self._kwargs)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        assert self._average_model is not None
        average = self._average_model.module
        if is_sharded(pl_module.net):
            shard(average.net, trainer.strategy.device_mesh["data_parallel"])  # type: ignore[attr-defined, arg-type]
        self._average_model.to(self._device or pl_module.device)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model alone from here on: the best weights are validated once more, not the last average."""
        if stage == "fit":
            self._average_model = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the average in the place of the weights, and the weights beside it."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._average_model is not None and is_sharded(pl_module.net):  # type: ignore[arg-type]
            for key in ("state_dict", "averaging_state"):
                whole = {name: gathered(value) for name, value in checkpoint[key].items()}
                checkpoint[key] = {n: v.cpu() if isinstance(v, Tensor) else v for n, v in whole.items()}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take both up again."""
        parts: dict[str, Any] = {
            key: parts_of(checkpoint[key], pl_module)
            for key in ("state_dict", "current_model_state")
            if key in checkpoint
        }
        super().on_load_checkpoint(trainer, pl_module, {**checkpoint, **parts})
