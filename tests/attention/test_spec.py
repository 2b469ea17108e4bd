"""Specs: what each means, and that a wrong one is refused in one line with the nearest right spelling."""

import re

import pytest

from vit_attn.attention import NORMALIZERS, PATTERNS, AttentionOptions, Mechanism, parse_attention, parse_spec

BOTH = [(f"{normalizer}+{pattern}", normalizer, pattern) for normalizer in NORMALIZERS for pattern in PATTERNS]


@pytest.mark.parametrize(
    ("spec", "normalizer", "pattern"),
    [
        *((name, name, "full") for name in ("softmax", "sparsemax", "entmax15", "entmax")),
        *(
            (name, "softmax", name)
            for name in ("full", "causal", "strided", "fixed", "sliding_window", "dilated_sliding_window")
        ),
        *BOTH,
        (" entmax + strided ", "entmax", "strided"),
    ],
)
def test_a_spec_names_a_normalizer_a_pattern_or_both(spec, normalizer, pattern):
    mechanism = parse_spec(spec)
    assert (mechanism.normalizer, mechanism.pattern) == (normalizer, pattern)
    assert str(mechanism) == f"{normalizer}+{pattern}"
    assert parse_spec(str(mechanism)) == mechanism


def test_a_list_is_one_mechanism_per_spec_under_the_same_options():
    mechanisms = parse_attention(["strided", "entmax+full"], {"alpha": 1.25, "window": 3})
    options = AttentionOptions(alpha=1.25, window=3)
    assert mechanisms == [Mechanism("softmax", "strided", options), Mechanism("entmax", "full", options)]
    assert parse_attention("strided") == parse_attention(["strided"]) == [Mechanism("softmax", "strided")]
    assert parse_attention("strided", options) == parse_attention("strided", {"alpha": 1.25, "window": 3})


@pytest.mark.parametrize("options", [None, {}, dict.fromkeys(AttentionOptions.__dataclass_fields__)])
def test_no_option_or_none_means_the_default_of_the_mechanism(options):
    (mechanism,) = parse_attention("entmax+dilated_sliding_window", options)
    assert mechanism.alpha == 1.5
    assert mechanism.learnable_alpha is False
    assert mechanism.implementation == "auto"
    pattern = mechanism.make_pattern(12, 2, (3, 4))
    assert (pattern.window, pattern.dilation, pattern.causal, pattern.size) == (4, 2, False, 14)


def test_options_reach_the_pattern():
    options = {"window": 5, "stride": 7, "dilation": 3, "causal": False}
    strided, dilated = (
        mechanism.make_pattern(16, 1, (4, 4))
        for mechanism in parse_attention(["strided", "dilated_sliding_window"], options)
    )
    assert (strided.window, strided.stride, strided.causal) == (5, 7, False)
    assert (dilated.window, dilated.dilation, dilated.causal) == (5, 3, False)


def test_alpha_is_learned_by_entmax_alone():
    mechanisms = parse_attention(["entmax", "entmax15", "softmax"], {"learnable_alpha": True, "alpha": 1.2})
    assert [mechanism.learnable_alpha for mechanism in mechanisms] == [True, False, False]


def test_alpha_is_annealed_by_entmax_alone():
    mechanisms = parse_attention(["entmax+strided", "entmax15", "sparsemax", "strided"], {"anneal_alpha_from": 2})
    assert [mechanism.anneal_alpha_from for mechanism in mechanisms] == [2.0, None, None, None]
    assert mechanisms[0].alpha == 1.5
    assert parse_spec("entmax").anneal_alpha_from is None


def test_an_annealed_alpha_may_be_said_not_to_be_learned():
    (mechanism,) = parse_attention("entmax", {"anneal_alpha_from": 1.01, "learnable_alpha": False})
    assert (mechanism.anneal_alpha_from, mechanism.learnable_alpha) == (1.01, False)


@pytest.mark.parametrize(
    ("spec", "unused"),
    [("entmax+fixed", set()), ("softmax", {"anneal_alpha_from"}), ("entmax15", {"anneal_alpha_from"})],
)
def test_annealing_is_of_no_use_but_to_entmax(spec, unused):
    assert parse_spec(spec, AttentionOptions(anneal_alpha_from=1.01)).unused_options() == unused


@pytest.mark.parametrize(
    ("spec", "used"),
    [
        ("softmax", {"causal"}),
        ("entmax", {"alpha", "learnable_alpha", "causal"}),
        ("entmax15+causal", {"causal"}),
        ("strided", {"window", "stride", "causal"}),
        ("entmax+fixed", {"alpha", "learnable_alpha", "window", "causal"}),
        ("sparsemax+sliding_window", {"window", "causal"}),
        ("dilated_sliding_window", {"window", "dilation", "causal"}),
    ],
)
def test_the_options_that_a_mechanism_has_no_use_for_are_listed(spec, used):
    options = {"alpha": 1.2, "learnable_alpha": False, "window": 2, "stride": 2, "dilation": 2, "causal": False}
    unused = options.keys() - used
    assert parse_spec(spec, AttentionOptions(**options, implementation="dense")).unused_options() == unused
    assert parse_spec(spec).unused_options() == set()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("strdied", "unknown attention 'strdied'. Did you mean 'strided'?"),
        ("Softmax", "Did you mean 'softmax'?"),
        ("entmax1.5", "Did you mean 'entmax15'?"),
        ("window", "Did you mean 'sliding_window'?"),
        ("qqq", "softmax, sparsemax, entmax15, entmax, full, causal, strided"),
        ("", "unknown attention ''"),
        ("entmx+strided", "attention 'entmx+strided': unknown normalizer 'entmx'. Did you mean 'entmax'?"),
        ("entmax+stride", "attention 'entmax+stride': unknown pattern 'stride'. Did you mean 'strided'?"),
        ("strided+entmax", "the normalizer comes first: entmax+strided"),
        ("entmax+softmax", "unknown pattern 'softmax'"),
        ("full+strided", "unknown normalizer 'full'"),
        ("entmax+", "unknown pattern ''"),
        ("entmax+strided+fixed", "is not normalizer+pattern, such as entmax+strided"),
        ([], "a spec or a list of specs, such as [strided, full], not []"),
        (["strided", "ful"], "Did you mean 'full'?"),
        (["strided", None], "not ['strided', None]"),
        (None, "not None"),
        (3, "not 3"),
        ({"strided": 1}, "not {'strided': 1}"),
    ],
)
def test_a_wrong_spec_is_refused_in_one_line(spec, said):
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        parse_attention(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"windw": 3}, "unknown attention option 'windw'. Did you mean 'window'?"),
        (
            {"heads": 3},
            "Allowed: alpha, learnable_alpha, anneal_alpha_from, window, stride, dilation, causal, implementation.",
        ),
        ({"alpha": 1}, "alpha must lie in (1, 2], not 1;"),
        ({"alpha": 2.5}, "alpha must lie in (1, 2], not 2.5"),
        ({"alpha": "1.5"}, "alpha must lie in (1, 2], not '1.5'"),
        ({"alpha": True}, "alpha must lie in (1, 2], not True"),
        ({"anneal_alpha_from": 1}, "anneal_alpha_from: alpha must lie in (1, 2], not 1;"),
        ({"anneal_alpha_from": 2.01}, "anneal_alpha_from: alpha must lie in (1, 2], not 2.01"),
        ({"anneal_alpha_from": True}, "anneal_alpha_from: alpha must lie in (1, 2], not True"),
        ({"anneal_alpha_from": "softmax"}, "anneal_alpha_from: alpha must lie in (1, 2], not 'softmax'"),
        ({"anneal_alpha_from": 1.1, "learnable_alpha": True}, "anneal_alpha_from=1.1 and learnable_alpha=true exclude"),
        ({"learnable_alpha": 1}, "learnable_alpha must be true or false, not 1"),
        ({"learnable_alpha": "yes"}, "learnable_alpha must be true or false, not 'yes'"),
        ({"causal": 0}, "causal must be true or false, not 0"),
        ({"window": 0}, "window must be a whole number of at least 1, not 0"),
        ({"window": True}, "window must be a whole number of at least 1, not True"),
        ({"stride": 2.0}, "stride must be a whole number of at least 1, not 2.0"),
        ({"dilation": -1}, "dilation must be a whole number of at least 1, not -1"),
        ({"window": "4"}, "window must be a whole number of at least 1, not '4'"),
        ({"implementation": "dens"}, "unknown implementation 'dens'. Did you mean 'dense'?"),
        ({"implementation": "fused"}, "implementation 'fused' computes softmax only, not 'entmax'"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(options, said):
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        parse_attention("entmax+strided", options)
    assert "\n" not in str(error.value)


def test_fused_is_accepted_for_softmax():
    (mechanism,) = parse_attention("strided", {"implementation": "fused"})
    assert mechanism.implementation == "fused"


def test_options_that_fit_no_layer_are_refused_where_the_pattern_is_laid():
    (mechanism,) = parse_attention("strided")
    with pytest.raises(ValueError, match="15 tokens are no square grid"):
        mechanism.make_pattern(15, 0, None)
