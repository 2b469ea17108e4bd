"""Training losses. Each knows the probabilities that belong to it, which is what calibration is measured on."""

import torch.nn.functional as F
from entmax.losses import entmax15_loss, sparsemax_loss
from torch import Tensor, nn

from vit_attn.attention import entmax15, softmax, sparsemax
from vit_attn.attention.mechanism import working_dtype
from vit_attn.errors import UserError


def _wide(logits: Tensor) -> Tensor:
    """Logits in fp32, or fp64 where they are: a loss in half precision would round."""
    return logits.to(working_dtype(logits.dtype))


class CrossEntropy(nn.Module):
    """Cross-entropy with label smoothing, which acts in training only.

    Args:
        label_smoothing: share of the target spread over all classes, in [0, 1).

    Raises:
        UserError: a share outside [0, 1).
    """

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise UserError(f"loss.label_smoothing must lie in [0, 1), not {label_smoothing!r}")
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of logits (B, C) and targets: classes (B,) or shares (B, C)."""
        smoothing = self.label_smoothing if self.training else 0.0
        return F.cross_entropy(_wide(logits), targets, label_smoothing=smoothing)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities (B, C)."""
        return softmax(_wide(logits))


class _FenchelYoung(nn.Module):
    """A Fenchel-Young loss Ω*(x) + Ω(y) - <x, y> of the `entmax` package, for classes and for shares.

    For shares y the part that depends on the scores is that of any one class t plus x_t - <x, y>.
    """

    @staticmethod
    def loss(logits: Tensor, classes: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of logits (B, C) and targets: classes (B,) or shares (B, C), up to a constant Ω(y)."""
        logits = _wide(logits)
        if targets.dim() == 1:
            return self.loss(logits, targets).mean()
        top = targets.argmax(1)
        gap = logits.gather(1, top[:, None])[:, 0] - (logits * targets).sum(1)
        return (self.loss(logits, top) + gap).mean()


class SparsemaxLoss(_FenchelYoung):
    """Sparsemax loss (Martins & Astudillo, 2016, arXiv:1602.02068)."""

    @staticmethod
    def loss(logits: Tensor, classes: Tensor) -> Tensor:
        """Loss (B,) of each example."""
        return sparsemax_loss(logits, classes)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities (B, C), many of them exactly 0."""
        return sparsemax(_wide(logits))


class Entmax15Loss(_FenchelYoung):
    """1.5-entmax loss (Peters et al., 2019, arXiv:1905.05702)."""

    @staticmethod
    def loss(logits: Tensor, classes: Tensor) -> Tensor:
        """Loss (B,) of each example."""
        return entmax15_loss(logits, classes)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities (B, C), some of them exactly 0."""
        return entmax15(_wide(logits))
