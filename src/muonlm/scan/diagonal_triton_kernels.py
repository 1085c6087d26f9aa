# type: ignore  (the language is Triton's: Python's types do not apply)
"""The Triton kernels of diagonal_triton.py, whose equations (1), (2) and passes (a), (b), (c) they refer to.

Letters  b row of the batch, c channels (BD lanes), n states (BN), t token, j chunk; delta_sb, delta_st: strides of Δ in
         b and t. b and j are int64, and t with them, since offsets may pass 2³¹
"""

import os
from types import SimpleNamespace
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # the module imports without Triton; diagonal_triton.available() tells
    triton, tl = None, SimpleNamespace(constexpr=None)

jit: Any = triton.jit if triton else lambda kernel: kernel  # reads TRITON_INTERPRET now: set it before this import
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # when the kernels below were decorated
RUNG = 4  # tokens between two rungs; backward_kernel spells out four


@jit
def _row(base, t, end, stride, lanes, width):
    """What a (B,L,width) sequence has at token t, in fp32; 0 from `end` on. `base` points at its row of the batch."""
    return tl.load(base + t * stride + lanes, mask=lanes < tl.where(t < end, width, 0), other=0.0).to(tl.float32)


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
    for j in range(tl.program_id(2).to(tl.int64), chunks, workers):
        S = tl.zeros((BN, BD), tl.float32)
        M = tl.zeros((BN, BD), tl.float32)
        F = tl.full((BN, BD), 1.0, tl.float32)
        G = tl.zeros((BN, BD), tl.float32)
        power = gamma  # γ^(1 + tokens done): what is left of the velocity that entered
        end = tl.minimum((j + 1) * chunk, length)
        for t in range(j * chunk, end):
            d = _row(delta + b * delta_sb, t, end, delta_st, c, D)
            w_t = _row(w + b * w_sb, t, end, w_st, c, D)
            k_t = _row(k + b * k_sb, t, end, k_st, n, N)
            S, M = _advance(S, M, d, w_t, k_t, A_tile, gamma, alpha, MAMBA, VELOCITY)
            f = _gate(d, k_t, A_tile, MAMBA)
            F = f * F
            G = f * G + power
            power = power * gamma
        here = (b * chunks + j) * N * D + cell
        tl.store(F_out + here, F, mask=in_tile)
        tl.store(S_out + here, S, mask=in_tile)
        if VELOCITY:
            tl.store(G_out + here, G, mask=in_tile)
            tl.store(M_out + here, M, mask=in_tile)


@jit
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
    for j in range(tl.program_id(2).to(tl.int64), chunks, workers):
        Lam = tl.zeros((BN, BD), tl.float32)
        Pi = tl.zeros((BN, BD), tl.float32)
        F = tl.full((BN, BD), 1.0, tl.float32)
        G = tl.zeros((BN, BD), tl.float32)
        end = tl.minimum((j + 1) * chunk, length)
        for i in range(j * chunk, end):
            t = j * chunk + end - 1 - i
            d = _row(delta + b * delta_sb, t, end, delta_st, c, D)
            g_t = _row(g + b * g_sb, t, end, g_st, c, D)
            k_t = _row(k + b * k_sb, t, end, k_st, n, N)
            q_t = _row(q + b * q_sb, t, end, q_st, n, N)
            Lam += q_t[:, None] * g_t[None, :]
            Pi = gamma * (Pi + Lam)
            G = gamma * (G + F)
            f = _gate(d, k_t, A_tile, MAMBA)
            Lam = f * Lam
            F = f * F
        here = (b * chunks + j) * N * D + cell
        tl.store(F_out + here, F, mask=in_tile)
        tl.store(S_out + here, Lam, mask=in_tile)
        if VELOCITY:
            tl.store(G_out + here, G, mask=in_tile)
            tl.store(M_out + here, Pi, mask=in_tile)


@jit
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


@jit
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
    S = tl.zeros((BN, BD), tl.float32)
    M = tl.zeros((BN, BD), tl.float32)
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
        d_next = _row(delta + b * delta_sb, start, end, delta_st, c, D)
        w_next = _row(w + b * w_sb, start, end, w_st, c, D)
        k_next = _row(k + b * k_sb, start, end, k_st, n, N)
        q_next = _row(q + b * q_sb, start, end, q_st, n, N)
        for t in range(start, end):
            d, w_t, k_t, q_t = d_next, w_next, k_next, q_next
            d_next = _row(delta + b * delta_sb, t + 1, end, delta_st, c, D)  # in flight while this token is done
            w_next = _row(w + b * w_sb, t + 1, end, w_st, c, D)
            k_next = _row(k + b * k_sb, t + 1, end, k_st, n, N)
            q_next = _row(q + b * q_sb, t + 1, end, q_st, n, N)
            S, M = _advance(S, M, d, w_t, k_t, A_tile, gamma, alpha, MAMBA, VELOCITY)
            tl.store(y + (b * L + t) * D + c, tl.sum(q_t[:, None] * S, axis=0), mask=in_c)
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


@jit
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
        d_next = _row(delta, start, end, delta_st, c, D)
        w_next = _row(w, start, end, w_st, c, D)
        g_next = _row(g, start, end, g_st, c, D)
        k_next = _row(k, start, end, k_st, n, N)
        for t in range(start, end):
            d, w_t, g_t, k_t = d_next, w_next, g_next, k_next
            d_next = _row(delta, t + 1, end, delta_st, c, D)
            w_next = _row(w, t + 1, end, w_st, c, D)
            g_next = _row(g, t + 1, end, g_st, c, D)
            k_next = _row(k, t + 1, end, k_st, n, N)
            if (t - start) % 4 == 0:
                r = (t - start) // 4
                tl.store(rung_S + r * (BN * BD), S)
                if VELOCITY:
                    tl.store(rung_M + r * (BN * BD), M)
            S, M = _advance(S, M, d, w_t, k_t, A_tile, gamma, alpha, MAMBA, VELOCITY)
            tl.store(dq + t * N, tl.sum(S * g_t[None, :], axis=1), mask=in_n)
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
            d0, d1 = _row(delta, u, end, delta_st, c, D), _row(delta, u + 1, end, delta_st, c, D)
            d2, d3 = _row(delta, u + 2, end, delta_st, c, D), _row(delta, u + 3, end, delta_st, c, D)
            w0, w1 = _row(w, u, end, w_st, c, D), _row(w, u + 1, end, w_st, c, D)
            w2, w3 = _row(w, u + 2, end, w_st, c, D), _row(w, u + 3, end, w_st, c, D)
            g0, g1 = _row(g, u, end, g_st, c, D), _row(g, u + 1, end, g_st, c, D)
            g2, g3 = _row(g, u + 2, end, g_st, c, D), _row(g, u + 3, end, g_st, c, D)
            k0, k1 = _row(k, u, end, k_st, n, N), _row(k, u + 1, end, k_st, n, N)
            k2, k3 = _row(k, u + 2, end, k_st, n, N), _row(k, u + 3, end, k_st, n, N)
            q0, q1 = _row(q, u, end, q_st, n, N), _row(q, u + 1, end, q_st, n, N)
            q2, q3 = _row(q, u + 2, end, q_st, n, N), _row(q, u + 3, end, q_st, n, N)
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
