"""Grad-CAM against a net whose gradients are worked out by hand, and against autograd without the library."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from vit_attn.explain.gradcam import grad_cam
from vit_attn.explain.undisturbed import undisturbed

MODELS = {
    "class token": {},
    "pooled": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 2},
    "not square": {"img_size": (16, 24)},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
}


def by_autograd(net, images, classes, last_input):
    """(Σ activation × mean gradient over patches)⁺ of what the last attention reads."""
    kept = []
    hook = last_input.register_forward_hook(lambda module, args, out: kept.append(out))
    logits = net(images.clone().requires_grad_())
    hook.remove()
    gradient = torch.autograd.grad(logits[torch.arange(len(images)), classes].sum(), kept[0])[0]
    patches = slice(net.num_prefix_tokens, None)
    share = gradient[:, patches].mean(1, keepdim=True)  # (B, 1, C)
    map_ = (share * kept[0][:, patches]).sum(-1).clamp(min=0).unflatten(1, net.patch_embed.grid_size)
    return map_.detach().numpy()


@pytest.mark.parametrize("spec", ["softmax", "entmax15+strided"])
@pytest.mark.parametrize("kind", MODELS)
def test_maps_are_those_of_autograd(make_net, make_images, halve, spec, kind):
    net = make_net(spec, **MODELS[kind])
    images = halve(make_images(3, *net.patch_embed.img_size))
    classes = torch.tensor([0, 2, 1])
    found = grad_cam(net, images, classes)
    expected = by_autograd(net, images, classes, net.blocks[-1].norm1)
    assert found.dtype == np.float32
    assert found.shape == (3, *net.patch_embed.grid_size)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6 * expected.max())
    assert (found > 0).any()


def test_norms_after_attention_are_passed_over(make_net, make_images, halve):
    from timm.models.vision_transformer import ResPostBlock

    net = make_net("softmax", block_fn=ResPostBlock, depth=3)
    images, classes = halve(make_images(2)), torch.tensor([1, 0])
    expected = by_autograd(net, images, classes, net.blocks[-2])
    found = grad_cam(net, images, classes)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6 * expected.max())
    assert (found > 0).any()


def test_by_hand(make_net):
    """One layer that attends to all tokens alike, carries its values on as they are, and reads two channels."""
    net = make_net("softmax", depth=1, embed_dim=4, num_heads=1, img_size=8, num_classes=2)
    activations = torch.tensor([[9.0, 9, 9, 9], [1, 0, 2, 0], [0, 3, 0, 0], [4, 0, 0, 1], [0, 0, 0, 0]])

    class Fixed(nn.Module):
        def forward(self, x):
            return activations[None] + 0 * x

    block = net.blocks[0]
    block.norm1, block.norm2, block.mlp, net.norm = Fixed(), *[nn.Identity() for _ in range(3)]
    with torch.no_grad():
        block.attn.qkv.weight.zero_()  # equal scores: each of the five tokens counts 1/5
        block.attn.qkv.bias.zero_()
        block.attn.qkv.weight[8:] = torch.eye(4)
        block.attn.proj.weight.copy_(torch.eye(4))
        block.attn.proj.bias.zero_()
        net.head.weight.copy_(torch.tensor([[10.0, -5, 0, 0], [0, 0, 0, 0]]))
    # The MLP is the identity on top of the residual: a factor of 2. d logit / d patch = 2 · (10, -5, 0, 0) / 5.
    found = grad_cam(net, torch.zeros(1, 3, 8, 8), torch.tensor([0]))
    np.testing.assert_allclose(found, [[[4.0, 0.0], [16.0, 0.0]]], rtol=1e-6)


def test_compiled_and_frozen_networks_give_the_same_and_are_left_as_they_were(make_net, make_images, halve):
    net = make_net("entmax15", drop_rate=0.5)
    images, classes = halve(make_images(2)), torch.tensor([2, 0])
    expected = grad_cam(net, images, classes)
    net.train()
    net.blocks[0].eval()
    grads = [torch.full_like(parameter, 3.0) for parameter in net.parameters()]
    for index, (parameter, grad) in enumerate(zip(net.parameters(), grads, strict=True)):
        parameter.grad = grad
        parameter.requires_grad_(index % 2 == 0)
    net.set_grad_checkpointing(True)
    net.compile()
    modes = [module.training for module in net.modules()]
    with torch.no_grad():
        np.testing.assert_allclose(grad_cam(net, images, classes), expected, rtol=1e-5, atol=1e-8)
    assert [module.training for module in net.modules()] == modes
    assert all(found.grad is grad for found, grad in zip(net.parameters(), grads, strict=True))
    assert all((grad == 3).all() for grad in grads)
    assert [parameter.requires_grad for parameter in net.parameters()] == [i % 2 == 0 for i in range(len(grads))]
    assert net.grad_checkpointing
    assert not net.blocks[-1].norm1._forward_hooks


def test_a_failure_inside_leaves_the_network_as_it_was(make_net):
    net = make_net("softmax").train()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match="shape"), undisturbed(net):
        net(torch.zeros(1, 3, 16, 16)).reshape(7)
    assert net.training
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
