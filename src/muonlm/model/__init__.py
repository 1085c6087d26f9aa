"""Models: a residual stream through blocks. Knows no file.

build_model(cfg, device, seed)    allocate and initialise once
check_model(cfg)                  refuse what cannot be built, before anything is allocated
count_parameters(cfg)             the true counts, without allocating
layer_parameters(cfg)             those of each block
describe_layers(cfg)              each block in words and numbers
train_flops_per_token(cfg)        what a step costs
scan_choice(cfg, device)          how the recurrences will be computed

KINDS and mixers.MIXERS are the two tables of the room. They are read without torch: the names above load it on first
use.
"""

from muonlm.lazy import public

# model.kind -> "module:Class". A class takes a ModelConfig and has `check(cfg)`, `init_weights()`, `blocks`, `schedule`
# (which block is applied, one after another) and `can_tie` (embedding and head).
KINDS = {"lm": ".lm:LM", "modular": ".grokking:ModularTransformer"}

_HOME = {
    "build_model": "init",
    "check_model": "init",
    "count_parameters": "counts",
    "layer_parameters": "counts",
    "describe_layers": "counts",
    "train_flops_per_token": "counts",
    "scan_choice": "counts",
}


def __getattr__(name: str):
    return public(name, __name__, _HOME)
