"""Recurrences with one gate a head, as matrix products over chunks of C tokens. Definitions and shapes: reference.py.

scalar_scan   Y  = (Res ⊙ Q Kᵀ) αW + F ⊙ (Q S₀) + g ⊙ (Q M₀)                                                         (1)
              S₁ = F_C S₀ + g_C M₀ + Kᵀ(Res[C,:] ⊙ αW)       M₁ = Mc_C M₀ + Kᵀ(Mom[C,:] ⊙ αW)                        (2)
with Res, F, g, Mom, Mc of segments.py; all chunks at once, except that (2) walks the L/C states.
velocity_scan is nonlinear: a loop over time. The delta rules: delta.py.

Memory   O(B L D) + O(B L N D/C): saved are the inputs (velocity_scan: and S, M at chunk starts), the rest is
         computed again in the backward pass
Chunk    64, which chunk=0 means too: on a CPU 32 is as fast for delta_scan and slower for the others
Source   Mamba-2 2405.21060 (the chunk form); MuonSSM 2606.30461 (the velocity)
"""

from functools import partial

import torch
from torch import Tensor

from . import reference
from .delta import delta_momentum_scan, delta_scan
from .reference import real_tokens
from .segments import (Recompute, as_heads, chunk_length, chunked, decay, exact, momentum, prepare, read, real_chunks,
                       silent, start)
from .writes import newton_schulz

__all__ = ["delta_momentum_scan", "delta_scan", "scalar_scan", "velocity_scan"]


def _scalar_chunks(gamma: float, alpha: float, lengths: Tensor | None, C: int, lg, w, k, q, S, M=None):
    """(1) and (2). A group's r heads share its Q Kᵀ, and stand side by side (r·P) in the products with K and Q."""
    B, L, H, P = w.shape
    G, N = k.shape[2:]
    r = H // G
    lg, k, q = chunked(lg, C), chunked(k, C), chunked(q, C)
    w = chunked(alpha * w.reshape(B, L, G, r, P), C)  # (n,B,G,C,r,P)
    n = len(w)
    Dec, Fc = decay(lg)  # (n,B,H,C,C), (n,B,H,C)

    def shared(x):  # (…,H,C) -> (…,G,C,r,1)
        return x.unflatten(-2, (G, r)).transpose(-1, -2).unsqueeze(-1)

    def row(x):  # a state's view of a per-head number (…,H) -> (…,G,1,r,1)
        return x.unflatten(-1, (G, r)).unsqueeze(-2).unsqueeze(-1)

    def write(x):  # Kᵀ(x ⊙ W) -> (n,B,G,N,r,P)
        return (k.mT @ (x * w).flatten(-2)).unflatten(-1, (r, P))

    def reads(states):  # Q S of each chunk's first state -> (n,B,G,C,r,P)
        return (q @ torch.stack(states).flatten(-2)).unflatten(-1, (r, P))

    S = S.unflatten(1, (G, r)).transpose(2, 3)  # (B,G,N,r,P)
    Res, Ss, Ms = Dec, [], []
    if gamma:
        M = M.unflatten(1, (G, r)).transpose(2, 3)
        p = real_chunks(lengths, w.new_empty(B, L), C)
        Mom, mom_last, Mc = momentum(gamma, p)
        Res, g = Dec @ Mom, (Dec @ (p * Mc).unsqueeze(-1)).squeeze(-1)
        new_M = write(mom_last[..., None, None])
    new = write(shared(Res[..., -1, :]))
    if gamma:
        for add, keep in zip(new_M.unbind(0), Mc[..., -1, None, None, None].unbind(0)):
            Ms.append(M)
            M = torch.addcmul(add, keep, M)
        new = torch.addcmul(new, row(g[..., -1]), torch.stack(Ms))
    # unbind: n indexings would each have a gradient of the full size
    for add, keep in zip(new.unbind(0), row(Fc[..., -1]).unbind(0)):
        Ss.append(S)
        S = torch.addcmul(add, keep, S)
    inside = (Res.unflatten(2, (G, r)) * (q @ k.mT).unsqueeze(3)) @ w.transpose(-2, -3)  # (n,B,G,r,C,P)
    y = torch.addcmul(inside.transpose(-2, -3), shared(Fc), reads(Ss))
    if gamma:
        y = torch.addcmul(y, shared(g), reads(Ms))
    y = y.permute(1, 0, 3, 2, 4, 5).reshape(B, n * C, H, P)[:, :L]
    return tuple(x.transpose(2, 3).flatten(1, 2) if x.ndim == 5 else x for x in ((y, S, M) if gamma else (y, S)))


def _scalar_step(lg, w, k, q, S, M, gamma, alpha):
    H = w.shape[2]
    k, q, w = as_heads(k, H)[:, 0], as_heads(q, H)[:, 0], alpha * w[:, 0]
    a = lg[:, 0, :, None, None].exp()
    if gamma:
        M = torch.addcmul(gamma * M, k.unsqueeze(-1), w.unsqueeze(-2))
        S = torch.addcmul(M, a, S)
    else:
        S = torch.addcmul(a * S, k.unsqueeze(-1), w.unsqueeze(-2))
    return read(S, q).unsqueeze(1), S, M


def scalar_scan(lg, w, k, q, S0=None, M0=None, *, gamma=0.0, alpha=1.0, lengths=None, chunk=64, backend="auto"):
    """-> y (B,L,H,P), S (B,H,N,P), M or None where γ = 0. backend "reference" is the loop."""
    if backend == "reference":
        return reference.scalar_scan(lg, w, k, q, S0, M0, gamma=gamma, alpha=alpha, lengths=lengths)
    lg, w, k, q, S, M = reference._wide(lg, w, k, q, S0, M0)
    lg, w = prepare(lengths, lg, w)
    S, M = start(S, w, k), start(M, w, k) if gamma else None
    L = w.shape[1]
    if L == 1 and lengths is None:
        with exact(w.device):
            return _scalar_step(lg, w, k, q, S, M, gamma, alpha)
    fn = partial(_scalar_chunks, gamma, alpha, lengths, chunk_length(chunk, L))
    y, S, *M = Recompute.apply(fn, lg, w, k, q, S, *([M] if gamma else []))
    return silent(y, lengths), S, M[0] if gamma else None


def _velocity_chunk(gamma, alpha, norm, straight, lg, b, u, k, q, p, S, M):
    """The loop over the tokens (B,T,…) of a chunk; p (B,T) of 0 and 1."""
    a, y = lg.exp(), []
    for t in range(u.shape[1]):
        decayed = a[:, t, :, None, None] * S
        error = b[:, t, :, None] * (u[:, t] - read(decayed, k[:, t]))
        real = p[:, t, None, None, None]
        M = torch.where(real, torch.addcmul(gamma * M, alpha * k[:, t].unsqueeze(-1), error.unsqueeze(-2)), M)
        step = norm(M)
        step = M + (step - M).detach() if straight else step
        S = torch.where(real, decayed + step, S)
        y.append(read(S, q[:, t]))
    return torch.stack(y, 1), S, M


def velocity_scan(lg, b, u, k, q, S0=None, M0=None, *, gamma, alpha, norm, steps, poly, eps, lengths=None,
                  ns_grad="exact", chunk=64, backend="auto"):
    """-> y (B,L,H,P), S and M (B,H,N,P). ns_grad "straight_through": backward takes the iteration for the identity."""
    assert ns_grad in ("exact", "straight_through"), ns_grad
    if backend == "reference" and ns_grad == "exact":
        return reference.velocity_scan(lg, b, u, k, q, S0, M0, gamma=gamma, alpha=alpha, norm=norm, steps=steps,
                                       poly=poly, eps=eps, lengths=lengths)
    lg, b, u, k, q, S, M = reference._wide(lg, b, u, k, q, S0, M0)
    lg, b, u = prepare(lengths, lg, b, u)
    B, L, H, _ = u.shape
    k, q, S, M = as_heads(k, H), as_heads(q, H), start(S, u, k), start(M, u, k)
    p = real_tokens(lengths, B, L, u.device)
    norm = partial(newton_schulz, norm=norm, steps=steps, poly=poly, eps=eps)
    fn = partial(_velocity_chunk, gamma, alpha, norm, ns_grad == "straight_through")
    outputs = []
    for part in zip(*(x.split(chunk or 64, 1) for x in (lg, b, u, k, q, p))):
        y, S, M = Recompute.apply(fn, *part, S, M)
        outputs.append(y)
    return silent(torch.cat(outputs, 1), lengths), S, M
