"""α-entmax: softmax (α → 1), entmax15 (α = 1.5) and sparsemax (α = 2) as one family, with exact zeros for α > 1.

p = [(α-1) x - τ]₊^β with β = 1/(α-1), and τ such that Σp = 1 (Peters et al., 2019, arXiv:1905.05702; sparsemax:
Martins & Astudillo, 2016, arXiv:1602.02068; learned α: Correia et al., 2019, arXiv:1909.00015).

Kernels take the excess e = α - 1, whose digits would be lost in an α near 1. Without a sort: with z = e (x - max x),
β = 1/e and w = e max x - τ, the norm ‖[z + w]₊‖_β is convex in w and rises with it, so Newton's method on it from
w = 1, where it is at least 1, comes down to the root without passing it: Michelot's algorithm for e = 1, one exact
step where all scores tie. For e = ½ the quadratic that the current support gives is solved exactly instead, which
needs fewer rounds but has no such proof. An attempt takes as many rounds as most rows need and says how far off it is;
where that is too far, Newton continues from there, in longer attempts.
"""

import math
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, List  # noqa: UP035  # torch.jit reads List

import torch
from torch import Tensor, nn

from vit_attn.attention.compiled import compiled
from vit_attn.attention.graphs import forward_mode, transformed
from vit_attn.attention.mechanism import working_dtype
from vit_attn.attention.normalizers.base import Normalizer, NormalizerCore, Parameter, RowKernel
from vit_attn.attention.normalizers.softmax import Softmax
from vit_attn.attention.options import option, register

# A learned α stays in this range: the gradient to α divides by (α-1)².
ALPHA_MIN, ALPHA_MAX = 1.01, 2.0


class EntmaxKernel(RowKernel):
    """α-entmax; the parameter is the excess: ½ or 1 as a float, anything else as data.

    Rounds: 3 to 9 are usual, and rounding can keep a sum from its tolerance. Where α is data, a round costs a
    logarithm and an exponential per entry.
    """

    attempts = (None, 8, 32)
    first_rounds = {0.5: 5, 1.0: 7}  # noqa: RUF012
    first_rounds_of_data = 5

    def parameter(self, number: float | Tensor, like: Tensor) -> Parameter:
        if isinstance(number, Tensor):
            return number.to(like.dtype) - 1
        return number - 1.0 if number in (1.5, 2.0) else like.new_full((1, 1), number - 1.0)

    def attempt(
        self, x: Tensor, parameter: Parameter, rounds: int | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        e, w = parameter, state
        z = (x - x.amax(-1, keepdim=True)) * e
        if w is None:
            w = torch.ones_like(z[..., :1]) if isinstance(e, float) else _upper_bound(z, e)
        if isinstance(e, float) and e == 0.5 and rounds is None:
            for _ in range(self.first_rounds[e]):
                # Σ_S (z + w)² = 1 on the support S as it is
                u = (z + w).clamp_min(0)
                size, total = (u > 0).to(u.dtype).sum(-1, keepdim=True), u.sum(-1, keepdim=True)
                over = (u * u).sum(-1, keepdim=True) - 1
                w = w - over / (total + (total * total - size * over).clamp_min(0).sqrt())
        else:
            if rounds is None:
                rounds = self.first_rounds[e] if isinstance(e, float) else self.first_rounds_of_data
            for _ in range(rounds):
                p, slope = _powers((z + w).clamp_min(0), e)
                total = p.sum(-1, keepdim=True)
                # Newton on ‖u‖_β - 1; Σp - (Σp)^(1-1/β) = Σp·(1 - Σp^(-1/β)), written so that it is exact near Σp = 1.
                w = (w + total * torch.expm1(-total.log() * e) / slope.sum(-1, keepdim=True)).clamp_max(1)
        p, _ = _powers((z + w).clamp_min(0), e)
        total = p.sum(-1, keepdim=True)
        return p / total, w, (total - 1).abs().amax()

    def scores_gradient(self, p: Tensor, g: Tensor, parameter: Parameter) -> Tensor:
        s = _sensitivity(p, parameter)
        sg = s * g
        return sg - s * (sg.sum(-1, keepdim=True) / s.sum(-1, keepdim=True))

    def parameter_gradient(self, p: Tensor, g: Tensor, parameter: Tensor) -> Tensor:
        return (g * _rate(p, parameter)).sum(-1, keepdim=True)


def _upper_bound(z: Tensor, e: Tensor) -> Tensor:
    """A w that is not below the root: 1, or n^(-e) less the mean of the n scores above -1, which alone can count.

    That is the power mean inequality, and close where scores are.
    """
    near = z > -1
    size = near.to(z.dtype).sum(-1, keepdim=True)
    mean = torch.where(near, z, 0).sum(-1, keepdim=True) / size
    return (torch.exp(-size.log() * e) - mean).clamp_max(1)


def _powers(u: Tensor, e: Parameter) -> tuple[Tensor, Tensor]:
    """Compute u^β and u^(β-1) of u >= 0, exactly 0 where u is 0."""
    if isinstance(e, float):
        return (u, (u > 0).to(u.dtype)) if e == 1.0 else (u * u, u)
    tiny = u.clamp_min(torch.finfo(u.dtype).tiny)
    p = torch.where(u > 0, torch.exp(tiny.log() / e), 0)
    # u^0 is 1 outside the support too (β = 1), hence the mask.
    return p, torch.where(u > 0, p / tiny, 0)


def _sensitivity(p: Tensor, e: Parameter) -> Tensor:
    """Compute p^(2-α) on the support, 0 elsewhere."""
    if isinstance(e, float):
        return (p > 0).to(p.dtype) if e == 1.0 else p.sqrt()
    return torch.where(p > 0, torch.exp((1 - e) * p.clamp_min(torch.finfo(p.dtype).tiny).log()), 0)


def _rate(p: Tensor, e: Tensor) -> Tensor:
    """The derivative of weights p to each row's α: Correia et al., 2019, arXiv:1909.00015, proposition 1."""
    s = _sensitivity(p, e)
    share = s / s.sum(-1, keepdim=True)
    plogp = p * p.clamp_min(torch.finfo(p.dtype).tiny).log()
    entropy = plogp.sum(-1, keepdim=True)
    return (p - share) / e**2 - (plogp - share * entropy) / e


KERNEL = EntmaxKernel()
_attempt_rows = compiled(KERNEL.attempt)
_scores_gradient_rows = compiled(KERNEL.scores_gradient)
_alpha_gradient_rows = compiled(KERNEL.parameter_gradient)


def converged(error: Tensor) -> bool:
    """Whether an attempt's rows sum to 1 up to rounding; waits for the device."""
    # NaN is not: it may come of one row and hide the others.
    return bool(error <= 32 * torch.finfo(error.dtype).eps)


def normalize_rows(x: Tensor, e: Parameter) -> Tensor:
    """Weights of each row of scores x (R, K); e is ½, 1, (1, 1) or (R, 1)."""
    p, w = torch.empty_like(x), None
    for rounds in KERNEL.attempts if x.numel() else ():
        p, w, error = _attempt_rows(x, e, rounds, w)
        if converged(error):
            break
    return p


def rows_gradient(p: Tensor, g: Tensor, e: Parameter, to_alpha: bool) -> tuple[Tensor, Tensor]:
    """Gradients to the scores (R, K) of rows with weights p, and to α (R, 1), empty unless asked for."""
    d_alpha = p.new_empty(0)
    if to_alpha:
        assert isinstance(e, Tensor)
        d_alpha = _alpha_gradient_rows(p, g, e)
    return _scores_gradient_rows(p, g, e), d_alpha


def _excess(alpha: float, alphas: Tensor | None, like: Tensor) -> Parameter:
    return KERNEL.parameter(alpha if alphas is None else alphas, like)


# Custom operators, so that torch.compile sees one node where kernels stop at a convergence that depends on the data.


@torch.library.custom_op("vit_attn::entmax", mutates_args=())
def _entmax(x: Tensor, alpha: float, alphas: Tensor | None) -> Tensor:
    """Rows x (R, K) to weights; ``alphas`` (R, 1) stands in for ``alpha``."""
    return normalize_rows(x, _excess(alpha, alphas, x))


@_entmax.register_fake
def _(x: Tensor, alpha: float, alphas: Tensor | None) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("vit_attn::entmax_backward", mutates_args=())
def _entmax_backward(p: Tensor, g: Tensor, alpha: float, alphas: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients to x (R, K) and to ``alphas`` (R, 1), empty without."""
    return rows_gradient(p, g.contiguous(), _excess(alpha, alphas, p), to_alpha=alphas is not None)


@_entmax_backward.register_fake
def _(p: Tensor, g: Tensor, alpha: float, alphas: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(p), p.new_empty(0) if alphas is None else torch.empty_like(alphas)


def _fold(info: Any, in_dims: tuple[Any, ...], *tensors: Tensor | None) -> list[Tensor | None]:
    """Rows (R, …) of each of the batch that vmap goes over, as more rows."""
    rows: list[Tensor | None] = []
    for x, dim in zip(tensors, in_dims, strict=True):
        if x is not None:
            x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            x = x.flatten(0, 1)
        rows.append(x)
    return rows


@_entmax.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], x: Tensor, alpha: float, alphas: Tensor | None) -> tuple[Tensor, int]:
    rows, numbers = _fold(info, (in_dims[0], in_dims[2]), x, alphas)
    assert rows is not None
    return _entmax(rows, alpha, numbers).unflatten(0, (info.batch_size, -1)), 0


@_entmax_backward.register_vmap
def _(
    info: Any, in_dims: tuple[Any, ...], p: Tensor, g: Tensor, alpha: float, alphas: Tensor | None
) -> tuple[tuple[Tensor, Tensor], tuple[int, int | None]]:
    weights, gradients, numbers = _fold(info, (*in_dims[:2], in_dims[3]), p, g, alphas)
    d_x, d_alphas = _entmax_backward(weights, gradients, alpha, numbers)
    d_x = d_x.unflatten(0, (info.batch_size, -1))
    if numbers is None:
        return (d_x, d_alphas), (0, None)
    return (d_x, d_alphas.unflatten(0, (info.batch_size, -1))), (0, 0)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.alpha, alphas = inputs
    ctx.save_for_backward(output, alphas)
    ctx.save_for_forward(output, alphas)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, Tensor | None]:
    p, alphas = ctx.saved_tensors
    if torch.is_grad_enabled() or forward_mode():  # a derivative of this one may be asked for
        d_alphas = None if alphas is None else (g * _rate(p, alphas - 1)).sum(-1, keepdim=True)
        return _jacobian_product(p, g, _excess(ctx.alpha, alphas, p)), None, d_alphas
    d_x, d_alphas = _entmax_backward(p, g, ctx.alpha, alphas)
    return d_x, None, None if alphas is None else d_alphas


def _jacobian_product(p: Tensor, g: Tensor, e: Parameter) -> Tensor:
    """The Jacobian of rows with weights p, which is symmetric, times g; can be differentiated itself."""
    inside = p > 0
    # The root of 0 has no derivative, and 0 · inf is no gradient.
    s = inside * _sensitivity(torch.where(inside, p, 1), e)
    sg = s * g
    return sg - s * (sg.sum(-1, keepdim=True) / s.sum(-1, keepdim=True))


_entmax.register_autograd(_backward, setup_context=_save_for_backward)


class _Entmax(torch.autograd.Function):
    """The operator where it is ``transformed``."""

    generate_vmap_rule = True
    setup_context = staticmethod(_save_for_backward)
    backward = staticmethod(_backward)

    @staticmethod
    def forward(x: Tensor, alpha: float, alphas: Tensor | None) -> Tensor:
        return _entmax(x, alpha, alphas)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, _: None, d_alphas: Tensor | None) -> Tensor:
        p, alphas = ctx.saved_tensors
        tangent = torch.zeros_like(p) if dx is None else _jacobian_product(p, dx, _excess(ctx.alpha, alphas, p))
        return tangent if d_alphas is None else tangent + _rate(p, alphas - 1) * d_alphas


def sparsemax(scores: Tensor, dim: int = -1) -> Tensor:
    """Sparsemax, the Euclidean projection onto the simplex: entmax with α = 2."""
    return entmax(scores, 2.0, dim)


def entmax15(scores: Tensor, dim: int = -1) -> Tensor:
    """1.5-entmax."""
    return entmax(scores, 1.5, dim)


def entmax(scores: Tensor, alpha: float | Tensor = 1.5, dim: int = -1) -> Tensor:
    """α-entmax over ``dim``, exact, with gradients to the scores and to ``alpha``.

    Derivatives of any order, forward and reverse, and ``torch.func``'s transforms.

    Args:
        scores: any shape of at least one dimension; -inf marks forbidden entries, of which no row may consist.
        alpha: in (1, 2], a number or a tensor that broadcasts with ``scores`` and has size 1 in ``dim``
            (one per head: shape (H, 1, 1) for scores (B, H, N, N)).
        dim: the dimension that sums to 1.

    Returns:
        The shape of ``scores`` in their dtype; fp32 of integers.

    Raises:
        ValueError: ``alpha`` outside (1, 2], of which a tensor's values are looked at on the CPU alone, because that
            would wait for a GPU; or no entries to normalize.
    """
    check_alpha(alpha)
    if scores.dim() == 0 or scores.shape[dim] == 0:
        raise ValueError(f"scores need at least one entry in dim={dim}, not the shape {tuple(scores.shape)}")
    return _normalized(scores, alpha, dim)


def _normalized(scores: Tensor, alpha: float | Tensor, dim: int = -1) -> Tensor:
    dtype = scores.dtype if scores.is_floating_point() else torch.float32
    scores = scores.movedim(dim, -1)
    rows = scores.to(working_dtype(dtype)).reshape(-1, scores.shape[-1])
    alphas = None
    if isinstance(alpha, Tensor):
        alpha = alpha.to(rows.dtype).expand([1] * (scores.dim() - alpha.dim()) + list(alpha.shape)).movedim(dim, -1)
        alphas = alpha.expand(*scores.shape[:-1], 1).reshape(-1, 1)
    number = 1.5 if alphas is not None else float(alpha)
    weights = (_Entmax.apply if transformed() else _entmax)(rows, number, alphas)
    return weights.view(scores.shape).to(dtype).movedim(-1, dim)


def check_alpha(alpha: float | Tensor, name: str = "") -> None:
    """Refuse an α that entmax has no meaning for here.

    Args:
        name: in front of the message.

    Raises:
        ValueError: α outside (1, 2].
    """
    if isinstance(alpha, Tensor):
        shown = _outside(alpha)
    else:
        number = isinstance(alpha, Real) and not isinstance(alpha, bool)
        shown = None if number and 1 < alpha <= 2 else repr(alpha)
    if shown is not None:
        raise ValueError(f"{name}alpha must lie in (1, 2], not {shown}; alpha = 1 is the softmax normalizer")


def _outside(alpha: Tensor) -> str | None:
    """The first value outside of (1, 2] of a tensor whose values are at hand; None where there is none."""
    if alpha.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    try:
        values = alpha.detach().flatten()
        wrong = values[~((values > 1) & (values <= 2))]
        return str(wrong[0].item()) if len(wrong) else None
    except RuntimeError:  # vmap's values, and those of a fake tensor, are not at hand
        return None


def _option(name: str, value: Any) -> float:
    check_alpha(value, "" if name == "alpha" else f"{name}: ")
    return float(value)


class AlphaCore(NormalizerCore):
    """α of one layer where it moves: learned per head, or annealed."""

    if TYPE_CHECKING:  # torch.jit would read them
        normalizer: "Entmax"
        annealed_alpha: Tensor | None

    def __init__(self, normalizer: "Entmax", num_heads: int) -> None:
        super().__init__(normalizer)
        self.register_parameter("alpha_logit", None)
        self.register_buffer("annealed_alpha", None)
        if normalizer.learnable_alpha:
            # Short of the ends, where the sigmoid has no gradient.
            share = min(max((normalizer.alpha - ALPHA_MIN) / (ALPHA_MAX - ALPHA_MIN), 0.01), 0.99)
            self.alpha_logit = nn.Parameter(torch.full((num_heads,), math.log(share / (1 - share))))
        elif normalizer.anneal_alpha_from is not None:
            # A buffer, so that checkpoints have it and a new value is no new constant to torch.compile; of every
            # head, as a learned one is, so that what reads or draws α knows one shape.
            self.annealed_alpha = torch.full((num_heads,), normalizer.anneal_alpha_from)

    def number(self) -> float | Tensor:
        """α: a number, or (H,): in (1.01, 2) where it is learned, as it stands where it is annealed."""
        if self.alpha_logit is not None:
            logit = self.alpha_logit.to(working_dtype(self.alpha_logit.dtype))
            return ALPHA_MIN + (ALPHA_MAX - ALPHA_MIN) * logit.sigmoid()
        if self.annealed_alpha is not None:
            return self.annealed_alpha.to(working_dtype(self.annealed_alpha.dtype))
        return super().number()

    def scalars(self) -> dict[str, Tensor]:
        number = self.number()
        return {"alpha": number} if isinstance(number, Tensor) else {}

    @torch.no_grad()
    def anneal(self, progress: float) -> None:
        """Move an annealed α to this share, from 0 to 1, of the way to ``alpha``; not between forward and backward."""
        start = self.normalizer.anneal_alpha_from
        assert self.annealed_alpha is not None
        assert start is not None
        assert 0 <= progress <= 1
        # Exact at both ends.
        self.annealed_alpha.fill_((1 - progress) * start + progress * self.normalizer.alpha)

    def settled(self) -> bool:
        return self.annealed_alpha is None or bool((self.annealed_alpha == self.normalizer.alpha).all())

    def inherits(self, name: str) -> bool:
        # Where α had come to is the source's: a model that anneals starts where its own option says.
        return name != "annealed_alpha"

    def tensors(self) -> List[Tensor]:  # noqa: UP006
        found: List[Tensor] = []  # noqa: UP006
        if self.alpha_logit is not None:
            found.append(self.alpha_logit)
        if self.annealed_alpha is not None:
            found.append(self.annealed_alpha)
        return found


def annealing_cores(model: nn.Module) -> list[AlphaCore]:
    """List what holds an annealed α in ``model``, in order of depth."""
    return [each for each in model.modules() if isinstance(each, AlphaCore) and each.annealed_alpha is not None]


@register
@dataclass(frozen=True, kw_only=True)
class Entmax(Normalizer):
    """α-entmax with any α in (1, 2], fixed, learned per head or annealed."""

    name = "entmax"
    kernel = KERNEL

    alpha: float = option(1.5, check=_option, help="α in (1, 2]; where it is learned, its start; default 1.5")
    learnable_alpha: bool = option(False, help="learn one α per head and layer")
    anneal_alpha_from: float | None = option(check=_option, help="where α starts, to end at alpha; default: it stays")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learnable_alpha and self.anneal_alpha_from is not None:
            raise ValueError(
                f"anneal_alpha_from={self.anneal_alpha_from} and learnable_alpha=true exclude each other: choose one"
            )

    def number(self) -> float:
        return self.alpha

    def weights(self, scores: Tensor, number: float | Tensor) -> Tensor:
        return _normalized(scores, number[:, None, None] if isinstance(number, Tensor) else number)

    def build(self, num_heads: int) -> NormalizerCore:
        return AlphaCore(self, num_heads)


@register
@dataclass(frozen=True, kw_only=True)
class Entmax15(Normalizer):
    """α-entmax with α = 1.5."""

    name = "entmax15"
    kernel = KERNEL

    def number(self) -> float:
        return 1.5

    def weights(self, scores: Tensor, number: float | Tensor) -> Tensor:
        return _normalized(scores, number)


@register
@dataclass(frozen=True, kw_only=True)
class Sparsemax(Entmax15):
    """The Euclidean projection of the scores onto the simplex: α-entmax with α = 2."""

    name = "sparsemax"

    def number(self) -> float:
        return 2.0


def alpha_of(normalizer: Normalizer) -> float | None:
    """The α of a normalizer of this family, softmax's 1 included; None for another one."""
    if isinstance(normalizer, Softmax):
        return 1.0
    return normalizer.number() if isinstance(normalizer, (Entmax, Entmax15)) else None
