"""Muon's variants: what happens to the orthogonal factor O of a block (A x B) before it is applied.

    normuon    v <- b2 v + (1 - b2) mean(O * O)  over the shorter side      O' = O / (sqrt(v) + 1e-10)
               O <- O' ||O||_F / ||O'||_F                                   keeps the norm, so s(A, B) still applies
    adamuon    O = NS(sign(U));  v <- b2 v + (1 - b2) O * O                 O' = O / (sqrt(v) + 1e-10)
               O <- rms_target sqrt(A B) O' / ||O'||_F                      replaces s(A, B)
    hyperball  V = W - lr R O / ||O||_F;   W <- R V / ||V||_F               R = ||W_0||_F stays fixed; wd must be 0

State    normuon: v has max(A, B) entries a block · adamuon: as many as the block · hyperball: R, one number a block
A block of norm 0 has no sphere to stay on: groups.py refuses it
Source   NorMuon: arXiv 2510.05491, with the mean over the shorter side as in modded-nanogpt and nanochat (the paper
         takes rows); AdaMuon: arXiv 2507.11005; hyperball (MuonH): modded-nanogpt, track 3
"""

import torch
from torch import Tensor

EPS = 1e-10


def second_momentum_size(variant: str, A: int, B: int) -> int:
    """Entries of a block's state."""
    return 0 if variant == "muon" else {"normuon": max(A, B), "adamuon": A * B, "hyperball": 1}[variant]


def adapt(
    variant: str, O: Tensor, second: list[Tensor], beta2: float, rms_target: float, transposed: bool = False
) -> Tensor:
    """O (N, A, B) fp32 or fp64, overwritten, after normuon or adamuon; `second`: the blocks' flat states, updated.

    transposed   O is stored (in, out): of a square block the columns are its rows
    """
    N, A, B = O.shape
    rows = A > B or (A == B and not transposed)
    v = torch.stack(second)
    if variant == "normuon":
        v.lerp_(O.square().mean(2 if rows else 1), 1.0 - beta2)
        before = torch.linalg.vector_norm(O.flatten(1), dim=1)
        O.div_(v.sqrt().add_(EPS).view(N, A, 1) if rows else v.sqrt().add_(EPS).view(N, 1, B))
    else:
        v.lerp_(O.square().flatten(1), 1.0 - beta2)
        before = rms_target * (A * B) ** 0.5
        O.div_(v.sqrt().add_(EPS).view(N, A, B))
    torch._foreach_copy_(second, list(v.unbind(0)))
    after = torch.linalg.vector_norm(O.flatten(1), dim=1)
    return O.mul_((before / after.masked_fill(after == 0, 1.0))[:, None, None])


def stay_on_sphere(weights: list[Tensor], O: Tensor, radii: list[Tensor], lr: float | Tensor) -> None:
    """The hyperball step of every block; `radii` hold 0 before the first step."""
    for norm, radius in zip(torch._foreach_norm(weights), radii, strict=True):
        radius.copy_(torch.where(radius == 0.0, norm, radius))
    length = torch.linalg.vector_norm(O.flatten(1), dim=1)
    R = torch.cat(radii)
    O.mul_((R / length.masked_fill(length == 0, 1.0))[:, None, None])
    torch._foreach_sub_(weights, list(O.mul_(lr).unbind(0)))
    torch._foreach_mul_(weights, list((R / torch.stack(torch._foreach_norm(weights))).unbind(0)))
