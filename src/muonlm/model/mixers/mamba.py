"""Mamba mixer (letter M), its Muon form (m), and the path that Longhorn shares with it.

    [x; z] = W_in x_in            u = SiLU(conv(x))             [t; k; q] = W_x u         k, q: B, C of the Mamba papers
    Δ = softplus(W_dt t + b_dt)   f = exp(Δ A), A = −exp(A_log)                                                     (1)
    w = Δ ⊙ u, plain; or κ Δ⊙u / (‖Δ⊙u‖ ‖k‖) with write_norm, a normalised write (scan/writes.py)
    M_t = γ M_{t−1} + α k_t w_tᵀ   S_t = f_t ⊙ S_{t−1} + M_t     plain: γ = 0, α = 1
    y = W_out ((S_tᵀ q_t + D ⊙ u) ⊙ SiLU(z))

Letters  B batch, L time, d model width, D inner width, N state width, R rank of the step sizes, W taps
Shapes   x_in, y (B,L,d) · u, z, Δ, w (B,L,D) · t (B,L,R) · k, q (B,L,N) · A, A_log (D,N) · mask (B,L) bool
State    (conv (B,W−1,D), S (B,N,D)), and M (B,N,D) if γ > 0. Masked tokens are deleted; their outputs are 0.
Dtypes   from T = W_dt t on, everything up to y ⊙ SiLU(z) is fp32 (fp64 stays), also under autocast; so are S and M.
Cost     2dD + DW + D + D(R+2N) + RD + D + DN + D + Dd parameters; O(N D) a token
Init     A_log[c,n] = log n, D = 1, W_dt uniform ± R^−½, b_dt = softplus⁻¹ of steps log-uniform in [0.001, 0.1]
Source   Gu & Dao 2023 (2312.00752); velocity and normalised writes: MuonSSM, 2606.30461
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muonlm.config.schema import ModelConfig
from muonlm.scan import diag_scan, gain, write_norm

from ..conv import ShortConv
from ..norm import at_least_fp32
from ..packing import compact

State = tuple[Tensor, ...]


class Writes:
    """What the Muon forms of all recurrent mixers change: velocity (γ), scale (α) and norm of a token's write."""

    def __init__(self, cfg: ModelConfig, muon: bool):
        self.gamma, self.alpha = (cfg.beta, cfg.alpha) if muon else (0.0, 1.0)
        self.normed, self.eps = muon and cfg.write_norm != "none", cfg.write_eps
        self.kappa = gain(cfg.write_norm, cfg.ns_poly, cfg.ns_steps) if self.normed else 1.0

    def __call__(self, e: Tensor, k: Tensor) -> Tensor:
        return write_norm(e, k, self.kappa, self.eps) if self.normed else e


def draw_steps(bias: Tensor) -> None:
    """Fill b so that softplus(b) is log-uniform in [0.001, 0.1], at least 0.0001."""
    steps = torch.empty_like(bias).uniform_(math.log(1e-3), math.log(0.1)).exp().clamp(min=1e-4)
    bias.copy_(steps + torch.log(-torch.expm1(-steps)))


def recurrent_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """Of S and M beside activations of `dtype`: fp32, or fp64."""
    return torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)


class Mamba(nn.Module):
    def __init__(self, cfg: ModelConfig, muon: bool):
        super().__init__()
        add_diagonal_parts(self, cfg, muon)
        R, N, _ = self.sizes
        self.dt_proj = nn.Linear(R, cfg.inner_width)
        self.A_log = nn.Parameter(torch.empty(cfg.inner_width, N))

    @torch.no_grad()
    def init_special(self, cfg: ModelConfig) -> None:
        R, N, _ = self.sizes
        self.A_log.copy_(torch.arange(1, N + 1, device=self.A_log.device).log().expand_as(self.A_log))
        self.D.fill_(1.0)
        self.dt_proj.weight.uniform_(-(R**-0.5), R**-0.5)
        draw_steps(self.dt_proj.bias)

    def tags(self) -> dict[nn.Parameter, dict]:
        return diagonal_tags(self)

    def writers(self) -> list[nn.Linear]:
        return [self.out_proj]

    def init_state(self, batch: int, device=None, dtype=None) -> State:
        return diagonal_state(self, batch, device, dtype)

    def forward(self, x: Tensor, state: State | None = None, mask: Tensor | None = None) -> tuple[Tensor, State]:
        return diagonal_forward(self, self.dt_proj, x, state, mask)

    def gate(self, T: Tensor, k: Tensor) -> tuple[str, Tensor, Tensor]:
        """(1) of T (B,L,D), which has no bias yet."""
        A = -torch.exp(at_least_fp32(self.A_log))
        return "mamba", F.softplus(T + at_least_fp32(self.dt_proj.bias)), A


# ------------------------------------------------------------- what Mamba and Longhorn share: everything but the gate


def add_diagonal_parts(mixer: nn.Module, cfg: ModelConfig, muon: bool) -> None:
    d, D, N, R = cfg.d_model, cfg.inner_width, cfg.d_state or 16, cfg.step_rank
    mixer.sizes = [R, N, N]  # rows of x_proj: t, k, q
    mixer.writes = Writes(cfg, muon)
    mixer.write_gain = mixer.writes.kappa * mixer.writes.alpha
    mixer.backend, mixer.chunk = cfg.scan, cfg.scan_chunk or 64
    mixer.in_proj = nn.Linear(d, 2 * D, bias=cfg.bias)
    mixer.conv1d = ShortConv(D, cfg.d_conv, bias=True)
    mixer.x_proj = nn.Linear(D, R + 2 * N, bias=False)
    mixer.D = nn.Parameter(torch.empty(D))
    mixer.out_proj = nn.Linear(D, d, bias=cfg.bias)


def diagonal_tags(mixer: nn.Module) -> dict[nn.Parameter, dict]:
    inner = mixer.out_proj.in_features
    return {
        mixer.in_proj.weight: {"role": "matrix", "split": (0, [inner, inner])},
        mixer.x_proj.weight: {"role": "matrix", "split": (0, mixer.sizes)},
    }


def diagonal_state(mixer: nn.Module, batch: int, device, dtype) -> State:
    shape = (batch, mixer.sizes[1], mixer.out_proj.in_features)
    S = torch.zeros(shape, device=device, dtype=recurrent_dtype(dtype))
    conv = mixer.conv1d.init_state(batch, device, dtype)
    return (conv, S, S.clone()) if mixer.writes.gamma else (conv, S)


def diagonal_forward(mixer: nn.Module, head: nn.Linear, x: Tensor, state: State | None, mask: Tensor | None):
    x, lengths, undo = compact(x, mask)
    if x.shape[1] == 1 and lengths is None and state is not None and not torch.is_grad_enabled():
        if x.dtype == state[1].dtype == mixer.D.dtype and not torch.is_autocast_enabled(x.device.type):
            return diagonal_token(mixer, head, x, state)
    conv, S, M = (*(state or (None, None)), None)[:3]
    u, z = mixer.in_proj(x).chunk(2, -1)
    u, conv = mixer.conv1d(u, conv, lengths=lengths)
    u = F.silu(u)
    t, k, q = mixer.x_proj(u).split(mixer.sizes, -1)
    T = F.linear(t, head.weight)  # the bias is added in fp32
    with torch.autocast(x.device.type, enabled=False):
        T, k, q, v = (at_least_fp32(a) for a in (T, k, q, u))
        gate, writes = mixer.gate(T, k), mixer.writes
        y, S, M = diag_scan(
            gate, writes(gate[1] * v, k), k, q, S, M, gamma=writes.gamma, alpha=writes.alpha,
            lengths=lengths, backend=mixer.backend, chunk=mixer.chunk,
        )  # fmt: skip
        y = torch.addcmul(y, v, at_least_fp32(mixer.D)) * F.silu(z)
    y = undo(mixer.out_proj(y.to(z.dtype)))
    return y, (conv, S) if M is None else (conv, S, M)


def diagonal_token(mixer: nn.Module, head: nn.Linear, x: Tensor, state: State) -> tuple[Tensor, State]:
    """The same for one token of each row, without gradients or casts, in few calls: their number bounds decoding."""
    conv, S, M = (*state, None)[:3]
    u, z = F.linear(x, mixer.in_proj.weight, mixer.in_proj.bias).chunk(2, -1)
    u, conv = mixer.conv1d.step(u, conv)
    u = F.silu(u, inplace=True)
    t, k, q = F.linear(u, mixer.x_proj.weight).split(mixer.sizes, -1)
    gate, writes = mixer.gate(F.linear(t, head.weight), k), mixer.writes
    w, k = writes(gate[1] * u, k), k.mT  # k (B,N,1)
    new = k * w if writes.alpha == 1.0 else k * (writes.alpha * w)
    if M is not None:
        M = new = new.add_(M, alpha=writes.gamma)
    if gate[0] == "mamba":
        S = torch.addcmul(new, torch.exp(gate[1] * gate[2].t()), S)
    else:
        S = torch.addcmul(new + S, k.square() * gate[1], S, value=-1)
    y = torch.addcmul(torch.bmm(q, S), u, mixer.D).mul_(F.silu(z))
    return F.linear(y, mixer.out_proj.weight, mixer.out_proj.bias), (conv, S) if M is None else (conv, S, M)
