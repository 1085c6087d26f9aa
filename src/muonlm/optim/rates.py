"""Learning rates translated between lr modes, with the weight decay that goes with them.

RMS of an update = lr s(A, B) / sqrt(max(A, B)), with s of muon/blocks.py; AdamW's own rate counts as match_rms_adamw.

    r = s_from(A, B) / s_to(A, B),   lr_new = lr r,   wd_new = wd / r         same update RMS, same shrinkage lr wd
    convert_lr(0.02, 0.05, (768, 768), "original", "match_rms_adamw")          # (0.003608..., 0.277128...)

nanochat alone decays by the shape-adjusted rate: give it wd * shape_factor("original", A, B).

Raises   UserError for rates that are not finite, shapes that are no matrix, unknown modes
"""

import math
from collections.abc import Sequence
from difflib import get_close_matches

from muonlm.errors import UserError

from .muon.blocks import shape_factor
from .muon.choices import LR_MODES

MODES = (*LR_MODES, "adamw")


def convert_lr(
    lr: float, wd: float, shape: Sequence[int], from_mode: str, to_mode: str, rms_target: float = 0.2
) -> tuple[float, float]:
    """(lr, wd) that move a tensor of `shape` in `to_mode` as (lr, wd) do in `from_mode`: same update RMS, same lr * wd.

    shape   (out, in) as nn.Linear stores it; of 3-D tensors the last two count, convolutions are flattened;
            for a tensor that is orthogonalised in blocks, the shape of the block
    modes   original, match_rms_adamw, spectral, none, adamw (lr and wd of AdamW itself)
    """
    for key, value in (("lr", lr), ("wd", wd)):
        if not (math.isfinite(value) and value >= 0.0):
            raise UserError(f"{key}={value} cannot be converted; use a finite number >= 0")
    if not (math.isfinite(rms_target) and rms_target > 0.0):
        raise UserError(f"rms_target={rms_target} is no update RMS; use a number > 0, e.g. 0.2")
    shape = tuple(shape)
    if len(shape) < 2 or any(not isinstance(n, int) or n < 1 for n in shape):
        raise UserError(f"shape {shape} is no matrix; give (rows, columns) as nn.Linear stores them, e.g. (768, 3072)")
    A, B = shape[-2:] if len(shape) <= 3 else (shape[0], math.prod(shape[1:]))
    s = {}
    for mode in (from_mode, to_mode):
        if mode not in MODES:
            near = get_close_matches(str(mode), MODES, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Choose one of: {', '.join(MODES)}."
            raise UserError(f"unknown lr mode {mode!r}. {hint}")
        s[mode] = shape_factor("match_rms_adamw" if mode == "adamw" else mode, A, B, rms_target)
    ratio = s[from_mode] / s[to_mode]
    return lr * ratio, wd / ratio
