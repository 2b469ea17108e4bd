"""What can be known to be wrong before data are read or a folder is made."""

import inspect
import logging
from math import inf
from typing import Any, get_args, get_origin, get_type_hints

import hydra.utils
import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf

from vit_attn.attention import parse_attention, unused_options
from vit_attn.config import held_secret, plain
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
    **{"model.attn_drop_rate": 0, "model.drop_path_rate": 0, "logger.finish_timeout": 1},
    **{"callbacks.checkpoint_every_n_minutes": 0.01},
}
# The most, where more could only end in a machine without memory, or never.
_MOST = {
    **{"model.embed_dim": 2**16, "model.depth": 1000, "model.num_heads": 2**16, "model.patch_size": 2**12},
    **{"model.reg_tokens": 2**12, "model.mlp_ratio": 1000, "data.num_workers": 1024, "data.image_size": 2**13},
    **{"data.augment.crop_padding": 2**13, "data.augment.rand_augment_ops": 100, "trainer.num_nodes": 2**16},
    **{"seed": 2**32 - 1, "data.split_seed": 2**32 - 1, "trainer.max_epochs": 2**31, "trainer.max_steps": 2**53},
    **{"data.batch_size": 2**31, "data.eval_batch_size": 2**31, "explain_images": 2**31},
    **{"callbacks.attention_probe.num_images": 2**16, "trainer.accumulate_grad_batches": 2**31},
    **{"trainer.log_every_n_steps": 2**53, "trainer.check_val_every_n_epoch": 2**31},
    **{"callbacks.early_stopping.patience": 2**31, "callbacks.checkpoint_every_n_steps": 2**53},
    **{"callbacks.checkpoint_every_n_minutes": 10**6, "logger.finish_timeout": 10**6, "data.cache_budget": 10**6},
}
_PARTS = ("model", "data", "trainer", "optimizer", "loss", "logger", "callbacks", "lr_schedule")
_FLAGS = ("overwrite", "compile", "test", "model.pretrained", "trainer.enable_progress_bar", "data.progress")
_NULL_OR_FLAGS = ("model.class_token", "data.check_images")
# Of conf/, and used from the moment on that a run's folder is there.
_NEEDED = (
    *("experiments_dir", "experiment_name", "run_name", "seed", "explain_images", "model.name", "model.attention"),
    *("model.attention_options", "trainer.max_epochs", "trainer.max_steps", "trainer.precision", "trainer.on_nan"),
    *("trainer.accelerator", "trainer.accumulate_grad_batches", "optimizer._target_", "loss._target_"),
    *("lr_schedule.warmup", "lr_schedule.final_lr", "callbacks.early_stopping", "callbacks.alpha_annealing"),
    *("callbacks.attention_probe.num_images", "callbacks.attention_probe.layers", "callbacks.ema"),
    *("callbacks.attention_probe.picture_images", "callbacks.checkpoint_every_n_steps"),
    *("callbacks.checkpoint_every_n_minutes", "data._target_", "data.batch_size", "data.num_workers"),
)
_MONITORS = ("val/acc", "val/loss", "train/acc", "train/loss")
# Others lose the count of steps, as those that spawn, or keep checkpoints and optimizers in ways of their own.
_STRATEGIES = ("auto", "ddp", "fsdp2")
_SHOWN = ("experiment", "run_name", "logger")
_SCHEDULE = ("warmup", "final_lr")


def _check_numbers(config: DictConfig) -> None:
    for key, least in {**_WHOLE, **_NUMBERS}.items():
        value = OmegaConf.select(config, key)
        kinds = int if key in _WHOLE else (int, float)
        if value is None or (isinstance(value, kinds) and not isinstance(value, bool) and least <= value < inf):
            continue
        kind = "whole number" if key in _WHOLE else "number"
        raise UserError(f"{key} must be a {kind} of at least {least}, not {value!r}")

    for key, most in _MOST.items():
        value = OmegaConf.select(config, key)
        if isinstance(value, int | float) and value > most:
            raise UserError(f"{key} must be at most {most}, not {value!r}")


def _check_trainer(config: DictConfig) -> None:
    """Refuse what Lightning takes and stumbles over later: an argument of its Trainer of another type than it says."""
    hints = get_type_hints(Trainer.__init__)
    for key, value in plain(config.trainer).items():
        kinds = {get_origin(kind) or kind for kind in get_args(hints.get(key)) or (hints.get(key),)}
        if value is None or not all(isinstance(kind, type) for kind in kinds):
            continue  # null is Lightning's own default; words are its own business
        number = isinstance(value, int) and not isinstance(value, bool) and float in kinds
        if not number and not any(type(value) is kind or (kind is dict and isinstance(value, dict)) for kind in kinds):
            names = " or ".join(sorted(kind.__name__ for kind in kinds if kind in (bool, int, float, str, list, dict)))
            raise UserError(f"trainer.{key} must be {names}, not {value!r}")


def _check_shape(config: DictConfig) -> None:
    """Refuse what Hydra lets pass: a part replaced by a word, a key taken away, a value that is still missing."""
    for part in _PARTS:
        if not isinstance(config.get(part), DictConfig):
            raise UserError(f"{part} must be a group of keys, not {config.get(part)!r}")
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    for key in (*_NEEDED, *_FLAGS):
        parent, _, name = key.rpartition(".")
        holder = OmegaConf.select(config, parent) if parent else config
        if not isinstance(holder, DictConfig) or name not in holder:
            raise UserError(f"{key} is missing: the configuration needs it")
    for name, entry in config.callbacks.items():
        if isinstance(entry, DictConfig):
            _check_flag(f"callbacks.{name}.enabled", entry.get("enabled"))
        elif name not in ("checkpoint_every_n_steps", "checkpoint_every_n_minutes"):
            raise UserError(f"callbacks.{name} must be a group of keys with enabled=true or false, not {entry!r}")
    for key in (*_FLAGS, *_NULL_OR_FLAGS):
        value = OmegaConf.select(config, key)
        if key in _FLAGS or value is not None:
            _check_flag(key, value)
    options = config.model.attention_options
    if options is not None and not isinstance(options, DictConfig):
        raise UserError(f"model.attention_options must be a group of keys, not {options!r}")
    _check_texts(plain(config))


def _check_flag(key: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise UserError(f"{key} must be true or false, not {value!r}")


def _check_texts(node: Any, key: str = "") -> None:
    """Refuse what cannot be written into config.yaml, and a secret where a name or a tracker would show it."""
    if isinstance(node, dict):
        for name, value in node.items():
            _check_texts(name, f"{key}, a name in it,")
            _check_texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for value in node:
            _check_texts(value, key)
    elif isinstance(node, str):
        if "\0" in node or node.encode(errors="replace") != node.encode(errors="surrogatepass"):
            raise UserError(f"{key} holds what is no text: {node!r}")
        variable = held_secret(node) if key.startswith(_SHOWN) else None
        if variable:
            raise UserError(f"{key} holds the value of {variable}, a secret: it would be shown wherever the run is")


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
    _check_shape(config)
    with user_errors():
        options = plain(config.model)["attention_options"] or {}
        mechanisms = parse_attention(plain(config.model)["attention"], options)
    for name in unused_options(mechanisms, options):
        log.info("note: model.attention_options.%s has no use in model.attention=%s", name, config.model.attention)
    anneals = [
        term for each in mechanisms for term in each.terms() if getattr(term, "anneal_alpha_from", None) is not None
    ]
    if anneals and not config.callbacks.alpha_annealing.enabled:
        raise UserError(
            "model.attention_options.anneal_alpha_from needs callbacks.alpha_annealing.enabled=true: "
            "nothing else moves alpha"
        )
    _check_numbers(config)
    _check_trainer(config)
    _check_logger(config)
    if config.trainer.max_epochs in (None, -1) and config.trainer.max_steps in (None, -1):
        raise UserError("the schedule needs an end: set trainer.max_epochs or trainer.max_steps")
    schedule = config.lr_schedule
    for key, value in schedule.items():
        if str(key) not in _SCHEDULE:
            raise UserError(unknown_name("key", f"lr_schedule.{key}", [f"lr_schedule.{name}" for name in _SCHEDULE]))
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
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
