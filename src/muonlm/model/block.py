"""A block: one sequence mixer and one MLP on the residual stream, each behind a norm.

    x ← x + r_a · mixer(norm₁(x));   x ← x + r_m · mlp(norm₂(x))      r = 1/√(2·n_layer) where cfg.res_scale says so, else 1

`MIXERS` maps the letters of a pattern to constructors; every mixer has `forward(x, state, mask) -> (y, state)` and `init_state`.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig
from .attention import Attention
from .mlp import MLP
from .norm import make_norm

MIXERS = {
    "A": Attention,
    "W": lambda cfg: Attention(cfg, window=cfg.window),
}


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig, letter: str):
        super().__init__()
        self.norm1, self.mixer = make_norm(cfg), MIXERS[letter](cfg)
        self.norm2, self.mlp = make_norm(cfg), MLP(cfg)
        self.dropout = cfg.dropout
        scale = (2 * cfg.n_layer) ** -0.5
        self.mixer_scale = scale if cfg.res_scale in ("attn", "both") else 1.0
        self.mlp_scale = scale if cfg.res_scale == "both" else 1.0

    def forward(self, x: Tensor, state=None, mask: Tensor | None = None):
        y, state = self.mixer(self.norm1(x), state, mask)
        x = self._add(x, y, self.mixer_scale)
        return self._add(x, self.mlp(self.norm2(x)), self.mlp_scale), state

    def _add(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
        if self.dropout:
            y = F.dropout(y, self.dropout, self.training)
        return x + y if scale == 1.0 else x.add(y, alpha=scale)
