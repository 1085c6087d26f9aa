# type: ignore  (the language is Triton's: Python's types do not apply)
"""The Triton kernels of scalar_triton.py, whose equations (1) to (7) they compute, a chunk of C tokens a program.

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
# Triton's interpreter takes bf16 factors for integers: there they are widened again, once they are rounded.
WIDEN = tl.constexpr(INTERPRETED) if triton else None
# The sizes that change from call to call. Triton would compile again where one of them begins or ceases to be a
# multiple of 16; the strides, which it sees through to the widest loads, it may.
RUNTIME = ["L", "B", "chunks", "each"]

jit: Any = triton.jit if triton else lambda kernel: kernel


def launched(kernel) -> Any:
    return triton.jit(do_not_specialize=RUNTIME)(kernel) if triton else kernel


@jit
def _tile(base, row, stride, col, rows, cols):
    """(row, col) of a matrix whose last stride is 1; 0 from row `rows` and from column `cols` on."""
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    return tl.load(base + row[:, None] * stride + col[None, :], mask=inside, other=0.0)


@jit
def _put(base, row, stride, col, rows, cols, value):
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    tl.store(base + row[:, None] * stride + col[None, :], value.to(base.dtype.element_ty), mask=inside)


@jit
def _factor(x, PRECISION: tl.constexpr):
    """x as a factor of products, rounded once where they are."""
    if PRECISION == "bf16":
        return x.to(tl.bfloat16)
    else:
        return x.to(tl.float32)


@jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, in fp32; the factors are rounded to bf16 where that is the precision."""
    a, b = _factor(a, PRECISION), _factor(b, PRECISION)
    if PRECISION == "bf16":
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, acc)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


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
    if not VELOCITY:
        tl.store(here + 3 * C, tl.zeros((C,), tl.float32))
    else:
        tl.store(here + 3 * C, tl.sum(_decay(high, low, row) * _pMc(row, real, log2_gamma)[None, :], 1))
        last = tl.sum(last[:, None] * _pMom(row, real, log2_gamma), 0)
    tl.store(here + 4 * C, last)


@launched
def walk(
    v, k, rows, S_in, M_in, Sc, Mc, S_out, M_out, lengths, log2_gamma, alpha, L, H, N, P, r, chunks, PB,
    v_sb, v_st, v_sh, k_sb, k_st, k_sg,
    VELOCITY: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """(2), chunk after chunk; Sc, Mc get the states that enter each. REVERSE: (4), the last chunk first, with Ȳ and Q
    in the places of W and K; Sc, Mc get the gradients at each chunk's end.
    """
    piece = tl.program_id(0)
    b, h = (piece // (PB * H)).to(tl.int64), ((piece // PB) % H).to(tl.int64)
    row, n, p = tl.arange(0, C), tl.program_id(1) * BN + tl.arange(0, BN), (piece % PB) * BP + tl.arange(0, BP)
    v += b * v_sb + h * v_sh
    k += b * k_sb + (h // r) * k_sg
    whole = (b * H + h) * N * P
    S = _tile(S_in + whole, n, P, p, N, P)
    M = S
    if VELOCITY:
        M = _tile(M_in + whole, n, P, p, N, P)
    length = tl.minimum(tl.load(lengths + b), L)
    rows += (b * H + h) * chunks * 5 * C
    first = rows + ((chunks - 1) * 5 * C if REVERSE else 0)
    F_next, g_next = tl.load(first + 3 * C - 1), tl.load(first + 4 * C - 1)  # F_C, g_C of the chunk that comes
    for i in range(0, chunks):
        j, then = b * 0 + i, tl.minimum(i + 1, chunks - 1)  # int64
        if REVERSE:
            j, then = chunks - 1 - j, tl.maximum(chunks - 2 - i, 0)
        real = tl.minimum(tl.maximum(length - j * C, 0), C).to(tl.int32)
        here, of = (b * H + h) * chunks + j, rows + j * 5 * C
        F_C, g_C = F_next, g_next
        F_next, g_next = tl.load(rows + then * 5 * C + 3 * C - 1), tl.load(rows + then * 5 * C + 4 * C - 1)
        V = alpha * _tile(v + j * C * v_st, row, v_st, p, real, P).to(tl.float32)
        K = tl.trans(_tile(k + j * C * k_st, row, k_st, n, real, N))
        _put(Sc + here * N * P, n, P, p, N, P, S)
        if VELOCITY:
            Mc_C = tl.exp2(real.to(tl.float32) * log2_gamma)
            _put(Mc + here * N * P, n, P, p, N, P, M)
            if REVERSE:
                M = _dot(K, tl.load(of + 3 * C + row)[:, None] * V, Mc_C * M + g_C * S, PRECISION)
                S = _dot(K, tl.load(of + 2 * C + row)[:, None] * V, F_C * S, PRECISION)
            else:
                S = _dot(K, tl.load(of + 4 * C + row)[:, None] * V, F_C * S + g_C * M, PRECISION)
                M = _dot(K, _last_Mom(row, real, log2_gamma)[:, None] * V, Mc_C * M, PRECISION)
        else:
            S = _dot(K, tl.load(of + (2 * C if REVERSE else 4 * C) + row)[:, None] * V, F_C * S, PRECISION)
    _put(S_out + whole, n, P, p, N, P, S)
    if VELOCITY:
        _put(M_out + whole, n, P, p, N, P, M)


@launched
def outputs(
    w, k, q, rows, Sc, Mc, y, lengths, log2_gamma, alpha, L, H, N, P, r, chunks, PB,
    w_sb, w_st, w_sh, k_sb, k_st, k_sg, q_sb, q_st, q_sg,
    VELOCITY: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """(3), as Y = (F ⊙ Q) S₀ + (g ⊙ Q) M₀ + (Res ⊙ Q Kᵀ) W: one sum."""
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
        QK = _dot(Q, tl.trans(K), QK, PRECISION)
        Y = _dot(F[:, None] * Q, _tile(Sc + here * N * P, n, P, p, N, P), Y, PRECISION)
        if VELOCITY:
            Y = _dot(g[:, None] * Q, _tile(Mc + here * N * P, n, P, p, N, P), Y, PRECISION)
    Res = _decay(tl.load(rows), tl.load(rows + C), row)
    if VELOCITY:
        Res = _dot(Res, _pMom(row, real, log2_gamma), tl.zeros((C, C), tl.float32), PRECISION)
    W = _tile(w + b * w_sb + j * C * w_st + h * w_sh, row, w_st, p, real, P)
    Y = _dot(alpha * Res * QK, W, Y, PRECISION)
    Y = tl.where((row < real)[:, None], Y, 0.0)
    _put(y + ((b * L + j * C) * H + h) * P, row, H * P, p, L - j * C, P, Y)


@jit
def _beside_keys(
    dY, W, q, k, S, M, dS, real, N, P, p, q_st, k_st,
    VELOCITY: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Q Kᵀ; ⟨Ȳ, Q S₀⟩, ⟨Ȳ, Q M₀⟩ and ⟨W, K S̄₁⟩ of each row, as ⟨Q, Ȳ S₀ᵀ⟩ and so on; ⟨S̄₁, S₀⟩ and ⟨S̄₁, M₀⟩."""
    row = tl.arange(0, C)
    none = tl.zeros((C, BN), tl.float32)
    QK = tl.zeros((C, C), tl.float32)
    of_F = tl.zeros((C,), tl.float32)
    of_g = tl.zeros((C,), tl.float32)
    of_last = tl.zeros((C,), tl.float32)
    S_through = tl.zeros((BP,), tl.float32)
    M_through = tl.zeros((BP,), tl.float32)
    for first in range(0, N, BN):
        n = first + tl.arange(0, BN)
        Q, K = _tile(q, row, q_st, n, real, N), _tile(k, row, k_st, n, real, N)
        S0, dS1 = _tile(S, n, P, p, N, P), _tile(dS, n, P, p, N, P)
        QK = _dot(Q, tl.trans(K), QK, PRECISION)
        of_F += tl.sum(Q * _dot(dY, tl.trans(S0), none, PRECISION), 1)
        of_last += tl.sum(K * _dot(W, tl.trans(dS1), none, PRECISION), 1)
        S_through += tl.sum(S0 * dS1.to(tl.float32), 0)
        if VELOCITY:
            M0 = _tile(M, n, P, p, N, P)
            of_g += tl.sum(Q * _dot(dY, tl.trans(M0), none, PRECISION), 1)
            M_through += tl.sum(M0 * dS1.to(tl.float32), 0)
    return QK, of_F, of_g, of_last, tl.sum(S_through, 0), tl.sum(M_through, 0)


@launched
def gate_gradients(
    lg, w, k, q, dy, rows, Sc, Mc, dSc, Ps, dQKs, dlg, lengths, log2_gamma, alpha, B, L, H, N, P, r, chunks, PB,
    lg_sb, lg_st, lg_sh, w_sb, w_st, w_sh, k_sb, k_st, k_sg, q_sb, q_st, q_sg, y_sb, y_st, y_sh,
    VELOCITY: tl.constexpr, PRECISION: tl.constexpr, LOWEST: tl.constexpr,
    C: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """(6): the gradients of lg by each piece of values; Ps = Res ⊙ Q Kᵀ for (5), and dQKs = Ȳ Wᵀ ⊙ Res for (7)."""
    piece = tl.program_id(0)
    h, j = ((piece // PB) % H).to(tl.int64), tl.program_id(1).to(tl.int64)
    b = (piece // (PB * H)).to(tl.int64)
    row, p = tl.arange(0, C), (piece % PB) * BP + tl.arange(0, BP)
    real, here = _real(lengths, b, j, L, C), (b * H + h) * chunks + j
    k += b * k_sb + j * C * k_st + (h // r) * k_sg
    q += b * q_sb + j * C * q_st + (h // r) * q_sg
    rows += here * 5 * C
    dY = _factor(_tile(dy + b * y_sb + j * C * y_st + h * y_sh, row, y_st, p, real, P), PRECISION)
    W = _factor(_tile(w + b * w_sb + j * C * w_st + h * w_sh, row, w_st, p, real, P), PRECISION)
    M = Mc
    if VELOCITY:
        M = Mc + here * N * P
    QK, of_F, of_g, of_last, S_through, M_through = _beside_keys(
        dY, W, q, k, Sc + here * N * P, M, dSc + here * N * P, real, N, P, p, q_st, k_st,
        VELOCITY, PRECISION, C, BN, BP,
    )  # fmt: skip

    none = tl.zeros((C, C), tl.float32)
    Res = _decay(tl.load(rows + row), tl.load(rows + C + row), row)
    if VELOCITY:
        Res = _dot(Res, _pMom(row, real, log2_gamma), none, PRECISION)
    dP = alpha * _dot(dY, tl.trans(W), none, PRECISION)
    _put(dQKs + (here * PB + piece % PB) * C * C, row, C, row, C, C, dP * Res)
    if piece % PB == 0:
        _put(Ps + here * C * C, row, C, row, C, C, Res * QK)

    # The rows are read again: what was made of them would fill the registers meanwhile.
    high, low, real = tl.load(rows + row), tl.load(rows + C + row), _real(lengths, b, j, L, C)
    dDec = dP * QK  # with velocity of Res, which comes first; X reads the lower half, and that of it alone
    of_last = alpha * of_last  # c of (6), then d
    if VELOCITY:
        pMom, pMc = _pMom(row, real, log2_gamma), _pMc(row, real, log2_gamma)
        dDec = _dot(dDec, tl.trans(pMom), of_g[:, None] * pMc[None, :], PRECISION)
        of_last = tl.sum(pMom * of_last[None, :], 1) + M_through * pMc
    across = row[:, None] > row[None, :]
    X = tl.where(across, _decay(high, low, row) * dDec, 0.0)
    passing = tl.sum(X, 1) - tl.sum(X, 0) + tl.load(rows + 2 * C + row) * of_F
    passing = tl.cumsum(passing, 0, reverse=True)
    to_end = tl.exp((tl.load(rows + C - 1) - high) + (tl.load(rows + 2 * C - 1) - low))  # Dec[C,:]
    passing += tl.sum(tl.where(across, (to_end * of_last)[None, :], 0.0), 1)
    passing += tl.load(rows + 3 * C - 1) * S_through
    given = tl.load(lg + b * lg_sb + (j * C + row) * lg_st + h * lg_sh, mask=row < real, other=0.0).to(tl.float32)
    passing = tl.where((row < real) & ~(given < LOWEST), passing, 0.0)
    here = dlg + (((piece % PB) * B + b) * L + j * C) * H + h
    tl.store(here + row * H, passing.to(dlg.dtype.element_ty), mask=row < L - j * C)


@launched
def write_gradients(
    k, dy, rows, dSc, dMc, Ps, dw, lengths, log2_gamma, alpha, L, H, N, P, r, chunks, PB,
    k_sb, k_st, k_sg, y_sb, y_st, y_sh,
    VELOCITY: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """(5), as W̄ = (Res ⊙ Q Kᵀ)ᵀ Ȳ + (Res[C,:] ⊙ K) S̄₁ + (Mom[C,:] ⊙ K) M̄₁: one sum."""
    piece = tl.program_id(0)
    h, j = ((piece // PB) % H).to(tl.int64), tl.program_id(1).to(tl.int64)
    b = (piece // (PB * H)).to(tl.int64)
    row, p = tl.arange(0, C), (piece % PB) * BP + tl.arange(0, BP)
    real, here = _real(lengths, b, j, L, C), (b * H + h) * chunks + j
    k += b * k_sb + j * C * k_st + (h // r) * k_sg
    of_S, of_M = tl.load(rows + (here * 5 + 4) * C + row), _last_Mom(row, real, log2_gamma)
    dY = _tile(dy + b * y_sb + j * C * y_st + h * y_sh, row, y_st, p, real, P)
    Pt = tl.trans(_tile(Ps + here * C * C, row, C, row, C, C))
    dW = _dot(Pt, dY, tl.zeros((C, BP), tl.float32), PRECISION)
    for first in range(0, N, BN):
        n = first + tl.arange(0, BN)
        K = _tile(k, row, k_st, n, real, N)
        dW = _dot(of_S[:, None] * K, _tile(dSc + here * N * P, n, P, p, N, P), dW, PRECISION)
        if VELOCITY:
            dW = _dot(of_M[:, None] * K, _tile(dMc + here * N * P, n, P, p, N, P), dW, PRECISION)
    _put(dw + ((b * L + j * C) * H + h) * P, row, H * P, p, L - j * C, P, alpha * dW)


@launched
def key_gradients(
    w, k, q, dy, rows, Sc, Mc, dSc, dMc, dQKs, dk, dq, lengths, log2_gamma, alpha, B, L, H, N, P, r, chunks, PB, each,
    w_sb, w_st, w_sh, k_sb, k_st, k_sg, q_sb, q_st, q_sg, y_sb, y_st, y_sh,
    VELOCITY: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """(7): the gradients of k and q by `each` pieces of values of a group, added in their order."""
    part, G = tl.program_id(0), H // r
    blocks = tl.cdiv(r * PB, each)
    block, g, b = part % blocks, ((part // blocks) % G).to(tl.int64), (part // (blocks * G)).to(tl.int64)
    j = tl.program_id(1).to(tl.int64)
    row, n = tl.arange(0, C), tl.program_id(2) * BN + tl.arange(0, BN)
    real = _real(lengths, b, j, L, C)
    dQ = tl.zeros((C, BN), tl.float32)
    dK = tl.zeros((C, BN), tl.float32)
    for piece in range(block * each, tl.minimum((block + 1) * each, r * PB)):
        h, p = g * r + piece // PB, (piece % PB) * BP + tl.arange(0, BP)
        here = (b * H + h) * chunks + j
        state, of = here * N * P, rows + here * 5 * C + row
        dY = _tile(dy + b * y_sb + j * C * y_st + h * y_sh, row, y_st, p, real, P)
        from_S, S = tl.load(of + 2 * C)[:, None] * dY, _tile(Sc + state, n, P, p, N, P)
        dQ = _dot(from_S, tl.trans(S), dQ, PRECISION)
        W = _tile(w + b * w_sb + j * C * w_st + h * w_sh, row, w_st, p, real, P)
        to_S, dS = (alpha * tl.load(of + 4 * C))[:, None] * W, _tile(dSc + state, n, P, p, N, P)
        dK = _dot(to_S, tl.trans(dS), dK, PRECISION)
        if VELOCITY:
            from_M, M = tl.load(of + 3 * C)[:, None] * dY, _tile(Mc + state, n, P, p, N, P)
            dQ = _dot(from_M, tl.trans(M), dQ, PRECISION)
            to_M, dM = (alpha * _last_Mom(row, real, log2_gamma))[:, None] * W, _tile(dMc + state, n, P, p, N, P)
            dK = _dot(to_M, tl.trans(dM), dK, PRECISION)
    dQK = tl.zeros((C, C), tl.float32)
    for piece in range(block * each, tl.minimum((block + 1) * each, r * PB)):
        here = (b * H + g * r + piece // PB) * chunks + j
        dQK += _tile(dQKs + (here * PB + piece % PB) * C * C, row, C, row, C, C)
    K = _tile(k + b * k_sb + j * C * k_st + g * k_sg, row, k_st, n, real, N)
    dQ = _dot(dQK, K, dQ, PRECISION)
    Q = _tile(q + b * q_sb + j * C * q_st + g * q_sg, row, q_st, n, real, N)
    dK = _dot(tl.trans(dQK), Q, dK, PRECISION)
    here = (((block * B + b) * L + j * C) * G + g) * N
    _put(dq + here, row, G * N, n, L - j * C, N, dQ)
    _put(dk + here, row, G * N, n, L - j * C, N, dK)
