"""The recurrences, one token at a time: the definition that every other form is tested against.

    M_t = γ_t M_{t−1} + α p_t k_t w_tᵀ        S_t = D_t(S_{t−1}) + p_t M_t        y_t = S_tᵀ q_t
    γ_t = γ where p_t = 1, else 1;   D_t = identity where p_t = 0;   γ = 0: M_t is the write alone and no M is kept

    diag_scan      D_t(S) = f_t ⊙ S      f = 1 − Δ k² (Longhorn), or exp(Δ A) (Mamba-1); k, q shared by all channels
    scalar_scan    D_t(S) = a_t S        a = exp(lg) one number a head (Mamba-2); k, q shared by a group of heads
    delta_scan     D_t(S) = a_t S, then the write k_t b_t(u_t − D_t(S)ᵀ k_t)ᵀ (Gated DeltaNet)
    delta_momentum_scan   D_t(S) = a_t (I − b_t k_t k_tᵀ) S: the write does not see S, so M stays linear
    velocity_scan  M_t = γ M_{t−1} + α k_t e_tᵀ, e the delta rule's error, S_t = a_t S_{t−1} + NS(M_t): nonlinear

Letters  B batch, L time, D channels, H heads, G groups of heads, N state (key) width, P value width of a head
Shapes   Δ, w, y (B,L,D) · A (D,N) · k, q (B,L,N) · S, M (B,N,D)                                   diagonal gates
         lg, b (B,L,H) · w, u, y (B,L,H,P) · k, q (B,L,G,N) or (B,L,H,N) · S, M (B,H,N,P)          heads
         lengths (B,): row b is real up to lengths_b, then padding: outputs 0 and states copied; None: all real
Dtypes   computed in fp32, or in fp64 if w is; initial states None are zeros. All of it differentiable by autograd.
Source   Longhorn 2407.14207; Mamba 2312.00752; Mamba-2 2405.21060; Gated DeltaNet 2412.06464; MuonSSM 2606.30461
"""

import torch
from torch import Tensor

from .writes import normalize_matrix

MIN_LOG_GATE = -80.0  # exp of it is 2e-35: nothing is left of the state, and no −∞ meets a 0


def forget(delta: Tensor, A: Tensor | None, k: Tensor) -> Tensor:
    """f (…,N,D) of Δ (…,D) and k (…,N): exp(Δ A) where A (D,N) is given, else 1 − Δ k²."""
    delta = delta.unsqueeze(-2)
    return torch.exp(delta * A.t()) if A is not None else 1 - delta * k.unsqueeze(-1) ** 2


def real_tokens(lengths: Tensor | None, B: int, L: int, device) -> Tensor:
    """p (B,L) bool."""
    if lengths is None:
        return torch.ones(B, L, dtype=torch.bool, device=device)
    return torch.arange(L, device=device) < lengths.to(device)[:, None]


def widen(*tensors: Tensor | None) -> list:
    """fp32, or fp64 if one of them is; None stays None."""
    dtype = torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
    return [None if t is None else t.to(dtype) for t in tensors]


def diag_scan(gate, w, k, q, S0=None, M0=None, *, gamma=0.0, alpha=1.0, lengths=None):
    """gate = (Δ, A): f = exp(Δ A), or (Δ,): f = 1 − Δ k² -> y (B,L,D), S (B,N,D), M (B,N,D) or None where γ = 0."""
    delta, A = gate if len(gate) == 2 else (*gate, None)
    delta, A, w, k, q, S, M = widen(delta, A, w, k, q, S0, M0)
    B, L, D = w.shape
    S = w.new_zeros(B, k.shape[-1], D) if S is None else S
    M = torch.zeros_like(S) if M is None else M
    real, y = real_tokens(lengths, B, L, w.device), []
    for t in range(L):
        p = real[:, t, None, None]
        M_t = gamma * M + alpha * k[:, t, :, None] * w[:, t, None, :]
        S_t = forget(delta[:, t], A, k[:, t]) * S + M_t
        S, M = torch.where(p, S_t, S), torch.where(p, M_t, M)
        y.append(torch.where(p[..., 0], torch.einsum("bn,bnd->bd", q[:, t], S), 0))
    return torch.stack(y, 1), S, M if gamma else None


def _heads(k: Tensor, H: int) -> Tensor:
    """(B,L,G,N) -> (B,L,H,N): a group's heads share its vectors."""
    return k.repeat_interleave(H // k.shape[2], 2)


def _outer(k: Tensor, w: Tensor) -> Tensor:
    return k.unsqueeze(-1) * w.unsqueeze(-2)


def _readout(S: Tensor, q: Tensor) -> Tensor:
    return torch.einsum("bhnp,bhn->bhp", S, q)


def scalar_scan(lg, w, k, q, S0=None, M0=None, *, gamma=0.0, alpha=1.0, lengths=None):
    """-> y (B,L,H,P), S (B,H,N,P), M or None where γ = 0. lg is clamped at MIN_LOG_GATE."""
    lg, w, k, q, S, M = widen(lg, w, k, q, S0, M0)
    B, L, H, P = w.shape
    k, q, a = _heads(k, H), _heads(q, H), lg.clamp(min=MIN_LOG_GATE).exp()
    S = w.new_zeros(B, H, k.shape[-1], P) if S is None else S
    M = torch.zeros_like(S) if M is None else M
    real, y = real_tokens(lengths, B, L, w.device), []
    for t in range(L):
        p = real[:, t, None, None, None]
        M_t = gamma * M + alpha * _outer(k[:, t], w[:, t])
        S_t = a[:, t, :, None, None] * S + M_t
        S, M = torch.where(p, S_t, S), torch.where(p, M_t, M)
        y.append(torch.where(p[..., 0], _readout(S, q[:, t]), 0))
    return torch.stack(y, 1), S, M if gamma else None


def delta_scan(lg, b, u, k, q, S0=None, *, lengths=None):
    """-> y (B,L,H,P), S (B,H,N,P). Decay first, then the error on the decayed state; q comes scaled."""
    lg, b, u, k, q, S = widen(lg, b, u, k, q, S0)
    B, L, H, P = u.shape
    k, q, a = _heads(k, H), _heads(q, H), lg.clamp(min=MIN_LOG_GATE).exp()
    S = u.new_zeros(B, H, k.shape[-1], P) if S is None else S
    real, y = real_tokens(lengths, B, L, u.device), []
    for t in range(L):
        p = real[:, t, None, None, None]
        decayed = a[:, t, :, None, None] * S
        error = b[:, t, :, None] * (u[:, t] - _readout(decayed, k[:, t]))
        S = torch.where(p, decayed + _outer(k[:, t], error), S)
        y.append(torch.where(p[..., 0], _readout(S, q[:, t]), 0))
    return torch.stack(y, 1), S


def delta_momentum_scan(lg, b, w, k, q, S0=None, M0=None, *, gamma=0.0, alpha=1.0, lengths=None):
    """-> y (B,L,H,P), S (B,H,N,P), M or None where γ = 0. The open loop: w = b u, γ = 0 is delta_scan exactly."""
    lg, b, w, k, q, S, M = widen(lg, b, w, k, q, S0, M0)
    B, L, H, P = w.shape
    k, q, a = _heads(k, H), _heads(q, H), lg.clamp(min=MIN_LOG_GATE).exp()
    S = w.new_zeros(B, H, k.shape[-1], P) if S is None else S
    M = torch.zeros_like(S) if M is None else M
    real, y = real_tokens(lengths, B, L, w.device), []
    for t in range(L):
        p = real[:, t, None, None, None]
        M_t = gamma * M + alpha * _outer(k[:, t], w[:, t])
        erased = S - _outer(k[:, t], b[:, t, :, None] * _readout(S, k[:, t]))
        S_t = a[:, t, :, None, None] * erased + M_t
        S, M = torch.where(p, S_t, S), torch.where(p, M_t, M)
        y.append(torch.where(p[..., 0], _readout(S, q[:, t]), 0))
    return torch.stack(y, 1), S, M if gamma else None


def velocity_scan(lg, b, u, k, q, S0=None, M0=None, *, gamma, alpha, norm, steps, poly, eps, lengths=None):
    """-> y (B,L,H,P), S and M (B,H,N,P). `norm` newton_schulz, frobenius or none, of each head's accumulated M."""
    lg, b, u, k, q, S, M = widen(lg, b, u, k, q, S0, M0)
    B, L, H, P = u.shape
    k, q, a = _heads(k, H), _heads(q, H), lg.clamp(min=MIN_LOG_GATE).exp()
    S = u.new_zeros(B, H, k.shape[-1], P) if S is None else S
    M = torch.zeros_like(S) if M is None else M
    real, y = real_tokens(lengths, B, L, u.device), []
    for t in range(L):
        p = real[:, t, None, None, None]
        decayed = a[:, t, :, None, None] * S
        error = b[:, t, :, None] * (u[:, t] - _readout(decayed, k[:, t]))
        M_t = gamma * M + alpha * _outer(k[:, t], error)
        S_t = decayed + normalize_matrix(M_t, norm=norm, steps=steps, poly=poly, eps=eps)
        S, M = torch.where(p, S_t, S), torch.where(p, M_t, M)
        y.append(torch.where(p[..., 0], _readout(S, q[:, t]), 0))
    return torch.stack(y, 1), S, M
