"""Image files: truncated, huge, CMYK, 16-bit, animated, of no size, bombs, of other kinds: pixels or one line."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image
from playing import assert_run_or_one_line, check_all, examples, files_below, play, time_limit

from vit_attn.data.decode import FORMATS, BrokenImageError, decode_image, natural_size

MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
    "GIF": ("RGB", "P", "L", "1"),
    "TIFF": ("RGB", "RGBA", "CMYK", "L", "I;16", "I", "F", "LAB", "YCbCr", "1"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("RGB", "L", "1", "P"),
    "PPM": ("RGB", "L", "1"),
    "EPS": ("RGB", "L", "CMYK"),
    "ICO": ("RGBA",),
    "TGA": ("RGB",),
    "PCX": ("RGB",),
    "PDF": ("RGB",),
}


def encoded(kind: str, mode: str, size: tuple[int, int], seed: int, frames: int = 1) -> bytes:
    rng = np.random.default_rng(seed)
    pictures = [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(frames)]
    if mode in ("I;16", "I", "F"):
        grey = rng.integers(0, 70000 if mode == "I" else 65536, (size[1], size[0]))
        pictures = [Image.fromarray(grey.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))]
    else:
        pictures = [picture.convert(mode) for picture in pictures]
    file = io.BytesIO()
    more = {"save_all": True, "append_images": pictures[1:]} if len(pictures) > 1 else {}
    pictures[0].save(file, kind, **more)
    return file.getvalue()


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, *, depth: int = 8, color: int = 2, rows: bytes = b"", more: bytes = b"") -> bytes:
    """A PNG that claims what it is told to."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = _chunk(b"IHDR", header) + more + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + b";"


STRANGE = {
    "empty": b"",
    "text": b"not an image",
    "bomb": png(100_000, 100_000, rows=bytes(10**6)),
    "bomb of one bit": png(2**31 - 1, 2**31 - 1, depth=1, color=0, rows=bytes(10**6)),
    "wide": png(2**31 - 1, 1, rows=bytes(100)),
    "no width": png(0, 5),
    "no height": png(5, 0),
    "no pixels": png(4, 4),
    "16 bit": png(4, 4, depth=16, rows=b"\0" * (4 * 25)),
    "wrong depth": png(4, 4, depth=3),
    "text bomb": png(4, 4, more=_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8))), rows=bytes(52)),
    "profile bomb": png(4, 4, more=_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**8))), rows=bytes(52)),
    "gif of nothing": gif(0, 0),
    "large gif": gif(65535, 65535),
    "ppm of nothing": b"P6\n0 0\n255\n",
    "large ppm": b"P6\n99999999 99999999\n255\nxxx",
    "negative ppm": b"P6\n-4 -4\n255\nxxx",
    "ppm of much": b"P3\n4 4\n255\n" + b"9" * 10**6,
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%touch owned) (w) file\nshowpage\n",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='4' height='4'/>",
    "bmp of much": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 60, 0, 0, 54, 40, 2**30, -(2**30), 1, 24, 0, 0, 0, 0, 0, 0),
    "tiff of itself": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
}

WHOLE = st.sampled_from([(kind, mode) for kind, modes in MODES.items() for mode in modes]).flatmap(
    lambda pair: st.builds(
        encoded,
        st.just(pair[0]),
        st.just(pair[1]),
        st.tuples(st.integers(1, 40), st.integers(1, 40)),
        st.integers(0, 5),
        st.integers(1, 3) if pair[0] in ("GIF", "TIFF", "WEBP", "PNG") else st.just(1),
    )
)


def _spoil(content: bytes, cut: float, flips: list[tuple[float, int]]) -> bytes:
    spoilt = bytearray(content[: max(1, int(cut * len(content)))])
    for place, mask in flips:
        spoilt[int(place * (len(spoilt) - 1))] ^= mask
    return bytes(spoilt)


FILES = st.one_of(
    WHOLE,
    st.builds(
        _spoil,
        WHOLE,
        st.one_of(st.just(1.0), st.floats(0, 1)),
        st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=6),
    ),
    st.sampled_from(sorted(STRANGE)).map(STRANGE.__getitem__),
    st.binary(max_size=200),
    st.builds(
        lambda start, rest: start + rest,
        st.sampled_from([b"\xff\xd8\xff", b"GIF89a", b"II*\0", b"BM", b"RIFF"]),
        st.binary(max_size=200),
    ),
)


@examples(short=60, long=500)
def test_a_file_is_a_square_of_pixels_or_one_line(many, place):
    folder = place()

    def check(content):
        path = folder / "x.jpg"
        path.write_bytes(content)
        said = None
        try:
            pixels = decode_image(str(path), 16)
        except BrokenImageError as error:
            said = str(error)
        if said is not None:
            assert said.startswith(f"cannot read image {path}: ")
            assert said.isprintable()
            assert len(said) < 600
        else:
            assert (pixels.shape, pixels.dtype) == ((3, 16, 16), np.uint8)
            assert min(natural_size(str(path))) > 0
        assert not (folder / "owned").exists()

    check_all(many, check, FILES)


@pytest.mark.parametrize("name", sorted(STRANGE))
def test_a_strange_file_costs_little(place, name):
    """A gigabyte that unfolds out of a kilobyte would be seen here."""
    import resource

    path = place() / "x.png"
    path.write_bytes(STRANGE[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if name == "16 bit":
        assert decode_image(str(path), 4).shape == (3, 4, 4)
    else:
        with pytest.raises(BrokenImageError):
            decode_image(str(path), 4)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KiB


def test_no_other_program_is_asked_for_an_image(place):
    """PIL would hand these to Ghostscript and others, by their content, whatever the file is called."""
    assert not {"EPS", "WMF", "FITS", "FPX", "MIC", "MPEG", "GRIB", "HDF5", "PSD"} & set(FORMATS)
    path = place() / "x.jpg"
    path.write_bytes(encoded("EPS", "RGB", (8, 8), 0))
    assert Image.open(path).format == "EPS"  # PIL alone would read it
    with pytest.raises(BrokenImageError, match="of none of the formats"):
        decode_image(str(path), 8)


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "nothing"])
def test_what_is_no_file_is_refused_at_once(place, kind):
    path = place() / "x.jpg"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    with pytest.raises(BrokenImageError, match=r"No such file|not a file"):
        decode_image(str(path), 8)
    with pytest.raises(BrokenImageError, match=r"No such file|not a file"), time_limit(10):
        natural_size(str(path))


FOLDER = (
    *("data=imagefolder", "trainer=cpu", "logger=none", "model.depth=1", "model.embed_dim=16", "model.num_heads=2"),
    *("trainer.max_epochs=1", "data.batch_size=2", "data.val_fraction=0.4", "explain_images=0", "data.image_size=16"),
)


def image_folder(root: Path, content: bytes, *, classes: tuple[str, str] = ("cat", "dog"), name: str = "x.jpg") -> None:
    for split, count in (("train", 4), ("test", 1)):
        for label in classes:
            (root / split / label).mkdir(parents=True)
            for index in range(count):
                (root / split / label / f"{index}.png").write_bytes(encoded("PNG", "RGB", (16, 16), index))
    (root / "train" / classes[0] / name).write_bytes(content)


@examples(short=3, long=70)
def test_a_run_on_a_folder_with_any_file_in_it(many, place):
    def check(given):
        content, on_error, check_images = given
        folder = place()
        image_folder(folder / "photos", content)
        before = files_below(folder)
        settings = (f"data.on_error={on_error}", f"data.cache_budget={check_images}")
        done = play("train", *FOLDER, "data.root=photos", *settings)
        assert_run_or_one_line(done, folder, before)
        if on_error == "skip":
            assert done.status == 0, done

    check_all(many, check, st.tuples(FILES, st.sampled_from(["stop", "skip"]), st.sampled_from([0, 1])))
