"""Augmentation and normalization of whole batches, on the device that trains.

Randomness comes from torch's global CPU generator alone, whatever the device: the same
``torch.manual_seed`` gives the same crops on a CPU and on a GPU.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from vit_attn.data.policies import AutoAugment, RandAugment
from vit_attn.errors import UserError, unknown_name

_CHOICES = {"crop": ("pad", "resized", "none"), "policy": ("none", "rand_augment", "auto_augment")}
_WHOLE = {
    "crop_padding": (0, None),
    "rand_augment_ops": (1, None),
    "rand_augment_magnitude": (0, 30),
    "group_size": (1, None),
}
_PHOTOGRAPH = 3 * 64 * 64  # values per image
_CACHED = 2**17  # values: in fp32, they and what they are made from stay in a core's cache
_REAL = {"erasing": (0, 1), "mixup": (0, None), "cutmix": (0, None)}


@dataclass(frozen=True, kw_only=True)
class AugmentOptions:
    """``data.augment.*``; a wrong value raises ``UserError``.

    Attributes:
        crop: "pad" (zero padding, then a random window), "resized" (a random part, enlarged) or "none".
        crop_padding: pixels per side.
        crop_scale: smallest and largest share of the area that a resized crop keeps.
        flip: mirror half of the images left to right.
        policy: "rand_augment", "auto_augment" (CIFAR-10's policy up to 64 pixels, ImageNet's above) or "none".
        rand_augment_ops: operations in a row.
        rand_augment_magnitude: their strength, 0 to 30.
        erasing: probability that a rectangle is replaced by the mean colour.
        mixup: α of the Beta distribution of the mixing weight; 0: off.
        cutmix: the same for CutMix. With both, each batch takes one of them, with equal chances.
        group_size: images that share one draw of resized crop, policy and erasing.
    """

    crop: str = "pad"
    crop_padding: int = 4
    crop_scale: Sequence[float] = (0.08, 1.0)
    flip: bool = True
    policy: str = "none"
    rand_augment_ops: int = 2
    rand_augment_magnitude: int = 9
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    group_size: int = 8

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "AugmentOptions":
        """Options by name; raises ``UserError`` with the nearest spelling for a name that is none."""
        names = [field.name for field in fields(cls)]
        for name in options:
            if name not in names:
                raise UserError(unknown_name("option of data.augment", name, names))
        return cls(**{str(name): value for name, value in options.items()})

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(unknown_name(f"data.augment.{name}", getattr(self, name), allowed))
        for name, bounds in _WHOLE.items():
            _check_number(name, getattr(self, name), int, bounds)
        for name, bounds in _REAL.items():
            _check_number(name, getattr(self, name), (int, float), bounds)
        if not isinstance(self.flip, bool):
            raise UserError(f"data.augment.flip must be true or false, not {self.flip!r}")
        scale = self.crop_scale
        numbers = isinstance(scale, Sequence) and all(isinstance(share, int | float) for share in scale)
        if not (numbers and len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1):
            raise UserError(f"data.augment.crop_scale must be [smallest, largest] within 0 to 1, not {scale}")


def _check_number(name: str, value: Any, kinds: Any, bounds: tuple[float, float | None]) -> None:
    low, high = bounds
    right = isinstance(value, kinds) and not isinstance(value, bool)
    if not right or not low <= value <= (float("inf") if high is None else high):
        kind = "whole number" if kinds is int else "number"
        between = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise UserError(f"data.augment.{name} must be a {kind} {between}, not {value!r}")


class Augment(nn.Module):
    """Random crop, flip, policy, erasing and mixing of a batch; does nothing in ``eval()`` mode.

    Args:
        num_classes: length of the soft targets that mixing makes.
        image_size: pixels per side.
        mean: per-channel mean in 0 to 1, the colour of erased rectangles.
        options: see :class:`AugmentOptions`.

    Raises:
        UserError: unknown option or value.
    """

    def __init__(
        self, *, num_classes: int, image_size: int, mean: Sequence[float] = (0.0, 0.0, 0.0), **options: Any
    ) -> None:
        super().__init__()
        self.options = AugmentOptions.of(options)
        self._grouped = _grouped_transforms(self.options, image_size, mean)
        self._mix = _mixing(self.options, num_classes)

    @torch.no_grad()
    def forward(self, images: Tensor, labels: Tensor, *, rank: int = 0, world_size: int = 1) -> tuple[Tensor, Tensor]:
        """Augment one batch, or one process' share of it.

        Several processes draw for the whole global batch, from the same seed, so that each image comes out as it does
        where one process has them all.

        Args:
            images: uint8 (B, C, H, W): the ``rank``-th share of the global batch of B · ``world_size``.
            labels: int64 (B,).
            rank, world_size: of the processes that share the batch; all of them call this.

        Returns:
            images (B, C, H, W) in 0 to 255, uint8, or float32 where mixup blends them; and the targets:
            the labels, or with mixup or cutmix float32 (B, num_classes) whose rows sum to 1.
        """
        if not self.training:
            return images, labels
        if self.options.crop == "pad" and self.options.crop_padding:
            images = pad_crop(images, self.options.crop_padding, rank=rank, world_size=world_size)
        if self.options.flip:
            images = flip(images, rank=rank, world_size=world_size)
        if self._grouped is not None:
            images = self._by_groups(images, rank, world_size)
        if self._mix is not None:
            if self.options.mixup:
                images = images.float()  # v2.MixUp multiplies in place, which uint8 cannot hold
            if world_size == 1:
                return self._mix(images, labels)
            # An image is mixed with the one before it, which for the first one another process has.
            parts = [_with_the_one_before(part, rank, world_size) for part in (images, labels)]
            images, labels = (part[1:] for part in self._mix(*parts))
        return images, labels

    def _by_groups(self, images: Tensor, rank: int, world_size: int) -> Tensor:
        """Treat each group alike: torchvision draws once per call, so it is called once per group.

        A group has a seed of its own, for a process may have no part in those before it.
        """
        assert self._grouped is not None
        size, first = self.options.group_size, rank * len(images)
        seeds = torch.randint(2**63 - 1, (-(-len(images) * world_size // size),)).tolist()
        treated = []
        with torch.random.fork_rng(devices=[]):
            start = 0
            while start < len(images):
                group = (first + start) // size
                end = min((group + 1) * size - first, len(images))
                torch.default_generator.manual_seed(seeds[group])
                treated.append(self._grouped(images[start:end]))
                start = end
        return torch.cat(treated)


def _with_the_one_before(part: Tensor, rank: int, world_size: int) -> Tensor:
    """(B, …) → (1 + B, …): the last of the rank before, round in a ring, comes first."""
    last = part[-1:].contiguous()
    found = [torch.empty_like(last) for _ in range(world_size)]
    distributed.all_gather(found, last)
    return torch.cat([found[rank - 1], part])


def pad_crop(images: Tensor, padding: int, *, rank: int = 0, world_size: int = 1) -> Tensor:
    """A window of (H, W) at its own random place of each zero-padded image. (B, C, H, W) → (B, C, H, W)."""
    B, C, H, W = images.shape
    padded = F.pad(images, [padding] * 4)
    places = torch.randint(2 * padding + 1, (2, B * world_size, 1, 1)).narrow(1, rank * B, B)
    if _one_by_one(images):
        corners = places.reshape(2, B).T.tolist()
        return torch.stack([i[:, y : y + H, x : x + W] for i, (y, x) in zip(padded, corners, strict=True)])
    top, left = places.to(images.device)  # each (B, 1, 1)
    y = top + torch.arange(H, device=images.device)[:, None]  # (B, H, 1)
    x = left + torch.arange(W, device=images.device)  # (B, 1, W)
    pixel = (y * padded.shape[-1] + x).view(B, 1, H * W)  # its place in a flattened channel
    return padded.flatten(2).gather(2, pixel.expand(B, C, H * W)).view(B, C, H, W)


def flip(images: Tensor, *, rank: int = 0, world_size: int = 1) -> Tensor:
    """Each image mirrored left to right with probability 1/2. (B, C, H, W) → (B, C, H, W)."""
    B = len(images)
    mirrored = (torch.rand(B * world_size).narrow(0, rank * B, B) < 0.5).nonzero().flatten()
    if _one_by_one(images):
        images = images.clone()
        for index in mirrored.tolist():
            images[index] = images[index].flip(-1)
        return images
    mirrored = mirrored.to(images.device)
    return images.index_copy(0, mirrored, images[mirrored].flip(-1))


def _one_by_one(images: Tensor) -> bool:
    """Whether copying whole images is faster than computing a place for each pixel: photographs, on a CPU."""
    return images.device.type == "cpu" and images[0].numel() >= _PHOTOGRAPH


def _grouped_transforms(
    options: AugmentOptions, image_size: int, mean: Sequence[float]
) -> Callable[[Tensor], Tensor] | None:
    steps: list[nn.Module] = []
    if options.crop == "resized":
        steps.append(v2.RandomResizedCrop(image_size, scale=tuple(options.crop_scale)))
    if options.policy == "rand_augment":
        steps.append(RandAugment(options.rand_augment_ops, options.rand_augment_magnitude))
    elif options.policy == "auto_augment":
        small = image_size <= 64
        steps.append(AutoAugment(v2.AutoAugmentPolicy.CIFAR10 if small else v2.AutoAugmentPolicy.IMAGENET))
    if options.erasing:
        steps.append(v2.RandomErasing(options.erasing, value=[round(255 * channel) for channel in mean]))
    return v2.Compose(steps) if steps else None


def _mixing(options: AugmentOptions, num_classes: int) -> Callable[..., tuple[Tensor, Tensor]] | None:
    kinds = ((v2.MixUp, options.mixup), (v2.CutMix, options.cutmix))
    steps = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]
    return v2.RandomChoice(steps) if steps else None


class Normalize(nn.Module):
    """0 to 255 → float32 of zero mean and unit variance per channel. (B, C, H, W) → (B, C, H, W).

    Args:
        mean: per channel, of images in 0 to 1.
        std: per channel, of images in 0 to 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # not persistent: checkpoints say mean and std in words, in ImageData.describe()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """``(images / 255 - mean) / std``, for uint8 or float images in 0 to 255."""
        normal = torch.empty(images.shape, dtype=torch.float32, device=images.device)
        # in place: each new tensor of this size is memory that a CPU has to fetch from the system anew
        at_once = len(images) if images.is_cuda else max(1, _CACHED // max(1, images[:1].numel()))
        for part, raw in zip(normal.split(at_once), images.split(at_once), strict=True):
            part.copy_(raw).div_(255).sub_(self.mean).div_(self.std)
        return normal
