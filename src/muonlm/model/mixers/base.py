"""What a mixer answers for (`Mixer`), and what those have in common that run a scan (`Recurrent`, `ConvRecurrent`).

    y, state = mixer(x, state, mask)

Shapes   x, y (B,L,d) · mask (B,L) bool, True = real token · state None = from the beginning

L > 1 trains or prefills, L = 1 decodes, by the same mathematics: any cut of a sequence gives the same outputs.
Nothing depends on a later token. A masked token is deleted: it leaves the state alone, its output is 0. A state is a
tuple of tensors, the batch first; after forward(x, state) only the returned one is valid. y has the dtype of the last
projection's output: that of x, or the autocast dtype.

    Mixer            attention, running means: whatever has no scan of muonlm.scan
    Recurrent        a scan over states S: its backend and chunk, and S as the whole state
    ConvRecurrent    with a short convolution before it, `out_proj` after it, and a Muon form
    Diagonal         (diagonal.py) a ConvRecurrent of diag_scan: a subclass adds step sizes and gate

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

from ..norm import wide

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
    """The recurrence of muonlm.scan that it runs, if any, by `backend`."""
    state_shape: tuple[int, ...] = ()
    """Of the state S of that scan, without the batch: (…, N, values)."""
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

    @property
    def backend(self) -> str:
        """What cfg.scan asks of this mixer's scan: auto where only scans of other layers have that backend."""
        return self.cfg.scan if self.scan and self.cfg.scan in backends(self.scan) else "auto"

    def flops_between_tokens(self, length: int) -> float:
        """FLOPs a token, forward and backward, in rows of `length` tokens, beyond the 6 for each parameter."""
        raise NotImplementedError

    def residual_projections(self) -> list[nn.Linear]:
        """The matrices that write to the residual stream; init.py scales them by the depth."""
        raise NotImplementedError

    def init_special(self, cfg: ModelConfig) -> None:
        """Fill what init.py's schemes do not know: A_log, D, step biases."""

    def tags(self) -> dict[nn.Parameter, dict]:
        """For optim/routing: of each parameter concerned, what cannot be read from its shape and name.

        role     "matrix" (Muon may train it), or "scalar" (AdamW does), such as a router or a filter
        split    (0, [rows of each part]): a fused matrix, each part orthogonalised by itself
        heads    (0, number of heads), for muon.per_head

        All keys: optim/routing/route.py, which refuses those that it does not know.
        """
        return {}

    def init_state(self, batch: int, device=None, dtype=None) -> State:
        """The state before the first token, for activations of `dtype`."""
        raise NotImplementedError

    def forward(self, x: Tensor, state: State | None = None, mask: Tensor | None = None) -> tuple[Tensor, State]:
        raise NotImplementedError


class Recurrent(Mixer):
    """A scan over states S (B, *state_shape), in at least fp32 beside narrower activations.

    A subclass names the scan, sets `state_shape`, and calls it with `**self.how(lengths)`, autocast off.
    """

    @property
    def chunk(self) -> int:
        return self.cfg.scan_chunk

    def how(self, lengths: Tensor | None) -> dict[str, Any]:
        """Options that every scan takes."""
        return {"lengths": lengths, "backend": self.backend, "chunk": self.chunk}

    def init_state(self, batch: int, device=None, dtype=None) -> State:
        return (torch.zeros(batch, *self.state_shape, device=device, dtype=wide(dtype)),)


class Writes:
    """What the Muon forms of all recurrent mixers change: velocity (γ), scale (α) and norm of a token's write."""

    def __init__(self, cfg: ModelConfig, muon: bool):
        self.gamma, self.alpha = (cfg.beta, cfg.alpha) if muon else (0.0, 1.0)
        self.normed, self.eps = muon and cfg.write_norm != "none", cfg.write_eps
        self.kappa = gain(cfg.write_norm, cfg.ns_poly, cfg.ns_steps) if self.normed else 1.0

    def __call__(self, e: Tensor, k: Tensor) -> Tensor:
        return write_norm(e, k, self.kappa, self.eps) if self.normed else e

    @property
    def momentum(self) -> dict[str, float]:
        """As options of a scan."""
        return {"gamma": self.gamma, "alpha": self.alpha}


class ConvRecurrent(Recurrent):
    """A short convolution `conv1d`, a scan over states S and, in the Muon form, velocities M, and `out_proj`.

    State    (conv, S), and M of S's shape and dtype if γ > 0
    """

    conv1d: nn.Module
    out_proj: nn.Linear

    def __init__(self, cfg: ModelConfig, muon: bool):
        super().__init__(cfg)
        self.writes = Writes(cfg, muon)
        self.write_gain = self.writes.kappa * self.writes.alpha if muon else None

    def residual_projections(self) -> list[nn.Linear]:
        return [self.out_proj]

    def init_state(self, batch: int, device=None, dtype=None) -> State:
        (S,) = super().init_state(batch, device, dtype)
        conv = self.conv1d.init_state(batch, device, dtype)
        return (conv, S, S.clone()) if self.writes.gamma else (conv, S)


def inner_width(cfg: ModelConfig) -> int:
    """D of Mamba, Longhorn and Mamba-2."""
    return cfg.expand * cfg.d_model


def diagonal_scan_flops(states: int, width: int) -> int:
    """FLOPs a token, forward and backward, of a scan with one gate a state entry: 35 for each entry.

    7 in a pass over the tokens: Δ A and its exponential, f S, k w, their sum, q S and its sum. The states are computed
    again in backward, 7, and the gradients of all of these products are counted as three passes, 21.
    """
    return 35 * states * width


def head_scan_flops(heads: int, key: int, value: int, chunk: int) -> int:
    """FLOPs a token, forward and backward, of a scan with one gate a head, as matrix products over chunks."""
    return 3 * heads * (2 * chunk * (key + value) + 4 * key * value)


def draw_steps(bias: Tensor) -> None:
    """Fill b so that softplus(b) is log-uniform in [0.001, 0.1], at least 0.0001."""
    steps = torch.empty_like(bias).uniform_(math.log(1e-3), math.log(0.1)).exp().clamp(min=1e-4)
    bias.copy_(steps + torch.log(-torch.expm1(-steps)))
