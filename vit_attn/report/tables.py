"""The tables of the report."""

import math
from collections.abc import Sequence
from typing import Any

from vit_attn.explain.explanations import METHOD_TITLES, METHODS
from vit_attn.report.blocks import Cell, Header, Table
from vit_attn.report.compare import Comparison
from vit_attn.report.figures_common import finite, score_key, split_of
from vit_attn.report.runs import Run
from vit_attn.report.statistics import Estimate
from vit_attn.report.summary import COLUMNS, Row, agreement, format_estimate
from vit_attn.report.words import best_labels, p_value, signed

HIGHEST = "★"
_BY_KEY = {column.key: column for column in COLUMNS}


def _plural(count: int, thing: str) -> str:
    return f"{count} {thing}{'s' * (count != 1)}"


def _cell(row: Row, key: str, *, interval: bool = False) -> Cell:
    estimate = row.estimates[key]
    if not finite(estimate.mean):
        return Cell("–")
    runs = len(row.group.runs)
    note = [_interval(estimate)] if interval and finite(estimate.low, estimate.high) else []
    note += [f"of {_plural(estimate.n, 'seed')}"] if estimate.n != runs else []
    return Cell(format_estimate(_BY_KEY[key], estimate), ", ".join(note))


def _interval(estimate: Estimate) -> str:
    return f"{100 * estimate.low:.2f} to {100 * estimate.high:.2f}"


def _name(comparison: Comparison, row: Row) -> Cell:
    return Cell(row.group.label, "baseline" if row.group.label == comparison.baseline else "")


def scores_table(comparison: Comparison, rows: Sequence[Row]) -> Table:
    """Accuracy, calibration and loss of every mechanism, and its difference to the baseline."""
    key = score_key(rows)
    split = key.split("/")[0]
    best = best_labels(rows, key)
    lines = []
    for row in rows:
        score, test = _cell(row, key, interval=True), row.tests[key]
        mark = f" {HIGHEST}" if row.group.label in best and len(rows) > 1 else ""
        difference = Cell("–")
        if row.group.label != comparison.baseline and finite(test.difference):
            spread = f"{signed(test.low)} to {signed(test.high)}" if finite(test.low, test.high) else ""
            difference = Cell(signed(test.difference), spread)
        lines.append(
            (
                _name(comparison, row),
                Cell(str(len(row.group.runs))),
                Cell(score.text + mark, score.note),
                *([_cell(row, "val/acc")] if key != "val/acc" else []),
                _cell(row, f"{split}/ece"),
                _cell(row, f"{split}/loss"),
                difference,
                Cell(p_value(test.p_adjusted)),
                Cell(test.verdict, test.reason, strong=test.verdict in ("better", "worse")),
            )
        )
    headers = (
        Header("mechanism", numeric=False),
        Header("seeds"),
        Header(f"{split_of(key)} accuracy", "mean ± std, 95 % interval"),
        *([Header("validation accuracy")] if key != "val/acc" else []),
        Header("ECE", f"{split_of(key)}, lower is better"),
        Header("loss", f"{split_of(key)}, lower is better"),
        Header("difference to baseline", "points, 95 % interval"),
        Header("adjusted p"),
        Header("verdict", numeric=False),
    )
    note = (
        f"{HIGHEST} highest mean, and only that: the verdict says whether it differs from the baseline beyond chance. "
        "± is the standard deviation over seeds (n − 1); intervals are Student's t, not corrected for the number of "
        "mechanisms; p is of a two-sided paired t-test over shared seeds, Holm-adjusted. ECE: expected calibration "
        "error."
    )
    return Table("Means over seeds, against the baseline", headers, tuple(lines), note)


_COST = ("cost/parameters", "cost/flops", "cost/flops_by_entries", "cost/entries")
_SPEED = ("speed/images_per_second", "speed/step_seconds", "speed/peak_memory_bytes")
_COST_HEADERS = {
    "cost/parameters": ("parameters", ""),
    "cost/flops": ("FLOPs as computed", "per image"),
    "cost/flops_by_entries": ("FLOPs without forbidden entries", "per image"),
    "cost/entries": ("entries allowed", "all layers, per head"),
    "speed/images_per_second": ("training speed", ""),
    "speed/step_seconds": ("step time", "training"),
    "speed/peak_memory_bytes": ("peak memory", ""),
}


def cost_table(comparison: Comparison, rows: Sequence[Row]) -> Table | None:
    """What each mechanism costs; columns that no run measured are left out."""
    keys = [key for key in (*_COST, *_SPEED) if any(finite(row.estimates[key].mean) for row in rows)]
    if not keys:
        return None
    lines = []
    for row in rows:
        cells = {key: _cell(row, key) for key in keys}
        if "cost/flops" in cells:
            cells["cost/flops"] = Cell(cells["cost/flops"].text, _implementations(row))
        lines.append((_name(comparison, row), *cells.values()))
    headers = (Header("mechanism", numeric=False), *(Header(*_COST_HEADERS[key]) for key in keys))
    return Table(
        "What each mechanism costs", headers, tuple(lines), _cost_note(rows, any(key in keys for key in _SPEED))
    )


def _runs(rows: Sequence[Row]) -> list[Run]:
    return [run for row in rows for run in row.group.runs]


def _results(run: Run, part: str) -> dict[str, Any]:
    found = (run.results or {}).get(part)
    return found if isinstance(found, dict) else {}


def _implementations(row: Row) -> str:
    """The implementations that computed a mechanism: what stands in brackets after each layer's name."""
    layers = [str(layer) for run in row.group.runs for layer in _results(run, "cost").get("layers") or []]
    names = dict.fromkeys(layer.rpartition("(")[2].removesuffix(")") for layer in layers if layer.endswith(")"))
    return ", ".join(names)


def _cost_note(rows: Sequence[Row], timed: bool) -> str:
    note = (
        "FLOPs as computed are those of the implementation that ran (named below the number), forbidden entries "
        "included where it computes them; without them: if only allowed entries were computed."
    )
    if any(None in (_results(run, "cost").get("entries") or []) for run in _runs(rows)):
        note += " A mechanism without entries forms no weights: its pictures show what it does to values of 0 and 1."
    if not timed:
        return f"{note} Speed and memory were not measured in these runs."
    speeds = [speed for run in _runs(rows) if (speed := _results(run, "speed"))]
    devices, batches = (
        ", ".join(dict.fromkeys(str(speed[key]) for speed in speeds if speed.get(key) is not None))
        for key in ("device", "batch_size")
    )
    return (
        f"{note} Speed: medians while training, on {devices or 'an unknown device'}, batch size {batches or '?'}, "
        "one run after another, whatever else the machine did; python -m vit_attn.bench model measures in turn. "
        "Peak memory: what forward and backward of one batch hold at most, beyond weights, gradients and optimizer "
        "state."
    )


def left_out_table(comparison: Comparison) -> Table | None:
    """The runs that do not count, and why."""
    if not comparison.left_out:
        return None
    headers = tuple(Header(title, numeric=False) for title in ("run", "seed", "attention", "state", "reason"))
    lines = []
    for run in comparison.left_out:
        model = run.config.get("model")
        attention = model.get("attention") if isinstance(model, dict) else None
        seed = "–" if run.seed is None else str(run.seed)
        spec = "–" if attention is None else plain_value(attention)
        lines.append((Cell(run.name), Cell(seed), Cell(spec), Cell(run.state), Cell(run.reason or "–")))
    return Table("Runs left out", headers, tuple(lines))


def plain_value(value: Any) -> str:
    """Write a configuration's value as the command line takes it."""
    if isinstance(value, (list, tuple)):
        return f"[{','.join(plain_value(item) for item in value)}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


# What a reader looks for first; a part's other settings are folded away.
_MATTERS = {
    "data": ("_target_", "image_size", "batch_size", "val_fraction", "split_seed"),
    "model": ("name", "pretrained", "patch_size", "embed_dim", "depth", "num_heads"),
    "optimizer": ("_target_", "lr", "weight_decay"),
    "loss": ("_target_", "label_smoothing"),
    "trainer": ("max_epochs", "max_steps", "max_time", "precision"),
    "callbacks": ("ema.enabled", "early_stopping.enabled"),
}


def held_fixed_tables(comparison: Comparison) -> tuple[Table, Table | None]:
    """What all runs share: what matters most, and the rest."""
    fixed = {key: plain_value(value) for key, value in comparison.held_fixed.items() if value is not None}
    headers = (Header("part", numeric=False), Header("settings", numeric=False))
    lines = []
    for part, names in _MATTERS.items():
        found = [(name, fixed.pop(f"{part}.{name}")) for name in names if f"{part}.{name}" in fixed]
        words = [value.rpartition(".")[2] if name == "_target_" else f"{name} {value}" for name, value in found]
        lines += [(Cell(part), Cell(" · ".join(words)))] if words else []
    main = Table("Held fixed", headers, tuple(lines))
    headers = (Header("setting", numeric=False), Header("value", numeric=False))
    rest = tuple((Cell(key), Cell(value)) for key, value in sorted(fixed.items()))
    return main, Table("Also held fixed", headers, rest) if rest else None


def agreement_table(comparison: Comparison, rows: Sequence[Row]) -> Table | None:
    """How alike the explanations of different seeds are."""
    found = [(row, agreement(row.group)) for row in rows]
    methods = [method for method in METHODS if any(finite(values.get(method, math.nan)) for _, values in found)]
    if not methods:
        return None
    headers = (Header("mechanism", numeric=False), *(Header(METHOD_TITLES[method]) for method in methods))
    lines = tuple(
        (_name(comparison, row), *(Cell(_two(values.get(method, math.nan))) for method in methods))
        for row, values in found
        if values
    )
    note = (
        "Spearman's rank correlation of two seeds' maps of the same test image, mean over images and pairs of seeds: 1 "
        "is the same order of the patches, 0 no relation. A map that changes with the seed says as much about the "
        "seed as about the mechanism."
    )
    return Table("Agreement between seeds", headers, lines, note)


def _two(value: float) -> str:
    return f"{value:.2f}".replace("-", "−") if finite(value) else "–"


def environment_table(rows: Sequence[Row]) -> Table | None:
    """Versions and hardware, every value that occurs."""
    environments = [environment for run in _runs(rows) if (environment := _results(run, "environment"))]
    keys = dict.fromkeys(key for environment in environments for key in environment)
    if not keys:
        return None
    lines = []
    for key in keys:
        values = dict.fromkeys(plain_value(found[key]) for found in environments if key in found)
        lines.append(
            (Cell(key.replace("_", " ")), Cell(" / ".join(value for value in values if value != "[]") or "none"))
        )
    headers = (Header("what", numeric=False), Header("value", numeric=False))
    return Table("Versions and hardware", headers, tuple(lines))
