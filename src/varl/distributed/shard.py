"""FSDP2, applied from outside: the model file never hears of it. State dicts are whole on disk, whatever they were split over."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from varl.distributed.mesh import World


def shard_(module: nn.Module, world: World, dtype: torch.dtype = torch.float32, methods: Sequence[str] = ()) -> nn.Module:
    """`module`, in place: each of `module.blocks`, then the root, split over all processes. Computes in `dtype`, reduces gradients in fp32.
    `methods` are the root's ways in besides forward."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks: Any = module.blocks
    for part in [*blocks, module]:
        fully_shard(part, mesh=mesh, mp_policy=precision)
    for name in methods:
        register_fsdp_forward_method(module, name)
    return module


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be split. Every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def laid_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, which every process has, split as `other` is."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def full_state(state: Any) -> Any:
    """A state dict, of a module or an optimizer, with whole tensors throughout. Every process must ask."""
    match state:
        case Tensor():
            return whole(state)
        case Mapping():
            return {name: full_state(part) for name, part in state.items()}
        case list() | tuple():
            return type(state)(full_state(part) for part in state)
    return state


def load_full(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fills `module`, split or not, with whole tensors."""
    own = module.state_dict()
    module.load_state_dict({name: laid_like(tensor.to(own[name].device), own[name]) for name, tensor in state.items()})


def load_full_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Fills `optimizer`, its parameters split or not, with a state dict of whole tensors."""
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    laid = {
        index: {
            name: laid_like(value.to(parameters[index].device), parameters[index])
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in slots.items()
        }
        for index, slots in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": laid})
