# type: ignore  (the language is Triton's: Python's types do not apply)
"""Muon's elementwise work on all pieces of a batch at once, as Triton kernels: U with its norm, the change of weights.

    U = G + ratio M,  ‖U‖_F  and  U / (c0 ‖U‖_F)          U in bfloat16
    W <- W - lr d keep W - lr s O                         keep: 1, or where O W >= 0 (cautious)

torch's own functions read and write U five times more and W once more, and are launched piece by piece: on an H200 2.1
of 5.9 ms of a step of GPT-2 124M, where these take 0.5. The pieces lie anywhere: the kernels find them by a table of
their addresses on the device.

Shapes   pieces (A, B), contiguous, fp32, at addresses that 16 divides · U, O (N, A, B) bfloat16
"""

import functools
import os
import warnings
from collections import OrderedDict
from types import SimpleNamespace

import torch
from torch import Tensor

from muonlm.scan.launch import on_device

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # when the kernels below are decorated
try:
    if not (INTERPRETED or torch.version.cuda):
        raise ImportError("without CUDA nobody waits for Triton")
    import triton
    import triton.language as tl
except ImportError:  # `fits` tells
    triton, tl = None, SimpleNamespace(constexpr=None)

jit = triton.jit if triton else lambda kernel: kernel
BLOCK = 4096  # numbers a program
TABLES = 64  # weights and momenta stay where they are, gradients often

_tables: OrderedDict[tuple, Tensor] = OrderedDict()  # the tables of addresses used last
_captured: list[Tensor] = []  # and those that CUDA graphs read, which nobody may free


@jit
def _piece(TABLE, index):
    return tl.multiple_of(tl.load(TABLE + index).to(tl.pointer_type(tl.float32), bitcast=True), 16)


@jit
def direction_kernel(TABLE, U, PEAK, SQUARES, count, size, ratio, BLOCK: tl.constexpr):
    piece, block = tl.program_id(0), tl.program_id(1)
    grad, momentum = _piece(TABLE, piece), _piece(TABLE, count + piece)
    here = block * BLOCK + tl.arange(0, BLOCK)
    inside = here < size
    u = tl.load(grad + here, mask=inside, other=0.0) + ratio * tl.load(momentum + here, mask=inside, other=0.0)
    tl.store(U + piece.to(tl.int64) * size + here, u.to(U.dtype.element_ty), mask=inside)
    peak = tl.max(tl.abs(u), 0)  # squares of u / peak neither overflow nor vanish
    scaled = u / tl.where(peak > 0.0, peak, 1.0)
    tl.store(PEAK + piece * tl.num_programs(1) + block, peak)
    tl.store(SQUARES + piece * tl.num_programs(1) + block, tl.sum(scaled * scaled, 0))


@jit
def divide_kernel(X, NORM, size, c0, BLOCK: tl.constexpr):
    piece, here = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    norm = tl.load(NORM + piece)
    norm = tl.where(norm == 0.0, 1.0, norm * c0)
    X += piece.to(tl.int64) * size
    x = tl.load(X + here, mask=here < size, other=0.0).to(tl.float32)
    tl.store(X + here, (x / norm).to(X.dtype.element_ty), mask=here < size)


@jit
def change_kernel(
    TABLE, O, RATE, rate, size, decay, factor, HELD: tl.constexpr, CAUTIOUS: tl.constexpr, BLOCK: tl.constexpr
):
    piece, block = tl.program_id(0), tl.program_id(1)
    weight = _piece(TABLE, piece)
    lr = tl.load(RATE) if HELD else rate  # a captured step reads the rate that holds when it is replayed
    here = block * BLOCK + tl.arange(0, BLOCK)
    inside = here < size
    o = tl.load(O + piece.to(tl.int64) * size + here, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + here, mask=inside, other=0.0)
    kept = tl.where(o * w >= 0.0, w, 0.0) if CAUTIOUS else w
    tl.store(weight + here, w - lr * decay * kept - lr * factor * o, mask=inside)


@functools.cache
def works(device: torch.device) -> bool:
    """Whether Triton is here and can compile for this device, which takes a C compiler: tried once."""
    if triton is None or device.type != "cuda" and not INTERPRETED:
        return False
    try:
        with on_device(device):
            divide(torch.ones(1, 1, 1, device=device), torch.ones(1, device=device), 1.0)
    except Exception as error:  # whatever is missing, torch's own functions do the work
        warnings.warn(f"Muon goes on without its Triton kernels, more slowly: {type(error).__name__}: {error}"[:300])
        return False
    return True


def fits(tensors: list[Tensor]) -> bool:
    """Whether the kernels can work on these pieces."""
    return works(tensors[0].device) and all(
        t.dtype == torch.float32 and t.is_contiguous() and t.data_ptr() % 16 == 0 for t in tensors
    )


def directions(grads: list[Tensor], momenta: list[Tensor], ratio: float) -> tuple[Tensor, Tensor]:
    """(U (N, A, B) in bfloat16, ‖U‖_F (N,) in fp32)."""
    N, size, device = len(grads), grads[0].numel(), grads[0].device
    U = torch.empty(N, *grads[0].shape, dtype=torch.bfloat16, device=device)
    blocks = -(-size // BLOCK)
    peak, squares = torch.empty(2, N, blocks, device=device)
    direction_kernel[(N, blocks)](
        addresses([*grads, *momenta]), U, peak, squares, N, size, ratio, BLOCK=BLOCK, num_warps=8
    )
    largest = peak.amax(1)
    share = peak / largest.masked_fill(largest == 0.0, 1.0)[:, None]
    return U, (squares * share.square()).sum(1).sqrt() * largest


def divide(X: Tensor, norm: Tensor, c0: float) -> Tensor:
    """X (N, A, B) / (c0 norm), in place; by 1 where norm (N,) is 0."""
    size = X[0].numel()
    divide_kernel[(len(X), -(-size // BLOCK))](X, norm, size, c0, BLOCK=BLOCK, num_warps=8)
    return X


def change(weights: list[Tensor], O: Tensor, lr: float | Tensor, decay: float, factor: float, cautious: bool) -> None:
    """The equation above, in place; d is `decay`, s is `factor`."""
    held = isinstance(lr, Tensor) and lr.device == O.device
    size = weights[0].numel()
    change_kernel[(len(weights), -(-size // BLOCK))](
        *(addresses(weights), O, lr if held else O, 0.0 if held else float(lr), size, float(decay), float(factor)),
        HELD=held,
        CAUTIOUS=cautious,
        BLOCK=BLOCK,
        num_warps=8,
    )


def addresses(tensors: list[Tensor]) -> Tensor:
    """Where `tensors` are, as int64 on their device, without waiting for it."""
    found, device = tuple(t.data_ptr() for t in tensors), tensors[0].device
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    table = _tables.get((device, found))
    if table is None and capturing:  # a copy would read the host's memory anew in every replay
        return torch.stack([torch.full((), address, dtype=torch.int64, device=device) for address in found])
    if table is None:
        table = torch.tensor(found, dtype=torch.int64)
        table = table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
        _tables[device, found] = table
        if len(_tables) > TABLES:
            _tables.popitem(last=False)
    _tables.move_to_end((device, found))
    if capturing:
        _captured.append(table)
    return table
