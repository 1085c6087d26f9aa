"""The diagonal scan as Triton kernels: reference.diag_scan and its exact gradients, on a GPU.

    U_t = α k_t w_tᵀ;  M_t = γ M_{t−1} + U_t;  S_t = f_t ⊙ S_{t−1} + M_t;  y_t = S_tᵀ q_t                            (1)
    f = 1 − Δ k² (A is None: Longhorn) or exp(Δ A) (Mamba-1);  γ = 0: M_t = U_t and no M is kept
    for t = L..1:  Λ += q gᵀ;  Π += Λ;  dq = S_t g;  F = Λ ⊙ S_{t−1};  dw = α Πᵀ k;  then Λ ← f ⊙ Λ, Π ← γ Π         (2)
    Longhorn  dΔ = −Fᵀ k²;  dk = α Π w − 2 k (F Δ)      Mamba  dΔ = Σ_n F f A;  dA = Σ_t F f Δ;  dk = α Π w

Shapes   Δ, w, y, g (B,L,D) · k, q (B,L,N) · A (D,N) · S, M (B,N,D) · Sc, Mc (B,chunks,N,D): states before each chunk
Dtypes   sequences fp32, bf16 or fp16, any strides whose last is 1 (others are copied); arithmetic, states, y in fp32;
         gradients of sequences in their dtype. Padding (t ≥ lengths_b) is never visited: y and gradients are 0 there.

One program holds the (N, BLOCK_D) tile of S and of M in registers and walks over time; channels lie along the lanes.
    sequential   grid (B, D/BLOCK_D)
    three-pass   grid (B, D/BLOCK_D, workers) where that would leave most of the device idle; worker i does chunks i,
                 i + workers, …: (a) each chunk, from zero states, gives a segment (F, G, Sb, Mb) with
                 S' = F S + G M + Sb and M' = γⁿ M + Mb; (b) a walk over the segments gives Sc, Mc; (c) the sequential
                 walk, chunks side by side.
    Backward has the same forms in reverse, its adjoint segments Λ' = F Λ + Λb, Π' = γⁿ Π + G Λ + Πb with the same F, G.
Registers cannot hold all S_t of a chunk, and going back by (S_t − M_t)/f_t would divide by gates near 0. So backward
runs the chunk forward, writing the states before every fourth token (a "rung") to scratch, then climbs down: load a
rung, redo its four tokens in registers, apply (2). Scratch is C/4 tiles a program, never B·L·N·D. No atomics: dk, dq
are partial sums by channel block and dA by program, which torch adds, so results repeat bit for bit.

Memory traffic a token and channel; fp32, N = 16, BLOCK_D = 32, C = 64. Counted, not measured: written without a GPU.
    forward      Δ, w in, y out 12 B; k, q 4 B (32 channels share them); Sc, Mc 2 B. Three-pass: + 10 B, segments 13 B
    backward     Δ, w, g in, dΔ, dw out 20 B; k, q 4 B; Sc, Mc 2 B; partials of dk, dq 8 B written, 8 B read again. From
                 cache come a chunk's second reading and the rungs (64 B, in 64 KB that a program overwrites at every
                 chunk; some four programs run on an SM at a time: 34 MB on an H100, 28 MB on an A100: inside their L2)
Limits   N ≤ 256: registers cannot hold wider tiles. The table of backends says so, and what must be there
Source   Longhorn 2407.14207, Mamba 2312.00752, MuonSSM 2606.30461 for the recurrence; the kernels follow from (1), (2)
"""

import os
from contextlib import nullcontext

import torch
from torch import Tensor

from .diagonal import differentiable

try:
    import triton
    import triton.language as tl

    jit = triton.jit  # reads TRITON_INTERPRET now: set it before this module is imported
except ImportError:  # the module imports without Triton; available() tells
    triton = None

    class tl:
        constexpr = None

    def jit(kernel):
        return kernel


RUNG = 4  # tokens between two rungs; _backward spells out four
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # when the kernels below were decorated


def available(device: torch.device) -> bool:
    """Whether Triton is here, and a CUDA device or Triton's interpreter (TRITON_INTERPRET=1) to run the kernels."""
    return triton is not None and (INTERPRETED or device.type == "cuda" and torch.cuda.is_available())


def tile(N: int) -> tuple[int, int, int]:
    """(BLOCK_D, warps forward, warps backward) for N states a channel.

    A lane keeps 16 cells of a tile forward and 8 backward, where eleven tiles live at once: what the compiler fits into
    255 registers on sm_90 and, but for 8 B, sm_80 (16 cells spill 200 to 300 B backward). N = 16 is one warp forward,
    whose sums over n are shuffles without barriers, and two backward. BLOCK_D = 32 channels are a 128 B line of fp32;
    more than 64 states narrow it, so that 8 warps suffice.
    """
    BN = triton.next_power_of_2(N)
    block = 32 if BN <= 64 else 16 if BN == 128 else 8
    return block, max(1, BN * block // 512), max(1, BN * block // 256)


def workers(programs: int, warps: int, chunks: int, device: torch.device) -> int:
    """Programs that share one row's chunks: 1 is the sequential form, more the three-pass form.

    A walk over time waits for memory and for its own last token, so an SM wants about 8 warps to choose from. Three
    passes move about 2.3 times the bytes (see above): by that count, which no timing has checked yet, they win where
    the sequential form gives an SM fewer than 8 / 2.3, say 4, warps.
    """
    if device.type != "cuda" or chunks < 4:
        return 1
    SMs = torch.cuda.get_device_properties(device).multi_processor_count
    busy = programs * warps
    return 1 if busy >= 4 * SMs else min(chunks, triton.cdiv(8 * SMs, busy))


# Kernels. b row of the batch, c channels (BD lanes), n states (BN), t token, j chunk; delta_sb, delta_st are strides of
# Δ in b and t. b and j are int64, and t with them, since offsets may pass 2³¹.


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
def _segments(
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
def _segments_back(
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
def _boundaries(
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
def _forward(
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
def _backward(
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


# Host side.


def _sequence(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()  # a warp's lanes read neighbours


def _strides(*sequences: Tensor) -> list[int]:
    return [step for x in sequences for step in x.stride()[:2]]


def _state(x: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if x is None else x.to(torch.float32).contiguous()


def _powers(gamma: float, chunk: int, device) -> Tensor:
    """γ⁰ … γ^chunk, each rounded once."""
    return (gamma ** torch.arange(chunk + 1, dtype=torch.float64)).to(device, torch.float32)


def _on(device: torch.device):
    """Triton launches on the current device: make it the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def forward(delta, A, w, k, q, S0, M0, gamma, alpha, lengths, chunk):
    """(1) -> y (B,L,D), S (B,N,D), M or None, Sc (B,chunks,N,D), Mc or None; γ = 0: no M."""
    assert w.dtype in (torch.float32, torch.bfloat16, torch.float16), w.dtype
    (B, L, D), N, velocity, device = w.shape, k.shape[-1], gamma != 0, w.device
    gamma, alpha = float(gamma), float(alpha)  # an int would compile another kernel
    delta, w, k, q = map(_sequence, (delta, w, k, q))
    A = None if A is None else A.to(torch.float32).contiguous()
    S = torch.empty(B, N, D, device=device, dtype=torch.float32)
    S0, M0 = _state(S0, S), _state(M0, S) if velocity else None
    M = torch.empty_like(S) if velocity else None
    chunks = triton.cdiv(L, chunk)
    Sc = S.new_empty(B, chunks, N, D)
    Mc = torch.empty_like(Sc) if velocity else None
    y = (S.new_empty if lengths is None else S.new_zeros)(B, L, D)
    lengths = torch.full((B,), L, device=device) if lengths is None else lengths.to(device).contiguous()

    block, warps, _ = tile(N)
    blocks = triton.cdiv(D, block)
    parts = workers(B * blocks, warps, chunks, device)
    form = dict(MAMBA=A is not None, VELOCITY=velocity, BN=triton.next_power_of_2(N), BD=block, num_warps=warps)
    sizes = (L, D, N, chunk, chunks, parts)
    with _on(device):
        if parts > 1:
            F, G = torch.empty_like(Sc), torch.empty_like(Sc) if velocity else None
            _segments[B, blocks, parts](
                delta, A, w, k, F, G, Sc, Mc, lengths, gamma, alpha, *sizes, *_strides(delta, w, k), **form
            )  # fmt: skip
            _boundaries[B, triton.cdiv(N * D, 256)](
                S0, M0, F, G, Sc, Mc, S, M, _powers(gamma, chunk, device), lengths, L, N * D, chunk, chunks,
                REVERSE=False, VELOCITY=velocity, BLOCK=256,
            )  # fmt: skip
        _forward[B, blocks, parts](
            delta, A, w, k, q, S0, M0, y, S, M, Sc, Mc, lengths, gamma, alpha, *sizes, *_strides(delta, w, k, q),
            PARALLEL=parts > 1, **form,
        )  # fmt: skip
    return y, S, M, Sc, Mc


def backward(delta, A, w, k, q, Sc, Mc, gamma, alpha, lengths, chunk, gy, gS, gM):
    """(2), given dL/dy and dL/d(S, M at the end) -> dΔ, dA or None, dw, dk, dq, dS0, dM0 or None (γ = 0)."""
    assert w.dtype in (torch.float32, torch.bfloat16, torch.float16), w.dtype
    (B, L, D), N, velocity, device = w.shape, k.shape[-1], gamma != 0, w.device
    gamma, alpha = float(gamma), float(alpha)  # an int would compile another kernel
    delta, w, k, q, gy = map(_sequence, (delta, w, k, q, gy))
    A = None if A is None else A.to(torch.float32).contiguous()
    dS = torch.empty(B, N, D, device=device, dtype=torch.float32)
    gS, gM = _state(gS, dS), _state(gM, dS) if velocity else None
    dM = torch.empty_like(dS) if velocity else None
    chunks = Sc.shape[1]

    block, _, warps = tile(N)
    blocks = triton.cdiv(D, block)
    parts = workers(B * blocks, warps, chunks, device)
    new = dS.new_empty if lengths is None else dS.new_zeros
    d_delta, dw = new(B, L, D, dtype=delta.dtype), new(B, L, D, dtype=w.dtype)
    dk, dq = new(blocks, B, L, N), new(blocks, B, L, N)
    dA = dS.new_empty(B * parts, N, D) if A is not None else None
    tiles = triton.cdiv(min(chunk, max(L, 1)), RUNG)
    BN = triton.next_power_of_2(N)
    rungs = dS.new_empty(B * blocks * parts * (2 if velocity else 1) * tiles * BN * block)
    lengths = torch.full((B,), L, device=device) if lengths is None else lengths.to(device).contiguous()

    form = dict(MAMBA=A is not None, VELOCITY=velocity, BN=BN, BD=block, num_warps=warps)
    sizes = (L, D, N, chunk, chunks, parts)
    with _on(device):
        if parts > 1:
            F, G = torch.empty_like(Sc), torch.empty_like(Sc) if velocity else None
            S_grad, M_grad = torch.empty_like(Sc), torch.empty_like(Sc) if velocity else None
            _segments_back[B, blocks, parts](
                delta, A, k, q, gy, F, G, S_grad, M_grad, lengths, gamma, *sizes, *_strides(delta, k, q, gy), **form
            )  # fmt: skip
            _boundaries[B, triton.cdiv(N * D, 256)](
                gS, gM, F, G, S_grad, M_grad, dS, dM, _powers(gamma, chunk, device), lengths, L, N * D, chunk, chunks,
                REVERSE=True, VELOCITY=velocity, BLOCK=256,
            )  # fmt: skip
            gS, gM = S_grad, M_grad
        _backward[B, blocks, parts](
            delta, A, w, k, q, gy, Sc, Mc, gS, gM, dS, dM, d_delta, dw, dk, dq, dA, rungs, lengths,
            gamma, alpha, B, *sizes, tiles, *_strides(delta, w, k, q, gy), PARALLEL=parts > 1, **form,
        )  # fmt: skip
    dA = None if dA is None else dA.sum(0).t()
    return d_delta, dA, dw, dk.sum(0).to(k.dtype), dq.sum(0).to(q.dtype), dS, dM


diag_scan = differentiable(forward, backward)
