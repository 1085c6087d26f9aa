"""Gated DeltaNet mixer (letter G), its Muon form (g), and the form with normalised velocity (V).

    [q; k; u] = SiLU(conv([W_q; W_k; W_v] x))        q, k ← x / √(‖x‖² + 1e-6) head by head;  q ← q / √N
    lg = −exp(A_log) softplus(W_a x + dt_bias), a = exp(lg)        b = σ(W_b x), or twice that with neg_eigval
    plain      S̃ = a_t S_{t−1};  e = b_t (u_t − S̃ᵀ k_t);  S_t = S̃ + k_t eᵀ     decay first, then the error left
    muon       M_t = γ M_{t−1} + α k_t w_tᵀ;  S_t = a_t (I − b_t k_t k_tᵀ) S_{t−1} + M_t; w = b u or κ b u / (‖b u‖ ‖k‖)
    velocity   M_t = γ M_{t−1} + α k_t eᵀ;  S_t = S̃ + NS(M_t): Newton–Schulz of each head's whole velocity
    y = W_o (RMSNorm(S_tᵀ q_t) ⊙ gain ⊙ SiLU(W_g x))          statistics and gain over a head's P values

In the muon form the write does not see S, so the recurrence is linear. A write norm takes b out of the write; b acts
in the erasure alone. γ = 0, α = 1 and no norm make it the plain form. The velocity form is nonlinear, a slow loop.

Letters  B batch, L time, d model width, H heads of key width N and value width P, W taps
Shapes   x, y (B,L,d) · u (B,L,H,P) · k, q (B,L,H,N) · lg, b (B,L,H) · mask (B,L) bool, True = real token
State    (conv (B,W−1,2HN+HP), S (B,H,N,P)), and M (B,H,N,P) if γ > 0. Masked tokens are deleted; their outputs are 0.
Dtypes   everything between the convolution and W_o is fp32 (fp64 stays), also under autocast; so are S and M. But on a
         GPU the plain form hands u over in bf16 if activations are: its kernels then take bf16 factors of products.
Cost     2d·HN + 2d·HP + HP·d + W(2HN+HP) + 2dH + P + 2H parameters
Init     A_log = log of uniform(0, 16), at least 0.0001; dt_bias = softplus⁻¹ of steps log-uniform in [0.001, 0.1]
Source   Yang 2024 (2412.06464); MuonSSM, 2606.30461
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muonlm.config.schema import ModelConfig
from muonlm.errors import UserError
from muonlm.scan import delta_momentum_scan, delta_scan, velocity_scan

from ..conv import ShortConv
from ..norm import RMSNorm, at_least_fp32
from ..packing import compact
from .base import ConvRecurrent, State, draw_steps, head_scan_flops

NORM_EPS, KEY_EPS = 1e-5, 1e-6


def head_widths(cfg: ModelConfig) -> tuple[int, int]:
    """(N, P): key and value width of a head."""
    key = cfg.delta_key or 3 * cfg.d_model // (4 * cfg.delta_heads)
    return key, cfg.delta_value or 2 * key


class GatedDeltaNet(ConvRecurrent):
    """muon: the second form of the equations above; with norm_velocity, too: the third."""

    def __init__(self, cfg: ModelConfig, muon: bool = False, norm_velocity: bool = False):
        super().__init__(cfg, muon)
        d, H, (N, P) = cfg.d_model, cfg.delta_heads, head_widths(cfg)
        self.muon, self.norm_velocity = muon, norm_velocity
        self.state_shape = (H, N, P)
        self.neg_eigval = cfg.neg_eigval
        if norm_velocity:
            self.write_gain = None  # it writes as it is and normalises a sum of writes, whose size no constant gives
        self.scan = "velocity_scan" if norm_velocity else "delta_momentum_scan" if muon else "delta_scan"
        self.velocity_norm = {"norm": cfg.write_norm, "steps": cfg.ns_steps, "poly": cfg.ns_poly, "eps": cfg.write_eps}
        self.q_proj, self.k_proj = (nn.Linear(d, H * N, bias=cfg.bias) for _ in range(2))
        self.v_proj, self.g_proj = (nn.Linear(d, H * P, bias=cfg.bias) for _ in range(2))
        self.a_proj, self.b_proj = (nn.Linear(d, H, bias=False) for _ in range(2))
        self.conv1d = ShortConv(2 * H * N + H * P, cfg.d_conv)
        self.A_log = nn.Parameter(torch.empty(H))
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.norm = RMSNorm(P, eps=NORM_EPS)
        self.out_proj = nn.Linear(H * P, d, bias=cfg.bias)

    @classmethod
    def check(cls, cfg: ModelConfig) -> None:
        if not head_widths(cfg)[0]:
            raise UserError(
                f"`d_model` = {cfg.d_model} is too narrow for `delta_heads` = {cfg.delta_heads}; "
                f"use `delta_heads` {max(1, cfg.d_model // 32)}, or set `delta_key`"
            )

    @torch.no_grad()
    def init_special(self, cfg: ModelConfig) -> None:
        self.A_log.uniform_(0, 16).clamp_(min=1e-4).log_()
        draw_steps(self.dt_bias)

    def tags(self) -> dict[nn.Parameter, dict]:
        wide = (self.q_proj, self.k_proj, self.v_proj, self.g_proj)
        return {part.weight: {"role": "matrix", "heads": (0, self.state_shape[0])} for part in wide}

    def flops_between_tokens(self, length: int) -> float:
        (H, N, P), C = self.state_shape, self.chunk or 64
        return head_scan_flops(H, N, P, C) + 3 * H * C * (3 * N + P)  # and a triangular system in each chunk

    def forward(self, x: Tensor, state: State | None = None, mask: Tensor | None = None) -> tuple[Tensor, State]:
        x, lengths, undo = compact(x, mask)
        conv, S, M = (*(state or (None, None)), None)[:3]
        H, N, P = self.state_shape
        qku, conv = self.conv1d(torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1), conv, lengths=lengths)
        a, b, g = self.a_proj(x), self.b_proj(x), self.g_proj(x)
        with torch.autocast(x.device.type, enabled=False):
            q, k, u = at_least_fp32(F.silu(qku)).split([H * N, H * N, H * P], -1)
            q, k, u = q.unflatten(-1, (H, N)), k.unflatten(-1, (H, N)), u.unflatten(-1, (H, P))
            q, k = unit(q) * N**-0.5, unit(k)
            lg = -torch.exp(at_least_fp32(self.A_log)) * F.softplus(at_least_fp32(a) + at_least_fp32(self.dt_bias))
            b = torch.sigmoid(at_least_fp32(b)) * (2 if self.neg_eigval else 1)
            if u.is_cuda and g.dtype == torch.bfloat16 and not self.muon:
                u = u.bfloat16()  # elsewhere the scan is fp32 throughout, and this would be a loss for nothing
            y, S, M = self._scan(lg, b, u, k, q, S, M, lengths)
            y = (self.norm(y) * F.silu(g).unflatten(-1, (H, P))).flatten(-2)
        y = undo(self.out_proj(y.to(g.dtype)))
        return y, (conv, S, M) if self.writes.gamma else (conv, S)

    def _scan(self, lg, b, u, k, q, S, M, lengths) -> tuple[Tensor, Tensor, Tensor | None]:
        how, momentum = self.how(lengths), self.writes.momentum
        if self.norm_velocity:
            return velocity_scan(lg, b, u, k, q, S, M, **self.velocity_norm, **momentum, **how)
        if not self.muon:
            return *delta_scan(lg, b, u, k, q, S, **how), None
        w = self.writes(b.unsqueeze(-1) * u, k)
        return delta_momentum_scan(lg, b, w, k, q, S, M, **momentum, **how)


def unit(x: Tensor) -> Tensor:
    """Of length one, and 0 at 0: the eps lies inside the root."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + KEY_EPS)
