"""Softmax: every allowed entry gets a weight above 0."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vit_attn.attention.mechanism import working_dtype
from vit_attn.attention.normalizers.base import Normalizer, Parameter, RowKernel
from vit_attn.attention.options import register


def softmax(scores: Tensor, dim: int = -1) -> Tensor:
    """Softmax over ``dim`` in fp32 or fp64; weights in the scores' dtype, of integer scores in fp32."""
    weights = torch.softmax(scores, dim, dtype=working_dtype(scores.dtype))
    return weights.to(scores.dtype) if scores.is_floating_point() else weights


class SoftmaxKernel(RowKernel):
    """exp(x - max x), divided by its sum."""

    def attempt(
        self, x: Tensor, parameter: Parameter, rounds: int | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return x.softmax(-1), x.new_zeros(()), x.new_zeros(())

    def scores_gradient(self, p: Tensor, g: Tensor, parameter: Parameter) -> Tensor:
        pg = p * g
        return pg - p * pg.sum(-1, keepdim=True)


@register
@dataclass(frozen=True, kw_only=True)
class Softmax(Normalizer):
    """Softmax: exp(x) divided by its sum."""

    name = "softmax"
    kernel = SoftmaxKernel()

    def weights(self, scores: Tensor, number: float | Tensor) -> Tensor:
        return softmax(scores)
