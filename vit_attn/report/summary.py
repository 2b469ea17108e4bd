"""The numbers of a comparison: a value per run and column, an estimate and a test per group and column."""

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from vit_attn.explain.explanations import METHOD_TITLES, METHODS, RANDOM, Explanations
from vit_attn.explain.explanations import agreement as maps_agreement
from vit_attn.report.compare import Comparison, Group
from vit_attn.report.runs import Run
from vit_attn.report.statistics import Estimate, PairedTest, against_itself, correct, estimate, paired_test

STATISTICS = ("zeros", "entropy", "support", "distance")


@dataclass(frozen=True)
class Column:
    """One number of a run.

    Args:
        key: "test/acc", "cost/flops", "deletion_auc/rollout", …
        title: for people.
        unit: "%" stands for shares, which are shown times 100.
        better: which way is good; None where neither is.
        digits: after the point; None: three significant ones, and a prefix such as M where it helps.
    """

    key: str
    title: str
    unit: str = ""
    better: Literal["higher", "lower"] | None = None
    digits: int | None = None


def _scores(split: str, title: str) -> tuple[Column, ...]:
    return (
        Column(f"{split}/acc", f"{title} accuracy", "%", "higher", 2),
        Column(f"{split}/ece", f"{title} ECE", "%", "lower", 2),
        Column(f"{split}/loss", f"{title} loss", "", "lower", 4),
    )


def _areas(name: str, better: Literal["higher", "lower"]) -> tuple[Column, ...]:
    titles = {**METHOD_TITLES, RANDOM: "random order"}
    return tuple(
        Column(f"{name}_auc/{method}", f"{name} AUC, {titles[method]}", "", None if method == RANDOM else better, 3)
        for method in (*METHODS, RANDOM)
    )


COLUMNS: tuple[Column, ...] = (
    *(*_scores("test", "test"), *_scores("val", "validation")),
    Column("cost/parameters", "parameters"),
    Column("cost/flops", "FLOPs as computed"),
    Column("cost/flops_by_entries", "FLOPs without forbidden entries"),
    Column("cost/entries", "allowed entries"),
    Column("speed/images_per_second", "training speed", "images/s", "higher", 0),
    Column("speed/step_seconds", "step time", "s", "lower"),
    Column("speed/peak_memory_bytes", "peak memory", "B", "lower"),
    Column("attention/zeros", "exact zeros", "%", None, 1),
    Column("attention/entropy", "entropy", "nats", None, 2),
    Column("attention/support", "keys per query", "", None, 1),
    Column("attention/distance", "mean distance", "patches", None, 2),
    *(*_areas("deletion", "lower"), *_areas("insertion", "higher")),
)
_SCORES = tuple(column for column in COLUMNS if column.key.partition("/")[0] in ("test", "val"))
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"))
_BINARY = ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))


@dataclass(frozen=True)
class Row:
    """A group's line of the report: estimates for every column, tests for the scores."""

    group: Group
    estimates: dict[str, Estimate] = field(repr=False)
    tests: dict[str, PairedTest] = field(repr=False)


def value(run: Run, key: str) -> float:
    """Read one number of a run; NaN where it has none."""
    section, _, name = key.partition("/")
    results: Any = run.results or {}
    if section == "attention":
        layers = [layer for layer in _layers(run) if name in layer]
        return fmean(_number(layer[name]) for layer in layers) if layers else math.nan
    if section.endswith("_auc"):
        return _number(_inside(results, "explanations", "methods", name, section))
    found = _inside(results, section, name)
    return float(sum(map(_number, found))) if isinstance(found, list) else _number(found)


def _inside(node: Any, *path: str) -> Any:
    for key in path:
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _number(found: Any) -> float:
    return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else math.nan


def _layers(run: Run) -> list[dict[str, Any]]:
    """Attention statistics in the order of depth."""
    found = _inside(run.results, "attention_statistics")
    layers = found if isinstance(found, dict) else {}
    depths = sorted((key for key in layers if key.isdigit()), key=int)
    return [layers[key] for key in depths if isinstance(layers[key], dict)]


def summarize(comparison: Comparison) -> list[Row]:
    """Estimate every column for every group, and test the scores against the baseline, corrected per score."""
    tests: dict[str, dict[str, PairedTest]] = {group.label: {} for group in comparison.groups}
    for column in _SCORES:
        assert column.better is not None
        by_seed = {group.label: _by_seed(group, column.key) for group in comparison.groups}
        base = by_seed[comparison.baseline]
        others = [label for label in by_seed if label != comparison.baseline]
        single = [paired_test(by_seed[label], base, better=column.better) for label in others]
        for label, test in zip(others, correct(single, better=column.better), strict=True):
            tests[label][column.key] = test
        tests[comparison.baseline][column.key] = against_itself(len(base))
    return [
        Row(
            group=group,
            estimates={column.key: estimate(value(run, column.key) for run in group.runs) for column in COLUMNS},
            tests=tests[group.label],
        )
        for group in comparison.groups
    ]


def _by_seed(group: Group, key: str) -> dict[int, float]:
    return {run.seed: value(run, key) for run in group.runs if run.seed is not None}


def by_layer(group: Group, statistic: str) -> list[Estimate]:
    """Estimate "zeros", "entropy", "support" or "distance" of each layer over the runs of a group; empty without."""
    runs = [[_number(layer.get(statistic)) for layer in _layers(run)] for run in group.runs]
    depth = max(map(len, runs), default=0)
    found = [estimate(layers[index] for layers in runs if index < len(layers)) for index in range(depth)]
    return found if any(each.n for each in found) else []


def agreement(group: Group) -> dict[str, float]:
    """Say how alike the maps of two seeds are: method → mean rank correlation over all pairs of seeds.

    Empty where fewer than two runs have explanations, or where they are not of the same images.
    """
    loaded = []
    for run in group.runs:
        if run.explanations_path is None:
            continue
        try:
            loaded.append(Explanations.load(run.explanations_path))
        except (OSError, ValueError):  # the report says which runs have no explanations
            continue
    try:
        pairs = [maps_agreement(a, b) for a, b in combinations(loaded, 2)]
    except ValueError:
        return {}
    means = {method: _mean(pair[method] for pair in pairs) for method in METHODS}
    return {method: mean for method, mean in means.items() if math.isfinite(mean)}


def _mean(values: Iterable[float]) -> float:
    finite = [each for each in values if math.isfinite(each)]
    return fmean(finite) if finite else math.nan


def write_csv(comparison: Comparison, path: Path) -> None:
    """Write a row per run, those that are left out of the means included: what it is, then every column."""
    names = ("mechanism", "seed", "run", "state", "reason", "folder")
    rows = [(group.label, run, "") for group in comparison.groups for run in group.runs]
    rows += [("", run, run.reason) for run in comparison.left_out]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*names, *(column.key for column in COLUMNS)])
        for label, run, reason in rows:
            about = [label, "" if run.seed is None else run.seed, run.name, run.state, reason, run.path]
            found = [value(run, column.key) for column in COLUMNS]
            writer.writerow([*about, *("" if math.isnan(each) else repr(each) for each in found)])
    partial.replace(path)


def format_estimate(column: Column, found: Estimate) -> str:
    """Write a mean with its unit, and ± its standard deviation where there is one: "97.22 ± 0.41 %"."""
    if math.isnan(found.mean):
        return "–"
    scale, unit, digits = _scale(column, found)
    mean = f"{found.mean * scale:,.{digits}f}"
    # What is counted, not measured, is the same in every seed.
    spread = f" ± {found.std * scale:,.{digits}f}" if found.std > 0 else ""
    if found.std == 0 and column.digits is not None:
        spread = f" ± {0:.{digits}f}"
    return f"{mean}{spread}{' ' * bool(unit)}{unit}"


def _scale(column: Column, found: Estimate) -> tuple[float, str, int]:
    """Factor, unit and digits after the point."""
    mean = found.mean
    if column.unit == "%":
        return 100.0, "%", column.digits or 0
    if column.digits is not None:
        return 1.0, column.unit, column.digits
    steps = _BINARY if column.unit == "B" else _PREFIXES
    size, prefix = next((step for step in steps if abs(mean) >= step[0]), steps[-1] if mean else (1.0, ""))
    unit = prefix if column.unit == "B" else f"{prefix}{column.unit}"
    shown = abs(mean) / size
    if size == 1 and mean == round(mean) and not found.std > 0:
        return 1.0, unit, 0
    return 1 / size, unit, 0 if shown >= 100 else 1 if shown >= 10 else 2
