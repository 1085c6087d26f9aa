# type: ignore  (the language is Triton's: Python's types do not apply)
"""The Triton kernels of delta_triton.py, whose equations (1) to (5) they refer to.

    squares      (1)  Z, P, F, f, of each chunk by itself
    walk         (2)  chunk after chunk: V, the states between chunks, the last state
    outputs      (3)  Y, of each chunk by itself
    walk_back    (4)  chunk before chunk: R̄, Ū, the gradients of the states between chunks, that of the first state
    gradients    (5)  the others, of each chunk by itself

Letters  r = b H + h row of batch and head, j of n chunks, c token of a chunk (C), n key (N), p value (P): BN, BP wide
         blocks of them; R heads share a key; q_sb, q_st, q_sh: strides of q in batch, time, head, in UNITs
Dtypes   DT, that of q, k, u and of what one kernel keeps for another, is that of factors of products (fp32 ones
         with the precision EXACT); they add in fp32, as do all sums. Decays and states in registers are fp32.
"""

import os
import re
from types import SimpleNamespace
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # the module imports without Triton; delta_triton.available() tells
    triton, tl = None, SimpleNamespace(constexpr=lambda value: value)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # when the kernels below were decorated
WIDEN = tl.constexpr(INTERPRETED)  # the interpreter has no product of bf16 tiles: it takes their bits for integers


def jit(kernel) -> Any:
    """Lengths differ from batch to batch: none that is 1, or that 16 divides, gets a kernel of its own."""
    if triton is None:
        return kernel
    names = kernel.__code__.co_varnames[: kernel.__code__.co_argcount]
    return triton.jit(kernel, do_not_specialize=[x for x in names if re.fullmatch("L|n|._sb", x)])


@jit
def _rows(base, stride, c, left, lane, width: tl.constexpr):
    """(C, block) of a sequence from its chunk's first token on; 0 after `left` tokens and `width` lanes."""
    inside = (c < left)[:, None] & (lane < width)[None, :]
    return tl.load(base + c[:, None] * stride + lane[None, :], mask=inside, other=0.0)


@jit
def _put_rows(base, stride, c, left, lane, width: tl.constexpr, values):
    inside = (c < left)[:, None] & (lane < width)[None, :]
    tl.store(base + c[:, None] * stride + lane[None, :], values, mask=inside)


@jit
def _numbers(base, stride, c, left):
    """(C,) of a (B,L,H) sequence, in fp32; 0 after `left` tokens."""
    return tl.load(base + c * stride, mask=c < left, other=0.0).to(tl.float32)


@jit
def _dot(x, y, DT: tl.constexpr, EXACT: tl.constexpr):
    x, y = x.to(DT), y.to(DT)
    if WIDEN:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, input_precision=EXACT)


@jit
def _last(x, c, C: tl.constexpr):
    return tl.sum(tl.where(c == C - 1, x, 0.0), 0)


@jit
def _place(r, lengths, L, H):
    """Row, head and length of the row."""
    row = r // H
    return row, r % H, L if lengths is None else tl.minimum(tl.load(lengths + row), L)


@jit
def _log_sums(lg, c, left, H, C: tl.constexpr, MIN_LOG_GATE: tl.constexpr):
    """Σ lg over a chunk's tokens up to each, as high + low fp32 parts.

    It may reach 80 C, where one fp32 is off by 2e-4. Differences of the high parts of near sums are exact, so that a
    difference is off by 2⁻²⁴ of itself: nothing, where its exponential is not 0.
    """
    x = _numbers(lg, H, c, left)
    x = tl.where(x < MIN_LOG_GATE, MIN_LOG_GATE, x)  # not a maximum, which would drop a NaN
    total = tl.cumsum(x.to(tl.float64), 0)
    high = total.to(tl.float32)
    return high, (total - high.to(tl.float64)).to(tl.float32)


@jit
def _decays(lg, c, left, H, C: tl.constexpr, MIN_LOG_GATE: tl.constexpr):
    """Dec (C,C), F and f (C,) of (1)."""
    high, low = _log_sums(lg, c, left, H, C, MIN_LOG_GATE)
    between = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    Dec = tl.exp(tl.where(c[:, None] >= c[None, :], between, float("-inf")))
    return Dec, tl.exp(high), tl.exp((_last(high, c, C) - high) + (_last(low, c, C) - low))


@jit
def _solved(X, beta, c, C: tl.constexpr, EXACT: tl.constexpr):
    """Z of (1) for X (C,C), strictly lower: substitution inside 16 × 16 blocks, which are then merged pairwise.

    No powers of X: equal keys make them binomials, which cancel.
    """
    block, i = tl.arange(0, C // 16), tl.arange(0, 16)
    diagonal = block[:, None, None, None] == block[None, None, :, None]
    Z = tl.sum(tl.where(diagonal, tl.reshape(X, (C // 16, 16, C // 16, 16)), 0.0), 2)
    Xb = Z * tl.reshape(beta, (C // 16, 16))[:, None, :]
    for step in range(1, 16):
        here = i[None, :, None] == step
        row = tl.sum(tl.where(here, Xb, 0.0), 1)
        Z = tl.where(here, Z - tl.sum(row[:, :, None] * Z, 1)[:, None, :], Z)
    Z = tl.reshape(tl.where(diagonal, Z[:, :, None, :], 0.0), (C, C))
    if C > 16:
        Z = _merged(Z, X, beta, c, 16, EXACT)
    if C > 32:
        Z = _merged(Z, X, beta, c, 32, EXACT)
    return Z


@jit
def _merged(Z, X, beta, c, size: tl.constexpr, EXACT: tl.constexpr):
    """Z of blocks twice as long: Z + (I − Z diag(b)) Y (I − diag(b) Z), Y of X what lies between the two halves."""
    pair, side = c // (2 * size), c // size
    Y = tl.where((pair[:, None] == pair[None, :]) & (side[:, None] > side[None, :]), X, 0.0)
    Y -= tl.dot(Z * beta[None, :], Y, input_precision=EXACT)
    return Z + Y - tl.dot(Y * beta[None, :], Z, input_precision=EXACT)


@jit
def squares(
    q, k, lg, b, q_out, k_out, Z_out, P_out, F_out, f_out, lengths, L, n, q_sb, q_st, q_sh, k_sb, k_st, k_sh,
    H: tl.constexpr, R: tl.constexpr, N: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr, BN: tl.constexpr,
    MIN_LOG_GATE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """(1), and q and k in DT, (B,L,H/R,N), where q_out and k_out are given. Grid (n, B·H)."""
    j, r = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, h, length = _place(r, lengths, L, H)
    left, c = length - j * C, tl.arange(0, C)
    DT: tl.constexpr = Z_out.dtype.element_ty
    q += (row * q_sb + h // R * q_sh + j * C * q_st) * UNIT
    k += (row * k_sb + h // R * k_sh + j * C * k_st) * UNIT
    KK, QK = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    for start in range(0, N, BN):
        lane = start + tl.arange(0, BN)
        K, Q = _rows(k, k_st * UNIT, c, left, lane, N).to(DT), _rows(q, q_st * UNIT, c, left, lane, N).to(DT)
        if k_out is not None:
            if h % R == 0:
                here, heads = ((row * L + j * C) * (H // R) + h // R) * N, H // R
                _put_rows(k_out + here, heads * N, c, L - j * C, lane, N, K)
                _put_rows(q_out + here, heads * N, c, L - j * C, lane, N, Q)
        KK += _dot(K, tl.trans(K), DT, EXACT)
        QK += _dot(Q, tl.trans(K), DT, EXACT)
    token = (row * L + j * C) * H + h
    Dec, F, f = _decays(lg + token, c, left, H, C, MIN_LOG_GATE)
    beta = _numbers(b + token, H, c, left)
    X = tl.where(c[:, None] > c[None, :], KK * Dec, 0.0)
    chunk = r * n + j
    square = chunk * C * C + c[:, None] * C + c[None, :]
    tl.store(P_out + square, (QK * Dec).to(DT))
    tl.store(F_out + chunk * C + c, F)
    tl.store(f_out + chunk * C + c, f)
    tl.store(Z_out + square, _solved(X, beta, c, C, EXACT).to(DT))


@jit
def walk(
    k, u, b, Z_in, F, f, S0, V_out, S_out, S_end, lengths, L, n, k_sb, k_st, k_sh, u_sb, u_st, u_sh,
    H: tl.constexpr, R: tl.constexpr, N: tl.constexpr, P: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr,
    BN: tl.constexpr, BP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """(2). Grid (P/BP, B·H); BN ≥ N."""
    r = tl.program_id(1).to(tl.int64)
    row, h, length = _place(r, lengths, L, H)
    c, lane, p = tl.arange(0, C), tl.arange(0, BN), tl.program_id(0) * BP + tl.arange(0, BP)
    DT: tl.constexpr = k.dtype.element_ty
    k += (row * k_sb + h // R * k_sh) * UNIT
    u += (row * u_sb + h * u_sh) * UNIT
    cell, in_tile = lane[:, None] * P + p[None, :], (lane < N)[:, None] & (p < P)[None, :]
    if S0 is None:
        S = tl.zeros((BN, BP), tl.float32)
    else:
        S = tl.load(S0 + r * N * P + cell, mask=in_tile, other=0.0)
    for j in range(0, n):
        left, chunk = length - j * C, r * n + j
        K = _rows(k, k_st * UNIT, c, left, lane, N)
        U = _rows(u, u_st * UNIT, c, left, p, P)
        Z = tl.load(Z_in + chunk * C * C + c[:, None] * C + c[None, :])
        beta = _numbers(b + (row * L + j * C) * H + h, H, c, left)
        F_c, f_c = tl.load(F + chunk * C + c), tl.load(f + chunk * C + c)
        tl.store(S_out + chunk * N * P + cell, S.to(DT), mask=in_tile)
        W = U - F_c[:, None] * _dot(K, S, DT, EXACT)
        V = W - _dot(Z, beta[:, None] * W, DT, EXACT)
        _put_rows(V_out + chunk * C * P, P, c, C, p, P, V.to(DT))
        S = tl.load(F + chunk * C + C - 1) * S + _dot(tl.trans(K), (beta * f_c)[:, None] * V, DT, EXACT)
        k += C * k_st * UNIT
        u += C * u_st * UNIT
    tl.store(S_end + r * N * P + cell, S, mask=in_tile)


@jit
def outputs(
    q, b, P_in, F, S, V, y, lengths, L, n, q_sb, q_st, q_sh,
    H: tl.constexpr, R: tl.constexpr, N: tl.constexpr, P: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr,
    BN: tl.constexpr, BP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """(3). Grid (n, B·H, P/BP)."""
    j, r = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, h, length = _place(r, lengths, L, H)
    left, chunk = length - j * C, r * n + j
    c, p = tl.arange(0, C), tl.program_id(2) * BP + tl.arange(0, BP)
    DT: tl.constexpr = q.dtype.element_ty
    q += (row * q_sb + h // R * q_sh + j * C * q_st) * UNIT
    Y = tl.zeros((C, BP), tl.float32)
    for start in range(0, N, BN):
        lane = start + tl.arange(0, BN)
        S_p = _rows(S + chunk * N * P, P, lane, N, p, P)
        Y += _dot(_rows(q, q_st * UNIT, c, left, lane, N), S_p, DT, EXACT)
    beta = _numbers(b + (row * L + j * C) * H + h, H, c, left)
    E = beta[:, None] * _rows(V + chunk * C * P, P, c, C, p, P)
    QK = tl.load(P_in + chunk * C * C + c[:, None] * C + c[None, :])
    Y = Y * tl.load(F + chunk * C + c)[:, None] + _dot(QK, E, DT, EXACT)
    _put_rows(y + ((row * L + j * C) * H + h) * P, H * P, c, L - j * C, p, P, Y)


@jit
def walk_back(
    q, k, b, gy, Z_in, P_in, F, f, S, V, gS, dR_out, dS_out, du, ends, dS_end, lengths, L, n,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, y_sb, y_st, y_sh,
    H: tl.constexpr, R: tl.constexpr, N: tl.constexpr, P: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr,
    BN: tl.constexpr, BP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """(4), and in `ends` what ⟨S̄₁, S₁⟩ is the sum of, C + N numbers a chunk and block. Grid (P/BP, B·H); BN ≥ N."""
    r = tl.program_id(1).to(tl.int64)
    row, h, length = _place(r, lengths, L, H)
    c, lane, p = tl.arange(0, C), tl.arange(0, BN), tl.program_id(0) * BP + tl.arange(0, BP)
    DT: tl.constexpr = k.dtype.element_ty
    end = (n - 1).to(tl.int64)
    q += (row * q_sb + h // R * q_sh + end * C * q_st) * UNIT
    k += (row * k_sb + h // R * k_sh + end * C * k_st) * UNIT
    gy += (row * y_sb + h * y_sh + end * C * y_st) * UNIT
    cell, in_tile = lane[:, None] * P + p[None, :], (lane < N)[:, None] & (p < P)[None, :]
    if gS is None:
        dS = tl.zeros((BN, BP), tl.float32)
    else:
        dS = tl.load(gS + r * N * P + cell, mask=in_tile, other=0.0)
    for i in range(0, n):
        j = end - i
        left, chunk = length - j * C, r * n + j
        square = chunk * C * C + c[:, None] * C + c[None, :]
        K = _rows(k, k_st * UNIT, c, left, lane, N)
        Q = _rows(q, q_st * UNIT, c, left, lane, N)
        dY = _rows(gy, y_st * UNIT, c, left, p, P)
        Z, QK = tl.load(Z_in + square), tl.load(P_in + square)
        beta = _numbers(b + (row * L + j * C) * H + h, H, c, left)
        F_c, f_c = tl.load(F + chunk * C + c), tl.load(f + chunk * C + c)
        F_C, S_p = tl.load(F + chunk * C + C - 1), _rows(S + chunk * N * P, P, lane, N, p, P)
        left_at = ends + ((tl.program_id(0) * tl.num_programs(1) + r) * n + j) * (C + N)
        tl.store(left_at + C + lane, F_C * tl.sum(dS * S_p, 1), mask=lane < N)
        tl.store(dS_out + chunk * N * P + cell, dS.to(DT), mask=in_tile)
        dE = f_c[:, None] * _dot(K, dS, DT, EXACT)
        V_p = _rows(V + chunk * C * P, P, c, C, p, P)
        tl.store(left_at + c, beta * tl.sum(dE * V_p, 1))
        dE += _dot(tl.trans(QK), dY, DT, EXACT)
        dR = dE - _dot(tl.trans(Z), beta[:, None] * dE, DT, EXACT)
        _put_rows(dR_out + chunk * C * P, P, c, C, p, P, dR.to(DT))
        _put_rows(du + ((row * L + j * C) * H + h) * P, H * P, c, L - j * C, p, P, (beta[:, None] * dR).to(DT))
        dS = F_C * dS + _dot(tl.trans(Q), F_c[:, None] * dY, DT, EXACT)
        dS -= _dot(tl.trans(K), (beta * F_c)[:, None] * dR, DT, EXACT)
        q -= C * q_st * UNIT
        k -= C * k_st * UNIT
        gy -= C * y_st * UNIT
    if dS_end is not None:
        tl.store(dS_end + r * N * P + cell, dS, mask=in_tile)


@jit
def gradients(
    q, k, lg, b, gy, S, V, dR_in, dS_in, ends, dq, dk, db, dlg, lengths, L, n,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, y_sb, y_st, y_sh,
    H: tl.constexpr, R: tl.constexpr, N: tl.constexpr, P: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr,
    BN: tl.constexpr, BP: tl.constexpr, CN: tl.constexpr, ENDS: tl.constexpr, MIN_LOG_GATE: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """(5). Grid (n, B·H, N/BN), each for BN keys; the first also gives b̄, and to l̄g the `ends` of ENDS blocks."""
    j, r, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    row, h, length = _place(r, lengths, L, H)
    left, chunk, token = length - j * C, r * n + j, (row * L + j * C) * H + h
    c, lane = tl.arange(0, C), part * BN + tl.arange(0, BN)
    DT: tl.constexpr = k.dtype.element_ty
    q += (row * q_sb + h // R * q_sh + j * C * q_st) * UNIT
    k += (row * k_sb + h // R * k_sh + j * C * k_st) * UNIT
    gy += (row * y_sb + h * y_sh + j * C * y_st) * UNIT

    YV, RV = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    read, write, dQ = tl.zeros((C, BN), tl.float32), tl.zeros((C, BN), tl.float32), tl.zeros((C, BN), tl.float32)
    for start in range(0, P, BP):
        p = start + tl.arange(0, BP)
        dY, dR = _rows(gy, y_st * UNIT, c, left, p, P), _rows(dR_in + chunk * C * P, P, c, C, p, P)
        V_p = _rows(V + chunk * C * P, P, c, C, p, P)
        S_p = _rows(S + chunk * N * P, P, lane, N, p, P)
        dS_p = _rows(dS_in + chunk * N * P, P, lane, N, p, P)
        YV += _dot(dY, tl.trans(V_p), DT, EXACT)
        RV += _dot(dR, tl.trans(V_p), DT, EXACT)
        dQ += _dot(dY, tl.trans(S_p), DT, EXACT)
        read += _dot(dR, tl.trans(S_p), DT, EXACT)
        write += _dot(V_p, tl.trans(dS_p), DT, EXACT)

    Dec, F_c, f_c = _decays(lg + token, c, left, H, C, MIN_LOG_GATE)
    beta = _numbers(b + token, H, c, left)
    G = YV * Dec * beta[None, :]
    D = tl.where(c[:, None] > c[None, :], RV * Dec * (-beta[:, None] * beta[None, :]), 0.0)
    K, Q = _rows(k, k_st * UNIT, c, left, lane, N), _rows(q, q_st * UNIT, c, left, lane, N)
    dQ = F_c[:, None] * dQ + _dot(G, K, DT, EXACT)
    read = (-beta * F_c)[:, None] * read + _dot(D, K, DT, EXACT)
    write = (beta * f_c)[:, None] * write + _dot(tl.trans(G), Q, DT, EXACT) + _dot(tl.trans(D), K, DT, EXACT)
    _put_rows(dq + token * N, H * N, c, L - j * C, lane, N, dQ)
    _put_rows(dk + token * N, H * N, c, L - j * C, lane, N, read + write)

    net = tl.sum(dQ * Q.to(tl.float32) + (read - write) * K.to(tl.float32), 1)
    if part == 0:
        every, leaving = tl.arange(0, CN), tl.zeros((CN,), tl.float32)
        for i in range(0, ENDS):
            here = ends + ((i * tl.num_programs(1) + r) * n + j) * (C + N)
            leaving += tl.load(here + every, mask=every < C + N, other=0.0)
        net += tl.where(c == C - 1, tl.sum(leaving, 0), 0.0)
        tl.store(db + token + c * H, tl.sum(tl.where(c[:, None] == c[None, :], RV, 0.0), 1), mask=c < L - j * C)
    d_lg = tl.sum(tl.where(c[:, None] >= c[None, :], net[:, None], 0.0), 0)
    clamped = _numbers(lg + token, H, c, left) < MIN_LOG_GATE
    free = (c < left) & (clamped == 0)  # a NaN is not clamped
    dlg += part.to(tl.int64) * (tl.num_programs(1) // H) * L * H + token
    tl.store(dlg + c * H, tl.where(free, d_lg, 0.0), mask=c < L - j * C)
