"""What the matrix forms over chunks of C tokens share (heads.py, delta.py): layout, gates, padding, recomputation.

Inside a chunk, rows t and columns s (C × C, lower triangular), p = 1 at real tokens:
    Dec[t,s] = ∏_{s<i≤t} a_i     F_t = ∏_{i≤t} a_i      Mom[t,s] = ∏_{s<i≤t} γ_i     Mc_t = ∏_{i≤t} γ_i             (1)
    Res = Dec diag(p) Mom        g = Dec (p ⊙ Mc)        without momentum Res = Dec, g = 0, and no M is kept        (2)

    lg_i gets what passes from before i to i or after: Σ_{t≥i} ending at t + leaving − Σ_{s≥i} starting at s        (3)

Every factor is a product of gates: nothing is divided. Sums of log gates are differences of fp64 sums over one chunk,
off by 80 C 2⁻⁵³ < 1e-12 at most, closed gates included; on MPS, which has no fp64, by 80 C 2⁻²⁴ at most.
Letters  n chunks of a row, the others as in reference.py
Dtypes   fp32, or fp64 if an input is; autocast and TF32 are off inside `full_precision`
"""

# autograd.Function.backward is declared with *grads.
# pyright: reportIncompatibleMethodOverride=false

import math
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import MIN_LOG_GATE, real_tokens


@contextmanager
def full_precision(device: torch.device):
    """No autocast, and fp32 products in fp32: TF32 keeps 10 bits of a factor, too few for products of gates."""
    before = torch.get_float32_matmul_precision()
    with nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False):
        if device.type == "cuda" and before != "highest":
            torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            if device.type == "cuda" and before != "highest":
                torch.set_float32_matmul_precision(before)


class Recompute(torch.autograd.Function):
    """fn(*tensors) -> tuple of tensors, keeping the inputs alone: backward differentiates a second run of fn."""

    @staticmethod
    def forward(ctx, fn, *tensors):
        ctx.fn = fn
        ctx.save_for_backward(*tensors)
        with full_precision(tensors[0].device):
            return fn(*tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        wanted = ctx.needs_input_grad[1:]
        tensors = [t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, wanted)]
        with torch.enable_grad(), full_precision(tensors[0].device):
            pairs = [(out, g) for out, g in zip(ctx.fn(*tensors), grads) if out.requires_grad]
            found = torch.autograd.grad(
                [out for out, _ in pairs],
                [t for t, need in zip(tensors, wanted) if need],
                [g for _, g in pairs],
                allow_unused=True,
            )
        found = iter(found)
        return None, *(next(found) if need else None for need in wanted)


def decay(lg: Tensor) -> tuple[Tensor, Tensor]:
    """lg (…,C) -> Dec (…,C,C), F (…,C) of (1). exp2: torch's exp is MKL's on a CPU, and slow where it underflows."""
    total = (lg if lg.device.type == "mps" else lg.double()).cumsum(-1) / math.log(2)
    upper = lg.new_full((lg.shape[-1],) * 2, -torch.inf).triu_(1)
    Dec = (total.unsqueeze(-1) - total.unsqueeze(-2)).to(lg.dtype).clamp(max=upper).exp2()
    return Dec, total.exp2().to(lg.dtype)


def suffix_sum(ends: Tensor, starts: Tensor, leaving: Tensor | float) -> Tensor:
    """(3): ends, starts (…,C), leaving (…) -> the gradient of lg (…,C)."""
    net = ends - starts
    net[..., -1] += leaving
    return net.flip(-1).cumsum(-1).flip(-1)


def momentum(gamma: float, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p (…,C) of 0 and 1 -> diag(p) Mom (…,C,C), Mom[C,:] (…,C), Mc (…,C) of (1), by counts of real tokens."""
    count = p.cumsum(-1)
    mom = torch.pow(gamma, (count[..., :, None] - count[..., None, :]).clamp(min=0)).tril()
    return p[..., :, None] * mom, mom[..., -1, :], torch.pow(gamma, count)


def chunked(x: Tensor, C: int) -> Tensor:
    """(B,L,H,…) -> (n,B,H,C,…), zeros after L: n first, so that one chunk of all heads is contiguous once copied."""
    B, L, H = x.shape[:3]
    n = -(-L // C)
    if n * C > L:
        x = F.pad(x, [0, 0] * (x.ndim - 2) + [0, n * C - L])
    return x.reshape(B, n, C, H, *x.shape[3:]).movedim((1, 3), (0, 2))


def unchunked(x: Tensor, L: int) -> Tensor:
    """(n,B,H,C,…) -> (B,L,H,…)."""
    x = x.movedim((0, 2), (1, 3))
    return x.flatten(1, 2)[:, :L]


def real_chunks(lengths: Tensor | None, like: Tensor, C: int) -> Tensor:
    """p (n,B,1,C) in the dtype of like (B,L,…). n·C ≥ L: what fills the last chunk is padding too."""
    B, L = like.shape[:2]
    p = real_tokens(lengths, B, L, like.device).to(like.dtype)
    return chunked(p.unsqueeze(-1), C)


def chunk_length(chunk: int, L: int) -> int:
    return min(chunk or 64, L)


def as_heads(k: Tensor, H: int) -> Tensor:
    return k if k.shape[2] == H else k.repeat_interleave(H // k.shape[2], 2)


def prepare(lengths: Tensor | None, lg: Tensor, *gated: Tensor) -> list[Tensor]:
    """lg clamped, and lg = 0 and each of `gated` (B,L,H,…) = 0 at padding."""
    lg = lg.clamp(min=MIN_LOG_GATE)
    if lengths is None:
        return [lg, *gated]
    B, L = lg.shape[:2]
    p = real_tokens(lengths, B, L, lg.device).unsqueeze(-1)
    return [torch.where(p if x.ndim == 3 else p.unsqueeze(-1), x, 0) for x in (lg, *gated)]


def mask_padding(y: Tensor, lengths: Tensor | None) -> Tensor:
    """y (B,L,H,P) with 0 at padding."""
    if lengths is None:
        return y
    B, L = y.shape[:2]
    return torch.where(real_tokens(lengths, B, L, y.device)[..., None, None], y, 0)


def initial_state(S: Tensor | None, w: Tensor, k: Tensor) -> Tensor:
    return w.new_zeros(w.shape[0], w.shape[2], k.shape[-1], w.shape[-1]) if S is None else S


def readout(S: Tensor, q: Tensor) -> Tensor:
    """Sᵀ q: (B,H,N,P), (B,H,N) -> (B,H,P)."""
    return (q.unsqueeze(-2) @ S).squeeze(-2)
