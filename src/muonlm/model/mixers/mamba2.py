"""Mamba-2 mixer (letter D) and its Muon form (d): one scalar gate a head, keys and queries shared by a group of heads.

    [z; x; k; q; dt] = W_in x_in          [u; k; q] = SiLU(conv([x; k; q]))          k, q: B, C of the Mamba papers
    s = softplus(dt + dt_bias)            lg = −s exp(A_log), a = exp(lg)
    w = s u, plain; or, with write_norm, κ s u / (‖s u‖ ‖k‖) head by head (scan/writes.py)
    M_t = γ M_{t−1} + α k_t w_tᵀ          S_t = a_t S_{t−1} + M_t                    plain: γ = 0, α = 1
    y = W_out (RMSNorm((S_tᵀ q_t + D u) ⊙ SiLU(z)) ⊙ gain)                           statistics over a group's channels

Letters  B batch, L time, d model width, D inner width, H = D/P heads of value width P, G groups, N state width, W taps
Shapes   x_in, y (B,L,d) · u, w (B,L,H,P) · k, q (B,L,G,N) · lg (B,L,H) · mask (B,L) bool, True = real token
State    (conv (B,W−1,D+2GN), S (B,H,N,P)), and M (B,H,N,P) if γ > 0. Masked tokens are deleted; their outputs are 0.
Dtypes   everything between the convolution and W_out is fp32 (fp64 stays), also under autocast; so are S and M. But on
         a GPU w is handed over in bf16 if activations are: the scan's kernels then take bf16 factors of products.
Cost     d(2D+2GN+H) + (W+1)(D+2GN) + 3H + D + Dd parameters
Init     A_log = log of uniform(1, 16), D = 1, dt_bias = softplus⁻¹ of steps log-uniform in [0.001, 0.1]
Source   Dao & Gu 2024 (2405.21060). The Muon form is ours: MuonSSM (2606.30461) has no Mamba-2
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muonlm.config.schema import ModelConfig
from muonlm.errors import UserError
from muonlm.scan import scalar_scan

from ..conv import ShortConv
from ..norm import RMSNorm, at_least_fp32
from ..packing import compact
from .base import ConvRecurrent, State, Twin, draw_steps, head_scan_flops, inner_width

NORM_EPS = 1e-5  # as in the released models


def widths(cfg: ModelConfig) -> tuple[int, int, int, int]:
    """(D, P, G, N)."""
    return inner_width(cfg), cfg.ssm_head, cfg.ssm_groups, cfg.d_state or 128


class Mamba2(ConvRecurrent):
    scan = "scalar_scan"
    twin = Twin(
        "mamba2",
        config="Mamba2Config",
        model="Mamba2ForCausalLM",
        theirs=lambda cfg: {
            "state_size": widths(cfg)[3],
            "head_dim": cfg.ssm_head,
            "num_heads": widths(cfg)[0] // cfg.ssm_head,
            "n_groups": cfg.ssm_groups,
        },
        ours=lambda theirs: {"ssm_head": theirs.head_dim, "ssm_groups": theirs.n_groups},
        demands={"time_step_limit": [(0.0, float("inf"))], "layer_norm_epsilon": [NORM_EPS]},
        needs={"norm_eps": NORM_EPS},  # theirs has one epsilon for all norms
    )

    def __init__(self, cfg: ModelConfig, muon: bool = False):
        super().__init__(cfg, muon)
        D, P, G, N = widths(cfg)
        self.head_shape, self.key_shape = (D // P, P), (G, N)
        self.state_shape = (D // P, N, P)
        self.sizes = [D, D, G * N, G * N, D // P]  # rows of in_proj: z, x, k, q, dt
        self.in_proj = nn.Linear(cfg.d_model, sum(self.sizes), bias=cfg.bias)
        self.conv1d = ShortConv(D + 2 * G * N, cfg.d_conv, bias=True)
        self.dt_bias = nn.Parameter(torch.empty(D // P))
        self.A_log = nn.Parameter(torch.empty(D // P))
        self.D = nn.Parameter(torch.empty(D // P))
        self.norm = RMSNorm(D, eps=NORM_EPS)
        self.out_proj = nn.Linear(D, cfg.d_model, bias=cfg.bias)

    @classmethod
    def check(cls, cfg: ModelConfig) -> None:
        D, P, G, _ = widths(cfg)
        if D % P:
            raise UserError(
                f"`ssm_head` = {P} does not divide the inner width {D} (`expand` × `d_model`); "
                f"use `ssm_head` {math.gcd(P, D)}"
            )
        if D // P % G:
            raise UserError(f"`ssm_groups` = {G} does not divide the {D // P} heads of mamba2; use `ssm_groups` 1")

    @torch.no_grad()
    def init_special(self, cfg: ModelConfig) -> None:
        self.A_log.uniform_(1, 16).log_()
        self.D.fill_(1.0)
        draw_steps(self.dt_bias)

    def tags(self) -> dict[nn.Parameter, dict]:
        return {self.in_proj.weight: {"role": "matrix", "split": (0, self.sizes)}}

    def flops_between_tokens(self, length: int) -> float:
        return head_scan_flops(*self.state_shape, self.chunk or 64)

    def forward(self, x: Tensor, state: State | None = None, mask: Tensor | None = None) -> tuple[Tensor, State]:
        x, lengths, undo = compact(x, mask)
        conv, S, M = (*(state or (None, None)), None)[:3]
        D, _, GN, _, H = self.sizes
        z, ukq, dt = self.in_proj(x).split([D, D + 2 * GN, H], -1)
        ukq, conv = self.conv1d(ukq, conv, lengths=lengths)
        u, k, q = at_least_fp32(F.silu(ukq)).split([D, GN, GN], -1)
        u, k, q = u.unflatten(-1, self.head_shape), k.unflatten(-1, self.key_shape), q.unflatten(-1, self.key_shape)
        with torch.autocast(x.device.type, enabled=False):
            s = F.softplus(at_least_fp32(dt) + at_least_fp32(self.dt_bias))
            lg = -s * torch.exp(at_least_fp32(self.A_log))
            w = self._normed(s.unsqueeze(-1) * u, k)
            if w.is_cuda and z.dtype == torch.bfloat16:
                w = w.bfloat16()  # elsewhere the scan is fp32 throughout, and this would be a loss for nothing
            y, S, M = scalar_scan(lg, w, k, q, S, M, **self.writes.momentum, **self.how(lengths))
            y = torch.addcmul(y, u, at_least_fp32(self.D)[:, None]).flatten(-2) * F.silu(z)
            y = self._norm(y)
        y = undo(self.out_proj(y.to(z.dtype)))
        return y, (conv, S) if M is None else (conv, S, M)

    def _normed(self, e: Tensor, k: Tensor) -> Tensor:
        """Each head's write with its group's key: e (B,L,H,P), k (B,L,G,N)."""
        if not self.writes.normed:
            return e
        return self.writes(e.unflatten(2, (k.shape[2], -1)), k.unsqueeze(3)).flatten(2, 3)

    def _norm(self, y: Tensor) -> Tensor:
        G = self.key_shape[0]
        if G == 1:
            return self.norm(y)
        return F.rms_norm(y.unflatten(-1, (G, -1)), (y.shape[-1] // G,), None, NORM_EPS).flatten(-2) * self.norm.weight
