"""Longhorn mixer (letter L) and MuonLonghorn (l): a step is the closed-form solution of an online regression.

    as mamba.py, but for the step size and the gate, which has no A:
    s = σ(W_dt t + b_dt)      Δ = s / (1 + s ‖k‖²)      f[n,c] = 1 − Δ[c] k[n]²                                     (1)

Δ ≤ min(1, 1/‖k‖²), so f lies in [0, 1] up to rounding. It may be as small as 0: nowhere is its logarithm taken
or divided by it. k and q are neither normalised nor activated.

Letters, shapes, state, dtypes as in mamba.py; plain Longhorn is MuonLonghorn with γ = 0, α = 1 and no norm, bit for bit
Cost     2dD + DW + D + D(R+2N) + RD + D + D + Dd parameters
Init     D = 1, b_dt = 0 (s near ½); with init = dt_small b_dt as in mamba.py, so s begins in about [0.001, 0.1]
Source   Liu 2024 (2407.14207); MuonSSM, 2606.30461
"""

import torch
from torch import Tensor, nn

from muonlm.config.schema import ModelConfig
from muonlm.scan import implicit_step

from ..norm import at_least_fp32
from .mamba import State, add_diagonal_parts, diagonal_forward, diagonal_state, diagonal_tags, draw_steps


class Longhorn(nn.Module):
    def __init__(self, cfg: ModelConfig, muon: bool):
        super().__init__()
        add_diagonal_parts(self, cfg, muon)
        self.dt_head = nn.Linear(cfg.step_rank, cfg.inner_width)

    @torch.no_grad()
    def init_special(self, cfg: ModelConfig) -> None:
        self.D.fill_(1.0)
        if cfg.init == "dt_small":
            draw_steps(self.dt_head.bias)
        else:
            self.dt_head.bias.zero_()

    def tags(self) -> dict[nn.Parameter, dict]:
        return diagonal_tags(self)

    def writers(self) -> list[nn.Linear]:
        return [self.out_proj]

    def init_state(self, batch: int, device=None, dtype=None) -> State:
        return diagonal_state(self, batch, device, dtype)

    def forward(self, x: Tensor, state: State | None = None, mask: Tensor | None = None) -> tuple[Tensor, State]:
        return diagonal_forward(self, self.dt_head, x, state, mask)

    def gate(self, T: Tensor, k: Tensor) -> tuple[str, Tensor]:
        """(1) of T (B,L,D), which has no bias yet, and k (B,L,N)."""
        return "longhorn", implicit_step(T + at_least_fp32(self.dt_head.bias), k)
