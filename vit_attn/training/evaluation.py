"""Score a checkpoint on the whole test split, and draw what it attends to."""

import logging
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vit_attn.console import log_paths
from vit_attn.cost import environment, model_cost
from vit_attn.data import ImageData
from vit_attn.data.checks import whole
from vit_attn.errors import UserError, one_line
from vit_attn.explain.explanations import METHOD_TITLES, RANDOM
from vit_attn.explain.figures import confusion_figure, reliability_figure
from vit_attn.explain.probe import look, write_masks, write_panels
from vit_attn.explain.style import save_figure
from vit_attn.training.explaining import explain_test_images
from vit_attn.training.folder import update_json
from vit_attn.training.module import CALIBRATION_BINS, Classifier
from vit_attn.training.restore import Restored, build_tester, load_data, restore

log = logging.getLogger("vit_attn")


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
    for key in ("attention_images", "picture_images", "explain_images"):
        whole(key, config[key], least=1, prefix="")
    if not isinstance(config.explain, bool):
        raise UserError(f"explain must be true or false, not {config.explain!r}")
    trainer = build_tester(config.accelerator)
    restored = restore(config)
    saved, module, folder = restored.config, restored.module, restored.folder
    data = load_data(config, restored, data_overrides)
    restored.make_folder()
    trainer.test(module, datamodule=data, verbose=False)
    module.to(trainer.strategy.root_device)
    test = {**module.test_results, "images_per_second": measure_throughput(module, data)}
    results: dict[str, Any] = {
        "run": saved["run_name"],
        "experiment": saved["experiment_name"],
        "seed": saved["seed"],
        "attention": saved["model"]["attention"],
        "checkpoint": restored.path.name,
        "best_epoch": restored.epoch,
        "data": data.describe(),
        "test": test,
        "cost": model_cost(module.net, data.image_size, data.in_chans),
        "environment": environment(),
    }
    images, labels = data.sample("test", config.attention_images)
    seen = look(module.net, module.normalize, images, layers=restored.layers)
    results["attention_statistics"] = {str(layer): values for layer, values in seen.statistics.items()}
    results["attention_images"] = f"{len(images)} test"
    panels = write_panels(
        seen,
        images,
        folder / "attention",
        count=config.picture_images,
        note="test images",
        suffix="_test",
        captions=[data.class_names[label] for label in labels.tolist()],
    )
    paths = [*panels.values(), *write_masks(module.net, folder / "attention")]
    paths += _draw_scores(restored, data.class_names)
    if config.explain:
        results["explanations"], written = explain_test_images(
            module,
            data,
            folder,
            count=config.explain_images,
            note=restored.note,
            layers=restored.layers,
            picture_images=config.picture_images,
        )
        paths += written
    results = update_json(folder / "metrics.json", results)
    _print(results, data.class_names)
    if config.explain:
        Console(highlight=False).print(explanations_table(results["explanations"]))
    log_paths([folder / "metrics.json", *paths])
    return results


def _draw_scores(restored: Restored, class_names: list[str]) -> list[Path]:
    """Draw the confusion matrix and the calibration that the module has just measured."""
    test, calibration = restored.module.test_results, restored.module.calibration
    title = f"{restored.title} · test images"
    figures = {
        "confusion": confusion_figure(test["confusion"], class_names, title=title),
        "reliability": reliability_figure(*calibration, ece=test["ece"], title=title, bins=CALIBRATION_BINS),
    }
    return [save_figure(figure, restored.folder / f"{name}.png") for name, figure in figures.items()]


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
        scores.add_row(escape(f"class {one_line(name)}"), f"{100 * accuracy:.2f} %")

    layers = Table(title="attention on test images", title_justify="left")
    layers.add_column("layer", justify="right")
    layers.add_column("mechanism", no_wrap=True)
    for column in ("zeros", "entropy (nats)", "keys per query", "distance (patches)"):
        layers.add_column(column, justify="right")
    for layer, values in results["attention_statistics"].items():
        mechanism = cost["layers"][int(layer)].split(" ")[0]
        numbers = (f"{100 * values['zeros']:.1f} %", f"{values['entropy']:.2f}", f"{values['support']:.1f}")
        # Where no patch attends to a patch there is no distance.
        distance = f"{values['distance']:.2f}" if "distance" in values else "–"
        layers.add_row(layer, mechanism, *numbers, distance)
    console = Console(highlight=False)
    console.print(scores)
    console.print(layers)


def explanations_table(explanations: dict[str, Any]) -> Table:
    """Areas under the deletion and insertion curves of each method, and how they stand to a random order."""
    images, methods = explanations["images"], explanations["methods"]
    title = f"explanations of {images} image{'s' * (images != 1)}, area under the curve of\n"
    title += "deletion (lower is better) and insertion (higher is better)"
    table = Table(title=title, title_justify="left")
    table.add_column("method", no_wrap=True)
    for column in ("deletion", "to random", "insertion", "to random"):
        table.add_column(column, justify="right")
    for name, values in methods.items():
        row = [METHOD_TITLES.get(name, "random order")]
        for curve in ("deletion_auc", "insertion_auc"):
            difference = values[curve] - methods[RANDOM][curve]
            row += [f"{values[curve]:.3f}", "" if name == RANDOM else f"{difference:+.3f}"]
        table.add_row(*row)
    return table
