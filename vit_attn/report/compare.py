"""A comparison: groups of finished runs, their baseline, and what to know before reading it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from vit_attn.errors import UserError, unknown_name
from vit_attn.report.cautions import cautions
from vit_attn.report.groups import Group, differing_keys, frozen, gather, labelled
from vit_attn.report.mechanisms import read_mechanism
from vit_attn.report.runs import Run

__all__ = ["Comparison", "Group", "compare"]

_DEFAULT_BASELINE = "softmax"  # over all keys, whether it was spelled softmax or full


@dataclass(frozen=True)
class Comparison:
    """Groups of finished runs, ready to be compared.

    Args:
        name: of the comparison.
        groups: the baseline first, the others by label.
        baseline: its label.
        held_fixed: flat key → value, what all runs share; null values left out.
        varied: the flat keys that tell the groups apart.
        seeds: all of them, sorted.
        warnings: one line each.
        left_out: runs that did not finish, and finished ones that a later run of the same seed repeats.
    """

    name: str
    groups: tuple[Group, ...]
    baseline: str
    held_fixed: dict[str, Any]
    varied: list[str]
    seeds: tuple[int, ...]
    warnings: tuple[str, ...]
    left_out: tuple[Run, ...]


def compare(runs: Sequence[Run], *, baseline: str | None = None, name: str = "") -> Comparison:
    """Put runs into groups that differ in nothing but the seed, so that no mean mixes anything else.

    Args:
        runs: from :func:`vit_attn.report.runs.read_runs`.
        baseline: the label or the attention of the group that the others are tested against; default: softmax over
            all keys, else the group with the fewest zeros.
        name: of the comparison; default: the names of the experiments' folders.

    Raises:
        UserError: no run has finished, or ``baseline`` is no group, or more than one.
    """
    finished = [run for run in runs if run.state == "finished"]
    if not finished:
        raise UserError(_nothing_finished(runs))
    drafts, repeats = gather(finished)
    keys = differing_keys(drafts)
    base = _default_baseline(drafts)
    if baseline is not None:
        base = _named_baseline(baseline, labelled(drafts, base, keys))
    groups = labelled(drafts, base, keys)
    unfinished = [run for run in runs if run.state != "finished"]
    return Comparison(
        name=name or ", ".join(sorted({run.path.absolute().parent.name for run in finished})),
        groups=groups,
        baseline=groups[0].label,
        held_fixed=_held_fixed(groups),
        varied=[*_varied_attention(groups), *keys],
        seeds=tuple(sorted({seed for group in groups for seed in group.seeds})),
        warnings=tuple(cautions(groups, keys, repeats)),
        left_out=tuple(sorted([*unfinished, *repeats], key=lambda run: run.path)),
    )


def _nothing_finished(runs: Sequence[Run]) -> str:
    if not runs:
        return "there is no run to compare"
    more = f", and {len(runs) - 1} more" if len(runs) > 1 else ""
    return f"no finished run to compare: {runs[0].path} is {runs[0].state} ({runs[0].reason}){more}"


def _default_baseline(groups: Sequence[Group]) -> Group:
    """Choose softmax over all keys, with the settings that most runs have; without it, the fewest zeros."""
    plain = [group for group in groups if group.mechanism == _DEFAULT_BASELINE]

    def runs_alike(group: Group) -> int:
        return sum(len(other.runs) for other in groups if other.regime == group.regime)

    if plain:
        return max(plain, key=runs_alike)
    return min(groups, key=lambda group: (_zeros(group), -runs_alike(group), group.mechanism))


def _zeros(group: Group) -> float:
    """Share of forbidden and of exactly zero weights, over layers and runs; 1 where nothing tells it."""
    shares = []
    for run in group.runs:
        layers = (run.results or {}).get("attention_statistics")
        layers = layers.values() if isinstance(layers, dict) else ()
        shares += [layer.get("zeros") for layer in layers if isinstance(layer, dict)]
    known = [share for share in shares if isinstance(share, (int, float)) and math.isfinite(share)]
    return fmean(known) if known else 1.0


def _named_baseline(name: str, groups: Sequence[Group]) -> Group:
    """Find the group that a user means by its label, its mechanism or its attention, in any spelling."""
    spec, _ = read_mechanism({"attention": name})
    for matches in (
        [group for group in groups if group.label == name],
        [group for group in groups if group.mechanism in (name, spec)],
        [group for group in groups if group.attention == spec],
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            labels = ", ".join(repr(group.label) for group in matches)
            raise UserError(f"baseline {name!r} fits {len(matches)} groups: choose one of {labels}")
    raise UserError(unknown_name("baseline", name, [group.label for group in groups]))


def _held_fixed(groups: Sequence[Group]) -> dict[str, Any]:
    first = groups[0]
    shared: dict[str, Any] = {}
    if len({group.attention for group in groups}) == 1:
        shared["model.attention"] = first.attention
    for option, value in first.options.items():
        if all(frozen(group.options.get(option)) == frozen(value) for group in groups):
            shared[f"model.attention_options.{option}"] = value
    for key, value in first.settings.items():
        if all(frozen(group.settings.get(key)) == frozen(value) for group in groups):
            shared[key] = value
    return shared


def _varied_attention(groups: Sequence[Group]) -> list[str]:
    varied = ["model.attention"] if len({group.attention for group in groups}) > 1 else []
    options = sorted({option for group in groups for option in group.options})
    varied += [
        f"model.attention_options.{option}"
        for option in options
        if len({frozen(group.options.get(option)) for group in groups}) > 1
    ]
    return varied
