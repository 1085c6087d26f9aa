"""The delta rules as matrix products over chunks: Gated DeltaNet, and with momentum. Dec, Res, g: chunks.py.

delta_scan    E = A⁻¹ (b ⊙ U − (b F) ⊙ K S₀),    A = I + strict lower(diag(b) (K Kᵀ ⊙ Dec))                  (1)
              Y = F ⊙ (Q S₀) + (Q Kᵀ ⊙ Dec) E,    S₁ = F_C S₀ + Kᵀ(Dec[C,:] ⊙ E)                            (2)
    Backward, with Ȳ, S̄₁ the gradients of Y, S₁ and P = Q Kᵀ ⊙ Dec, R = A E, Kd = Dec[C,:] ⊙ K, Kb = (b F) ⊙ K:
              Ē = Pᵀ Ȳ + Kd S̄₁,  R̄ = A⁻ᵀ Ē,  S̄₀ = (F ⊙ Q)ᵀ Ȳ + F_C S̄₁ − Kbᵀ R̄                               (3)
              P̄ = Ȳ Eᵀ,  Ā = −R̄ Eᵀ,  K̄d = E S̄₁ᵀ,  K̄b = −R̄ S₀ᵀ;  from these Q̄, K̄, Ū and those of b, F, Dec  (4)

delta_momentum_scan, with sh(X) = X moved down by a row, W ← α p ⊙ W:
              [X₁ X₂ X₃] = diag(a b) A⁻¹ [sh(F) ⊙ K, sh(g) ⊙ K, (sh(Res) ⊙ K Kᵀ) W]                         (5)
              A  = I + (sh(Dec) ⊙ K Kᵀ) diag(a b)
              E  = X₁ S₀ + X₂ M₀ + X₃                                sh(F) begins with 1, sh(g) with 0
              Y  = F ⊙ (Q S₀) + g ⊙ (Q M₀) + (Res ⊙ Q Kᵀ) W − (Dec ⊙ Q Kᵀ) E                              (6)
              S₁ = F_C S₀ + g_C M₀ + Kᵀ(Res[C,:] ⊙ W) − Kᵀ(Dec[C,:] ⊙ E),  M₁ = Mc_C M₀ + Kᵀ(Mom[C,:] ⊙ W)

Only the lines with S₀ on the right (and (3) backwards) walk the chunks. Saved by delta_scan: the inputs, the states at
chunk starts, E, and A⁻¹ (C numbers a token and head); by delta_momentum_scan: the inputs.
Source   Gated DeltaNet 2412.06464; MuonSSM 2606.30461 for the momentum; the chunk forms are elementary
"""

# M is None where γ = 0, which is not seen; autograd.Function.backward is declared with *grads.
# pyright: reportPossiblyUnboundVariable=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportIncompatibleMethodOverride=false

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunks import (
    Recompute,
    as_heads,
    chunk_length,
    chunked,
    decay,
    full_precision,
    initial_state,
    mask_padding,
    momentum,
    prepare,
    readout,
    real_chunks,
    suffix_sum,
    unchunked,
)
from .reference import widen


def _flat(x: Tensor, C: int) -> Tensor:
    """(B,L,H,…) -> (n,B·H,C,…), contiguous."""
    return chunked(x, C).flatten(1, 2).contiguous()


def _unflat(x: Tensor, B: int, H: int, L: int) -> Tensor:
    return unchunked(x.unflatten(1, (B, H)), L)


class _DeltaChunks(torch.autograd.Function):
    """lg, b (B,L,H), u (B,L,H,P), k, q (B,L,H,N), S (B,H,N,P) -> y, S. Equations (1) to (4)."""

    @staticmethod
    def forward(ctx, lg, b, u, k, q, S, C):
        B, L, H, P = u.shape
        ctx.C = C
        saved = lg, b, u, k, q
        with full_precision(u.device):
            lg, b, u, k, q = (_flat(x, C) for x in saved)
            n, N = len(k), k.shape[-1]
            Dec, Fc = decay(lg)
            KK = k @ k.mT
            eye = torch.eye(C, dtype=u.dtype, device=u.device).expand_as(KK)
            # A's diagonal and upper half are not read; an explicit inverse, since each chunk needs it twice
            T = torch.linalg.solve_triangular(KK.mul_(Dec).mul_(b.unsqueeze(-1)), eye, upper=False, unitriangular=True)
            R = b.unsqueeze(-1) * u
            Kb, Kd = (b * Fc).unsqueeze(-1) * k, Dec[:, :, -1, :, None] * k
            E, states = torch.empty_like(R), u.new_empty(n + 1, B * H, N, P)
            states[0] = S.reshape(B * H, N, P)
            for i in range(n):
                R[i].baddbmm_(Kb[i], states[i], alpha=-1)
                torch.bmm(T[i], R[i], out=E[i])
                torch.mul(states[i], Fc[i, :, -1, None, None], out=states[i + 1])
                states[i + 1].baddbmm_(Kd[i].mT, E[i])
            y = (q @ states[:-1]).mul_(Fc.unsqueeze(-1))
            y.add_((q @ k.mT).mul_(Dec) @ E)
        ctx.save_for_backward(*saved, states, E, T)
        return _unflat(y, B, H, L), states[-1].view(B, H, N, P).clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dS):
        *inputs, states, E, T = ctx.saved_tensors
        C, (B, L, H, P) = ctx.C, inputs[2].shape
        with full_precision(dy.device):
            lg, b, u, k, q, dy = (_flat(x, C) for x in (*inputs, dy))
            states, n, N = states[:-1], len(k), k.shape[-1]
            Dec, Fc = decay(lg)
            KK, QK = k @ k.mT, q @ k.mT
            last = Dec[:, :, -1, :, None].clone()
            f, bcol, bF = Fc.unsqueeze(-1), b.unsqueeze(-1), (b * Fc).unsqueeze(-1)
            Kb, Kd = bF * k, last * k
            # (3): dE and dR of all chunks, dSs the gradient at each chunk's end
            dE, local = (QK * Dec).mT @ dy, (f * q).mT @ dy
            dR, dSs, dS = torch.empty_like(dE), torch.empty_like(states), dS.reshape(B * H, N, P)
            for i in reversed(range(n)):
                dSs[i] = dS
                dE[i].baddbmm_(Kd[i], dS)
                torch.bmm(T[i].mT, dE[i], out=dR[i])
                dS = torch.addcmul(local[i], dS, Fc[i, :, -1, None, None])
                dS.baddbmm_(Kb[i].mT, dR[i], alpha=-1)
            # (4)
            dP = dy @ E.mT
            dA = (dR @ E.mT).tril_(-1).neg_()
            dKb = (dR @ states.mT).neg_()
            dKd = E @ dSs.mT
            dQ = dy @ states.mT
            dF = (dQ * q).sum(-1)
            dF[..., -1] += (dSs * states).sum((-2, -1))
            dQ.mul_(f)
            along_k = (dKb * k).sum(-1)
            db = (dR * u).sum(-1) + Fc * along_k
            dF += b * along_k
            dDec_last = (dKd * k).sum(-1)
            dK = dKb.mul_(bF).addcmul_(last, dKd)
            dAKK = dA * KK
            db += (dAKK * Dec).sum(-1)
            dDec = (dP * QK).addcmul_(dAKK, bcol)
            dDec[..., -1, :] += dDec_last
            dQK, dKK = dP.mul_(Dec), dA.mul_(Dec).mul_(bcol)
            dQ += dQK @ k
            dK += dQK.mT @ q
            dK += (dKK + dKK.mT) @ k
            dDec.mul_(Dec)
            dlg = suffix_sum(dDec.sum(-1).addcmul_(dF, Fc), dDec.sum(-2), 0)
            dU = dR.mul_(bcol)
        return *(_unflat(x, B, H, L) for x in (dlg, db, dU, dK, dQ)), dS.view(B, H, N, P), None


def _delta_step(lg, b, u, k, q, S):
    k, q = k[:, 0], q[:, 0]
    S = lg[:, 0, :, None, None].exp() * S
    error = b[:, 0].unsqueeze(-1) * (u[:, 0] - readout(S, k))
    S = torch.addcmul(S, k.unsqueeze(-1), error.unsqueeze(-2))
    return readout(S, q).unsqueeze(1), S


def delta_scan(lg, b, u, k, q, S0=None, *, lengths=None, chunk=0):
    """-> y (B,L,H,P), S (B,H,N,P). Decay first, then the error on the decayed state; q comes scaled."""
    lg, b, u, k, q, S = widen(lg, b, u, k, q, S0)
    lg, b, u = prepare(lengths, lg, b, u)
    L, H = u.shape[1:3]
    k, q, S = as_heads(k, H), as_heads(q, H), initial_state(S, u, k)
    if L == 1:
        y, S = _delta_step(lg, b, u, k, q, S)
    else:
        y, S = _DeltaChunks.apply(lg, b, u, k, q, S, chunk_length(chunk, L))
    return mask_padding(y, lengths), S


def _down(x: Tensor, value: float = 0.0) -> Tensor:
    return F.pad(x[..., :-1, :], (0, 0, 1, 0), value=value)


def _momentum_chunks(gamma: float, alpha: float, lengths: Tensor | None, C: int, lg, b, w, k, q, S, M=None):
    """(5) and (6)."""
    B, L, H, P = w.shape
    N = k.shape[-1]
    p = real_chunks(lengths, w, C)
    lg, b, w, k, q = (chunked(x, C).contiguous() for x in (lg, b, alpha * w, k, q))
    Dec, Fc = decay(lg)
    f, ab = Fc.unsqueeze(-1), (lg.exp() * b).unsqueeze(-1)
    KK, QK = k @ k.mT, q @ k.mT
    Res, right = Dec, [_down(f, 1.0) * k]
    if gamma:
        Mom, mom_last, Mc = momentum(gamma, p)
        Res, g = Dec @ Mom, Dec @ (p * Mc).unsqueeze(-1)
        right.append(_down(g) * k)
    right.append((_down(Res) * KK) @ w)
    A = _down(Dec) * KK * ab.mT
    X = ab * torch.linalg.solve_triangular(A, torch.cat(right, -1), upper=False, unitriangular=True)
    X1, X2, E = X.split([N, N if gamma else 0, P], -1)
    new, Kd = k.mT @ (Res[..., -1, :, None] * w), Dec[..., -1, :, None] * k
    Ss, Es, Ms = [], [], []
    if gamma:
        new_M = k.mT @ (mom_last.unsqueeze(-1) * w)
        for add, keep in zip(new_M.unbind(0), Mc[..., -1, None, None].unbind(0)):
            Ms.append(M)
            M = torch.addcmul(add, keep, M)
        Ms = torch.stack(Ms)
        E, new = E + X2 @ Ms, torch.addcmul(new, g[..., -1:, :], Ms)
    # unbind: n indexings would each have a gradient of the full size
    chunks = (x.unbind(0) for x in (E, X1, new, f[..., -1:, :], Kd.mT))
    for e, x, add, keep, kd in zip(*chunks):
        Ss.append(S)
        Es.append(e + x @ S)
        S = torch.addcmul(add, keep, S) - kd @ Es[-1]
    y = torch.addcmul((Res * QK) @ w - (Dec * QK) @ torch.stack(Es), f, q @ torch.stack(Ss))
    y = torch.addcmul(y, g, q @ Ms) if gamma else y
    return (unchunked(y, L), S, M) if gamma else (unchunked(y, L), S)


def _momentum_step(lg, b, w, k, q, S, M, gamma, alpha):
    k, q, w = k[:, 0], q[:, 0], alpha * w[:, 0]
    a = lg[:, 0, :, None].exp()
    S = a.unsqueeze(-1) * S
    if gamma:
        M = torch.addcmul(gamma * M, k.unsqueeze(-1), w.unsqueeze(-2))
        S = torch.addcmul(S + M, k.unsqueeze(-1), (b[:, 0].unsqueeze(-1) * readout(S, k)).unsqueeze(-2), value=-1)
    else:
        S = torch.addcmul(S, k.unsqueeze(-1), (w - b[:, 0].unsqueeze(-1) * readout(S, k)).unsqueeze(-2))
    return readout(S, q).unsqueeze(1), S, M


def delta_momentum_scan(lg, b, w, k, q, S0=None, M0=None, *, gamma=0.0, alpha=1.0, lengths=None, chunk=0):
    """-> y (B,L,H,P), S (B,H,N,P), M or None where γ = 0. The write w does not see S, so the recurrence is linear."""
    lg, b, w, k, q, S, M = widen(lg, b, w, k, q, S0, M0)
    lg, b, w = prepare(lengths, lg, b, w)
    L, H = w.shape[1:3]
    k, q = as_heads(k, H), as_heads(q, H)
    S, M = initial_state(S, w, k), initial_state(M, w, k) if gamma else None
    if L == 1 and lengths is None:
        return _momentum_step(lg, b, w, k, q, S, M, gamma, alpha)
    fn = partial(_momentum_chunks, gamma, alpha, lengths, chunk_length(chunk, L))
    y, S, *M = Recompute.apply(fn, lg, b, w, k, q, S, *([M] if gamma else []))
    return mask_padding(y, lengths), S, M[0] if gamma else None
