"""The scan with one gate a head as Triton kernels: reference.scalar_scan and its exact gradients, on a GPU.

The matrix form over chunks of C tokens. Dec, F, Mom, Mc, Res, g are those of chunks.py; W is αW.
    (1)  Res = Dec diag(p) Mom       g = Dec (p ⊙ Mc)          without momentum Res = Dec, g = 0, and no M is kept
    (2)  S₁ = F_C S₀ + g_C M₀ + Kᵀ(Res[C,:] ⊙ W)               M₁ = Mc_C M₀ + Kᵀ(Mom[C,:] ⊙ W)
    (3)  Y  = (Res ⊙ Q Kᵀ) W + F ⊙ (Q S₀) + g ⊙ (Q M₀)
Backward (a bar: gradient; S̄₁, M̄₁ at the chunk's end; c, d: gradients of the rows Res[C,:], Dec[C,:] by way of S₁):
    (4)  S̄₀ = F_C S̄₁ + Qᵀ(F ⊙ Ȳ)     M̄₀ = Mc_C M̄₁ + g_C S̄₁ + Qᵀ(g ⊙ Ȳ)
    (5)  W̄  = (Res ⊙ Q Kᵀ)ᵀ Ȳ + Res[C,:] ⊙ (K S̄₁) + Mom[C,:] ⊙ (K M̄₁)
    (6)  X  = strict lower(Dec ⊙ D̄ec),  D̄ec = (Ȳ Wᵀ ⊙ Q Kᵀ)(diag(p) Mom)ᵀ + ⟨Ȳ, Q M₀⟩ (p ⊙ Mc)ᵀ
         c_s = ⟨W_s, (K S̄₁)_s⟩       d = diag(p) Mom c + ⟨S̄₁, M₀⟩ p ⊙ Mc                without momentum d = c
         l̄g_i = Σ_{t≥i>s} X[t,s] + Σ_{t≥i} F_t ⟨Ȳ_t, (Q S₀)_t⟩ + Σ_{s<i} Dec[C,s] d_s + F_C ⟨S̄₁, S₀⟩
    (7)  Q̄  = Σ_h (F ⊙ Ȳ) S₀ᵀ + (g ⊙ Ȳ) M₀ᵀ + (Σ_h Ȳ Wᵀ ⊙ Res) K
         K̄  = Σ_h (Res[C,:] ⊙ W) S̄₁ᵀ + (Mom[C,:] ⊙ W) M̄₁ᵀ + (Σ_h Ȳ Wᵀ ⊙ Res)ᵀ Q         Σ over a group's heads
lg_i has what passes token i: from before it to i or after. A token's own write passes none and is left out, so that
gradients of closed gates are not lost beside it; what enters from S₀ and what leaves into S₁ is added up as it is.

(2) and (4) walk over time, one program for BN keys and BP values of a head with S, M in registers; all else is for each
chunk by itself. Values wider than BP are cut into pieces: columns of S do not see each other, so each is a head of its
own with the same gates. Keys are summed BN at a time. Neither N nor P has a limit.
No atomics: sums over heads are loops, or partial sums that torch adds, so results repeat bit for bit.

Decay    exp of differences of sums of log gates. The sums over a chunk are fp64 (they reach 80 C, where fp32 has steps
         of 5e-4) and kept as two fp32 numbers: a small difference of large sums is exact to fp32. Nothing is divided.
Dtypes   w in bf16 says that bf16 is enough for factors of products: with more than 32 keys and values all are rounded
         to it, as are S, M at chunk starts once the walk has used them. Otherwise products are fp32 to rounding. Sums,
         gates, the walk's S, M and y are fp32 always; gradients have their tensor's dtype. Any strides whose last is 1
         (others are copied).
Padding  is loaded as zeros, and y and gradients are 0 there.
Memory   S₀, M₀ of each chunk and, in backward, S̄₁, M̄₁: N P / C numbers each a token and head; Res ⊙ Q Kᵀ and
         Ȳ Wᵀ ⊙ Res: C each
Chunk    at most 64 tokens in bf16, 32 in fp32; a power of two. L is not compiled in
Source   Mamba-2 2405.21060 (the chunk form), MuonSSM 2606.30461 (the velocity); the kernels follow from (1) to (7)
"""

# autograd.Function.backward is declared with *grads.
# pyright: reportIncompatibleMethodOverride=false

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import heads
from .diagonal_triton import available as available
from .launch import on_device, sequence, state
from .reference import MIN_LOG_GATE
from .scalar_triton_kernels import gate_gradients, gate_rows, key_gradients, outputs, triton, walk, write_gradients


class Blocks(NamedTuple):
    """Of a kernel: keys and values at a time, warps, and stages, by how many blocks its loads run ahead."""

    BN: int
    BP: int
    warps: int
    stages: int

    def over(self, N: int, P: int) -> tuple[dict[str, int], int, int]:
        """The kernel's arguments, pieces of P values, blocks of N keys. tl.dot asks for powers of two from 16 on."""
        BN, BP = (min(most, max(16, triton.next_power_of_2(n))) for most, n in ((self.BN, N), (self.BP, P)))
        arguments = dict(BN=BN, BP=BP, num_warps=self.warps, num_stages=self.stages)
        return arguments, triton.cdiv(P, BP), triton.cdiv(N, BN)


@dataclass(frozen=True)
class Plan:
    """Of one precision: what is stored between kernels, tokens of a chunk, blocks that 255 registers of sm_90 hold."""

    precision: str
    kept: torch.dtype  # states at chunk starts, their gradients, Res ⊙ Q Kᵀ and Ȳ Wᵀ ⊙ Res
    C: int
    walk: Blocks
    outputs: Blocks
    gates: Blocks
    writes: Blocks
    keys: Blocks  # the values of `gates`

    def chunk(self, wanted: int) -> int:
        return min(self.C, max(16, triton.next_power_of_2(wanted or self.C)))


# No tensor core multiplies fp32: three products of TF32 tiles are fp32 to rounding, their factors held twice.
EXACT = Plan(
    "tf32x3",
    torch.float32,
    32,
    walk=Blocks(64, 32, 4, 2),
    outputs=Blocks(16, 64, 2, 1),
    gates=Blocks(16, 32, 2, 1),
    writes=Blocks(32, 32, 2, 1),
    keys=Blocks(64, 32, 4, 1),
)
ROUNDED = Plan(
    "bf16",
    torch.bfloat16,
    64,
    walk=Blocks(64, 64, 4, 2),
    outputs=Blocks(64, 64, 4, 2),
    gates=Blocks(64, 64, 4, 1),
    writes=Blocks(64, 64, 4, 2),
    keys=Blocks(64, 64, 4, 1),
)


def plan(w: Tensor, k: Tensor) -> Plan:
    """Rounded if w is and if blocks are whole: of fewer than 33 keys Triton 3.6 has compiled a wrong bf16 kernel
    (delta_triton.py), and models that small wait for launches anyway.
    """
    return ROUNDED if w.dtype == torch.bfloat16 and min(k.shape[-1], w.shape[-1]) > 32 else EXACT


def pieces_each(programs: int, pieces: int, device: torch.device) -> int:
    """Of a group's `pieces`, how many one program adds, given `programs` if each adds all: so many that there are some
    four programs an SM, since each further one writes its own dk, dq.
    """
    if device.type != "cuda":
        return pieces
    SMs = torch.cuda.get_device_properties(device).multi_processor_count
    return triton.cdiv(pieces, min(pieces, max(1, 4 * SMs // programs)))


def _strides(*sequences: Tensor) -> list[int]:
    return [step for x in sequences for step in x.stride()[:3]]


def forward(lg, w, k, q, S0, M0, gamma, alpha, lengths, chunk):
    """(2), (3) -> y (B,L,H,P), S (B,H,N,P), M or None; then rows (B,H,chunks,5,C), Sc (B,H,chunks,N,P), Mc."""
    (B, L, H, P), (G, N), velocity, device = w.shape, k.shape[2:], gamma != 0, w.device
    w, k, q = map(sequence, (w, k, q))
    S = torch.empty(B, H, N, P, device=device, dtype=torch.float32)
    M = torch.empty_like(S) if velocity else None
    S0, M0 = state(S0, S), state(M0, S) if velocity else None
    how = plan(w, k)
    C = how.chunk(chunk)
    chunks = triton.cdiv(L, C)
    Sc = S.new_empty(B, H, chunks, N, P, dtype=how.kept)
    Mc = torch.empty_like(Sc) if velocity else None
    rows, y = S.new_empty(B, H, chunks, 5, C), S.new_empty(B, L, H, P)
    log2_gamma = math.log2(gamma) if velocity else 0.0
    sizes, common = (L, H, N, P, H // G, chunks), dict(VELOCITY=velocity, PRECISION=how.precision, C=C)
    with on_device(device):
        gate_rows[B * H, chunks](
            lg, rows, lengths, log2_gamma, L, H, chunks, *_strides(lg),
            VELOCITY=velocity, LOWEST=MIN_LOG_GATE, C=C, num_warps=4,
        )  # fmt: skip
        block, pieces, wide = how.walk.over(N, P)
        walk[B * H * pieces, wide](
            w, k, rows, S0, M0, Sc, Mc, S, M, lengths, log2_gamma, alpha, *sizes, pieces, *_strides(w, k),
            REVERSE=False, **common, **block,
        )  # fmt: skip
        block, pieces, _ = how.outputs.over(N, P)
        outputs[B * H * pieces, chunks](
            w, k, q, rows, Sc, Mc, y, lengths, log2_gamma, alpha, *sizes, pieces, *_strides(w, k, q), **common, **block
        )
    return y, S, M, rows, Sc, Mc


def backward(lg, w, k, q, rows, Sc, Mc, gamma, alpha, lengths, chunk, dy, dS, dM):
    """(4) to (7), given the gradients of y, S, M -> those of lg, w, k and q in fp32, S0, M0 or None (γ = 0)."""
    (B, L, H, P), (G, N), velocity, device = w.shape, k.shape[2:], gamma != 0, w.device
    w, k, q, dy = map(sequence, (w, k, q, dy))
    dS0 = torch.empty(B, H, N, P, device=device, dtype=torch.float32)
    dM0 = torch.empty_like(dS0) if velocity else None
    dS, dM = state(dS, dS0), state(dM, dS0) if velocity else None
    how = plan(w, k)
    C, chunks, r = how.chunk(chunk), Sc.shape[2], H // G
    by_gate, pieces, _ = how.gates.over(N, P)
    by_key, same, wide = how.keys.over(N, P)
    assert pieces == same, how
    dSc = torch.empty_like(Sc)
    dMc = torch.empty_like(Sc) if velocity else None
    each = pieces_each(B * G * chunks * wide, r * pieces, device)
    blocks = triton.cdiv(r * pieces, each)
    Ps, dQKs = Sc.new_empty(B, H, chunks, C, C), Sc.new_empty(B, H, chunks, pieces, C, C)
    dlg, dw = dS0.new_empty(pieces, B, L, H), torch.empty(B, L, H, P, device=device, dtype=w.dtype)
    dk, dq = (dS0.new_empty(blocks, B, L, G, N) for _ in range(2))
    log2_gamma = math.log2(gamma) if velocity else 0.0
    sizes, common = (L, H, N, P, r, chunks), dict(VELOCITY=velocity, PRECISION=how.precision, C=C)
    with on_device(device):
        block, across, down = how.walk.over(N, P)
        walk[B * H * across, down](
            dy, q, rows, dS, dM, dSc, dMc, dS0, dM0, lengths, log2_gamma, 1.0, *sizes, across, *_strides(dy, q),
            REVERSE=True, **common, **block,
        )  # fmt: skip
        gate_gradients[B * H * pieces, chunks](
            lg, w, k, q, dy, rows, Sc, Mc, dSc, Ps, dQKs, dlg, lengths, log2_gamma, alpha, B, *sizes, pieces,
            *_strides(lg, w, k, q, dy), LOWEST=MIN_LOG_GATE, **common, **by_gate,
        )  # fmt: skip
        block, across, _ = how.writes.over(N, P)
        write_gradients[B * H * across, chunks](
            k, dy, rows, dSc, dMc, Ps, dw, lengths, log2_gamma, alpha, *sizes, across, *_strides(k, dy),
            **common, **block,
        )  # fmt: skip
        key_gradients[B * G * blocks, chunks, wide](
            w, k, q, dy, rows, Sc, Mc, dSc, dMc, dQKs, dk, dq, lengths, log2_gamma, alpha, B, *sizes, pieces, each,
            *_strides(w, k, q, dy), **common, **by_key,
        )  # fmt: skip
    dlg, dk, dq = (x[0] if len(x) == 1 else x.sum(0) for x in (dlg, dk, dq))
    return dlg.to(lg.dtype), dw, dk, dq, dS0, dM0


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lg, w, k, q, S0, M0, gamma, alpha, lengths, chunk):
        ctx.dtypes = k.dtype, q.dtype
        if plan(w, k) is ROUNDED:  # once, rather than by each head
            k, q = k.to(w.dtype), q.to(w.dtype)
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
        dlg, dw, dk, dq, dS, dM = backward(lg, w, k, q, rows, Sc, Mc, gamma, alpha, lengths, chunk, dy, dS, dM)
        dS, dM = (d if given else None for d, given in zip((dS, dM), ctx.given))
        return dlg, dw, dk.to(ctx.dtypes[0]), dq.to(ctx.dtypes[1]), dS, dM, None, None, None, None


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
    lengths = lengths.to(w.device, torch.int32).contiguous()
    return run(lg, w, k, q, S0, M0, float(gamma), float(alpha), lengths, chunk)
