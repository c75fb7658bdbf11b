"""One network over several processes, each with a share of every weight, gradient and moment (FSDP2, arXiv 2304.11277).

A tensor is cut along its first dimension. What is cut once per block is gathered block by block in the forward and
backward pass, so no process ever holds a whole network.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from trainers.common.precision import Precision


@dataclass(frozen=True)
class Sharding:
    """What the launch configuration asks for."""

    blocks: tuple[str, ...] = ()
    """Class names of the blocks that are gathered one by one; none: the network's `_no_split_modules`."""
    reshard_after_forward: bool = True

    def apply(self, network: nn.Module, precision: Precision, trains: bool = True) -> nn.Module:
        """Cut `network` in place. Its trainable weights may have one type and its frozen ones another.

        Args:
            trains: a backward pass follows each forward pass and gives blocks back. Averages and teachers have none:
                theirs are given back at once, whatever `reshard_after_forward` says.
        """
        mesh = self.mesh(precision.device)
        # Gathered in the precision they are used in: autocast would keep a copy of every weight for the backward pass.
        # Only GPUs have normalisation layers of one type over weights of another; a CPU gathers float32.
        dtype = None if precision.name == "no" or mesh.device_type == "cpu" else precision.dtype
        settings = {
            "mesh": mesh,
            "reshard_after_forward": self.reshard_after_forward or not trains,
            # Inputs keep their precision: bf16 cannot tell neighbouring times apart. Autocast converts where it is due.
            "mp_policy": MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False),
        }
        names = self.blocks or tuple(getattr(network, "_no_split_modules", None) or ())
        blocks = [module for module in network.modules() if type(module).__name__ in names and module is not network]
        if not blocks:
            raise ValueError(f"{type(network).__name__} has no blocks to shard by (`_no_split_modules`: {list(names)})")
        for block in blocks:
            fully_shard(block, **settings)
        # The rest too is given back after each pass, else an average that has been called could not be updated.
        return fully_shard(network, **{**settings, "reshard_after_forward": True})

    @staticmethod
    def mesh(device: torch.device) -> DeviceMesh:
        return init_device_mesh(device.type, (torch.distributed.get_world_size(),))


def give_back(network: nn.Module) -> None:
    """Free whatever blocks are still gathered: from now on all weights are this process's shares."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """This process's share of each tensor; whole ones as they are, None left out."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors if t is not None]


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, gathered where it is cut (then all processes have to call)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rows(tensor: Tensor) -> tuple[Tensor, int, int]:
    """This process's share, the row at which it begins, and the rows of the whole."""
    if not isinstance(tensor, DTensor):
        return tensor, 0, len(tensor) if tensor.ndim else 1
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    share = tensor.to_local()
    return share, offset[0] if len(share) else tensor.shape[0], tensor.shape[0]


def skeleton(network: nn.Module) -> nn.Module:
    """A copy whose weights hold no memory (meta device): what an export is put together on."""
    memo = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for parameter in network.parameters()
    }
    return copy.deepcopy(network, memo)


@torch.no_grad()
def fill_skeleton(network: nn.Module, name: str, values: Tensor) -> None:
    """Give one weight or buffer of a `skeleton` its values, wherever in it the weight is used."""
    held = dict(state_tensors(network))[name]
    if isinstance(held, nn.Parameter):
        torch.utils.swap_tensors(held, nn.Parameter(values, requires_grad=False))
    else:
        held.copy_(values)


def state_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by name; what is shared comes once."""
    yield from module.named_parameters()
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in part._non_persistent_buffers_set:
                yield name, buffer
