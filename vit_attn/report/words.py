"""The answer of a comparison in words: what the numbers show, what they cannot, what it costs."""

import math
from collections.abc import Sequence

from vit_attn.report.compare import Comparison
from vit_attn.report.figures_common import finite, listed, score_key, split_of
from vit_attn.report.statistics import PairedTest
from vit_attn.report.summary import COLUMNS, Row, format_estimate

# More mechanisms than this are not listed one by one in a sentence.
_MAX_LISTED = 6
_BY_KEY = {column.key: column for column in COLUMNS}


def shown(row: Row, key: str) -> str:
    """A row's estimate with its unit, or a dash."""
    estimate = row.estimates[key]
    return format_estimate(_BY_KEY[key], estimate) if finite(estimate.mean) else "–"


def signed(share: float) -> str:
    """A difference of shares in points of a percent, with a true minus."""
    return f"{100 * share:+.2f}".replace("-", "−") if finite(share) else "–"


def p_value(p: float) -> str:
    """A p-value with as many digits as mean something."""
    if not finite(p):
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def best_labels(rows: Sequence[Row], key: str) -> list[str]:
    """The mechanisms with the highest mean; several only where they are equal."""
    means = {row.group.label: row.estimates[key].mean for row in rows if finite(row.estimates[key].mean)}
    return [label for label, mean in means.items() if mean == max(means.values())]


def answer(comparison: Comparison, rows: Sequence[Row]) -> list[str]:
    """Write the paragraphs at the head of the report, the most important one first."""
    key = score_key(rows)
    by_label = {row.group.label: row for row in rows}
    best = best_labels(rows, key)
    if not best:
        return ["No run has an accuracy, so there is nothing to compare."]
    if len(rows) == 1:
        return [
            f"Only one mechanism has finished runs: {best[0]}, {split_of(key)} accuracy {_score(rows[0], key)}. "
            "There is nothing to compare it with."
        ]
    paragraphs = [" ".join([_best(comparison, best, by_label, key), *_verdicts(comparison, rows, key)])]
    reach = _reach(comparison, rows, key)
    cost = _cost(comparison, by_label[comparison.baseline], rows)
    return [*paragraphs, *(text for text in (reach, cost) if text)]


def _score(row: Row, key: str) -> str:
    n = row.estimates[key].n
    return f"{shown(row, key)} " + ("from one seed" if n == 1 else f"over {n} seeds (mean ± standard deviation)")


def _best(comparison: Comparison, best: Sequence[str], by_label: dict[str, Row], key: str) -> str:
    what = f"mean {split_of(key)} accuracy" if by_label[best[0]].estimates[key].n > 1 else f"{split_of(key)} accuracy"
    if len(best) > 1:
        return f"{listed(best)} share the highest {what}: {_score(by_label[best[0]], key)}."
    name = f"The baseline, {best[0]}," if best[0] == comparison.baseline else best[0]
    return f"{name} has the highest {what}: {_score(by_label[best[0]], key)}."


def tests_of(comparison: Comparison, rows: Sequence[Row], key: str) -> dict[str, PairedTest]:
    """Label → test against the baseline, the baseline itself left out."""
    return {row.group.label: row.tests[key] for row in rows if row.group.label != comparison.baseline}


def _verdicts(comparison: Comparison, rows: Sequence[Row], key: str) -> list[str]:
    tests = tests_of(comparison, rows, key)
    baseline = next(row for row in rows if row.group.label == comparison.baseline)
    against = f"the baseline {comparison.baseline} ({shown(baseline, key)})"
    if not any(finite(test.p) for test in tests.values()):
        why = "there are no two seeds that it shares with the others"
        reasons = {test.reason for test in tests.values() if test.reason}
        why = reasons.pop() if len(reasons) == 1 else why
        return [f"Whether any mechanism is better or worse than {against} cannot be tested: {why}."]
    sentences = []
    for verdict in ("better", "worse"):
        changed = [
            f"{label} by {signed(abs(test.difference)).removeprefix('+')} points "
            f"(95 % interval {signed(test.low)} to {signed(test.high)}, adjusted p {_equals(test.p_adjusted)})"
            for label, test in tests.items()
            if test.verdict == verdict
        ]
        if changed:
            sentences.append(f"Beyond chance {verdict} than {against}: {'; '.join(changed)}.")
    unclear = [label for label, test in tests.items() if test.verdict == "cannot tell"]
    if len(unclear) == len(tests):
        sentences.append(f"No mechanism differs from {against} beyond chance: all verdicts are “cannot tell”.")
    elif unclear:
        names = listed(unclear) if len(unclear) <= _MAX_LISTED else f"the other {len(unclear)} mechanisms"
        sentences.append(f"Cannot tell: {names}.")
    return sentences


def _equals(p: float) -> str:
    text = p_value(p)
    return text if text.startswith("<") else f"= {text}"


def _reach(comparison: Comparison, rows: Sequence[Row], key: str) -> str:
    """Say what was tested, and how large a difference the data could have shown."""
    tests = [test for test in tests_of(comparison, rows, key).values() if finite(test.p, test.low, test.high)]
    if not tests:
        return ""
    halves = sorted((test.high - test.low) / 2 for test in tests)
    counts = sorted({test.n for test in tests})
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    few = f"{100 * halves[0]:.1f}"
    many = f"{100 * halves[-1]:.1f}"
    width = f"{few} points" if few == many else f"{few} to {many} points, by mechanism"
    holm = f", corrected by Holm's method for {len(tests)} comparisons" if len(tests) > 1 else ""
    return (
        f"Tested: two-sided paired t-test over the shared seeds (n = {n}){holm}; “better” and “worse” mean an adjusted "
        "p below 0.05. “Cannot tell” does not mean equal: the 95 % intervals of the differences (Student's t, not "
        f"corrected) reach {width}, to either side, and a smaller difference would more likely than not go unseen."
        + (" With two seeds a t-test rests on assumed normality alone: take its verdict as a hint." * (counts[0] == 2))
    )


def _cost(comparison: Comparison, baseline: Row, rows: Sequence[Row]) -> str:
    """Say what each mechanism costs beside the baseline, or the extremes where there are many."""
    units = {"cost/flops": "the FLOPs", "speed/step_seconds": "the time per training step"}
    reference = {key: baseline.estimates[key].mean for key in units}
    units = {key: unit for key, unit in units.items() if finite(reference[key]) and reference[key] > 0}
    others = [row for row in rows if row.group.label != comparison.baseline]
    ratios = {row.group.label: {key: row.estimates[key].mean / reference[key] for key in units} for row in others}
    known = {label: found for label, found in ratios.items() if any(map(math.isfinite, found.values()))}
    if not known:
        return ""
    if len(known) > _MAX_LISTED:
        key = next(reversed(units))
        order = sorted((label for label in known if finite(known[label][key])), key=lambda label: known[label][key])
        known = {label: known[label] for label in (order[0], order[-1])} if order else {}
        beginning = f"Cost beside the baseline, the lowest and the highest by {units[key]} of {len(others)}"
    else:
        beginning = "Cost beside the baseline"
    parts = [
        f"{label} takes "
        + " and ".join(f"{found[key]:.2f}× {unit}" for key, unit in units.items() if finite(found[key]))
        for label, found in known.items()
    ]
    own = ", ".join(f"{shown(baseline, key)}{_SPELLED[key]}" for key in units)
    return f"{beginning} ({own}): {'; '.join(parts)}." if parts else ""


# What follows the number: "65.0 M" and "FLOPs per image".
_SPELLED = {"cost/flops": "FLOPs per image", "speed/step_seconds": " per training step"}
