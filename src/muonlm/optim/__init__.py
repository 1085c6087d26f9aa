"""Optimizers: Muon with its AdamW groups, the routing of tensors between them, schedules, and state keyed by parameter name.

    plan = route(model)                        who is trained by what, and why
    optimizer = build_optimizer(plan, lr=0.02, adamw_lr=3e-4, momentum_warmup="0.85:0.95:300")
    group["lr"] = group["base_lr"] * lr_scale(step, ...)         the loop does this for every group

`named_state` gives the whole optimizer state as tensors named by parameter ("blocks.0.attn.qkv.weight/momentum_buffer")
and a JSON-able `meta`; `load_named_state` puts it back bit for bit, whatever the order or grouping of the parameters is.
"""

from .build import build_optimizer, create_muon_optimizer
from .muon.muon import Muon
from .muon.newton_schulz import newton_schulz
from .rates import convert_lr
from .routing.route import RoutingPlan, assert_complete, route
from .schedule import lr_scale, momentum_at, parse_momentum_warmup
from .state import load_named_state, load_torch_state, named_state
from .watch.activity import ActivityCheck
from .watch.diagnostics import Diagnostics
from .watch.qk_clip import qk_clip

__all__ = [
    "ActivityCheck",
    "Diagnostics",
    "Muon",
    "RoutingPlan",
    "assert_complete",
    "build_optimizer",
    "convert_lr",
    "create_muon_optimizer",
    "load_named_state",
    "load_torch_state",
    "lr_scale",
    "momentum_at",
    "named_state",
    "newton_schulz",
    "parse_momentum_warmup",
    "qk_clip",
    "route",
]
