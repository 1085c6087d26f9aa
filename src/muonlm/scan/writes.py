"""Normalisation of a token's write: the matrix k eᵀ, which has rank one.

A Newton–Schulz iteration on X/‖X‖_F with φ(s) = A s + B s³ + C s⁵ maps each singular value by φ and keeps the singular vectors.
X = k eᵀ has a single one, which starts at 1, so S iterations give exactly κ k eᵀ / (‖k‖ ‖e‖), κ = φ∘…∘φ(1): a rescaling.

    write_norm(e, k) = κ e / √max(m₂, ε²),   m₂ = (Σ_c e_c²)(Σ_n k_n²)                         (1)
    norm   none: e itself · frobenius: κ = 1 · newton_schulz: κ of (poly, steps); the cubic's κ is 1 for any steps
    newton_schulz(X): the explicit iteration on whole matrices, for gdn_velocity_ns (rank above one) and as the tests' oracle

Below the floor ε the map is linear, with no gradient through m₂: the clamp lies inside the root, so an all-zero token has finite
gradients. Everything in fp32 (fp64 stays).
Source   MuonSSM, arXiv 2606.30461, for the idea; the closed form is elementary
"""

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


def write_norm(e: Tensor, k: Tensor, kappa: float, eps: float) -> Tensor:
    """(1) over the last axes: e (…,P), k (…,N) -> w (…,P)."""
    m2 = e.square().sum(-1, keepdim=True) * k.square().sum(-1, keepdim=True)
    return e * (kappa * torch.rsqrt(m2.clamp(min=eps * eps)))


def newton_schulz(
    X: Tensor, *, norm: str = "newton_schulz", steps: int = 1, poly: str = "quintic", eps: float = 1e-6
) -> Tensor:
    """The explicit iteration of each matrix (…,m,n): X ← X/√max(‖X‖²_F, ε²), then `steps` times X ← A X + (B G + C G²) X, G = X Xᵀ."""
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
