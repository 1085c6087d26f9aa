"""The diagonal scan on CPU: numba kernels written in vectors of channels, forward and exact backward.

    M_t = γ M_{t−1} + α k_t w_tᵀ      S_t = f_t ⊙ S_{t−1} + M_t      y_t = S_tᵀ q_t       f = 1 − Δ k² or exp(Δ A)
    backward, t = L..1, from Λ = ∂S_L, Π = ∂M_L:   Λ += q_t ∂y_tᵀ;   Π += Λ;   F = Λ ⊙ S_{t−1}
        ∂q_t = S_t ∂y_t;   ∂w_t = α Πᵀ k_t;   ∂k_t = α Π w_t, and for Longhorn − 2 k_t ⊙ F Δ_t
        ∂Δ_t = −Fᵀ k_t² (Longhorn), or Σ_n F f A with ∂A = Σ_t F f Δ (Mamba)
        Λ ← f_t ⊙ Λ;   Π ← γ Π;   and at the start ∂S_0 = Λ, ∂M_0 = Π

Shapes   Δ, w, y (B,L,D) · A (D,N) · k, q (B,L,N) · S, M (B,N,D), all fp32
         Sc, Mc (B,⌈L/C⌉,N,D): the states at the start of each chunk
Method   A tile is LANES channels × ROWS states. Its S, M (Λ, Π) stay in registers over the C tokens of a chunk, so
         a token costs few loads beside the arithmetic. Compilers do not find this form by themselves: the vector
         instructions are written out with llvmlite. The types of the arguments choose the variant (A or k² given,
         M given or None); each is compiled at its first use and cached on disk.
         Backward reruns a chunk from Sc, Mc, keeping S_{t−1} (and Mamba's f) of one tile; it never divides by f.
Memory   beyond inputs and outputs: Sc, Mc, and for dk, dq one (B,L,N) partial sum for each BLOCK channels, added in a
         fixed order, so that results repeat bitwise and do not depend on the number of threads
Threads  The kernels release the GIL and run in torch.get_num_threads() plain Python threads: no OpenMP or numba pool is
         touched, and any number of callers may run at once.
Limits   Δ A ≤ 88 (a gate ≤ 1 is meant); below −87 exp stays at 1.6e-38
Source   muonlm's own, derived from the recurrences of Longhorn 2407.14207, Mamba 2312.00752 and MuonSSM 2606.30461
"""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from torch import Tensor
from torch.nn.functional import pad

from .diagonal import differentiable
from .diagonal_cpu_kernels import BLOCK, FEATURES, ROWS, backward_tasks, forward_tasks, numba

SERIAL = 1 << 18  # states × tokens below which waking a thread (some 50 µs) costs more than it saves


def available(device: torch.device) -> bool:
    """Whether numba is here, and the CPU not one without FMA, where the chunked form is faster (LOG 2026-11-22)."""
    return device.type == "cpu" and numba is not None and FEATURES.get("fma", True)


# ---- threads


_pool = None


def _forget_pool():
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget_pool)  # a child inherits the object but not its threads


def _run(kernel, tasks, cost, tensors, *args):
    """kernel(lo, hi, *args) over 0..tasks, in pieces that torch.get_num_threads() threads take in turn.

    The pieces own `tensors`, whose addresses are among args: an interrupt may leave before the last of them has ended.
    """
    global _pool
    threads = min(torch.get_num_threads(), tasks)
    if threads == 1 or cost < SERIAL:
        kernel(0, tasks, *args)
        return
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count(), "muonlm-scan")
    pieces = min(tasks, 4 * threads)
    turn = itertools.count()

    def work(held=tensors):
        while (i := next(turn)) < pieces:
            kernel(i * tasks // pieces, (i + 1) * tasks // pieces, *args)

    others = [_pool.submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        wait(others)
    for other in others:
        other.result()  # raises what it raised


# ---- the two passes


def _address(x: Tensor | None) -> int | None:
    if x is None:
        return None
    assert x.dtype == torch.float32 and x.is_contiguous(), (x.dtype, x.shape, x.stride())
    return x.data_ptr()


def _prepare(A, k, q, lengths, L):
    """k² or None, A (N,D) or None, k and q with N padded to whole tiles, the rows' lengths as an array."""
    missing = -k.shape[-1] % ROWS
    if missing:
        k, q = pad(k, (0, missing)), pad(q, (0, missing))
    k2, A = (k.square(), None) if A is None else (None, A.t().contiguous())
    ends = torch.full((len(k),), L) if lengths is None else lengths.clamp(0, L).to("cpu", torch.int64)
    return k2, A, k, q, ends.numpy()


def forward(delta, A, w, k, q, S0, M0, gamma, alpha, lengths, chunk):
    """-> y (B,L,D), S (B,N,D), M or None where γ = 0, and Sc, Mc for backward."""
    (B, L, D), N = w.shape, k.shape[-1]
    k2, A, k, q, ends = _prepare(A, k, q, lengths, L)

    def states(start):
        kept = w.new_empty(B, -(-L // chunk), N, D)
        kept[:, 0] = 0 if start is None else start
        return w.new_empty(B, N, D), kept

    S, Sc = states(S0)
    M, Mc = states(M0) if gamma else (None, None)
    y = torch.empty_like(w) if lengths is None else torch.zeros_like(w)
    tensors = (delta, k2, A, w, k, q, y, S, M, Sc, Mc)
    arrays, tasks = [_address(x) for x in tensors], B * -(-D // BLOCK)
    sizes = (L, D, N, k.shape[-1], chunk)
    _run(forward_tasks, tasks, B * L * N * D, tensors, ends, *sizes, *arrays, float(gamma), float(alpha))
    return y, S, M, Sc, Mc


def backward(delta, A, w, k, q, Sc, Mc, gamma, alpha, lengths, chunk, gy, gS, gM):
    """-> dΔ, dA (None for Longhorn), dw, dk, dq, dS0, dM0 (None where γ = 0)."""
    (B, L, D), N = w.shape, k.shape[-1]
    k2, A, k, q, ends = _prepare(A, k, q, lengths, L)
    K, blocks = k.shape[-1], -(-D // BLOCK)
    empty = w.new_empty if lengths is None else w.new_zeros
    d_delta, dw, dk, dq = empty(B, L, D), empty(B, L, D), empty(blocks, B, L, K), empty(blocks, B, L, K)

    def start(g):
        return w.new_zeros(B, N, D) if g is None else g.clone(memory_format=torch.contiguous_format)

    lam, pi = start(gS), start(gM) if gamma else None
    dA = None if A is None else w.new_zeros(B, N, D)
    tensors = (delta, k2, A, w, k, q, Sc, Mc, gy.contiguous(), lam, pi, d_delta, dA, dw, dk, dq)
    arrays = [_address(x) for x in tensors]
    sizes = (L, D, N, K, chunk)
    _run(backward_tasks, B * blocks, 4 * B * L * N * D, tensors, ends, *sizes, *arrays, float(gamma), float(alpha))
    dk, dq = dk.sum(0)[..., :N], dq.sum(0)[..., :N]
    return d_delta, None if dA is None else dA.sum(0).t(), dw, dk, dq, lam, pi


diag_scan = differentiable(forward, backward)
