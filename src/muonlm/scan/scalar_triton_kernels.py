# type: ignore  (the language is Triton's: Python's types do not apply)
"""The Triton kernels of scalar_triton.py, whose equations (1) to (9) they compute, a chunk of C tokens a program.

Letters  b row of the batch, h head, g group of r heads, piece: BP values of a head, PB pieces each, j chunk, `row` its
         tokens, n keys (BN at a time), p values; w_sb, w_st, w_sh: strides of w in b, t and h.
         b, h and j are int64, since offsets may pass 2³¹
Padding  is loaded as lg = 0 and as 0 in every other sequence; `real` tokens of a chunk come before it
"""

import os
from types import SimpleNamespace
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # the module imports without Triton; scalar_triton.available() tells
    triton, tl = None, SimpleNamespace(constexpr=None)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # when the kernels below were decorated
# The sizes that change from call to call. Triton would compile again where one of them begins or ceases to be a
# multiple of 16; the strides, which it sees through to the widest loads, it may.
RUNTIME = ["L", "B", "chunks", "each"]

jit: Any = triton.jit if triton else lambda kernel: kernel


def launched(kernel) -> Any:
    return triton.jit(do_not_specialize=RUNTIME)(kernel) if triton else kernel


@jit
def _tile(base, row, stride, col, rows, cols):
    """(row, col) of a matrix whose last stride is 1, in fp32; 0 from row `rows` and from column `cols` on."""
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    return tl.load(base + row[:, None] * stride + col[None, :], mask=inside, other=0.0).to(tl.float32)


@jit
def _put(base, row, stride, col, rows, cols, value):
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    tl.store(base + row[:, None] * stride + col[None, :], value.to(base.dtype.element_ty), mask=inside)


@jit
def _real(lengths, b, j, L, C: tl.constexpr):
    """Tokens of chunk j that are not padding."""
    return tl.minimum(tl.maximum(tl.minimum(tl.load(lengths + b), L) - j * C, 0), C).to(tl.int32)


@jit
def _decay(high, low, row):
    """Dec (C,C), from the sums of log gates."""
    between = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    return tl.exp(tl.where(row[:, None] >= row[None, :], between, float("-inf")))


@jit
def _pMom(row, real, log2_gamma):
    """diag(p) Mom (C,C)."""
    both = (row[:, None] >= row[None, :]) & (row < real)[:, None]
    steps = tl.where(both, row[:, None] - row[None, :], 0)
    return tl.where(both, tl.exp2(steps.to(tl.float32) * log2_gamma), 0.0)


@jit
def _pMc(row, real, log2_gamma):
    """p ⊙ Mc (C,)."""
    return tl.where(row < real, tl.exp2((row + 1).to(tl.float32) * log2_gamma), 0.0)


@jit
def _last_Mom(row, real, log2_gamma):
    """Mom[C,:] (C,)."""
    return tl.exp2(tl.maximum(real - 1 - row, 0).to(tl.float32) * log2_gamma)


@launched
def gate_rows(
    lg, rows, lengths, log2_gamma, L, H, chunks, lg_sb, lg_st, lg_sh,
    VELOCITY: tl.constexpr, LOWEST: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """What all else needs of the gates: five rows (C,) a chunk: sums of log gates (high, low), F, g, Res[C,:]."""
    b, h = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    j, row = tl.program_id(1).to(tl.int64), tl.arange(0, C)
    real = _real(lengths, b, j, L, C)
    x = tl.load(lg + b * lg_sb + (j * C + row) * lg_st + h * lg_sh, mask=row < real, other=0.0).to(tl.float32)
    x = tl.where(x < LOWEST, LOWEST, x).to(tl.float64)  # not a maximum, which would drop a NaN
    sums, total = tl.cumsum(x, 0), tl.sum(x, 0)
    high = sums.to(tl.float32)
    low = (sums - high.to(tl.float64)).to(tl.float32)
    last = tl.exp((total - sums).to(tl.float32))
    here = rows + ((b * H + h) * chunks + j) * 5 * C + row
    tl.store(here, high)
    tl.store(here + C, low)
    tl.store(here + 2 * C, tl.exp(high + low))
    if VELOCITY:
        tl.store(here + 3 * C, tl.sum(_decay(high, low, row) * _pMc(row, real, log2_gamma)[None, :], 1))
        last = tl.sum(last[:, None] * _pMom(row, real, log2_gamma), 0)
    tl.store(here + 4 * C, last)


@launched
def chunk_states(
    v, k, rows, S_out, M_out, lengths, log2_gamma, alpha, L, H, N, P, r, chunks, PB,
    v_sb, v_st, v_sh, k_sb, k_st, k_sg,
    VELOCITY: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """(3): what each chunk adds to the states. REVERSE: (5), with Ȳ and Q in the places of W and K."""
    piece = tl.program_id(0)
    h, j = ((piece // PB) % H).to(tl.int64), tl.program_id(1).to(tl.int64)
    b = (piece // (PB * H)).to(tl.int64)
    row, n, p = tl.arange(0, C), tl.program_id(2) * BN + tl.arange(0, BN), (piece % PB) * BP + tl.arange(0, BP)
    real, here = _real(lengths, b, j, L, C), (b * H + h) * chunks + j
    V = alpha * _tile(v + b * v_sb + j * C * v_st + h * v_sh, row, v_st, p, real, P)
    K = _tile(k + b * k_sb + j * C * k_st + (h // r) * k_sg, row, k_st, n, real, N)
    rows += here * 5 * C + row
    of_S = tl.load(rows + (2 * C if REVERSE else 4 * C))
    _put(S_out + here * N * P, n, P, p, N, P, tl.dot(tl.trans(K), of_S[:, None] * V, input_precision=PRECISION))
    if VELOCITY:
        of_M = tl.load(rows + 3 * C) if REVERSE else _last_Mom(row, real, log2_gamma)
        _put(M_out + here * N * P, n, P, p, N, P, tl.dot(tl.trans(K), of_M[:, None] * V, input_precision=PRECISION))


@launched
def walk(
    S_in, M_in, rows, Sc, Mc, S_out, M_out, lengths, log2_gamma, L, H, cells, chunks,
    REVERSE: tl.constexpr, VELOCITY: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sc, Mc hold what each chunk adds, and get the states that enter it, (4). REVERSE: gradients at its end, (6)."""
    bh = tl.program_id(0).to(tl.int64)
    cell = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cell < cells
    S = tl.load(S_in + bh * cells + cell, mask=inside, other=0.0)
    M = S
    if VELOCITY:
        M = tl.load(M_in + bh * cells + cell, mask=inside, other=0.0)
    for i in range(0, chunks):
        j = i
        if REVERSE:
            j = chunks - 1 - i
        here = (bh * chunks + j) * cells + cell
        last = rows + ((bh * chunks + j) * 5 + 2) * C + C - 1
        F, Sb = tl.load(last), tl.load(Sc + here, mask=inside, other=0.0)
        if VELOCITY:
            g, Mb = tl.load(last + C), tl.load(Mc + here, mask=inside, other=0.0)
            power = tl.exp2(_real(lengths, bh // H, j, L, C).to(tl.float32) * log2_gamma)  # Mc_C
            tl.store(Sc + here, S, mask=inside)
            tl.store(Mc + here, M, mask=inside)
            if REVERSE:
                M = power * M + g * S + Mb
                S = F * S + Sb
            else:
                S = F * S + g * M + Sb
                M = power * M + Mb
        else:
            tl.store(Sc + here, S, mask=inside)
            S = F * S + Sb
    tl.store(S_out + bh * cells + cell, S, mask=inside)
    if VELOCITY:
        tl.store(M_out + bh * cells + cell, M, mask=inside)


@launched
def outputs(
    w, k, q, rows, Sc, Mc, y, lengths, log2_gamma, alpha, L, H, N, P, r, chunks, PB,
    w_sb, w_st, w_sh, k_sb, k_st, k_sg, q_sb, q_st, q_sg,
    VELOCITY: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """(2), as Y = (F ⊙ Q) S₀ + (g ⊙ Q) M₀ + (Res ⊙ Q Kᵀ) W: one sum."""
    piece = tl.program_id(0)
    h, j = ((piece // PB) % H).to(tl.int64), tl.program_id(1).to(tl.int64)
    b = (piece // (PB * H)).to(tl.int64)
    row, p = tl.arange(0, C), (piece % PB) * BP + tl.arange(0, BP)
    real, here = _real(lengths, b, j, L, C), (b * H + h) * chunks + j
    k += b * k_sb + j * C * k_st + (h // r) * k_sg
    q += b * q_sb + j * C * q_st + (h // r) * q_sg
    rows += here * 5 * C + row
    F = tl.load(rows + 2 * C)
    if VELOCITY:
        g = tl.load(rows + 3 * C)
    QK = tl.zeros((C, C), tl.float32)
    Y = tl.zeros((C, BP), tl.float32)
    for first in range(0, N, BN):
        n = first + tl.arange(0, BN)
        Q, K = _tile(q, row, q_st, n, real, N), _tile(k, row, k_st, n, real, N)
        QK = tl.dot(Q, tl.trans(K), QK, input_precision=PRECISION)
        Y = tl.dot(F[:, None] * Q, _tile(Sc + here * N * P, n, P, p, N, P), Y, input_precision=PRECISION)
        if VELOCITY:
            Y = tl.dot(g[:, None] * Q, _tile(Mc + here * N * P, n, P, p, N, P), Y, input_precision=PRECISION)
    Res = _decay(tl.load(rows), tl.load(rows + C), row)
    if VELOCITY:
        Res = tl.dot(Res, _pMom(row, real, log2_gamma), input_precision=PRECISION)
    W = alpha * _tile(w + b * w_sb + j * C * w_st + h * w_sh, row, w_st, p, real, P)
    Y = tl.dot(Res * QK, W, Y, input_precision=PRECISION)
    Y = tl.where((row < real)[:, None], Y, 0.0)
    _put(y + ((b * L + j * C) * H + h) * P, row, H * P, p, L - j * C, P, Y)


@jit
def _entering(
    dY, q, k, S, M, dS, real, N, P, p, q_st, k_st,
    VELOCITY: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Q Kᵀ; ⟨Ȳ, Q S₀⟩ and ⟨Ȳ, Q M₀⟩ of each row, as ⟨Q, Ȳ S₀ᵀ⟩; ⟨S̄₁, S₀⟩ and ⟨S̄₁, M₀⟩ by column."""
    row = tl.arange(0, C)
    QK = tl.zeros((C, C), tl.float32)
    of_F = tl.zeros((C,), tl.float32)
    of_g = tl.zeros((C,), tl.float32)
    S_through = tl.zeros((BP,), tl.float32)
    M_through = tl.zeros((BP,), tl.float32)
    for first in range(0, N, BN):
        n = first + tl.arange(0, BN)
        Q, S0, dS1 = _tile(q, row, q_st, n, real, N), _tile(S, n, P, p, N, P), _tile(dS, n, P, p, N, P)
        QK = tl.dot(Q, tl.trans(_tile(k, row, k_st, n, real, N)), QK, input_precision=PRECISION)
        of_F += tl.sum(Q * tl.dot(dY, tl.trans(S0), input_precision=PRECISION), 1)
        S_through += tl.sum(S0 * dS1, 0)
        if VELOCITY:
            M0 = _tile(M, n, P, p, N, P)
            of_g += tl.sum(Q * tl.dot(dY, tl.trans(M0), input_precision=PRECISION), 1)
            M_through += tl.sum(M0 * dS1, 0)
    return QK, of_F, of_g, tl.sum(S_through, 0), tl.sum(M_through, 0)


@jit
def _leaving(
    dW, k, dS, dM, of_M, real, N, P, p, k_st,
    VELOCITY: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """K S̄₁, and dW with of_M ⊙ (K M̄₁) added."""
    row = tl.arange(0, C)
    to_S = tl.zeros((C, BP), tl.float32)
    for first in range(0, N, BN):
        n = first + tl.arange(0, BN)
        K = _tile(k, row, k_st, n, real, N)
        to_S = tl.dot(K, _tile(dS, n, P, p, N, P), to_S, input_precision=PRECISION)
        if VELOCITY:
            dW = tl.dot(of_M[:, None] * K, _tile(dM, n, P, p, N, P), dW, input_precision=PRECISION)
    return to_S, dW


@launched
def token_gradients(
    lg, w, k, q, dy, rows, Sc, Mc, dSc, dMc, dQKs, dlg, dw, lengths, log2_gamma, alpha, B, L, H, N, P, r, chunks, PB,
    lg_sb, lg_st, lg_sh, w_sb, w_st, w_sh, k_sb, k_st, k_sg, q_sb, q_st, q_sg, y_sb, y_st, y_sh,
    VELOCITY: tl.constexpr, PRECISION: tl.constexpr, LOWEST: tl.constexpr,
    C: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """(7), (8): the gradients of w, and those of lg by each piece of values; and dQKs = Ȳ Wᵀ ⊙ Res for (9)."""
    piece = tl.program_id(0)
    h, j = ((piece // PB) % H).to(tl.int64), tl.program_id(1).to(tl.int64)
    b = (piece // (PB * H)).to(tl.int64)
    row, p = tl.arange(0, C), (piece % PB) * BP + tl.arange(0, BP)
    real, here = _real(lengths, b, j, L, C), (b * H + h) * chunks + j
    w += b * w_sb + j * C * w_st + h * w_sh
    k += b * k_sb + j * C * k_st + (h // r) * k_sg
    q += b * q_sb + j * C * q_st + (h // r) * q_sg
    rows += here * 5 * C
    dY = _tile(dy + b * y_sb + j * C * y_st + h * y_sh, row, y_st, p, real, P)
    S, M, dS, dM = Sc + here * N * P, Mc, dSc + here * N * P, dMc
    if VELOCITY:
        M, dM = Mc + here * N * P, dMc + here * N * P
    QK, of_F, of_g, S_through, M_through = _entering(
        dY, q, k, S, M, dS, real, N, P, p, q_st, k_st, VELOCITY, PRECISION, C, BN, BP
    )

    high, low = tl.load(rows + row), tl.load(rows + C + row)
    Dec = _decay(high, low, row)
    dP = tl.dot(dY, tl.trans(alpha * _tile(w, row, w_st, p, real, P)), input_precision=PRECISION)
    dDec = dP * QK  # with velocity of Res, which comes first
    Res = Dec
    if VELOCITY:
        pMom, pMc = _pMom(row, real, log2_gamma), _pMc(row, real, log2_gamma)
        dRes = tl.where(row[:, None] >= row[None, :], dDec, 0.0)
        dDec = of_g[:, None] * pMc[None, :]
        dDec = tl.dot(dRes, tl.trans(pMom), dDec, input_precision=PRECISION)
        Res = tl.dot(Dec, pMom, input_precision=PRECISION)
    across = row[:, None] > row[None, :]
    X = tl.where(across, Dec * dDec, 0.0)
    passing = tl.sum(X, 1) - tl.sum(X, 0) + tl.load(rows + 2 * C + row) * of_F
    passing = tl.cumsum(passing, 0, reverse=True)
    here = (here * PB + piece % PB) * C * C
    tl.store(dQKs + here + row[:, None] * C + row[None, :], dP * Res)
    dW = tl.dot(tl.trans(Res * QK), dY, input_precision=PRECISION)

    of_M = _last_Mom(row, real, log2_gamma)
    to_S, dW = _leaving(dW, k, dS, dM, of_M, real, N, P, p, k_st, VELOCITY, PRECISION, C, BN, BP)
    d_last = tl.sum(alpha * _tile(w, row, w_st, p, real, P) * to_S, 1)  # c of (8), then d
    if VELOCITY:
        d_last = tl.sum(_pMom(row, real, log2_gamma) * d_last[None, :], 1)
        d_last += M_through * _pMc(row, real, log2_gamma)
    dW += tl.load(rows + 4 * C + row)[:, None] * to_S
    _put(dw + ((b * L + j * C) * H + h) * P, row, H * P, p, L - j * C, P, alpha * dW)

    to_end = tl.exp((tl.load(rows + C - 1) - high) + (tl.load(rows + 2 * C - 1) - low))  # Dec[C,:]
    passing += tl.sum(tl.where(across, (to_end * d_last)[None, :], 0.0), 1)
    passing += tl.load(rows + 3 * C - 1) * S_through
    given = tl.load(lg + b * lg_sb + (j * C + row) * lg_st + h * lg_sh, mask=row < real, other=0.0).to(tl.float32)
    passing = tl.where((row < real) & ~(given < LOWEST), passing, 0.0)
    here = dlg + (((piece % PB) * B + b) * L + j * C) * H + h
    tl.store(here + row * H, passing.to(dlg.dtype.element_ty), mask=row < L - j * C)


@launched
def key_gradients(
    w, k, q, dy, rows, Sc, Mc, dSc, dMc, dQKs, dk, dq, lengths, log2_gamma, alpha, B, L, H, N, P, r, chunks, PB, each,
    w_sb, w_st, w_sh, k_sb, k_st, k_sg, q_sb, q_st, q_sg, y_sb, y_st, y_sh,
    VELOCITY: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """(9): the gradients of k and q by `each` pieces of values of a group, added in their order."""
    part, G = tl.program_id(0), H // r
    blocks = tl.cdiv(r * PB, each)
    block, g, b = part % blocks, ((part // blocks) % G).to(tl.int64), (part // (blocks * G)).to(tl.int64)
    j = tl.program_id(1).to(tl.int64)
    row, n = tl.arange(0, C), tl.program_id(2) * BN + tl.arange(0, BN)
    real = _real(lengths, b, j, L, C)
    dQK = tl.zeros((C, C), tl.float32)
    dQ = tl.zeros((C, BN), tl.float32)
    dK = tl.zeros((C, BN), tl.float32)
    for piece in range(block * each, tl.minimum((block + 1) * each, r * PB)):
        h, p = g * r + piece // PB, (piece % PB) * BP + tl.arange(0, BP)
        here = (b * H + h) * chunks + j
        state, of = here * N * P, rows + here * 5 * C + row
        dQK += tl.load(dQKs + (here * PB + piece % PB) * C * C + row[:, None] * C + row[None, :])
        dY = _tile(dy + b * y_sb + j * C * y_st + h * y_sh, row, y_st, p, real, P)
        from_S, S = tl.load(of + 2 * C)[:, None] * dY, _tile(Sc + state, n, P, p, N, P)
        dQ = tl.dot(from_S, tl.trans(S), dQ, input_precision=PRECISION)
        W = alpha * _tile(w + b * w_sb + j * C * w_st + h * w_sh, row, w_st, p, real, P)
        to_S, dS = tl.load(of + 4 * C)[:, None] * W, _tile(dSc + state, n, P, p, N, P)
        dK = tl.dot(to_S, tl.trans(dS), dK, input_precision=PRECISION)
        if VELOCITY:
            from_M, M = tl.load(of + 3 * C)[:, None] * dY, _tile(Mc + state, n, P, p, N, P)
            dQ = tl.dot(from_M, tl.trans(M), dQ, input_precision=PRECISION)
            to_M, dM = _last_Mom(row, real, log2_gamma)[:, None] * W, _tile(dMc + state, n, P, p, N, P)
            dK = tl.dot(to_M, tl.trans(dM), dK, input_precision=PRECISION)
    K = _tile(k + b * k_sb + j * C * k_st + g * k_sg, row, k_st, n, real, N)
    dQ = tl.dot(dQK, K, dQ, input_precision=PRECISION)
    Q = _tile(q + b * q_sb + j * C * q_st + g * q_sg, row, q_st, n, real, N)
    dK = tl.dot(tl.trans(dQK), Q, dK, input_precision=PRECISION)
    here = (((block * B + b) * L + j * C) * G + g) * N
    _put(dq + here, row, G * N, n, L - j * C, N, dQ)
    _put(dk + here, row, G * N, n, L - j * C, N, dK)
