"""The scans at the sizes of training: what is timed, and what kernels are compiled for.

    longhorn, mamba      MuonLonghorn-97m: D 1344, N 16               (B,L) = 8 x 2048
    mamba2               Mamba-2 130M: 24 heads of 64, N 128, one group
    delta rule           Gated DeltaNet 170M: 9 heads, N 56, P 112
    … bf16               with values in bf16, as under autocast
    muon …               with momentum 0.9; velocity: the delta rule with a normalised velocity

All else in fp32, which is what the mixers hand over under autocast too.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

MUON = {"gamma": 0.9, "alpha": 1.0}
VELOCITY = MUON | {"norm": "newton_schulz", "steps": 1, "poly": "quintic", "eps": 1e-6}


@dataclass(frozen=True)
class Form:
    scan: str
    heads: int  # 0: diagonal gates, `values` channels
    groups: int
    keys: int
    values: int
    options: dict = field(default_factory=dict)
    dtype: torch.dtype = torch.float32  # of the values


FORMS = {
    "longhorn": Form("diag_scan", 0, 1, 16, 1344),
    "muon longhorn": Form("diag_scan", 0, 1, 16, 1344, MUON),
    "mamba": Form("diag_scan", 0, 1, 16, 1344),
    "muon mamba": Form("diag_scan", 0, 1, 16, 1344, MUON),
    "mamba2": Form("scalar_scan", 24, 1, 128, 64),
    "muon mamba2": Form("scalar_scan", 24, 1, 128, 64, MUON),
    "mamba2 bf16": Form("scalar_scan", 24, 1, 128, 64, dtype=torch.bfloat16),
    "muon mamba2 bf16": Form("scalar_scan", 24, 1, 128, 64, MUON, dtype=torch.bfloat16),
    "delta rule": Form("delta_scan", 9, 9, 56, 112),
    "delta rule bf16": Form("delta_scan", 9, 9, 56, 112, dtype=torch.bfloat16),
    "muon delta rule": Form("delta_momentum_scan", 9, 9, 56, 112, MUON),
    "velocity": Form("velocity_scan", 9, 9, 56, 112, VELOCITY),
}


def tensors(name: str, B: int, L: int, device: torch.device, *, toy: bool = False) -> dict[str, Tensor]:
    """Random inputs without initial states, as in training, that want gradients; on meta shapes alone."""
    form = FORMS[name]
    H, G, N, P = form.heads, form.groups, form.keys, form.values
    if toy:
        H, G, N, P = min(H, 1), 1, 16, 16

    def normal(*shape):
        return torch.randn(*shape, device=device)

    if not H:
        k, s = normal(B, L, N), torch.rand(B, L, P, device=device)
        if "mamba" in name:
            every = {"delta": 0.1 * s, "A": -torch.arange(1.0, N + 1, device=device).expand(P, N).contiguous()}
        else:
            every = {"delta": s / (1 + s * k.square().sum(-1, keepdim=True))}
        every |= {"w": normal(B, L, P), "k": k, "q": normal(B, L, N)}
    else:
        every = {"lg": -0.1 * normal(B, L, H).abs()}
        if form.scan != "scalar_scan":
            every["b"] = torch.sigmoid(normal(B, L, H))
        every["u" if form.scan in ("delta_scan", "velocity_scan") else "w"] = normal(B, L, H, P).to(form.dtype)
        every |= {"k": F.normalize(normal(B, L, G, N), dim=-1), "q": normal(B, L, G, N) / math.sqrt(N)}
    return {key: x.requires_grad_() for key, x in every.items()}


def outputs(function, name: str, given: dict[str, Tensor], **how) -> list[Tensor]:
    """function: the scan, of the dispatcher or of a backend's module. -> y, S and, with momentum, M."""
    given = dict(given)
    if FORMS[name].scan == "diag_scan":
        given["gate"] = tuple(given.pop(key) for key in ("delta", "A") if key in given)
    return [x for x in function(**given, **FORMS[name].options, **how) if x is not None]


def must_move(given: dict[str, Tensor]) -> tuple[int, int]:
    """Bytes forward, and forward and backward: every input read once and y written; then every input and the gradient
    of y read once more and a gradient of each input written. Final states are nothing beside them."""
    inputs = sum(x.numel() * x.element_size() for x in given.values())
    y = next(4 * given[name].numel() for name in ("w", "u") if name in given)
    return inputs + y, inputs + y + 2 * inputs + y
