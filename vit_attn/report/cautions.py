"""What to know before reading a comparison: one line for each way in which it is not quite fair, or not complete."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vit_attn.report.groups import Group, frozen
from vit_attn.report.mechanisms import show
from vit_attn.report.runs import Run

_NAMES = 4  # groups that a warning names


def cautions(groups: Sequence[Group], differing: Sequence[str], repeats: Sequence[Run]) -> Iterator[str]:
    """Yield the warnings of a comparison, the weightiest first."""
    yield from _settings(groups, differing)
    yield from _lengths(groups)
    yield from _facts(groups)
    yield from _tests_missing(groups)
    yield from _not_finite(groups)
    yield from _seeds(groups)
    yield from (f"{run.path.name} is left out: {run.reason}" for run in repeats)


def _settings(groups: Sequence[Group], differing: Sequence[str]) -> Iterator[str]:
    for key in differing:
        values = [(group.settings.get(key), group.mechanism) for group in groups if group.reads(key)]
        yield f"{key} differs: {_by_value(values)}: not a comparison of attention alone"


def _lengths(groups: Sequence[Group]) -> Iterator[str]:
    """Runs of one configuration that trained for different times: config.yaml keeps what they started with."""
    alike: dict[Any, list[Group]] = {}
    for group in groups:
        may_stop = group.settings.get("callbacks.early_stopping.enabled") or "trainer.max_time" in group.settings
        if not may_stop:
            alike.setdefault(group.regime, []).append(group)
    for members in alike.values():
        for key in ("epochs", "steps"):
            text = _by_run(members, _reader(key))
            if text:
                yield f"{key} differ though the configuration agrees: {text}: a run was changed in the middle"
                break


def _facts(groups: Sequence[Group]) -> Iterator[str]:
    """What runs note of their data, their checkpoint and their machine."""
    for name, read, meaning in (
        ("test images per class", _test_split, "the scores are not of the same test split"),
        ("the images of the attention statistics", _reader("attention_images"), "zeros and entropy may differ by it"),
        ("the scored checkpoint", _reader("checkpoint"), "the scores are of different moments of the training"),
        ("data.root", lambda run: _inside(run.config, "data", "root"), "are these the same images?"),
        *((name, _reader("environment", name), "scores and speed may differ by it") for name in _PACKAGES),
        *((" of ".join(reversed(path)), _reader(*path), "speed and memory are not comparable") for path in _MACHINE),
    ):
        text = _by_run(groups, read)
        if text:
            yield f"{name} differ{'' if name.startswith(('test', 'the images')) else 's'}: {text}: {meaning}"


_PACKAGES = ("torch", "torchvision", "timm", "lightning", "vit_attn")
_MACHINE = (
    *(("speed", "device"), ("speed", "batch_size"), ("environment", "cpu_count")),
    *(("environment", "threads"), ("environment", "gpus")),
)


def _reader(*path: str) -> Callable[[Run], Any]:
    return lambda run: _inside(run.results, *path)


def _inside(node: Any, *path: str) -> Any:
    for key in path:
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _test_split(run: Run) -> str | None:
    confusion = _reader("test", "confusion")(run)
    try:
        return show([sum(row) for row in confusion]) if confusion else None
    except TypeError:
        return None


def _tests_missing(groups: Sequence[Group]) -> Iterator[str]:
    missing = [_name(group, run) for group in groups for run in group.runs if _reader("test", "acc")(run) is None]
    if len(missing) == sum(len(group.runs) for group in groups):
        yield "test was not scored in any run (test=false): only validation is left, and it chose the checkpoints"
    elif missing:
        yield f"test was not scored in {_listed(missing)} (test=false): left out of the test columns"


def _not_finite(groups: Sequence[Group]) -> Iterator[str]:
    for group in groups:
        for run in group.runs:
            keys = sorted(_bad_numbers(run.results or {}))
            if keys:
                yield f"{_name(group, run)}: {_listed(keys)} is not a finite number, and left out of the means"


def _bad_numbers(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _bad_numbers(value, f"{prefix}{key}.")
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{prefix}{key}"


def _seeds(groups: Sequence[Group]) -> Iterator[str]:
    if len(groups) == 1:
        yield f"one mechanism only ({groups[0].label}): there is nothing to compare it with"
    single = [group.label for group in groups if len(group.runs) == 1]
    if single:
        where = "" if len(single) == len(groups) else f" in {_listed(single)}"
        yield f"one seed{where}: no spread, nothing can be tested"
    if len({group.seeds for group in groups}) > 1:
        values = [(list(group.seeds), group.label) for group in groups]
        yield f"seeds differ: {_by_value(values)}: tests use only the seeds that a group shares with the baseline"


def _name(group: Group, run: Run) -> str:
    return f"{group.label} seed {run.seed}"


def _by_run(groups: Sequence[Group], read: Callable[[Run], Any]) -> str:
    """Say which groups, or which runs where a group is not of one mind, have which value; empty where all agree."""
    values: list[tuple[Any, str]] = []
    for group in groups:
        found = [(read(run), run) for run in group.runs]
        known = [(value, run) for value, run in found if value is not None]
        same = len({frozen(value) for value, _ in known}) == 1
        values += [(value, group.label if same else _name(group, run)) for value, run in known]
    return _by_value(values) if len({frozen(value) for value, _ in values}) > 1 else ""


def _by_value(values: Sequence[tuple[Any, str]]) -> str:
    """Write "0.001 in softmax, fixed; 0.002 in strided"."""
    names: dict[Any, list[str]] = {}
    shown: dict[Any, str] = {}
    for value, name in values:
        shown.setdefault(frozen(value), show(value))
        names.setdefault(frozen(value), []).append(name)
    return "; ".join(f"{shown[key]} in {_listed(where)}" for key, where in names.items())


def _listed(names: Sequence[str]) -> str:
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return ", ".join(names[:_NAMES]) + more
