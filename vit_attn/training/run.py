"""A training run from its configuration: build, fit, score the best checkpoint, write results."""

import json
import logging
from pathlib import Path
from typing import Any

import hydra.utils
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import nn

from vit_attn.attention import parse_attention
from vit_attn.config import plain
from vit_attn.console import is_first_process, shows_progress_bar
from vit_attn.cost import environment, model_cost
from vit_attn.data import ImageData
from vit_attn.errors import UserError, one_line, user_errors
from vit_attn.explain.probe import default_layers, look, write_masks, write_panels
from vit_attn.models import create_vit
from vit_attn.tracking.loggers import CsvLogger, log_pictures, without_secrets
from vit_attn.training.callbacks import EpochLines, Throughput
from vit_attn.training.folder import RunFolder, load_checkpoint
from vit_attn.training.module import Classifier

log = logging.getLogger("vit_attn")

# Up to this many pixels per side, timm's patches of 16 would leave a handful of tokens.
_SMALL_IMAGE, _SMALL_PATCH = 64, 4


def build_net(model: dict[str, Any], *, num_classes: int, image_size: int) -> nn.Module:
    """Create the network that ``conf/model`` describes; nulls are left to timm.

    Raises:
        UserError: see :func:`vit_attn.models.create_vit`.
    """
    options = {str(key): value for key, value in model.items() if value is not None}
    if "patch_size" not in options and image_size <= _SMALL_IMAGE:
        options["patch_size"] = _SMALL_PATCH
    return create_vit(options.pop("name"), num_classes=num_classes, img_size=image_size, **options)


def build_data(config: DictConfig | dict[str, Any], seed: int) -> ImageData:
    """Create the data module that ``conf/data`` describes.

    Raises:
        UserError: a wrong option.
    """
    return _instantiate("data", config, seed=seed)


def build_loss(config: DictConfig | dict[str, Any]) -> nn.Module:
    """Create the loss that ``conf/loss`` describes.

    Raises:
        UserError: a wrong option.
    """
    return _instantiate("loss", config)


def _instantiate(what: str, config: Any, **extra: Any) -> Any:
    """Hydra's instantiate, with the errors that a wrong key or value causes on one line."""
    try:
        return hydra.utils.instantiate(config, **extra)
    except hydra.errors.InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, UserError):
            raise cause from error
        raise UserError(f"{what}: {one_line(cause)[:300]}") from error


def train(config: DictConfig) -> dict[str, Any]:
    """Run, or go on with, what ``config`` describes.

    Returns:
        What results/metrics.json holds.

    Raises:
        UserError: a mistake in the configuration or the data, before any training.
    """
    _check(config)
    folder = RunFolder.of(config)
    data = build_data(config.data, config.seed)
    with user_errors("data"):
        data.prepare_data()
        data.setup("fit")
    seed_everything(config.seed, verbose=False)
    # Nulls of the configuration mean "as timm has it", so the plain dictionary goes to timm, not OmegaConf.
    net = build_net(plain(config.model), num_classes=data.num_classes, image_size=data.image_size)
    # Before anything is written: a torn checkpoint must not cost the logs.
    resumed = load_checkpoint(folder.last) if folder.resumable and not config.overwrite else None
    folder.create(config)
    cost = model_cost(net, data.image_size, data.in_chans)
    _introduce(folder, config, data, cost)
    if config.compile:
        net.compile()
    module = Classifier(
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
    trainer = _build_trainer(config, folder, resumed)
    if resumed is not None:
        _resume_inside_epoch(resumed, data)
        log.info("resuming from %s at step %d", folder.last, resumed["global_step"])
    trainer.fit(module, datamodule=data, ckpt_path=folder.last if resumed is not None else None, weights_only=True)
    results = _score(trainer, module, data, folder, test=config.test)
    results |= {"run": str(config.run_name), "experiment": str(config.experiment_name), "seed": config.seed}
    results |= {"attention": _names(config.model.attention), "cost": cost, "environment": environment()}
    _write_results(config, trainer, module, data, folder, results)
    return results


def _names(attention: Any) -> str | list[str]:
    return attention if isinstance(attention, str) else list(attention)


def _check(config: DictConfig) -> None:
    """Refuse what can be known to be wrong before data is read."""
    with user_errors():
        options = {key: value for key, value in plain(config.model.attention_options).items() if value is not None}
        mechanisms = parse_attention(plain(config.model)["attention"], options)
    unused = set.intersection(*(mechanism.unused_options() for mechanism in mechanisms))
    for name in sorted(unused):
        log.info("note: model.attention_options.%s has no use in model.attention=%s", name, config.model.attention)
    schedule = config.lr_schedule
    for key, value in schedule.items():
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise UserError(f"lr_schedule.{key} is a share, from 0 to 1, not {value!r}")
    if isinstance(config.seed, bool) or not isinstance(config.seed, int) or config.seed < 0:
        raise UserError(f"seed must be a whole number of at least 0, not {config.seed!r}")
    if config.trainer.precision == "16-mixed" and _on_cpu(config):
        log.info("note: on a CPU, Lightning runs trainer.precision=16-mixed as bf16-mixed")
    build_loss(config.loss)
    _callbacks(config, None)


def _on_cpu(config: DictConfig) -> bool:
    return config.trainer.accelerator == "cpu" or not torch.cuda.is_available()


def _introduce(folder: RunFolder, config: DictConfig, data: ImageData, cost: dict[str, Any]) -> None:
    sizes = data.describe()["num_images"]
    split = ", ".join(f"{count:,} {name}" for name, count in sizes.items())
    log.info("run        %s", folder.root)
    log.info("data       %s images in %d classes, %dx%d pixels", split, data.num_classes, *[data.image_size] * 2)
    skipped = {name: count for name, count in data.num_skipped.items() if count}
    if skipped:
        log.info("skipped    %s broken images", ", ".join(f"{count} {name}" for name, count in skipped.items()))
    log.info(
        "model      %s: %.2f M parameters, %.3f GFLOPs per image (%.3f without the forbidden entries)",
        config.model.name,
        cost["parameters"] / 1e6,
        cost["flops"] / 1e9,
        cost["flops_by_entries"] / 1e9,
    )
    kinds = dict.fromkeys(zip(cost["layers"], cost["sparsity"], cost["entries"], strict=True))
    for name, sparsity, entries in kinds:
        count = cost["layers"].count(name)
        log.info("attention  %d x %s: %d entries, %.1f %% forbidden", count, name, entries, 100 * sparsity)


def _callbacks(config: DictConfig, folder: RunFolder | None) -> list[Callback]:
    """Build what ``conf/callbacks`` enables, in its order."""
    callbacks: list[Callback] = []
    for name, entry in config.callbacks.items():
        if not isinstance(entry, DictConfig) or not entry.enabled:
            continue
        options = OmegaConf.masked_copy(entry, [str(key) for key in entry if key != "enabled"])
        extra = {"folder": folder.attention} if name == "attention_probe" and folder is not None else {}
        callbacks.append(_instantiate(f"callbacks.{name}", options, **extra))
    return callbacks


def _build_trainer(config: DictConfig, folder: RunFolder, resumed: dict[str, Any] | None) -> Trainer:
    every = config.callbacks.checkpoint_every_n_steps
    kept: dict[str, Any] = {
        "dirpath": folder.checkpoints,
        "enable_version_counter": False,
    }
    callbacks = [
        *_callbacks(config, folder),
        Throughput(),
        EpochLines(),
        ModelCheckpoint(filename="best", monitor="val/acc", mode="max", **kept),
        ModelCheckpoint(filename="last", save_on_train_epoch_end=True, **kept),
    ]
    if every is not None:
        callbacks.append(ModelCheckpoint(filename="last", every_n_train_steps=every, **kept))
    bar = shows_progress_bar() and bool(config.trainer.enable_progress_bar)
    if bar:
        callbacks.append(TQDMProgressBar())
    with user_errors("trainer"):
        return _instantiate(
            "trainer",
            config.trainer,
            callbacks=callbacks,
            logger=_loggers(config, folder, resumed),
            default_root_dir=str(folder.root),
            enable_progress_bar=bar,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            # The data module deals the ranks their shares itself, so that order depends on seed and epoch alone.
            use_distributed_sampler=False,
        )


def _loggers(config: DictConfig, folder: RunFolder, resumed: dict[str, Any] | None) -> list[Logger]:
    step = resumed["global_step"] - 1 if resumed is not None else -1
    loggers: list[Logger] = [CsvLogger(folder.logs / "metrics.csv", resume_step=step)]
    if config.logger.get("_target_") and is_first_process():
        logger = _instantiate("logger", config.logger, folder=folder.root, run_name=str(config.run_name))
        logger.log_hyperparams(without_secrets(plain(config)))
        loggers.append(logger)
        if isinstance(logger, WandbLogger):
            settings = logger.experiment.settings
            sync = "" if settings.mode == "online" else f"; to upload it: wandb sync {settings.sync_dir}"
            log.info("W&B        %s%s", settings.mode, sync)
    return loggers


def _resume_inside_epoch(checkpoint: dict[str, Any], data: ImageData) -> None:
    """Leave out the batches of the current epoch that the checkpoint has seen."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    if not progress["is_last_batch"]:
        data.start_batch = progress["current"]["processed"]


def _score(trainer: Trainer, module: Classifier, data: ImageData, folder: RunFolder, *, test: bool) -> dict[str, Any]:
    """Score the best checkpoint on validation and, once, on test."""
    trainer.strategy.barrier()
    path = folder.best if folder.best.exists() else folder.last
    best = load_checkpoint(path)
    module.load_state_dict(best["state_dict"])
    results: dict[str, Any] = {
        "checkpoint": path.name,
        "best_epoch": best["epoch"] + 1,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "images_per_second": float(trainer.callback_metrics.get("speed/images_per_second", 0)),
    }
    # Validation was logged while training: this repeats it for the weights that are scored, not for the curves.
    loggers, trainer.loggers = trainer.loggers, []
    results["val"] = _numbers(trainer.validate(module, datamodule=data, verbose=False), "val/")
    trainer.loggers = loggers
    if test:
        trainer.test(module, datamodule=data, verbose=False)
        results["test"] = module.test_results
    return results


def _numbers(logged: Any, prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in logged[0].items() if name.startswith(prefix)}


@rank_zero_only
def _write_results(
    config: DictConfig,
    trainer: Trainer,
    module: Classifier,
    data: ImageData,
    folder: RunFolder,
    results: dict[str, Any],
) -> None:
    probe = config.callbacks.attention_probe
    images, _ = data.sample("val", probe.num_images)
    layers = list(probe.layers) if probe.layers is not None else default_layers(module.net)
    seen = look(module.net, module.normalize, images, layers=layers)
    results["attention_statistics"] = {str(layer): values for layer, values in seen.statistics.items()}
    panels = write_panels(seen, images[: probe.picture_images], folder.attention, note=f"epoch {results['best_epoch']}")
    masks = write_masks(module.net, folder.attention)
    update_json(folder.results / "metrics.json", results)
    for layer, path in panels.items():
        log_pictures(trainer.loggers, f"attention/best_layer_{layer:02d}", [path], step=trainer.global_step)
    for logger in trainer.loggers:
        logger.finalize("success")
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
    if "test" in results:
        log.info("test       accuracy %.2f %%, loss %.4f", 100 * results["test"]["acc"], results["test"]["loss"])
    log.info("validation accuracy %.2f %% (epoch %d)", 100 * results["val"]["acc"], results["best_epoch"])
    log.info("results    %s", folder.results / "metrics.json")
    for path in (*panels.values(), *masks):
        log.info("picture    %s", path)


def update_json(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Put ``content`` into a JSON file, over what it holds, in one move: a reader never sees half of it."""
    if path.exists():
        content = {**json.loads(path.read_text()), **content}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    part.replace(path)
    return content
