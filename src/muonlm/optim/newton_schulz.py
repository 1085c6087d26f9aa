"""Newton-Schulz iteration: an approximate polar factor by matrix products only.

    X_0 = U / (c0 * ||U||_F)                                   so that every singular value is <= 1
    R = X X^T ;  X <- a X + (b R + c R R) X                    once per triple (a, b, c)

Writing U = P S Q^T, the result is P f(S) Q^T, where f is the composition of s -> a s + b s^3 + c s^5: f(s) is close to 1
for every s that is not tiny, so the result is close to P Q^T, and it does not depend on the scale of U.

Shapes   G (..., A, B), leading dimensions are a batch; internally m x n with m = min(A, B), n = max(A, B), so that R is m x m
Scale    U is divided by its largest absolute entry and only then by its Frobenius norm, in fp32 (fp64 for fp64): squares
         neither underflow nor overflow. There is no floor such as 1e-7, so a tiny gradient is a direction like any other.
         An all-zero matrix gives exactly zero, without touching its neighbours in the batch; Inf or NaN gives NaN.
Cost     4 m^2 n + 2 m^3 flops per step and matrix (4 m^2 n for a cubic set)
Raises   ValueError for an unknown set, bad triples, bad step counts, tensors that are not floating or below 2-D
Source   keller: github.com/KellerJordan/Muon · you: Jiacheng You, as in Megatron and dion · polar_express: Amsel et al.,
         arXiv 2505.16932 (safety 2e-2, cushion 2) · cans: arXiv 2506.10935 · cubic: arXiv 2606.00371 ·
         deepseek: DeepSeek-V4 report · accurate12: modded-nanogpt, track 3 · classic: Taylor expansion of s -> sign(s)
"""

from difflib import get_close_matches
from itertools import chain, islice, repeat

import torch
from torch import Tensor

Triple = tuple[float, float, float]

COEFFICIENTS: dict[str, list[Triple]] = {
    "keller": [(3.4445, -4.7750, 2.0315)],
    "you": [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ],
    "polar_express": [
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ],
    "cans": [
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ],
    "cubic": [
        (3.3656577, -3.3420992, 0.0),
        (2.5744352, -1.4957376, 0.0),
        (2.5368962, -1.4312570, 0.0),
        (2.4418906, -1.2764040, 0.0),
        (2.2230472, -0.9630650, 0.0),
    ],
    "deepseek": [(3.4445, -4.7750, 2.0315)] * 8 + [(2.0, -1.5, 0.5)] * 2,
    "accurate12": [(2.0, -1.5, 0.5)] * 12,
    "classic_cubic": [(1.5, -0.5, 0.0)],
    "classic_quintic": [(1.875, -1.25, 0.375)],
}
"""Triples (a, b, c) per step. A set shorter than the number of steps repeats its last triple; a longer one is cut, except
the two below, whose last steps are the point of them."""

WHOLE = ("deepseek", "accurate12")
SAFETY = {"polar_express": 1.02}
"""c0 where it is not 1: Polar Express was fitted for singular values up to 1/1.02 of its interval, leaving room for rounding."""


def triples(coefficients: str | list[Triple], steps: int) -> list[Triple]:
    """The (a, b, c) of each of `steps` iterations for a named set or a list of triples."""
    if not isinstance(steps, int) or not 1 <= steps <= 99:
        raise ValueError(f"ns_steps={steps!r} is not a whole number from 1 to 99; 5 is usual")
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            near = get_close_matches(coefficients, COEFFICIENTS, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"unknown coefficients {coefficients!r}: did you mean {near!r}? Known: {', '.join(COEFFICIENTS)}"
            )
        given = COEFFICIENTS[coefficients]
        if coefficients in WHOLE and steps < len(given):
            raise ValueError(f"coefficients={coefficients!r} is a schedule of {len(given)} steps, found ns_steps={steps}; "
                             f"use ns_steps={len(given)}")  # fmt: skip
    else:
        given = [tuple(t) for t in coefficients]
        if not given or any(len(t) != 3 for t in given):
            raise ValueError(
                f"coefficients must be a name or a non-empty list of triples (a, b, c), found {coefficients!r}"
            )
    return list(islice(chain(given, repeat(given[-1])), steps))


def normalise(X: Tensor, c0: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    """X / (c0 ||X||_F) per matrix of an fp32 or fp64 batch (N, m, n), in `dtype`. X itself is overwritten."""
    assert X.ndim == 3 and X.is_contiguous() and X.dtype in (torch.float32, torch.float64)
    flat = X.flatten(1)  # one long row per matrix: these reductions are vectorised, those over two dimensions are not
    largest = torch.maximum(flat.amax(1, keepdim=True), -flat.amin(1, keepdim=True))
    flat.div_(largest.masked_fill_(largest == 0, 1.0))  # a division: 1 / largest would overflow for subnormal entries
    norm = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    norm = norm.masked_fill_(norm == 0, 1.0).mul_(c0).unsqueeze(-1)
    return X.div_(norm) if dtype in (None, X.dtype) else torch.div(X, norm, out=torch.empty_like(X, dtype=dtype))


def iterate(X: Tensor, steps: list[Triple]) -> Tensor:
    """Apply the triples to wide (m <= n) normalised matrices, 2-D or 3-D, in X's dtype. X itself is overwritten."""
    assert X.ndim in (2, 3) and X.shape[-2] <= X.shape[-1]
    product, add_product = (torch.mm, torch.addmm) if X.ndim == 2 else (torch.bmm, torch.baddbmm)
    R, Y = (
        None,
        torch.empty_like(X),
    )  # two buffers for X and two for its polynomial: nothing is allocated inside the loop
    for a, b, c in steps:
        R = product(X, X.mT) if R is None else product(X, X.mT, out=R)
        if c == 0.0:
            add_product(X, R, X, beta=a, alpha=b, out=Y)
        else:
            add_product(X, add_product(R, R, R, beta=b, alpha=c), X, beta=a, out=Y)
        X, Y = Y, X
    return X


@torch.no_grad()
def newton_schulz(
    G: Tensor, steps: int = 5, coefficients: str | list[Triple] = "polar_express", dtype: torch.dtype | None = None
) -> Tensor:
    """Approximate polar factor of every matrix of G (..., A, B), in G's dtype; `dtype` is that of the iteration."""
    if G.ndim < 2 or not G.is_floating_point():
        raise ValueError(
            f"newton_schulz needs a floating-point tensor (..., A, B), found {G.dtype} of shape {tuple(G.shape)}"
        )
    schedule = triples(coefficients, steps)
    c0 = SAFETY.get(coefficients, 1.0) if isinstance(coefficients, str) else 1.0
    tall = G.shape[-2] > G.shape[-1]
    X = G.mT if tall else G
    X = X.to(torch.promote_types(G.dtype, torch.float32), memory_format=torch.contiguous_format, copy=True)
    X = iterate(normalise(X.view(-1, *X.shape[-2:]), c0, dtype or G.dtype), schedule).view(X.shape)
    return (X.mT if tall else X).to(G.dtype)
