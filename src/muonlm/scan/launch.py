"""What every launch of a Triton kernel needs of its tensors. Plain torch: nobody imports Triton for this."""

from contextlib import nullcontext

import torch
from torch import Tensor


def on_device(device: torch.device):
    """Triton launches on the current device: make it the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def sequence(x: Tensor) -> Tensor:
    """x, or a copy where neighbours along its last axis, which a warp's lanes read, are apart."""
    return x if x.stride(-1) == 1 else x.contiguous()


def state(x: Tensor | None, like: Tensor) -> Tensor:
    """x in fp32 and contiguous; zeros for None."""
    return torch.zeros_like(like) if x is None else x.to(torch.float32).contiguous()
