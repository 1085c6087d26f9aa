"""Gated DeltaNet's scan as Triton kernels: reference.delta_scan and its exact gradients, on a GPU, chunk by chunk.

    Dec, F as in chunks.py, f = Dec[C,:];  A = I + strict lower(diag(b) (K Kᵀ ⊙ Dec)),  P = Q Kᵀ ⊙ Dec              (1)
    E = A⁻¹ (b ⊙ U − (b F) ⊙ K S₀),  S₁ = F_C S₀ + Kᵀ (f ⊙ E)                                                       (2)
    Y = F ⊙ (Q S₀) + P E                                                                                            (3)
    R̄ = A⁻ᵀ (Pᵀ Ȳ + f ⊙ K S̄₁),  S̄₀ = F_C S̄₁ + Qᵀ (F ⊙ Ȳ) − Kᵀ (b F ⊙ R̄)                                            (4)
    P̄ = Ȳ Eᵀ,  Ā = −R̄ Eᵀ,  K̄d = E S̄₁ᵀ,  K̄b = −R̄ S₀ᵀ;  D = strict lower(Ā ⊙ Dec)                                   (5)
    Q̄ = F ⊙ Ȳ S₀ᵀ + (P̄ ⊙ Dec) K,  K̄ = b ⊙ X + Z,  X = F ⊙ K̄b + D K,  Z = f ⊙ K̄d + (P̄ ⊙ Dec)ᵀ Q + (b ⊙ D)ᵀ K
    Ū = b ⊙ R̄,  b̄ = Σ_p R̄ ⊙ U + Σ_n X ⊙ K
    Σ lg up to t multiplies q_t and the k_t that reads, and divides the k_t that writes: its gradient is
    Σ_n Q̄ ⊙ Q + b X ⊙ K − Z ⊙ K, at t = C also F_C ⟨S̄₁, S₀⟩ + Σ f ⊙ K̄d ⊙ K; l̄g is the sum of these from t on

Shapes   those of reference.py; a row's n chunks have C tokens; saved for backward, by chunk:
         A⁻¹, P (C,C), E (C,P), S₀ (N,P), F, f (C,)
Dtypes   u in bf16 says that bf16 is enough for factors: q, k and what is saved are rounded to it, as are states and
         errors where they enter a product; sums, decays, A⁻¹ while it is made, states from chunk to chunk are fp32,
         as are y and S. Otherwise all is fp32, and products are, too, within 2⁻²⁰ (EXACT). Any strides whose last is 1.

Only (2) and (4) walk over time, one program for BP values of a head with its (N, BP) state in registers; a chunk costs
three products one after the other. All else is for each chunk by itself. No atomics: what several programs give to db,
dlg (blocks of keys) or dk, dq (heads of a group) torch adds, so results repeat bit for bit.

Source   Gated DeltaNet 2412.06464 for the recurrence; the kernels follow from the equations, which are delta.py's
"""

# autograd.Function.backward is declared with *grads.
# pyright: reportIncompatibleMethodOverride=false

import math
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import delta
from .delta_triton_kernels import INTERPRETED, gradients, outputs, squares, triton, walk, walk_back
from .reference import MIN_LOG_GATE

EXACT = "tf32x3"  # three products of 10 bits each: an fp32 one to 2⁻²⁰
ROUNDED = "tf32"  # what is left in fp32 beside bf16


def available(device: torch.device) -> bool:
    """Whether Triton is here, and a CUDA device or Triton's interpreter (TRITON_INTERPRET=1) to run the kernels."""
    return triton is not None and (INTERPRETED or device.type == "cuda" and torch.cuda.is_available())


def blocks(N: int, P: int, dtype: torch.dtype) -> dict[str, dict[str, int]]:
    """Of each kernel: BN keys and BP values a block, warps, and stages, how many chunks its loads run ahead.

    The walks hold all keys. Blocks are powers of two, at least the 16 that a product takes.
    """
    power = lambda width, most: max(16, min(most, triton.next_power_of_2(width)))  # noqa: E731
    half, all_keys = dtype == torch.bfloat16, power(N, 256)
    values = power(P, 16 if not half else 64 if all_keys <= 128 else 32)
    return {
        "squares": dict(BN=power(N, 64), num_warps=4, num_stages=2),
        "walk": dict(BN=all_keys, BP=values, num_warps=4, num_stages=2),
        "outputs": dict(BN=power(N, 64), BP=power(P, 64), num_warps=4, num_stages=2),
        "walk_back": dict(BN=all_keys, BP=values, num_warps=4, num_stages=2 if half else 1),
        "gradients": dict(BN=power(N, 64 if half else 16), BP=power(P, 64 if half else 16), num_warps=8, num_stages=2),
    }


def _sequence(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()  # a warp's lanes read neighbours


def _strides(unit: int, *sequences: Tensor) -> list[int]:
    """In batch, time and head, in units, so that the compiler sees what divides them."""
    return [x.stride(i) // unit for x in sequences for i in (0, 1, 2)]


def _unit(*sequences: Tensor) -> int:
    return math.gcd(16, *(step for x in sequences for step in x.stride()[:3]))


def _on(device: torch.device):
    """Triton launches on the current device: make it the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _plan(q: Tensor, u: Tensor, C: int) -> tuple[tuple[int, ...], dict[str, dict], dict[str, Any]]:
    """The sizes L and n; each kernel's blocks; what all kernels are compiled for."""
    (_, L, H, P), (G, N) = u.shape, q.shape[2:]
    exact = ROUNDED if u.dtype == torch.bfloat16 else EXACT
    return (L, -(-L // C)), blocks(N, P, u.dtype), dict(H=H, R=H // G, N=N, C=C, EXACT=exact)


def forward(lg, b, u, k, q, S0, lengths, C):
    """(1) to (3) -> y (B,L,H,P), S (B,H,N,P), and for backward k, q in u's type, A⁻¹, P, F, f, E, S₀ of each chunk."""
    (B, L, H, P), N = u.shape, k.shape[-1]
    u, k, q, lg, b = _sequence(u), _sequence(k), _sequence(q), lg.contiguous(), b.contiguous()
    sizes, block, widths = _plan(q, u, C)
    n = sizes[1]
    half = lambda *shape: torch.empty(B * H, n, *shape, device=u.device, dtype=u.dtype)  # noqa: E731
    full = lambda *shape: torch.empty(*shape, device=u.device, dtype=torch.float32)  # noqa: E731
    T, QK, E, S = half(C, C), half(C, C), half(C, P), half(N, P)
    F, f, y, S_end = full(B * H, n, C), full(B * H, n, C), full(B, L, H, P), full(B, H, N, P)
    k_out, q_out = (None, None) if k.dtype == u.dtype else (x.new_empty(x.shape, dtype=u.dtype) for x in (k, q))
    widths["UNIT"] = unit = math.gcd(_unit(q, k, u), N)
    with _on(u.device):
        squares[n, B * H](
            q, k, lg, b, q_out, k_out, T, QK, F, f, lengths, *sizes, *_strides(unit, q, k), MIN_LOG_GATE=MIN_LOG_GATE,
            **widths, **block["squares"],
        )  # fmt: skip
        k, q = k if k_out is None else k_out, q if q_out is None else q_out
        values = triton.cdiv(P, block["walk"]["BP"])
        walk[values, B * H](
            k, u, b, T, F, f, S0, E, S, S_end, lengths, *sizes, *_strides(unit, k, u), P=P, **widths, **block["walk"]
        )  # fmt: skip
        values = triton.cdiv(P, block["outputs"]["BP"])
        outputs[n, B * H, values](
            q, QK, F, S, E, y, lengths, *sizes, *_strides(unit, q), P=P, **widths, **block["outputs"]
        )  # fmt: skip
    return y, S_end, k, q, T, QK, F, f, E, S


def backward(lg, b, u, k, q, T, QK, F, f, E, S, lengths, C, gy, gS, dtype, initial):
    """(4) and (5), given dL/dy and dL/dS or None -> dlg, db, du, dk and dq of `dtype`, and dS0 if `initial`."""
    (B, L, H, P), (G, N) = u.shape, k.shape[2:]
    u, k, q, gy, lg, b = _sequence(u), _sequence(k), _sequence(q), _sequence(gy), lg.contiguous(), b.contiguous()
    sizes, block, widths = _plan(q, u, C)
    n, parts = sizes[1], triton.cdiv(N, block["gradients"]["BN"])
    dR, dS = torch.empty_like(E), torch.empty_like(S)
    new = lambda *shape, dtype=torch.float32: torch.empty(*shape, device=u.device, dtype=dtype)  # noqa: E731
    dS0 = new(B, H, N, P) if initial else None
    dq, dk = (new(B, L, H, N, dtype=torch.float32 if G < H else dtype) for _ in range(2))
    du, db, dlg = new(B, L, H, P, dtype=u.dtype), new(parts, B, L, H), new(parts, B, L, H)
    unit = _unit(q, k, u, gy)
    widths |= dict(UNIT=unit, P=P)
    with _on(u.device):
        values = triton.cdiv(P, block["walk_back"]["BP"])
        walk_back[values, B * H](
            q, k, b, gy, T, QK, F, f, gS, dR, dS, dS0, lengths, *sizes, *_strides(unit, q, k, gy),
            **widths, **block["walk_back"],
        )  # fmt: skip
        gradients[n, B * H, parts](
            q, k, u, lg, b, gy, S, E, dR, dS, dq, dk, du, db, dlg, lengths, *sizes, *_strides(unit, q, k, u, gy),
            MIN_LOG_GATE=MIN_LOG_GATE, **widths, **block["gradients"],
        )  # fmt: skip
    if G < H:
        dk, dq = (x.unflatten(2, (G, H // G)).sum(3).to(dtype) for x in (dk, dq))
    db, dlg = (x[0] if parts == 1 else x.sum(0) for x in (db, dlg))
    return dlg, db, du, dk, dq, dS0


class _DeltaScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lg, b, u, k, q, S0, lengths, C):
        y, S, *saved = forward(lg, b, u, k, q, S0, lengths, C)
        ctx.save_for_backward(lg, b, u, *saved, lengths)
        ctx.C, ctx.dtype, ctx.initial = C, k.dtype, S0 is not None
        ctx.set_materialize_grads(False)
        return y, S

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy, gS):
        u = ctx.saved_tensors[2]
        gy = torch.zeros_like(u, dtype=torch.float32) if gy is None else gy
        gS = None if gS is None else gS.contiguous()
        grads = backward(*ctx.saved_tensors, C=ctx.C, gy=gy, gS=gS, dtype=ctx.dtype, initial=ctx.initial)
        return *grads, None, None


@lru_cache
def _uncompiled():
    """For torch.compile: dynamo would trace into the launches."""
    return torch.compiler.disable(_DeltaScan.apply)


def delta_scan(lg, b, u, k, q, S0=None, *, lengths=None, chunk=0):
    """-> y (B,L,H,P), S (B,H,N,P). Decay first, then the error on the decayed state; q comes scaled."""
    L = u.shape[1]
    if L == 1:
        return delta.delta_scan(lg, b, u, k, q, S0, lengths=lengths)  # a token of decoding
    lengths = None if lengths is None else lengths.to(u.device).clamp(0, L).contiguous()
    dtype = torch.bfloat16 if u.dtype == torch.bfloat16 else torch.float32
    u, lg, b = u.to(dtype), lg.to(torch.float32), b.to(torch.float32)
    if k.dtype != dtype or q.dtype != dtype:  # from fp32 a kernel rounds them
        k, q = k.to(torch.float32), q.to(torch.float32)
    S0 = None if S0 is None else S0.to(torch.float32).contiguous()
    run: Any = _uncompiled() if torch.compiler.is_compiling() else _DeltaScan.apply
    return run(lg, b, u, k, q, S0, lengths, chunk_size(chunk, dtype))


def chunk_size(chunk: int, dtype: torch.dtype) -> int:
    """16, 32 or 64: products take no fewer. The parts of exact products of 64 would not fit the registers."""
    most = 64 if dtype == torch.bfloat16 else 32
    return max(16, min(most, triton.next_power_of_2(chunk or most)))
