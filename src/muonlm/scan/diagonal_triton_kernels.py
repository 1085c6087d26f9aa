# type: ignore  (the language is Triton's: Python's types do not apply)
"""The Triton kernels of diagonal_triton.py, whose equations (1), (2) and passes (a), (b), (c) they refer to.

Letters  b row of the batch, c channels (BD lanes), n states (BN), t token, j chunk; delta_sb, delta_st: strides of Δ in
         b and t. b and j are int64, and t with them, since offsets may pass 2³¹
"""

import inspect
import os
from types import SimpleNamespace
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # the module imports without Triton; diagonal_triton.available() tells
    triton, tl = None, SimpleNamespace(constexpr=None)

jit: Any = triton.jit if triton else lambda kernel: kernel  # reads TRITON_INTERPRET now: set it before this import
# What changes from call to call: Triton would compile again where one of them is 1, or begins to be a multiple of 16.
RUNTIME = ["L", "B", "chunk", "chunks", "workers", "rungs_each", *(f"{x}_sb" for x in ("delta", "w", "k", "q", "g"))]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # when the kernels below were decorated
RUNG = 4  # tokens between two rungs; backward_kernel spells out four


def launched(kernel) -> Any:
    names = [name for name in RUNTIME if name in inspect.signature(kernel).parameters]
    return triton.jit(do_not_specialize=names)(kernel) if triton else kernel


@jit
def _row(base, t, end, stride, lanes, width):
    """What a (B,L,width) sequence has at token t, in fp32; 0 from `end` on. `base` points at its row of the batch."""
    return tl.load(base + t * stride + lanes, mask=lanes < tl.where(t < end, width, 0), other=0.0).to(tl.float32)


@jit
def _four(base, t, end, stride, lanes, width):
    """_row at t to t + 3. Loops over tokens take four at a time and load the next four meanwhile: of one at a time, the
    registers that a load fills are moved at the end of the same turn, which waits for memory at every token."""
    return (
        _row(base, t, end, stride, lanes, width),
        _row(base, t + 1, end, stride, lanes, width),
        _row(base, t + 2, end, stride, lanes, width),
        _row(base, t + 3, end, stride, lanes, width),
    )


@jit
def _gate(d, k, A, MAMBA: tl.constexpr):
    if MAMBA:
        f = tl.exp(d[None, :] * A)
    else:
        f = 1.0 - d[None, :] * (k * k)[:, None]
    return f


@jit
def _advance(S, M, d, w, k, A, gamma, alpha, MAMBA: tl.constexpr, VELOCITY: tl.constexpr):
    """(1): the states after one token. Without velocity M is written and never read, and the compiler drops it."""
    U = (alpha * k)[:, None] * w[None, :]
    if VELOCITY:
        M = gamma * M + U
    else:
        M = U
    S = _gate(d, k, A, MAMBA) * S + M
    return S, M


@jit
def _summed(S, M, F, G, power, d, w, k, A, gamma, alpha, MAMBA: tl.constexpr, VELOCITY: tl.constexpr):
    """_advance, and what the chunk has done so far to the S and the M that entered it."""
    S, M = _advance(S, M, d, w, k, A, gamma, alpha, MAMBA, VELOCITY)
    f = _gate(d, k, A, MAMBA)
    return S, M, f * F, f * G + power, power * gamma


@launched
def summarize(
    delta, A, w, k, F_out, G_out, S_out, M_out, lengths, gamma, alpha, L, D, N, chunk, chunks, workers,
    delta_sb, delta_st, w_sb, w_st, k_sb, k_st,
    MAMBA: tl.constexpr, VELOCITY: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Pass (a) forward: what each chunk does to the states that enter it."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BD + tl.arange(0, BD)
    n = tl.arange(0, BN)
    in_c, in_n = c < D, n < N
    cell, in_tile = n[:, None] * D + c[None, :], in_n[:, None] & in_c[None, :]
    A_tile = tl.load(A + c[None, :] * N + n[:, None], mask=in_tile, other=0.0) if MAMBA else 0.0
    length = tl.minimum(tl.load(lengths + b), L)
    delta, w, k = delta + b * delta_sb, w + b * w_sb, k + b * k_sb
    for j in range(tl.program_id(2).to(tl.int64), chunks, workers):
        S = tl.zeros((BN, BD), tl.float32)
        M = tl.zeros((BN, BD), tl.float32)
        F = tl.full((BN, BD), 1.0, tl.float32)
        G = tl.zeros((BN, BD), tl.float32)
        power = gamma  # γ^(1 + tokens done): what is left of the velocity that entered
        start, end = j * chunk, tl.minimum((j + 1) * chunk, length)
        rest = start + tl.maximum(end - start, 0) // 4 * 4
        d0, d1, d2, d3 = _four(delta, start, end, delta_st, c, D)
        w0, w1, w2, w3 = _four(w, start, end, w_st, c, D)
        k0, k1, k2, k3 = _four(k, start, end, k_st, n, N)
        for t in range(start, rest, 4):
            e0, e1, e2, e3 = _four(delta, t + 4, end, delta_st, c, D)
            v0, v1, v2, v3 = _four(w, t + 4, end, w_st, c, D)
            l0, l1, l2, l3 = _four(k, t + 4, end, k_st, n, N)
            S, M, F, G, power = _summed(S, M, F, G, power, d0, w0, k0, A_tile, gamma, alpha, MAMBA, VELOCITY)
            S, M, F, G, power = _summed(S, M, F, G, power, d1, w1, k1, A_tile, gamma, alpha, MAMBA, VELOCITY)
            S, M, F, G, power = _summed(S, M, F, G, power, d2, w2, k2, A_tile, gamma, alpha, MAMBA, VELOCITY)
            S, M, F, G, power = _summed(S, M, F, G, power, d3, w3, k3, A_tile, gamma, alpha, MAMBA, VELOCITY)
            d0, d1, d2, d3, w0, w1, w2, w3, k0, k1, k2, k3 = e0, e1, e2, e3, v0, v1, v2, v3, l0, l1, l2, l3
        for t in range(rest, end):
            d = _row(delta, t, end, delta_st, c, D)
            w_t, k_t = _row(w, t, end, w_st, c, D), _row(k, t, end, k_st, n, N)
            S, M, F, G, power = _summed(S, M, F, G, power, d, w_t, k_t, A_tile, gamma, alpha, MAMBA, VELOCITY)
        here = (b * chunks + j) * N * D + cell
        tl.store(F_out + here, F, mask=in_tile)
        tl.store(S_out + here, S, mask=in_tile)
        if VELOCITY:
            tl.store(G_out + here, G, mask=in_tile)
            tl.store(M_out + here, M, mask=in_tile)


@jit
def _summed_back(Lam, Pi, F, G, d, g, k, q, A, gamma, MAMBA: tl.constexpr):
    """What leaves a token on its left, of the adjoints that came from the right and of those of its own."""
    Lam += q[:, None] * g[None, :]
    f = _gate(d, k, A, MAMBA)
    return f * Lam, gamma * (Pi + Lam), f * F, gamma * (G + F)


@launched
def summarize_back(
    delta, A, k, q, g, F_out, G_out, S_out, M_out, lengths, gamma, L, D, N, chunk, chunks, workers,
    delta_sb, delta_st, k_sb, k_st, q_sb, q_st, g_sb, g_st,
    MAMBA: tl.constexpr, VELOCITY: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Pass (a) backward: what each chunk does to the adjoints that enter it at its end; S_out, M_out take Λb, Πb."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BD + tl.arange(0, BD)
    n = tl.arange(0, BN)
    in_c, in_n = c < D, n < N
    cell, in_tile = n[:, None] * D + c[None, :], in_n[:, None] & in_c[None, :]
    A_tile = tl.load(A + c[None, :] * N + n[:, None], mask=in_tile, other=0.0) if MAMBA else 0.0
    length = tl.minimum(tl.load(lengths + b), L)
    delta, k, q, g = delta + b * delta_sb, k + b * k_sb, q + b * q_sb, g + b * g_sb
    for j in range(tl.program_id(2).to(tl.int64), chunks, workers):
        Lam = tl.zeros((BN, BD), tl.float32)
        Pi = tl.zeros((BN, BD), tl.float32)
        F = tl.full((BN, BD), 1.0, tl.float32)
        G = tl.zeros((BN, BD), tl.float32)
        start, end = j * chunk, tl.minimum((j + 1) * chunk, length)
        rest = start + tl.maximum(end - start, 0) // 4 * 4
        for i in range(rest, end):  # the last tokens come first, until four at a time are left
            t = rest + end - 1 - i
            d, g_t = _row(delta, t, end, delta_st, c, D), _row(g, t, end, g_st, c, D)
            k_t, q_t = _row(k, t, end, k_st, n, N), _row(q, t, end, q_st, n, N)
            Lam, Pi, F, G = _summed_back(Lam, Pi, F, G, d, g_t, k_t, q_t, A_tile, gamma, MAMBA)
        first = tl.maximum(rest - 4, 0)  # where no token is left it loads what nobody uses
        d0, d1, d2, d3 = _four(delta, first, rest, delta_st, c, D)
        g0, g1, g2, g3 = _four(g, first, rest, g_st, c, D)
        k0, k1, k2, k3 = _four(k, first, rest, k_st, n, N)
        q0, q1, q2, q3 = _four(q, first, rest, q_st, n, N)
        for i in range(start, rest, 4):
            t = tl.maximum(start + rest - 8 - i, 0)  # the four before these
            e0, e1, e2, e3 = _four(delta, t, rest, delta_st, c, D)
            h0, h1, h2, h3 = _four(g, t, rest, g_st, c, D)
            l0, l1, l2, l3 = _four(k, t, rest, k_st, n, N)
            r0, r1, r2, r3 = _four(q, t, rest, q_st, n, N)
            Lam, Pi, F, G = _summed_back(Lam, Pi, F, G, d3, g3, k3, q3, A_tile, gamma, MAMBA)
            Lam, Pi, F, G = _summed_back(Lam, Pi, F, G, d2, g2, k2, q2, A_tile, gamma, MAMBA)
            Lam, Pi, F, G = _summed_back(Lam, Pi, F, G, d1, g1, k1, q1, A_tile, gamma, MAMBA)
            Lam, Pi, F, G = _summed_back(Lam, Pi, F, G, d0, g0, k0, q0, A_tile, gamma, MAMBA)
            d0, d1, d2, d3, g0, g1, g2, g3 = e0, e1, e2, e3, h0, h1, h2, h3
            k0, k1, k2, k3, q0, q1, q2, q3 = l0, l1, l2, l3, r0, r1, r2, r3
        here = (b * chunks + j) * N * D + cell
        tl.store(F_out + here, F, mask=in_tile)
        tl.store(S_out + here, Lam, mask=in_tile)
        if VELOCITY:
            tl.store(G_out + here, G, mask=in_tile)
            tl.store(M_out + here, Pi, mask=in_tile)


@launched
def boundaries(
    S_in, M_in, F, G, Sc, Mc, S_out, M_out, powers, lengths, L, cells, chunk, chunks,
    REVERSE: tl.constexpr, VELOCITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass (b): Sc, Mc hold each chunk's Sb, Mb and get the states entering it. REVERSE: adjoints, last chunk first."""
    b = tl.program_id(0).to(tl.int64)
    cell = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cell < cells
    length = tl.minimum(tl.load(lengths + b), L)
    S = tl.load(S_in + b * cells + cell, mask=inside)
    M = S
    if VELOCITY:
        M = tl.load(M_in + b * cells + cell, mask=inside)
    for i in range(0, chunks):
        j = i
        if REVERSE:
            j = chunks - 1 - i
        here = (b * chunks + j) * cells + cell
        f, Sb = tl.load(F + here, mask=inside), tl.load(Sc + here, mask=inside)
        tl.store(Sc + here, S, mask=inside)
        if VELOCITY:
            g, Mb = tl.load(G + here, mask=inside), tl.load(Mc + here, mask=inside)
            tl.store(Mc + here, M, mask=inside)
            real = tl.minimum(tl.maximum(length - j * chunk, 0), chunk)  # tokens of the chunk that are not padding
            power = tl.load(powers + real)
            if REVERSE:
                M = power * M + g * S + Mb
                S = f * S + Sb
            else:
                S = f * S + g * M + Sb
                M = power * M + Mb
        else:
            S = f * S + Sb
    tl.store(S_out + b * cells + cell, S, mask=inside)
    if VELOCITY:
        tl.store(M_out + b * cells + cell, M, mask=inside)


@launched
def forward_kernel(
    delta, A, w, k, q, S_in, M_in, y, S_out, M_out, Sc, Mc, lengths, gamma, alpha, L, D, N, chunk, chunks, workers,
    delta_sb, delta_st, w_sb, w_st, k_sb, k_st, q_sb, q_st,
    MAMBA: tl.constexpr, VELOCITY: tl.constexpr, PARALLEL: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """(1) over all chunks, writing Sc, Mc on the way; PARALLEL (pass c): over this worker's, reading Sc, Mc."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BD + tl.arange(0, BD)
    n = tl.arange(0, BN)
    in_c, in_n = c < D, n < N
    cell, in_tile = n[:, None] * D + c[None, :], in_n[:, None] & in_c[None, :]
    A_tile = tl.load(A + c[None, :] * N + n[:, None], mask=in_tile, other=0.0) if MAMBA else 0.0
    length = tl.minimum(tl.load(lengths + b), L)
    delta, w, k, q, y = delta + b * delta_sb, w + b * w_sb, k + b * k_sb, q + b * q_sb, y + b * L * D + c
    S, M = tl.zeros((BN, BD), tl.float32), tl.zeros((BN, BD), tl.float32)
    if not PARALLEL:
        S = tl.load(S_in + b * N * D + cell, mask=in_tile, other=0.0)
        if VELOCITY:
            M = tl.load(M_in + b * N * D + cell, mask=in_tile, other=0.0)
    for j in range(tl.program_id(2).to(tl.int64), chunks, workers):
        here = (b * chunks + j) * N * D + cell
        if PARALLEL:
            S = tl.load(Sc + here, mask=in_tile, other=0.0)
            if VELOCITY:
                M = tl.load(Mc + here, mask=in_tile, other=0.0)
        else:
            tl.store(Sc + here, S, mask=in_tile)
            if VELOCITY:
                tl.store(Mc + here, M, mask=in_tile)
        start, end = j * chunk, tl.minimum((j + 1) * chunk, length)
        rest = start + tl.maximum(end - start, 0) // 4 * 4
        d0, d1, d2, d3 = _four(delta, start, end, delta_st, c, D)
        w0, w1, w2, w3 = _four(w, start, end, w_st, c, D)
        k0, k1, k2, k3 = _four(k, start, end, k_st, n, N)
        q0, q1, q2, q3 = _four(q, start, end, q_st, n, N)
        for t in range(start, rest, 4):
            e0, e1, e2, e3 = _four(delta, t + 4, end, delta_st, c, D)
            v0, v1, v2, v3 = _four(w, t + 4, end, w_st, c, D)
            l0, l1, l2, l3 = _four(k, t + 4, end, k_st, n, N)
            r0, r1, r2, r3 = _four(q, t + 4, end, q_st, n, N)
            S, M = _advance(S, M, d0, w0, k0, A_tile, gamma, alpha, MAMBA, VELOCITY)
            tl.store(y + t * D, tl.sum(q0[:, None] * S, axis=0), mask=in_c)
            S, M = _advance(S, M, d1, w1, k1, A_tile, gamma, alpha, MAMBA, VELOCITY)
            tl.store(y + (t + 1) * D, tl.sum(q1[:, None] * S, axis=0), mask=in_c)
            S, M = _advance(S, M, d2, w2, k2, A_tile, gamma, alpha, MAMBA, VELOCITY)
            tl.store(y + (t + 2) * D, tl.sum(q2[:, None] * S, axis=0), mask=in_c)
            S, M = _advance(S, M, d3, w3, k3, A_tile, gamma, alpha, MAMBA, VELOCITY)
            tl.store(y + (t + 3) * D, tl.sum(q3[:, None] * S, axis=0), mask=in_c)
            d0, d1, d2, d3, w0, w1, w2, w3 = e0, e1, e2, e3, v0, v1, v2, v3
            k0, k1, k2, k3, q0, q1, q2, q3 = l0, l1, l2, l3, r0, r1, r2, r3
        for t in range(rest, end):
            d, w_t = _row(delta, t, end, delta_st, c, D), _row(w, t, end, w_st, c, D)
            k_t, q_t = _row(k, t, end, k_st, n, N), _row(q, t, end, q_st, n, N)
            S, M = _advance(S, M, d, w_t, k_t, A_tile, gamma, alpha, MAMBA, VELOCITY)
            tl.store(y + t * D, tl.sum(q_t[:, None] * S, axis=0), mask=in_c)
    if not PARALLEL:
        tl.store(S_out + b * N * D + cell, S, mask=in_tile)
        if VELOCITY:
            tl.store(M_out + b * N * D + cell, M, mask=in_tile)


@jit
def _retreat(
    S, Lam, Pi, dA, d, w, k, q, g, real, A, gamma, alpha, d_delta, dw, dk, c, n, D, N,
    MAMBA: tl.constexpr, VELOCITY: tl.constexpr,
):  # fmt: skip
    """(2) of one token, given S_{t−1}; d_delta, dw, dk point at its outputs. Where not `real`, inputs are 0."""
    Lam += q[:, None] * g[None, :]
    if VELOCITY:
        Pi += tl.where(real, 1.0, 0.0) * Lam
    else:
        Pi = Lam
    f = _gate(d, k, A, MAMBA)
    F = Lam * S
    sum_k = Pi * (alpha * w)[None, :]
    if MAMBA:
        F = F * f
        dA += F * d[None, :]
        d_gate = tl.sum(F * A, axis=0)
    else:
        sum_k -= (2.0 * k)[:, None] * F * d[None, :]
        d_gate = -tl.sum(F * (k * k)[:, None], axis=0)
    in_c, in_n = c < tl.where(real, D, 0), n < tl.where(real, N, 0)
    tl.store(d_delta, d_gate.to(d_delta.dtype.element_ty), mask=in_c)
    tl.store(dw, tl.sum(Pi * (alpha * k)[:, None], axis=0).to(dw.dtype.element_ty), mask=in_c)
    tl.store(dk, tl.sum(sum_k, axis=1), mask=in_n)
    Lam = f * Lam
    if VELOCITY:
        Pi = tl.where(real, gamma, 1.0) * Pi
    return Lam, Pi, dA


@launched
def backward_kernel(
    delta, A, w, k, q, g, Sc, Mc, S_grad, M_grad, dS, dM, d_delta, dw, dk, dq, dA_out, rungs, lengths,
    gamma, alpha, B, L, D, N, chunk, chunks, workers, rungs_each,
    delta_sb, delta_st, w_sb, w_st, k_sb, k_st, q_sb, q_st, g_sb, g_st,
    MAMBA: tl.constexpr, VELOCITY: tl.constexpr, PARALLEL: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """(2) over all chunks, from the last. PARALLEL (pass c): this worker's; S_grad, M_grad are (B,chunks,N,D)."""
    b = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    worker = tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, BD)
    c = tl.program_id(1) * BD + lane
    n = tl.arange(0, BN)
    in_c, in_n = c < D, n < N
    cell, in_tile = n[:, None] * D + c[None, :], in_n[:, None] & in_c[None, :]
    A_tile = tl.load(A + c[None, :] * N + n[:, None], mask=in_tile, other=0.0) if MAMBA else 0.0
    length = tl.minimum(tl.load(lengths + b), L)
    delta, w, k, q, g = delta + b * delta_sb, w + b * w_sb, k + b * k_sb, q + b * q_sb, g + b * g_sb
    d_delta, dw = d_delta + b * L * D + c, dw + b * L * D + c
    dk, dq = dk + (block * B + b) * L * N + n, dq + (block * B + b) * L * N + n
    # This program's rungs: rungs_each tiles of S, then as many of M.
    program = (b * tl.num_programs(1) + block) * workers + worker
    rung_S = rungs + program * (2 if VELOCITY else 1) * rungs_each * (BN * BD) + n[:, None] * BD + lane[None, :]
    rung_M = rung_S + rungs_each * (BN * BD)
    Lam = tl.zeros((BN, BD), tl.float32)
    Pi = tl.zeros((BN, BD), tl.float32)
    dA = tl.zeros((BN, BD), tl.float32)
    if not PARALLEL:
        Lam = tl.load(S_grad + b * N * D + cell, mask=in_tile, other=0.0)
        if VELOCITY:
            Pi = tl.load(M_grad + b * N * D + cell, mask=in_tile, other=0.0)
    for i in range(worker, chunks, workers):
        j = chunks - 1 - i
        here = (b * chunks + j) * N * D + cell
        start, end = j * chunk, tl.minimum((j + 1) * chunk, length)

        # Up: the states again, for dq (which needs S_t) and the rungs (S, M before a token).
        S = tl.load(Sc + here, mask=in_tile, other=0.0)
        M = tl.zeros((BN, BD), tl.float32)
        if VELOCITY:
            M = tl.load(Mc + here, mask=in_tile, other=0.0)
        d0, d1, d2, d3 = _four(delta, start, end, delta_st, c, D)
        w0, w1, w2, w3 = _four(w, start, end, w_st, c, D)
        g0, g1, g2, g3 = _four(g, start, end, g_st, c, D)
        k0, k1, k2, k3 = _four(k, start, end, k_st, n, N)
        for t in range(start, end, 4):
            e0, e1, e2, e3 = _four(delta, t + 4, end, delta_st, c, D)
            v0, v1, v2, v3 = _four(w, t + 4, end, w_st, c, D)
            h0, h1, h2, h3 = _four(g, t + 4, end, g_st, c, D)
            l0, l1, l2, l3 = _four(k, t + 4, end, k_st, n, N)
            r = (t - start) // 4
            tl.store(rung_S + r * (BN * BD), S)
            if VELOCITY:
                tl.store(rung_M + r * (BN * BD), M)
            S, M = _advance(S, M, d0, w0, k0, A_tile, gamma, alpha, MAMBA, VELOCITY)
            tl.store(dq + t * N, tl.sum(S * g0[None, :], axis=1), mask=in_n)
            S, M = _advance(S, M, d1, w1, k1, A_tile, gamma, alpha, MAMBA, VELOCITY)
            tl.store(dq + (t + 1) * N, tl.sum(S * g1[None, :], axis=1), mask=n < tl.where(t + 1 < end, N, 0))
            S, M = _advance(S, M, d2, w2, k2, A_tile, gamma, alpha, MAMBA, VELOCITY)
            tl.store(dq + (t + 2) * N, tl.sum(S * g2[None, :], axis=1), mask=n < tl.where(t + 2 < end, N, 0))
            S, M = _advance(S, M, d3, w3, k3, A_tile, gamma, alpha, MAMBA, VELOCITY)
            tl.store(dq + (t + 3) * N, tl.sum(S * g3[None, :], axis=1), mask=n < tl.where(t + 3 < end, N, 0))
            d0, d1, d2, d3, w0, w1, w2, w3 = e0, e1, e2, e3, v0, v1, v2, v3
            g0, g1, g2, g3, k0, k1, k2, k3 = h0, h1, h2, h3, l0, l1, l2, l3
        tl.debug_barrier()  # a rung may be read by other threads than wrote it

        # Down: four tokens from each rung; past the end of the chunk they load zeros, which change nothing.
        if PARALLEL:
            Lam = tl.load(S_grad + here, mask=in_tile, other=0.0)
            if VELOCITY:
                Pi = tl.load(M_grad + here, mask=in_tile, other=0.0)
        for t in range(start, end, 4):
            r = (end - 1 - t) // 4  # t only counts: the rungs from the last
            u = start + 4 * r
            S0 = tl.load(rung_S + r * (BN * BD))
            M0 = S0
            if VELOCITY:
                M0 = tl.load(rung_M + r * (BN * BD))
            d0, d1, d2, d3 = _four(delta, u, end, delta_st, c, D)
            w0, w1, w2, w3 = _four(w, u, end, w_st, c, D)
            g0, g1, g2, g3 = _four(g, u, end, g_st, c, D)
            k0, k1, k2, k3 = _four(k, u, end, k_st, n, N)
            q0, q1, q2, q3 = _four(q, u, end, q_st, n, N)
            S1, M1 = _advance(S0, M0, d0, w0, k0, A_tile, gamma, alpha, MAMBA, VELOCITY)
            S2, M2 = _advance(S1, M1, d1, w1, k1, A_tile, gamma, alpha, MAMBA, VELOCITY)
            S3, M3 = _advance(S2, M2, d2, w2, k2, A_tile, gamma, alpha, MAMBA, VELOCITY)
            Lam, Pi, dA = _retreat(S3, Lam, Pi, dA, d3, w3, k3, q3, g3, u + 3 < end, A_tile, gamma, alpha,
                                   d_delta + (u + 3) * D, dw + (u + 3) * D, dk + (u + 3) * N,
                                   c, n, D, N, MAMBA, VELOCITY)  # fmt: skip
            Lam, Pi, dA = _retreat(S2, Lam, Pi, dA, d2, w2, k2, q2, g2, u + 2 < end, A_tile, gamma, alpha,
                                   d_delta + (u + 2) * D, dw + (u + 2) * D, dk + (u + 2) * N,
                                   c, n, D, N, MAMBA, VELOCITY)  # fmt: skip
            Lam, Pi, dA = _retreat(S1, Lam, Pi, dA, d1, w1, k1, q1, g1, u + 1 < end, A_tile, gamma, alpha,
                                   d_delta + (u + 1) * D, dw + (u + 1) * D, dk + (u + 1) * N,
                                   c, n, D, N, MAMBA, VELOCITY)  # fmt: skip
            Lam, Pi, dA = _retreat(S0, Lam, Pi, dA, d0, w0, k0, q0, g0, u < end, A_tile, gamma, alpha,
                                   d_delta + u * D, dw + u * D, dk + u * N,
                                   c, n, D, N, MAMBA, VELOCITY)  # fmt: skip
        tl.debug_barrier()  # the next chunk overwrites the rungs
    if not PARALLEL:
        tl.store(dS + b * N * D + cell, Lam, mask=in_tile)
        if VELOCITY:
            tl.store(dM + b * N * D + cell, Pi, mask=in_tile)
    if MAMBA:
        tl.store(dA_out + (b * workers + worker) * N * D + cell, dA, mask=in_tile)
