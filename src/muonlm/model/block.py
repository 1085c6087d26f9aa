"""A block: one sequence mixer and, unless cfg.mlp is none, one MLP on the residual stream, each behind a norm.

    x ← x + r_a · mixer(norm₁(x))        r = 1/√(2·n_layer) where cfg.res_scale says so, else 1
    x ← x + r_m · mlp(norm₂(x))

The pattern's letter is looked up in the table of mixers (mixers/__init__.py), and mixers/base.py says what each of
them answers for.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from muonlm.config.schema import ModelConfig

from .mixers import MIXERS
from .mlp import MLP
from .norm import make_norm
from .packing import Segments


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig, letter: str):
        super().__init__()
        self.norm1, self.mixer = make_norm(cfg), MIXERS[letter].build(cfg)
        self.norm2, self.mlp = (None, None) if cfg.mlp == "none" else (make_norm(cfg), MLP(cfg))
        self.dropout = cfg.dropout
        scale = (2 * cfg.n_layer) ** -0.5
        self.mixer_scale = scale if cfg.res_scale in ("attn", "both") else 1.0
        self.mlp_scale = scale if cfg.res_scale == "both" else 1.0

    def residual_projections(self) -> list[nn.Linear]:
        """The matrices that write to the residual stream."""
        return self.mixer.residual_projections() + ([] if self.mlp is None else [self.mlp.down])

    def flops_between_tokens(self, length: int) -> float:
        return self.mixer.flops_between_tokens(length)

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
