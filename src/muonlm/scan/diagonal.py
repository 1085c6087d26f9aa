"""What the fast forms of diag_scan share: from a forward and a backward pass over tensors to a differentiable scan.

    forward(Δ, A, w, k, q, S0, M0, γ, α, lengths, chunk) -> y, S, M, Sc, Mc
    backward(Δ, A, w, k, q, Sc, Mc, γ, α, lengths, chunk, ∂y, ∂S, ∂M) -> ∂Δ, ∂A, ∂w, ∂k, ∂q, ∂S0, ∂M0

Sc, Mc (B,n,N,D) are the states at the start of each chunk: backward recomputes the others from them. A is None for
Longhorn; M, Mc, M0 and their gradients are None where γ = 0. Other shapes: reference.py. All tensors are contiguous and
fp32, or all are fp64.
"""

# autograd.Function.backward is declared with *grads.
# pyright: reportIncompatibleMethodOverride=false

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .chunks import chunk_length, full_precision


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, backward, delta, A, w, k, q, S0, M0, gamma, alpha, lengths, chunk):
        y, S, M, Sc, Mc = forward(delta, A, w, k, q, S0, M0, gamma, alpha, lengths, chunk)
        ctx.save_for_backward(delta, A, w, k, q, Sc, Mc, lengths)
        ctx.rest, ctx.given = (backward, gamma, alpha, chunk), (S0 is not None, M0 is not None)
        ctx.set_materialize_grads(False)
        return y, S, M

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy, gS, gM):
        delta, A, w, k, q, Sc, Mc, lengths = ctx.saved_tensors
        backward, gamma, alpha, chunk = ctx.rest
        gy = torch.zeros_like(w, dtype=Sc.dtype) if gy is None else gy.contiguous()
        gS, gM = (None if g is None else g.contiguous() for g in (gS, gM))
        with full_precision(w.device):
            *grads, dS, dM = backward(delta, A, w, k, q, Sc, Mc, gamma, alpha, lengths, chunk, gy, gS, gM)
        dS, dM = (d if given else None for d, given in zip((dS, dM), ctx.given))
        return None, None, *grads, dS, dM, None, None, None, None


@lru_cache
def _uncompiled():
    """For torch.compile: dynamo would trace into numba's dispatcher, and unroll the loops of the chunked form."""
    return torch.compiler.disable(_Scan.apply)


def differentiable(forward: Callable, backward: Callable) -> Callable:
    """diag_scan, with the arguments of reference.py's and `chunk`, by these two passes."""

    def diag_scan(gate, w, k, q, S0=None, M0=None, *, gamma=0.0, alpha=1.0, lengths=None, chunk=0):
        delta, A = gate if len(gate) == 2 else (*gate, None)
        L = w.shape[1]
        lengths = None if lengths is None else lengths.clamp(0, L)
        dtype = torch.float64 if w.dtype == torch.float64 else torch.float32
        tensors: list[Tensor | None] = [delta, A, w, k, q, S0, M0]
        tensors = [None if x is None else x.to(dtype).contiguous() for x in tensors]
        run: Any = _uncompiled() if torch.compiler.is_compiling() else _Scan.apply
        return run(forward, backward, *tensors, float(gamma), float(alpha), lengths, chunk_length(chunk, L))

    return diag_scan
