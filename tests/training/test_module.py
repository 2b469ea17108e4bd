"""Schedule, seeds and the optimizer's groups, against values worked out by hand."""

import itertools
import math

import pytest
import torch
from omegaconf import OmegaConf

from vit_attn.errors import UserError
from vit_attn.models import create_vit
from vit_attn.training.module import build_optimizer, step_seed, warmup_cosine

SMALL = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        *((0, 0.25), (1, 0.5), (3, 1.0)),  # a line to 1 over four steps
        *((4, 1.0), (9, 0.1 + 0.9 * 0.5), (14, 0.1)),  # a cosine over ten: its start, its middle, its end
        *((20, 0.1),),  # past the end it stays
    ],
)
def test_warm_up_is_a_line_and_what_follows_a_cosine(step, factor):
    assert warmup_cosine(step, total=14, warmup=4, final=0.1) == pytest.approx(factor)


def test_schedule_without_warm_up_starts_at_the_top_and_quarter_way_is_cos_45():
    assert warmup_cosine(0, total=8, warmup=0, final=0.0) == 1
    assert warmup_cosine(2, total=8, warmup=0, final=0.0) == pytest.approx((1 + math.sqrt(0.5)) / 2)


def test_schedule_of_warm_up_alone_divides_by_nothing():
    assert [warmup_cosine(step, total=2, warmup=2, final=0.5) for step in range(3)] == [0.5, 1.0, 1.0]


def test_step_seeds_differ_in_every_argument_and_repeat():
    arguments = list(itertools.product(range(4), range(4), range(20), range(3)))
    seeds = [step_seed(*argument) for argument in arguments]
    assert len(set(seeds)) == len(arguments)
    assert seeds == [step_seed(*argument) for argument in arguments]
    torch.manual_seed(max(seeds))  # is in torch's range


def optimizer_config(**changes):
    return OmegaConf.create({"_target_": "torch.optim.AdamW", "lr": 0.01, "weight_decay": 0.3} | changes)


def test_weight_decay_is_on_matrices_alone():
    net = create_vit(
        "vit_tiny_patch16_224",
        attention="entmax",
        attention_options={"learnable_alpha": True},
        reg_tokens=1,
        init_values=0.1,
        **SMALL,
    )
    groups = build_optimizer(net, optimizer_config()).param_groups
    decayed = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    named = dict(net.named_parameters())
    assert len(decayed) == sum(len(group["params"]) for group in groups) == len(named)
    by_hand = {
        *("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight"),
        *("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight", "head.weight"),
    }
    assert {name for name, parameter in named.items() if decayed[id(parameter)] == 0.3} == by_hand
    bare = {name for name, parameter in named.items() if decayed[id(parameter)] == 0}
    assert bare == named.keys() - by_hand
    assert {"pos_embed", "cls_token", "reg_token", "norm.weight", "blocks.0.attn.core.normalizer.alpha_logit"} <= bare


def test_optimizer_takes_its_options_and_leaves_fixed_positions_alone():
    net = create_vit("vit_tiny_patch16_224", pos_embed="sinusoidal", **SMALL)
    optimizer = build_optimizer(net, optimizer_config(_target_="torch.optim.SGD", momentum=0.7))
    assert isinstance(optimizer, torch.optim.SGD)
    assert {(group["lr"], group["momentum"]) for group in optimizer.param_groups} == {(0.01, 0.7)}
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert id(net.pos_embed) not in trained


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": -1}, "-1"),
        ({"beta": 0.9}, "beta"),
        ({"_target_": "torch.optim.AdamX"}, "AdamX"),
        ({"_target_": "no_such_package.Adam"}, "no_such_package"),
    ],
)
def test_wrong_optimizer_is_refused_on_one_line_by_name(changes, said):
    net = create_vit("vit_tiny_patch16_224", **SMALL)
    with pytest.raises(UserError, match=r"^optimizer: ") as refusal:
        build_optimizer(net, optimizer_config(**changes))
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)
