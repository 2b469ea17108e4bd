"""What can be known to be wrong before data are read or a folder is made."""

import inspect
import logging

import hydra.utils
import torch
from omegaconf import DictConfig, OmegaConf

from vit_attn.attention import parse_attention
from vit_attn.config import plain
from vit_attn.data.checks import whole
from vit_attn.errors import UserError, one_line, unknown_name, user_errors
from vit_attn.tracking.wandb import checkpoint_choice, wandb_mode
from vit_attn.training.build import build_callbacks, build_loss, build_plain_trainer
from vit_attn.training.finite import ON_NAN

log = logging.getLogger("vit_attn")

# Libraries take a word, or a number without a meaning, until they compute with it: the least value of each.
_WHOLE = {
    **{"trainer.max_epochs": -1, "trainer.max_steps": -1, "trainer.log_every_n_steps": 1, "trainer.num_nodes": 1},
    **{"trainer.accumulate_grad_batches": 1, "trainer.check_val_every_n_epoch": 1},
    **{"callbacks.early_stopping.patience": 0, "callbacks.checkpoint_every_n_steps": 1},
    **{"model.embed_dim": 1, "model.depth": 1, "model.num_heads": 1, "model.patch_size": 1},
    **{"model.reg_tokens": 0},
}
_NUMBERS = {
    **{"trainer.gradient_clip_val": 0, "optimizer.lr": 0, "optimizer.weight_decay": 0, "optimizer.eps": 0},
    **{"callbacks.ema.decay": 0, "model.mlp_ratio": 0, "model.drop_rate": 0, "model.proj_drop_rate": 0},
    **{
        "callbacks.checkpoint_every_n_minutes": 0.01,
        "model.attn_drop_rate": 0,
        "model.drop_path_rate": 0,
        "logger.finish_timeout": 1,
    },
}
_MONITORS = ("val/acc", "val/loss", "train/acc", "train/loss")
# Others lose the count of steps, as those that spawn, or keep checkpoints and optimizers in ways of their own.
_STRATEGIES = ("auto", "ddp", "fsdp2")
_SCHEDULE = ("warmup", "final_lr")


def _check_numbers(config: DictConfig) -> None:
    for key, least in {**_WHOLE, **_NUMBERS}.items():
        value = OmegaConf.select(config, key)
        kinds = int if key in _WHOLE else (int, float)
        if value is None or (isinstance(value, kinds) and not isinstance(value, bool) and value >= least):
            continue
        kind = "whole number" if key in _WHOLE else "number"
        raise UserError(f"{key} must be a {kind} of at least {least}, not {value!r}")


def _check_logger(config: DictConfig) -> None:
    target = config.logger.get("_target_")
    if not target:
        return
    options = {str(key): value for key, value in config.logger.items() if key != "_target_"}
    try:
        inspect.signature(hydra.utils.get_method(target)).bind(folder=None, run_name="", **options)
    except (TypeError, ImportError, ValueError) as error:
        raise UserError(f"logger: {one_line(error)}") from error
    if "mode" in options:
        wandb_mode(options["mode"])
    if "log_checkpoints" in options:
        checkpoint_choice(options["log_checkpoints"])


def check_config(config: DictConfig) -> None:
    """Refuse a configuration that cannot work, and note what it sets in vain.

    Raises:
        UserError: the key, the value and what is allowed.
    """
    with user_errors():
        options = {key: value for key, value in plain(config.model.attention_options).items() if value is not None}
        mechanisms = parse_attention(plain(config.model)["attention"], options)
    unused = set.intersection(*(mechanism.unused_options() for mechanism in mechanisms))
    for name in sorted(unused):
        log.info("note: model.attention_options.%s has no use in model.attention=%s", name, config.model.attention)
    if not config.callbacks.alpha_annealing.enabled and any(each.anneal_alpha_from is not None for each in mechanisms):
        raise UserError(
            "model.attention_options.anneal_alpha_from needs callbacks.alpha_annealing.enabled=true: "
            "nothing else moves alpha"
        )
    _check_numbers(config)
    _check_logger(config)
    if config.trainer.max_epochs in (None, -1) and config.trainer.max_steps in (None, -1):
        raise UserError("the schedule needs an end: set trainer.max_epochs or trainer.max_steps")
    schedule = config.lr_schedule
    for key, value in schedule.items():
        if key not in _SCHEDULE:
            raise UserError(unknown_name("key", f"lr_schedule.{key}", [f"lr_schedule.{name}" for name in _SCHEDULE]))
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise UserError(f"lr_schedule.{key} is a share, from 0 to 1, not {value!r}")
    whole("seed", config.seed, least=0, prefix="")
    whole("explain_images", config.explain_images, least=0, prefix="")
    if config.trainer.precision == "16-mixed" and _on_cpu(config):
        log.info("note: on a CPU, Lightning runs trainer.precision=16-mixed as bf16-mixed")
    stopping = config.callbacks.early_stopping
    if stopping.enabled and stopping.monitor not in _MONITORS:
        raise UserError(unknown_name("callbacks.early_stopping.monitor", stopping.monitor, _MONITORS))
    if config.trainer.strategy not in _STRATEGIES:
        raise UserError(unknown_name("trainer.strategy", str(config.trainer.strategy), _STRATEGIES))
    if config.trainer.on_nan not in ON_NAN:
        raise UserError(unknown_name("trainer.on_nan", str(config.trainer.on_nan), ON_NAN))
    build_loss(config.loss)
    build_callbacks(config, None)
    if config.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator=gpu: no GPU is available; use trainer=cpu")
    # Lightning checks its arguments when a Trainer is made: here once more, before data are read or a folder made.
    build_plain_trainer(config, logger=False, enable_checkpointing=False, enable_progress_bar=False)


def _on_cpu(config: DictConfig) -> bool:
    return config.trainer.accelerator == "cpu" or not torch.cuda.is_available()
