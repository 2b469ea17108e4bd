"""The numbers of a report against SciPy, and against the numbers that the runs were written with."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from vit_attn.explain.explanations import METHODS, RANDOM, Explanations
from vit_attn.report.runs import read_runs
from vit_attn.report.statistics import Estimate
from vit_attn.report.summary import COLUMNS, agreement, by_layer, format_estimate, summarize, value, write_csv

NAN = math.nan
COLUMN = {column.key: column for column in COLUMNS}
SCORES = {
    "softmax": (0.90, 0.92, 0.91, 0.93),
    "strided": (0.95, 0.965, 0.94, 0.975),
    "fixed": (0.91, 0.945, 0.93, 0.943),
    "causal": (0.895, 0.921, 0.899, 0.93),
}


@pytest.fixture(scope="module")
def scored(run_writer, tmp_path_factory):
    """Three mechanisms and softmax by four seeds, and two runs that must be in no mean."""
    from vit_attn.report.compare import compare

    folder = tmp_path_factory.mktemp("runs") / "experiment"
    for attention, scores in SCORES.items():
        for seed, acc in enumerate(scores, start=1):
            run_writer(folder, attention=attention, seed=seed, acc=acc, curves=False)
    goes_on = run_writer(folder, attention="strided", seed=5, acc=0.0, curves=False) / "results/status.json"
    goes_on.write_text(goes_on.read_text().replace("finished", "running"))
    run_writer(folder, attention="fixed", seed=6, state="failed", error='loss is NaN, "really"', stopped_after=5)
    return compare(read_runs([folder]))


def of_file(run, *path):
    node = json.loads((run.path / "results/metrics.json").read_text())
    for key in path:
        node = node[key]
    return node


def test_value_of_every_kind(make_run):
    (run,) = read_runs([make_run(attention="strided", explain=True, layers=3)])
    assert value(run, "test/acc") == of_file(run, "test", "acc")
    assert value(run, "val/ece") == of_file(run, "val", "ece")
    assert value(run, "cost/parameters") == 459_562
    assert value(run, "cost/entries") == 3 * of_file(run, "cost", "entries")[0]
    assert value(run, "speed/step_seconds") == of_file(run, "speed", "step_seconds")
    layers = of_file(run, "attention_statistics")
    assert value(run, "attention/entropy") == pytest.approx(np.mean([each["entropy"] for each in layers.values()]))
    assert value(run, "deletion_auc/rollout") == of_file(run, "explanations", "methods", "rollout", "deletion_auc")
    assert value(run, "insertion_auc/random") == of_file(run, "explanations", "methods", RANDOM, "insertion_auc")
    assert all(math.isfinite(value(run, column.key)) for column in COLUMNS)


def test_value_that_is_missing_is_no_number(make_run):
    (run,) = read_runs([make_run()])
    assert math.isnan(value(run, "deletion_auc/rollout"))
    for results in (
        None,
        {},
        {"test": {"acc": "high"}, "val": 3, "cost": [], "attention_statistics": {"0": None, "mean": {"zeros": 1.0}}},
    ):
        assert all(math.isnan(value(replace(run, results=results), column.key)) for column in COLUMNS)


def test_estimates_are_of_the_finished_runs_alone(scored):
    rows = summarize(scored)
    assert [row.group.label for row in rows] == ["softmax", "causal", "fixed", "strided"]
    assert {(run.seed, run.state) for run in scored.left_out} == {(5, "unfinished"), (6, "failed")}
    for row in rows:
        scores = np.array(SCORES[row.group.label])
        found = row.estimates["test/acc"]
        low, high = stats.t.interval(0.95, 3, scores.mean(), stats.sem(scores))
        expected = (scores.mean(), scores.std(ddof=1), low, high)
        assert (found.mean, found.std, found.low, found.high) == pytest.approx(expected, rel=1e-9)
        assert found.n == 4
        entries = [sum(of_file(run, "cost", "entries")) for run in row.group.runs]
        assert row.estimates["cost/entries"].mean == pytest.approx(np.mean(entries))
        assert row.estimates.keys() == COLUMN.keys()


@pytest.mark.parametrize("key", ["test/acc", "test/ece", "test/loss", "val/acc", "val/ece", "val/loss"])
def test_tests_are_scipys_with_holms_correction_per_score(scored, key):
    section, name = key.split("/")
    values = {group.label: [of_file(run, section, name) for run in group.runs] for group in scored.groups}
    p = {label: stats.ttest_rel(values[label], values["softmax"]).pvalue for label in values if label != "softmax"}
    adjusted, largest = {}, 0.0
    for left, label in zip((3, 2, 1), sorted(p, key=p.get), strict=True):
        adjusted[label] = largest = max(largest, min(1.0, left * p[label]))
    for row in summarize(scored):
        label, found = row.group.label, row.tests[key]
        if label == "softmax":
            assert found.verdict == "baseline"
            continue
        assert (found.p, found.p_adjusted) == pytest.approx((p[label], adjusted[label]), rel=1e-6)
        gain = np.mean(np.subtract(values[label], values["softmax"])) * (1 if name == "acc" else -1)
        expected = "cannot tell" if adjusted[label] >= 0.05 else "better" if gain > 0 else "worse"
        assert found.verdict == expected


def test_the_scores_of_this_file_need_the_correction(scored):
    tests = {row.group.label: row.tests["test/acc"] for row in summarize(scored)}
    assert {label: test.verdict for label, test in tests.items()} == {
        **{"softmax": "baseline", "strided": "better", "fixed": "better", "causal": "cannot tell"},
    }
    assert tests["fixed"].p < tests["fixed"].p_adjusted


def test_only_the_shared_seeds_are_tested(comparison_of):
    base, other = {1: 0.90, 2: 0.92, 3: 0.91, 4: 0.99}, {1: 0.95, 2: 0.93, 3: 0.97, 9: 0.10}
    runs = [{"attention": "softmax", "seed": seed, "acc": acc} for seed, acc in base.items()]
    runs += [{"attention": "strided", "seed": seed, "acc": acc} for seed, acc in other.items()]
    _, row = summarize(comparison_of(*runs))
    found = row.tests["test/acc"]
    expected = stats.ttest_rel([0.95, 0.93, 0.97], [0.90, 0.92, 0.91])
    assert (found.n, found.p) == (3, pytest.approx(expected.pvalue, rel=1e-9))
    assert found.difference == pytest.approx(0.04)
    assert row.estimates["test/acc"].n == 4  # the mean is over all of its seeds


def test_one_seed_has_no_verdict(comparison_of):
    _, row = summarize(comparison_of({"attention": "softmax"}, {"attention": "strided"}))
    assert row.tests["test/acc"].verdict == "cannot tell"
    assert row.tests["test/acc"].n == 1


def test_layers_are_in_the_order_of_depth(comparison_of):
    runs = [{"seed": seed, "layers": 12, "results": {"attention_statistics": None}} for seed in (1, 2)]
    for run in runs:
        layers = sorted(range(12), key=str)  # "10" before "2", as a file may have them
        run["results"] = {"attention_statistics": {str(layer): {"zeros": layer + run["seed"]} for layer in layers}}
    (group,) = comparison_of(*runs).groups
    group = replace(group, runs=tuple(reordered(run) for run in group.runs))
    found = by_layer(group, "zeros")
    assert [each.mean for each in found] == [layer + 1.5 for layer in range(12)]
    assert {each.n for each in found} == {2}


def reordered(run):
    """The run with its layers in the order of their names as text."""
    layers = run.results["attention_statistics"]
    return replace(run, results={**run.results, "attention_statistics": {key: layers[key] for key in sorted(layers)}})


def test_layers_without_statistics(comparison_of):
    (group,) = comparison_of({"results": {"attention_statistics": None}}).groups
    assert by_layer(group, "zeros") == []
    assert by_layer(group, "nonsense") == []


def explanations(rng, images=None, side=3):
    """Two images of random maps."""
    curves = {name: np.zeros((2, 4), np.float32) for name in (*METHODS, RANDOM)}
    return Explanations(
        images=np.zeros((2, 6, 6, 3), np.uint8) if images is None else images,
        labels=np.zeros(2, np.int64),
        predictions=np.zeros(2, np.int64),
        confidences=np.ones(2, np.float32),
        maps={name: rng.random((2, side, side)).astype(np.float32) for name in METHODS},
        deletion=curves,
        insertion=curves,
    )


def test_agreement_is_the_mean_rank_correlation_over_pairs(comparison_of):
    (group,) = comparison_of(*({"seed": seed} for seed in (1, 2, 3))).groups
    rng = np.random.default_rng(0)
    each = [explanations(rng) for _ in range(3)]
    for run, found in zip(group.runs, each, strict=True):
        found.save(run.path / "results/explanations.npz")
    agreed = agreement(group)
    assert agreed.keys() == set(METHODS)
    for method in METHODS:
        pairs = ((0, 1), (0, 2), (1, 2))
        by_hand = [
            stats.spearmanr(each[a].maps[method][image].ravel(), each[b].maps[method][image].ravel()).statistic
            for a, b in pairs
            for image in range(2)
        ]
        assert agreed[method] == pytest.approx(np.mean(by_hand), rel=1e-9)


@pytest.mark.parametrize("what", ["other images", "another grid", "one run has them", "one is broken"])
def test_no_agreement_where_nothing_can_be_compared(comparison_of, what):
    (group,) = comparison_of({"seed": 1}, {"seed": 2}).groups
    first, second = (run.path / "results/explanations.npz" for run in group.runs)
    rng = np.random.default_rng(0)
    explanations(rng).save(first)
    if what == "other images":
        explanations(rng, images=np.ones((2, 6, 6, 3), np.uint8)).save(second)
    elif what == "another grid":
        explanations(rng, side=2).save(second)
    elif what == "one is broken":
        second.write_bytes(first.read_bytes()[:100])
    assert agreement(group) == {}


def test_csv_has_a_row_per_run_and_exact_values(scored, tmp_path):
    path = tmp_path / "new/results.csv"
    write_csv(scored, path)
    with path.open(newline="", encoding="utf-8") as file:
        rows = {row["folder"]: row for row in csv.DictReader(file)}
    assert [each.name for each in path.parent.iterdir()] == ["results.csv"]
    groups = {run: group for group in scored.groups for run in map(str, (each.path for each in group.runs))}
    runs = [*(run for group in scored.groups for run in group.runs), *scored.left_out]
    assert len(rows) == len(runs) == 18
    for run in runs:
        row = rows[str(run.path)]
        label = groups[str(run.path)].label if run.state == "finished" else ""
        about = (label, str(run.seed), run.name, run.state, run.reason)
        assert tuple(row[key] for key in ("mechanism", "seed", "run", "state", "reason")) == about
        for key in COLUMN:
            expected = value(run, key)
            assert row[key] == "" if math.isnan(expected) else float(row[key]) == expected
    assert sum(row["test/acc"] != "" for row in rows.values()) == 17  # the failed run has no scores


def just(mean, std=NAN):
    return Estimate(mean, std, NAN, NAN, 1 if math.isnan(std) else 3)


@pytest.mark.parametrize(
    ("key", "found", "text"),
    [
        ("test/acc", just(0.97216, 0.00412), "97.22 ± 0.41 %"),
        ("test/acc", just(0.97216), "97.22 %"),
        ("test/acc", just(1.0, 0.0), "100.00 ± 0.00 %"),
        ("test/loss", just(0.123456, 0.01), "0.1235 ± 0.0100"),
        ("test/loss", just(NAN), "–"),
        ("attention/entropy", just(2.345, 0.1), "2.35 ± 0.10 nats"),
        ("attention/distance", just(3.0), "3.00 patches"),
        ("cost/parameters", just(5_678_901, 0.0), "5.68 M"),
        ("cost/parameters", just(459_562), "460 k"),
        ("cost/flops", just(1.2345e9), "1.23 G"),
        ("cost/entries", just(65), "65"),
        ("cost/entries", just(0), "0"),
        ("speed/peak_memory_bytes", just(2.5 * 2**30, 0.25 * 2**30), "2.50 ± 0.25 GiB"),
        ("speed/peak_memory_bytes", just(700 * 2**20), "700 MiB"),
        ("speed/peak_memory_bytes", just(12), "12 B"),
        ("speed/step_seconds", just(0.0512, 0.002), "51.2 ± 2.0 ms"),
        ("speed/step_seconds", just(2, 0.3), "2.00 ± 0.30 s"),
        ("speed/step_seconds", just(3.2e-5), "32.0 µs"),
        ("speed/images_per_second", just(12345.6, 78.9), "12,346 ± 79 images/s"),
        ("deletion_auc/gradcam", just(0.23456, 0.01), "0.235 ± 0.010"),
    ],
)
def test_estimates_for_people(key, found, text):
    assert format_estimate(COLUMN[key], found) == text
