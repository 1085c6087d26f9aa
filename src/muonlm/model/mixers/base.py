"""What a mixer answers for (`Mixer`), and what the recurrent ones have in common (`Recurrent`, `Writes`).

    y, state = mixer(x, state, mask)

Shapes   x, y (B,L,d) · mask (B,L) bool, True = real token · state None = from the beginning

L > 1 trains or prefills, L = 1 decodes, by the same mathematics: any cut of a sequence gives the same outputs.
Nothing depends on a later token. A masked token is deleted: it leaves the state alone, its output is 0. A state is a
tuple of tensors, the batch first; after forward(x, state) only the returned one is valid.

What concerns one mixer alone is asked of its class with a ModelConfig (`check`, `twin`) or of the mixer itself, which
may be on meta.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from muonlm.config.schema import ModelConfig
from muonlm.scan import backends, gain, write_norm

State = tuple[Tensor, ...]


@dataclass(frozen=True)
class Twin:
    """The model of transformers whose layers hold the same parameters under the same names (export/hf.py)."""

    model_type: str
    config: str
    """Its configuration class, and its language model:"""
    model: str
    theirs: Callable[[ModelConfig], dict]
    """What its configuration needs beside the common settings."""
    ours: Callable[[Any], dict]
    """The same, as settings of ModelConfig, from a configuration of theirs."""
    demands: dict[str, list] = field(default_factory=dict)
    """Settings of theirs for which we have none -> the values that ours stand for."""
    needs: dict[str, Any] = field(default_factory=dict)
    """Settings of ours for which they have none -> the value that theirs stand for."""


class Mixer(nn.Module):
    look_back: int | None = None
    """Tokens that a continuation may look back on; None where the state has a constant size."""
    scan: str | None = None
    """The recurrence of muonlm.scan that it runs, if any."""
    write_gain: float | None = None
    """Muon forms: what a write is multiplied by, κα, where that is a constant."""
    twin: Twin | None = None
    """Of the plain form; export/hf.py."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.check(cfg)
        self.cfg = cfg

    @classmethod
    def check(cls, cfg: ModelConfig) -> None:
        """Raise UserError if the widths of cfg do not fit this mixer, in names of ModelConfig's fields."""

    def flops_between_tokens(self, length: int) -> float:
        """FLOPs a token, forward and backward, in rows of `length` tokens, beyond the 6 for each parameter."""
        raise NotImplementedError

    def residual_projections(self) -> list[nn.Linear]:
        """The matrices that write to the residual stream; init.py scales them by the depth."""
        raise NotImplementedError

    def init_special(self, cfg: ModelConfig) -> None:
        """Fill what init.py's schemes do not know: A_log, D, step biases."""

    def tags(self) -> dict[nn.Parameter, dict]:
        """For optim/routing: of each parameter concerned, what cannot be read from its shape and name."""
        return {}

    def init_state(self, batch: int, device=None, dtype=None) -> State:
        """The state before the first token, for activations of `dtype`."""
        raise NotImplementedError

    def forward(self, x: Tensor, state: State | None = None, mask: Tensor | None = None) -> tuple[Tensor, State]:
        raise NotImplementedError


class Writes:
    """What the Muon forms of all recurrent mixers change: velocity (γ), scale (α) and norm of a token's write."""

    def __init__(self, cfg: ModelConfig, muon: bool):
        self.gamma, self.alpha = (cfg.beta, cfg.alpha) if muon else (0.0, 1.0)
        self.normed, self.eps = muon and cfg.write_norm != "none", cfg.write_eps
        self.kappa = gain(cfg.write_norm, cfg.ns_poly, cfg.ns_steps) if self.normed else 1.0

    def __call__(self, e: Tensor, k: Tensor) -> Tensor:
        return write_norm(e, k, self.kappa, self.eps) if self.normed else e


class Recurrent(Mixer):
    """A short convolution `conv1d`, a scan over states S (and velocities M), and the projection `out_proj`.

    State    (conv, S (B, *state_shape)), and M of the same shape if γ > 0; S and M in fp32 beside narrower activations
    """

    conv1d: nn.Module
    out_proj: nn.Linear
    state_shape: tuple[int, ...]

    def __init__(self, cfg: ModelConfig, muon: bool):
        super().__init__(cfg)
        self.writes = Writes(cfg, muon)
        self.write_gain = self.writes.kappa * self.writes.alpha if muon else None

    @property
    def backend(self) -> str:
        """What cfg.scan asks of this mixer's scan: auto where only scans of other layers have that backend."""
        return self.cfg.scan if self.cfg.scan in backends(self.scan) else "auto"

    def residual_projections(self) -> list[nn.Linear]:
        return [self.out_proj]

    def init_state(self, batch: int, device=None, dtype=None) -> State:
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        S = torch.zeros(batch, *self.state_shape, device=device, dtype=wide)
        conv = self.conv1d.init_state(batch, device, dtype)
        return (conv, S, S.clone()) if self.writes.gamma else (conv, S)


def inner_width(cfg: ModelConfig) -> int:
    """D of Mamba, Longhorn and Mamba-2."""
    return cfg.expand * cfg.d_model


def head_scan_flops(heads: int, key: int, value: int, chunk: int) -> int:
    """FLOPs a token, forward and backward, of a scan with one gate a head, as matrix products over chunks."""
    return 3 * heads * (2 * chunk * (key + value) + 4 * key * value)


def draw_steps(bias: Tensor) -> None:
    """Fill b so that softplus(b) is log-uniform in [0.001, 0.1], at least 0.0001."""
    steps = torch.empty_like(bias).uniform_(math.log(1e-3), math.log(0.1)).exp().clamp(min=1e-4)
    bias.copy_(steps + torch.log(-torch.expm1(-steps)))
