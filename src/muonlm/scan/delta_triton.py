"""Gated DeltaNet's scan as Triton kernels: reference.delta_scan and its exact gradients, on a GPU, chunk by chunk.

    X = strict lower(K Kᵀ ⊙ Dec),  Z = X (I + diag(b) X)⁻¹,  P = Q Kᵀ ⊙ Dec;  Dec, F of chunks.py, f = Dec[C,:]     (1)
    W = U − F ⊙ K S₀,  V = W − Z (b ⊙ W),  S₁ = F_C S₀ + Kᵀ (b f ⊙ V)                                               (2)
    Y = F ⊙ (Q S₀) + P (b ⊙ V)                                                                                      (3)
    Ē = Pᵀ Ȳ + f ⊙ K S̄₁,  R̄ = Ē − Zᵀ (b ⊙ Ē),  S̄₀ = F_C S̄₁ + Qᵀ (F ⊙ Ȳ) − Kᵀ (b F ⊙ R̄),  Ū = b ⊙ R̄                (4)
    b̄ = diag(R̄ Vᵀ),  G = Ȳ (b ⊙ V)ᵀ ⊙ Dec,  D = −diag(b) strict lower(R̄ (b ⊙ V)ᵀ ⊙ Dec)                             (5)
    Q̄ = F ⊙ Ȳ S₀ᵀ + G K,  K̄ = K̄ᵣ + K̄ᵥ,  K̄ᵣ = −b F ⊙ R̄ S₀ᵀ + D K,  K̄ᵥ = b f ⊙ V S̄₁ᵀ + Gᵀ Q + Dᵀ K
Σ lg up to t multiplies q_t and k_t as it reads, and divides k_t as it writes: its gradient is the sum over n of
Q̄ ⊙ Q + K̄ᵣ ⊙ K − K̄ᵥ ⊙ K, at t = C also ⟨S̄₁, S₁⟩, which is taken as F_C ⟨S̄₁, S₀⟩ + ⟨K S̄₁, b f ⊙ V⟩, since then what
closed gates forget cancels; l̄g is the sum of these from t on.
V are the errors before b makes writes of them, E = b ⊙ V those of delta.py; nothing is divided by b.

Shapes   those of reference.py; a row's n chunks have C tokens; saved for backward, by chunk:
         Z, P (C,C), V (C,P), S₀ (N,P), F, f (C,); and q, k, lg, b, but not u
Dtypes   u in bf16 says that bf16 is enough for factors: q, k and what is saved are rounded to it, as are states and
         errors where they enter a product; sums, decays, Z while it is made, states from chunk to chunk are fp32,
         as are y and S. Otherwise all is fp32, and products are, too, within 2⁻²⁰ (EXACT). Any strides whose last is 1.

Only (2) and (4) walk over time, one program for BP values of a head with its (N, BP) state in registers; a chunk costs
three products one after the other. All else is for each chunk by itself. No atomics: what several programs give to db,
dlg (blocks of keys) or dk, dq (heads of a group) torch adds, so results repeat bit for bit.

Source   Gated DeltaNet 2412.06464 for the recurrence; the kernels follow from the equations, which are delta.py's
"""

# autograd.Function.backward is declared with *grads.
# pyright: reportIncompatibleMethodOverride=false

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import delta
from .delta_triton_kernels import gradients, outputs, squares, walk, walk_back
from .diagonal_triton import available as available
from .launch import on_device, sequence
from .reference import MIN_LOG_GATE

EXACT = "tf32x3"  # three products of 10 bits each: an fp32 one to 2⁻²⁰
ROUNDED = "tf32"  # what is left in fp32 beside bf16


def power(width: int, most: int) -> int:
    """The power of two that holds `width`; at least the 16 that a product takes."""
    return max(16, min(most, 1 << (width - 1).bit_length()))


def blocks(N: int, P: int, half: bool, wide: bool) -> dict[str, dict[str, int]]:
    """Of each kernel: BN keys and BP values a block, warps, and stages, how many chunks its loads run ahead.

    The walks hold all keys. What fits the registers, by compiling for sm_90 and sm_80; `wide`: warps multiply together,
    from shared memory, and hold fewer factors (sm_90, sm_100).
    """
    keys, all_keys, few = power(N, 64), power(N, 256), power(P, 16)
    ahead = back = inner = dict(BP=few, num_warps=4, num_stages=2)
    if half:
        ahead = ahead | dict(BP=power(P, 64 if all_keys <= 128 else 32))
        back = back | dict(BP=power(P, min(64, 4096 // all_keys)))
        inner = dict(BN=keys, BP=power(P, 64), num_warps=4, num_stages=2)
    if half and not wide:
        back, inner = dict(BP=power(P, 32), num_warps=8, num_stages=2), inner | dict(BN=power(N, 32), BP=power(P, 32))
    return {
        "squares": dict(BN=keys, num_warps=4, num_stages=2),
        "walk": ahead | dict(BN=all_keys),
        "outputs": dict(BN=keys, BP=power(P, 64), num_warps=4, num_stages=2),
        "walk_back": back | dict(BN=all_keys, num_stages=2 if half else 1),
        "gradients": inner if half else inner | dict(BN=16),
    }


@lru_cache
def _wide(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


@lru_cache
def _compiled(N: int, P: int, H: int, G: int, half: bool, wide: bool, C: int) -> dict[str, dict[str, Any]]:
    """What each kernel is compiled for, strides aside."""
    named: dict[str, dict[str, Any]] = {name: {**sizes} for name, sizes in blocks(N, P, half, wide).items()}
    for name, arguments in named.items():
        arguments |= dict(H=H, R=H // G, N=N, C=C, EXACT=ROUNDED if half else EXACT)
        if name != "squares":
            arguments["P"] = P
        if name in ("squares", "gradients"):
            arguments["MIN_LOG_GATE"] = MIN_LOG_GATE
    named["gradients"] |= dict(ENDS=-(-P // named["walk_back"]["BP"]), CN=power(C + N, 512))
    return named


def _strides(unit: int, *sequences: Tensor) -> list[int]:
    """In batch, time and head, in units, so that the compiler sees what divides them."""
    return [x.stride(i) // unit for x in sequences for i in (0, 1, 2)]


def _unit(*sequences: Tensor) -> int:
    return math.gcd(16, *(step for x in sequences for step in x.stride()[:3]))


def forward(lg, b, u, k, q, S0, lengths, C):
    """(1) to (3) -> y (B,L,H,P), S (B,H,N,P), and for backward k, q in u's type, Z, P, F, f, V, S₀ of each chunk."""
    (B, L, H, P), (G, N), n = u.shape, k.shape[2:], -(-u.shape[1] // C)
    u, k, q, lg, b = sequence(u), sequence(k), sequence(q), lg.contiguous(), b.contiguous()
    how = _compiled(N, P, H, G, u.dtype == torch.bfloat16, _wide(u.device), C)
    half = lambda *shape: torch.empty(B * H, *shape, device=u.device, dtype=u.dtype)  # noqa: E731
    full = lambda *shape: torch.empty(*shape, device=u.device, dtype=torch.float32)  # noqa: E731
    Z, QK, V, S = half(n, C, C), half(n, C, C), half(n, C, P), half(n, N, P)
    F, f, y, S_end = full(B * H, n, C), full(B * H, n, C), full(B, L, H, P), full(B, H, N, P)
    k_out, q_out = (None, None) if k.dtype == u.dtype else (x.new_empty(x.shape, dtype=u.dtype) for x in (k, q))
    unit = math.gcd(_unit(q, k, u), N)
    with on_device(u.device):
        squares[n, B * H](
            q, k, lg, b, q_out, k_out, Z, QK, F, f, lengths, L, n, *_strides(unit, q, k), UNIT=unit, **how["squares"]
        )  # fmt: skip
        k, q = k if k_out is None else k_out, q if q_out is None else q_out
        walk[-(-P // how["walk"]["BP"]), B * H](
            k, u, b, Z, F, f, S0, V, S, S_end, lengths, L, n, *_strides(unit, k, u), UNIT=unit, **how["walk"]
        )  # fmt: skip
        outputs[n, B * H, -(-P // how["outputs"]["BP"])](
            q, b, QK, F, S, V, y, lengths, L, n, *_strides(unit, q), UNIT=unit, **how["outputs"]
        )  # fmt: skip
    return y, S_end, k, q, Z, QK, F, f, V, S


def backward(lg, b, k, q, Z, QK, F, f, V, S, lengths, C, gy, gS, dtype, initial):
    """(4) and (5), given dL/dy and dL/dS or None -> dlg, db, du, dk and dq of `dtype`, and dS0 if `initial`."""
    (B, L, H, P), (G, N), n = gy.shape, k.shape[2:], V.shape[1]
    gy, lg, b = sequence(gy), lg.contiguous(), b.contiguous()
    how = _compiled(N, P, H, G, V.dtype == torch.bfloat16, _wide(gy.device), C)
    parts, ends = -(-N // how["gradients"]["BN"]), how["gradients"]["ENDS"]
    new = lambda *shape, dtype=torch.float32: torch.empty(*shape, device=gy.device, dtype=dtype)  # noqa: E731
    dR, dS, left = torch.empty_like(V), torch.empty_like(S), new(ends, B * H, n, C + N)
    dS0 = new(B, H, N, P) if initial else None
    du, db, dlg = new(B, L, H, P, dtype=V.dtype), new(B, L, H), new(parts, B, L, H)
    dq, dk = (new(B, L, H, N, dtype=torch.float32 if G < H else dtype) for _ in range(2))
    unit = _unit(q, k, gy)
    with on_device(gy.device):
        walk_back[ends, B * H](
            q, k, b, gy, Z, QK, F, f, S, V, gS, dR, dS, du, left, dS0, lengths, L, n, *_strides(unit, q, k, gy),
            UNIT=unit, **how["walk_back"],
        )  # fmt: skip
        gradients[n, B * H, parts](
            q, k, lg, b, gy, S, V, dR, dS, left, dq, dk, db, dlg, lengths, L, n, *_strides(unit, q, k, gy),
            UNIT=unit, **how["gradients"],
        )  # fmt: skip
    if G < H:
        dk, dq = (x.unflatten(2, (G, H // G)).sum(3).to(dtype) for x in (dk, dq))
    return dlg[0] if parts == 1 else dlg.sum(0), db, du, dk, dq, dS0


class _DeltaScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lg, b, u, k, q, S0, lengths, C):
        y, S, *saved = forward(lg, b, u, k, q, S0, lengths, C)
        ctx.save_for_backward(lg, b, *saved, lengths)
        ctx.C, ctx.dtype, ctx.initial = C, k.dtype, S0 is not None
        ctx.shape = y.shape
        ctx.set_materialize_grads(False)
        return y, S

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy, gS):
        if gy is None:
            gy = torch.zeros(ctx.shape, device=gS.device)
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
    # Of 32 keys and fewer the bf16 kernels' gradients were wrong on an H200 (Triton 3.6), though not interpreted.
    half = u.dtype == torch.bfloat16 and k.shape[-1] > 32
    dtype = torch.bfloat16 if half else torch.float32
    u, lg, b = u.to(dtype), lg.to(torch.float32), b.to(torch.float32)
    if k.dtype != dtype or q.dtype != dtype:  # from fp32 a kernel rounds them
        k, q = k.to(torch.float32), q.to(torch.float32)
    S0 = None if S0 is None else S0.to(torch.float32).contiguous()
    run: Any = _uncompiled() if torch.compiler.is_compiling() else _DeltaScan.apply
    return run(lg, b, u, k, q, S0, lengths, chunk_size(chunk, dtype))


def chunk_size(chunk: int, dtype: torch.dtype) -> int:
    """16, 32 or 64: products take no fewer. The parts of exact products of 64 would not fit the registers."""
    most = 64 if dtype == torch.bfloat16 else 32
    return power(chunk or most, most)
