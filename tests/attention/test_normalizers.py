"""Normalizers against the `entmax` package: weights, gradients, odd rows and low precision."""

import entmax as package
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

from vit_attn.attention import attention, entmax, entmax15, softmax, sparsemax

ALPHAS = (1.05, 1.3, 1.5, 1.9, 2.0)
INF = float("inf")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cauchy(*shape: int) -> torch.Tensor:
    return draw(*shape) / draw(*shape, seed=1)


ROWS = {
    "normal": draw(8, 33),
    "times 100": 100 * draw(8, 33),
    "cauchy": cauchy(8, 33),
    "ties": (2 * draw(8, 33)).round(),
    "all equal": torch.full((2, 33), 3.25, dtype=torch.float64),
    "one spike": torch.eye(3, 33, dtype=torch.float64) * 1e6,
    "spread of 1e4": torch.linspace(-5e3, 5e3, 33, dtype=torch.float64).repeat(2, 1),
    "four decades": -torch.logspace(-2, 2, 33, dtype=torch.float64).repeat(2, 1),
    "long": draw(2, 2048),
    "length 1": draw(4, 1),
}
SMOOTH_ROWS = ("normal", "times 100", "cauchy", "all equal", "one spike", "four decades", "length 1")


def reference(scores: torch.Tensor, alpha: float | torch.Tensor, dim: int = -1) -> torch.Tensor:
    return package.entmax_bisect(scores, alpha, dim, n_iter=100)


NORMALIZERS = {
    "softmax": (softmax, torch.softmax),
    "sparsemax": (sparsemax, package.sparsemax),
    "entmax15": (entmax15, package.entmax15),
    **{
        f"entmax {alpha}": (
            lambda scores, dim=-1, alpha=alpha: entmax(scores, alpha, dim),
            lambda scores, dim=-1, alpha=alpha: reference(scores, alpha, dim),
        )
        for alpha in ALPHAS
    },
}
every_normalizer = pytest.mark.parametrize(("normalizer", "expected"), NORMALIZERS.values(), ids=NORMALIZERS)


@every_normalizer
def test_many_close_scores_keep_their_relative_precision_in_fp32(normalizer, expected):
    scores = 1e-5 * draw(8, 4096).float()  # weights near 1/4096: an absolute error of 1e-7 would be 4e-4 of them
    weights = normalizer(scores).double()
    torch.testing.assert_close(weights, expected(scores.double(), dim=-1), atol=0, rtol=1e-5)


@every_normalizer
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_weights_equal_the_entmax_package(normalizer, expected, rows):
    torch.testing.assert_close(normalizer(rows), expected(rows, dim=-1), atol=1e-9, rtol=0)
    narrow = rows.float()
    weights = normalizer(narrow)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), expected(narrow.double(), dim=-1), atol=1e-5, rtol=0)


@every_normalizer
@pytest.mark.parametrize("rows", [ROWS[name] for name in SMOOTH_ROWS], ids=SMOOTH_ROWS)
def test_gradients_equal_the_entmax_package(normalizer, expected, rows):
    pull = draw(*rows.shape, seed=2)
    got, wanted = (
        torch.autograd.grad((function(leaf, dim=-1) * pull).sum(), leaf)[0]
        for function, leaf in ((normalizer, rows.clone().requires_grad_()), (expected, rows.clone().requires_grad_()))
    )
    torch.testing.assert_close(got, wanted, atol=1e-8, rtol=1e-8)


@every_normalizer
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_are_non_negative_and_sum_to_1(normalizer, expected, rows, dtype):
    weights = normalizer(rows.to(dtype))
    assert (weights >= 0).all()
    assert (weights.double().sum(-1) - 1).abs().max() < 4 * torch.finfo(dtype).eps


@every_normalizer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_forbidden_entries_get_weight_and_gradient_exactly_0(normalizer, expected, dtype):
    scores = draw(6, 17).to(dtype)
    allowed = draw(6, 17, seed=3) > 0
    allowed[:, 0] = True
    allowed[0, 1:] = False
    scores.masked_fill_(~allowed, -INF).requires_grad_()
    pull = draw(6, 17, seed=4).to(dtype)
    weights = normalizer(scores)
    (grad,) = torch.autograd.grad((weights * pull).sum(), scores)
    assert (weights[~allowed] == 0).all()
    assert (grad[~allowed] == 0).all()
    # What is left is what the row would be without the forbidden entries.
    for row in range(6):
        kept = scores[row, allowed[row]].detach().double().requires_grad_()
        wanted = expected(kept, dim=-1)
        (wanted_grad,) = torch.autograd.grad((wanted * pull[row, allowed[row]]).sum(), kept)
        tolerance = {"atol": 1e-9 if dtype == torch.float64 else 1e-5, "rtol": 0, "check_dtype": False}
        torch.testing.assert_close(weights[row, allowed[row]], wanted, **tolerance)
        torch.testing.assert_close(grad[row, allowed[row]], wanted_grad, **tolerance)


@every_normalizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["normal", "times 100", "ties", "all equal", "spread of 1e4", "long", "length 1"])
def test_half_precision_rounds_only_what_goes_in_and_what_comes_out(normalizer, expected, dtype, name):
    scores = ROWS[name].to(dtype)
    wanted = expected(scores.double(), dim=-1)
    scores = torch.cat([scores, torch.full_like(scores, -INF)], -1).requires_grad_()
    weights = normalizer(scores)
    (grad,) = torch.autograd.grad((weights * torch.linspace(0, 1, scores.shape[-1], dtype=dtype)).sum(), scores)
    assert weights.dtype == grad.dtype == dtype
    assert grad.isfinite().all()
    allowed, forbidden = weights.chunk(2, -1)
    assert (forbidden == 0).all()
    # One rounding to the nearest: half a unit in the last place, and fp32's own error.
    torch.testing.assert_close(allowed.double(), wanted, rtol=torch.finfo(dtype).eps / 2 + 1e-5, atol=1e-5)


@every_normalizer
def test_autocast_does_not_change_fp32_results(normalizer, expected):
    scores = draw(4, 33).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = normalizer(scores)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, normalizer(scores))


@every_normalizer
@pytest.mark.parametrize("dim", [0, 1, -2, 2, -1])
def test_any_dimension_can_be_normalized(normalizer, expected, dim):
    scores = draw(3, 4, 5)
    torch.testing.assert_close(normalizer(scores, dim=dim), expected(scores, dim=dim), atol=1e-9, rtol=0)


@every_normalizer
def test_shifting_the_scores_changes_nothing(normalizer, expected):
    scores = draw(4, 33)
    shift = torch.tensor([-1e3, -1.0, 7.0, 1e3], dtype=torch.float64)[:, None]
    torch.testing.assert_close(normalizer(scores + shift), normalizer(scores), atol=1e-10, rtol=0)


@every_normalizer
def test_gradcheck_to_scores(normalizer, expected):
    assert gradcheck(normalizer, draw(4, 6).requires_grad_())


# Shapes that broadcast over scores of (B, H, N, N): one α, one per head, per batch and head, per row.
@pytest.mark.parametrize("shape", [(), (1,), (3, 1, 1), (2, 3, 1, 1), (2, 3, 4, 1)])
def test_alpha_tensor_gives_the_weights_and_gradients_of_the_entmax_package(shape):
    scores = 2 * draw(2, 3, 4, 9)
    alpha = 1.02 + 0.97 * torch.rand(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    pull = draw(2, 3, 4, 9, seed=6)
    results = []
    for function in (entmax, reference):
        leaves = scores.clone().requires_grad_(), alpha.clone().requires_grad_()
        # Broadcast outside of the package, so that autograd sums over the broadcast dimensions.
        given = leaves[1] if function is entmax else leaves[1].expand(2, 3, 4, 1)
        weights = function(leaves[0], given)
        results.append((weights, *torch.autograd.grad((weights * pull).sum(), leaves)))
    (weights, *grads), (wanted, *wanted_grads) = results
    torch.testing.assert_close(weights, wanted, atol=1e-9, rtol=0)
    assert grads[1].shape == shape
    torch.testing.assert_close(grads, wanted_grads, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_alpha_tensor_equals_the_number(alpha):
    scores = draw(4, 33)
    torch.testing.assert_close(entmax(scores, torch.tensor([alpha])), entmax(scores, alpha), atol=1e-7, rtol=0)


@pytest.mark.parametrize("dim", [0, 1, -2, -1])
def test_alpha_tensor_follows_the_dimension(dim):
    scores = draw(3, 4, 5)
    shape = [3, 4, 5]
    shape[dim] = 1
    alpha = torch.linspace(1.1, 2.0, torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    torch.testing.assert_close(entmax(scores, alpha, dim=dim), reference(scores, alpha, dim), atol=1e-9, rtol=0)


def test_gradcheck_to_alpha_per_head():
    # Three heads share the scores' rows; entries forbidden, in the support and out of it.
    scores = (2 * draw(2, 3, 2, 5)).requires_grad_()
    forbidden = torch.zeros(2, 5, dtype=torch.bool)
    forbidden[0, 3:] = True
    alpha = torch.tensor([1.1, 1.5, 1.9], dtype=torch.float64).reshape(3, 1, 1).requires_grad_()
    assert gradcheck(lambda x, a: entmax(x.masked_fill(forbidden, -INF), a), (scores, alpha))


def test_alpha_gradient_keeps_the_dtype_of_alpha():
    alpha = torch.full((3, 1, 1), 1.4, requires_grad=True)
    weights = entmax(draw(2, 3, 4, 4).bfloat16(), alpha)
    (weights**2).sum().backward()
    assert weights.dtype == torch.bfloat16
    assert alpha.grad.dtype == torch.float32
    assert (alpha.grad > 0).all()  # a larger α is sparser, so the weights' squares grow


@pytest.mark.parametrize("as_tensor", [False, True])
def test_entmax_approaches_softmax_as_alpha_approaches_1(as_tensor):
    scores = draw(8, 17)
    errors = []
    for distance in (1e-2, 1e-3, 1e-4):
        alpha = torch.tensor([1 + distance], dtype=torch.float64) if as_tensor else 1 + distance
        errors.append(float((entmax(scores, alpha) - torch.softmax(scores, -1)).abs().max()))
    assert 0 < errors[2] < 1e-3
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)  # linear in α - 1
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.1)


def test_entmax_with_alpha_2_is_the_projection_onto_the_simplex():
    scores = torch.tensor([[0.5, 0.3, -2.0], [4.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    wanted = torch.tensor([[0.6, 0.4, 0.0], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    torch.testing.assert_close(entmax(scores, 2.0), wanted)
    torch.testing.assert_close(sparsemax(scores), wanted)


@pytest.mark.parametrize("alpha", [1, 1.0, 0.5, 0, -1.5, 2.0001, INF, float("nan"), True, "1.5", None])
def test_alpha_outside_its_range_is_refused_by_value(alpha):
    with pytest.raises(ValueError, match=r"alpha must lie in \(1, 2\]") as error:
        entmax(draw(2, 3), alpha)
    assert repr(alpha) in str(error.value)


# What users of other libraries expect of such functions


SMOOTH = {
    "softmax": softmax,
    "sparsemax": sparsemax,
    "entmax15": entmax15,
    "entmax 1.3": lambda scores: entmax(scores, 1.3),
    "entmax tensor": lambda scores: entmax(scores, torch.tensor(1.3, dtype=torch.float64)),
}
every_smooth = pytest.mark.parametrize("normalizer", SMOOTH.values(), ids=SMOOTH)


def jacobian(function, x: torch.Tensor, step: float = 1e-6) -> torch.Tensor:
    """By central differences: (out, in)."""
    nudges = step * torch.eye(len(x), dtype=x.dtype)
    return torch.stack([(function(x + nudge) - function(x - nudge)) / (2 * step) for nudge in nudges], 1)


@every_smooth
def test_forward_and_reverse_mode_are_the_jacobian(normalizer):
    x = draw(7)
    wanted = jacobian(normalizer, x)
    for derivative in (torch.func.jacfwd, torch.func.jacrev):
        torch.testing.assert_close(derivative(normalizer)(x), wanted, atol=1e-8, rtol=0)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, draw(7, seed=1))
        tangent = torch.autograd.forward_ad.unpack_dual(normalizer(dual)).tangent
    torch.testing.assert_close(tangent, wanted @ draw(7, seed=1), atol=1e-8, rtol=0)


def test_forward_mode_goes_to_alpha():
    x, alpha = draw(3, 7), torch.tensor([1.2, 1.5, 1.9], dtype=torch.float64)[:, None]
    _, slope = torch.func.jvp(lambda a: entmax(x, a), (alpha,), (torch.ones_like(alpha),))
    wanted = (entmax(x, alpha + 1e-6) - entmax(x, alpha - 1e-6)) / 2e-6
    torch.testing.assert_close(slope, wanted, atol=1e-7, rtol=0)
    _, both = torch.func.jvp(entmax, (x, alpha), (draw(3, 7, seed=1), torch.ones_like(alpha)))
    _, alone = torch.func.jvp(lambda x: entmax(x, alpha), (x,), (draw(3, 7, seed=1),))
    torch.testing.assert_close(both, alone + slope, atol=1e-12, rtol=0)


@every_smooth
def test_second_derivatives_by_every_way(normalizer):
    x = draw(6).requires_grad_()
    assert gradgradcheck(normalizer, x)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (normalizer(x) ** 2 * torch.arange(6)).sum()

    wanted = jacobian(torch.func.grad(loss), x.detach())
    for hessian in (torch.func.hessian(loss), torch.func.jacrev(torch.func.jacrev(loss))):
        torch.testing.assert_close(hessian(x.detach()), wanted, atol=1e-7, rtol=0)


def test_second_derivatives_to_alpha():
    leaves = draw(3, 6).requires_grad_(), torch.tensor([[1.2], [1.5], [1.9]], dtype=torch.float64).requires_grad_()
    assert gradgradcheck(entmax, leaves)


@every_smooth
def test_vmap_is_a_loop(normalizer):
    x = draw(4, 3, 6)
    torch.testing.assert_close(torch.func.vmap(normalizer)(x), normalizer(x), atol=0, rtol=0)
    torch.testing.assert_close(torch.func.vmap(normalizer, in_dims=1)(x), normalizer(x.movedim(1, 0)), atol=0, rtol=0)
    grads = torch.func.vmap(torch.func.grad(lambda row: (normalizer(row) ** 2).sum()))(x[0])
    leaf = x[0].clone().requires_grad_()
    torch.testing.assert_close(grads, torch.autograd.grad((normalizer(leaf) ** 2).sum(), leaf)[0], atol=1e-12, rtol=0)


def test_vmap_goes_over_alphas():
    x, alphas = draw(5), torch.tensor([1.2, 1.5, 2.0], dtype=torch.float64)
    found = torch.func.vmap(lambda alpha: entmax(x, alpha))(alphas)
    wanted = torch.stack([entmax(x, float(alpha)) for alpha in alphas])
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


@every_normalizer
def test_no_rows_give_no_rows(normalizer, expected):
    for shape in ((0, 5), (2, 0, 5)):
        leaf = torch.zeros(shape, requires_grad=True)
        weights = normalizer(leaf)
        assert weights.shape == shape
        weights.sum().backward()
        assert leaf.grad.shape == shape


@every_normalizer
def test_integer_scores_are_computed_in_fp32(normalizer, expected):
    scores = torch.tensor([[3, 1, 2], [0, 0, 5]])
    weights = normalizer(scores)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), expected(scores.double(), dim=-1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("scores", [torch.tensor(1.0), torch.zeros(3, 0)])
@pytest.mark.parametrize("normalizer", [sparsemax, entmax15, entmax])
def test_nothing_to_normalize_is_refused_in_one_line(normalizer, scores):
    with pytest.raises(ValueError, match="scores need at least one entry in dim=-1, not the shape"):
        normalizer(scores)


def test_numbers_of_numpy_are_alphas():
    scores = draw(2, 5)
    for alpha in (np.float32(1.5), np.float64(1.5)):
        assert torch.equal(entmax(scores, alpha), entmax15(scores))
    assert torch.equal(entmax(scores, np.int64(2)), sparsemax(scores))


@pytest.mark.parametrize("alpha", [1.0, 0.5, 2.5, float("nan")])
@pytest.mark.parametrize("shape", [(), (1,), (2, 1)])
def test_values_of_a_tensor_alpha_are_looked_at(alpha, shape):
    given = torch.full(shape, 1.5)
    given.view(-1)[-1] = alpha
    with pytest.raises(ValueError, match=r"alpha must lie in \(1, 2\], not (1.0|0.5|2.5|nan);"):
        entmax(draw(2, 5), given)
    with pytest.raises(ValueError, match=r"alpha must lie in \(1, 2\]"):
        attention(*(draw(1, 1, 4, 2) for _ in range(3)), normalizer="entmax", alpha=given.view(-1)[-1:])


def test_values_that_are_not_at_hand_are_not_looked_at():
    with FakeTensorMode():
        assert entmax(torch.zeros(2, 5), torch.ones(2, 1)).shape == (2, 5)
