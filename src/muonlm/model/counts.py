"""What the model of a config holds and costs. Asked of the model on meta, so nothing is allocated."""

import dataclasses

import torch
from torch import nn

from muonlm.config.schema import ModelConfig
from muonlm.errors import UserError
from muonlm.scan import choose_backend

from .init import on_meta
from .mixers import MIXERS
from .mixers.base import Mixer


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def count_parameters(cfg: ModelConfig) -> dict[str, int]:
    """Numbers of parameters.

    total (as configured), tied, untied, without_embeddings, embedding (with head and positions), blocks
    """
    model = on_meta(cfg)
    total, blocks = _size(model), _size(model.blocks)
    table = cfg.vocab_size * cfg.d_model if model.can_tie else 0
    tied = total if cfg.tie else total - table
    counts = {"total": total, "tied": tied, "untied": tied + table, "without_embeddings": tied - table}
    return counts | {"blocks": blocks, "embedding": total - blocks}


def layer_parameters(cfg: ModelConfig) -> list[int]:
    """Parameters of each block, in order."""
    return [_size(block) for block in on_meta(cfg).blocks]


def describe_layers(cfg: ModelConfig) -> list[dict]:
    """mixer (name) and parameters of each block; of a Muon form also write_gain, what it multiplies a write by."""
    layers = []
    for letter, block in zip(cfg.layers, on_meta(cfg).blocks):
        facts = {"mixer": MIXERS[letter].name, "parameters": _size(block)}
        gain = block.mixer.write_gain if hasattr(block, "mixer") else None
        layers.append(facts | ({} if gain is None else {"write_gain": gain}))
    return layers


def train_flops_per_token(cfg: ModelConfig) -> float:
    """Forward and backward: 6 for each parameter of a block each time that it is applied, and the work between tokens.

    The latter is what each block says: flops_between_tokens.
    """
    model = on_meta(cfg)
    blocks = [6 * _size(block) + block.flops_between_tokens(cfg.block_size) for block in model.blocks]
    return 6 * cfg.vocab_size * cfg.d_model + sum(blocks[i] for i in model.schedule)


def scan_choice(cfg: ModelConfig, device: torch.device) -> str:
    """Which backends run the recurrences; empty if there are none. Raises UserError if one cannot run on `device`.

    vocab_size may be 0: no mixer depends on it.
    """
    cfg = dataclasses.replace(cfg, vocab_size=cfg.vocab_size or 1)
    mixers = [module for module in on_meta(cfg).modules() if isinstance(module, Mixer) and module.scan]
    chosen = [choose_backend(m.scan, m.backend, device, torch.float32, *m.state_shape[-2:-1]) for m in mixers]
    if cfg.scan not in ("auto", "chunked", "reference", *chosen):
        raise UserError(f"`scan` = {cfg.scan} computes no layer of {cfg.pattern!r}; leave it out.")
    return ", ".join(dict.fromkeys(chosen))
