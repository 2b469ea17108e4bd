"""Score a checkpoint on the whole test split, and draw what it attends to."""

import logging
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vit_attn.attention import attention_layers
from vit_attn.config import plain
from vit_attn.console import shows_progress_bar
from vit_attn.cost import environment, model_cost
from vit_attn.data import ImageData, Normalize
from vit_attn.data.checks import whole
from vit_attn.errors import UserError, one_line, unknown_name, user_errors
from vit_attn.explain.figures import confusion_figure, reliability_figure
from vit_attn.explain.probe import default_layers, look, write_masks, write_panels
from vit_attn.explain.style import save_figure
from vit_attn.training.build import build_data, build_loss, build_net
from vit_attn.training.folder import RunFolder, load_checkpoint, update_json
from vit_attn.training.module import CALIBRATION_BINS, Classifier

log = logging.getLogger("vit_attn")


def find_checkpoint(where: str) -> tuple[Path, Path]:
    """Find the checkpoint that ``ckpt=`` means: a file, or the best (else the last) of a run folder.

    Returns:
        The checkpoint, and the folder for results.

    Raises:
        UserError: nothing of the kind is there.
    """
    path = Path(where).expanduser()
    if path.is_dir():
        folder = RunFolder(path)
        for candidate in (folder.best, folder.last):
            if candidate.exists():
                return candidate, folder.results
        raise UserError(f"ckpt={path}: no checkpoint in {folder.checkpoints}")
    if not path.exists():
        raise UserError(f"ckpt={path}: no such file or run folder")
    inside_run = path.parent.name == "checkpoints" and RunFolder(path.parent.parent).config.exists()
    return path, RunFolder(path.parent.parent).results if inside_run else path.parent / "results"


def evaluate(config: DictConfig, data_overrides: dict[str, Any]) -> dict[str, Any]:
    """Score the checkpoint that ``config`` names.

    Args:
        config: conf/evaluate.yaml, composed.
        data_overrides: changes to the data configuration that the checkpoint was trained with, where ``config``
            names no other.

    Returns:
        What results/metrics.json holds afterwards.

    Raises:
        UserError: a checkpoint or data that cannot be used.
    """
    for key in ("attention_images", "picture_images"):
        whole(key, config[key], least=1, prefix="")
    if config.layers is not None and not all(isinstance(layer, int) for layer in config.layers):
        raise UserError(f"layers must be a list of layer numbers, such as [0,3], not {config.layers!r}")
    path, results_folder = find_checkpoint(str(config.ckpt))
    checkpoint = load_checkpoint(path)
    saved: dict[str, Any] = checkpoint["vit_attn"]["config"]
    trained_on: dict[str, Any] = checkpoint["vit_attn"]["data"]
    data = _load_data(config, saved, trained_on, data_overrides)
    module = _build_module(saved, trained_on, checkpoint["state_dict"])
    layers = list(config.layers) if config.layers is not None else default_layers(module.net)
    depth = len(attention_layers(module.net))
    if any(not 0 <= layer < depth for layer in layers):
        raise UserError(f"layers={layers}: the model has layers 0 to {depth - 1}")
    folder = Path(config.output).expanduser() if config.output else results_folder
    if config.get("data") is not None and not config.output:
        folder /= "other_data"  # what the run itself measured stays
    with user_errors(f"output {folder}"):
        (folder / "attention").mkdir(parents=True, exist_ok=True)

    trainer = Trainer(
        accelerator=_accelerator(config.accelerator),
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=shows_progress_bar(),
        use_distributed_sampler=False,
    )
    trainer.test(module, datamodule=data, verbose=False)
    module.to(trainer.strategy.root_device)
    test = {**module.test_results, "images_per_second": measure_throughput(module, data)}
    results: dict[str, Any] = {
        "run": saved["run_name"],
        "experiment": saved["experiment_name"],
        "seed": saved["seed"],
        "attention": saved["model"]["attention"],
        "checkpoint": path.name,
        "best_epoch": checkpoint["epoch"] + 1,
        "data": data.describe(),
        "test": test,
        "cost": model_cost(module.net, data.image_size, data.in_chans),
        "environment": environment(),
    }
    images, labels = data.sample("test", config.attention_images)
    seen = look(module.net, module.normalize, images, layers=layers)
    results["attention_statistics"] = {str(layer): values for layer, values in seen.statistics.items()}
    title = f"{saved['run_name']} · {saved['model']['attention']} · test images"
    panels = write_panels(
        seen,
        images,
        folder / "attention",
        count=config.picture_images,
        note="test images",
        suffix="_test",
        captions=[data.class_names[label] for label in labels.tolist()],
    )
    pictures = list(panels.values())
    pictures += write_masks(module.net, folder / "attention")
    pictures.append(
        save_figure(confusion_figure(test["confusion"], data.class_names, title=title), folder / "confusion.png")
    )
    calibration = reliability_figure(*module.calibration, ece=test["ece"], title=title, bins=CALIBRATION_BINS)
    pictures.append(save_figure(calibration, folder / "reliability.png"))
    results = update_json(folder / "metrics.json", results)
    _print(results, data.class_names)
    log.info("results    %s", folder / "metrics.json")
    for picture in pictures:
        log.info("picture    %s", picture)
    return results


def _load_data(
    config: DictConfig, saved: dict[str, Any], trained_on: dict[str, Any], overrides: dict[str, Any]
) -> ImageData:
    """Load the test split, with the sizes and the normalization that the model was trained with."""
    for key in overrides:
        if key not in saved["data"]:
            raise UserError(unknown_name("key", f"data.{key}", [f"data.{name}" for name in saved["data"]]))
    options = plain(config.data) if config.get("data") is not None else {**saved["data"], **overrides}
    fixed = {name: trained_on[name] for name in ("image_size", "mean", "std")}
    data = build_data(OmegaConf.create({**options, **fixed}), saved["seed"])
    with user_errors("data"):
        data.prepare_data()
        data.setup("test")
    if data.class_names != trained_on["class_names"]:
        theirs, ours = data.class_names, trained_on["class_names"]
        raise UserError(
            f"the data have {len(theirs)} classes ({', '.join(theirs[:3])}, …), but the checkpoint was trained on "
            f"{len(ours)} ({', '.join(ours[:3])}, …)"
        )
    return data


def _build_module(saved: dict[str, Any], trained_on: dict[str, Any], state: dict[str, Tensor]) -> Classifier:
    """Rebuild the model from what the checkpoint says of it."""
    # The checkpoint brings the weights: what they started from is not needed again.
    model = {**saved["model"], "pretrained": False, "weights": None}
    num_classes = len(trained_on["class_names"])
    module = Classifier(
        net=build_net(model, num_classes=num_classes, image_size=trained_on["image_size"]),
        criterion=build_loss(saved["loss"]),
        normalize=Normalize(trained_on["mean"], trained_on["std"]),
        num_classes=num_classes,
    )
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"the checkpoint's weights do not fit its configuration: {one_line(error)[:200]}") from error
    return module


def _accelerator(name: str) -> str:
    allowed = ("auto", "cpu", "gpu")
    if name not in allowed:
        raise UserError(f"accelerator={name}: one of {', '.join(allowed)}")
    if name == "gpu" and not torch.cuda.is_available():
        raise UserError("accelerator=gpu: no GPU is available; use accelerator=cpu")
    return name


@torch.no_grad()
def measure_throughput(module: Classifier, data: ImageData, repeats: int = 5) -> float:
    """Images per second of the forward pass, normalization included: the median over ``repeats`` batches."""
    images, _ = data.sample("test", data.eval_batch_size)
    device = module.device
    images = images.to(device)
    module.eval()
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        module(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return len(images) / sorted(times[1:])[repeats // 2]


def _print(results: dict[str, Any], class_names: list[str]) -> None:
    """Print the scores, and the attention of each layer, as tables."""
    test, cost = results["test"], results["cost"]
    scores = Table(title=f"test split, {sum(map(sum, test['confusion'])):,} images", title_justify="left")
    scores.add_column("score")
    scores.add_column("value", justify="right")
    scores.add_row("accuracy", f"{100 * test['acc']:.2f} %")
    if "top5" in test:
        scores.add_row("top-5 accuracy", f"{100 * test['top5']:.2f} %")
    scores.add_row("loss", f"{test['loss']:.4f}")
    scores.add_row(f"calibration error (ECE, {CALIBRATION_BINS} bins)", f"{100 * test['ece']:.2f} %")
    scores.add_row("throughput", f"{test['images_per_second']:,.0f} images/s")
    scores.add_row("parameters", f"{cost['parameters']:,}")
    scores.add_section()
    classes = list(zip(class_names, test["per_class_acc"], strict=True))
    if len(classes) > 10:
        classes.sort(key=lambda pair: pair[1])
        classes = classes[:5] + classes[-5:]
    for name, accuracy in classes:
        scores.add_row(f"class {name}", f"{100 * accuracy:.2f} %")

    layers = Table(title="attention on test images", title_justify="left")
    layers.add_column("layer", justify="right")
    layers.add_column("mechanism")
    for column in ("exact zeros", "entropy (nats)", "keys per query"):
        layers.add_column(column, justify="right")
    for layer, values in results["attention_statistics"].items():
        mechanism = cost["layers"][int(layer)].split(" ")[0]
        numbers = (f"{100 * values['zeros']:.1f} %", f"{values['entropy']:.2f}", f"{values['support']:.1f}")
        layers.add_row(layer, mechanism, *numbers)
    console = Console(highlight=False)
    console.print(scores)
    console.print(layers)
