"""What a normalizer is: a rule from a row of scores to weights, with the kernel that the sparse engine runs.

The arithmetic is fp32 (fp64 for fp64 scores) whatever autocast says. A score of -inf is a forbidden entry: its weight
and its gradient are exactly 0.

A new normalizer is one file with one registered subclass of :class:`Normalizer`; its fields are its options.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vit_attn.attention.mechanism import LayerModule
from vit_attn.attention.options import Named, new_registry

# What a kernel needs beside the scores. A float where it has lines of its own for that number; otherwise data, which
# broadcasts to the rows.
Parameter = float | Tensor


class RowKernel:
    """Rows of scores (…, K) to weights (…, K), and the gradients; what ``torch.compile`` fuses into the engine.

    A forbidden entry is a score of :func:`lowest`, or -inf: its weight is exactly 0, and so is its gradient.

    Attributes:
        attempts: numbers of rounds for :meth:`attempt`, one after the other until the rows have converged. A kernel
            with one never waits for the device.
    """

    attempts: ClassVar[tuple[int | None, ...]] = (None,)

    def parameter(self, number: float | Tensor, like: Tensor) -> Parameter:
        """What the kernel takes, of the normalizer's number, or of numbers of any shape; in the dtype of ``like``."""
        return 0.0

    def attempt(
        self, x: Tensor, parameter: Parameter, rounds: int | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weights of scores x (…, K).

        Args:
            rounds: of an iteration; None: those of a first attempt.
            state: (…, 1) to continue from.

        Returns:
            Weights, the state reached, and the largest distance of a row from what it should be, a scalar.
        """
        raise NotImplementedError

    def scores_gradient(self, p: Tensor, g: Tensor, parameter: Parameter) -> Tensor:
        """Gradient to the scores of rows with weights p, given that to the weights; all (…, K)."""
        raise NotImplementedError

    def parameter_gradient(self, p: Tensor, g: Tensor, parameter: Tensor) -> Tensor:
        """Gradient to each row's number, (…, 1)."""
        raise NotImplementedError


NORMALIZERS: dict[str, type["Normalizer"]] = new_registry()


@dataclass(frozen=True, kw_only=True)
class Normalizer(Named):
    """A rule from scores to weights.

    Attributes:
        kernel: what the sparse engine runs; None: masked dense scores alone.
    """

    registry: ClassVar = NORMALIZERS
    what: ClassVar[str] = "normalizer"
    kernel: ClassVar[RowKernel | None] = None

    def number(self) -> float:
        """What tells it from others of its kernel, such as α; 0 where nothing does."""
        return 0.0

    def weights(self, scores: Tensor, number: float | Tensor) -> Tensor:
        """Weights of scores (B, H, N, K) in fp32 or fp64, over the last dimension.

        Args:
            number: see :meth:`number`; (H,) where each head has its own.
        """
        raise NotImplementedError

    def build(self, num_heads: int) -> "NormalizerCore":
        """What it holds in one layer."""
        return NormalizerCore(self)


class NormalizerCore(LayerModule):
    """A normalizer in one layer, with its parameters and buffers, of which this one has none."""

    def __init__(self, normalizer: Normalizer) -> None:
        super().__init__()
        self.normalizer = normalizer

    def number(self) -> float | Tensor:
        """What the normalizer works with at the moment: a number, or (H,)."""
        return self.normalizer.number()
