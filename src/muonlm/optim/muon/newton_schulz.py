"""Newton-Schulz iteration: an approximate polar factor by matrix products only.

    X_0 = U / c                                                so that every singular value is <= 1
    R = X X^T ;  X <- a X + (b R + c R R) X                    once per triple (a, b, c)

Writing U = P S Q^T, the result is P f(S) Q^T, where f is the composition of s -> a s + b s^3 + c s^5: f(s) is close to
1 for every s that is not tiny, so the result is close to P Q^T, and it does not depend on the scale of U.

Methods  direct   the lines above. 2-byte dtypes are safe: each step starts from X, so rounding does not pile up
         hybrid   direct, but the last two steps in Gram form: two products with X instead of four. Safe in bfloat16,
                  because the polynomials before them have lifted the small singular values and none follows to amplify
                  an error
         gram     R = X X^T, Q = I; per step Q <- Q (aI + Z), R <- R (aI + Z)^2 with Z = bR + cR^2; X <- QX and a new
                  start after two steps, then after every three. float32 or float16; in bfloat16 it overshoots 15-fold:
                  refused
         cayley   X <- 2t (I + t^2 X X^T)^(-1) X, t = l^(-1/2), l <- 2 sqrt(l) / (1 + l) from l = 1e-3:
                  s -> 2ts / (1 + t^2 s^2), by Cholesky, float32 or float64. Accurate; it takes no coefficients,
                  `steps` counts solves
Scale c  ||U||_F, times 1.02 for Polar Express, which was fitted with that margin. `polar_express4` measures its own
         first Gram matrix instead: c = 1.01 ||R R||_F^(1/4), the Schatten-8 norm of U, a bound of its spectral norm
         that is up to 5 times closer than ||U||_F and free, as R R is needed anyway. U is first multiplied by a power
         of two that brings its largest entry near 1, so squares neither underflow nor overflow. There is no floor such
         as 1e-7: a tiny gradient is a direction like any other. An all-zero matrix gives exactly zero, without touching
         its neighbours in the batch; Inf or NaN gives NaN
Shapes   G (..., A, B), leading dimensions are a batch. m = min(A, B), n = max(A, B): R is m x m; on the right if A > B
Cost     flops a matrix: direct 4 m^2 n + 2 m^3 a step; hybrid saves 4 m^2 n - 6 m^3, a gain for n > 1.5 m
Raises   ValueError for an unknown set or method, bad triples, bad step counts, a dtype the method cannot use, tensors
         that are not floating or below 2-D
Source   keller: github.com/KellerJordan/Muon · polar_express: Amsel et al., arXiv 2505.16932 (safety 2e-2, cushion 2) ·
         cans (float32 only): arXiv 2506.10935 · deepseek: DeepSeek-V4 report · Gram form: Dao's Gram Newton-Schulz ·
         polar_express4: ours, four quintics composed as in Polar Express for [0.004, 1] of the closer scale (safety
         1.01, cushion 0.024): f stays within 1 +- 0.14 there, and bfloat16 rounding cannot leave the next step's
         interval
"""

import math
from difflib import get_close_matches
from itertools import chain, islice, repeat
from typing import Any

import torch
from torch import Tensor

from . import fused, symmetric
from .choices import COEFFICIENTS, METHODS, SAFETY, WHOLE, Triple

SCHATTEN_MARGIN = 1.01  # for the rounding of R R to bfloat16
CAYLEY_FLOOR = 1e-3  # smallest singular value, relative to ||U||_F, that cayley lifts to 1 in five solves


def triples(coefficients: str | list[Triple], steps: int) -> list[Triple]:
    """The (a, b, c) of each of `steps` iterations for a named set or a list of triples."""
    if not isinstance(steps, int) or not 1 <= steps <= 99:
        raise ValueError(f"`ns_steps` = {steps!r} is not a whole number from 1 to 99; 5 is usual")
    given: list[Any]
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            near = get_close_matches(coefficients, COEFFICIENTS, n=1, cutoff=0.0)[0]
            known = ", ".join(COEFFICIENTS)
            raise ValueError(f"`coefficients` = {coefficients!r} is unknown: did you mean {near!r}? Known: {known}")
        given = COEFFICIENTS[coefficients]
        if coefficients in WHOLE and steps < len(given):
            raise ValueError(
                f"`coefficients` = {coefficients!r} is a schedule of {len(given)} steps, found {steps}; "
                f"use `ns_steps` {len(given)}"
            )
    else:
        given = [tuple(t) if isinstance(t, list | tuple) else () for t in coefficients]
        if not given or any(len(t) != 3 for t in given):
            raise ValueError(
                f"`coefficients` must be a name or a non-empty list of triples [(a, b, c), ...], found {coefficients!r}"
            )
    return list(islice(chain(given, repeat(given[-1])), steps))


def check_method(method: str, coefficients: str | list[Triple], dtype: torch.dtype | None = None) -> None:
    """ValueError if the method does not exist, or cannot go with these coefficients or in this dtype."""
    if method not in METHODS:
        near = get_close_matches(str(method), METHODS, n=1, cutoff=0.0)[0]
        known = ", ".join(METHODS)
        raise ValueError(f"`ns_method` = {method!r} is unknown: did you mean {near!r}? Known: auto, {known}")
    named = coefficients if isinstance(coefficients, str) else ""
    if named == "polar_express4" and method not in ("direct", "hybrid"):
        raise ValueError(
            f'`coefficients` = "{named}" choose their own scale; use `ns_method` "direct" or "hybrid", not {method!r}'
        )
    if dtype == torch.bfloat16 and method == "gram":
        raise ValueError(
            '`ns_method` = "gram" is not accurate in bfloat16 (singular values up to 15); use `ns_dtype` "float32" or '
            '"float16", or `ns_method` "hybrid"'
        )
    if dtype in (torch.bfloat16, torch.float16) and method == "cayley":
        raise ValueError('`ns_method` = "cayley" solves by Cholesky, which needs `ns_dtype` "float32" or "float64"')
    if dtype in (torch.bfloat16, torch.float16) and named == "cans":
        raise ValueError(
            f'`coefficients` = "{named}" have no margin for the rounding of 16 bits: flat spectra diverge, by '
            f'factors of 1e4 and more; use `ns_dtype` "float32", or "polar_express", which has one'
        )
    if dtype == torch.float16 and named == "polar_express4":
        raise ValueError(
            f'`coefficients` = "{named}" squares a Gram matrix before scaling it, beyond float16; use "bfloat16"'
        )


# -------------------------------------------------------------------------------------------------- pieces
# All work on batches X (N, A, B), `iterate` also on one matrix, and nothing is transposed in memory: for A > B the
# small Gram matrix is X^T X and multiplies from the right.


def _tall(X: Tensor) -> bool:
    return X.shape[-2] > X.shape[-1]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _gram(X: Tensor, out: Tensor | None = None) -> Tensor:
    A = X.mT if _tall(X) else X
    if symmetric.fits(A):
        return symmetric.symmetric(A, out=out)
    return (torch.mm if X.ndim == 2 else torch.bmm)(A, A.mT, out=out)


def _axpby(Y: Tensor, P: Tensor, Q: Tensor, beta: float, alpha: float = 1.0, out: Tensor | None = None) -> Tensor:
    """beta Y + alpha P Q."""
    return (torch.addmm if Y.ndim == 2 else torch.baddbmm)(Y, P, Q, beta=beta, alpha=alpha, out=out)


def _polynomial(R: Tensor, b: float, c: float) -> Tensor:
    """b R + c R R of a symmetric R."""
    if symmetric.fits(R):
        return symmetric.symmetric(R, R, b, c)
    return _axpby(R, R, R, beta=b, alpha=c)


def _times(P: Tensor, X: Tensor, beta: float, out: Tensor | None = None) -> Tensor:
    """beta X + P X, or beta X + X P for tall X."""
    return _axpby(X, *((X, P) if _tall(X) else (P, X)), beta=beta, out=out)


def power_of_two(X: Tensor) -> Tensor:
    """(N, 1, 1): per matrix a power of two that brings its largest entry near [0.5, 1); 1 for a zero matrix."""
    flat = X.flatten(1)  # one long row a matrix: these reductions are vectorised, those over two dimensions are not
    largest = torch.maximum(flat.amax(1), -flat.amin(1)).to(_wide(X.dtype))
    limit = math.frexp(torch.finfo(X.dtype).max)[1] - 3  # subnormals: as far up as the dtype goes
    return torch.ldexp(torch.ones_like(largest), -torch.frexp(largest).exponent.clamp(min=-limit))[:, None, None]


def normalise(X: Tensor, c0: float = 1.0, dtype: torch.dtype | None = None, norm: Tensor | None = None) -> Tensor:
    """X / (c0 ||X||_F) per matrix of a batch (N, A, B), no float16, in `dtype`. X itself is overwritten.

    norm   ||X||_F (N,) where fused.py has found it
    """
    assert X.ndim == 3 and X.is_contiguous() and X.dtype != torch.float16  # whose range is too small for any scale
    if norm is not None:
        return fused.divide(X, norm, c0).to(dtype or X.dtype)
    X.mul_(power_of_two(X))
    length = torch.linalg.vector_norm(X.flatten(1), dim=1, dtype=_wide(X.dtype))[:, None, None]
    return X.div_(length.masked_fill_(length == 0, 1.0).mul_(c0)).to(dtype or X.dtype)


def iterate(X: Tensor, steps: list[Triple]) -> Tensor:
    """Apply the triples to normalised matrices, 2-D or 3-D, in X's dtype. X itself is overwritten."""
    R, Y = None, torch.empty_like(X)  # buffers for X are made once, not in each step
    for a, b, c in steps:
        R = _gram(X, out=R)
        X, Y = _times(_polynomial(R, b, c), X, beta=a, out=Y), X
    return X


def _scaled_first_step(X: Tensor, step: Triple) -> Tensor:
    """The first triple applied to X / c, c = 1.01 ||R R||_F^(1/4), for X of any moderate scale. X is overwritten."""
    a, b, c = step
    R = _gram(X)
    RR = torch.bmm(R, R).to(_wide(X.dtype))
    bound = torch.linalg.vector_norm(RR.flatten(1), dim=1).sqrt_().sqrt_().mul_(SCHATTEN_MARGIN)[:, None, None]
    r = bound.masked_fill_(bound == 0, 1.0).reciprocal_()
    P = (R.to(RR.dtype).mul_(b * r**2)).add_(RR.mul_(c * r**4)).to(X.dtype)
    return _times(P, X, beta=a).mul_(r.to(X.dtype))


def _gram_form(X: Tensor, steps: list[Triple]) -> Tensor:
    """The triples applied to normalised X through polynomials of one Gram matrix: X <- (q I + Q) X at the end."""
    R, q, Q = _gram(X), 1.0, None
    for i, (a, b, c) in enumerate(steps):
        Z = _polynomial(R, b, c)
        Q = Z if Q is None else _axpby((a * Q).add_(Z, alpha=q), Q, Z, beta=1.0)
        q *= a
        if i + 1 < len(steps):
            Y = _axpby(R, R, Z, beta=a)
            R = _axpby(Y, Y, Z, beta=a)
    assert Q is not None  # there is a step
    return _times(Q, X, beta=q)


def _cayley(X: Tensor, solves: int) -> Tensor:
    floor, eye = CAYLEY_FLOOR, torch.eye(min(X.shape[-2:]), dtype=X.dtype, device=X.device)
    for _ in range(solves):
        t = floor**-0.5
        factor = torch.linalg.cholesky_ex(_gram(X).mul_(t * t).add_(eye)).L  # _ex: never waits for the device
        Y = torch.cholesky_solve(X.mT if _tall(X) else X, factor).mul_(2.0 * t)
        X = Y.mT.contiguous() if _tall(X) else Y
        floor = 2.0 * floor**0.5 / (1.0 + floor)
    return X


def orthogonalise(
    U: Tensor,
    coefficients: str | list[Triple],
    steps: int,
    method: str,
    dtype: torch.dtype,
    norm: Tensor | None = None,
) -> Tensor:
    """Approximate polar factors of a batch (N, A, B), no float16, as a batch in `dtype`. U itself is overwritten.

    norm   ||U||_F (N,) where fused.py has found it
    """
    with torch.autocast(U.device.type, enabled=False):  # a step inside autocast keeps the precision it chose
        return _orthogonalise(U, coefficients, steps, method, dtype, norm)


def _orthogonalise(
    U: Tensor, coefficients: str | list[Triple], steps: int, method: str, dtype: torch.dtype, norm: Tensor | None
) -> Tensor:
    if method == "cayley":
        return _cayley(normalise(U, 1.0, dtype, norm), steps)
    schedule = triples(coefficients, steps)
    if coefficients == "polar_express4":
        scaled = U.mul_(power_of_two(U)).to(dtype) if norm is None else normalise(U, 1.0, dtype, norm)
        X = _scaled_first_step(scaled, schedule.pop(0))
    else:
        X = normalise(U, SAFETY.get(coefficients, 1.0) if isinstance(coefficients, str) else 1.0, dtype, norm)
    if method == "gram":
        for section in sections(schedule):
            X = _gram_form(X, section)
        return X
    if method == "hybrid":
        return _gram_form(iterate(X, schedule[:-2]), schedule[-2:])
    return iterate(X, schedule)


def sections(schedule: list[Triple]) -> list[list[Triple]]:
    """Where the Gram form restarts from X: after two steps, as the first amplify errors, then after every three."""
    return [schedule[:2]] + [schedule[i : i + 3] for i in range(2, len(schedule), 3)]


@torch.no_grad()
def newton_schulz(
    G: Tensor,
    steps: int = 5,
    coefficients: str | list[Triple] = "polar_express",
    method: str = "direct",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Approximate polar factor of every matrix of G (..., A, B), in G's dtype; `dtype` is that of the iteration."""
    if G.ndim < 2 or not G.is_floating_point():
        raise ValueError(
            f"newton_schulz needs a floating-point tensor (..., A, B), found {G.dtype} of shape {tuple(G.shape)}"
        )
    dtype = dtype or G.dtype
    triples(coefficients, steps)
    check_method(method, coefficients, dtype)
    U = G.to(torch.promote_types(G.dtype, torch.float32), memory_format=torch.contiguous_format, copy=True)
    return orthogonalise(U.view(-1, *G.shape[-2:]), coefficients, steps, method, dtype).view(G.shape).to(G.dtype)
