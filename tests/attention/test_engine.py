"""The sparse engine against dense attention and against sums written out, at sizes that fit nothing evenly."""

import entmax as package
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from vit_attn.attention import Pattern, attention, engine, make_pattern
from vit_attn.attention import compiled as compiling
from vit_attn.attention.engine import run as engine_run
from vit_attn.attention.functional import choose_implementation

IMAGES, HEADS, DIM, DIM_V = 3, 6, 5, 4
NORMALIZERS = ("softmax", "entmax15", "sparsemax", "entmax")
LAID = {
    "strided": make_pattern("strided", num_tokens=50, num_prefix_tokens=1, window=7, stride=7),
    "strided, both ways": make_pattern(
        "strided", num_tokens=100, num_prefix_tokens=2, window=10, stride=10, causal=False
    ),
    "strided, wide": make_pattern("strided", num_tokens=100, window=33, stride=9),
    "strided within the window": make_pattern("strided", num_tokens=50, num_prefix_tokens=1, window=60, stride=60),
    "fixed": make_pattern("fixed", num_tokens=100, num_prefix_tokens=2, window=9),
    "fixed, whole blocks": make_pattern("fixed", num_tokens=49, window=7, causal=False),
    "window": make_pattern("sliding_window", num_tokens=100, num_prefix_tokens=2, window=23),
    "window, backwards": make_pattern("sliding_window", num_tokens=50, num_prefix_tokens=1, window=7, causal=True),
    "window of one": make_pattern("sliding_window", num_tokens=50, num_prefix_tokens=1, window=1),
    "dilated": make_pattern("dilated_sliding_window", num_tokens=100, num_prefix_tokens=2, window=12, dilation=3),
    "dilated, backwards": make_pattern(
        "dilated_sliding_window", num_tokens=50, num_prefix_tokens=1, window=9, dilation=7, causal=True
    ),
    "causal": make_pattern("causal", num_tokens=50, num_prefix_tokens=1),
    "full": make_pattern("full", num_tokens=50, num_prefix_tokens=1),
}
FEW = ("strided", "fixed, whole blocks", "dilated", "causal")
every_pattern = pytest.mark.parametrize("pattern", LAID.values(), ids=LAID)
few_patterns = pytest.mark.parametrize("pattern", [LAID[name] for name in FEW], ids=FEW)
every_normalizer = pytest.mark.parametrize("normalizer", NORMALIZERS)


@pytest.fixture(autouse=True)
def _plain_lines(monkeypatch):
    monkeypatch.setattr(compiling, "COMPILE_FROM", float("inf"))


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(size: int, images: int = IMAGES, heads: int = HEADS) -> list[Tensor]:
    """Leaves, of scores spread enough for sparse normalizers to give zeros of their own."""
    shapes = ((2.0, DIM), (2.0, DIM), (1.0, DIM_V))
    leaves = [factor * draw(images, heads, size, dim, seed=seed) for seed, (factor, dim) in enumerate(shapes)]
    return [leaf.requires_grad_() for leaf in leaves]


def alphas(heads: int = HEADS) -> Tensor:
    return torch.linspace(1.05, 1.95, heads, dtype=torch.float64).requires_grad_()


def run(
    implementation: str, normalizer: str, pattern: Pattern, *, see: bool = True, drop: nn.Dropout | None = None
) -> dict[str, Tensor]:
    """Outputs, weights, and gradients of a loss of both, or of the outputs alone where not to ``see`` the weights."""
    N = pattern.size
    leaves, alpha = qkv(N), alphas()
    out = attention(*leaves, normalizer, pattern, alpha, None, implementation, drop, return_weights=see)
    loss, seen = 0.0, {}
    if see:
        out, seen["weights"] = out
        loss = (seen["weights"] * draw(IMAGES, HEADS, N, N, seed=8)).sum()
    loss = loss + (out * draw(IMAGES, HEADS, N, DIM_V, seed=9)).sum()
    wanted = [*leaves, alpha] if normalizer == "entmax" else leaves
    grads = torch.autograd.grad(loss, wanted)
    return {"out": out, **seen, **dict(zip(("q", "k", "v", "alpha"), grads, strict=False))}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], atol: float = 1e-12) -> None:
    assert one.keys() == other.keys()
    for name in one:
        # α's gradient sums over images and queries, times 1 / (α-1)² of up to 400.
        tolerance = 1e3 * atol if name == "alpha" else 10 * atol if name in "qkv" else atol
        torch.testing.assert_close(one[name], other[name], atol=tolerance, rtol=1e-11)


@every_pattern
@every_normalizer
@pytest.mark.parametrize("see", [True, False], ids=["seen", "unseen"])
def test_outputs_weights_and_gradients_are_those_of_dense(normalizer, pattern, see):
    assert_same(run("blocks", normalizer, pattern, see=see), run("dense", normalizer, pattern, see=see))


def chunks(monkeypatch, images: int, heads: int, entries: int) -> list[tuple[int, int]]:
    """Have so many images and heads computed together, and list the sizes of the chunks."""
    monkeypatch.setattr(engine_run, "_CHUNK_ENTRIES", entries * images * heads)
    parts = list(engine_run._chunks(IMAGES, HEADS, entries))
    return [(len(range(IMAGES)[image]), len(range(HEADS)[head])) for image, head in parts]


@few_patterns
@every_normalizer
@pytest.mark.parametrize(
    ("together", "sizes"),
    [
        ((1, 1), [(1, 1)] * 18),
        ((1, 4), [(1, 3)] * 6),  # no more than what divides the heads
        ((1, 6), [(1, 6)] * 3),
        ((2, 6), [(2, 6), (1, 6)]),  # and a remainder
        ((3, 6), [(3, 6)]),
    ],
)
def test_results_do_not_depend_on_how_many_heads_are_computed_together(
    monkeypatch, normalizer, pattern, together, sizes
):
    wanted = run("dense", normalizer, pattern)
    plan = engine.make_plan(pattern, torch.device("cpu"))
    part = plan.patches
    entries = plan.rows[0].scores if part is None else part.length * part.pitch
    assert chunks(monkeypatch, *together, entries) == sizes
    assert_same(run("blocks", normalizer, pattern), wanted)


@few_patterns
def test_views_of_one_projection_are_taken_as_they_are(pattern):
    N = pattern.size
    projected = draw(IMAGES, N, 3 * HEADS * DIM, seed=3).requires_grad_()
    results = []
    for implementation in ("dense", "blocks"):
        q, k, v = projected.reshape(IMAGES, N, 3, HEADS, DIM).permute(2, 0, 3, 1, 4).unbind(0)
        assert not q.is_contiguous()
        out = attention(q, k, v, "entmax15", pattern, implementation=implementation)
        # A gradient that is a view, too: (B, N, H, D) as after the heads are joined.
        loss = (out.transpose(1, 2).reshape(IMAGES, N, -1) * draw(IMAGES, N, HEADS * DIM, seed=9)).sum()
        results.append((out, *torch.autograd.grad(loss, projected)))
    torch.testing.assert_close(results[1], results[0], atol=1e-11, rtol=0)


@few_patterns
@every_normalizer
@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)], ids=str
)
@pytest.mark.parametrize("autocast", [True, False])
def test_lower_precision_is_close_and_keeps_its_dtype(normalizer, pattern, dtype, atol, autocast):
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in qkv(pattern.size)]
    alpha = alphas().detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out, weights = attention(*leaves, normalizer, pattern, alpha, None, "blocks", return_weights=True)
    assert out.dtype == dtype
    assert weights.dtype == torch.float32
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted, wanted_weights = attention(
        *wide, normalizer, pattern, alpha.detach().double(), None, "dense", return_weights=True
    )
    torch.testing.assert_close(out.double(), wanted, atol=atol, rtol=0)
    torch.testing.assert_close(weights.double(), wanted_weights, atol=2e-5, rtol=0)  # fp32 whatever autocast says
    d_out = draw(*out.shape, seed=9)
    grads = torch.autograd.grad(out, leaves, d_out.to(dtype))
    wanted_grads = torch.autograd.grad(wanted, wide, d_out.to(dtype).double())
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        assert grad.dtype == dtype
        scale = float(wanted_grad.abs().max())
        torch.testing.assert_close(grad.double(), wanted_grad, atol=atol * scale, rtol=0)


@few_patterns
@every_normalizer
@pytest.mark.parametrize("small_chunks", [True, False])
def test_the_weights_that_dropout_leaves_are_those_of_the_backward_pass(monkeypatch, normalizer, pattern, small_chunks):
    if small_chunks:
        monkeypatch.setattr(engine_run, "_CHUNK_ENTRIES", 1)
    leaves, alpha = qkv(pattern.size), alphas()
    drop = nn.Dropout(0.25)
    wanted_leaves = [*leaves, alpha] if normalizer == "entmax" else leaves
    _, whole = attention(*leaves, normalizer, pattern, alpha, None, "dense", return_weights=True)
    torch.manual_seed(0)
    out, weights = attention(*leaves, normalizer, pattern, alpha, None, "blocks", drop, return_weights=True)
    d_out = draw(*out.shape, seed=9)
    grads = torch.autograd.grad(out, wanted_leaves, d_out)

    keep = torch.where(whole > 1e-12, weights / whole.clamp_min(1e-12), 0).detach()
    assert ((keep == 0) | ((keep - 4 / 3).abs() < 0.01)).all()
    assert 0.2 < ((keep == 0) & (whole > 1e-12)).sum() / (whole > 1e-12).sum() < 0.3
    keep = torch.where(keep > 1, 4 / 3, 0.0).double()
    torch.testing.assert_close(out, weights @ leaves[2], atol=1e-12, rtol=0)
    torch.testing.assert_close(grads[2], weights.mT @ d_out, atol=1e-12, rtol=0)
    wanted = torch.autograd.grad((whole * keep) @ leaves[2], wanted_leaves, d_out)
    torch.testing.assert_close(grads, wanted, atol=1e-7, rtol=1e-7)

    torch.manual_seed(0)
    again = attention(*leaves, normalizer, pattern, alpha, None, "blocks", drop)
    assert torch.equal(again, out)  # whether the weights are looked at or not
    assert not torch.equal(attention(*leaves, normalizer, pattern, alpha, None, "blocks", drop), out)
    drop.eval()
    torch.testing.assert_close(
        attention(*leaves, normalizer, pattern, alpha, None, "blocks", drop), whole @ leaves[2], atol=1e-11, rtol=0
    )


@pytest.mark.parametrize("bad", range(3))
@pytest.mark.parametrize("which", range(3), ids="qkv")
@pytest.mark.parametrize("normalizer", ["softmax", "sparsemax"])
@few_patterns
def test_nan_in_one_image_does_not_reach_the_outputs_of_another(pattern, normalizer, which, bad):
    leaves = [leaf.detach() for leaf in qkv(pattern.size, heads=2)]
    wanted = attention(*leaves, normalizer, pattern, implementation="blocks")
    leaves[which] = leaves[which].clone()
    leaves[which][bad] = float("nan")
    out = attention(*leaves, normalizer, pattern, implementation="blocks")
    others = [image for image in range(3) if image != bad]
    # More rounds may be taken for all where those of one never end.
    torch.testing.assert_close(out[others], wanted[others], atol=1e-14, rtol=1e-12)
    assert out[bad].isnan().all()


def staircase(levels: int) -> Tensor:
    """See test_kernels.py: scores that sparsemax takes more rounds for than its first attempt has."""
    scores, tau, drop = [0.0, -0.5], -0.75, 0.01
    for _ in range(levels):
        scores += [tau - drop] * len(scores)
        tau, drop = tau - drop / 2, 1.05 * drop
    return torch.tensor(scores, dtype=torch.float64)


@pytest.mark.parametrize("beside_nan", [True, False])
def test_rows_that_need_many_rounds_get_them(beside_nan):
    scores = staircase(9)
    tokens = len(scores)
    q, v = torch.ones(2, 1, tokens, 1, dtype=torch.float64), draw(2, 1, tokens, 3, seed=2)
    k = scores.expand(2, 1, -1)[..., None].clone()
    if beside_nan:
        k[1] = float("nan")
    for pattern in (None, make_pattern("fixed", num_tokens=tokens, window=tokens)):
        out = attention(q, k, v, "sparsemax", pattern, scale=1.0, implementation="blocks")
        rows = scores.masked_fill(~pattern.allowed(), float("-inf")) if pattern else scores.expand(tokens, -1)
        torch.testing.assert_close(out[0, 0], package.sparsemax(rows, dim=-1) @ v[0, 0], atol=1e-11, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
@every_normalizer
def test_gradcheck(normalizer, causal):
    pattern = make_pattern("strided", num_tokens=9, num_prefix_tokens=1, window=2, stride=3, causal=causal)
    leaves = [draw(1, 2, 10, 3, seed=seed).requires_grad_() for seed in range(3)]
    alpha = torch.tensor([1.2, 1.8], dtype=torch.float64, requires_grad=True)
    assert gradcheck(
        lambda q, k, v, a: attention(q, k, v, normalizer, pattern, a, None, "blocks", return_weights=True),
        (*leaves, alpha),
    )


OPERATORS = {
    "strided": (make_pattern("strided", num_tokens=9, num_prefix_tokens=1, window=2, stride=3).key, None, False),
    "seen": (make_pattern("fixed", num_tokens=9, num_prefix_tokens=1, window=3).key, None, True),
    "alphas": (make_pattern("strided", num_tokens=9, num_prefix_tokens=1, window=2, stride=3).key, (1.2, 1.8), True),
    "full": ("", (1.2, 1.8), False),  # sizes may be symbols, and no plan can be made of those
}


@pytest.mark.parametrize(("pattern", "alpha", "see"), OPERATORS.values(), ids=OPERATORS)
def test_operators_keep_what_torch_demands_of_them(pattern, alpha, see):
    q, k, v = (draw(2, 2, 10, 3, seed=seed).requires_grad_() for seed in range(3))
    a = None if alpha is None else torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    options = (pattern, "entmax", 1.5, a, 0.5, 0.0, None)
    torch.library.opcheck(torch.ops.vit_attn.blocks.default, (q, k, v, *options, see))
    with torch.no_grad():
        out, seen, kept = torch.ops.vit_attn.blocks(q, k, v, *options, see)
        d_seen = torch.ones_like(seen) if see else None
        arguments = (torch.ones_like(out), d_seen, *(x.detach() for x in (q, k, v)), kept)
        options = (pattern, "entmax", 1.5, None if a is None else a.detach(), 0.5, 0.0, None)
        torch.library.opcheck(torch.ops.vit_attn.blocks_backward.default, (*arguments, *options))


def test_operators_of_the_normalizers_keep_what_torch_demands_of_them():
    x = draw(4, 7, seed=0).requires_grad_()
    alpha = torch.full((4, 1), 1.3, dtype=torch.float64, requires_grad=True)
    for a in (None, alpha):
        torch.library.opcheck(torch.ops.vit_attn.entmax.default, (x, 1.5, a))


def test_a_second_derivative_is_refused_rather_than_wrong():
    q, k, v = qkv(51)
    out = attention(q, k, v, "entmax15", LAID["strided"], implementation="blocks")
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative: use implementation 'dense'"):
        grad.sum().backward()


def memory(normalizer: str, pattern: Pattern, training: bool) -> tuple[int, int]:
    """The largest allocation, and the most bytes held, on top of q, k, v (1, 1, N, 8) in fp32."""
    q, k, v = (torch.randn(1, 1, pattern.size, 8, requires_grad=training) for _ in range(3))
    attention(*(x.detach()[:, :, : pattern.size] for x in (q, k, v)), normalizer, pattern)  # plans and masks are kept
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        out = attention(q, k, v, normalizer, pattern, implementation="blocks")
        if training:
            out.sum().backward()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held, most = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return max(event.nbytes() for event in events), most


def test_no_square_of_scores_is_ever_held():
    N = 4096
    largest, most = memory("softmax", make_pattern("strided", num_tokens=N), training=True)
    assert 0 < largest < N * N * 4 / 8
    assert most < N * N * 4 / 2
    largest, most = memory("entmax15", make_pattern("full", num_tokens=N), training=False)
    assert 0 < largest < N * N * 4 / 8
    assert most < N * N * 4 / 2


FLOPS = {  # scores in all, and those of them in whole rows; worked out in test_blocks.py
    "strided": (make_pattern("strided", num_tokens=100, num_prefix_tokens=1, window=10, stride=10), 4101, 101),
    "fixed": (make_pattern("fixed", num_tokens=100, num_prefix_tokens=1, window=10), 2201, 101),
    "causal": (make_pattern("causal", num_tokens=100), 10000, 10000),
    "full": (make_pattern("full", num_tokens=100), 10000, 10000),
}


@pytest.mark.parametrize(("pattern", "scores", "again"), FLOPS.values(), ids=FLOPS)
def test_operations_are_counted_as_they_are_computed(monkeypatch, pattern, scores, again):
    q, k, v = (torch.randn(2, 3, pattern.size, 8, requires_grad=True) for _ in range(3))
    counts = []
    multiply = torch.bmm

    def counted(a: Tensor, b: Tensor) -> Tensor:
        counts.append(2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2])
        return multiply(a, b)

    monkeypatch.setattr(torch, "bmm", counted)
    with FlopCounterMode(display=False) as forward:
        out = attention(q, k, v, "entmax15", pattern, implementation="blocks")
    assert forward.get_total_flops() == 6 * 4 * 8 * scores
    # What is multiplied is that, but for empty rows after the last head.
    assert 0.95 * forward.get_total_flops() < sum(counts) <= forward.get_total_flops()
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == 6 * (8 * 8 * scores + 2 * 8 * again)
    both = forward.get_total_flops() + backward.get_total_flops()
    assert 0.95 * both < sum(counts) <= both


def choose(normalizer: str, name: str | None, tokens: int, keys: int | None = None) -> str:
    pattern = "" if name is None else make_pattern(name, num_tokens=tokens, num_prefix_tokens=1).key
    return choose_implementation("auto", normalizer, pattern, num_keys=keys or tokens + 1)


@pytest.mark.parametrize(
    ("normalizer", "name", "tokens", "chosen"),
    [
        ("softmax", "strided", 64, "fused"),
        ("entmax15", "strided", 64, "dense"),
        ("softmax", "fixed", 64, "blocks"),
        ("sparsemax", "fixed", 64, "blocks"),
        *((n, p, 1024, "blocks") for n in NORMALIZERS for p in ("strided", "fixed", "sliding_window")),
        *((n, "dilated_sliding_window", 1024, "blocks") for n in NORMALIZERS),
        *(("softmax", p, tokens, "fused") for p in ("full", "causal", None) for tokens in (64, 4096)),
        *((n, p, 961, "dense") for n in NORMALIZERS[1:] for p in ("full", "causal", None)),
        *((n, p, 2025, "blocks") for n in NORMALIZERS[1:] for p in ("full", "causal", None)),
    ],
)
def test_auto_takes_blocks_where_most_scores_are_left_out_or_would_not_fit(normalizer, name, tokens, chosen):
    assert choose(normalizer, name, tokens) == chosen


def test_auto_draws_its_line_at_a_third_of_the_scores_and_1024_keys():
    seen = set()
    for window in range(1, 40):
        pattern = make_pattern("sliding_window", num_tokens=64, window=window)
        scores = engine.make_plan(pattern, torch.device("cpu")).scores
        chosen = choose_implementation("auto", "entmax15", pattern.key, num_keys=64)
        assert (chosen == "blocks") is (3 * scores <= 64**2)
        seen.add(chosen)
    assert seen == {"dense", "blocks"}
    assert choose_implementation("auto", "entmax15", "", num_keys=1024) == "dense"
    assert choose_implementation("auto", "entmax15", None, num_keys=1025) == "blocks"
