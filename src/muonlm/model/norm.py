"""Normalisation over the last axis.

    RMSNorm(x)   = x / √(mean(x²) + eps) ⊙ gain         statistics in fp32 whatever x is; gain (D,) or absent
    LayerNorm(x) = torch's, with gain and optional shift

Source   Zhang & Sennrich 2019 (1910.07467); Ba 2016 (1607.06450)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muonlm.config.schema import ModelConfig


class RMSNorm(nn.Module):
    def __init__(self, width: int, *, eps: float, gain: bool = True):
        super().__init__()
        self.width, self.eps = width, eps
        self.weight = nn.Parameter(torch.ones(width)) if gain else None

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.width,), self.weight if self.weight is None else self.weight.to(x.dtype), self.eps)

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps}, gain={self.weight is not None}"


def make_norm(cfg: ModelConfig) -> nn.Module:
    if cfg.norm == "layernorm":
        return nn.LayerNorm(cfg.d_model, eps=cfg.norm_eps, bias=cfg.bias)
    return RMSNorm(cfg.d_model, eps=cfg.norm_eps, gain=cfg.norm == "rmsnorm")


def wide(dtype: torch.dtype | None = None) -> torch.dtype:
    """In what sums over tokens are kept beside activations of `dtype` (None: torch's default): at least fp32."""
    return torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)


def at_least_fp32(x: Tensor) -> Tensor:
    """bf16 → fp32 where sums and exponentials need it; fp64 stays (tests run the equations in fp64)."""
    return x.to(wide(x.dtype))
