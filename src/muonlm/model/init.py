"""A model at step 0: shaped on meta, allocated, and filled once from a seed.

Schemes of a language model (cfg.init). R counts the residual branches, loops included; `residual projections` are the
matrices that write to the stream.

    gpt2       matrices N(0, .02), residual projections / √R (Radford 2019)
    zero_out   matrices N(0, 1/fan_in), E from N(0, 1) unless tied, residual projections and head 0 (muP-like;
               2203.03466 §D)
    lm         matrices U(±1/√fan_in), residual projections / √R
    dt_small   lm, with Longhorn's steps small (longhorn.py)
    stack      matrices N(0, .02), residual projections / √(2·applied blocks), convolutions N(0, 1/(D·W))

E is N(0, .02) where nothing else is said. Mixers fill what is theirs alone (A_log, D, step biases) afterwards:
init_special.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from muonlm.config.schema import ModelConfig
from muonlm.lazy import load

from . import KINDS
from .conv import ShortConv


def build_model(cfg: ModelConfig, device="cpu", seed: int = 0) -> nn.Module:
    """The model of a config with a derived vocab_size: shaped on meta, allocated, initialised once from `seed`.

    The weights do not depend on the device: they are drawn on the CPU. device="meta" gives shapes and routing tags
    only.

    Raises UserError for widths that do not fit, before anything is allocated.
    """
    model = on_meta(cfg)
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


def on_meta(cfg: ModelConfig) -> nn.Module:
    """The model of a config with a derived vocab_size, without memory or values."""
    with torch.device("meta"):
        return _kind(cfg)(cfg)


def check_model(cfg: ModelConfig) -> None:
    """Raise UserError, in names of ModelConfig's fields, for a model that cannot be built. vocab_size may be 0."""
    _kind(cfg).check(cfg)


def _kind(cfg: ModelConfig) -> type:
    return load(KINDS[cfg.kind], __package__)


class Scheme(NamedTuple):
    fill: Callable[[Tensor], Tensor]
    """Fills a matrix (out, in)."""
    residual: Callable[[int, int], float]
    """(residual branches, applied blocks) -> factor of the residual projections."""
    embedding: float = 0.02
    """Standard deviation of an embedding that is not the head, too."""
    conv: str = "default"
    """Of the mixers' convolutions: ShortConv.init_weights."""
    zero_head: bool = False


def _uniform(weight: Tensor) -> Tensor:
    bound = weight.shape[1] ** -0.5
    return weight.uniform_(-bound, bound)


def _per_branch(branches: int, applied: int) -> float:
    return branches**-0.5


SCHEMES = {
    "gpt2": Scheme(lambda w: w.normal_(0, 0.02), _per_branch),
    "zero_out": Scheme(lambda w: w.normal_(0, w.shape[1] ** -0.5), lambda *_: 0.0, embedding=1.0, zero_head=True),
    "lm": Scheme(_uniform, _per_branch),
    "dt_small": Scheme(_uniform, _per_branch),
    "stack": Scheme(lambda w: w.normal_(0, 0.02), lambda _, applied: (2 * applied) ** -0.5, conv="stack"),
}


@torch.no_grad()
def fill(model: nn.Module, cfg: ModelConfig) -> None:
    """Fill an LM but for `positions`, once, from torch's generator; set the tags that its modules know."""
    scheme = SCHEMES[cfg.init]
    for module in model.modules():
        if isinstance(module, nn.Linear):
            scheme.fill(module.weight)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(0, 0.02 if cfg.tie else scheme.embedding)
        elif isinstance(module, ShortConv):
            module.init_weights("identity" if module is model.conv else scheme.conv)
        elif getattr(module, "weight", None) is not None:  # norms
            module.weight.fill_(1.0)
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()
    applied = len(cfg.schedule)
    factor = scheme.residual(applied * (1 if cfg.mlp == "none" else 2), applied)
    for block in model.blocks:
        for projection in block.residual_projections():
            projection.weight.mul_(factor)
    for module in model.modules():
        if hasattr(module, "init_special"):
            module.init_special(cfg)
        if hasattr(module, "tags"):
            for parameter, tag in module.tags().items():
                parameter.muonlm = tag
    if model.head is not None and scheme.zero_head:
        model.head.weight.zero_()
