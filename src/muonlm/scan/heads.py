"""Recurrences with one gate a head, as matrix products over chunks of C tokens. Definitions and shapes: reference.py.

scalar_scan   Y  = (Res ⊙ Q Kᵀ) αW + F ⊙ (Q S₀) + g ⊙ (Q M₀)                                                         (1)
              S₁ = F_C S₀ + g_C M₀ + Kᵀ(Res[C,:] ⊙ αW)       M₁ = Mc_C M₀ + Kᵀ(Mom[C,:] ⊙ αW)                        (2)
with Res, F, g, Mom, Mc of chunks.py. Backward (a bar: gradient; P = Res ⊙ Q Kᵀ, P̄ = Ȳ Wᵀ, Σ over heads):
              S̄₀ = F_C S̄₁ + Qᵀ(F ⊙ Ȳ)        M̄₀ = Mc_C M̄₁ + g_C S̄₁ + Qᵀ(g ⊙ Ȳ)                              (3)
              W̄  = Pᵀ Ȳ + Res[C,:] ⊙ (K S̄₁) + Mom[C,:] ⊙ (K M̄₁)                                             (4)
              Q̄  = (F ⊙ Ȳ) S₀ᵀ + (g ⊙ Ȳ) M₀ᵀ + Σ (P̄ ⊙ Res) K,   K̄ likewise from (2)                        (5)
              lg: (3) of chunks.py. Of X = strict lower(Dec ⊙ D̄ec) what ends at t is row t, and F_t ⟨Ȳ_t, (Q S₀)_t⟩,
              what starts at s is column s; what leaves is F_C ⟨S̄₁, S₀⟩. D̄ec is R̄es without momentum, else
              R̄es (diag(p) Mom)ᵀ + ḡ (p ⊙ Mc)ᵀ; R̄es = P̄ ⊙ Q Kᵀ, and ⟨W, K S̄₁⟩ of each token in row C         (6)
A token's own write passes no gate: where the diagonal of X were kept, it would be taken from itself, and the gradients
of closed gates, e⁻²⁰ of it, would be lost in its rounding.
A CPU walks the chunks one by one, so that a chunk's W, Y and states stay in its cache; elsewhere all go at once.
velocity_scan is nonlinear: a loop over time. The delta rules: delta.py.

Memory   O(B L D) + O(B L N D/C): scalar_scan saves its inputs, and S, M at chunk starts; velocity_scan inputs and
         S, M at chunk starts; the rest is computed again in the backward pass
Chunk    64, which chunk=0 means too: measured on a CPU, 32 and 128 are slower or as fast
Source   Mamba-2 2405.21060 (the chunk form); MuonSSM 2606.30461 (the velocity)
"""

# M is None where γ = 0, which is not seen; autograd.Function.backward is declared with *grads.
# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportPossiblyUnboundVariable=false, reportIncompatibleMethodOverride=false

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .chunks import (
    Recompute,
    as_heads,
    chunk_length,
    decay,
    full_precision,
    initial_state,
    mask_padding,
    momentum,
    prepare,
    readout,
    suffix_sum,
)
from .reference import real_tokens, widen
from .writes import normalize_matrix

CACHED = 2**17  # numbers of the states that a CPU works on at once: 512 KiB in fp32, half of a usual L2


class _Tile(NamedTuple):
    """n chunks of C tokens from token `t` (chunk i) of `rows`, for the heads of one group; X = rows · n."""

    rows: slice
    g: int
    heads: slice
    i: int
    n: int
    t: int
    C: int

    def of(self, x: Tensor) -> Tensor:
        """(B,L,…) -> (rows,n,C,…), a view."""
        return x[self.rows, self.t : self.t + self.n * self.C].unflatten(1, (self.n, self.C))

    def cut(self, x: Tensor) -> Tensor:
        """(B,L,…) -> (X,C,…)."""
        return self.of(x).flatten(0, 1)

    def states(self, x: Tensor) -> Tensor:
        """(B,G,chunks + 1,N,D) -> (rows,n + 1,N,D): at the start of each chunk, and after the last."""
        return x[self.rows, self.g, self.i : self.i + self.n + 1]

    def put(self, x: Tensor, value: Tensor) -> None:
        """The inverse of cut: x (B,L,…) is written."""
        self.of(x).copy_(value.unflatten(0, (-1, self.n)))

    def put_sum(self, x: Tensor, *terms: Tensor) -> None:
        """term + term ⊙ term, without a copy."""
        torch.addcmul(*(term.unflatten(0, (-1, self.n)) for term in terms), out=self.of(x))


def _tiles(B: int, L: int, C: int, r: int, G: int, state: int, device: torch.device) -> list[_Tile]:
    """In the order of time. `state` numbers are a row's state: on a CPU a tile's should stay in its cache."""
    small = device.type == "cpu"
    rows = max(1, CACHED // state) if small else B
    full, rest = divmod(L, C)
    spans = [(i, 1, C) for i in range(full)] if small else [(0, full, C)][:full]
    spans += [(full, 1, rest)][:rest]
    return [
        _Tile(slice(b, b + rows), g, slice(g * r, (g + 1) * r), i, n, i * C, c)
        for b in range(0, B, rows)
        for g in range(G)
        for i, n, c in spans
    ]


def _along(x: Tensor) -> Tensor:
    """(X,r,C) -> (X,C,r,1): factors of rows of W and Y."""
    return x.transpose(1, 2).unsqueeze(-1)


def _scaled(S: Tensor, x: Tensor) -> Tensor:
    """A number a head, x (rows,r), times the state S (rows,N,r·P)."""
    return S * x.repeat_interleave(S.shape[-1] // x.shape[-1], -1).unsqueeze(-2)


def _dots(S: Tensor, T: Tensor, P: int) -> Tensor:
    """(X,N,r·P) twice -> (X,r): the heads' inner products."""
    return (S * T).sum(1).unflatten(-1, (-1, P)).sum(-1)


def _beside(S: Tensor, G: int) -> Tensor:
    """(B,H,N,P) -> (B,G,N,r·P): a group's heads side by side."""
    return S.unflatten(1, (G, -1)).transpose(2, 3).flatten(3)


def _apart(S: Tensor, w: Tensor) -> Tensor:
    """The inverse of _beside."""
    return S.unflatten(3, (-1, w.shape[-1])).transpose(2, 3).flatten(1, 2)


class _Gates(NamedTuple):
    """A tile's Dec, F, Res, g, p, diag(p) Mom, Mom[C,:] and Mc of chunks.py; without momentum Res is Dec."""

    Dec: Tensor  # (X,r,C,C), as Res
    F: Tensor  # (X,r,C), as g
    Res: Tensor
    g: Any = None
    p: Any = None  # (X,C), as mom_last and Mc
    Mom: Any = None  # (X,C,C)
    mom_last: Any = None
    Mc: Any = None


def _gates(tile: _Tile, lg: Tensor, real: Tensor | None, gamma: float) -> _Gates:
    Dec, Fc = decay(tile.cut(lg[..., tile.heads]).transpose(1, 2))
    if real is None:
        return _Gates(Dec, Fc, Dec)
    p = tile.cut(real)
    Mom, mom_last, Mc = momentum(gamma, p)
    flat = Dec.flatten(1, 2)  # one product for all heads of the group
    Res, g = (flat @ Mom).view_as(Dec), (flat @ (p * Mc).unsqueeze(-1)).view_as(Fc)
    return _Gates(Dec, Fc, Res, g, p, Mom, mom_last, Mc)


def _walk_back(tile: _Tile, gates: _Gates, Q: Tensor, dYF: Tensor, dYg: Tensor | None, at_S: Tensor, at_M: Any):
    """(3) from a tile's last chunk to its first, given the gradients at_S, at_M (rows,N,r·P) of the states after it.

    -> those at each chunk's end, (X,N,r·P) twice, and that of S before the tile; at_M becomes that of M before it.
    """
    ends_S, ends_M = [at_S] * tile.n, None if dYg is None else at_M.new_empty(len(at_M), tile.n, *at_M.shape[1:])
    for j in reversed(range(tile.n)):
        at = slice(j, None, tile.n)
        ends_S[j] = at_S
        if ends_M is not None and dYg is not None:
            ends_M[:, j] = at_M
            wide = (*at_S.shape[:2], gates.F.shape[1], -1)
            at_M.mul_(gates.Mc[at, -1, None, None]).baddbmm_(Q[at].mT, dYg[at])
            at_M.view(wide).addcmul_(at_S.view(wide), gates.g[at, None, :, -1, None])
        at_S = _scaled(at_S, gates.F[at, :, -1]).baddbmm_(Q[at].mT, dYF[at])
    ds = ends_S[0] if tile.n == 1 else torch.stack(ends_S, 1).flatten(0, 1)
    return ds, None if ends_M is None else ends_M.flatten(0, 1), at_S


class _ScalarChunks(torch.autograd.Function):
    """lg (B,L,H), w (B,L,H,P), k, q (B,L,G,N), S, M (B,G,N,r·P) -> y, S, M. Equations (1) to (6)."""

    @staticmethod
    def forward(ctx, lg, w, k, q, S, M, gamma, lengths, C):
        B, L, H, P = w.shape
        G, N = k.shape[2:]
        r = H // G
        ctx.const = gamma, lengths, C
        ctx.tiles = _tiles(B, L, C, r, G, N * r * P, w.device)
        y = torch.empty_like(w, memory_format=torch.contiguous_format)
        Ss, Ms = (x if x is None else x.new_empty(B, G, -(-L // C) + 1, N, r * P) for x in (S, M))
        Ss[:, :, 0] = S
        if gamma:
            Ms[:, :, 0] = M
        real = real_tokens(lengths, B, L, w.device).to(w.dtype) if gamma else None
        with full_precision(w.device):
            for tile in ctx.tiles:
                K, Q, W = tile.cut(k[:, :, tile.g]), tile.cut(q[:, :, tile.g]), tile.cut(w[:, :, tile.heads])
                _, Fc, Res, g, _, _, mom_last, Mc = _gates(tile, lg, real, gamma)
                s, m = tile.states(Ss), tile.states(Ms) if gamma else None
                new_m = (mom_last[..., None, None] * W).flatten(2) if gamma else None
                new = (W * _along(Res[..., -1, :])).flatten(2)
                rows = len(s)
                for j in range(tile.n):
                    at = slice(j, None, tile.n)
                    keep = Fc[at, :, -1].repeat_interleave(P, -1).unsqueeze(-2)
                    torch.mul(s[:, j], keep, out=s[:, j + 1])
                    if gamma:
                        wide = (rows, N, r, P)
                        s[:, j + 1].view(wide).addcmul_(m[:, j].view(wide), g[at, None, :, -1, None])
                        torch.mul(m[:, j], Mc[at, -1, None, None], out=m[:, j + 1]).baddbmm_(K[at].mT, new_m[at])
                    s[:, j + 1].baddbmm_(K[at].mT, new[at])
                inside = Res.mul_((Q @ K.mT).unsqueeze(1)) @ W.transpose(1, 2)
                out = inside.transpose(1, 2)
                if gamma:
                    out = out.addcmul_((Q @ m[:, :-1].flatten(0, 1)).view_as(W), _along(g))
                tile.put_sum(y[:, :, tile.heads], out, (Q @ s[:, :-1].flatten(0, 1)).view_as(W), _along(Fc))
        ctx.save_for_backward(lg, w, k, q, Ss, Ms)
        return y, Ss[:, :, -1].clone(), Ms[:, :, -1].clone() if gamma else None

    @staticmethod
    def backward(ctx, dy, dS, dM):
        lg, w, k, q, Ss, Ms = ctx.saved_tensors
        gamma, lengths, C = ctx.const
        B, L, H, P = w.shape
        dlg, dw, dk, dq = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (lg, w, k, q))
        dS = dS.clone()
        dM = dM.clone() if gamma else None
        real = real_tokens(lengths, B, L, w.device).to(w.dtype) if gamma else None
        with full_precision(w.device):
            for tile in reversed(ctx.tiles):
                K, Q, W = tile.cut(k[:, :, tile.g]), tile.cut(q[:, :, tile.g]), tile.cut(w[:, :, tile.heads])
                dY = tile.cut(dy[:, :, tile.heads])
                gates = _gates(tile, lg, real, gamma)
                Dec, Fc, Res, g, p, Mom, mom_last, Mc = gates
                s, m = tile.states(Ss), tile.states(Ms) if gamma else None
                dYF, dYg = (dY * _along(Fc)).flatten(2), (dY * _along(g)).flatten(2) if gamma else None
                at_S, at_M = (None if x is None else x[tile.rows, tile.g] for x in (dS, dM))
                ds, dm, at_S = _walk_back(tile, gates, Q, dYF, dYg, at_S, at_M)
                starts = s[:, :-1].flatten(0, 1)
                leaving = _dots(ds, starts, P) * Fc[..., -1]
                last = _along(Res[..., -1, :])
                QK, reached = (Q @ K.mT).unsqueeze(1), (K @ ds).view_as(W)
                Pmat = Res * QK
                dW = (Pmat.mT @ dY.transpose(1, 2)).transpose(1, 2)
                dP = dY.transpose(1, 2) @ W.transpose(1, 2).mT
                dQ = dYF @ starts.mT
                dK = (W * last).flatten(2) @ ds.mT
                dDec = dP * QK  # with momentum of Res, which comes first
                dDec[..., -1, :] += (reached * W).sum(-1).transpose(1, 2)
                if gamma:
                    m, last_m = m[:, :-1].flatten(0, 1), mom_last[..., None, None]
                    dW = dW.addcmul_((K @ dm).view_as(W), last_m)
                    dK.baddbmm_((W * last_m).flatten(2), dm.mT)
                    dQ.baddbmm_(dYg, m.mT)
                    dg = (dY * (Q @ m).view_as(W)).sum(-1).transpose(1, 2)
                    dg[..., -1] += _dots(ds, m, P)
                    dDec = (dDec.flatten(1, 2) @ Mom.mT).view_as(Dec)
                    dDec += dg.unsqueeze(-1) * (p * Mc)[:, None, None]
                tile.put_sum(dw[:, :, tile.heads], dW, reached, last)
                across = dDec.mul_(Dec).tril_(-1)
                ends = (dYF * (Q @ starts)).view_as(W).sum(-1).transpose(1, 2) + across.sum(-1)
                dQK = dP.mul_(Res).sum(1)
                dQ.baddbmm_(dQK, K)
                dK.baddbmm_(dQK.mT, Q)
                tile.put(dlg[..., tile.heads], suffix_sum(ends, across.sum(-2), leaving).transpose(1, 2))
                tile.put(dk[:, :, tile.g], dK)
                tile.put(dq[:, :, tile.g], dQ)
                dS[tile.rows, tile.g] = at_S  # last: the end of the last chunk is this storage too
        return dlg, dw, dk, dq, dS, dM, None, None, None


def _scalar_step(lg, w, k, q, S, M, gamma, alpha):
    H = w.shape[2]
    k, q, w = as_heads(k, H)[:, 0], as_heads(q, H)[:, 0], alpha * w[:, 0]
    a = lg[:, 0, :, None, None].exp()
    if gamma:
        M = torch.addcmul(gamma * M, k.unsqueeze(-1), w.unsqueeze(-2))
        S = torch.addcmul(M, a, S)
    else:
        S = torch.addcmul(a * S, k.unsqueeze(-1), w.unsqueeze(-2))
    return readout(S, q).unsqueeze(1), S, M


def scalar_scan(lg, w, k, q, S0=None, M0=None, *, gamma=0.0, alpha=1.0, lengths=None, chunk=0):
    """-> y (B,L,H,P), S (B,H,N,P), M or None where γ = 0."""
    lg, w, k, q, S, M = widen(lg, w, k, q, S0, M0)
    lg, w = prepare(lengths, lg, w)
    S, M = initial_state(S, w, k), initial_state(M, w, k) if gamma else None
    L = w.shape[1]
    if L == 1 and lengths is None:
        return _scalar_step(lg, w, k, q, S, M, gamma, alpha)
    G = k.shape[2]
    S, M = (x if x is None else _beside(x, G) for x in (S, M))
    w = w if alpha == 1 else alpha * w
    y, S, M = _ScalarChunks.apply(lg, w, k, q, S, M, gamma, lengths, chunk_length(chunk, L))
    S, M = (x if x is None else _apart(x, w) for x in (S, M))
    return mask_padding(y, lengths), S, M


def _velocity_chunk(gamma, alpha, norm, lg, b, u, k, q, p, S, M):
    """The loop over the tokens (B,T,…) of a chunk; p (B,T) of 0 and 1."""
    a, y = lg.exp(), []
    for t in range(u.shape[1]):
        decayed = a[:, t, :, None, None] * S
        error = b[:, t, :, None] * (u[:, t] - readout(decayed, k[:, t]))
        real = p[:, t, None, None, None]
        M = torch.where(real, torch.addcmul(gamma * M, alpha * k[:, t].unsqueeze(-1), error.unsqueeze(-2)), M)
        S = torch.where(real, decayed + norm(M), S)
        y.append(readout(S, q[:, t]))
    return torch.stack(y, 1), S, M


def velocity_scan(lg, b, u, k, q, S0=None, M0=None, *, gamma, alpha, norm, steps, poly, eps, lengths=None, chunk=0):
    """-> y (B,L,H,P), S and M (B,H,N,P)."""
    lg, b, u, k, q, S, M = widen(lg, b, u, k, q, S0, M0)
    lg, b, u = prepare(lengths, lg, b, u)
    B, L, H, _ = u.shape
    k, q, S, M = as_heads(k, H), as_heads(q, H), initial_state(S, u, k), initial_state(M, u, k)
    p = real_tokens(lengths, B, L, u.device)
    fn = partial(_velocity_chunk, gamma, alpha, partial(normalize_matrix, norm=norm, steps=steps, poly=poly, eps=eps))
    outputs = []
    for part in zip(*(x.split(chunk_length(chunk, L), 1) for x in (lg, b, u, k, q, p))):
        y, S, M = Recompute.apply(fn, *part, S, M)
        outputs.append(y)
    return mask_padding(torch.cat(outputs, 1), lengths), S, M
