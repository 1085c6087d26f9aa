"""Stacked recursion (letter R): a gate mixes the outputs of N sub-blocks, weighed by what the row was so far about.

    r_0 = m_0 = x;   r_j = r_{j−1} + F_j(r_{j−1});   m_j = W_m [m_{j−1}; r_j];   F(r) = W_down GELU(W_up LayerNorm(r))
    x̄_t = (1/t) Σ_{i≤t} x_i;   π_t = softmax(W_g x̄_t) over N;   y_t = Σ_j π_t[j] (r_j,t + m_j,t)

Each sub-block has weights of its own; W_m and W_g are shared. The gate sees the mean of the prefix; the mean of the
whole row would tell it what is still to come.

Letters  B batch, T time, D model width, N sub-blocks
Shapes   x, y (B,T,D) · mask (B,T) bool, True = real token; masked tokens are deleted and their outputs are 0
State    (Σ x (B,D) in fp32, tokens seen (B,) int64)
Cost     N·8D² + N·4D² FLOP a token
Source   the hybrid of infrabrew/mamba-recursive-model, rebuilt causally (its own pools, gate and labels see the future)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muonlm.config.schema import ModelConfig

from ..norm import at_least_fp32, wide
from .base import Mixer


class StackedRecursion(Mixer):
    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        d, steps = cfg.d_model, range(cfg.recursion_depth)
        self.norms = nn.ModuleList(nn.LayerNorm(d, eps=cfg.norm_eps, bias=cfg.bias) for _ in steps)
        self.ups = nn.ModuleList(nn.Linear(d, 2 * d, bias=cfg.bias) for _ in steps)
        self.downs = nn.ModuleList(nn.Linear(2 * d, d, bias=cfg.bias) for _ in steps)
        self.memory = nn.Linear(2 * d, d, bias=cfg.bias)
        self.gate = nn.Linear(d, cfg.recursion_depth, bias=cfg.bias)

    def tags(self) -> dict[nn.Parameter, dict]:
        return {self.gate.weight: {"role": "scalar"}}  # a router: a few rows, one per depth

    def residual_projections(self) -> list[nn.Linear]:
        return [*self.downs, self.memory]

    def flops_between_tokens(self, length: int) -> float:
        d = self.gate.in_features
        return 12 * (len(self.downs) - 1) * d * d  # its memory matrix is applied once a sub-block

    def init_state(self, batch: int, device=None, dtype=None) -> tuple[Tensor, Tensor]:
        total = torch.zeros(batch, self.gate.in_features, device=device, dtype=wide(dtype))
        return total, torch.zeros(batch, dtype=torch.long, device=device)

    def forward(self, x: Tensor, state=None, mask: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        mean, state = self._prefix_mean(x, self.init_state(len(x), x.device, x.dtype) if state is None else state, mask)
        depth = at_least_fp32(self.gate(mean.to(x.dtype))).softmax(-1).to(x.dtype)  # (B,T,N)
        r = m = x
        y = torch.zeros_like(x)
        for j, (norm, up, down) in enumerate(zip(self.norms, self.ups, self.downs)):
            r = r + down(F.gelu(up(norm(r))))
            m = self.memory(torch.cat([m, r], -1))
            y = y + depth[..., j, None] * (r + m)
        return (y if mask is None else y * mask[..., None]), state

    def _prefix_mean(self, x: Tensor, state: tuple[Tensor, Tensor], mask: Tensor | None):
        """x̄ (B,T,D), in at least fp32, and the state after x."""
        total, count = state
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        sums = total[:, None] + (at_least_fp32(x) * real[..., None]).cumsum(1)
        counts = count[:, None] + real.long().cumsum(1)
        return sums / counts.clamp(min=1)[..., None], (sums[:, -1], counts[:, -1])
