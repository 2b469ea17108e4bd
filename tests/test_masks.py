"""``python -m vit_attn.masks``, run as a user runs it."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from vit_attn.attention.patterns import PATTERNS, make_pattern
from vit_attn.explain.style import MASK_COLORS
from vit_attn.masks import main

# The published sparsity of each pattern over 32 x 32 tokens, window = stride = 32, dilation 2, in %.
GOLDEN = {
    "full": "0.0000 %",
    "causal": "49.9512 %",
    "strided": "95.4086 %",
    "fixed": "96.8750 %",
    "sliding_window": "96.8033 %",
    "dilated_sliding_window": "96.8292 %",
}


def as_pixel(color: str) -> tuple[int, ...]:
    return tuple(round(255 * channel) for channel in to_rgb(color))


def read_pixels(path) -> np.ndarray:
    return (imread(path)[..., :3] * 255).round().astype(np.uint8)


def test_the_command_prints_the_published_sparsities_and_draws_every_entry(tmp_path):
    command = [sys.executable, "-m", "vit_attn.masks", "--size", "1024", "--out", str(tmp_path / "new" / "masks")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for name, sparsity in GOLDEN.items():
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        assert f" {sparsity} " in line
    (strided,) = [line for line in lines if line.startswith("strided ")]
    assert strided.split()[-2:] == ["48144", "21.8×"]

    written = [line.removeprefix("wrote ") for line in lines if line.startswith("wrote ")]
    assert written == [str(tmp_path / "new" / "masks" / f"{name}.png") for name in [*PATTERNS, "all"]]
    # At one pixel per entry, the sky blue lines are all there: counted in the picture, legend apart.
    pixels = read_pixels(tmp_path / "new" / "masks" / "strided.png")
    second = (pixels == as_pixel(MASK_COLORS[3])).all(axis=-1)
    mask_rows = second[: second.shape[0] * 9 // 10]
    labels = make_pattern("strided", num_tokens=1024).labels()
    assert mask_rows.sum() == (labels == 3).sum()


@pytest.mark.parametrize("size", [16, 25, 49])
def test_the_picture_is_the_mask_to_the_pixel(tmp_path, size):
    assert main(["--size", str(size), "--patterns", "strided", "--prefix", "1", "--out", str(tmp_path)]) == 0
    labels = make_pattern("strided", num_tokens=size, num_prefix_tokens=1).labels().numpy()
    assert set(np.unique(labels)) == set(MASK_COLORS)  # the case has every label
    pixels = read_pixels(tmp_path / "strided.png")
    orange = (pixels == as_pixel(MASK_COLORS[4])).all(axis=-1)
    row, column = np.argwhere(orange)[0]  # the first orange pixel is the mask's corner
    side = int(orange[row].sum())
    cell, rest = divmod(side, size + 1)
    assert rest == 0
    drawn = pixels[row : row + side, column : column + side]
    expected = np.array([as_pixel(MASK_COLORS[label]) for label in range(5)], dtype=np.uint8)[labels]
    np.testing.assert_array_equal(drawn, expected.repeat(cell, axis=0).repeat(cell, axis=1))
    for color in MASK_COLORS.values():  # and each colour again, in the legend below
        assert (pixels[row + side :] == as_pixel(color)).all(axis=-1).any()


@pytest.mark.parametrize("kind", ["labels", "binary"])
def test_npy_holds_the_mask(tmp_path, kind):
    options = {"window": 3, "stride": 4, "dilation": 3, "causal": False}
    flags = ["--window", "3", "--stride", "4", "--dilation", "3", "--symmetric", "--prefix", "2"]
    assert main(["--size", "10", *flags, "--npy", kind, "--out", str(tmp_path)]) == 0
    for name in (name for name, cls in PATTERNS.items() if not cls.needs_grid):
        pattern = make_pattern(name, num_tokens=10, num_prefix_tokens=2, **options)
        expected = pattern.labels() if kind == "labels" else pattern.allowed()
        saved = np.load(tmp_path / f"{name}.npy", allow_pickle=False)
        assert saved.dtype == (np.uint8 if kind == "labels" else np.bool_)
        np.testing.assert_array_equal(saved, expected.numpy())


def test_a_pattern_asked_for_twice_is_drawn_once(tmp_path, capsys):
    assert main(["--size", "9", "--patterns", "fixed", "fixed", "--causal", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("wrote") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.png", "fixed.png"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--patterns", "stridded"], "Did you mean 'strided'?"),
        (["--size", "60"], "--size 60 is no square grid to take a width from: give --window and --stride"),
        (["--grid", "8"], "--grid: must be rows x columns, as in 8x8"),
        (["--grid", "4x4", "--size", "15"], "--size 15 and --grid 4x4 differ"),
        (["--size", "0"], "--size: must be a whole number from 1 to 4096, not '0'"),
        (["--window", "1e3"], "not '1e3'"),
        (["--stride", "9" * 30], "from 1 to 4096"),
        (["--size", "4096", "--prefix", "1"], "more than 4096 tokens"),
        (["--npy", "label"], "'labels', 'binary'"),
        (["--causal", "--symmetric"], "not allowed with"),
        (["--sizes", "64"], "unrecognized arguments: --sizes"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, capsys, arguments, said):
    assert main([*arguments, "--out", str(tmp_path / "masks")]) == 2
    streams = capsys.readouterr()
    assert said in streams.err
    assert streams.err.count("\n") == 1
    assert streams.out == ""
    assert not (tmp_path / "masks").exists()


def test_a_folder_that_cannot_be_written_is_one_line_and_status_2(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main(["--size", "4", "--out", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot write to --out '{tmp_path / 'file'}'")
    assert error.count("\n") == 1
