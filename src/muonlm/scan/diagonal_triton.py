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
                 i + workers, …: (a) each chunk, from zero states, gives a summary (F, G, Sb, Mb) with
                 S' = F S + G M + Sb and M' = γⁿ M + Mb; (b) a walk over the summaries gives Sc, Mc; (c) the sequential
                 walk, chunks side by side.
    Backward has the same forms in reverse, its summaries Λ' = F Λ + Λb, Π' = γⁿ Π + G Λ + Πb with the same F, G.
Registers cannot hold all S_t of a chunk, and going back by (S_t − M_t)/f_t would divide by gates near 0. So backward
runs the chunk forward, writing the states before every fourth token (a "rung") to scratch, then climbs down: load a
rung, redo its four tokens in registers, apply (2). Scratch is C/4 tiles a program, never B·L·N·D. No atomics: dk, dq
are partial sums by channel block and dA by program, which torch adds, so results repeat bit for bit.

Memory traffic a token and channel; fp32, N = 16, BLOCK_D = 32, C = 64. Counted. It does not set the time: on an H200 a
copy of it would take a tenth (LOG 2026-11-26); a token waits for the one before, and for sums across lanes and warps.
    forward      Δ, w in, y out 12 B; k, q 4 B (32 channels share them); Sc, Mc 2 B. Three-pass: + 10 B, summaries 13 B
    backward     Δ, w, g in, dΔ, dw out 20 B; k, q 4 B; Sc, Mc 2 B; partials of dk, dq 8 B written, 8 B read again. From
                 cache come a chunk's second reading and the rungs (64 B, in 64 KB that a program overwrites at every
                 chunk; some four programs run on an SM at a time: 34 MB on an H100, 28 MB on an A100: inside their L2)
Limits   N ≤ 256: registers cannot hold wider tiles. The table of backends says so, and what must be there
Source   Longhorn 2407.14207, Mamba 2312.00752, MuonSSM 2606.30461 for the recurrence; the kernels follow from (1), (2)
"""

import torch
from torch import Tensor

from .diagonal import differentiable
from .diagonal_triton_kernels import (
    INTERPRETED,
    RUNG,
    backward_kernel,
    boundaries,
    forward_kernel,
    summarize,
    summarize_back,
    triton,
)
from .launch import on_device, sequence, state


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


def workers(programs: int, warps: int, chunks: int, device: torch.device, enough: int = 4) -> int:
    """Programs that share one row's chunks: 1 is the sequential form, more the three-pass form.

    A walk over time waits for memory and for its own last token, so an SM wants all the warps that its registers hold,
    8 at 250 a lane. The first pass costs as much as a walk forward, and a quarter of one backward: by that count, which
    no timing has checked yet, three passes win where the sequential form gives an SM fewer than `enough` warps, 4
    forward and 6 backward. They get six times the warps that fit, so that the SMs end together.
    """
    if device.type != "cuda" or chunks < 4:
        return 1
    SMs = torch.cuda.get_device_properties(device).multi_processor_count
    busy = programs * warps
    return 1 if busy >= enough * SMs else min(chunks, 48 * SMs // busy)


def _strides(*sequences: Tensor) -> list[int]:
    return [step for x in sequences for step in x.stride()[:2]]


def _powers(gamma: float, chunk: int, device) -> Tensor:
    """γ⁰ … γ^chunk, each rounded once; no copy from the host, which would wait."""
    return (gamma ** torch.arange(chunk + 1, dtype=torch.float64, device=device)).float()


def forward(delta, A, w, k, q, S0, M0, gamma, alpha, lengths, chunk):
    """(1) -> y (B,L,D), S (B,N,D), M or None, Sc (B,chunks,N,D), Mc or None; γ = 0: no M."""
    assert w.dtype in (torch.float32, torch.bfloat16, torch.float16), w.dtype
    (B, L, D), N, velocity, device = w.shape, k.shape[-1], gamma != 0, w.device
    gamma, alpha = float(gamma), float(alpha)  # an int would compile another kernel
    delta, w, k, q = map(sequence, (delta, w, k, q))
    A = None if A is None else A.to(torch.float32).contiguous()
    S = torch.empty(B, N, D, device=device, dtype=torch.float32)
    S0, M0 = state(S0, S), state(M0, S) if velocity else None
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
    with on_device(device):
        if parts > 1:
            F, G = torch.empty_like(Sc), torch.empty_like(Sc) if velocity else None
            summarize[B, blocks, parts](
                delta, A, w, k, F, G, Sc, Mc, lengths, gamma, alpha, *sizes, *_strides(delta, w, k), **form
            )  # fmt: skip
            boundaries[B, triton.cdiv(N * D, 256)](
                S0, M0, F, G, Sc, Mc, S, M, _powers(gamma, chunk, device), lengths, L, N * D, chunk, chunks,
                REVERSE=False, VELOCITY=velocity, BLOCK=256,
            )  # fmt: skip
        forward_kernel[B, blocks, parts](
            delta, A, w, k, q, S0, M0, y, S, M, Sc, Mc, lengths, gamma, alpha, *sizes, *_strides(delta, w, k, q),
            PARALLEL=parts > 1, **form,
        )  # fmt: skip
    return y, S, M, Sc, Mc


def backward(delta, A, w, k, q, Sc, Mc, gamma, alpha, lengths, chunk, gy, gS, gM):
    """(2), given dL/dy and dL/d(S, M at the end) -> dΔ, dA or None, dw, dk, dq, dS0, dM0 or None (γ = 0)."""
    assert w.dtype in (torch.float32, torch.bfloat16, torch.float16), w.dtype
    (B, L, D), N, velocity, device = w.shape, k.shape[-1], gamma != 0, w.device
    gamma, alpha = float(gamma), float(alpha)  # an int would compile another kernel
    delta, w, k, q, gy = map(sequence, (delta, w, k, q, gy))
    A = None if A is None else A.to(torch.float32).contiguous()
    dS = torch.empty(B, N, D, device=device, dtype=torch.float32)
    gS, gM = state(gS, dS), state(gM, dS) if velocity else None
    dM = torch.empty_like(dS) if velocity else None
    chunks = Sc.shape[1]

    block, _, warps = tile(N)
    blocks = triton.cdiv(D, block)
    parts = workers(B * blocks, warps, chunks, device, enough=6)
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
    with on_device(device):
        if parts > 1:
            F, G = torch.empty_like(Sc), torch.empty_like(Sc) if velocity else None
            S_grad, M_grad = torch.empty_like(Sc), torch.empty_like(Sc) if velocity else None
            summarize_back[B, blocks, parts](
                delta, A, k, q, gy, F, G, S_grad, M_grad, lengths, gamma, *sizes, *_strides(delta, k, q, gy), **form
            )  # fmt: skip
            boundaries[B, triton.cdiv(N * D, 256)](
                gS, gM, F, G, S_grad, M_grad, dS, dM, _powers(gamma, chunk, device), lengths, L, N * D, chunk, chunks,
                REVERSE=True, VELOCITY=velocity, BLOCK=256,
            )  # fmt: skip
            gS, gM = S_grad, M_grad
        backward_kernel[B, blocks, parts](
            delta, A, w, k, q, gy, Sc, Mc, gS, gM, dS, dM, d_delta, dw, dk, dq, dA, rungs, lengths,
            gamma, alpha, B, *sizes, tiles, *_strides(delta, w, k, q, gy), PARALLEL=parts > 1, **form,
        )  # fmt: skip
    dA = None if dA is None else dA.sum(0).t()
    return d_delta, dA, dw, dk.sum(0).to(k.dtype), dq.sum(0).to(q.dtype), dS, dM


diag_scan = differentiable(forward, backward)
