"""How far patches see, against sets that are followed one layer after the other."""

import numpy as np
import pytest

from vit_attn.explain.receptive_field import first_reached, receptive_field

SPECS = ["strided", "fixed", "sliding_window", "dilated_sliding_window", "causal", "softmax", "entmax15+fixed"]
OPTIONS = {"window": 4, "stride": 6}


def allowed(spec, i, j, width=6):
    """The published rules, by hand, over patches: may query i see key j?"""
    d, w = i - j, 4
    rules = {
        "strided": d >= 0 and (d <= w or d % width == 0),
        "fixed": d >= 0 and (i // w == j // w or j % w == w - 1),
        "sliding_window": abs(d) <= w // 2,
        "dilated_sliding_window": abs(d) in (0, 2, 4),
        "causal": d >= 0,
    }
    return rules.get(spec.split("+")[-1], True)


def reach_by_hand(specs, size, prefix):
    """Layer → list of sets: the patches (0, 1, …) and prefix tokens (-1, …) that each patch's output depends on."""
    tokens = range(-prefix, size)
    known = {token: {token} for token in tokens}
    after = []
    for spec in specs:
        seen = {i: [j for j in tokens if i < 0 or j < 0 or allowed(spec, i, j)] for i in tokens}
        known = {i: known[i].union(*(known[j] for j in seen[i])) for i in tokens}
        after.append([{j for j in known[i] if j >= 0} for i in range(size)])
    return after


def make(make_net, specs, **kwargs):
    return make_net(list(specs), depth=len(specs), img_size=(16, 24), attention_options=OPTIONS, **kwargs)


CASES = [*[(spec,) * 4 for spec in SPECS], ("fixed", "sliding_window", "fixed", "strided", "fixed", "fixed")]


@pytest.mark.parametrize("specs", CASES, ids=lambda specs: specs[-1] + "…" * (len(set(specs)) > 1))
@pytest.mark.parametrize("relays", [False, True])
@pytest.mark.parametrize("kwargs", [{"reg_tokens": 1}, {"class_token": False, "global_pool": "avg"}], ids=str)
def test_shares_and_pictures_are_those_of_followed_sets(make_net, specs, relays, kwargs):
    net = make(make_net, specs, **kwargs)
    prefix = net.num_prefix_tokens if relays else 0
    after = reach_by_hand(specs, 24, prefix)
    expected = [np.mean([len(seen) for seen in sets]) / 24 for sets in after]
    assert receptive_field(net, relays=relays) == pytest.approx(expected, abs=1e-12)
    for query in (0, 13, 23):
        first = first_reached(net, query, relays=relays)
        assert first.shape == (4, 6)
        for patch, found in enumerate(first.flatten().tolist()):
            layers = [depth for depth, sets in enumerate(after, start=1) if patch in sets[query]]
            assert found == (0 if patch == query else min(layers, default=-1))


def test_two_layers_suffice_with_a_class_token(make_net):
    net = make(make_net, ("sliding_window",) * 3)
    with_relays, alone = receptive_field(net), receptive_field(net, relays=False)
    assert with_relays[0] == alone[0] < 0.3
    assert with_relays[1:] == [1.0, 1.0]
    assert alone[0] < alone[1] < alone[2] < 1
