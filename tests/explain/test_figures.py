"""Figures hold the data they were given, and are saved whole."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from vit_attn.attention.patterns import make_pattern
from vit_attn.explain.figures import (
    attention_panel,
    confusion_figure,
    describe_pattern,
    mask_figure,
    masks_side_by_side,
    reliability_figure,
)
from vit_attn.explain.style import new_figure, save_figure

RNG = np.random.default_rng(0)
IMAGES = RNG.random((3, 8, 12, 3))


def maps_of(heads: int) -> np.ndarray:
    weights = RNG.random((3, heads, 2, 3))
    weights[0, 0, 0, 0] = 0
    return weights / weights.sum(axis=(2, 3), keepdims=True)


def texts(fig) -> str:
    fig.draw_without_rendering()
    return "\n".join(text.get_text() for text in fig.findobj(lambda artist: hasattr(artist, "get_text")))


def test_a_panel_shows_each_head_and_the_mean():
    maps = maps_of(3)
    fig = attention_panel(IMAGES, torch.tensor(maps), title="layer 3", captions=["zero", "one", "two"])
    axes = np.array(fig.axes).reshape(3, 6)
    for row in range(3):
        np.testing.assert_array_equal(axes[row, 0].images[0].get_array(), IMAGES[row])
        shown = [ax.images[0].get_array() for ax in axes[row, 1:5]]
        np.testing.assert_allclose([array.data for array in shown[:3]], maps[row], rtol=1e-6)
        np.testing.assert_allclose(shown[3].data, maps[row].mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(axes[row, 5].images[1].get_array(), maps[row].mean(axis=0), rtol=1e-6)
        assert all(ax.images[0].get_clim() == (0, pytest.approx(maps[row].max())) for ax in axes[row, 1:5])
        assert all(tuple(ax.images[0].get_extent()) == (0, 12, 8, 0) for ax in axes[row])
    assert axes[0, 1].images[0].get_array().mask.tolist() == [[True, False, False], [False] * 3]
    assert [ax.get_title() for ax in axes[0]] == ["image", "head 0", "head 1", "head 2", "mean", "mean\nover image"]
    written = texts(fig)
    assert all(text in written for text in ("layer 3", "zero", "one", "two", "exactly 0"))


def test_a_panel_draws_the_first_images_and_heads_but_means_over_all():
    maps = maps_of(14)
    fig = attention_panel(IMAGES, maps, title="", max_images=2)
    axes = np.array(fig.axes).reshape(2, 15)
    assert axes[0, 13].get_title() == "mean of 14"
    np.testing.assert_allclose(axes[1, 13].images[0].get_array().data, maps[1].mean(axis=0))


def test_one_head_with_a_spike_leaves_the_others_visible():
    maps = np.full((1, 4, 2, 2), 0.01)
    maps[0, 2, 1, 1] = 0.9
    fig = attention_panel(IMAGES[:1], maps, title="")
    assert fig.axes[1].images[0].get_clim() == (0, pytest.approx(0.03))


@pytest.mark.parametrize("heads_without", [2, 3])
def test_heads_that_give_the_patches_nothing_can_be_drawn(tmp_path, heads_without):
    maps = maps_of(3)
    maps[:, :heads_without] = 0
    save_figure(attention_panel(IMAGES, maps, title=""), tmp_path / "panel.png")


def test_bytes_grey_images_and_bfloat16_are_understood():
    pixels = (IMAGES[..., :1] * 255).astype(np.uint8)
    fig = attention_panel(torch.tensor(pixels), torch.tensor(maps_of(1)).bfloat16(), title="")
    np.testing.assert_allclose(fig.axes[0].images[0].get_array(), np.repeat(pixels[0] / 255, 3, axis=-1))


@pytest.mark.parametrize(
    ("images", "maps", "captions"),
    [
        (IMAGES[0], maps_of(2), None),
        (IMAGES.transpose(0, 3, 1, 2), maps_of(2), None),
        (IMAGES, maps_of(2)[0], None),
        (IMAGES[:2], maps_of(2), None),
        (IMAGES, maps_of(2), ["too few"]),
        (IMAGES[:0], maps_of(2)[:0], None),
    ],
)
def test_a_panel_refuses_shapes_that_do_not_fit(images, maps, captions):
    with pytest.raises(ValueError, match="images"):
        attention_panel(images, maps, title="", captions=captions)


def test_a_mask_figure_says_what_it_shows():
    pattern = make_pattern("strided", num_tokens=16, num_prefix_tokens=1, window=3)
    assert describe_pattern(pattern) == "window 3 · stride 4 · causal · 1 prefix token"
    written = texts(mask_figure(pattern))
    for text in ("strided", describe_pattern(pattern), f"{100 * pattern.sparsity:.4f} %", "key j", "query i"):
        assert text in written
    for label in ("forbidden", "self", "local", "second component", "global (prefix tokens)"):
        assert label in written
    assert "my own" in texts(mask_figure(pattern, caption="my own"))


def test_a_legend_names_only_labels_that_occur():
    legend = mask_figure(make_pattern("full", num_tokens=9)).legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["self", "local"]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_masks_side_by_side_share_one_legend(count):
    patterns = [make_pattern("fixed", num_tokens=16, window=k) for k in range(1, count + 1)]
    fig = masks_side_by_side(patterns)
    assert len(fig.axes) == count
    assert len(fig.legends) == 1


def test_a_confusion_matrix_is_normalized_by_row_and_labelled_with_counts():
    counts = np.array([[3, 1, 0], [0, 0, 0], [2, 2, 4]])
    fig = confusion_figure(torch.tensor(counts), ["cat", "dog", "$5 bill$"], title="test")
    shares = fig.axes[0].images[0].get_array()
    np.testing.assert_allclose(shares, [[0.75, 0.25, 0], [0, 0, 0], [0.25, 0.25, 0.5]])
    assert [text.get_text() for text in fig.axes[0].texts] == [str(count) for count in counts.ravel()]
    assert "$5 bill$" in texts(fig)
    with pytest.raises(ValueError, match="2 class names"):
        confusion_figure(counts, ["cat", "dog"], title="")


def test_a_confusion_matrix_of_many_classes_has_no_counts_and_no_overlapping_names():
    fig = confusion_figure(np.eye(400), [f"class {k}" for k in range(400)], title="")
    assert not fig.axes[0].texts
    fig.draw_without_rendering()
    heights = [label.get_window_extent() for label in fig.axes[0].get_yticklabels()]
    assert all(upper.y0 > lower.y0 + 0.8 * lower.height for upper, lower in pairwise(heights))


def test_a_reliability_diagram_bins_as_the_calibration_error_does():
    confidences = torch.tensor([0.0, 0.5, 0.51, 0.9, 1.0])
    correct = torch.tensor([False, True, False, True, True])
    fig = reliability_figure(confidences, correct, ece=0.1234, title="test", bins=2)
    accuracy, share = ([bar.get_height() for bar in ax.patches] for ax in fig.axes)
    assert accuracy == pytest.approx([1 / 2, 2 / 3])  # (0, 0.5] and (0.5, 1], with 0 in the first
    assert share == pytest.approx([2 / 5, 3 / 5])
    assert "ECE 0.1234" in texts(fig)
    with pytest.raises(ValueError, match="must be"):
        reliability_figure(confidences, correct[:2], ece=0.0, title="")


def test_a_saved_figure_is_a_png_alone_in_its_folder(tmp_path):
    path = save_figure(attention_panel(IMAGES, maps_of(3), title="layer 0"), tmp_path / "new" / "panel.png")
    assert [*path.parent.iterdir()] == [path]
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    pixels = imread(path)
    assert pixels.shape[1] > 1000
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 50


def test_a_picture_that_fails_leaves_the_old_one_and_no_rest(tmp_path, monkeypatch):
    path = save_figure(new_figure(1, 1), tmp_path / "picture.png")
    before = path.read_bytes()
    figure = new_figure(2, 2)

    def fill_the_disk(name, **_):
        name.write_bytes(b"half a pict")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        save_figure(figure, path)
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]
