"""Objects from their configuration: network, data, loss, module, callbacks, loggers, Trainer."""

import inspect
from collections.abc import Mapping
from typing import Any

import hydra.utils
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from vit_attn.config import plain, without_secrets
from vit_attn.console import is_first_process, shows_progress_bar
from vit_attn.data import ImageData
from vit_attn.errors import UserError, one_line
from vit_attn.models import create_vit
from vit_attn.tracking.loggers import CsvLogger, run_tags
from vit_attn.training.annealing import BestCheckpoint
from vit_attn.training.callbacks import EpochLines, Throughput
from vit_attn.training.checkpoint import AtomicCheckpointIO
from vit_attn.training.finite import FiniteGuard
from vit_attn.training.folder import RunFolder
from vit_attn.training.launcher import OneRun
from vit_attn.training.module import Classifier
from vit_attn.training.saving import LastCheckpoint
from vit_attn.training.stopping import StopSignals

# Up to this many pixels per side, timm's patches of 16 would leave a handful of tokens.
_SMALL_IMAGE, _SMALL_PATCH = 64, 4
# What timm takes beside a model's options.
_FROM_DATA = "comes from the data"
_BY_WEIGHTS = "is not for here: model.weights=<file> names weights"
_NOT_OPTIONS = {
    **{"num_classes": _FROM_DATA, "img_size": _FROM_DATA + " (data.image_size)", "in_chans": _FROM_DATA},
    **dict.fromkeys(("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"), _BY_WEIGHTS),
}


def build_net(model: dict[str, Any], *, num_classes: int, image_size: int) -> nn.Module:
    """Create the network that ``conf/model`` describes; nulls are left to timm.

    Raises:
        UserError: see :func:`vit_attn.models.create_vit`.
    """
    options = {str(key): value for key, value in model.items() if value is not None}
    if "patch_size" not in options and image_size <= _SMALL_IMAGE:
        options["patch_size"] = _SMALL_PATCH
    if isinstance(options.get("patch_size"), int) and options["patch_size"] > image_size:
        raise UserError(f"model.patch_size={options['patch_size']} is larger than the images, of {image_size} pixels")
    for key in _NOT_OPTIONS:
        if key in options:
            raise UserError(f"model.{key} {_NOT_OPTIONS[key]}")
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise UserError(f"model.name must be the name of a timm model, not {name!r}")
    try:
        net = create_vit(name, num_classes=num_classes, img_size=image_size, **options)
        return _tried(net, num_classes, image_size)
    except UserError:
        raise
    # timm takes nearly any value of an option until it computes with it, and then raises nearly anything
    except Exception as error:
        raise UserError(
            f"model {name}: its options do not fit: {type(error).__name__}: {one_line(error)[:300]}"
        ) from error


@torch.no_grad()
def _tried(net: nn.Module, num_classes: int, image_size: int) -> nn.Module:
    """``net``, once it has been shown a black image; nothing of it, and no random number, is used up."""
    logits = net.eval()(torch.zeros(1, ImageData.in_chans, image_size, image_size))
    net.train()
    if logits.shape != (1, num_classes):
        raise UserError(f"the model makes {tuple(logits.shape)} of an image, not {num_classes} scores, one per class")
    return net


def build_data(config: DictConfig | dict[str, Any], seed: int) -> ImageData:
    """Create the data module that ``conf/data`` describes.

    Raises:
        UserError: a wrong option.
    """
    progress = bool(config.get("progress")) and shows_progress_bar()
    return instantiate("data", config, ImageData, seed=seed, progress=progress)


def build_loss(config: DictConfig | dict[str, Any]) -> nn.Module:
    """Create the loss that ``conf/loss`` describes.

    Raises:
        UserError: a wrong option.
    """
    loss = instantiate("loss", config, nn.Module)
    if not callable(getattr(loss, "probabilities", None)):
        raise UserError(f"loss._target_={config['_target_']}: a loss here also needs probabilities(logits)")
    return loss


def instantiate(what: str, config: Any, kind: type, **extra: Any) -> Any:
    """Call Hydra's instantiate on one part of the configuration.

    Args:
        what: the part's name.
        config: the part.
        kind: that it has to be of.
        extra: further arguments.

    Raises:
        UserError: a wrong key or value, or something of another kind; the message begins with ``what``.
    """
    target = config.get("_target_") if isinstance(config, Mapping | DictConfig) else None
    if not isinstance(target, str):
        raise UserError(f"{what}._target_ must name a {kind.__name__}, not {target!r}")
    for key in ("_args_", "_partial_", "_convert_", "_recursive_"):
        if key in config:
            raise UserError(f"{what}.{key} is not for here: give what {target} takes by name")
    try:
        made = hydra.utils.instantiate(config, **extra)
        if not isinstance(made, kind):
            raise UserError(f"{what}._target_={target} is no {kind.__name__}")
        return made
    except hydra.errors.InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, UserError):
            raise cause from error
        raise UserError(f"{what}: {one_line(cause)[:300]}") from error
    except (TypeError, ValueError, OmegaConfBaseException) as error:  # a part that is none
        raise UserError(f"{what}: {one_line(error)[:300]}") from error


def build_callbacks(config: DictConfig, folder: RunFolder | None) -> list[Callback]:
    """Build what ``conf/callbacks`` enables, in its order."""
    callbacks: list[Callback] = []
    for name, entry in config.callbacks.items():
        if not isinstance(entry, DictConfig) or not entry.enabled:
            continue
        options = OmegaConf.masked_copy(entry, [str(key) for key in entry if key != "enabled"])
        extra = {"folder": folder.attention} if name == "attention_probe" and folder is not None else {}
        callbacks.append(instantiate(f"callbacks.{name}", options, Callback, **extra))
    return callbacks


def build_module(config: DictConfig, net: nn.Module, data: ImageData) -> Classifier:
    """Put together what trains ``net`` on ``data``, which has been set up."""
    return Classifier(
        net=net,
        criterion=build_loss(config.loss),
        normalize=data.make_normalize(),
        augment=data.make_augment(),
        num_classes=data.num_classes,
        optimizer=config.optimizer,
        lr_schedule=config.lr_schedule,
        seed=config.seed,
        extra={"config": without_secrets(plain(config)), "data": data.describe()},
    )


def build_trainer(
    config: DictConfig, folder: RunFolder, resumed: dict[str, Any] | None, signals: StopSignals
) -> Trainer:
    """Build the Trainer of a run, with all that makes it go on to the same bits wherever it is cut off.

    Args:
        config: all of it.
        folder: of the run.
        resumed: the checkpoint that it goes on from, if any.
        signals: stop the training between two steps.
    """
    guard = FiniteGuard()
    last = LastCheckpoint(
        folder.last,
        every_n_steps=config.callbacks.checkpoint_every_n_steps,
        every_n_minutes=config.callbacks.checkpoint_every_n_minutes,
        signals=signals,
        guard=guard,
        step=resumed["global_step"] if resumed is not None else -1,
    )
    bar = shows_progress_bar() and bool(config.trainer.enable_progress_bar)
    callbacks = [
        OneRun(folder.root, resumed["global_step"] if resumed is not None else None),
        *build_callbacks(config, folder),
        guard,
        Throughput(),
        EpochLines(),
        *([TQDMProgressBar()] if bar else []),
        BestCheckpoint(
            folder.checkpoints, filename="best", monitor="val/acc", mode="max", enable_version_counter=False
        ),
        last,
    ]
    plugins: list[Any] = [AtomicCheckpointIO()]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # it would save at any moment, in a place of its own
    return build_plain_trainer(
        config,
        callbacks=callbacks,
        plugins=plugins,
        logger=_loggers(config, folder, resumed),
        default_root_dir=str(folder.root),
        enable_progress_bar=bar,
        num_sanity_val_steps=0,
        # The data module deals the ranks their shares itself, so that order depends on seed and epoch alone.
        use_distributed_sampler=False,
    )


def build_plain_trainer(config: DictConfig, **extra: Any) -> Trainer:
    """Build a Trainer from the arguments in ``conf/trainer``, whose other keys are this project's.

    Raises:
        UserError: a wrong argument.
    """
    arguments = OmegaConf.masked_copy(config.trainer, [str(key) for key in config.trainer if key != "on_nan"])
    return instantiate("trainer", arguments, Trainer, enable_model_summary=False, **extra)


def _loggers(config: DictConfig, folder: RunFolder, resumed: dict[str, Any] | None) -> list[Logger]:
    step = resumed["global_step"] - 1 if resumed is not None else -1
    loggers: list[Logger] = [CsvLogger(folder.logs / "metrics.csv", resume_step=step)]
    if config.logger.get("_target_") and is_first_process():
        given: dict[str, Any] = {"folder": folder.root, "run_name": str(config.run_name)}
        if "tags" in config.logger:
            given["tags"] = [*config.logger.tags, *run_tags(plain(config))]
        if "resume_step" in inspect.signature(hydra.utils.get_method(config.logger["_target_"])).parameters:
            given["resume_step"] = step
        loggers.append(instantiate("logger", config.logger, Logger, **given))
    return loggers
