"""Decoding of odd files, and the two kinds of image sets."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from vit_attn.data.decode import BrokenImageError, decode_image, natural_size
from vit_attn.data.images import FileImages, MemoryImages


@pytest.fixture
def colours():
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def test_image_of_the_right_size_keeps_its_pixels(tmp_path, colours):
    Image.fromarray(colours).save(tmp_path / "a.png")
    assert (decode_image(str(tmp_path / "a.png"), 16).transpose(1, 2, 0) == colours).all()


def test_shorter_side_is_resized_and_the_centre_kept(tmp_path):
    # three plain stripes: what remains of a wide image is the middle one
    stripes = np.zeros((20, 60, 3), dtype=np.uint8)
    stripes[:, 20:40] = (10, 200, 30)
    for name, picture in (("wide.png", stripes), ("tall.png", stripes.transpose(1, 0, 2))):
        Image.fromarray(picture).save(tmp_path / name)
        pixels = decode_image(str(tmp_path / name), 10)
        assert pixels.shape == (3, 10, 10)
        # the filter reaches a little over the edges
        assert (pixels[:, 2:-2, 2:-2] == np.reshape([10, 200, 30], (3, 1, 1))).all()
        assert (pixels[1] > 150).all()


def test_resizing_matches_torchvisions(tmp_path):
    y, x = np.mgrid[:48, :48]
    smooth = np.stack([4 * x, 4 * y, 2 * (x + y)], axis=-1).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "a.png")
    expected = F.resize(torch.from_numpy(smooth).permute(2, 0, 1), [16, 16], F.InterpolationMode.BICUBIC)
    assert np.abs(decode_image(str(tmp_path / "a.png"), 16).astype(int) - expected.numpy()).max() <= 1


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I"])
def test_any_mode_becomes_rgb(tmp_path, mode):
    if mode in ("I;16", "I"):
        picture = Image.fromarray(np.full((16, 16), 128 * 257, np.uint16 if mode == "I;16" else np.int32))
    else:
        grey = Image.new("RGB", (16, 16), (128, 128, 128))
        picture = grey.quantize(4) if mode == "P" else grey.convert(mode)
    assert picture.mode == mode
    path = tmp_path / ("a.tiff" if mode in ("CMYK", "YCbCr", "I") else "a.png")
    picture.save(path)
    pixels = decode_image(str(path), 16)
    assert pixels.shape == (3, 16, 16)
    assert np.abs(pixels.astype(int) - 128).max() <= 1


def test_sixteen_bits_keep_their_order_and_range(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    assert (decode_image(str(tmp_path / "a.png"), 16)[0] == ramp // 256).all()


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (decode_image(str(tmp_path / "a.gif"), 16)[:, 0, 0] == (255, 0, 0)).all()


def test_transparent_palette_without_warning(tmp_path, recwarn):
    Image.new("P", (16, 16)).save(tmp_path / "a.png", transparency=b"\x00\x80")
    assert decode_image(str(tmp_path / "a.png"), 16).shape == (3, 16, 16)
    assert not recwarn.list


def test_exif_orientation_is_honoured(tmp_path, colours):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90° clockwise
    Image.fromarray(colours).save(tmp_path / "a.png", exif=exif)
    assert (decode_image(str(tmp_path / "a.png"), 16).transpose(1, 2, 0) == np.rot90(colours, -1)).all()


def broken_files(folder):
    """Name → path of files that no decoder can read to the end."""
    jpeg = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(jpeg, "jpeg")
    contents = {"truncated": jpeg.getvalue()[:-600], "text": b"not an image\n", "empty": b""}
    for name, content in contents.items():
        (folder / f"{name}.jpg").write_bytes(content)
    return {name: str(folder / f"{name}.jpg") for name in contents}


@pytest.mark.parametrize("name", ["truncated", "text", "empty"])
def test_broken_files_are_named_in_one_line(tmp_path, name):
    path = broken_files(tmp_path)[name]
    with pytest.raises(BrokenImageError) as error:
        decode_image(path, 16)
    assert path in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_floating_point_and_bomb_are_broken(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((16, 16), np.float32)).save(tmp_path / "float.tiff")
    Image.new("L", (64, 64)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for name, reason in (("float.tiff", "unknown range"), ("bomb.png", "bomb"), ("gone.png", "No such file")):
        with pytest.raises(BrokenImageError, match=reason):
            decode_image(str(tmp_path / name), 16)
    with pytest.raises(BrokenImageError, match="gone"):
        natural_size(str(tmp_path / "gone.png"))


def test_error_of_a_worker_is_its_last_line():
    traceback = "Caught it in a worker.\n  somewhere\nvit_attn.data.decode.BrokenImageError: cannot read x\n"
    again = BrokenImageError(traceback)
    assert str(again) == "cannot read x"


def test_memory_images_and_subsets_of_subsets():
    pixels = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 2, 2).contiguous()
    images = MemoryImages(pixels, torch.arange(10) * 10)
    part = images.subset([7, 3, 5, 1]).subset(torch.tensor([2, 0]))
    assert len(part) == 2
    assert part.labels.tolist() == [50, 70]
    read, labels = part[[1, 0, 1]]
    assert (read.dtype, read.shape) == (torch.uint8, (3, 3, 2, 2))
    assert read[:, 0, 0, 0].tolist() == [7, 5, 7]
    assert labels.tolist() == [70, 50, 70]


def test_resizing_once_and_per_batch_agree():
    pixels = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    lazy = MemoryImages(pixels, torch.zeros(20, dtype=torch.int64), size=20)
    once = lazy.resized()
    assert (lazy.streams, once.streams) == (True, False)
    order = [4, 19, 0]
    assert torch.equal(lazy[order][0], once[order][0])
    assert torch.equal(once[order][0], F.resize(pixels[order], [20, 20], antialias=True))


def test_file_images_read_names_that_are_not_ascii(tmp_path, colours):
    path = tmp_path / "größe 象.png"
    Image.fromarray(colours).save(path)
    images = FileImages([str(path)], torch.tensor([4]), size=16)
    pixels, labels = images[[0]]
    assert (pixels[0].permute(1, 2, 0).numpy() == colours).all()
    assert labels.tolist() == [4]
