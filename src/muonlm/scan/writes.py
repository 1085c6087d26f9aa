"""Normalisation of a token's write: the matrix k eᵀ, which has rank one; and Longhorn's step size.

A Newton–Schulz iteration on X/‖X‖_F with φ(s) = A s + B s³ + C s⁵ maps each singular value by φ and keeps the singular
vectors. X = k eᵀ has a single one, which starts at 1, so S iterations give exactly κ k eᵀ / (‖k‖ ‖e‖), κ = φ∘…∘φ(1): a
rescaling.

    write_norm(e, k) = κ e / √max(m₂, ε²),   m₂ = (Σ_c e_c²)(Σ_n k_n²)                         (1)
    implicit_step(x, k) = s / (1 + s n), s = σ(x), n = ‖k‖²: an implicit update's closed form, at most min(1, 1/n)  (2)
    norm   none: e itself · frobenius: κ = 1 · newton_schulz: κ of (poly, steps); the cubic's κ is 1 for any steps
    normalize_matrix(X): the explicit iteration on whole matrices, for velocity_scan (rank above one) and the tests

Below the floor ε the map is linear, with no gradient through m₂: the clamp lies inside the root, so an all-zero token
has finite gradients. Everything in fp32 (fp64 stays).
Source   MuonSSM, arXiv 2606.30461, for the idea; the closed form is elementary
"""

# autograd.Function.backward is declared with *grads.
# pyright: reportIncompatibleMethodOverride=false

import torch
from torch import Tensor

NORMS = ("newton_schulz", "frobenius", "none")
POLYNOMIALS = {"cubic": (1.5, -0.5, 0.0), "quintic": (3.4445, -4.7750, 2.0315)}


def gain(norm: str, poly: str, steps: int) -> float:
    """κ: what `steps` iterations of the polynomial make of a singular value of 1."""
    s = 1.0
    if norm == "newton_schulz":
        a, b, c = POLYNOMIALS[poly]
        for _ in range(steps):
            s = s * (a + s * s * (b + c * s * s))
    return s


class _WriteNorm(torch.autograd.Function):
    """(1) in two passes over e; backward, with π = Σ_c w_c ∂w_c and nothing through m₂ below the floor, in three:

    ∂e = r ∂w − π e/‖e‖²,   ∂k = −π k/‖k‖²,   r = κ/√max(m₂, ε²)
    """

    @staticmethod
    def forward(ctx, e, k, kappa, eps):
        e2, k2 = _dot(e, e), _dot(k, k)
        m2 = e2 * k2
        r = kappa * torch.rsqrt(m2.clamp(min=eps * eps))
        ctx.save_for_backward(e, k, r, e2, k2, m2 > eps * eps)
        return e * r

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dw):
        e, k, r, e2, k2, above = ctx.saved_tensors
        pi = r * _dot(e, dw)
        de = torch.addcmul(r * dw, e, torch.where(above, -pi / e2, 0))
        dk = k * torch.where(above, -pi / k2, 0).sum_to_size(*k.shape[:-1], 1)
        return de, dk, None, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b).unsqueeze(-1)


def write_norm(e: Tensor, k: Tensor, kappa: float, eps: float) -> Tensor:
    """(1) over the last axes: e (…,P), k (…,N) -> w (…,P); k broadcasts against e."""
    return _WriteNorm.apply(e, k, kappa, eps)


class _ImplicitStep(torch.autograd.Function):
    """(2); backward, with h = 1/(1 + s n): ∂x = ∂Δ h² s (1 − s), ∂n = −Σ_c ∂Δ h² s²."""

    @staticmethod
    def forward(ctx, x, k):
        s = torch.sigmoid(x)
        h = torch.addcmul(torch.ones((), dtype=s.dtype, device=s.device), s, _dot(k, k)).reciprocal_()
        ctx.save_for_backward(s, h, k)
        return s * h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_delta):
        s, h, k = ctx.saved_tensors
        g = (d_delta * h).mul_(h).mul_(s)
        return torch.addcmul(g, g, s, value=-1), k * (-2 * _dot(g, s))


def implicit_step(x: Tensor, k: Tensor) -> Tensor:
    """Longhorn's step size, (2): x (…,D), k (…,N) -> Δ (…,D)."""
    return _ImplicitStep.apply(x, k)


def normalize_matrix(
    X: Tensor, *, norm: str = "newton_schulz", steps: int = 1, poly: str = "quintic", eps: float = 1e-6
) -> Tensor:
    """Each matrix (…,m,n): X ← X/√max(‖X‖²_F, ε²), then `steps` times X ← A X + (B G + C G²) X, G = X Xᵀ."""
    if norm == "none":
        return X
    X = X * torch.rsqrt(X.square().sum((-2, -1), keepdim=True).clamp(min=eps * eps))
    if norm == "frobenius":
        return X
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X  # the Gram matrix of the smaller side
    a, b, c = POLYNOMIALS[poly]
    for _ in range(steps):
        G = X @ X.mT
        X = a * X + (b * G + c * (G @ G)) @ X
    return X.mT if tall else X
