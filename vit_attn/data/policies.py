"""torchvision's RandAugment and AutoAugment with the same draws and the same pixels, in less time per batch.

On a CPU torchvision convolves for sharpness in floating point, 100 times slower than additions, and computes the
geometry of every shear, shift and turn anew, though a policy knows only a handful of them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

_GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")


class _Faster(v2.Transform):
    """Takes the slow operations of a torchvision policy over; all other ones, and all draws, stay torchvision's.

    The method is internal to torchvision: under another name there, it is not called, and only the speed is lost.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sources: dict[tuple, Tensor] = {}

    def _apply_image_or_video_transform(self, image: Tensor, transform_id: str, magnitude: float, **how: Any) -> Tensor:
        if transform_id == "Sharpness" and min(image.shape[-2:]) > 2:
            return sharpen(image, 1.0 + magnitude)
        if transform_id in _GEOMETRIC:
            return _take(image, self._source(image, transform_id, magnitude, how))
        return super()._apply_image_or_video_transform(image, transform_id, magnitude, **how)

    def _source(self, image: Tensor, name: str, magnitude: float, how: dict[str, Any]) -> Tensor:
        """Of each pixel (H·W,): 1 + the place that torchvision takes it from, or 0 outside of the image."""
        H, W = image.shape[-2:]
        key = (name, magnitude, H, W, image.device)
        if key not in self._sources:
            places = torch.arange(1, H * W + 1, dtype=torch.float32, device=image.device).view(1, 1, H, W)
            moved = super()._apply_image_or_video_transform(places, name, magnitude, **how)
            self._sources[key] = moved.flatten().long()
        return self._sources[key]


class RandAugment(_Faster, v2.RandAugment):
    """``v2.RandAugment`` of a uint8 batch (B, C, H, W)."""


class AutoAugment(_Faster, v2.AutoAugment):
    """``v2.AutoAugment`` of a uint8 batch (B, C, H, W)."""


def _take(image: Tensor, source: Tensor) -> Tensor:
    black_first = F.pad(image.flatten(2), (1, 0))  # (B, C, 1 + H·W)
    return black_first.gather(2, source.expand(*image.shape[:2], -1)).view(image.shape)


def sharpen(image: Tensor, factor: float) -> Tensor:
    """``v2.functional.adjust_sharpness`` of uint8 (B, C, H, W), H and W above 2, without a convolution."""
    values = image.to(torch.float32)
    inner = values[..., 1:-1, 1:-1]
    rows = values[..., :-2, :] + values[..., 1:-1, :] + values[..., 2:, :]
    blurred = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    # Sums of whole numbers are exact, and a 13th of one is never halfway between two.
    blurred.add_(inner, alpha=4).div_(13).round_()
    inner.add_(blurred.sub_(inner), alpha=1.0 - factor)
    return values.clamp_(0, 255).to(torch.uint8)
