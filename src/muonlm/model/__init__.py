"""Models: a residual stream through blocks. Knows no file.

build_model(cfg, device, seed)    allocate and initialise once
count_parameters(cfg)             the true counts, without allocating
"""

import torch
from torch import nn

from ..config import ModelConfig
from .lm import LM
from .modular import ModularTransformer


def build_model(cfg: ModelConfig, device="cpu", seed: int = 0) -> nn.Module:
    """The model of a config with a derived vocab_size: shaped on meta, allocated, initialised once from `seed`.

    The weights do not depend on the device: they are drawn on the CPU. device="meta" gives shapes and routing tags only.
    """
    model = _on_meta(cfg)
    if torch.device(device).type != "meta":
        model.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.init_weights()
    tags = {name: p.muonlm for name, p in model.named_parameters() if hasattr(p, "muonlm")}
    model.to(device)
    for name, p in model.named_parameters():  # a move between devices makes new Parameters, without attributes
        if name in tags:
            p.muonlm = tags[name]
    return model


def _on_meta(cfg: ModelConfig) -> nn.Module:
    with torch.device("meta"):
        if cfg.kind == "lm":
            return LM(cfg)
        return ModularTransformer(
            cfg.vocab_size,
            length=cfg.block_size,
            d_model=cfg.d_model,
            n_layer=cfg.n_layer,
            n_head=cfg.n_head,
            d_ff=cfg.ff_width,
        )


def count_parameters(cfg: ModelConfig) -> dict[str, int]:
    """total (as configured), tied, untied, embedding (with head and positions), blocks; in parameters."""
    model = _on_meta(cfg)
    total = sum(p.numel() for p in model.parameters())
    table = cfg.vocab_size * cfg.d_model if cfg.kind == "lm" else 0  # the grokking model cannot tie
    tied = total if cfg.tie else total - table
    blocks = sum(p.numel() for p in model.blocks.parameters())
    return {"total": total, "tied": tied, "untied": tied + table, "blocks": blocks, "embedding": total - blocks}
