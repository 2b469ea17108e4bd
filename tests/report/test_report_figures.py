"""The report's figures: what is drawn where, against numbers worked out here."""

import io
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from vit_attn.explain.explanations import Explanations
from vit_attn.report.figures import accuracy_figure, cost_figure, gain_sentence
from vit_attn.report.figures_alpha import alpha_figure, alpha_training_figure, entmax_family
from vit_attn.report.figures_common import drawn_rows, group_styles, mean_curve, wrapped
from vit_attn.report.figures_explain import faithfulness_figure, pictures, shared_explanations
from vit_attn.report.figures_training import curves_figure, layers_figure, reach_figure
from vit_attn.report.write import load

ACCURACIES = {"softmax": (0.90, 0.92, 0.91), "strided": (0.95, 0.93, 0.96), "sparsemax": (0.85, 0.86, 0.84)}


@pytest.fixture(scope="module")
def experiment(run_writer, tmp_path_factory):
    """Three mechanisms by three seeds, with explanations."""
    folder = tmp_path_factory.mktemp("runs") / "experiment"
    for attention, scores in ACCURACIES.items():
        for seed, acc in enumerate(scores, start=1):
            run_writer(folder, attention=attention, seed=seed, acc=acc, explain=True)
    return folder


@pytest.fixture(scope="module")
def compared(experiment):
    comparison, rows = load([experiment])
    return comparison, rows, group_styles(comparison)


def png(drawing):
    """Render, so that what matplotlib finds only then is found."""
    buffer = io.BytesIO()
    drawing.figure.savefig(buffer, format="png", dpi=40)
    return buffer.getvalue()


def with_groups(comparison, labels):
    groups = tuple(replace(comparison.groups[0], label=label) for label in labels)
    return replace(comparison, groups=groups, baseline=labels[0])


def test_twenty_mechanisms_all_look_different(compared):
    labels = [f"mechanism {index}" for index in range(20)]
    styles = group_styles(with_groups(compared[0], labels))
    assert len({(style.color, style.marker) for style in styles.values()}) == 20
    assert [label for label in labels if styles[label].color == "#000000"] == ["mechanism 0"]


def test_curve_is_the_mean_over_runs_at_the_steps_they_share():
    runs = (
        SimpleNamespace(curves={"val/acc": [(1, 0.2), (2, 0.4), (3, 0.9)]}),
        SimpleNamespace(curves={"val/acc": [(2, 0.8), (3, 0.5), (4, 1.0)]}),
        SimpleNamespace(curves={}),
    )
    curve = mean_curve(SimpleNamespace(runs=runs), "val/acc")
    assert curve.steps.tolist() == [2, 3]
    assert curve.mean == pytest.approx([0.6, 0.7])
    assert curve.low == pytest.approx([0.4, 0.5])
    assert curve.high == pytest.approx([0.8, 0.9])


def test_curve_is_averaged_over_parts_of_the_training():
    runs = (SimpleNamespace(curves={"train/loss": [(step, float(step)) for step in range(6)]}),)
    curve = mean_curve(SimpleNamespace(runs=runs), "train/loss", bins=2)
    assert curve.steps.tolist() == [1, 4]
    assert curve.mean.tolist() == [1, 4]


def test_no_curve_where_runs_share_no_step():
    runs = (SimpleNamespace(curves={"a": [(1, 1.0)]}), SimpleNamespace(curves={"a": [(2, 1.0)]}))
    assert mean_curve(SimpleNamespace(runs=runs), "a") is None
    assert mean_curve(SimpleNamespace(runs=runs), "b") is None


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("entmax15+strided", ["entmax15+", "strided"]),
        ("short", ["short"]),
        ("entmax 1.01→1.5", ["entmax", "1.01→1.5"]),
        ("one two three four five six", ["one two", "three four", "five six"]),
        ("aaaaaaaaaabbbbbbbbbbccccccccccdddd", ["aaaaaaaaaa", "bbbbbbbbbb", "ccccccccc…"]),
    ],
)
def test_labels_are_broken_where_they_can_be(text, lines):
    assert wrapped(text, 10).splitlines() == lines


def test_a_panel_keeps_the_baseline_and_the_best(compared):
    comparison, rows, _ = compared
    kept, note = drawn_rows(comparison, rows, limit=2)
    assert [row.group.label for row in kept] == ["softmax", "strided"]
    assert "2 of 3" in note
    kept, note = drawn_rows(replace(comparison, baseline="sparsemax"), rows, limit=2)
    assert [row.group.label for row in kept] == ["sparsemax", "strided"]
    assert drawn_rows(comparison, rows, limit=3)[1] == ""


def test_accuracy_shows_every_seed_the_mean_and_the_t_interval(compared):
    comparison, rows, styles = compared
    (ax,) = accuracy_figure(comparison, rows, styles).figure.axes
    labels = [tick.get_text() for tick in ax.get_yticklabels()]
    for label, scores in ACCURACIES.items():
        y = labels.index(label)
        drawn = {
            round(x, 9) for line in ax.lines[:-1] for x, at in zip(*line.get_data(), strict=True) if abs(at - y) < 0.4
        }
        interval = stats.t.interval(0.95, 2, np.mean(scores), stats.sem(scores))
        interval = np.clip(interval, *ax.get_xlim())
        assert drawn == {round(float(x), 9) for x in (*scores, np.mean(scores), *interval)}


def test_an_interval_that_leaves_the_picture_ends_in_an_arrow(run_writer, tmp_path):
    for seed, acc in ((1, 0.90), (2, 0.94)):  # with two seeds the interval is 0.92 ± 0.25
        run_writer(tmp_path / "two", seed=seed, acc=acc)
    comparison, rows = load([tmp_path / "two"])
    (ax,) = accuracy_figure(comparison, rows, group_styles(comparison)).figure.axes
    assert {line.get_marker() for line in ax.lines} >= {"<", ">"}
    assert ax.get_xlim()[0] > 0.8


def test_the_front_of_accuracy_and_cost_is_named(run_writer, tmp_path):
    costs = {"softmax": (3e7, 0.90), "strided": (1e7, 0.85), "fixed": (2e7, 0.84), "causal": (4e7, 0.95)}
    for attention, (flops, acc) in costs.items():
        run_writer(tmp_path / "e", attention=attention, acc=acc, results={"cost": {"flops": flops}, "speed": None})
    comparison, rows = load([tmp_path / "e"])
    drawing = cost_figure(comparison, rows, group_styles(comparison))
    assert len(drawing.figure.axes) == 1  # nothing measured the time
    assert "as computed: strided, softmax, causal." in drawing.alt


@pytest.mark.parametrize("figure", [curves_figure, layers_figure, faithfulness_figure, alpha_figure])
def test_figures_are_drawn(compared, figure):
    drawing = figure(*compared)
    assert drawing is None or png(drawing).startswith(b"\x89PNG")
    assert (drawing is None) == (figure is alpha_figure)  # of the entmax family there are two only


def test_layers_show_mean_and_spread(compared):
    comparison, rows, styles = compared
    zeros = layers_figure(comparison, rows, styles).figure.axes[0]
    strided = next(row for row in rows if row.group.label == "strided")
    values = [
        [run.results["attention_statistics"][str(layer)]["zeros"] for run in strided.group.runs] for layer in range(4)
    ]
    drawn = [line.get_ydata() for line in zeros.lines if line.get_color() == styles["strided"].color]
    assert any(len(line) == 4 and np.allclose(line, np.mean(values, axis=1)) for line in drawn)


def points(pairs):
    """Rows that have a share of zeros and an accuracy."""
    nan = SimpleNamespace(mean=math.nan)
    return [
        SimpleNamespace(
            estimates={
                "attention/zeros": SimpleNamespace(mean=zeros),
                "test/acc": SimpleNamespace(mean=acc),
                "deletion_auc/attention": nan,
            }
        )
        for zeros, acc in pairs
    ]


def test_gain_is_a_rank_correlation_over_enough_mechanisms():
    # Ranks 1 2 3 4 5 and 2 1 4 3 5: d² sums to 4, so rho = 1 - 6·4 / (5·24) = 0.8.
    five = points([(0.0, 0.92), (0.2, 0.91), (0.5, 0.94), (0.7, 0.93), (0.9, 0.95)])
    assert "+0.80 with test accuracy (over 5 mechanisms)" in gain_sentence(five)
    assert "too few" in gain_sentence(five[:4])
    assert "too few" in gain_sentence(points([(0.0, 0.9)] * 6))  # equal numbers have no order


def test_pictures_are_those_of_the_seed_that_most_mechanisms_have(run_writer, tmp_path):
    folder = tmp_path / "e"
    run_writer(folder, attention="softmax", seed=1, explain=True)
    for attention in ("softmax", "strided", "fixed"):
        run_writer(folder, attention=attention, seed=2, explain=True)
    run_writer(folder, attention="sparsemax", seed=1, explain=True)
    strange = run_writer(folder, attention="causal", seed=2, explain=True) / "results/explanations.npz"
    explained = Explanations.load(strange)
    replace(explained, images=255 - explained.images).save(strange)
    comparison, rows = load([folder])
    shared = shared_explanations(rows)
    assert shared.seed == 2
    assert [label for label, _ in shared.columns] == ["softmax", "fixed", "strided"]
    assert shared.other_images == ["causal"]
    assert shared.missing == ["sparsemax"]
    drawn = pictures(comparison, rows)
    assert [drawing.name for drawing in drawn] == ["pictures_attention", "pictures_rollout", "pictures_gradcam"]
    assert "seed 2" in drawn[0].caption
    assert "other images were explained: causal" in drawn[0].caption
    assert "Without explanations of seed 2: sparsemax" in drawn[0].caption
    count = len(shared.columns[0][1].images)
    chosen = [index * count // 6 for index in range(6)]
    hits = [int((found.predictions[chosen] == found.labels[chosen]).sum()) for _, found in shared.columns]
    titles = [ax.get_xlabel() for ax in drawn[0].figure.axes]
    assert [sum(title.startswith("✓") for title in titles)] == [sum(hits)]
    png(drawn[0])


def test_no_pictures_where_nothing_was_explained(run_writer, tmp_path):
    run = run_writer(tmp_path / "e", explain=True)
    (run / "results/explanations.npz").write_bytes(b"torn")
    comparison, rows = load([tmp_path / "e"])
    assert pictures(comparison, rows) == []


@pytest.fixture(scope="module")
def alphas(run_writer, tmp_path_factory):
    """α fixed, learned and annealed over all keys, and two mechanisms that belong elsewhere."""
    folder = tmp_path_factory.mktemp("alpha") / "alpha"
    learned = {"learnable_alpha": True}
    for seed in (1, 2):
        for attention, options in (
            *(("softmax", {}), ("entmax15", {}), ("sparsemax", {}), ("entmax", {"alpha": 1.3}), ("entmax", learned)),
            *(("entmax", {"anneal_alpha_from": 1.01}), ("entmax+strided", {}), ("strided", {})),
        ):
            run_writer(folder, attention=attention, options=options, seed=seed)
    return load([folder])


def test_the_entmax_family_lies_at_its_alphas(alphas):
    _, rows = alphas
    members = {member.row.group.label: member for member in entmax_family(rows)}
    assert not [label for label in members if "strided" in label]
    fixed = {label: member.alpha for label, member in members.items() if member.kind == "fixed"}
    assert fixed == {"softmax": 1.0, "entmax15": 1.5, "sparsemax": 2.0, "entmax α=1.3": 1.3}
    (annealed,) = [member for member in members.values() if member.kind == "annealed"]
    assert annealed.alpha == 1.5
    (learned,) = [member for member in members.values() if member.kind == "learned"]
    finals = [
        points[-1][1]
        for run in learned.row.group.runs
        for name, points in run.curves.items()
        if name.startswith("attention/alpha/")
    ]
    assert len(finals) == 2 * 4 * 3
    assert learned.alpha == pytest.approx(np.mean(finals))
    assert (learned.low, learned.high) == (min(finals), max(finals))


def test_alpha_is_drawn_per_head(alphas):
    comparison, rows = alphas
    styles = group_styles(comparison)
    drawing = alpha_training_figure(comparison, rows, styles)
    panels = [ax for ax in drawing.figure.axes if ax.get_xlabel() == "optimizer step"]
    assert [len(ax.lines) for ax in panels] == [4 * 3, 4 * 3]
    png(drawing)
    png(alpha_figure(comparison, rows, styles))


def test_labels_are_no_formulas(compared):
    comparison, rows, _ = compared
    label = "a$b_{<i> & c|d$ \\frac"
    rows = [replace(row, group=replace(row.group, label=f"{label} {index}")) for index, row in enumerate(rows)]
    comparison = replace(comparison, groups=tuple(row.group for row in rows), baseline=rows[0].group.label)
    styles = group_styles(comparison)
    for figure in (accuracy_figure, cost_figure, layers_figure):
        png(figure(comparison, rows, styles))
    png(pictures(comparison, rows)[0])


def test_reach_is_what_the_runs_say_and_one_panel_where_no_prefix_token_passes_on(run_writer, tmp_path):
    fields = {"softmax": [1.0, 1.0, 1.0], "strided": [0.2, 0.9, 1.0]}
    alone = {"softmax": [1.0, 1.0, 1.0], "strided": [0.2, 0.5, 0.5]}

    def reach(folder, **more):
        for attention, field in fields.items():
            found = {"receptive_field": field} | {name: values[attention] for name, values in more.items()}
            run_writer(folder, attention=attention, seed=1, explain=True, results={"explanations": found})
        comparison, rows = load([folder])
        return reach_figure(comparison, rows, group_styles(comparison))

    def lines(ax):
        return sorted(line.get_ydata().tolist() for line in ax.lines if len(line.get_ydata()) == 3)

    (panel,) = reach(tmp_path / "one").figure.axes
    assert lines(panel) == sorted(fields.values())
    drawing = reach(tmp_path / "two", receptive_field_without_relays=alone)
    left, right = drawing.figure.axes
    assert (lines(left), lines(right)) == (sorted(alone.values()), sorted(fields.values()))
    assert "strided 50 %" in drawing.alt
    png(drawing)
