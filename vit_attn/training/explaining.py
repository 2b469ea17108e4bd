"""Explanations of a classifier on its test images: what training, evaluation and the command share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vit_attn.data import ImageData
from vit_attn.explain.write import write_explanations
from vit_attn.training.module import Classifier


def explain_test_images(
    module: Classifier,
    data: ImageData,
    folder: Path,
    *,
    count: int,
    note: str,
    layers: Sequence[int] | None = None,
    picture_images: int = 4,
    seed: int = 0,
) -> tuple[dict[str, Any], list[Path]]:
    """Explain test images, always the same ones; see :func:`vit_attn.explain.write.write_explanations`.

    Args:
        count: how many, spread evenly over the test split.
        note: of the model, such as "epoch 3"; titles add that these are test images.
    """
    images, labels = data.sample("test", count)
    return write_explanations(
        module.net,
        module.normalize,
        module.probabilities,
        images,
        labels,
        folder,
        class_names=data.class_names,
        note=f"{note} · test images",
        layers=layers,
        picture_images=picture_images,
        seed=seed,
    )
