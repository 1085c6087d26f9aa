"""Half of a symmetric product: OUT = beta C + alpha A Bᵀ in bfloat16, tiles below the diagonal stored twice.

Shapes   A, B (N, m, k) with any strides, whose product is symmetric: B is A, or both are polynomials of one symmetric
         matrix. C, OUT (N, m, m) contiguous, C symmetric. m a multiple of 128, k of 64
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE, DEPTH = 128, 64


@triton.jit
def symmetric_kernel(
    A,
    B,
    C,
    OUT,
    m: tl.constexpr,
    k: tl.constexpr,
    a_batch,
    a_row,
    a_column,
    b_batch,
    b_row,
    b_column,
    beta,
    alpha,
    ADD: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    tile, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)  # tiles are counted row by row: 1 + 2 + ... + i before
    j = tile - i * (i + 1) // 2
    rows, columns, depth = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE), tl.arange(0, DEPTH)
    left = A + batch * a_batch + rows[:, None] * a_row + depth[None, :] * a_column
    right = B + batch * b_batch + columns[None, :] * b_row + depth[:, None] * b_column
    total = tl.zeros((TILE, TILE), tl.float32)
    for _ in range(0, k, DEPTH):
        total = tl.dot(tl.load(left), tl.load(right), total)
        left += DEPTH * a_column
        right += DEPTH * b_column
    total *= alpha
    here = rows[:, None] * m + columns[None, :]
    if ADD:
        total += beta * tl.load(C + batch * m * m + here).to(tl.float32)
    result = total.to(OUT.dtype.element_ty)
    tl.store(OUT + batch * m * m + here, result)
    if i != j:
        tl.store(OUT + batch * m * m + columns[:, None] * m + rows[None, :], tl.trans(result))


def fits(A: Tensor) -> bool:
    return A.ndim == 3 and A.dtype == torch.bfloat16 and A.shape[1] % TILE == 0 and A.shape[2] % DEPTH == 0


def symmetric(
    A: Tensor,
    B: Tensor,
    C: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
    out: Tensor | None = None,
    *,
    warps: int = 8,
    stages: int = 3,
) -> Tensor:
    N, m, k = A.shape
    out = torch.empty(N, m, m, dtype=A.dtype, device=A.device) if out is None else out
    count = m // TILE
    symmetric_kernel[(count * (count + 1) // 2, N)](
        *(A, B, out if C is None else C, out, m, k, *A.stride(), *B.stride(), beta, alpha),
        ADD=C is not None,
        TILE=TILE,
        DEPTH=DEPTH,
        num_warps=warps,
        num_stages=stages,
    )
    return out
