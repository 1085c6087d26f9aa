"""A block: one sequence mixer and, unless cfg.mlp is none, one MLP on the residual stream, each behind a norm.

    x ← x + r_a · mixer(norm₁(x));   x ← x + r_m · mlp(norm₂(x))      r = 1/√(2·n_layer) where cfg.res_scale says so, else 1

`CONSTRUCTORS` maps the letters of a pattern to mixers. Every mixer has `forward(x, state, mask) -> (y, state)`, `init_state(batch)`,
`writers()`, the Linear layers that write to the residual stream, and where needed `tags()` and `init_special()` (LM.init_weights).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from muonlm.config.schema import ModelConfig

from .mixers.attention import Attention
from .mixers.gated_deltanet import GatedDeltaNet
from .mixers.longhorn import Longhorn
from .mixers.mamba import Mamba
from .mixers.mamba2 import Mamba2
from .mixers.recursion import MultiScaleAttention, StackedRecursion
from .mlp import MLP
from .norm import make_norm
from .packing import Segments

CONSTRUCTORS = {
    "A": Attention,
    "W": lambda cfg: Attention(cfg, window=cfg.window),
    "M": lambda cfg: Mamba(cfg, muon=False),
    "m": lambda cfg: Mamba(cfg, muon=True),
    "D": lambda cfg: Mamba2(cfg, muon=False),
    "d": lambda cfg: Mamba2(cfg, muon=True),
    "L": lambda cfg: Longhorn(cfg, muon=False),
    "l": lambda cfg: Longhorn(cfg, muon=True),
    "G": lambda cfg: GatedDeltaNet(cfg, form="plain"),
    "g": lambda cfg: GatedDeltaNet(cfg, form="muon"),
    "V": lambda cfg: GatedDeltaNet(cfg, form="velocity"),
    "S": MultiScaleAttention,
    "R": StackedRecursion,
}


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig, letter: str):
        super().__init__()
        self.norm1, self.mixer = make_norm(cfg), CONSTRUCTORS[letter](cfg)
        self.norm2, self.mlp = (None, None) if cfg.mlp == "none" else (make_norm(cfg), MLP(cfg))
        self.dropout = cfg.dropout
        scale = (2 * cfg.n_layer) ** -0.5
        self.mixer_scale = scale if cfg.res_scale in ("attn", "both") else 1.0
        self.mlp_scale = scale if cfg.res_scale == "both" else 1.0

    def writers(self) -> list[nn.Linear]:
        return self.mixer.writers() + ([] if self.mlp is None else [self.mlp.down])

    def forward(self, x: Tensor, state=None, mask: Tensor | None = None, rows: Segments | None = None):
        if rows is None:
            y, state = self.mixer(self.norm1(x), state, mask)
        else:  # several documents to a row: no state comes in, none goes out
            y = rows.apply(lambda part: self.mixer(part)[0], self.norm1(x))
        x = self._add(x, y, self.mixer_scale)
        return (x if self.mlp is None else self._add(x, self.mlp(self.norm2(x)), self.mlp_scale)), state

    def _add(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
        if self.dropout:
            y = F.dropout(y, self.dropout, self.training)
        return x + y if scale == 1.0 else x.add(y, alpha=scale)
