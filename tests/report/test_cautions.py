"""What a reader of a comparison is warned of."""

import pytest


def warned(comparison, *words):
    """The one warning that holds all of the words."""
    (found,) = [line for line in comparison.warnings if all(word in line for word in words)]
    assert "\n" not in found
    return found


def both(attention, **options):
    """Two seeds of one mechanism."""
    return [{"attention": attention, "seed": seed, **options} for seed in (1, 2)]


def test_a_warning_says_who_has_which_value(comparison_of):
    comparison = comparison_of(*both("softmax"), *both("strided", overrides=("optimizer.lr=0.01",)))
    found = warned(comparison, "optimizer.lr")
    assert found.startswith("optimizer.lr differs: 0.002 in softmax; 0.01 in strided: ")


def test_seeds_that_differ_are_warned_of(comparison_of):
    strided = [{"attention": "strided", "seed": seed} for seed in (2, 3)]
    comparison = comparison_of(*both("softmax"), *strided)
    assert comparison.seeds == (1, 2, 3)
    assert "[1, 2] in softmax; [2, 3] in strided" in warned(comparison, "seeds differ")


def test_one_seed_is_warned_of(comparison_of):
    comparison = comparison_of(*both("softmax"), {"attention": "strided", "seed": 1})
    assert "in strided:" in warned(comparison, "one seed", "nothing can be tested")


def test_one_mechanism_is_warned_of(comparison_of):
    assert "(softmax)" in warned(comparison_of(*both("softmax")), "one mechanism only")


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ({"speed": {"device": "NVIDIA H200"}}, ("device of speed differs: cpu in softmax; NVIDIA H200 in strided",)),
        ({"environment": {"cpu_count": 64}}, ("cpu_count", "2 in softmax; 64 in strided")),
        ({"environment": {"torch": "2.11.0"}}, ("torch differs", "2.11.0 in strided")),
        ({"test": {"confusion": [[5, 0], [1, 4]]}}, ("not of the same test split", "[5, 5] in strided")),
        ({"epochs": 4}, ("epochs differ", "4 in strided", "changed in the middle")),
    ],
)
def test_facts_that_differ_are_warned_of(comparison_of, results, words):
    comparison = comparison_of(*both("softmax"), *both("strided", results=results))
    warned(comparison, *words)
    assert len(comparison.warnings) == 1


def test_a_score_that_is_not_a_number_is_warned_of(comparison_of):
    comparison = comparison_of(*both("softmax"), *both("strided", results={"val": {"loss": float("nan")}}))
    assert "val.loss is not a finite number" in warned(comparison, "strided seed 2")


def test_one_run_that_differs_is_named(comparison_of):
    odd = {"attention": "softmax", "seed": 3, "results": {"steps": 49}}
    assert "49 in softmax seed 3" in warned(comparison_of(*both("softmax"), odd, *both("strided")), "steps differ")


def test_runs_that_stop_early_may_differ_in_length(comparison_of):
    stops = ("callbacks.early_stopping.enabled=true",)
    comparison = comparison_of(
        *both("softmax", overrides=stops), *both("strided", overrides=stops, results={"epochs": 4, "steps": 40})
    )
    assert comparison.warnings == ()


def test_length_is_compared_with_annealed_runs_too(comparison_of):
    annealed = both("entmax", options={"anneal_alpha_from": 1.1}, results={"epochs": 4})
    assert "4 in entmax α 1.1→1.5" in warned(comparison_of(*both("softmax"), *annealed), "epochs differ")


def test_runs_without_a_test_are_warned_of(comparison_of):
    runs = [*both("softmax"), {"attention": "strided", "seed": 1}, {"attention": "strided", "seed": 2, "test": False}]
    assert "strided seed 2" in warned(comparison_of(*runs), "test was not scored")


def test_no_test_at_all_is_one_warning(comparison_of):
    comparison = comparison_of(*both("softmax", test=False), *both("strided", test=False))
    assert "in any run" in warned(comparison, "test was not scored")
