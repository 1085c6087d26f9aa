"""What every optimizer says of tensors: what it keeps of a parameter, and which part of a sharded one is on this rank.

FSDP2 makes parameters DTensors; everything else is whole on every rank, and goes through these functions unchanged.
"""

import sys
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Kept = tuple[tuple[int, ...], torch.dtype]  # shape and dtype of a tensor of the state


def is_sharded(t: Tensor) -> "TypeGuard[DTensor]":
    """A DTensor? Nobody has one who has not imported its module, which takes a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local(t: Tensor) -> Tensor:
    """This rank's shard of a DTensor, sharing its memory; any other tensor itself."""
    return t.to_local() if is_sharded(t) else t


def like(p: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros, sharded as p is."""
    if is_sharded(p):
        return torch.zeros_like(p, dtype=dtype)
    return torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)


def sharded_like(p: "DTensor", whole: Tensor) -> Tensor:
    """This rank's part of `whole`, as a DTensor laid out like p. Every rank has `whole`: nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
