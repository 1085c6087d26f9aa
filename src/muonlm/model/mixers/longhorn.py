"""Longhorn mixer (letter L) and MuonLonghorn (l): `Diagonal` whose step solves an online regression in closed form.

    s = σ(W_dt t + b_dt)      Δ = s / (1 + s ‖k‖²)      f[n,c] = 1 − Δ[c] k[n]²                                     (1)

Δ ≤ min(1, 1/‖k‖²), so f lies in [0, 1] up to rounding. It may be as small as 0: nowhere is its logarithm taken
or divided by it. k and q are neither normalised nor activated.

Letters, shapes, state, dtypes as in diagonal.py; plain Longhorn is MuonLonghorn with γ = 0, α = 1 and no norm, bit
for bit
Cost     2dD + DW + D + D(R+2N) + RD + D + D + Dd parameters
Init     D = 1, b_dt = 0 (s near ½); with init = dt_small b_dt as in mamba.py, so s begins in about [0.001, 0.1]
Source   Liu 2024 (2407.14207); MuonSSM, 2606.30461
"""

import torch
from torch import Tensor, nn

from muonlm.config.schema import ModelConfig
from muonlm.scan import implicit_step

from ..norm import at_least_fp32
from .base import draw_steps
from .diagonal import Diagonal


class Longhorn(Diagonal):
    def __init__(self, cfg: ModelConfig, muon: bool = False):
        super().__init__(cfg, muon)
        self.dt_head = nn.Linear(self.sizes[0], self.state_shape[1])

    @torch.no_grad()
    def init_special(self, cfg: ModelConfig) -> None:
        self.D.fill_(1.0)
        if cfg.init == "dt_small":
            draw_steps(self.dt_head.bias)
        else:
            self.dt_head.bias.zero_()

    @property
    def step_proj(self) -> nn.Linear:
        return self.dt_head

    def gate(self, T: Tensor, k: Tensor) -> tuple[Tensor]:
        """(1)."""
        return (implicit_step(T + at_least_fp32(self.dt_head.bias), k),)

    def next_state(self, gate: tuple, k: Tensor, S: Tensor, new: Tensor) -> Tensor:
        return torch.addcmul(new + S, k.square() * gate[0], S, value=-1)
