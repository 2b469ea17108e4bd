"""Explain what a checkpoint predicts: where it looks, by four methods, and how well each of them holds.

python -m vit_attn.explain ckpt=experiments/demo/strided                       # test images
python -m vit_attn.explain ckpt=experiments/demo/strided images=64 layers=[0,3]
python -m vit_attn.explain ckpt=experiments/demo/strided image=photo.jpg       # any photograph
"""

import logging
import sys
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console

from vit_attn.console import log_paths, run_command
from vit_attn.data.checks import whole
from vit_attn.data.decode import decode_image
from vit_attn.errors import UserError, user_errors
from vit_attn.explain.explanations import explain_images
from vit_attn.explain.write import draw_images
from vit_attn.files import user_path
from vit_attn.training.evaluation import explanations_table
from vit_attn.training.explaining import explain_test_images
from vit_attn.training.folder import update_json
from vit_attn.training.restore import Restored, build_tester, load_data, read_command_line, restore

log = logging.getLogger("vit_attn")

_MOST_CLASSES = 5  # printed for a photograph


def explain(config: DictConfig, data_overrides: dict[str, Any]) -> dict[str, Any]:
    """Explain the checkpoint that ``config`` names.

    Args:
        config: conf/explain.yaml, composed.
        data_overrides: see :func:`vit_attn.training.restore.read_command_line`.

    Returns:
        The areas under the curves, as ``Explanations.summary`` has them.

    Raises:
        UserError: a checkpoint, data or a photograph that cannot be used.
    """
    for key, least in (("images", 1), ("picture_images", 1), ("seed", 0)):
        whole(key, config[key], least=least, prefix="")
    device = build_tester(config.accelerator).strategy.root_device
    if config.image is not None and (config.get("data") is not None or data_overrides):
        raise UserError("image= and data= exclude each other: a photograph, or the images of a data set")
    restored = restore(config)
    restored.module.to(device).eval()
    if config.image is not None:
        return _explain_photograph(config, restored)
    return _explain_test_images(config, restored, data_overrides)


def _explain_test_images(config: DictConfig, restored: Restored, data_overrides: dict[str, Any]) -> dict[str, Any]:
    data = load_data(config, restored, data_overrides)
    restored.make_folder()
    with user_errors(f"output {restored.folder}"):
        numbers, paths = explain_test_images(
            restored.module,
            data,
            restored.folder,
            count=config.images,
            note=restored.note,
            layers=restored.layers,
            picture_images=config.picture_images,
            seed=config.seed,
        )
        update_json(restored.folder / "metrics.json", {"explanations": numbers})
    Console(highlight=False).print(explanations_table(numbers))
    log_paths([restored.folder / "metrics.json", *paths])
    return numbers


def _explain_photograph(config: DictConfig, restored: Restored) -> dict[str, Any]:
    path = user_path("image", config.image)
    pixels = decode_image(str(path), restored.trained_on["image_size"])
    images = torch.from_numpy(pixels)[None]
    module, names = restored.module, restored.trained_on["class_names"]
    restored.make_folder()
    folder = restored.folder / "explanations" / path.stem
    unknown = torch.tensor([-1])
    found = explain_images(module.net, module.normalize, module.probabilities, images, unknown, seed=config.seed)
    with torch.no_grad():
        shares = module.probabilities(module(images.to(module.device)))[0]
    best = shares.topk(min(_MOST_CLASSES, len(names)))
    for share, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        log.info("class      %s %.2f %%", names[index], 100 * share)
    with user_errors(f"output {folder}"):
        paths = [found.save(folder / "explanations.npz")]
        paths += draw_images(
            module.net,
            module.normalize,
            images,
            found,
            folder,
            class_names=names,
            note=f"{restored.note} · {path.name}",
            layers=restored.layers,
        )
    Console(highlight=False).print(explanations_table(found.summary()))
    log_paths(paths)
    return found.summary()


def main() -> None:
    """Read the command line and explain."""
    command_line = read_command_line("explain", sys.argv[1:], __doc__ or "")
    if command_line is not None:
        explain(*command_line)


if __name__ == "__main__":
    sys.exit(run_command(main, resumes=False))
