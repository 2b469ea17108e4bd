"""What can be known to be wrong before data are read or a folder is made."""

import logging

import torch
from omegaconf import DictConfig, OmegaConf

from vit_attn.attention import parse_attention
from vit_attn.config import plain
from vit_attn.errors import UserError, user_errors
from vit_attn.training.build import build_callbacks, build_loss, instantiate

log = logging.getLogger("vit_attn")

# Libraries take a word for a number here until they compute with it.
_NUMBERS = (
    *("trainer.max_epochs", "trainer.max_steps", "trainer.log_every_n_steps", "trainer.accumulate_grad_batches"),
    *("trainer.gradient_clip_val", "trainer.check_val_every_n_epoch", "trainer.num_nodes"),
    *("optimizer.lr", "optimizer.weight_decay", "optimizer.eps"),
    *("callbacks.ema.decay", "callbacks.early_stopping.patience", "callbacks.checkpoint_every_n_steps"),
)


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
    for key in _NUMBERS:
        value = OmegaConf.select(config, key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UserError(f"{key} must be a number, not {value!r}")
    if config.trainer.max_epochs in (None, -1) and config.trainer.max_steps in (None, -1):
        raise UserError("the schedule needs an end: set trainer.max_epochs or trainer.max_steps")
    schedule = config.lr_schedule
    for key, value in schedule.items():
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise UserError(f"lr_schedule.{key} is a share, from 0 to 1, not {value!r}")
    if isinstance(config.seed, bool) or not isinstance(config.seed, int) or config.seed < 0:
        raise UserError(f"seed must be a whole number of at least 0, not {config.seed!r}")
    if config.trainer.precision == "16-mixed" and _on_cpu(config):
        log.info("note: on a CPU, Lightning runs trainer.precision=16-mixed as bf16-mixed")
    build_loss(config.loss)
    build_callbacks(config, None)
    if config.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator=gpu: no GPU is available; use trainer=cpu")
    # Lightning checks its arguments when a Trainer is made: here once more, before data are read or a folder made.
    instantiate(
        "trainer",
        config.trainer,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


def _on_cpu(config: DictConfig) -> bool:
    return config.trainer.accelerator == "cpu" or not torch.cuda.is_available()
