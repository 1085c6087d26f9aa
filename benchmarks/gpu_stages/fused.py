"""Muon's elementwise work on many tensors at once: U with its norm, and the change of the weights.

    U = G + ratio M (bfloat16)    its largest entry and scaled squares, block by block
    W <- keep W - scale O

Tensors of one shape lie anywhere: the kernels find them by a table of addresses on the device, which is kept while the
addresses stay the same.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
_tables: dict[int, tuple[tuple, Tensor]] = {}  # length of a row -> (addresses, the same on the device)


@triton.jit
def direction_kernel(TABLE, U, PEAK, SQUARES, count, size, ratio, BLOCK: tl.constexpr):
    piece, block = tl.program_id(0), tl.program_id(1)
    grad = tl.load(TABLE + piece).to(tl.pointer_type(tl.float32), bitcast=True)
    momentum = tl.load(TABLE + count + piece).to(tl.pointer_type(tl.float32), bitcast=True)
    grad, momentum = tl.multiple_of(grad, 16), tl.multiple_of(momentum, 16)
    here = block * BLOCK + tl.arange(0, BLOCK)
    inside = here < size
    u = tl.load(grad + here, mask=inside, other=0.0) + ratio * tl.load(momentum + here, mask=inside, other=0.0)
    tl.store(U + piece.to(tl.int64) * size + here, u.to(U.dtype.element_ty), mask=inside)
    peak = tl.max(tl.abs(u), 0)
    scaled = u / tl.where(peak > 0.0, peak, 1.0)
    tl.store(PEAK + piece * tl.num_programs(1) + block, peak)
    tl.store(SQUARES + piece * tl.num_programs(1) + block, tl.sum(scaled * scaled, 0))


@triton.jit
def change_kernel(TABLE, O, size, keep, scale, BLOCK: tl.constexpr):
    piece, block = tl.program_id(0), tl.program_id(1)
    weight = tl.multiple_of(tl.load(TABLE + piece).to(tl.pointer_type(tl.float32), bitcast=True), 16)
    here = block * BLOCK + tl.arange(0, BLOCK)
    inside = here < size
    o = tl.load(O + piece.to(tl.int64) * size + here, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + here, mask=inside, other=0.0)
    tl.store(weight + here, keep * w - scale * o, mask=inside)


def table(slot: int, tensors: list[Tensor]) -> Tensor:
    """Addresses of `tensors` on their device; the last table of a slot is kept."""
    addresses = tuple(t.data_ptr() for t in tensors)
    kept = _tables.get(slot)
    if kept is None or kept[0] != addresses:
        host, device = torch.tensor(addresses, dtype=torch.int64), tensors[0].device
        _tables[slot] = addresses, host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
    return _tables[slot][1]


def fits(tensors: list[Tensor]) -> bool:
    return all(t.dtype == torch.float32 and t.is_contiguous() and t.data_ptr() % 16 == 0 for t in tensors)


def directions(slot: int, grads: list[Tensor], momenta: list[Tensor], ratio: float) -> tuple[Tensor, Tensor]:
    """(U (N, A, B) bfloat16, its norms (N,))."""
    N, size, device = len(grads), grads[0].numel(), grads[0].device
    U = torch.empty(N, *grads[0].shape, dtype=torch.bfloat16, device=device)
    blocks = triton.cdiv(size, BLOCK)
    peak, squares = torch.empty(2, N, blocks, device=device)
    direction_kernel[(N, blocks)](
        table(slot, [*grads, *momenta]), U, peak, squares, N, size, ratio, BLOCK=BLOCK, num_warps=8
    )
    largest = peak.amax(1)
    safe = torch.where(largest > 0.0, largest, 1.0)
    return U, (squares * (peak / safe[:, None]).square()).sum(1).sqrt() * largest


def change(slot: int, weights: list[Tensor], O: Tensor, keep: float, scale: float) -> None:
    size = weights[0].numel()
    change_kernel[(len(weights), triton.cdiv(size, BLOCK))](
        table(slot, weights), O, size, keep, scale, BLOCK=BLOCK, num_warps=8
    )
