"""Specs: what each means, and that a wrong one is refused in one line with the nearest right spelling."""

import re
from dataclasses import dataclass

import pytest
from registered import SPECS

from vit_attn.attention import (
    MECHANISMS,
    NORMALIZERS,
    PATTERNS,
    Masked,
    Mechanism,
    Tokens,
    option,
    option_names,
    parse_attention,
    parse_spec,
    register,
    unused_options,
)
from vit_attn.attention.mechanism import Core
from vit_attn.attention.patterns.strided import Strided

BOTH = [(f"{normalizer}+{pattern}", normalizer, pattern) for normalizer in NORMALIZERS for pattern in PATTERNS]


@pytest.mark.parametrize(
    ("spec", "normalizer", "pattern"),
    [
        *((name, name, "full") for name in ("softmax", "sparsemax", "entmax15", "entmax")),
        *((name, "softmax", name) for name in ("full", "causal", "strided", "fixed", "sliding_window")),
        *BOTH,
        (" entmax + strided ", "entmax", "strided"),
    ],
)
def test_a_spec_names_a_normalizer_a_pattern_or_both(spec, normalizer, pattern):
    mechanism = parse_spec(spec)
    assert isinstance(mechanism, Masked)
    assert (mechanism.normalizer.name, mechanism.pattern.name) == (normalizer, pattern)
    assert str(mechanism) == f"{normalizer}+{pattern}"


@pytest.mark.parametrize("spec", SPECS)
def test_a_mechanism_is_what_its_text_says(spec):
    mechanism = parse_spec(spec)
    assert parse_spec(str(mechanism)) == mechanism
    assert hash(parse_spec(spec)) == hash(mechanism)
    if spec in MECHANISMS:
        assert str(mechanism) == spec


@pytest.mark.parametrize(
    ("spec", "options", "text"),
    [
        ("strided:window:4", {}, "softmax+strided:window:4"),
        ("strided:window:4:stride:8", {}, "softmax+strided:window:4:stride:8"),
        ("entmax:alpha:1.3+strided:window:4:causal:false", {}, "entmax:alpha:1.3+strided:window:4:causal:false"),
        ("entmax : alpha : 1.3 + strided", {}, "entmax:alpha:1.3+strided"),
        ("strided:window:4", {"window": 6, "stride": 5}, "softmax+strided:window:4:stride:5"),  # its own come first
        ("strided", {"window": 6}, "softmax+strided:window:6"),
        ("strided:causal:true", {}, "softmax+strided"),  # as it is by default
        ("entmax:learnable_alpha:true", {}, "entmax:learnable_alpha:true+full"),
        ("entmax:alpha:1.50", {}, "entmax+full"),
    ],
)
def test_options_stand_behind_their_name_or_come_from_those_of_all_layers(spec, options, text):
    mechanism = parse_spec(spec, options)
    assert str(mechanism) == text
    assert parse_spec(text) == mechanism


def test_a_list_is_one_mechanism_per_spec_under_the_same_options():
    mechanisms = parse_attention(["strided", "entmax+full", "strided:window:5"], {"alpha": 1.25, "window": 3})
    assert [str(each) for each in mechanisms] == [
        "softmax+strided:window:3",
        "entmax:alpha:1.25+full",
        "softmax+strided:window:5",
    ]
    assert parse_attention("strided") == parse_attention(["strided"]) == [parse_spec("softmax+strided")]


@pytest.mark.parametrize("options", [None, {}, dict.fromkeys(option_names())])
def test_no_option_or_none_means_the_default_of_the_mechanism(options):
    (mechanism,) = parse_attention("entmax+dilated_sliding_window", options)
    assert mechanism.normalizer.alpha == 1.5
    assert mechanism.normalizer.learnable_alpha is False
    assert mechanism.implementation == "auto"
    pattern = mechanism.pattern.on(Tokens((3, 4), 2))
    assert (pattern.window, pattern.dilation, pattern.causal, pattern.size) == (4, 2, False, 14)


def test_options_reach_the_pattern():
    options = {"window": 5, "stride": 7, "dilation": 3, "causal": False}
    strided, dilated = (
        mechanism.pattern.on(Tokens((4, 4), 1))
        for mechanism in parse_attention(["strided", "dilated_sliding_window"], options)
    )
    assert (strided.window, strided.stride, strided.causal) == (5, 7, False)
    assert (dilated.window, dilated.dilation, dilated.causal) == (5, 3, False)


@pytest.mark.parametrize(
    ("attention", "unused"),
    [
        ("softmax", {"alpha", "learnable_alpha", "window", "stride", "dilation"}),
        ("entmax", {"window", "stride", "dilation"}),
        ("entmax15+causal", {"alpha", "learnable_alpha", "window", "stride", "dilation"}),
        ("strided", {"alpha", "learnable_alpha", "dilation"}),
        (["strided", "entmax+dilated_sliding_window"], set()),
    ],
)
def test_the_options_that_no_layer_has_a_use_for_are_listed(attention, unused):
    options = {"alpha": 1.2, "learnable_alpha": False, "window": 2, "stride": 2, "dilation": 2, "causal": False}
    options |= {"implementation": "dense"}
    assert set(unused_options(parse_attention(attention, options), options)) == unused
    assert unused_options(parse_attention(attention), dict.fromkeys(options)) == []


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("strdied", "unknown attention 'strdied'. Did you mean 'strided'?"),
        ("Softmax", "Did you mean 'softmax'?"),
        ("entmax1.5", "Did you mean 'entmax15'?"),
        ("window", "Did you mean 'sliding_window'?"),
        ("qqq", f"Allowed: {', '.join([*MECHANISMS, *NORMALIZERS, *PATTERNS])}. Or normalizer+pattern."),
        ("", "unknown attention ''"),
        ("entmx+strided", "attention 'entmx+strided': unknown normalizer 'entmx'. Did you mean 'entmax'?"),
        ("entmax+stride", "attention 'entmax+stride': unknown pattern 'stride'. Did you mean 'strided'?"),
        ("strided+entmax", "the normalizer comes first: entmax+strided"),
        ("entmax+softmax", "unknown pattern 'softmax'"),
        ("full+strided", "unknown normalizer 'full'"),
        ("entmax+", "unknown pattern ''"),
        ("entmax+strided+fixed", "is not normalizer+pattern, such as entmax+strided"),
        ("strided:window", "'strided:window': options are written strided:option:value"),
        ("strided:windw:3", "'strided:windw:3': unknown option of strided 'windw'. Did you mean 'window'?"),
        ("strided:kernel:3", "unknown option of strided 'kernel'. Allowed: window, stride, causal."),
        ("strided:window:0", "attention 'strided:window:0': window must be a whole number of at least 1, not 0"),
        ("strided:window:x", "window must be a whole number of at least 1, not 'x'"),
        ("strided:causal:maybe", "causal must be true or false, not 'maybe'"),
        ("strided:implementation:dense", "unknown option of strided 'implementation'"),
        ("softmax:alpha:1.3", "softmax has no options"),
        ("entmax:alpha:3+strided", "attention 'entmax:alpha:3+strided': alpha must lie in (1, 2], not 3.0"),
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


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_mechanism_of_its_own_takes_neither_pattern_nor_the_options_of_one(name):
    for spec in (f"{name}+strided", f"softmax+{name}", f"{name}+{name}"):
        with pytest.raises(ValueError, match=f"{name} is a mechanism of its own, which takes no normalizer or pattern"):
            parse_spec(spec)
    with pytest.raises(ValueError, match=f"unknown option of {name} 'window'|{name} has no options"):
        parse_spec(f"{name}:window:4")
    assert "window" in unused_options([parse_spec(name, {"window": 4})], {"window": 4})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"windw": 3}, "unknown attention option 'windw'. Did you mean 'window'?"),
        ({"heads": 3}, f"Allowed: {', '.join(option_names())}."),
        ({"alpha": 1}, "alpha must lie in (1, 2], not 1;"),
        ({"alpha": 2.5}, "alpha must lie in (1, 2], not 2.5"),
        ({"alpha": "1.5"}, "alpha must lie in (1, 2], not '1.5'"),
        ({"alpha": True}, "alpha must lie in (1, 2], not True"),
        ({"anneal_alpha_from": 1}, "anneal_alpha_from: alpha must lie in (1, 2], not 1;"),
        ({"anneal_alpha_from": 2.01}, "anneal_alpha_from: alpha must lie in (1, 2], not 2.01"),
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
@pytest.mark.parametrize("attention", ["entmax+strided"])
def test_a_wrong_option_is_refused_in_one_line(attention, options, said):
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        parse_attention(attention, options)
    assert "\n" not in str(error.value)


def test_a_wrong_option_is_refused_where_no_layer_reads_it_too():
    with pytest.raises(ValueError, match="window must be a whole number"):
        parse_attention("softmax", {"window": 0})


def test_fused_is_accepted_for_softmax():
    (mechanism,) = parse_attention("strided", {"implementation": "fused"})
    assert mechanism.implementation == "fused"


def test_what_is_registered_can_be_named_at_once_and_no_name_is_taken_twice():
    @dataclass(frozen=True, kw_only=True)
    class Mine(Mechanism):
        """Mine."""

        name = "mine"
        depth: int = option(3, least=0, help="how deep")

        def build(self, num_heads: int, head_dim: int, layer: int = 0) -> Core:
            raise NotImplementedError

    register(Mine)
    try:
        assert parse_spec("mine:depth:0") == Mine(depth=0)
        assert parse_spec("mine", {"depth": 4}) == Mine(depth=4)
        assert "depth" in option_names()
        with pytest.raises(ValueError, match="the name 'mine' is taken by"):
            register(Mine)
    finally:
        del MECHANISMS["mine"]
    with pytest.raises(ValueError, match=r"the name 'strided' is taken by .*Strided"):
        register(type("Other", (Strided,), {"name": "strided"}))
