"""Runs put into groups that differ in nothing but the seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vit_attn.config import identity
from vit_attn.report.mechanisms import mechanism_label, read_mechanism, show
from vit_attn.report.runs import Run

_ATTENTION = ("model.attention", "model.attention_options")
_ANNEALING = "callbacks.alpha_annealing"  # read only where an option asks for it
_DIFFERENCES_IN_LABEL = 3


@dataclass(frozen=True)
class Group:
    """Runs of one mechanism that differ in nothing but the seed.

    Args:
        label: for people, unique in a comparison: "entmax α=1.3", "strided · optimizer.lr=0.002".
        attention: the spec, "[strided, softmax]" where it is a list.
        runs: finished ones, one per seed, in the order of their seeds.
        options: the attention options that are set, away from their defaults, and that the mechanism reads.
        differences: flat key → value, where it is not the baseline's; the attention and its options left out.
        settings: flat key → value, all that decides what is computed beside the attention and the seed; null values
            left out.
    """

    label: str
    attention: str
    runs: tuple[Run, ...]
    options: dict[str, Any]
    differences: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def mechanism(self) -> str:
        """The label without the differences: "entmax α=1.3"."""
        return mechanism_label(self.attention, self.options)

    @property
    def regime(self) -> Any:
        """All of ``settings`` that every mechanism reads, hashable: groups that were trained alike have the same."""
        return frozen({key: value for key, value in self.settings.items() if not _within(key, _ANNEALING)})

    def reads(self, key: str) -> bool:
        """Whether anything reads this key of the configuration: how α is annealed matters where it is annealed."""
        return not _within(key, _ANNEALING) or self.options.get("anneal_alpha_from") is not None

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the runs."""
        return tuple(run.seed for run in self.runs if run.seed is not None)


def _within(key: str, part: str) -> bool:
    return key == part or key.startswith(part + ".")


def gather(runs: Sequence[Run]) -> tuple[list[Group], list[Run]]:
    """Group finished runs; labels are those of the mechanisms until :func:`labelled`.

    Returns:
        The groups, by label; and the runs that a later one of the same group and seed repeats, their ``reason`` set.
    """
    members: dict[Any, list[Run]] = {}
    named: dict[Any, tuple[str, dict[str, Any], dict[str, Any]]] = {}
    for run in runs:
        spec, options = read_mechanism(run.config["model"])
        settings = _settings(run.config, options)
        key = (spec, frozen(options), frozen(settings))
        named.setdefault(key, (spec, options, settings))
        members.setdefault(key, []).append(run)
    groups, repeats = [], []
    for key, (spec, options, settings) in named.items():
        kept, repeated = _one_per_seed(members[key])
        groups.append(Group(mechanism_label(spec, options), spec, tuple(kept), options, {}, settings))
        repeats += repeated
    return sorted(groups, key=lambda group: (group.label, group.runs[0].path)), repeats


def _one_per_seed(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    latest: dict[int | None, Run] = {}
    repeats: list[Run] = []
    for run in sorted(runs, key=lambda run: (run.updated, run.path)):
        if run.seed in latest:
            repeats.append(replace(latest[run.seed], reason=f"repeated later by {run.path}"))
        latest[run.seed] = run
    return sorted(latest.values(), key=lambda run: run.seed or 0), repeats


def _settings(config: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides what is computed beside the attention and the seed, as far as it is read."""
    callbacks = config.get("callbacks")
    entries = callbacks.items() if isinstance(callbacks, dict) else ()
    unread = [
        f"callbacks.{name}" for name, entry in entries if isinstance(entry, dict) and entry.get("enabled") is False
    ]
    if options.get("anneal_alpha_from") is None:
        unread.append(_ANNEALING)
    left_out = (*_ATTENTION, *unread)
    return {
        key: value
        for key, value in identity(config).items()
        if value is not None and key != "seed" and not any(_within(key, part) for part in left_out)
    }


def frozen(value: Any) -> Any:
    """Make a value of the configuration hashable, 1 and 1.0 the same and true another."""
    if isinstance(value, Mapping):
        return frozenset((str(key), frozen(each)) for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(frozen(each) for each in value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return float(value)


def differing_keys(groups: Sequence[Group]) -> list[str]:
    """List the keys of ``settings`` in which groups differ.

    What comes and goes with another ``_target_`` or ``enabled``, as a loss brings its own options, is not listed;
    nor is what only some groups read, unless those differ in it.
    """
    keys = sorted({key for group in groups for key in group.settings})
    different = [
        key for key in keys if len({frozen(group.settings.get(key)) for group in groups if group.reads(key)}) > 1
    ]

    def goes_along(key: str) -> bool:
        parent, _, name = key.rpartition(".")
        present = [group.settings[key] for group in groups if key in group.settings]
        leads = [f"{parent}.{lead}" for lead in ("_target_", "enabled") if lead != name]
        leads = [lead for lead in leads if lead in different and (name != "enabled")]
        return len(present) < len(groups) and len({frozen(value) for value in present}) == 1 and bool(leads)

    return [key for key in different if not goes_along(key)]


def labelled(groups: Sequence[Group], base: Group, keys: Sequence[str]) -> tuple[Group, ...]:
    """Put the baseline first, and into each label what its settings have other than the baseline's."""
    full: dict[int, Group] = {}
    short: dict[int, str] = {}
    for index, group in enumerate(groups):
        differences = {
            key: group.settings.get(key)
            for key in keys
            if group.reads(key) and frozen(group.settings.get(key)) != frozen(base.settings.get(key))
        }
        words = [f"{key.removesuffix('._target_')}={_value(key, value)}" for key, value in differences.items()]
        full[index] = replace(group, label=" · ".join([group.mechanism, *words]), differences=differences)
        more = len(words) - _DIFFERENCES_IN_LABEL
        if more > 0:
            words = [*words[:_DIFFERENCES_IN_LABEL], f"{more} more"]
        short[index] = " · ".join([group.mechanism, *words])
    labels = list(short.values())
    unique = {index: replace(full[index], label=label) for index, label in short.items() if labels.count(label) == 1}
    complete = [unique.get(index, full[index]) for index in full]
    return tuple(sorted(complete, key=lambda group: (group.runs != base.runs, group.label)))


def _value(key: str, value: Any) -> str:
    return show(value).rpartition(".")[2] if key.endswith("._target_") else show(value)
