"""Groups that differ in nothing but the seed, their baseline, and what a reader is warned of."""

import json

import pytest

from vit_attn.errors import UserError
from vit_attn.report.compare import compare


def labels(comparison):
    return [group.label for group in comparison.groups]


def warned(comparison, *words):
    """The one warning that holds all of the words."""
    (found,) = [line for line in comparison.warnings if all(word in line for word in words)]
    assert "\n" not in found
    return found


def both(attention, **options):
    """Two seeds of one mechanism."""
    return [{"attention": attention, "seed": seed, **options} for seed in (1, 2)]


def test_seeds_are_one_group_and_attentions_are_several(comparison_of):
    comparison = comparison_of(*both("strided"), *both("fixed"), *both("softmax"))
    assert labels(comparison) == ["softmax", "fixed", "strided"]  # the baseline first
    assert [group.seeds for group in comparison.groups] == [(1, 2)] * 3
    assert all({run.config["model"]["attention"] for run in group.runs} == {group.label} for group in comparison.groups)
    assert (comparison.name, comparison.baseline, comparison.seeds) == ("experiment", "softmax", (1, 2))
    assert comparison.varied == ["model.attention"]
    assert comparison.warnings == comparison.left_out == ()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lr=0.01", "optimizer.lr=0.01"),
        ("data.batch_size=16", "data.batch_size=16"),
        ("model.depth=2", "model.depth=2"),
        ("callbacks.ema.enabled=true", "callbacks.ema.enabled=true"),
        ("loss=sparsemax", "loss=SparsemaxLoss"),
        ("lr_schedule.warmup=0.2", "lr_schedule.warmup=0.2"),
    ],
)
def test_any_other_setting_splits_a_group_warns_and_is_in_the_label(comparison_of, override, words):
    comparison = comparison_of(*both("softmax"), *both("strided"), *both("strided", overrides=(override,)))
    assert labels(comparison) == ["softmax", "strided", f"strided · {words}"]
    assert [len(group.runs) for group in comparison.groups] == [2, 2, 2]
    key = words.partition("=")[0]
    assert {name.removesuffix("._target_") for name in comparison.groups[2].differences} == {key}
    assert comparison.groups[1].differences == {}
    assert "not a comparison of attention alone" in warned(comparison, f"{key}", "differs: ")
    assert comparison.varied[0] == "model.attention"
    assert comparison.varied[1].startswith(key)
    assert not any(name.startswith(key) for name in comparison.held_fixed)


def test_epochs_of_the_configuration_split_too(comparison_of):
    comparison = comparison_of(*both("softmax"), *both("softmax", epochs=7), *both("strided"))
    assert labels(comparison) == ["softmax", "softmax · trainer.max_epochs=7", "strided"]


@pytest.mark.parametrize(
    "override", ["test=false", "data.num_workers=1", "explain_images=0", "trainer.log_every_n_steps=7", "data.root=x"]
)
def test_where_and_how_a_run_was_computed_does_not_split(comparison_of, override):
    comparison = comparison_of(*both("softmax"), {"attention": "softmax", "seed": 3, "overrides": (override,)})
    assert [group.seeds for group in comparison.groups] == [(1, 2, 3)]


@pytest.mark.parametrize(
    ("attention", "options", "label"),
    [
        ("full", {}, "softmax"),
        ("softmax+full", {}, "softmax"),
        ("softmax+strided", {}, "strided"),
        ("strided+softmax", {}, "strided+softmax"),  # not a spec: as it is written
        ("softmax", {"alpha": 1.3, "window": 4}, "softmax"),  # it reads neither
        ("entmax", {"alpha": 1.5}, "entmax"),
        ("entmax", {"learnable_alpha": False, "implementation": "auto"}, "entmax"),
        ("entmax", {"alpha": 1.3}, "entmax α=1.3"),
        ("entmax", {"learnable_alpha": True}, "entmax α learned"),
        ("entmax", {"learnable_alpha": True, "alpha": 1.2}, "entmax α learned from 1.2"),
        ("entmax", {"anneal_alpha_from": 1.01}, "entmax α 1.01→1.5"),
        ("entmax", {"anneal_alpha_from": 1.01, "alpha": 2.0}, "entmax α 1.01→2"),
        ("entmax+strided", {"alpha": 1.3, "window": 4}, "entmax+strided α=1.3 window=4"),
        ("strided", {"causal": True}, "strided"),
        ("strided", {"window": 4, "stride": 8}, "strided window=4 stride=8"),
        ("dilated_sliding_window", {"dilation": 2}, "dilated_sliding_window"),
        ("dilated_sliding_window", {"dilation": 3}, "dilated_sliding_window dilation=3"),
        (["strided", "full"], {}, "[strided, softmax]"),
        (["strided", "full", "strided", "full"], {}, "[strided, softmax]"),
        (["softmax"], {}, "softmax"),
    ],
)
def test_labels_see_through_the_spelling(comparison_of, attention, options, label):
    assert labels(comparison_of({"attention": attention, "options": options})) == [label]


def test_spellings_of_one_mechanism_are_one_group(comparison_of):
    comparison = comparison_of(
        {"attention": "entmax", "seed": 1},
        {"attention": "entmax+full", "seed": 2, "options": {"alpha": 1.5}},
        {"attention": ["entmax"], "seed": 3, "options": {"learnable_alpha": False, "window": 4}},
    )
    assert [group.seeds for group in comparison.groups] == [(1, 2, 3)]
    assert comparison.groups[0].options == {}


def test_options_tell_groups_apart(comparison_of):
    alphas = ({"alpha": 1.3}, {"alpha": 1.7}, {"learnable_alpha": True})
    comparison = comparison_of(*(run for options in alphas for run in both("entmax", options=options)))
    assert set(labels(comparison)) == {"entmax α=1.3", "entmax α=1.7", "entmax α learned"}
    assert comparison.varied == ["model.attention_options.alpha", "model.attention_options.learnable_alpha"]
    assert comparison.held_fixed["model.attention"] == "entmax"


def test_held_fixed_is_what_all_share(comparison_of):
    windows = [*both("strided", options={"window": 4}), *both("fixed", options={"window": 4, "stride": 8})]
    fixed = comparison_of(*windows).held_fixed
    expected = {"optimizer.lr": 0.002, "data.batch_size": 32, "model.depth": 4, "model.attention_options.window": 4}
    assert {key: fixed[key] for key in expected} == expected
    assert not fixed.keys() & {"seed", "model.attention", "model.attention_options.stride", "data.root", "run_name"}
    assert None not in fixed.values()


def test_how_alpha_is_annealed_matters_only_where_it_is(comparison_of):
    comparison = comparison_of(*both("softmax"), *both("entmax"), *both("entmax", options={"anneal_alpha_from": 1.1}))
    assert labels(comparison) == ["softmax", "entmax", "entmax α 1.1→1.5"]
    assert comparison.warnings == ()
    assert all(group.differences == {} for group in comparison.groups)
    assert comparison.varied == ["model.attention", "model.attention_options.anneal_alpha_from"]


def test_annealed_groups_may_differ_in_how(comparison_of):
    options = {"anneal_alpha_from": 1.1}
    share = ("callbacks.alpha_annealing.share=0.25",)
    comparison = comparison_of(
        *both("softmax", overrides=share),  # which softmax does not read
        *both("entmax", options=options),
        *both("entmax", options=options, overrides=share),
    )
    key = "callbacks.alpha_annealing.share"
    assert labels(comparison)[0] == "softmax"
    assert set(labels(comparison)[1:]) == {f"entmax α 1.1→1.5 · {key}={value}" for value in ("0.5", "0.25")}
    found = warned(comparison, key)
    assert "softmax" not in found
    assert len(comparison.warnings) == 1
    against = compare(
        [run for group in comparison.groups for run in group.runs], baseline=f"entmax α 1.1→1.5 · {key}=0.5"
    )
    assert labels(against) == ["entmax α 1.1→1.5", f"entmax α 1.1→1.5 · {key}=0.25", "softmax"]


@pytest.mark.parametrize(("updated", "winner"), [("2025-12-31", "first"), ("2026-01-02", "again")])
def test_of_a_repeated_seed_the_later_run_counts(comparison_of, make_run, tmp_path, updated, winner):
    make_run(attention="softmax", seed=1, run_name="first")
    again = make_run(attention="full", seed=1, run_name="again") / "results/status.json"
    again.write_text(json.dumps({"state": "finished", "error": None, "updated": f"{updated}T10:00:00+00:00"}))
    comparison = comparison_of({"attention": "softmax", "seed": 2})
    (group,) = comparison.groups
    (repeat,) = comparison.left_out
    assert {run.path.name for run in group.runs} >= {winner}
    assert group.seeds == (1, 2)
    assert {repeat.path.name, winner} == {"first", "again"}
    assert f"repeated later by {tmp_path / 'experiment' / winner}" in warned(comparison, repeat.path.name)


@pytest.mark.parametrize(
    ("wanted", "label"),
    [
        (None, "softmax"),
        ("full", "softmax"),
        ("strided", "strided"),
        ("softmax+strided", "strided"),
        ("entmax α=1.3", "entmax α=1.3"),
        ("entmax", "entmax α=1.3"),
    ],
)
def test_baseline_by_any_of_its_names(comparison_of, wanted, label):
    comparison = comparison_of(
        *both("strided"), *both("softmax+full"), *both("entmax", options={"alpha": 1.3}), baseline=wanted
    )
    assert (comparison.baseline, comparison.groups[0].label) == (label, label)
    assert labels(comparison)[1:] == sorted(labels(comparison)[1:])


def test_differences_are_from_the_baseline(comparison_of):
    runs = [*both("softmax"), *both("strided", overrides=("optimizer.lr=0.01",)), *both("strided")]
    comparison = comparison_of(*runs, baseline="strided · optimizer.lr=0.01")
    # named as it was without a baseline; beside this one, the others are those that differ
    assert comparison.baseline == "strided"
    assert labels(comparison)[1:] == ["softmax · optimizer.lr=0.002", "strided · optimizer.lr=0.002"]


def test_without_softmax_the_baseline_has_the_fewest_zeros(comparison_of):
    runs = []
    for attention, zeros in (("fixed", 0.8), ("strided", 0.3), ("causal", 0.5), ("entmax", float("nan"))):
        statistics = {str(layer): {"zeros": zeros} for layer in range(4)}
        runs += both(attention, results={"attention_statistics": statistics})
    assert comparison_of(*runs).baseline == "strided"


def test_a_misspelt_baseline_is_told_the_nearest(comparison_of):
    with pytest.raises(UserError, match=r"'stridet'.*strided") as caught:
        comparison_of(*both("softmax"), *both("strided"), baseline="stridet")
    assert "\n" not in str(caught.value)


def test_an_ambiguous_baseline_lists_what_it_fits(comparison_of):
    alphas = [run for alpha in (1.3, 1.7) for run in both("entmax", options={"alpha": alpha})]
    with pytest.raises(UserError, match=r"fits 2 groups: choose one of 'entmax α=1.3', 'entmax α=1.7'"):
        comparison_of(*both("softmax"), *alphas, baseline="entmax")


def test_what_did_not_finish_is_left_out(comparison_of, make_run):
    scored = make_run(attention="strided", seed=3) / "results/status.json"  # it goes on, and has older scores
    scored.write_text(scored.read_text().replace("finished", "running"))
    comparison = comparison_of(
        *both("softmax"),
        *both("strided"),
        {"attention": "strided", "seed": 4, "state": "running", "stopped_after": 10},
        {"attention": "fixed", "seed": 1, "state": "failed", "error": "loss is NaN", "stopped_after": 5},
    )
    assert labels(comparison) == ["softmax", "strided"]
    assert [group.seeds for group in comparison.groups] == [(1, 2), (1, 2)]
    states = {(run.seed, run.state) for run in comparison.left_out}
    assert states == {(3, "unfinished"), (4, "unfinished"), (1, "failed")}
    assert all(run.reason for run in comparison.left_out)
    assert comparison.warnings == ()


def test_no_finished_run_is_refused_with_a_reason(comparison_of):
    with pytest.raises(UserError, match=r"no finished run.*is failed \(loss is NaN\)"):
        comparison_of({"state": "failed", "error": "loss is NaN"})
    with pytest.raises(UserError, match="no run to compare"):
        compare([])
