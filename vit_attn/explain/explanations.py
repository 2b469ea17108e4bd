"""What a model looks at in some images, by four methods, and how well each holds when patches are taken away."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn

from vit_attn.attention import attention_layers, observe_attention
from vit_attn.explain.curves import area_under_curve, deletion_and_insertion, patch_order, random_order
from vit_attn.explain.gradcam import grad_cam
from vit_attn.explain.maps import patch_maps, reads_class_token
from vit_attn.explain.probe import weight_entries
from vit_attn.explain.relevance import attention_rollout, gradient_attention
from vit_attn.explain.undisturbed import undisturbed

METHODS = ("attention", "rollout", "gradcam", "gradient_attention")
METHOD_TITLES = {
    "attention": "attention (last layer)",
    "rollout": "attention rollout",
    "gradcam": "Grad-CAM",
    "gradient_attention": "gradient × attention",
}
RANDOM = "random"  # the order of patches that every method has to beat
# Weights of all layers, heads and images that exist at a time, with their gradients and what made them.
_MAX_ENTRIES = 2**25
_ARRAYS = ("images", "labels", "predictions", "confidences")
_BY_METHOD = {"maps": METHODS, "deletion": (*METHODS, RANDOM), "insertion": (*METHODS, RANDOM)}


@dataclass(frozen=True, eq=False)
class Explanations:
    """Maps and curves of n images.

    Args:
        images: (n, H, W, C) uint8, as they were before normalization.
        labels, predictions: (n,) int64.
        confidences: (n,) float32, probability of the predicted class.
        maps: method → (n, gh, gw) float32, for the predicted class; each in a scale of its own.
        deletion, insertion: method, and "random" → (n, steps + 1) float32, probability of the predicted class after
            patches are taken away, or uncovered, in the order of the map; see :mod:`vit_attn.explain.curves`.
    """

    images: NDArray
    labels: NDArray
    predictions: NDArray
    confidences: NDArray
    maps: dict[str, NDArray]
    deletion: dict[str, NDArray]
    insertion: dict[str, NDArray]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write an .npz file in one move, and return its path; the folder is made if need be.

        Raises:
            OSError: it cannot be written.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        arrays |= {f"{name}/{key}": array for name in _BY_METHOD for key, array in getattr(self, name).items()}
        partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with partial.open("wb") as file:
                np.savez_compressed(file, **arrays)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Explanations":
        """Read what :meth:`save` wrote; nothing is unpickled.

        Raises:
            ValueError: the file is broken, or holds something else.
            OSError: it cannot be read.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                content: dict[str, Any] = {name: file[name] for name in _ARRAYS}
                for name, keys in _BY_METHOD.items():
                    content[name] = {key: file[f"{name}/{key}"] for key in keys}
            found = cls(**content)
        except FileNotFoundError:
            raise
        # What NumPy and zipfile raise for a file that is cut short, of another kind, or lacks an array.
        except (
            BadZipFile,
            KeyError,
            ValueError,
            EOFError,
            AttributeError,
            TypeError,
            OSError,
            NotImplementedError,
        ) as error:
            raise ValueError(f"{path}: broken, or not made by vit_attn.explain") from error
        if not found._fits():
            raise ValueError(f"{path}: its arrays do not fit each other")
        return found

    def _fits(self) -> bool:
        count = len(self.images) if self.images.ndim == 4 else -1
        flat = all(getattr(self, name).shape == (count,) for name in _ARRAYS[1:])
        maps = {array.shape for array in self.maps.values()}
        curves = {array.shape for group in (self.deletion, self.insertion) for array in group.values()}
        one = len(maps) == len(curves) == 1 and {len(shape) for shape in maps} == {3} and len(min(curves)) == 2
        return flat and one and self.images.dtype == np.uint8 and {shape[0] for shape in maps | curves} == {count}

    @property
    def grid_size(self) -> tuple[int, int]:
        """(height, width) of the maps, in patches."""
        _, height, width = self.maps[METHODS[0]].shape
        return height, width

    def areas(self) -> dict[str, dict[str, float]]:
        """Means over the images of the areas under the curves: method, and "random" → deletion_auc, insertion_auc."""
        patches = self.grid_size[0] * self.grid_size[1]
        return {
            name: {
                "deletion_auc": float(area_under_curve(self.deletion[name], patches).mean()),
                "insertion_auc": float(area_under_curve(self.insertion[name], patches).mean()),
            }
            for name in self.deletion
        }

    def summary(self) -> dict[str, Any]:
        """What results/metrics.json holds under "explanations", the receptive field left out."""
        return {"images": len(self.images), "methods": self.areas()}


def explain_images(
    net: nn.Module,
    normalize: nn.Module,
    probabilities: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    seed: int = 0,
) -> Explanations:
    """Explain the class that ``net`` predicts for each image, a bounded number of images at a time.

    Args:
        net: from ``create_vit``, on any device, compiled or not, frozen or not; left as it was.
        normalize: raw images to what ``net`` takes.
        probabilities: logits (B, C) to probabilities (B, C).
        images: (n, C, H, W) uint8, at least one.
        labels: (n,) int64.
        seed: of the random order, and of the order among patches that a map gives the same value.

    Raises:
        ValueError: no images.
    """
    if not len(images):
        raise ValueError("there are no images to explain")
    device = next(net.parameters()).device
    with undisturbed(net):
        at_once = max(1, min(32, _MAX_ENTRIES // (weight_entries(net) * len(attention_layers(net)))))
        parts = [_maps(net, normalize(part.to(device)), probabilities) for part in images.split(at_once)]
        predictions = torch.cat([part[0] for part in parts])
        maps = {method: np.concatenate([part[2][method] for part in parts]) for method in METHODS}
        orders = {method: patch_order(values, seed=seed) for method, values in maps.items()}
        orders[RANDOM] = random_order(*orders[METHODS[0]].shape, seed=seed)

        def probability(changed: Tensor, rows: Tensor) -> Tensor:
            return probabilities(net(changed)).gather(1, predictions[rows, None])[:, 0]

        deletion, insertion = deletion_and_insertion(
            probability,
            torch.cat([normalize(part.to(device)) for part in images.split(at_once)]),
            orders,
            patch_size=net.patch_embed.patch_size,  # type: ignore[union-attr, arg-type]  # every timm ViT has one
            grid_size=attention_layers(net)[0].grid_size,
            batch_size=max(1, min(128, 2 * _MAX_ENTRIES // weight_entries(net))),
        )
    return Explanations(
        images=images.permute(0, 2, 3, 1).cpu().numpy(),
        labels=labels.cpu().numpy(),
        predictions=predictions.cpu().numpy(),
        confidences=torch.cat([part[1] for part in parts]).float().cpu().numpy(),
        maps=maps,
        deletion=deletion,
        insertion=insertion,
    )


def _maps(
    net: nn.Module, images: Tensor, probabilities: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, dict[str, NDArray]]:
    """Predicted classes (B,), their probabilities (B,), and method → (B, gh, gw) for normalized images."""
    weights: list[Tensor] = []
    # The network is frozen: the images ask for the gradient of the weights.
    with observe_attention(net, lambda layer, seen: weights.append(seen), keep_graph=True):
        logits = net(images.clone().requires_grad_())
    predicted = logits.detach().argmax(1)
    gradients = torch.autograd.grad(logits.gather(1, predicted[:, None]).sum(), weights)
    relevance = gradient_attention(weights, gradients)
    # The identity that it starts from says the same of every patch, and would leave a mean over them few digits.
    relevance = relevance - torch.eye(relevance.shape[-1], device=relevance.device)
    layer = attention_layers(net)[-1]

    def from_reader(between_tokens: Tensor) -> NDArray:  # (B, H, N, N) -> (B, gh, gw)
        maps = patch_maps(
            between_tokens,
            num_prefix_tokens=layer.num_prefix_tokens,
            has_class_token=reads_class_token(net),
            grid_size=layer.grid_size,
        )
        return maps.mean(dim=1).float().cpu().numpy()

    maps = {
        "attention": from_reader(weights[-1].detach()),
        "rollout": from_reader(attention_rollout(weights)[:, None]),
        "gradcam": grad_cam(net, images, predicted),
        "gradient_attention": from_reader(relevance[:, None]),
    }
    confidences = probabilities(logits.detach()).gather(1, predicted[:, None])[:, 0]
    return predicted, confidences, maps


def agreement(a: Explanations, b: Explanations) -> dict[str, float]:
    """Tell how much two models agree on the order of the patches: method → Spearman's rank correlation in [-1, 1].

    The mean over the images; those where a map is constant have no order and are left out, and where none is left
    the value is nan.

    Raises:
        ValueError: explanations of other images, or over another patch grid.
    """
    if a.images.shape != b.images.shape or not np.array_equal(a.images, b.images):
        raise ValueError("the explanations are of different images: make both with the same data and images=")
    if a.grid_size != b.grid_size:
        ours, theirs = ("x".join(map(str, one.grid_size)) for one in (a, b))
        raise ValueError(f"the maps lie on different patch grids, {ours} and {theirs}")
    found = {}
    for method in METHODS:
        pairs = zip(a.maps[method], b.maps[method], strict=True)
        ranks = [spearmanr(x, y, axis=None).statistic for x, y in pairs if np.ptp(x) > 0 and np.ptp(y) > 0]
        found[method] = float(np.mean(ranks)) if ranks else float("nan")
    return found
