"""Losses against the `entmax` package and against their gradient in closed form."""

import pytest
import torch
import torch.nn.functional as F
from entmax import Entmax15Loss as ReferenceEntmax15Loss
from entmax import SparsemaxLoss as ReferenceSparsemaxLoss
from entmax import entmax15, sparsemax

from vit_attn.errors import UserError
from vit_attn.training.losses import CrossEntropy, Entmax15Loss, SparsemaxLoss

LOSSES = [
    (CrossEntropy(), F.cross_entropy, lambda logits: logits.softmax(-1)),
    (SparsemaxLoss(), ReferenceSparsemaxLoss(reduction="elementwise_mean"), lambda logits: sparsemax(logits, dim=-1)),
    (Entmax15Loss(), ReferenceEntmax15Loss(reduction="elementwise_mean"), lambda logits: entmax15(logits, dim=-1)),
]
losses = pytest.mark.parametrize(
    ("loss", "reference", "probabilities"), LOSSES, ids=["softmax", "sparsemax", "entmax15"]
)


def example(batch=7, classes=5, scale=2.0):
    generator = torch.Generator().manual_seed(3)
    logits = (scale * torch.randn(batch, classes, generator=generator)).requires_grad_()
    return (
        logits,
        torch.randint(classes, (batch,), generator=generator),
        torch.rand(batch, classes, generator=generator),
    )


@losses
def test_class_targets_give_the_reference_loss_and_its_gradient(loss, reference, probabilities):
    logits, classes, _ = example()
    ours, theirs = loss(logits, classes), reference(logits, classes)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (ours, theirs)))
    assert ours > 0


@losses
def test_gradient_for_shares_is_probabilities_minus_shares_over_the_batch(loss, reference, probabilities):
    logits, _, shares = example()
    shares = shares / shares.sum(1, keepdim=True)
    (gradient,) = torch.autograd.grad(loss(logits, shares), logits)
    torch.testing.assert_close(gradient, (probabilities(logits.detach()) - shares) / len(logits), atol=1e-6, rtol=0)


@losses
def test_one_hot_shares_are_the_class(loss, reference, probabilities):
    logits, classes, _ = example()
    torch.testing.assert_close(loss(logits, F.one_hot(classes, 5).float()), loss(logits, classes))


@losses
def test_probabilities_are_those_of_the_loss(loss, reference, probabilities):
    logits, _, _ = example()
    ours = loss.probabilities(logits.half())
    torch.testing.assert_close(ours, probabilities(logits.half().float()))
    assert ours.dtype == torch.float32


@pytest.mark.parametrize("loss", [SparsemaxLoss(), Entmax15Loss()], ids=["sparsemax", "entmax15"])
def test_sparse_losses_are_exactly_zero_where_the_right_class_leads_by_far(loss):
    logits = torch.tensor([[9.0, 0.0, 0.0]])
    assert loss(logits, torch.tensor([0])).item() == 0
    assert (loss.probabilities(logits) == 0).sum() == 2


def test_label_smoothing_acts_in_training_only():
    logits, classes, _ = example()
    loss = CrossEntropy(label_smoothing=0.2)
    log = logits.log_softmax(-1)
    right = log.gather(1, classes[:, None])[:, 0]
    torch.testing.assert_close(loss.train()(logits, classes), -(0.8 * right + 0.2 * log.mean(1)).mean())
    torch.testing.assert_close(loss.eval()(logits, classes), -right.mean())


@pytest.mark.parametrize("share", [-0.1, 1.0, 2])
def test_label_smoothing_outside_its_range_is_refused(share):
    with pytest.raises(UserError, match=rf"loss.label_smoothing .* not {share}"):
        CrossEntropy(label_smoothing=share)


@losses
def test_fp64_stays_fp64(loss, reference, probabilities):
    logits, classes, shares = example()
    wide = logits.detach().double().requires_grad_()
    shares = shares.double() / shares.double().sum(-1, keepdim=True)
    for targets in (classes, shares):
        assert loss(wide, targets).dtype == torch.float64
        assert torch.autograd.gradcheck(lambda logits: loss(logits, targets), wide)  # noqa: B023
    assert loss.probabilities(wide).dtype == torch.float64
    assert loss(logits.detach().bfloat16(), classes).dtype == torch.float32
