"""Pictures of explanations: what is written on them, and that what they draw is what they were given."""

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from vit_attn.explain.explanation_figures import (
    curves_figure,
    heads_figure,
    layers_figure,
    methods_figure,
    overlay,
    receptive_field_figure,
)
from vit_attn.explain.explanations import METHOD_TITLES, explain_images
from vit_attn.explain.write import write_explanations


def all_axes(fig):
    """Visible axes, and the colour bars that stand beside them."""
    return [one for ax in fig.axes if ax.get_visible() for one in (ax, *ax.child_axes)]


def texts(fig):
    labels = [text for ax in all_axes(fig) for text in (ax.title, ax.xaxis.label, ax.yaxis.label)]
    return " ".join(" ".join(text.get_text() for text in [*fig.texts, *labels]).split())


def outside(fig):
    """Texts that reach over the edge of the picture."""
    FigureCanvasAgg(fig).draw()
    width, height = fig.canvas.get_width_height()
    found = [*fig.texts, *(text for ax in all_axes(fig) for text in (ax.title, ax.yaxis.label, ax.xaxis.label))]
    boxes = [(text.get_text(), text.get_window_extent()) for text in found if text.get_text()]
    return [text for text, box in boxes if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1]


@pytest.fixture
def found(make_net, make_images, halve):
    net = make_net("strided")
    labels = torch.tensor([0, 1, 2, 0])
    return explain_images(net, halve, lambda logits: logits.softmax(1), make_images(4), labels)


def test_an_overlay_brightens_with_the_map_and_keeps_the_aspect_ratio():
    values = np.array([[0.0, 1.0, 2.0], [3.0, 4.0, 10.0]])
    picture = overlay(np.full((20, 30, 3), 128, np.uint8), values, size=60)
    assert picture.shape == (40, 60, 3)
    assert picture.dtype == np.uint8
    blocks = picture.reshape(2, 20, 3, 20, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()  # one colour per patch
    lightness = blocks[:, 0, :, 0].astype(float).mean(-1).ravel()
    assert (np.diff(lightness) > 0).all()
    assert np.array_equal(overlay(np.full((20, 30, 1), 128, np.uint8), 7 * values + 3, size=60), picture)
    assert len(np.unique(overlay(np.zeros((8, 8, 3)), np.ones((2, 2)), size=8).reshape(-1, 3), axis=0)) == 1


@pytest.mark.parametrize("heads", [1, 3, 12])
def test_every_head_is_drawn_on_the_patch_grid(heads):
    maps = np.random.default_rng(0).random((heads, 4, 6)) / 24
    maps[0, 0, 0] = 0
    fig = heads_figure(np.zeros((16, 24, 3)), maps, title="layer 1 · entmax15+full · epoch 3")
    said = texts(fig)
    assert all(f"head {head}" in said for head in range(heads))
    for part in ("layer 1 · entmax15+full · epoch 3", "4×6 patches", "attention weight", "Grey: exactly 0"):
        assert part in said
    drawn = [image.get_array() for ax in fig.axes for image in ax.images if image.get_array().shape == (4, 6)]
    np.testing.assert_allclose(np.array([layer.filled(0) for layer in drawn]), maps)
    assert not outside(fig)


@pytest.mark.parametrize("layers", [2, 24])
def test_every_layer_is_drawn_for_each_image(layers):
    maps = np.random.default_rng(0).random((2, layers, 4, 4))
    names = [f"softmax+{'dilated_sliding_window' if index else 'full'}" for index in range(layers)]
    fig = layers_figure(np.zeros((2, 8, 8, 3)), maps, mechanisms=names, captions=["true 3", "true 4"], title="all")
    said = texts(fig)
    assert f"layer {layers - 1} softmax" in said or layers > 12
    assert "true 4" in said
    drawn = [image.get_array() for ax in fig.axes for image in ax.images if image.get_array().shape == (4, 4)]
    np.testing.assert_allclose(np.array(drawn), maps.reshape(-1, 4, 4))
    assert not outside(fig)


def test_methods_stand_side_by_side(found):
    fig = methods_figure(found, [0, 3], class_names=["cat", "a dog", "a very long name of a class"], title="t")
    said = texts(fig)
    assert all(title in said for title in METHOD_TITLES.values())
    assert "true cat predicted" in said
    assert f"({100 * found.confidences[3]:.0f} %)" in said
    assert "own smallest value" in said
    assert not outside(fig)


def test_curves_name_their_areas(found):
    fig = curves_figure(found, title="t")
    left, right = fig.axes
    for ax, curves, key in ((left, found.deletion, "deletion_auc"), (right, found.insertion, "insertion_auc")):
        labels = [text.get_text() for text in ax.get_legend().get_texts()]
        areas = found.areas()
        for line, label, method in zip(ax.lines, labels, areas, strict=True):
            np.testing.assert_allclose(line.get_ydata(), curves[method].mean(0), rtol=1e-6)
            assert label == f"{METHOD_TITLES.get(method, 'random order')}: {areas[method][key]:.3f}"
    assert not outside(fig)


@pytest.mark.parametrize(("depth", "prefix", "panels"), [(4, 1, 2), (4, 0, 1), (24, 1, 2)])
def test_the_receptive_field_shows_relays_where_there_are_some(depth, prefix, panels):
    first = np.full((4, 6), -1)
    first[1] = [2, 1, 0, 1, 2, depth]
    shares = [index / depth for index in range(depth)]
    fig = receptive_field_figure(first, first, shares=(shares, shares), query=8, num_prefix_tokens=prefix, title="t")
    assert sum(len(ax.images) for ax in fig.axes) == panels
    assert [len(ax.lines) for ax in fig.axes if ax.get_ylabel().startswith("share")] == [panels]
    assert not outside(fig)


@pytest.mark.parametrize("labels", [[2, 1], [-1, -1]])
def test_everything_is_written_and_returned(make_net, make_images, halve, tmp_path, labels):
    net = make_net(["strided", "entmax15"])
    numbers, paths = write_explanations(
        *(net, halve, lambda logits: logits.softmax(1), make_images(2), torch.tensor(labels), tmp_path),
        class_names=["a", "b", "c"],
        note="epoch 3",
        layers=[1],
    )
    assert sorted(paths) == sorted(path for path in tmp_path.rglob("*") if path.is_file())
    names = {"methods", "curves", "layers", "heads_layer_01", "receptive_field"}
    assert {path.stem for path in paths if path.suffix == ".png"} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths if path.suffix == ".png")
    assert numbers["images"] == 2
    assert len(numbers["receptive_field"]) == len(numbers["receptive_field_without_relays"]) == 2
    assert numbers["receptive_field"][1] == 1.0
