"""Patterns over tokens in raster order against numpy loops over their definitions, and against published sparsities.

Patterns over rows and columns of the grid have test files of their own.
"""

from itertools import product

import numpy as np
import pytest

from vit_attn.attention import make_pattern

# Share of zeros in % at N = 1024, window = stride = 32, dilation 2, published with the mask set these rules come from.
GOLDEN = {
    "full": "0.0000",
    "causal": "49.9512",
    "strided": "95.4086",
    "fixed": "96.8750",
    "sliding_window": "96.8033",
    "dilated_sliding_window": "96.8292",
}
CAUSAL_BY_DEFAULT = {"causal", "strided", "fixed"}


def second_component(name: str, i: int, j: int, window: int, stride: int) -> bool:
    if name == "strided":
        return abs(i - j) % stride == 0
    return name == "fixed" and j % window == window - 1


def first_component(name: str, i: int, j: int, window: int, dilation: int) -> bool:
    distance = abs(i - j)
    if name in ("full", "causal"):
        return True
    if name == "strided":
        return distance <= window
    if name == "fixed":
        return i // window == j // window
    if name == "sliding_window":
        return distance <= window / 2
    assert name == "dilated_sliding_window"
    return any(distance == k * dilation for k in range(1, window + 1) if k <= window / 2)


def define_labels(
    name: str, num_tokens: int, window: int, stride: int, dilation: int, causal: bool, prefix: int
) -> np.ndarray:
    """The table of definitions, entry by entry: 0 forbidden, 1 self, 2 local, 3 second component, 4 global."""
    labels = np.zeros((prefix + num_tokens,) * 2, dtype=np.uint8)
    labels[:prefix] = labels[:, :prefix] = 4
    for i, j in product(range(num_tokens), repeat=2):
        if i == j:
            label = 1
        elif causal and j > i:
            label = 0
        elif first_component(name, i, j, window, dilation):
            label = 2
        else:
            label = 3 * second_component(name, i, j, window, stride)
        labels[prefix + i, prefix + j] = label
    return labels


# (num_tokens, window, stride, dilation): odd and even windows, sizes that do not divide, larger than the grid.
SIZES = [(1, 1, 1, 1), (16, 4, 4, 2), (17, 3, 5, 3), (12, 5, 3, 1), (12, 1, 7, 2), (10, 4, 2, 4), (9, 20, 20, 2)]


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_labels_follow_the_definitions(name, sizes):
    num_tokens, window, stride, dilation = sizes
    options = {"num_tokens": num_tokens, "window": window, "stride": stride, "dilation": dilation}
    for prefix, causal in product((0, 1, 5), (None, True, False)):
        pattern = make_pattern(name, num_prefix_tokens=prefix, causal=causal, **options)
        in_effect = name in CAUSAL_BY_DEFAULT if causal is None else causal
        expected = define_labels(name, num_tokens, window, stride, dilation, in_effect, prefix)
        np.testing.assert_array_equal(pattern.labels().numpy(), expected, err_msg=f"{prefix=} {causal=}")
        np.testing.assert_array_equal(pattern.allowed().numpy(), expected > 0)
        assert pattern.entries == np.count_nonzero(expected)
        assert pattern.sparsity == pytest.approx((expected == 0).mean(), abs=1e-15)
        assert pattern.size == len(expected)


@pytest.mark.parametrize("name", GOLDEN)
def test_sparsity_is_the_published_figure_to_the_last_digit(name):
    assert f"{100 * make_pattern(name, num_tokens=1024, dilation=2).sparsity:.4f}" == GOLDEN[name]
    assert f"{100 * make_pattern(name, num_tokens=1024, window=32, stride=32).sparsity:.4f}" == GOLDEN[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_entries_are_counted_over_more_rows_than_one_chunk(name):
    pattern = make_pattern(name, num_tokens=2116, num_prefix_tokens=5, window=7, stride=46)
    assert pattern.entries == int(pattern.allowed().sum())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", GOLDEN)
def test_prefix_tokens_see_all_are_seen_by_all_and_leave_the_grid_as_it_is(name, causal):
    options = {"num_tokens": 25, "window": 3, "causal": causal}
    alone = make_pattern(name, **options).labels()
    labels = make_pattern(name, num_prefix_tokens=3, **options).labels()
    assert (labels[:3] == 4).all()
    assert (labels[:, :3] == 4).all()
    assert (labels[3:, 3:] == alone).all()
    assert (alone.diagonal() == 1).all()


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("name", GOLDEN)
def test_causal_is_the_symmetric_pattern_at_or_before_the_query(name, prefix):
    options = {"num_tokens": 23, "num_prefix_tokens": prefix, "window": 4, "stride": 5, "dilation": 2}
    causal = make_pattern(name, causal=True, **options).labels().numpy()
    symmetric = make_pattern(name, causal=False, **options).labels().numpy()
    past = np.tri(23 + prefix, dtype=bool)
    past[:prefix] = True
    np.testing.assert_array_equal(causal, np.where(past, symmetric, 0))
    if name != "fixed":  # whose last column of a block is seen from everywhere, and sees its own block only
        np.testing.assert_array_equal(symmetric, symmetric.T)


@pytest.mark.parametrize(
    ("name", "window"),
    [("strided", 13), ("strided", 12), ("fixed", 13), ("sliding_window", 24), ("sliding_window", 99)],
)
def test_a_window_over_everything_is_full(name, window):
    pattern = make_pattern(name, num_tokens=13, window=window, stride=99, causal=False)
    assert pattern.sparsity == 0
    assert pattern.allowed().all()
    # The next shorter window is not: the rule is tight.
    shorter = 12 if name == "fixed" else 11 if name == "strided" else 23
    assert make_pattern(name, num_tokens=13, window=shorter, stride=99, causal=False).sparsity > 0


def test_a_window_over_everything_is_full_between_dilations():
    pattern = make_pattern("dilated_sliding_window", num_tokens=13, window=99, dilation=3)
    i, j = np.indices((13, 13))
    np.testing.assert_array_equal(pattern.allowed().numpy(), (i - j) % 3 == 0)


@pytest.mark.parametrize(
    ("sizes", "width"),
    [
        ({"num_tokens": 49}, 7),
        ({"num_tokens": 40, "grid_size": (5, 8)}, 8),
        ({"num_tokens": 36, "grid_size": (9, 4)}, 4),
    ],
)
@pytest.mark.parametrize("name", GOLDEN)
def test_window_and_stride_default_to_the_width_of_the_grid(name, sizes, width):
    explicit = make_pattern(name, **sizes, window=width, stride=width, dilation=2)
    assert make_pattern(name, **sizes) == explicit
    other = make_pattern(name, **sizes, window=width + 1, stride=width + 2, dilation=3)
    assert (other == explicit) is (name in ("full", "causal"))


def test_patterns_are_equal_and_hash_alike_by_what_they_are():
    one, same = (make_pattern("strided", num_tokens=16, num_prefix_tokens=1) for _ in range(2))
    one.allowed()
    others = [
        make_pattern("strided", num_tokens=16),
        make_pattern("strided", num_tokens=16, num_prefix_tokens=1, causal=False),
        make_pattern("fixed", num_tokens=16, num_prefix_tokens=1),
    ]
    assert {one: "found"}[same] == "found"
    assert one not in others


def test_the_options_of_other_patterns_are_ignored():
    plain = make_pattern("sliding_window", num_tokens=16, window=4)
    assert make_pattern("sliding_window", num_tokens=16, window=4, stride=3, dilation=5) == plain


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("stridden", {}, r"unknown pattern 'stridden'\. Did you mean 'strided'\?"),
        ("sliding", {}, "Did you mean 'sliding_window'"),
        ("Fixed", {}, "Did you mean 'fixed'"),
        ("xyz", {}, "Allowed: .*fixed.*strided"),
        ("strided", {"windw": 3}, "unknown attention option 'windw'. Did you mean 'window'"),
        ("strided", {"window": 0}, "window must be a whole number of at least 1, not 0"),
        ("fixed", {"window": -3}, "window must .* not -3"),
        ("strided", {"stride": 0}, "stride must .* not 0"),
        ("dilated_sliding_window", {"dilation": 0}, "dilation must .* not 0"),
        ("fixed", {"window": 4.0}, r"window must .* not 4\.0"),
        ("fixed", {"window": True}, "window must .* not True"),
        ("fixed", {"window": "4"}, "window must .* not '4'"),
        ("dilated_sliding_window", {"dilation": 1.5}, r"dilation must .* not 1\.5"),
        ("causal", {"causal": 1}, "causal must be true or false, not 1"),
        ("strided", {"causal": "false"}, "causal must be true or false, not 'false'"),
        ("full", {"num_tokens": 0}, "num_tokens must be a whole number of at least 1, not 0"),
        ("full", {"num_tokens": True}, "num_tokens must .* not True"),
        ("full", {"num_prefix_tokens": -1}, "num_prefix_tokens must be a whole number of at least 0, not -1"),
        ("strided", {"num_tokens": 15}, "strided: 15 tokens are no square grid: give window= or grid_size="),
        ("strided", {"num_tokens": 15, "window": 3}, "give stride= or grid_size="),
        ("fixed", {"num_tokens": -4}, "num_tokens must|no square grid"),
        ("strided", {"grid_size": (3, 4)}, "a grid of 3x4 does not hold 16 tokens"),
    ],
)
def test_a_wrong_value_is_refused_by_name(name, options, said):
    with pytest.raises(ValueError, match=said):
        make_pattern(name, **{"num_tokens": 16} | options)


def test_numbers_of_numpy_are_numbers():
    pattern = make_pattern("strided", num_tokens=np.int64(16), window=np.int64(3), stride=4)
    assert pattern == make_pattern("strided", num_tokens=16, window=3, stride=4)
    assert type(pattern.window) is int


def test_a_grid_that_is_not_square_needs_no_width_where_none_is_read():
    assert make_pattern("causal", num_tokens=15).entries == 120
    assert make_pattern("sliding_window", num_tokens=15, window=2).entries == 43
