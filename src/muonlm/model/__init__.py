"""Models: a residual stream through blocks. Knows no file.

build_model(cfg, device, seed)    allocate and initialise once
count_parameters(cfg)             the true counts, without allocating
layer_parameters(cfg)             those of each block
train_flops_per_token(cfg)        what a step costs
"""

import torch
from torch import nn

from muonlm.config.schema import ModelConfig

from .grokking import ModularTransformer
from .lm import LM


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
    """total (as configured), tied, untied, without_embeddings, embedding (with head and positions), blocks; in parameters."""
    model = _on_meta(cfg)
    total = sum(p.numel() for p in model.parameters())
    table = cfg.vocab_size * cfg.d_model if cfg.kind == "lm" else 0  # the grokking model cannot tie
    tied = total if cfg.tie else total - table
    blocks = sum(p.numel() for p in model.blocks.parameters())
    counts = {"total": total, "tied": tied, "untied": tied + table, "without_embeddings": tied - table}
    return counts | {"blocks": blocks, "embedding": total - blocks}


def layer_parameters(cfg: ModelConfig) -> list[int]:
    """Parameters of each block, in order."""
    return [sum(p.numel() for p in block.parameters()) for block in _on_meta(cfg).blocks]


def train_flops_per_token(cfg: ModelConfig) -> float:
    """Forward and backward: 6 for each parameter of a matrix each time that it is applied, and the work between the tokens.

    Attention: 12·T·d for its two products over T keys (Kaplan 2020; PaLM appendix B). Diagonal scans: 35·N·D, recomputation included.
    Heads (SSD, delta rule) in chunks of C: 3·H·(2C(N + P) + 4NP), for the delta rule C(3N + P) more.
    """
    T, d, C = cfg.block_size, cfg.d_model, cfg.scan_chunk or 64
    key, value = cfg.delta_widths
    heads = cfg.inner_width // cfg.ssm_head
    ssd = lambda H, N, P: 3 * H * (2 * C * (N + P) + 4 * N * P)  # noqa: E731
    between = {
        "A": 12 * T * d,
        "W": 12 * min(T, cfg.window or T) * d,
        "S": sum(12 * T * d / s for s in cfg.attention_scales),
    }
    between |= dict.fromkeys("MmLl", 35 * (cfg.d_state or 16) * cfg.inner_width)
    between |= dict.fromkeys("Dd", ssd(heads, cfg.d_state or 128, cfg.ssm_head))
    between |= dict.fromkeys("GgV", ssd(cfg.delta_heads, key, value) + 3 * cfg.delta_heads * C * (3 * key + value))
    between["R"] = 12 * (cfg.recursion_depth - 1) * d * d  # its memory matrix is applied once a sub-block
    sizes, layers = layer_parameters(cfg), cfg.layers
    if cfg.kind != "lm":
        return 6 * (sum(sizes) + cfg.vocab_size * d) + 12 * cfg.n_layer * T * d
    return 6 * cfg.vocab_size * d + sum(6 * sizes[i] + between.get(layers[i], 0) for i in cfg.schedule)
