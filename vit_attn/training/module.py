"""The LightningModule: one training step, and the metrics of validation and test."""

import math
from collections.abc import Container, Mapping
from typing import Any

import hydra.utils
import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType
from omegaconf import DictConfig
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import CatMetric, MeanMetric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
)

from vit_attn.attention import attention_layers
from vit_attn.errors import UserError, one_line
from vit_attn.training.sharding import ShardedStrategy, gathered, is_sharded, shard

CALIBRATION_BINS = 15


def step_seed(seed: int, epoch: int, step: int, stream: int) -> int:
    """Seed of what is random in one training step: a function of these four alone, so a resumed run repeats it.

    Args:
        seed: of the run.
        epoch, step: from 0; the step of the epoch.
        stream: 0 for what all processes draw alike, 1 + rank for what each draws for itself.
    """
    high, low = np.random.SeedSequence((seed, epoch, step, stream)).generate_state(2)
    return int(high) << 32 | int(low)


def warmup_cosine(step: int, *, total: int, warmup: int, final: float) -> float:
    """Factor on the learning rate: up in a line over ``warmup`` steps, then down in a cosine to ``final``."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(net: nn.Module, config: DictConfig) -> Optimizer:
    """Create the optimizer that ``conf/optimizer`` describes, with weight decay where it belongs.

    Raises:
        UserError: an optimizer that does not exist or does not take these arguments.
    """
    options = {str(key): value for key, value in config.items()}
    target = options.pop("_target_", None)
    if not isinstance(target, str):
        raise UserError(f"optimizer._target_ must name a torch optimizer, not {target!r}")
    # Without decay: one-dimensional parameters (norms, biases, α) and what the model names (positions, tokens).
    groups = param_groups_weight_decay(
        net,
        weight_decay=options.get("weight_decay", 0.0),
        no_weight_decay_list=net.no_weight_decay(),  # type: ignore[operator]  # every timm model has it
    )
    try:
        kind = hydra.utils.get_class(target)
        if not issubclass(kind, Optimizer):
            raise UserError(f"optimizer._target_={target} is no torch optimizer")
        return kind(groups, **options)
    except UserError:
        raise
    except Exception as error:  # each optimizer has its own way with an option that it cannot use
        raise UserError(f"optimizer: {one_line(error)}") from error


def build_schedule(optimizer: Optimizer, config: DictConfig, *, total: int) -> LambdaLR:
    """Create the warm-up and cosine over ``total`` steps that ``lr_schedule`` describes, stepped after each one."""
    warmup, final = round(config.warmup * total), config.final_lr
    return LambdaLR(optimizer, lambda step: warmup_cosine(step, total=total, warmup=warmup, final=final))


def _calibration_error(num_classes: int) -> MulticlassCalibrationError:
    return MulticlassCalibrationError(num_classes, n_bins=CALIBRATION_BINS, norm="l1")


class Classifier(LightningModule):
    """Trains and scores an image classifier.

    Args:
        net: images (B, C, H, W), normalized, to logits (B, num_classes).
        criterion: loss of logits and targets, with ``probabilities(logits)``.
        normalize: uint8 or float images to normalized ones.
        augment: (images, labels) to (images, targets), in training; None where the module only scores.
        optimizer: ``_target_`` and arguments of a torch optimizer.
        lr_schedule: ``warmup`` and ``final_lr``, shares.
        seed: of the randomness of each training step.
        num_classes: classes.
        extra: plain containers that every checkpoint carries under "vit_attn".
    """

    def __init__(
        self,
        *,
        net: nn.Module,
        criterion: nn.Module,
        normalize: nn.Module,
        num_classes: int,
        augment: nn.Module | None = None,
        optimizer: DictConfig | None = None,
        lr_schedule: DictConfig | None = None,
        seed: int = 0,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.criterion = criterion
        self.normalize = normalize
        self.augment = augment
        self.optimizer_config = optimizer
        self.lr_schedule = lr_schedule
        self.seed = seed
        self.extra = dict(extra or {})
        self.left_out: Container[tuple[int, int]] = ()  # (epoch, batch) whose images are not trained on
        self._learned_something = False  # in the batches since the last step
        self._gradient_norm: Tensor | None = None
        # Lightning's own mean over ranks rounds the number of images down, where they have unequal ones.
        self.val_loss = MeanMetric()
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.val_ece = _calibration_error(num_classes)
        scores: dict[str, Any] = {
            "acc": MulticlassAccuracy(num_classes, average="micro"),
            "per_class_acc": MulticlassAccuracy(num_classes, average=None),
            "confusion": MulticlassConfusionMatrix(num_classes),
            "ece": _calibration_error(num_classes),
        }
        if num_classes > 5:
            scores["top5"] = MulticlassAccuracy(num_classes, average="micro", top_k=5)
        self.test_scores = MetricCollection(scores, compute_groups=False)
        self.test_loss, self.confidences, self.correct = MeanMetric(), CatMetric(), CatMetric()
        self.calibration: tuple[Tensor, ...] = ()  # of each test image: confidence, and whether it was right
        self.test_results: dict[str, Any] = {}

    def configure_model(self) -> None:
        """Share the network out over the processes, where the strategy is to."""
        strategy = self.trainer.strategy
        fits = self.trainer.state.fn == TrainerFn.FITTING
        if fits and isinstance(strategy, ShardedStrategy) and not is_sharded(self.net):
            shard(self.net, strategy.device_mesh["data_parallel"])

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of raw images (B, C, H, W)."""
        return self.net(self.normalize(images))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities (B, num_classes) of logits, as the loss means them: those of a sparse loss can be 0."""
        return self.criterion.probabilities(logits)  # type: ignore[operator]  # see Args

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Bring what mechanisms draw anew up to the step, such as a Performer's features."""
        for layer in attention_layers(self.net):
            layer.core.on_step(self.trainer.global_step, seed=self.seed, layer=layer.layer)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean loss of one batch, augmented here, on the training device."""
        assert self.augment is not None
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        # One stream of draws for the whole global batch, so that it is augmented alike by any number of processes.
        torch.manual_seed(step_seed(self.seed, self.current_epoch, batch_idx, 0))
        images, targets = self.augment(*batch, rank=rank, world_size=world_size)
        if world_size > 1:  # dropout is each process' own
            torch.manual_seed(step_seed(self.seed, self.current_epoch, batch_idx, 1 + rank))
        if (self.current_epoch, batch_idx) in self.left_out:
            # Through the network all the same: several ranks count on each other's passes. Their gradient is zero.
            return self(torch.zeros_like(images)).sum() * 0
        self._learned_something = True
        logits = self(images)
        loss = self.criterion(logits, targets)
        if self._loggers_listen():
            classes = targets if targets.dim() == 1 else targets.argmax(1)
            self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=True)
            self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
            self.log("train/acc", (logits.detach().argmax(1) == classes).float().mean(), sync_dist=True)
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave the weights as they are in a step that has seen no images: momentum and decay would move them."""
        if not self._learned_something:
            for parameter in self.parameters():
                parameter.grad = None
        self._learned_something = False

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does, and keep the norm that it computes for that: the training is watched by it."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        # fp16's scaler leaves out steps whose gradient overflows by itself.
        if gradients and getattr(self.trainer.precision_plugin, "scaler", None) is None:
            self._gradient_norm = get_total_norm(gradients)
            if gradient_clip_val and gradient_clip_algorithm != GradClipAlgorithmType.VALUE:
                clip_grads_with_norm_(parameters, gradient_clip_val, self._gradient_norm)
                return
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def take_gradient_norm(self) -> Tensor | None:
        """The norm of the last step's gradient, before it was clipped; None: it was taken, or is not known."""
        norm, self._gradient_norm = self._gradient_norm, None
        return gathered(norm)

    def _loggers_listen(self) -> bool:
        """Whether what this step logs is kept: Lightning takes most of a millisecond for a number it then drops."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by the Trainer's logger connector
        return (self.trainer.global_step + 1) % every == 0 or self.trainer.is_last_batch

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a batch to val/loss, val/acc and val/ece."""
        images, labels = batch
        logits = self(images)
        self.val_acc.update(logits, labels)
        self.val_ece.update(self.probabilities(logits), labels)
        self.val_loss.update(self.criterion(logits, labels), weight=len(labels))
        self.log("val/loss", self.val_loss, on_epoch=True, batch_size=len(labels))
        self.log("val/acc", self.val_acc, on_epoch=True, batch_size=len(labels), prog_bar=True)
        self.log("val/ece", self.val_ece, on_epoch=True, batch_size=len(labels))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a batch to the test scores."""
        images, labels = batch
        logits = self(images)
        probabilities = self.probabilities(logits)
        # Ties in sparse probabilities would shuffle the top 5: logits for ranks, probabilities for calibration.
        for name, metric in self.test_scores.items(keep_base=True):
            metric.update(probabilities if name == "ece" else logits, labels)
        confidence, predicted = probabilities.gather(1, logits.argmax(1, keepdim=True))[:, 0], logits.argmax(1)
        self.confidences.update(confidence)
        self.correct.update((predicted == labels).float())
        self.test_loss.update(self.criterion(logits, labels), weight=len(labels))

    def on_test_epoch_end(self) -> None:
        """Compute the test scores over all processes; numbers are logged, all is kept in ``test_results``."""
        scores = self.test_scores.compute()
        self.test_results = {
            "loss": float(self.test_loss.compute()),
            **{name: value.tolist() for name, value in scores.items()},
        }
        self.calibration = self.confidences.compute().cpu(), self.correct.compute().cpu()
        self.log_dict({f"test/{name}": scores[name] for name in ("acc", "top5", "ece") if name in scores})
        self.log("test/loss", self.test_results["loss"])
        for metric in (self.test_scores, self.test_loss, self.confidences, self.correct):
            metric.reset()

    def configure_optimizers(self) -> Any:
        """Set up the optimizer, warm-up and cosine by step."""
        assert self.optimizer_config is not None
        assert self.lr_schedule is not None
        optimizer = build_optimizer(self.net, self.optimizer_config)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = build_schedule(optimizer, self.lr_schedule, total=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a model is rebuilt from: plain containers, so that nothing needs unpickling."""
        checkpoint["vit_attn"] = self.extra
