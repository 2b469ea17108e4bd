"""Golden losses: three training steps of every mechanism, from the command's own configuration.

A changed number means that training changed. If that was the intention, print the new ones with

    GOLDEN=1 python -m pytest tests/training/test_golden.py -s -k golden

and say in the commit why they are right.
"""

import csv
import itertools
import math
import os
from dataclasses import dataclass

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from vit_attn.config import plain
from vit_attn.training.build import build_net
from vit_attn.training.module import Classifier

# fp32, one thread, seed 1, digits in batches of 64; torch 2.15 on x86-64.
GOLDEN = {
    "softmax": (2.37631, 2.31921, 2.31174),
    "sparsemax": (2.35056, 2.29882, 2.30006),
    "entmax15": (2.32462, 2.28792, 2.27084),
    "learned alpha": (2.33122, 2.30439, 2.27287),
    "strided": (2.38881, 2.33026, 2.31359),
    "fixed": (2.44972, 2.31682, 2.36183),
    "causal": (2.38013, 2.33624, 2.28550),
    "sliding_window": (2.40773, 2.34848, 2.33409),
    "dilated_sliding_window": (2.39719, 2.34563, 2.33290),
    "entmax+strided": (2.34673, 2.31398, 2.30087),
    "[strided,full]": (2.38253, 2.34669, 2.32590),
}
mechanisms = pytest.mark.parametrize("mechanism", GOLDEN)


def overrides(mechanism):
    if mechanism == "learned alpha":
        return [
            "model.attention=entmax",
            "model.attention_options.learnable_alpha=true",
            "model.attention_options.alpha=1.3",
        ]
    return [f"model.attention={mechanism}"]


@dataclass
class Seen:
    losses: list[float]
    weights: dict[str, Tensor]  # before the first step
    batches: list[Tensor]  # augmented images, as the network got them
    targets: list[Tensor]


@pytest.fixture(scope="module")
def first_steps(train_in, tmp_path_factory):
    """``first_steps(mechanism)`` → :class:`Seen`, run once.

    timm's small initial weights make every attention uniform, and so all mechanisms with enough keys equal: here
    they are larger, so that a loss tells which keys were seen and how they were weighed. And without a class token,
    which sees all keys in every pattern.
    """
    done = {}

    def spread_net(*args, **kwargs):
        net = build_net(*args, **kwargs)
        with torch.no_grad():
            net.pos_embed *= 20
            for block in net.blocks:
                block.attn.qkv.weight *= 8
                block.attn.proj.weight *= 8
            net.head.weight *= 5
        return net

    def run(mechanism):
        if mechanism in done:
            return done[mechanism]
        seen = done[mechanism] = Seen([], {}, [], [])
        step, forward = Classifier.training_step, Classifier.forward

        def recorded_step(self, batch, batch_idx):
            if not seen.weights:
                seen.weights = {name: value.clone() for name, value in self.net.state_dict().items()}
            seen.targets.append(batch[1].clone())
            return step(self, batch, batch_idx)

        def recorded_forward(self, images):
            if self.training:
                seen.batches.append(images.clone())
            return forward(self, images)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Classifier, "training_step", recorded_step)
            patch.setattr(Classifier, "forward", recorded_forward)
            patch.setattr("vit_attn.training.run.build_net", spread_net)
            patch.setattr("vit_attn.training.run.write_panels", lambda *args, **kwargs: {})
            patch.setattr("vit_attn.training.run.write_masks", lambda *args, **kwargs: [])
            settings = ("trainer.max_steps=3", "data.batch_size=64", "trainer.limit_val_batches=1", "test=false")
            settings += ("model.class_token=false", "model.global_pool=avg")
            folder = train_in(tmp_path_factory.mktemp("golden"), *settings, *overrides(mechanism)).root
        with (folder / "logs" / "metrics.csv").open() as file:
            seen.losses += [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
        return seen

    return run


@mechanisms
def test_losses_of_three_steps_are_golden(first_steps, mechanism):
    losses = first_steps(mechanism).losses
    if os.environ.get("GOLDEN"):
        print(f'    "{mechanism}": ({", ".join(f"{loss:.5f}" for loss in losses)}),')
    assert losses == pytest.approx(GOLDEN[mechanism], abs=1e-4)


@mechanisms
def test_the_first_loss_is_that_of_guessing(first_steps, mechanism):
    assert first_steps(mechanism).losses[0] == pytest.approx(math.log(10), abs=0.15)


def test_the_first_loss_of_softmax_is_stock_timms(first_steps):
    seen = first_steps("softmax")
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
    net = timm.create_model("vit_tiny_patch16_224", class_token=False, global_pool="avg", **sizes).train()
    net.load_state_dict(seen.weights)
    images = (seen.batches[0] / 255 - 0.3123) / 0.3561  # mean and deviation of the digits' training images
    loss = F.cross_entropy(net(images), seen.targets[0], label_smoothing=0.1)
    assert seen.losses[0] == pytest.approx(loss.item(), abs=1e-5)


def test_no_two_mechanisms_have_the_same_losses(first_steps):
    losses = {mechanism: first_steps(mechanism).losses for mechanism in GOLDEN}
    for one, other in itertools.combinations(GOLDEN, 2):
        gaps = [abs(left - right) for left, right in zip(losses[one], losses[other], strict=True)]
        assert max(gaps) > 5e-4, (one, other)  # more than the tolerance on golden numbers


@mechanisms
def test_mechanisms_start_from_the_same_weights_and_see_the_same_augmented_batches(first_steps, mechanism):
    ours, theirs = first_steps(mechanism), first_steps("softmax")
    added = {name for name in ours.weights if name not in theirs.weights}
    assert added == (
        {f"blocks.{i}.attn.core.normalizer.alpha_logit" for i in (0, 1)} if mechanism == "learned alpha" else set()
    )
    assert all(torch.equal(value, ours.weights[name]) for name, value in theirs.weights.items())
    assert len(ours.batches) == len(theirs.batches) == 3
    for left, right in zip(ours.batches + ours.targets, theirs.batches + theirs.targets, strict=True):
        assert torch.equal(left, right)
    assert not torch.equal(ours.batches[0], ours.batches[1])


@mechanisms
def test_a_batch_can_be_learned_by_heart(compose, tiny, mechanism):
    torch.manual_seed(1)
    net = build_net(plain(compose(*tiny, *overrides(mechanism)).model), num_classes=10, image_size=32)
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    before = {name: value.clone() for name, value in net.named_parameters()}
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    # Queries and keys of every layer take part.
    for name, value in net.named_parameters():
        if "qkv" in name or "alpha" in name:
            assert not torch.equal(value, before[name]), name
