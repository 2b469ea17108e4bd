"""A training run from its configuration: build, fit, score the best checkpoint, write results."""

import copy
import logging
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from torch import distributed, nn

from vit_attn.attention import attention_layers
from vit_attn.config import plain, without_secrets
from vit_attn.console import is_first_process, log_paths
from vit_attn.cost import describe_attention, environment, model_cost, peak_memory
from vit_attn.data import ImageData, check_same_data
from vit_attn.errors import UserError, on_every_process, one_line, user_errors
from vit_attn.explain.explanation_figures import overlay
from vit_attn.explain.explanations import METHOD_TITLES, Explanations
from vit_attn.explain.probe import default_layers, look, write_masks, write_panels
from vit_attn.tracking.loggers import (
    Prediction,
    finish_loggers,
    log_checkpoints,
    log_config,
    log_files,
    log_pictures,
    log_predictions,
)
from vit_attn.training.build import build_callbacks, build_data, build_module, build_net, build_trainer
from vit_attn.training.callbacks import AttentionProbe, Throughput
from vit_attn.training.check import check_config
from vit_attn.training.checkpoint import newest
from vit_attn.training.described import as_described, check_progress, going_on_from
from vit_attn.training.explaining import explain_test_images
from vit_attn.training.failures import named
from vit_attn.training.finite import MOST_SKIPPED, NotFiniteError
from vit_attn.training.folder import RunFolder, read_json, update_json
from vit_attn.training.launcher import follow_launcher
from vit_attn.training.module import Classifier, build_optimizer, build_schedule
from vit_attn.training.ranks import Ranks
from vit_attn.training.sharding import whole_net
from vit_attn.training.stopping import Stopped, StopSignals

log = logging.getLogger("vit_attn")


def train(config: DictConfig) -> dict[str, Any]:
    """Run, or go on with, what ``config`` describes.

    Returns:
        What results/metrics.json holds.

    Raises:
        UserError: a mistake in the configuration or the data, before any training; later, a failure of the machine.
        Stopped: by a signal; what was done is saved.
    """
    with on_every_process():
        follow_launcher(config)
        check_config(config)
    folder = RunFolder.of(config)
    with StopSignals() as signals:
        try:
            data = _load(config)
            net = _make_net(config, data)
            with folder.locked():
                return _train(config, folder, data, net, signals)
        except Stopped as stop:
            stopped = stop
    signals.pass_on(stopped)
    raise stopped


def _load(config: DictConfig) -> ImageData:
    data = build_data(config.data, config.seed)
    with user_errors("data"):
        data.prepare_data()
        data.setup("fit")
    return data


def _make_net(config: DictConfig, data: ImageData) -> nn.Module:
    """Build the network, and find what would be found wrong once training begins."""
    seed_everything(config.seed, verbose=False)
    # Nulls of the configuration mean "as timm has it", so the plain dictionary goes to timm, not OmegaConf.
    net = build_net(plain(config.model), num_classes=data.num_classes, image_size=data.image_size)
    build_optimizer(net, config.optimizer)
    for callback in build_callbacks(config, None):
        if isinstance(callback, AttentionProbe):
            callback.check_layers(net)
    return net


def _train(
    config: DictConfig, folder: RunFolder, data: ImageData, net: nn.Module, signals: StopSignals
) -> dict[str, Any]:
    """Fit and score in a folder that is this process' own, and leave word in it of how that ended."""
    # Before anything is written: what cannot be gone on with must not cost the logs.
    resumed = None if config.overwrite else _resume(config, folder, net, data)
    folder.create(config)
    try:
        with Ranks(on_loss=lambda what: folder.end("failed", what)) as ranks:
            while True:
                try:
                    results = _run(config, folder, data, net, resumed, signals, ranks)
                    break
                except NotFiniteError as error:
                    _leave_out(config, folder, error)
                net = _make_net(config, data)
                resumed = _resume(config, folder, net, data)
    except Stopped as stop:
        folder.end("stopped", str(stop))
        raise
    except Exception as error:
        failure = named(error, config)
        folder.end("failed", str(failure) if failure else f"{type(error).__name__}: {one_line(error)[:300]}")
        if failure is None or failure is error:
            raise
        raise failure from error
    folder.set_state("finished")
    return results


def _resume(config: DictConfig, folder: RunFolder, net: nn.Module, data: ImageData) -> dict[str, Any] | None:
    """Read where to go on from, and see that the data are those of then; the weights are left to Lightning.

    What only a later step would stumble over is found here, while it is still the checkpoint that is suspected.

    Returns:
        "path" of the checkpoint, and its "global_step" and "loops": the rest would be in memory for the whole training.
    """
    found = folder.resume()
    if found is None:
        return None
    path, resumed = found
    with as_described(path):
        check_progress(resumed)
        check_same_data(resumed["vit_attn"]["data"], data.describe())
        schedule = build_schedule(build_optimizer(net, config.optimizer), config.lr_schedule, total=1)
        schedule.load_state_dict(resumed["lr_schedulers"][0])
        schedule.step()
        return {"path": path, "global_step": resumed["global_step"], "loops": resumed["loops"]}


def _leave_out(config: DictConfig, folder: RunFolder, error: NotFiniteError) -> None:
    """Note the batches that ``error`` is of, to be left out from now on.

    Raises:
        UserError: that is not wanted, or they are too many.
    """
    kept = next((path for path in (folder.last, folder.previous) if path.exists()), None)
    state = f"{kept} is from before it" if kept else "no checkpoint had been written yet"
    skipped = folder.skipped_batches()
    if config.trainer.on_nan == "stop":
        raise UserError(
            f"{error}; {state}. A smaller optimizer.lr, a longer lr_schedule.warmup or trainer.precision=32-true may "
            "help; trainer.on_nan=rewind goes back and leaves the batch out"
        ) from error
    if len(skipped) + len(error.batches) > MOST_SKIPPED:
        raise UserError(
            f"{error}, after {len(skipped)} batches that were left out for the same: this training diverges. "
            f"{state}. Try a smaller optimizer.lr or a longer lr_schedule.warmup"
        ) from error
    log.warning("rewind     %s: left out from now on; %s", error, state)
    new = [{"epoch": error.epoch, "batch": batch, "step": error.step, "why": str(error)} for batch in error.batches]
    folder.skip(skipped + new)
    if distributed.is_initialized():
        distributed.barrier()  # the others read what the first has written


def _run(
    config: DictConfig,
    folder: RunFolder,
    data: ImageData,
    net: nn.Module,
    resumed: dict[str, Any] | None,
    signals: StopSignals,
    ranks: Ranks,
) -> dict[str, Any]:
    """Fit, score the best checkpoint and write results into a folder that stands ready."""
    cost = model_cost(net, data.image_size, data.in_chans)
    _introduce(folder, config, data, net, cost)
    if config.compile:
        net.compile()
    module = build_module(config, net, data)
    skipped = folder.skipped_batches()
    module.left_out = {(entry["epoch"], entry["batch"]) for entry in skipped}
    trainer = build_trainer(config, folder, resumed, signals)
    ranks.follow(trainer)
    try:
        log_config(trainer.loggers, without_secrets(plain(config)), _facts(data, net, cost))
        if resumed is not None:
            with as_described(resumed["path"]):
                _place_data(resumed, data)
            log.info("resuming from %s at step %d", resumed["path"], resumed["global_step"])
        path = resumed["path"] if resumed is not None else None
        with going_on_from(path, lambda: resumed is None or trainer.global_step > resumed["global_step"], config):
            trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
        module.net = whole_net(module.net)  # one process draws and explains, alone
        results = _score(trainer, module, data, folder, test=config.test)
        results |= {"run": str(config.run_name), "experiment": str(config.experiment_name), "seed": config.seed}
        results |= {"attention": plain(config.model)["attention"], "cost": cost, "environment": environment()}
        results |= {"data": data.describe(), "skipped_batches": skipped}
        _write_results(config, trainer, module, data, folder, results)
    except BaseException as error:
        finish_loggers(trainer.loggers, failed=True, stopped=isinstance(error, Stopped))
        raise
    finish_loggers(trainer.loggers, failed=False)
    return results


def _introduce(folder: RunFolder, config: DictConfig, data: ImageData, net: Any, cost: dict[str, Any]) -> None:
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
    patch = net.patch_embed.patch_size[0]
    if data.image_size % patch:
        log.info("note: patches of %d leave %d of %d pixels unseen", patch, data.image_size % patch, data.image_size)
    for line in describe_attention(cost):
        log.info("attention  %s", line)


def _facts(data: ImageData, net: Any, cost: dict[str, Any]) -> dict[str, Any]:
    """What a tracker filters by and the configuration does not say."""
    terms = [term for layer in attention_layers(net) for term in layer.mechanism.terms()]
    names = {
        term.what: ", ".join(dict.fromkeys(each.name for each in terms if each.what == term.what)) for term in terms
    }
    facts = {"dataset": type(data).__name__.lower(), **names}
    if None not in cost["entries"]:
        facts |= {"sparsity": sum(cost["sparsity"]) / len(cost["sparsity"]), "entries": sum(cost["entries"])}
    return facts | {name: cost[name] for name in ("parameters", "flops", "flops_by_entries")}


def _place_data(checkpoint: dict[str, Any], data: ImageData) -> None:
    """Let the data begin where the checkpoint has stopped."""
    loops = checkpoint["loops"]["fit_loop"]
    data.start_epoch = loops["epoch_progress"]["current"]["processed"]
    progress = loops["epoch_loop.batch_progress"]
    if not progress["is_last_batch"]:
        data.start_batch = progress["current"]["processed"]


def _score(trainer: Trainer, module: Classifier, data: ImageData, folder: RunFolder, *, test: bool) -> dict[str, Any]:
    """Score the best checkpoint on validation and, once, on test."""
    trainer.strategy.barrier()
    found = newest([folder.best, folder.last], set_aside=is_first_process())
    assert found is not None, "the last one has just been written"
    path, best = found
    with as_described(path):
        module.load_state_dict(best["state_dict"])
        best_epoch, best_step = int(best["epoch"]) + 1, int(best["global_step"])
    results: dict[str, Any] = {
        "checkpoint": path.name,
        "best_epoch": best_epoch,
        "best_step": best_step,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "speed": _speed(trainer, module, data),
    }
    # Validation was logged while training: this repeats it for the weights that are scored, not for the curves.
    loggers, trainer.loggers = trainer.loggers, []
    results["val"] = _numbers(trainer.validate(module, datamodule=data, verbose=False), "val/")
    trainer.loggers = loggers
    if test:
        trainer.test(module, datamodule=data, verbose=False)
        results["test"] = module.test_results
    return results


def _speed(trainer: Trainer, module: Classifier, data: ImageData) -> dict[str, Any]:
    """How fast the training was, and the memory that one step takes beyond weights and optimizer state."""
    throughput = next(callback for callback in trainer.callbacks if isinstance(callback, Throughput))  # type: ignore[attr-defined]
    device = module.device
    return {
        **throughput.medians(),
        "batch_size": data.batch_size,
        "devices": trainer.world_size,
        "peak_memory_bytes": _step_memory(trainer, module, data),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _step_memory(trainer: Trainer, module: Classifier, data: ImageData) -> int:
    """Bytes that forward and backward of one batch hold at most: the same on a busy and on an idle machine."""
    net = copy.deepcopy(module.net).train()  # DDP listens to the gradients of the original
    device = module.device
    images = torch.zeros(data.batch_size, data.in_chans, data.image_size, data.image_size, device=device)
    labels = torch.zeros(data.batch_size, dtype=torch.long, device=device)

    def step() -> None:
        with trainer.precision_plugin.forward_context():
            loss = module.criterion(net(images), labels)
        loss.backward()

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        step()  # what is made once, gradients among it, is none of a step's
        return peak_memory(step, device)


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
    results["attention_images"] = f"{len(images)} val"
    note = f"epoch {results['best_epoch']}"
    panels = write_panels(seen, images, folder.attention, count=probe.picture_images, note=note)
    masks = write_masks(module.net, folder.attention)
    for layer, path in panels.items():
        log_pictures(trainer.loggers, f"attention/best_layer_{layer:02d}", [path], step=trainer.global_step)
    if masks:
        log_files(trainer.loggers, "masks", "masks", masks)
    pictures = [*panels.values(), *masks]
    if config.test and config.explain_images:
        results["explanations"], drawn = explain_test_images(
            module, data, folder.results, count=config.explain_images, note=note, picture_images=probe.picture_images
        )
        pictures += drawn
        log_predictions(trainer.loggers, _predictions(folder, data.class_names))
    path = folder.results / "metrics.json"
    before = read_json(path).get("speed")  # a run that is asked for again after its end has no steps to time
    if isinstance(before, dict):
        results["speed"] = before | results["speed"]
    update_json(path, results)
    log_checkpoints(
        trainer.loggers,
        best=folder.checkpoints / results["checkpoint"],
        last=folder.last,
        best_step=results["best_step"],
        last_step=trainer.global_step,
        best_numbers={"val/acc": results["val"]["acc"], "epoch": results["best_epoch"]},
        last_numbers={"epoch": results["epochs"]},
    )
    if "test" in results:
        log.info("test       accuracy %.2f %%, loss %.4f", 100 * results["test"]["acc"], results["test"]["loss"])
    log.info("validation accuracy %.2f %% (epoch %d)", 100 * results["val"]["acc"], results["best_epoch"])
    log_paths([path, *pictures])


def _predictions(folder: RunFolder, class_names: list[str]) -> list[Prediction]:
    """What the explanations say, as rows of a table."""
    found = Explanations.load(folder.results / "explanations.npz")
    return [
        Prediction(
            image=found.images[row],
            overlays={
                METHOD_TITLES[method]: overlay(found.images[row], maps[row]) for method, maps in found.maps.items()
            },
            true=class_names[found.labels[row]],
            predicted=class_names[found.predictions[row]],
            confidence=float(found.confidences[row]),
        )
        for row in range(len(found.images))
    ]
