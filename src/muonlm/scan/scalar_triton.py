"""The scan with one gate a head as Triton kernels: reference.scalar_scan and its exact gradients, on a GPU.

The matrix form over chunks of C tokens, all chunks at once. Dec, F, Mom, Mc, Res, g are those of chunks.py; W is αW.
    (1)  Res = Dec diag(p) Mom       g = Dec (p ⊙ Mc)          without momentum Res = Dec, g = 0, and no M is kept
    (2)  Y  = (Res ⊙ Q Kᵀ) W + F ⊙ (Q S₀) + g ⊙ (Q M₀)
    (3)  ΔS = Kᵀ(Res[C,:] ⊙ W)       ΔM = Kᵀ(Mom[C,:] ⊙ W)                              what a chunk adds
    (4)  S₁ = F_C S₀ + g_C M₀ + ΔS   M₁ = Mc_C M₀ + ΔM                                  a walk over chunks, cell by cell
Backward (a bar: gradient; S̄₁, M̄₁ at the chunk's end; c, d: gradients of the rows Res[C,:], Dec[C,:] by way of S₁):
    (5)  ΔS̄ = Qᵀ(F ⊙ Ȳ)              ΔM̄ = Qᵀ(g ⊙ Ȳ)
    (6)  S̄₀ = F_C S̄₁ + ΔS̄            M̄₀ = Mc_C M̄₁ + g_C S̄₁ + ΔM̄                       a walk back
    (7)  W̄  = (Res ⊙ Q Kᵀ)ᵀ Ȳ + Res[C,:] ⊙ (K S̄₁) + Mom[C,:] ⊙ (K M̄₁)
    (8)  X  = strict lower(Dec ⊙ D̄ec),  D̄ec = (Ȳ Wᵀ ⊙ Q Kᵀ)(diag(p) Mom)ᵀ + ⟨Ȳ, Q M₀⟩ (p ⊙ Mc)ᵀ
         c_s = ⟨W_s, (K S̄₁)_s⟩       d = diag(p) Mom c + ⟨S̄₁, M₀⟩ p ⊙ Mc                without momentum d = c
         l̄g_i = Σ_{t≥i>s} X[t,s] + Σ_{t≥i} F_t ⟨Ȳ_t, (Q S₀)_t⟩ + Σ_{s<i} Dec[C,s] d_s + F_C ⟨S̄₁, S₀⟩
    (9)  Q̄  = Σ_h (F ⊙ Ȳ) S₀ᵀ + (g ⊙ Ȳ) M₀ᵀ + (Σ_h Ȳ Wᵀ ⊙ Res) K
         K̄  = Σ_h (Res[C,:] ⊙ W) S̄₁ᵀ + (Mom[C,:] ⊙ W) M̄₁ᵀ + (Σ_h Ȳ Wᵀ ⊙ Res)ᵀ Q         Σ over a group's heads
lg_i has what passes token i: from before it to i or after. heads.py subtracts what starts from what ends, and there a
token's own write stands in both, so that gradients of closed gates are lost in rounding. (8) leaves it out of both, and
adds up what enters from S₀ and what leaves into S₁, without a difference.

Decay    exp of differences of sums of log gates. The sums over a chunk are fp64 (they reach 80 C, where fp32 has steps
         of 2e-4) and kept as two fp32 numbers: a small difference of large sums is exact to fp32. Nothing is divided.
Values   wider than 64 are cut into pieces of 64: the columns of S do not see each other, so each is a head of its own
         with the same gates. Keys wider than 64 are summed 64 at a time; neither N nor P has a limit.
Dtypes   sequences fp32, bf16 or fp16, any strides whose last is 1 (others are copied); gradients in their dtype; gates,
         states, sums and y fp32. Products in `precision`.
Padding  is loaded as zeros, and y and gradients are 0 there.
No atomics: sums over heads are loops, or partial sums that torch adds, so results repeat bit for bit.

Memory   Sc, Mc (B,H,chunks,N,P) and, in backward, their gradients: N P / C numbers each a token and head
Chunk    32 or 16 tokens, the least power of two that holds `chunk`. L is not compiled in: one compilation for all
Source   Mamba-2 2405.21060 (the chunk form), MuonSSM 2606.30461 (the velocity); the kernels follow from (1) to (9)
"""

# autograd.Function.backward is declared with *grads.
# pyright: reportIncompatibleMethodOverride=false

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import heads
from .diagonal_triton import available as available
from .diagonal_triton import on_device
from .reference import MIN_LOG_GATE
from .scalar_triton_kernels import chunk_states, gate_rows, key_gradients, outputs, token_gradients, triton, walk

LAUNCH = dict(num_warps=4, num_stages=1)
PRECISION = "tf32x3"
BLOCK = 512  # cells of a state that one program of the walk holds


def tile(chunk: int, N: int, P: int) -> dict[str, Any]:
    """C, BN, BP: tokens of a chunk, keys and values at a time, powers of two from 16 on, as tl.dot asks.

    A product of two fp32 tiles is three of TF32 tiles, fp32 to rounding (no tensor core multiplies fp32), and its
    factors are held twice: what 255 registers hold of token_gradients, on sm_90, is 32 tokens and 16 keys.
    """
    C, BN, BP = (min(most, max(16, triton.next_power_of_2(n))) for most, n in ((32, chunk or 32), (16, N), (32, P)))
    return dict(C=C, BN=BN, BP=BP)


def pieces_each(programs: int, pieces: int, device: torch.device) -> int:
    """Of a group's `pieces`, how many one program adds, given `programs` if each adds all: so many that there are some
    four programs an SM, since each further one writes its own dk, dq.
    """
    if device.type != "cuda":
        return pieces
    SMs = torch.cuda.get_device_properties(device).multi_processor_count
    return triton.cdiv(pieces, min(pieces, max(1, 4 * SMs // programs)))


def _sequence(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()  # a warp's lanes read neighbours


def _strides(*sequences: Tensor) -> list[int]:
    return [step for x in sequences for step in x.stride()[:3]]


def _state(x: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if x is None else x.to(torch.float32).contiguous()


def forward(lg, w, k, q, S0, M0, gamma, alpha, lengths, chunk):
    """(2) to (4) -> y (B,L,H,P), S (B,H,N,P), M or None; then rows (B,H,chunks,5,C), Sc (B,H,chunks,N,P), Mc."""
    (B, L, H, P), (G, N), velocity, device = w.shape, k.shape[2:], gamma != 0, w.device
    w, k, q = map(_sequence, (w, k, q))
    S = torch.empty(B, H, N, P, device=device, dtype=torch.float32)
    M = torch.empty_like(S) if velocity else None
    S0, M0 = _state(S0, S), _state(M0, S) if velocity else None
    form = tile(chunk, N, P)
    chunks, pieces = triton.cdiv(L, form["C"]), triton.cdiv(P, form["BP"])
    Sc = S.new_empty(B, H, chunks, N, P)
    Mc = torch.empty_like(Sc) if velocity else None
    rows, y = S.new_empty(B, H, chunks, 5, form["C"]), S.new_empty(B, L, H, P)
    log2_gamma = math.log2(gamma) if velocity else 0.0
    sizes = (L, H, N, P, H // G, chunks, pieces)
    with on_device(device):
        gate_rows[B * H, chunks](
            lg, rows, lengths, log2_gamma, L, H, chunks, *_strides(lg),
            VELOCITY=velocity, LOWEST=MIN_LOG_GATE, C=form["C"], num_warps=4,
        )  # fmt: skip
        chunk_states[B * H * pieces, chunks, triton.cdiv(N, form["BN"])](
            w, k, rows, Sc, Mc, lengths, log2_gamma, alpha, *sizes, *_strides(w, k),
            VELOCITY=velocity, REVERSE=False, PRECISION=PRECISION, **form, **LAUNCH,
        )  # fmt: skip
        walk[B * H, triton.cdiv(N * P, BLOCK)](
            S0, M0, rows, Sc, Mc, S, M, lengths, log2_gamma, L, H, N * P, chunks,
            REVERSE=False, VELOCITY=velocity, C=form["C"], BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
        outputs[B * H * pieces, chunks](
            w, k, q, rows, Sc, Mc, y, lengths, log2_gamma, alpha, *sizes, *_strides(w, k, q),
            VELOCITY=velocity, PRECISION=PRECISION, **form, **LAUNCH,
        )  # fmt: skip
    return y, S, M, rows, Sc, Mc


def backward(lg, w, k, q, rows, Sc, Mc, gamma, alpha, lengths, chunk, dy, dS, dM):
    """(5) to (9), given the gradients of y, S, M -> those of lg, w, k, q, S0, M0 or None (γ = 0)."""
    (B, L, H, P), (G, N), velocity, device = w.shape, k.shape[2:], gamma != 0, w.device
    w, k, q, dy = map(_sequence, (w, k, q, dy))
    dS0 = torch.empty(B, H, N, P, device=device, dtype=torch.float32)
    dM0 = torch.empty_like(dS0) if velocity else None
    dS, dM = _state(dS, dS0), _state(dM, dS0) if velocity else None
    form = tile(chunk, N, P)
    C, chunks, pieces = form["C"], Sc.shape[2], triton.cdiv(P, form["BP"])
    dSc = torch.empty_like(Sc)
    dMc = torch.empty_like(Sc) if velocity else None
    wide, r = triton.cdiv(N, form["BN"]), H // G
    each = pieces_each(B * G * chunks * wide, r * pieces, device)
    blocks = triton.cdiv(r * pieces, each)
    dQKs = dS0.new_empty(B, H, chunks, pieces, C, C)
    dlg, dw = dS0.new_empty(pieces, B, L, H), torch.empty(B, L, H, P, device=device, dtype=w.dtype)
    dk, dq = (dS0.new_empty(blocks, B, L, G, N, dtype=x.dtype if blocks == 1 else torch.float32) for x in (k, q))
    log2_gamma = math.log2(gamma) if velocity else 0.0
    sizes = (L, H, N, P, r, chunks, pieces)
    kept, common = (rows, Sc, Mc, dSc, dMc, dQKs), dict(VELOCITY=velocity, PRECISION=PRECISION, **form, **LAUNCH)
    with on_device(device):
        chunk_states[B * H * pieces, chunks, wide](
            dy, q, rows, dSc, dMc, lengths, log2_gamma, 1.0, *sizes, *_strides(dy, q), REVERSE=True, **common
        )
        walk[B * H, triton.cdiv(N * P, BLOCK)](
            dS, dM, rows, dSc, dMc, dS0, dM0, lengths, log2_gamma, L, H, N * P, chunks,
            REVERSE=True, VELOCITY=velocity, C=C, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
        token_gradients[B * H * pieces, chunks](
            lg, w, k, q, dy, *kept, dlg, dw, lengths, log2_gamma, alpha, B, *sizes, *_strides(lg, w, k, q, dy),
            LOWEST=MIN_LOG_GATE, **common,
        )  # fmt: skip
        key_gradients[B * G * blocks, chunks, wide](
            w, k, q, dy, *kept, dk, dq, lengths, log2_gamma, alpha, B, *sizes, each, *_strides(w, k, q, dy), **common
        )
    dlg, dk, dq = (x[0] if len(x) == 1 else x.sum(0) for x in (dlg, dk, dq))
    return dlg.to(lg.dtype), dw, dk.to(k.dtype), dq.to(q.dtype), dS0, dM0


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lg, w, k, q, S0, M0, gamma, alpha, lengths, chunk):
        y, S, M, rows, Sc, Mc = forward(lg, w, k, q, S0, M0, gamma, alpha, lengths, chunk)
        ctx.save_for_backward(lg, w, k, q, rows, Sc, Mc, lengths)
        ctx.rest, ctx.given = (gamma, alpha, chunk), (S0 is not None, M0 is not None)
        ctx.set_materialize_grads(False)
        return y, S, M

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dS, dM):
        lg, w, k, q, rows, Sc, Mc, lengths = ctx.saved_tensors
        gamma, alpha, chunk = ctx.rest
        dy = torch.zeros_like(w, dtype=torch.float32) if dy is None else dy
        *grads, dS, dM = backward(lg, w, k, q, rows, Sc, Mc, gamma, alpha, lengths, chunk, dy, dS, dM)
        dS, dM = (d if given else None for d, given in zip((dS, dM), ctx.given))
        return *grads, dS, dM, None, None, None, None


@lru_cache
def _uncompiled():
    """For torch.compile, which has nothing to gain inside and would trace the launches."""
    return torch.compiler.disable(_Scan.apply)


def scalar_scan(lg, w, k, q, S0=None, M0=None, *, gamma=0.0, alpha=1.0, lengths=None, chunk=0):
    """-> y (B,L,H,P), S (B,H,N,P), M or None where γ = 0. One token is a step of plain PyTorch."""
    B, L = w.shape[:2]
    if L == 1:
        return heads.scalar_scan(lg, w, k, q, S0, M0, gamma=gamma, alpha=alpha, lengths=lengths)
    if lengths is None:
        lengths = torch.full((B,), L, device=w.device, dtype=torch.int32)
    run: Any = _uncompiled() if torch.compiler.is_compiling() else _Scan.apply
    M0 = M0 if gamma else None  # not read
    lengths = lengths.to(w.device, torch.int32)
    return run(lg, w, k, q, S0, M0, float(gamma), float(alpha), lengths, chunk)
