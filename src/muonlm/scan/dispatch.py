"""The five scans, each computed by the backend of the table in __init__.py that fits. Definitions and shapes:
reference.py.

    reference   a loop over tokens, differentiated by autograd; any device, fp64
    chunked     plain PyTorch over chunks of tokens; any device, fp64
    cpu         numba; fp32
    triton      Triton; fp32 arithmetic
    auto        the first of the table's rows for the scan that can run here

Every backend computes in fp32 (some in fp64) and gives the exact gradient. `chunk` is the number of tokens between two
states that are kept for the backward pass; 0: 64.
Raises   UserError for a backend that is unknown or cannot run here
"""

from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from muonlm.errors import UserError

from . import BACKENDS, Backend
from .chunks import full_precision


def backends(scan: str) -> tuple[str, ...]:
    """The backends that compute this scan somewhere, in the order in which "auto" prefers them."""
    return tuple(row.name for row in BACKENDS if row.scan == scan)


def choose_backend(scan: str, backend: str, device: torch.device, dtype: torch.dtype, states: int = 0) -> str:
    """The backend that "auto" stands for, or `backend` itself if it can run. `states`: width N of the keys, 0: any."""
    return _choose(scan, backend, device, dtype, states).name


def _choose(scan: str, backend: str, device: torch.device, dtype: torch.dtype, states: int) -> Backend:
    for row in BACKENDS:
        if row.scan != scan or not (row.name == backend or backend == "auto" and row.device in ("", device.type)):
            continue
        reason = _refusal(row, device, dtype, states)
        if not reason:
            return row
        if backend != "auto":
            raise UserError(f"`backend` = {backend!r} {reason}; use auto or chunked.")
    assert backend != "auto" and backends(scan), scan
    raise UserError(
        f"`backend` = {backend!r} does not compute {scan}; choose one of auto, {', '.join(backends(scan))}."
    )


def _refusal(row: Backend, device: torch.device, dtype: torch.dtype, states: int) -> str:
    """Why this backend cannot run; empty if it can."""
    if dtype == torch.float64 and not row.fp64:
        return "computes in fp32, and the tensors are fp64"
    if row.max_states and states > row.max_states:
        return f"holds at most {row.max_states} states, and `k` has {states}"
    if row.needs and not _module(row.module).available(device):
        return f"needs {row.needs}, and would run on {device}"
    return ""


@cache  # asked at every call: a token of decoding has no time to lose
def _module(name: str):
    return import_module(name, __package__)


def keep_out_of_graphs() -> None:
    """From now on torch.compile calls the scans between its graphs. They are kernels, or loops that it would unroll;
    the choice of a backend imports modules, which it cannot follow."""
    global _run
    if not hasattr(_run, "_torchdynamo_disable"):
        _run = torch.compiler.disable(_run)  # pyright: ignore[reportAssignmentType]


def _run(scan: str, backend: str, value: Tensor, k: Tensor, *tensors, chunk: int, **options):
    """`value` and `k` decide; `tensors` and `options` are the arguments of the scan."""
    row = _choose(scan, backend, value.device, value.dtype, k.shape[-1])
    if row.name != "reference":  # a loop over tokens has no chunks
        options["chunk"] = chunk
    with full_precision(value.device):
        return getattr(_module(row.module), scan)(*tensors, **options)


def _fit(w: Tensor, k: Tensor, q: Tensor, lengths: Tensor | None, gates: tuple, states: tuple) -> None:
    """The kernels read addresses: what does not fit may not reach them. Shapes of scans with heads: reference.py."""
    (B, L, H, P), (G, N) = w.shape, k.shape[2:]
    assert L > 0 and k.shape == q.shape == (B, L, G, N) and H % G == 0, (w.shape, k.shape, q.shape)
    assert all(gate.shape == (B, L, H) for gate in gates), [gate.shape for gate in gates]
    assert lengths is None or lengths.shape == (B,), (lengths.shape, B)
    assert all(x is None or x.shape == (B, H, N, P) for x in states), (B, H, N, P)


def diag_scan(
    gate: tuple,
    w: Tensor,
    k: Tensor,
    q: Tensor,
    S0: Tensor | None = None,
    M0: Tensor | None = None,
    *,
    gamma: float = 0.0,
    alpha: float = 1.0,
    lengths: Tensor | None = None,
    backend: str = "auto",
    chunk: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """gate (Δ, A): f = exp(Δ A), or (Δ,): f = 1 − Δ k² -> y (B,L,D), S (B,N,D), M (B,N,D) or None where γ = 0."""
    (B, L, D), N = w.shape, k.shape[-1]
    # The kernels read addresses: what does not fit may not reach them.
    assert L > 0 and (M0 is None or gamma), (L, gamma)
    assert gate[0].shape == w.shape and k.shape == q.shape == (B, L, N), (gate[0].shape, w.shape, k.shape, q.shape)
    assert [A.shape for A in gate[1:]] in ([], [(D, N)]), (gate[1:], D, N)
    assert lengths is None or lengths.shape == (B,), (lengths.shape, B)
    assert all(x is None or x.shape == (B, N, D) for x in (S0, M0)), (B, N, D)
    options = {"gamma": gamma, "alpha": alpha, "lengths": lengths, "chunk": chunk}
    return _run("diag_scan", backend, w, k, gate, w, k, q, S0, M0, **options)


def scalar_scan(
    lg: Tensor,
    w: Tensor,
    k: Tensor,
    q: Tensor,
    S0: Tensor | None = None,
    M0: Tensor | None = None,
    *,
    gamma: float = 0.0,
    alpha: float = 1.0,
    lengths: Tensor | None = None,
    backend: str = "auto",
    chunk: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """-> y (B,L,H,P), S (B,H,N,P), M (B,H,N,P) or None where γ = 0."""
    _fit(w, k, q, lengths, (lg,), (S0, M0))
    options = {"gamma": gamma, "alpha": alpha, "lengths": lengths, "chunk": chunk}
    return _run("scalar_scan", backend, w, k, lg, w, k, q, S0, M0, **options)


def delta_scan(
    lg: Tensor,
    b: Tensor,
    u: Tensor,
    k: Tensor,
    q: Tensor,
    S0: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    backend: str = "auto",
    chunk: int = 0,
) -> tuple[Tensor, Tensor]:
    """-> y (B,L,H,P), S (B,H,N,P). Decay first, then the error on the decayed state; q comes scaled."""
    _fit(u, k, q, lengths, (lg, b), (S0,))
    return _run("delta_scan", backend, u, k, lg, b, u, k, q, S0, lengths=lengths, chunk=chunk)


def delta_momentum_scan(
    lg: Tensor,
    b: Tensor,
    w: Tensor,
    k: Tensor,
    q: Tensor,
    S0: Tensor | None = None,
    M0: Tensor | None = None,
    *,
    gamma: float = 0.0,
    alpha: float = 1.0,
    lengths: Tensor | None = None,
    backend: str = "auto",
    chunk: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """-> y (B,L,H,P), S (B,H,N,P), M (B,H,N,P) or None where γ = 0. The write w does not see S."""
    options = {"gamma": gamma, "alpha": alpha, "lengths": lengths, "chunk": chunk}
    return _run("delta_momentum_scan", backend, w, k, lg, b, w, k, q, S0, M0, **options)


def velocity_scan(
    lg: Tensor,
    b: Tensor,
    u: Tensor,
    k: Tensor,
    q: Tensor,
    S0: Tensor | None = None,
    M0: Tensor | None = None,
    *,
    gamma: float,
    alpha: float,
    norm: str,
    steps: int,
    poly: str,
    eps: float,
    lengths: Tensor | None = None,
    backend: str = "auto",
    chunk: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> y (B,L,H,P), S and M (B,H,N,P). norm, steps, poly, eps: normalize_matrix of writes.py, of each head's M."""
    options = {"gamma": gamma, "alpha": alpha, "norm": norm, "steps": steps, "poly": poly, "eps": eps}
    return _run("velocity_scan", backend, u, k, lg, b, u, k, q, S0, M0, **options, lengths=lengths, chunk=chunk)
