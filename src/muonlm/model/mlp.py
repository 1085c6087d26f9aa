"""Channel mixer, applied to each token alone.

    swiglu   W_down (SiLU(W_gate x) ⊙ W_up x)      gate and up are one matrix (2F, D), gate rows first
    relu2    W_down max(0, W_up x)²
    gelu     W_down GELU(W_up x)                   exact (erf) GELU

Shapes   x (B,T,D) · W_up (F,D) · W_down (D,F), F = cfg.ff_width
Source   Shazeer 2020 (2002.05202); So 2021 (2109.08668)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muonlm.config.schema import ModelConfig

from .kernels import kernels_for


class SquaredReLU(torch.autograd.Function):
    """y = max(0, x)², dy/dx = 2·max(0, x). Autograd's own form keeps two tensors and takes three passes more."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        r = F.relu(x)
        ctx.save_for_backward(r)
        return r * r

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (r,) = ctx.saved_tensors
        return (grad * r).mul_(2)


class MLP(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.kind, self.width = cfg.mlp, cfg.ff_width
        self.up = nn.Linear(cfg.d_model, (2 if self.kind == "swiglu" else 1) * self.width, bias=cfg.bias)
        self.down = nn.Linear(self.width, cfg.d_model, bias=cfg.bias)

    def tags(self) -> dict[nn.Parameter, dict]:
        if self.kind != "swiglu":
            return {}
        return {self.up.weight: {"role": "matrix", "split": (0, [self.width, self.width])}}

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.kind == "swiglu" and (fast := kernels_for(x)):
            x = fast.swiglu(x)
        elif self.kind == "swiglu":
            gate, x = x.chunk(2, -1)
            x = F.silu(gate) * x
        elif self.kind == "relu2":
            x = SquaredReLU.apply(x)
        else:
            x = F.gelu(x)
        return self.down(x)
