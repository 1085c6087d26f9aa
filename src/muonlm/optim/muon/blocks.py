"""A parameter as matrices: how it is cut into blocks, and by how much the update of each is scaled.

    s(A, B)   original: sqrt(max(1, A/B)) · match_rms_adamw: rms_target sqrt(max(A, B)) · spectral: sqrt(A/B) ·
              none: 1 · or a function of (A, B)

Shapes   2-D: one matrix · 3-D (E, A, B): E matrices · 4-D and above: flattened to (out, -1). A split (None, or a dict
         with one of "split": (dim, [sizes]), "heads": (dim, n), "flatten": True) cuts further; see muon.py
Raises   ValueError for an unknown lr_mode
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .choices import LR_MODES

FIXED = ("adamuon", "hyperball")  # variants whose update has a given size, whatever O is


def shape_factor(lr_mode: str | Callable[[int, int], float], A: int, B: int, rms_target: float = 0.2) -> float:
    """s(A, B) of the module docstring, for a block of A rows (fan out) and B columns (fan in)."""
    match lr_mode:
        case "original":
            return math.sqrt(max(1.0, A / B))
        case "match_rms_adamw":
            return rms_target * math.sqrt(max(A, B))
        case "spectral":
            return math.sqrt(A / B)
        case "none":
            return 1.0
    if callable(lr_mode):
        return float(lr_mode(A, B))
    raise ValueError(f"`lr_mode` = {lr_mode!r} is unknown: use one of {', '.join(LR_MODES)}")


def predicted_rms(group: dict, lr: float, factor: float, n: int, weight_rms: float) -> float:
    """RMS of one update, before decay, of a block with the longer side n, if O is an exact polar factor."""
    if group["variant"] == "adamuon":
        return lr * group["rms_target"]
    if group["variant"] == "hyperball":
        return lr * weight_rms
    return lr * factor / math.sqrt(n)


def blocks(t: Tensor, split: dict | None) -> list[Tensor]:
    """The matrices of a parameter (or of its gradient or momentum) as 2-D views, in a fixed order."""
    if not split and t.ndim == 2:
        return [t]
    split = split or {}
    if t.ndim > 3 or split.get("flatten"):
        return [t.flatten(1)]
    matrices = [t] if t.ndim == 2 else list(t.unbind(0))
    if "split" in split:
        dim, sizes = split["split"]
    elif "heads" in split:
        dim, sizes = split["heads"][0], t.shape[split["heads"][0]] // split["heads"][1]
    else:
        return matrices
    return [block for matrix in matrices for block in matrix.split(sizes, dim - t.ndim)]


def adamw_blocks(split: dict | None, count: int) -> set[int]:
    """Which of a parameter's `count` blocks AdamW trains: the slices named by "adamw", in every matrix of a stack."""
    if not split or not split.get("adamw"):
        return set()
    aux, period = split["adamw"], len(split["split"][1])
    return {i for i in range(count) if i % period in aux}


def block_shapes(shape: torch.Size, split: dict | None) -> list[tuple[int, int]]:
    """(rows, columns) of the blocks that Newton-Schulz sees: all but the slices left to AdamW."""
    every = blocks(torch.empty(shape, device="meta"), split)
    aux = adamw_blocks(split, len(every))
    return [(b.shape[0], b.shape[1]) for i, b in enumerate(every) if i not in aux]
