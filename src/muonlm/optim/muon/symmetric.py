# type: ignore  (the language is Triton's: Python's types do not apply)
"""Half of a symmetric product, as a Triton kernel: OUT = beta C + alpha A Aᵀ, tiles above the diagonal mirrored.

Newton-Schulz multiplies X, and then R = X Xᵀ, by its own transpose. Of m / 128 tiles a side, 6 for m = 768, the kernel
computes 21 of 36, and adds C without a copy. Products of two different polynomials of R are symmetric as well, but only
before they are rounded: halved, they doubled the error of the hybrid form in bfloat16 (0.021 to 0.055).

Shapes   A (N, m, k) with any strides · C, OUT (N, m, m) contiguous, C symmetric · m a multiple of 128, k of 64
Dtypes   bfloat16, sums in fp32
"""

import torch
from torch import Tensor

from . import fused
from .fused import jit, tl

TILE, DEPTH = 128, 64


@jit
def symmetric_kernel(
    A, C, OUT, m, k, a_batch, a_row, a_column, beta, alpha,
    ADD: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    tile, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)  # tiles are counted row by row: 1 + 2 + ... + i before
    i += ((i + 1) * (i + 2) // 2 <= tile).to(tl.int32)  # the root is a fast one, and may be off by its last bit
    i -= (i * (i + 1) // 2 > tile).to(tl.int32)
    j = tile - i * (i + 1) // 2
    rows, columns, depth = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE), tl.arange(0, DEPTH)
    left = A + batch * a_batch + rows[:, None] * a_row + depth[None, :] * a_column
    right = A + batch * a_batch + columns[None, :] * a_row + depth[:, None] * a_column
    total = tl.zeros((TILE, TILE), tl.float32)
    for _ in range(0, k, DEPTH):
        total = tl.dot(tl.load(left), tl.load(right), total)
        left += DEPTH * a_column
        right += DEPTH * a_column
    total *= alpha
    here = rows[:, None] * m + columns[None, :]
    if ADD:
        total += beta * tl.load(C + batch * m * m + here).to(tl.float32)
    result = total.to(OUT.dtype.element_ty)
    tl.store(OUT + batch * m * m + here, result)
    if i != j:
        tl.store(OUT + batch * m * m + columns[:, None] * m + rows[None, :], tl.trans(result))


def fits(A: Tensor) -> bool:
    """Whether the kernel can multiply A (N, m, k) by its transpose."""
    return (
        A.is_cuda
        and A.ndim == 3
        and A.dtype == torch.bfloat16
        and A.shape[1] % TILE == 0
        and A.shape[2] % DEPTH == 0
        and fused.works(A.device)
        and torch.cuda.get_device_capability(A.device) >= (8, 0)
        and not torch.compiler.is_compiling()
    )


def symmetric(
    A: Tensor, C: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """beta C + alpha A Aᵀ."""
    N, m, k = A.shape
    out = torch.empty(N, m, m, dtype=A.dtype, device=A.device) if out is None else out
    tiles = m // TILE * (m // TILE + 1) // 2
    symmetric_kernel[(tiles, N)](
        *(A, out if C is None else C, out, m, k, *A.stride(), float(beta), float(alpha)),
        ADD=C is not None,
        TILE=TILE,
        DEPTH=DEPTH,
        num_warps=8,
        num_stages=3,
    )
    return out
