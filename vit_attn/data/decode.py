"""One image file → one square of RGB pixels."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from vit_attn.errors import UserError, one_line

_SIXTEEN_BIT_GREY = ("I;16", "I;16B", "I;16L", "I;16N", "I")
# PIL reads dozens of others. Some of them start another program, and none is a photograph's.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_MOST_PIXELS = 178_000_000  # where PIL refuses an image as well: half a gigabyte in RGB


class BrokenImageError(UserError):
    """An image file that cannot be read to its end.

    A ``DataLoader`` worker's exception is made anew from the text of its traceback; only the last line,
    the message itself, is kept of it.
    """

    def __init__(self, message: str) -> None:
        last_line = message.strip().splitlines()[-1]
        super().__init__(last_line.removeprefix(f"{__name__}.{type(self).__name__}: "))


def decode_image(path: str, size: int) -> np.ndarray:
    """Read the whole file: its first frame, upright by its EXIF orientation, in RGB (alpha is dropped).

    The shorter side is resized to ``size`` (bicubic, antialiased) and the centre is kept; an image of
    exactly that size keeps its pixels.

    Args:
        path: one of ``FORMATS``, in any mode that PIL reads; 16-bit grey keeps its upper 8 bits.
        size: pixels per side.

    Returns:
        uint8 (3, size, size).

    Raises:
        BrokenImageError: truncated, not an image, a decompression bomb, unreadable, no file.
    """
    with _opened(path) as image:
        # JPEG only: decode at 1/2, 1/4 or 1/8 where that still leaves twice the wanted size
        image.draft(None, (2 * size, 2 * size))
        rgb = _to_rgb(ImageOps.exif_transpose(image))
        pixels = np.array(rgb).transpose(2, 0, 1)
        return pixels if rgb.size == (size, size) else _fit(torch.from_numpy(pixels), size).numpy()


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """The image in a file, of which the header has been read.

    Raises:
        BrokenImageError: in place of whatever is raised, inside too: PIL's plugins raise nearly anything.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe or a device would wait for ever
            raise ValueError("not a file")
        with Image.open(path, formats=FORMATS) as image:
            _check_size(*image.size)
            yield image
    except Exception as error:
        raise BrokenImageError(f"cannot read image {path}: {_reason(error)}") from error


def _fit(pixels: torch.Tensor, size: int) -> torch.Tensor:
    square = F.center_crop(pixels, [min(pixels.shape[1:])])
    # torch's resizing of bytes is that of PIL but for a grey level or two, in a quarter of the time
    return F.resize(square, [size, size], InterpolationMode.BICUBIC, antialias=True)


def natural_size(path: str) -> tuple[int, int]:
    """Width and height in pixels, by the file's header alone; raises :class:`BrokenImageError`."""
    with _opened(path) as image:
        return image.size


def _check_size(width: int, height: int) -> None:
    if min(width, height) < 1:
        raise ValueError(f"it has no pixels: {width}×{height}")
    if width * height > _MOST_PIXELS:
        raise ValueError(
            f"{width}×{height} pixels are more than {_MOST_PIXELS // 10**6} million: it could be a decompression bomb"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BIT_GREY:
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels exceed 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns about the direct way
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not an image, or of none of the formats that are read: {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(error)[:300]
