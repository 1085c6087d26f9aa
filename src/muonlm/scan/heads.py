"""Recurrences with one gate a head, as matrix products over chunks of C tokens; definitions and shapes in reference.py."""

from functools import lru_cache

import torch
import torch.nn.functional as F

from . import reference
from .reference import MIN_LOG_GATE, _wide, real_tokens


@lru_cache(maxsize=8)
def _intervals(C, dtype, device):
    i = torch.arange(C, device=device)
    inside = (i[:, None, None] > i) & (i[:, None, None] <= i[:, None])  # [i, t, s]: s < i <= t
    return inside.to(dtype).reshape(C, C * C)


def _decay(lg):
    """lg (…,C) -> Dec (…,C,C), F (…,C)."""
    C = lg.shape[-1]
    seg = (lg @ _intervals(C, lg.dtype, lg.device)).unflatten(-1, (C, C))
    return seg.exp().tril(), lg.cumsum(-1).exp()


def _momentum(gamma, real):
    """real (…,C) -> diag(p) Mom (…,C,C), Mom[C,:] (…,C), Mc (…,C)."""
    count = real.cumsum(-1)
    mom = torch.pow(gamma, (count[..., :, None] - count[..., None, :]).clamp(min=0)).tril()
    return real[..., :, None] * mom, mom[..., -1, :], torch.pow(gamma, count)


def _chunk(x, n, C, G=None):
    """(B,L,H,*) -> (n,B,H,C,*)."""
    B, L, H = x.shape[:3]
    x = F.pad(x, [0, 0] * (x.ndim - 2) + [0, n * C - L])
    return x.view(B, n, C, H, *x.shape[3:]).movedim((1, 3), (0, 2))


def _unchunk(y, L):
    y = y.permute(1, 0, 3, 2, 4)
    return y.reshape(y.shape[0], -1, *y.shape[3:])[:, :L]


def _down(x):
    return F.pad(x[..., :-1, :], (0, 0, 1, 0))


def _scalar(lg, w, k, q, S, M, gamma, alpha, real, n, C):
    B, L, H, P = w.shape
    G = k.shape[2]
    lg, w, k, q = (_chunk(x, n, C) for x in (lg, alpha * w, k, q))
    Dec, Fc = _decay(lg)
    Res, last = Dec, Dec[..., -1, :]
    r = H // G
    k, q = k.repeat_interleave(r, 2), q.repeat_interleave(r, 2)
    if gamma:
        p = real.view(B, n, C).transpose(0, 1).unsqueeze(2).to(w.dtype)
        Mom, mom_last, Mc = _momentum(gamma, p)
        Res = Dec @ Mom
        last, g = Res[..., -1, :], (Dec @ (p * Mc).unsqueeze(-1)).squeeze(-1)
        ZM = k.mT @ (mom_last.unsqueeze(-1) * w)
    Z = k.mT @ (last.unsqueeze(-1) * w)
    Ss, Ms = [], []
    for i in range(n):
        Ss.append(S)
        S = Fc[i, ..., -1, None, None] * S + Z[i]
        if gamma:
            Ms.append(M)
            S = S + g[i, ..., -1, None, None] * M
            M = Mc[i, ..., -1, None, None] * M + ZM[i]
    y = (Res * (q @ k.mT)) @ w + Fc.unsqueeze(-1) * (q @ torch.stack(Ss))
    if gamma:
        y = y + g.unsqueeze(-1) * (q @ torch.stack(Ms))
    return _unchunk(y, L), S, M


def _delta(lg, b, u, k, q, S, n, C):
    B, L, H, P = u.shape
    r = H // k.shape[2]
    lg, b, u, k, q = (_chunk(x, n, C) for x in (lg, b, u, k, q))
    k, q = k.repeat_interleave(r, 2), q.repeat_interleave(r, 2)
    Dec, Fc = _decay(lg)
    A = b.unsqueeze(-1) * (k @ k.mT) * Dec
    X = torch.linalg.solve_triangular(A, torch.cat([b.unsqueeze(-1) * u, (b * Fc).unsqueeze(-1) * k], -1), upper=False, unitriangular=True)
    Xu, Xk = X.split([P, k.shape[-1]], -1)
    K = Dec[..., -1, :, None] * k
    Ss, Es = [], []
    for i in range(n):
        Ss.append(S)
        Es.append(Xu[i] - Xk[i] @ S)
        S = Fc[i, ..., -1, None, None] * S + K[i].mT @ Es[-1]
    y = Fc.unsqueeze(-1) * (q @ torch.stack(Ss)) + (q @ k.mT * Dec) @ torch.stack(Es)
    return _unchunk(y, L), S


def _delta_momentum(lg, b, w, k, q, S, M, gamma, alpha, real, n, C):
    B, L, H, P = w.shape
    r = H // k.shape[2]
    lg, b, w, k, q = (_chunk(x, n, C) for x in (lg, b, alpha * w, k, q))
    k, q = k.repeat_interleave(r, 2), q.repeat_interleave(r, 2)
    N = k.shape[-1]
    Dec, Fc = _decay(lg)
    KK, QK = k @ k.mT, q @ k.mT
    cc = (lg.exp() * b).unsqueeze(-1)
    Res = Dec
    rhs = [F.pad(Fc[..., :-1], (1, 0), value=1.0).unsqueeze(-1) * k]
    if gamma:
        p = real.view(B, n, C).transpose(0, 1).unsqueeze(2).to(w.dtype)
        Mom, mom_last, Mc = _momentum(gamma, p)
        Res = Dec @ Mom
        g = Dec @ (p * Mc).unsqueeze(-1)
        rhs += [_down(g) * k]
        ZM = k.mT @ (mom_last.unsqueeze(-1) * w)
    rhs += [(_down(Res) * KK) @ w]
    A = _down(Dec) * KK * cc.mT
    X = cc * torch.linalg.solve_triangular(A, torch.cat(rhs, -1), upper=False, unitriangular=True)
    X1, X2, E = X.split([N, N if gamma else 0, P], -1)
    K = Dec[..., -1, :, None] * k
    Z = k.mT @ (Res[..., -1, :, None] * w)
    if gamma:
        Ms = []
        for i in range(n):
            Ms.append(M)
            M = Mc[i, ..., -1, None, None] * M + ZM[i]
        Ms = torch.stack(Ms)
        E = E + X2 @ Ms
        Z = Z + g[..., -1:, :] * Ms
    Ss, Es = [], []
    for i in range(n):
        Ss.append(S)
        Es.append(E[i] + X1[i] @ S)
        S = Fc[i, ..., -1, None, None] * S + Z[i] - K[i].mT @ Es[-1]
    y = Fc.unsqueeze(-1) * (q @ torch.stack(Ss)) + (Res * QK) @ w - (Dec * QK) @ torch.stack(Es)
    if gamma:
        y = y + g * (q @ Ms)
    return _unchunk(y, L), S, M


def _start(S, like, H, N, P):
    return like.new_zeros(like.shape[0], H, N, P) if S is None else S


def _plan(L, chunk, lengths, B, device):
    C = min(chunk or 64, max(16, 1 << (L - 1).bit_length()))
    n = -(-L // C)
    real = F.pad(real_tokens(lengths, B, L, device), (0, n * C - L))
    return n, C, real


def scalar_scan(lg, w, k, q, S0=None, M0=None, *, gamma=0.0, alpha=1.0, lengths=None, chunk=64, backend="auto"):
    if backend == "reference" or w.shape[1] == 1:
        return reference.scalar_scan(lg, w, k, q, S0, M0, gamma=gamma, alpha=alpha, lengths=lengths)
    with torch.autocast(w.device.type, enabled=False):
        lg, w, k, q, S0, M0 = _wide(lg, w, k, q, S0, M0)
        B, L, H, P = w.shape
        n, C, real = _plan(L, chunk, lengths, B, w.device)
        p = real[:, :L, None]
        lg, w = lg.clamp(min=MIN_LOG_GATE) * p, w * p[..., None]
        S0 = _start(S0, w, H, k.shape[-1], P)
        y, S, M = _scalar(lg, w, k, q, S0, _start(M0, w, *S0.shape[1:]), gamma, alpha, real, n, C)
        return y * p[..., None], S, M if gamma else None


def delta_scan(lg, b, u, k, q, S0=None, *, lengths=None, chunk=64, backend="auto"):
    if backend == "reference" or u.shape[1] == 1:
        return reference.delta_scan(lg, b, u, k, q, S0, lengths=lengths)
    with torch.autocast(u.device.type, enabled=False):
        lg, b, u, k, q, S0 = _wide(lg, b, u, k, q, S0)
        B, L, H, P = u.shape
        n, C, real = _plan(L, chunk, lengths, B, u.device)
        p = real[:, :L, None]
        y, S = _delta(lg.clamp(min=MIN_LOG_GATE) * p, b * p, u, k, q, _start(S0, u, H, k.shape[-1], P), n, C)
        return y * p[..., None], S


def delta_momentum_scan(lg, b, w, k, q, S0=None, M0=None, *, gamma, alpha, lengths=None, chunk=64, backend="auto"):
    if backend == "reference" or w.shape[1] == 1:
        return reference.delta_momentum_scan(lg, b, w, k, q, S0, M0, gamma=gamma, alpha=alpha, lengths=lengths)
    with torch.autocast(w.device.type, enabled=False):
        lg, b, w, k, q, S0, M0 = _wide(lg, b, w, k, q, S0, M0)
        B, L, H, P = w.shape
        n, C, real = _plan(L, chunk, lengths, B, w.device)
        p = real[:, :L, None]
        S0 = _start(S0, w, H, k.shape[-1], P)
        y, S, M = _delta_momentum(lg.clamp(min=MIN_LOG_GATE) * p, b * p, w * p[..., None], k, q, S0,
                                  _start(M0, w, *S0.shape[1:]), gamma, alpha, real, n, C)
        return y * p[..., None], S, M if gamma else None


def velocity_scan(lg, b, u, k, q, S0=None, M0=None, *, gamma, alpha, norm, steps, poly, eps, lengths=None,
                  ns_grad="exact", chunk=64, backend="auto"):
    return reference.velocity_scan(lg, b, u, k, q, S0, M0, gamma=gamma, alpha=alpha, norm=norm, steps=steps, poly=poly, eps=eps, lengths=lengths)
