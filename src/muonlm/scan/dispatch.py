"""`diag_scan`: the recurrence of the mixers whose gate is one number per state entry, computed by whichever backend fits.

    reference   a loop over tokens (reference.py), differentiated by autograd; any device, fp64
    chunked     plain PyTorch over all chunks at once (diagonal_torch.py); any device, fp64
    cpu         numba (diagonal_cpu.py); fp32
    triton      Triton (diagonal_triton.py); fp32 arithmetic on inputs of any width
    auto        triton on a GPU, cpu on a CPU, chunked where those are missing or for fp64

Every backend but the first exports `forward`, which also returns the states at chunk starts, and `backward`, which recomputes
from them: one autograd.Function serves all. The gradient is the exact one.
Raises   UserError for a backend that is unknown or cannot run here
"""

from functools import lru_cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from muonlm.errors import UserError

from . import reference
from .chunks import exact

MODULES = {"chunked": "diagonal_torch", "cpu": "diagonal_cpu", "triton": "diagonal_triton"}


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that 'auto' stands for, or `backend` itself if it can run."""
    if backend in ("reference", "chunked"):
        return backend
    wide = dtype == torch.float64
    if backend == "auto":
        name = {"cuda": "triton", "cpu": "cpu"}.get(device.type, "chunked")
        return name if not wide and name != "chunked" and _available(name) else "chunked"
    if backend not in MODULES:
        raise UserError(f"model.scan = {backend!r} is not known; choose one of auto, reference, {', '.join(MODULES)}.")
    if wide:
        raise UserError(f"model.scan = {backend} computes in fp32, but the model is fp64; use chunked or reference.")
    if backend == "cpu" and device.type != "cpu":
        raise UserError(f"model.scan = cpu cannot run on {device}; use auto.")
    if not _available(backend):
        need = (
            "a CUDA device (or TRITON_INTERPRET=1) and triton"
            if backend == "triton"
            else "numba (pip install numba) and a CPU with FMA"
        )
        raise UserError(f"model.scan = {backend} needs {need}; use auto or chunked.")
    return backend


def _available(backend: str) -> bool:
    return _module(backend).available()


def _module(backend: str) -> ModuleType:
    return import_module(f".{MODULES[backend]}", __package__)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, delta, A, w, k, q, S0, M0, gamma, alpha, lengths, chunk):
        y, S, M, Sc, Mc = kernel.forward(delta, A, w, k, q, S0, M0, gamma, alpha, lengths, chunk)
        ctx.save_for_backward(delta, A, w, k, q, Sc, Mc, lengths)
        ctx.rest, ctx.given = (kernel, gamma, alpha, chunk), (S0 is not None, M0 is not None)
        ctx.set_materialize_grads(False)
        return y, S, M

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy, gS, gM):
        delta, A, w, k, q, Sc, Mc, lengths = ctx.saved_tensors
        kernel, gamma, alpha, chunk = ctx.rest
        gy = torch.zeros_like(w, dtype=Sc.dtype) if gy is None else gy.contiguous()
        gS, gM = (None if g is None else g.contiguous() for g in (gS, gM))
        with exact(w.device):
            *grads, dS, dM = kernel.backward(delta, A, w, k, q, Sc, Mc, gamma, alpha, lengths, chunk, gy, gS, gM)
        dS, dM = (d if given else None for d, given in zip((dS, dM), ctx.given))
        return None, *grads, dS, dM, None, None, None, None


@lru_cache
def _uncompiled():
    """For torch.compile: dynamo would trace into numba's dispatcher, and unroll the loops of the chunked form."""
    return torch.compiler.disable(_Scan.apply)


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
    chunk: int = 64,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """gate ("longhorn", Δ) or ("mamba", Δ, A) -> y (B,L,D), S (B,N,D), M (B,N,D) or None where γ = 0. Shapes: reference.py."""
    (B, L, D), N = w.shape, k.shape[-1]
    delta, A = gate[1], gate[2] if gate[0] == "mamba" else None
    assert gate[0] in ("longhorn", "mamba") and L > 0 and chunk > 0 and (M0 is None or gamma), (
        gate[0],
        L,
        chunk,
        gamma,
    )
    assert delta.shape == w.shape and k.shape == q.shape == (B, L, N), (delta.shape, w.shape, k.shape, q.shape)
    assert A is None or A.shape == (D, N), (A.shape, D, N)
    assert lengths is None or lengths.shape == (B,), (lengths.shape, B)
    assert all(x is None or x.shape == (B, N, D) for x in (S0, M0)), (B, N, D)
    name = choose_backend(backend, w.device, w.dtype)
    name = "chunked" if backend == "auto" and name == "triton" and N > 256 else name
    with exact(w.device):
        if name == "reference":
            return reference.diag_scan(gate, w, k, q, S0, M0, gamma=gamma, alpha=alpha, lengths=lengths)
        chunk = min(chunk, L)  # no states for tokens that do not exist
        lengths = None if lengths is None else lengths.clamp(0, L)
        dtype = torch.float64 if w.dtype == torch.float64 else torch.float32
        tensors = [None if x is None else x.to(dtype).contiguous() for x in (delta, A, w, k, q, S0, M0)]
        run = _uncompiled() if torch.compiler.is_compiling() else _Scan.apply
        return run(_module(name), *tensors, float(gamma), float(alpha), lengths, chunk)
