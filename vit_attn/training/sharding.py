"""FSDP2: parameters, gradients and optimizer state shared out over the processes of a run.

``trainer=fsdp`` and ``trainer=fsdp_cpu``, or ``trainer.strategy=fsdp2`` with any other. A checkpoint is the one file
that a single process would have written: any number of processes goes on from it, and ``evaluate.py`` reads it.
"""

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from vit_attn.attention import Attention
from vit_attn.attention.layer import current_key


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's ``ModelParallelStrategy``, all of whose processes share one model, and whose checkpoints are whole.

    Lightning numbers the optimizer's state by another order than an optimizer of its own does, and reads checkpoints
    past the plugin that verifies them: here both are as in every other run.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(save_distributed_checkpoint=False, **options)

    def setup_environment(self) -> None:
        """Start the processes; each of them trains on its own part of a batch."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands the optimizers' state to :meth:`load_optimizer_state_dict`."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole state, on the first process; the others have none of it. All of them call this."""
        assert self.lightning_module is not None
        return self._on_first(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The same of an optimizer."""
        state = optimizer.state_dict()
        return {**state, "state": {index: self._on_first(values) for index, values in state["state"].items()}}

    def _on_first(self, values: Mapping[str, Any]) -> dict[str, Any]:
        found = {}
        for name, value in values.items():
            value = gathered(value)
            if self.is_global_zero:
                found[name] = value.cpu() if isinstance(value, Tensor) else value
        return found

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, on every process."""
        return super(ModelParallelStrategy, self).load_checkpoint(checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Give each process its part of the parameters."""
        assert self.lightning_module is not None
        module = self.lightning_module
        module.load_state_dict(parts_of(checkpoint["state_dict"], module), strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give each process its part of the optimizers' state."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            parts = {
                index: {name: _part(value, parameters[index]) for name, value in values.items()}
                for index, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": parts})


StrategyRegistry.register("fsdp2", ShardedStrategy, description="Fully sharded: torch's FSDP2, on GPUs and on CPUs")


def shard(net: nn.Module, mesh: DeviceMesh) -> None:
    """Share the parameters of ``net`` out over the processes of ``mesh``; a block's are brought together to compute it.

    Each process passes the same parameters.
    """
    weightless = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        for parameter in net.parameters()
    }
    skeleton = copy.deepcopy(net, weightless)
    blocks = [module for module in net.modules() if any(isinstance(child, Attention) for child in module.children())]
    for module in (*blocks, net):
        # Else the outermost parameters stay together after a forward pass without a backward one, as in validation.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    net._skeleton = (skeleton,)  # type: ignore[assignment]  # in a tuple, so that it is no submodule


def is_sharded(net: nn.Module) -> bool:
    """Whether :func:`shard` was called with ``net``."""
    return isinstance(net, FSDPModule)


@torch.no_grad()
def whole_net(net: nn.Module) -> nn.Module:
    """A copy of a sharded net that has all of its parameters, on every process; all of them call this.

    A net that is not sharded is returned itself, and nobody waits for anybody.
    """
    if not is_sharded(net):
        return net
    parameters = {name: gathered(parameter) for name, parameter in net.named_parameters()}
    (skeleton,) = cast("tuple[nn.Module]", net._skeleton)
    found = copy.deepcopy(skeleton)
    found.load_state_dict(parameters, strict=False, assign=True)
    found.to(next(iter(parameters.values())).device)
    for mine, theirs in zip(found.buffers(), net.buffers(), strict=True):
        mine.copy_(theirs)
    return found.train(net.training)


def gathered(value: Any) -> Any:
    """A tensor whose parts are on several processes, whole; anything else as it is. All of them call this."""
    return value.full_tensor().detach() if isinstance(value, DTensor) else value


def parts_of(state: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """Of each tensor in ``state``, the part of this process, for ``module.load_state_dict``."""
    own = module.state_dict()
    return {current_key(name): _part(value, own.get(current_key(name))) for name, value in state.items()}


def _part(value: Any, like: Any) -> Any:
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    # Every process has read the whole, so none has to be sent anything.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
