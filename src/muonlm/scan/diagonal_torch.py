"""The diagonal scan in plain PyTorch, all chunks of C tokens at once: 2C + L/C steps of Python in place of L.

One token acts on the pair (S, M) linearly. With p = 1 where it is real, g = γ if p else 1, and the write U = α k wᵀ:
    M ← g M + U,   S ← f S + p M
so a chunk acts as
    S ← F S + G M + Ŝ,   M ← Γ M + M̂,      F = ∏ f,  Γ = ∏ g,  G ← f G + p Γ token by token           (1)
Pass 1 finds (F, G, Γ, Ŝ, M̂) of every chunk from zero states, pass 2 walks the chunks by (1), pass 3 reruns the tokens
of all chunks from their true states and reads y. Backward carries Λ = ∂/∂S and Π = ∂/∂M from right to left, in the same
three passes:
    Λ ← Λ + q gyᵀ,  Π ← Π + p Λ,  [this token's gradients],  Λ ← f Λ,  Π ← g Π
    a chunk:  Π ← Γ Π + H Λ + Π̂,  Λ ← F Λ + Λ̂,      h ← g (h + p λ), λ ← f λ from h = 0, λ = 1         (2)
Its pass 3 needs every S_{t−1}: recomputed, for as many chunks at a time as SCRATCH holds. Nothing is divided by f.

Shapes   as in reference.py; inside, t runs within a chunk and the chunks are a dimension: inputs (C, B, n, ·), states
         (B, n, N, D)
Dtypes   fp32, or fp64 if w is
Memory   O(B L D) + O(B L N D / C) + SCRATCH
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .diagonal import differentiable
from .reference import forget, real_tokens

SCRATCH = 1 << 24  # numbers held while recomputing states: 64 MiB in fp32


def _cut(x: Tensor, chunk: int) -> Tensor:
    """(B, L, ·) -> (C, B, n, ·), zeros after the end."""
    B, L, width = x.shape
    return F.pad(x, (0, 0, 0, -L % chunk)).view(B, -(-L // chunk), chunk, width).permute(2, 0, 1, 3).contiguous()


def _join(x: Tensor, L: int) -> Tensor:
    """The inverse of _cut."""
    return x.permute(1, 2, 0, 3).flatten(1, 2)[:, :L]


class _Chunks:
    """Inputs in chunks. A token that is not real (after the end) has f = g = 1, p = 0, U = 0 and q = 0."""

    def __init__(self, delta, A, w, k, q, gamma, alpha, lengths, chunk):
        B, self.L, _ = w.shape
        self.A, self.alpha, self.size = A, alpha, chunk
        real = _cut(real_tokens(lengths, B, self.L, w.device)[..., None].to(w.dtype), chunk)  # (C, B, n, 1)
        self.delta, self.w, self.k, self.q = (_cut(x, chunk).where(real > 0, 0) for x in (delta, w, k, q))
        self.p = real[..., None]  # (C, B, n, 1, 1)
        self.g = 1 - self.p * (1 - gamma)

    def of(self, chunks: slice) -> "_Chunks":
        part = object.__new__(_Chunks)
        part.__dict__ = vars(self) | {x: getattr(self, x)[:, :, chunks] for x in ("delta", "w", "q", "k", "p", "g")}
        return part

    def forget(self, t: int) -> Tensor:
        return forget(self.delta[t], self.A, self.k[t])

    def step(self, t: int, S: Tensor, M: Tensor) -> tuple[Tensor, Tensor]:
        M = self.g[t] * M + self.alpha * self.k[t].unsqueeze(-1) * self.w[t].unsqueeze(-2)
        return self.forget(t) * S + self.p[t] * M, M

    def zeros(self) -> Tensor:
        return self.w.new_zeros(*self.w.shape[1:3], self.k.shape[-1], self.w.shape[-1])


def forward(delta, A, w, k, q, S0, M0, gamma, alpha, lengths, chunk):
    """-> y (B,L,D), S, M (B,N,D), and Sc, Mc (B,n,N,D), the states at chunk starts; M, Mc None where γ = 0."""
    c = _Chunks(delta, A, w, k, q, gamma, alpha, lengths, chunk)
    Sb = Mb = c.zeros()
    prod_f, G, prod_g = torch.ones_like(Sb), torch.zeros_like(Sb), torch.ones_like(c.g[0])
    for t in range(chunk):  # pass 1
        Sb, Mb = c.step(t, Sb, Mb)
        f = c.forget(t)
        prod_g = prod_g * c.g[t]
        G = f * G + c.p[t] * prod_g
        prod_f = prod_f * f
    S = torch.zeros_like(Sb[:, 0]) if S0 is None else S0
    M = torch.zeros_like(S) if M0 is None else M0
    starts = []
    for i in range(Sb.shape[1]):  # pass 2
        starts.append((S, M))
        S, M = prod_f[:, i] * S + G[:, i] * M + Sb[:, i], prod_g[:, i] * M + Mb[:, i]
    Sc, Mc = (torch.stack(states, 1) for states in zip(*starts))
    y = torch.empty_like(c.w)
    St, Mt = Sc, Mc
    for t in range(chunk):  # pass 3
        St, Mt = c.step(t, St, Mt)
        y[t] = (c.q[t].unsqueeze(-2) @ St).squeeze(-2)
    return _join(y, c.L), S, M if gamma else None, Sc, Mc if gamma else None


def backward(delta, A, w, k, q, Sc, Mc, gamma, alpha, lengths, chunk, gy, gS, gM):
    """-> gradients of Δ, A, w, k, q, S0, M0 (that of A None for Longhorn, of M0 None where γ = 0)."""
    c = _Chunks(delta, A, w, k, q, gamma, alpha, lengths, chunk)
    gy = _cut(gy, chunk)
    Lb, Pb = c.zeros(), c.zeros()
    prod_f, H, prod_g = torch.ones_like(Lb), torch.zeros_like(Lb), torch.ones_like(c.g[0])
    for t in reversed(range(chunk)):  # pass 1: what leaves each chunk on the left when nothing enters on the right
        f, p, g = c.forget(t), c.p[t], c.g[t]
        Lb = Lb + c.q[t].unsqueeze(-1) * gy[t].unsqueeze(-2)
        Pb = g * (Pb + p * Lb)
        Lb = f * Lb
        H = g * (H + p * prod_f)
        prod_f = f * prod_f
        prod_g = prod_g * g
    Lam = torch.zeros_like(Lb[:, 0]) if gS is None else gS
    Pi = torch.zeros_like(Lam) if gM is None else gM
    entering = []
    for i in reversed(range(Lb.shape[1])):  # pass 2
        entering.append((Lam, Pi))
        Pi = prod_g[:, i] * Pi + H[:, i] * Lam + Pb[:, i]
        Lam = prod_f[:, i] * Lam + Lb[:, i]
    Lams, Pis = (torch.stack(values[::-1], 1) for values in zip(*entering))
    Mc = torch.zeros_like(Sc) if Mc is None else Mc
    group = max(1, SCRATCH // max(1, Sc[:, 0].numel() * chunk))
    parts = [
        _tokens(c.of(s), Sc[:, s], Mc[:, s], gy[:, :, s], Lams[:, s], Pis[:, s])
        for s in (slice(i, i + group) for i in range(0, Sc.shape[1], group))
    ]
    d_delta, dw, dk, dq = (_join(torch.cat(x, 2), c.L) for x in list(zip(*parts))[:4])
    dA = None if A is None else sum(part[4] for part in parts)
    return d_delta, dA, dw, dk, dq, Lam, Pi if gamma else None


def _tokens(c: _Chunks, S: Tensor, M: Tensor, gy: Tensor, Lam: Tensor, Pi: Tensor) -> tuple:
    """Pass 3 of backward over some chunks: gradients (C, B, n, ·) of Δ, w, k, q, and that of A (D, N) or None."""
    states = []
    for t in range(c.size):
        states.append(S)
        S, M = c.step(t, S, M)
    d_delta, dw, dk, dq = (torch.empty_like(x) for x in (c.delta, c.w, c.k, c.q))
    dA: Any = None if c.A is None else torch.zeros_like(c.A)
    for t in reversed(range(c.size)):
        real, delta, k, f = c.p[t].squeeze(-1), c.delta[t], c.k[t], c.forget(t)
        Lam = Lam + c.q[t].unsqueeze(-1) * gy[t].unsqueeze(-2)
        Pi = Pi + c.p[t] * Lam
        dq[t] = (S @ gy[t].unsqueeze(-1)).squeeze(-1) * real
        S = states.pop()  # S_{t−1}
        df = Lam * S
        dw[t] = c.alpha * (k.unsqueeze(-2) @ Pi).squeeze(-2) * real
        dk[t] = c.alpha * (Pi @ c.w[t].unsqueeze(-1)).squeeze(-1)
        if c.A is None:
            d_delta[t] = -(k.square().unsqueeze(-2) @ df).squeeze(-2) * real
            dk[t] -= 2 * k * (df @ delta.unsqueeze(-1)).squeeze(-1)
        else:
            df = df * f
            d_delta[t] = torch.einsum("bind,dn->bid", df, c.A) * real
            dA += torch.einsum("bind,bid->dn", df, delta)
        Lam, Pi = f * Lam, c.g[t] * Pi
    return d_delta, dw, dk, dq, dA


diag_scan = differentiable(forward, backward)
