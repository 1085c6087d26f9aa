"""Mamba mixer (letter M) and its Muon form (m): `Diagonal` with a step size and a gate that the token chooses.

    Δ = softplus(W_dt t + b_dt)   f = exp(Δ A), A = −exp(A_log)                                                     (1)

Letters, shapes, state, dtypes as in diagonal.py; A, A_log (D,N)
Cost     2dD + DW + D + D(R+2N) + RD + D + DN + D + Dd parameters
Init     A_log[c,n] = log n, D = 1, W_dt uniform ± R^−½, b_dt = softplus⁻¹ of steps log-uniform in [0.001, 0.1]
Source   Gu & Dao 2023 (2312.00752)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muonlm.config.schema import ModelConfig

from ..norm import at_least_fp32
from .base import Twin, draw_steps
from .diagonal import Diagonal


class Mamba(Diagonal):
    twin = Twin(
        "mamba",
        config="MambaConfig",
        model="MambaForCausalLM",
        theirs=lambda cfg: {"state_size": Diagonal.state_width(cfg), "time_step_rank": Diagonal.step_rank(cfg)},
        ours=lambda theirs: {"dt_rank": int(theirs.time_step_rank)},
    )

    def __init__(self, cfg: ModelConfig, muon: bool = False):
        super().__init__(cfg, muon)
        N, D = self.state_shape
        self.dt_proj = nn.Linear(self.sizes[0], D)
        self.A_log = nn.Parameter(torch.empty(D, N))

    @torch.no_grad()
    def init_special(self, cfg: ModelConfig) -> None:
        R, N, _ = self.sizes
        self.A_log.copy_(torch.arange(1, N + 1, device=self.A_log.device).log().expand_as(self.A_log))
        self.D.fill_(1.0)
        self.dt_proj.weight.uniform_(-(R**-0.5), R**-0.5)
        draw_steps(self.dt_proj.bias)

    @property
    def step_proj(self) -> nn.Linear:
        return self.dt_proj

    def gate(self, T: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """(1), which does not ask k."""
        A = -torch.exp(at_least_fp32(self.A_log))
        return F.softplus(T + at_least_fp32(self.dt_proj.bias)), A

    def next_state(self, gate: tuple, k: Tensor, S: Tensor, new: Tensor) -> Tensor:
        return torch.addcmul(new, torch.exp(gate[0] * gate[1].t()), S)
