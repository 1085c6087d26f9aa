"""What Muon keeps of a matrix between steps, and the fp32 master weights of bf16 parameters.

    bf16 parameter p, int16 `mantissa`     p holds the upper 16 bits of the master, rounded; mantissa what that took

The master itself exists during a step only: as many at a time as `batch_bytes` holds.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..tensors import Kept, like, local
from .blocks import block_shapes
from .variants import second_momentum_size


def batch_bytes(group: dict, device: torch.device) -> int:
    """fp32 bytes of a batch: `max_batch_bytes`, or what suits the device.

    On an H200 a step of GPT-2 124M takes 6.8 ms with 64 MiB, waiting for launches, and 4.5 with 128 or more
    """
    return group["max_batch_bytes"] or (2**27 if device.type == "cuda" else 2**26)


def matrix_layout(p: Tensor, split: dict | None, group: dict) -> dict[str, Kept]:
    """{key: (shape, dtype)} of the state of one whole Muon parameter; with the mantissa if it has one."""
    dtype = p.dtype if group["compat"] or p.dtype == torch.float64 else torch.float32
    stored = getattr(torch, group["state_dtype"]) if group["state_dtype"] and dtype == torch.float32 else dtype
    layout = {"momentum_buffer": (tuple(p.shape), stored)}
    if size := sum(second_momentum_size(group["variant"], A, B) for A, B in block_shapes(p.shape, split)):
        layout["second_momentum"] = ((size,), dtype)
    if (split or {}).get("adamw"):
        size = p.numel() - sum(A * B for A, B in block_shapes(p.shape, split))
        layout |= {"exp_avg": ((size,), dtype), "exp_avg_sq": ((size,), dtype), "step": ((), torch.float32)}
    if keeps_mantissa(p, group):
        layout["mantissa"] = (tuple(p.shape), torch.int16)
    return layout


def keeps_mantissa(p: Tensor, group: dict) -> bool:
    return p.dtype == torch.bfloat16 and group["param_dtype_comp"] and not group["compat"]


def master_weights(group: dict, params: list[Tensor], state: Mapping[Tensor, dict]) -> dict[Tensor, Tensor]:
    """fp32 masters of bf16 parameters (of their shards), made of their 16 bits and the 16 of `mantissa`."""
    masters = {}
    for p in params:
        if keeps_mantissa(p, group):
            if "mantissa" not in state[p]:
                state[p]["mantissa"] = like(p, torch.int16)
            bits = local(p).view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
            masters[p] = bits.add_(local(state[p]["mantissa"])).view(torch.float32)
    return masters


def round_master(p: Tensor, mantissa: Tensor, master: Tensor) -> None:
    """Round an fp32 master into bf16 `p` and keep what the rounding took, so that the pair is the master exactly."""
    bits = master.view(torch.int32)
    high = (bits + 0x8000).bitwise_right_shift_(16)
    mantissa.copy_(bits - (high << 16))
    p.view(torch.int16).copy_(high)


def chunks(group: dict, found: list[tuple]) -> Iterator[list[tuple]]:
    """Parameters with fp32 copies (16-bit weights or momentum), as many at once as `batch_bytes` holds; else all."""
    chunk, size = [], 0
    for item in found:
        copied = min(item[0].element_size(), 2 if group["state_dtype"] in ("bfloat16", "float16") else 4) < 4
        copies = 4 * item[0].numel() if copied else 0
        if chunk and size + copies > batch_bytes(group, item[0].device):
            yield chunk
            chunk, size = [], 0
        chunk.append(item)
        size += copies
    if chunk:
        yield chunk
