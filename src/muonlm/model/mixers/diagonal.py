"""`Diagonal`: what Mamba and Longhorn and their Muon forms share, which is everything but the step size and the gate f.

    [x; z] = W_in x_in            u = SiLU(conv(x))             [t; k; q] = W_x u         k, q: B, C of the Mamba papers
    Δ, f = gate(W_dt t, k)                                      one gate for each state entry: mamba.py, longhorn.py
    w = Δ ⊙ u, plain; or κ Δ⊙u / (‖Δ⊙u‖ ‖k‖) with write_norm, a normalised write (scan/writes.py)
    M_t = γ M_{t−1} + α k_t w_tᵀ   S_t = f_t ⊙ S_{t−1} + M_t     plain: γ = 0, α = 1
    y = W_out ((S_tᵀ q_t + D ⊙ u) ⊙ SiLU(z))

Letters  B batch, L time, d model width, D inner width, N state width, R rank of the step sizes, W taps
Shapes   x_in, y (B,L,d) · u, z, Δ, w (B,L,D) · t (B,L,R) · k, q (B,L,N) · mask (B,L) bool
State    (conv (B,W−1,D), S (B,N,D)), and M (B,N,D) if γ > 0. Masked tokens are deleted; their outputs are 0.
Dtypes   from T = W_dt t on, everything up to y ⊙ SiLU(z) is fp32 (fp64 stays), also under autocast; so are S and M.
Cost     O(N D) a token
Source   velocity and normalised writes: MuonSSM, 2606.30461
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muonlm.config.schema import ModelConfig
from muonlm.scan import diag_scan

from ..conv import ShortConv
from ..norm import at_least_fp32
from ..packing import compact
from .base import ConvRecurrent, State, diagonal_scan_flops, inner_width

Gate = tuple[Tensor, ...]  # (Δ,) or (Δ, A), as diag_scan takes it


class Diagonal(ConvRecurrent):
    scan = "diag_scan"

    def __init__(self, cfg: ModelConfig, muon: bool = False):
        super().__init__(cfg, muon)
        d, D, N, R = cfg.d_model, inner_width(cfg), self.state_width(cfg), self.step_rank(cfg)
        self.sizes = [R, N, N]  # rows of x_proj: t, k, q
        self.state_shape = (N, D)
        self.in_proj = nn.Linear(d, 2 * D, bias=cfg.bias)
        self.conv1d = ShortConv(D, cfg.d_conv, bias=True)
        self.x_proj = nn.Linear(D, R + 2 * N, bias=False)
        self.D = nn.Parameter(torch.empty(D))
        self.out_proj = nn.Linear(D, d, bias=cfg.bias)

    @staticmethod
    def state_width(cfg: ModelConfig) -> int:
        return cfg.d_state or 16

    @staticmethod
    def step_rank(cfg: ModelConfig) -> int:
        return cfg.dt_rank or -(-cfg.d_model // 16)

    # --- what a subclass adds

    @property
    def step_proj(self) -> nn.Linear:
        """W_dt (D,R), with the bias of the step sizes."""
        raise NotImplementedError

    def gate(self, T: Tensor, k: Tensor) -> Gate:
        """Δ and f of T = W_dt t (B,L,D), which has no bias yet, and k (B,L,N)."""
        raise NotImplementedError

    def next_state(self, gate: Gate, k: Tensor, S: Tensor, new: Tensor) -> Tensor:
        """f ⊙ S + new of a single token without gradients, in few calls; k (B,N,1)."""
        raise NotImplementedError

    # --- what all share

    def tags(self) -> dict[nn.Parameter, dict]:
        inner = self.out_proj.in_features
        return {
            self.in_proj.weight: {"role": "matrix", "split": (0, [inner, inner])},
            self.x_proj.weight: {"role": "matrix", "split": (0, self.sizes)},
        }

    def flops_between_tokens(self, length: int) -> float:
        return diagonal_scan_flops(*self.state_shape)

    def forward(self, x: Tensor, state: State | None = None, mask: Tensor | None = None) -> tuple[Tensor, State]:
        x, lengths, undo = compact(x, mask)
        if x.shape[1] == 1 and lengths is None and state is not None and not torch.is_grad_enabled():
            if x.dtype == state[1].dtype == self.D.dtype and not torch.is_autocast_enabled(x.device.type):
                return self._token(x, state)
        conv, S, M = (*(state or (None, None)), None)[:3]
        u, z = self.in_proj(x).chunk(2, -1)
        u, conv = self.conv1d(u, conv, lengths=lengths)
        u = F.silu(u)
        t, k, q = self.x_proj(u).split(self.sizes, -1)
        T = F.linear(t, self.step_proj.weight)  # the bias is added in fp32
        with torch.autocast(x.device.type, enabled=False):
            T, k, q, v = (at_least_fp32(a) for a in (T, k, q, u))
            gate, writes = self.gate(T, k), self.writes
            w = writes(gate[0] * v, k)
            y, S, M = diag_scan(gate, w, k, q, S, M, **writes.momentum, **self.how(lengths))
            y = torch.addcmul(y, v, at_least_fp32(self.D)) * F.silu(z)
        y = undo(self.out_proj(y.to(z.dtype)))
        return y, (conv, S) if M is None else (conv, S, M)

    def _token(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token of each row, without gradients or casts, in few calls: their number bounds decoding."""
        conv, S, M = (*state, None)[:3]
        u, z = F.linear(x, self.in_proj.weight, self.in_proj.bias).chunk(2, -1)
        u, conv = self.conv1d.step(u, conv)
        u = F.silu(u, inplace=True)
        t, k, q = F.linear(u, self.x_proj.weight).split(self.sizes, -1)
        gate, writes = self.gate(F.linear(t, self.step_proj.weight), k), self.writes
        w, k = writes(gate[0] * u, k), k.mT  # k (B,N,1)
        new = k * w if writes.alpha == 1.0 else k * (writes.alpha * w)
        if M is not None:
            M = new = new.add_(M, alpha=writes.gamma)
        S = self.next_state(gate, k, S, new)
        y = torch.addcmul(torch.bmm(q, S), u, self.D).mul_(F.silu(z))
        return F.linear(y, self.out_proj.weight, self.out_proj.bias), (conv, S) if M is None else (conv, S, M)
