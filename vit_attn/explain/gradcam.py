"""Grad-CAM for Vision Transformers, by the library ``pytorch_grad_cam``."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from vit_attn.attention import attention_layers
from vit_attn.explain.undisturbed import undisturbed


def grad_cam(net: nn.Module, images: Tensor, classes: Tensor) -> NDArray:
    """Weigh the tokens that the last attention reads by the gradient of a class (Selvaraju et al., 2017).

    (Σ over channels of activation × mean gradient over the patches)⁺, at the last layer where patches still reach a
    class token: the tokens that come into the last block's attention. arXiv:1610.02391.

    Args:
        net: from ``create_vit``; compiled or not, its parameters frozen or not. It is left as it was.
        images: (B, C, H, W), normalized.
        classes: (B,) whose logits the gradient is of.

    Returns:
        (B, gh, gw) float32, at least 0, in the scale that activations and gradients have.
    """
    # Here, because it loads OpenCV, for which nobody else should wait.
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    class OnThePatchGrid(GradCAM):
        """Keeps the map that the library goes on to scale to [0, 1] and to resize to the image."""

        kept: NDArray

        def get_cam_image(self, *args: Any, **kwargs: Any) -> NDArray:
            self.kept = super().get_cam_image(*args, **kwargs)
            return self.kept

    layer = attention_layers(net)[-1]

    def on_grid(tokens: Tensor) -> Tensor:  # (B, N, C) -> (B, C, gh, gw)
        return tokens[:, layer.num_prefix_tokens :].transpose(1, 2).unflatten(2, layer.grid_size)

    with undisturbed(net):
        cam = OnThePatchGrid(model=net, target_layers=[_before_last_attention(net)], reshape_transform=on_grid)
        try:
            # Parameters are frozen: it is the images that ask for a gradient.
            cam(images.detach().clone().requires_grad_(), [ClassifierOutputTarget(int(index)) for index in classes])
        finally:
            cam.activations_and_grads.release()
    return np.maximum(cam.kept, 0).astype(np.float32)


def _before_last_attention(net: Any) -> nn.Module:
    """The module whose output is what the attention of the last block reads."""
    last = net.blocks[-1]
    if type(last).__name__ != "ResPostBlock":
        return last.norm1
    # Its norms come after attention and MLP, so that attention reads what the block before it puts out.
    return net.blocks[-2] if len(net.blocks) > 1 else net.norm_pre
