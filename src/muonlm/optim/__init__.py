"""Optimizers, the routing of tensors between them, schedules, and state keyed by parameter name.

    plan = route(model)                                          who is trained by what, and why
    optimizer = build_optimizer(plan, lr=0.02, adamw_lr=3e-4, momentum_warmup="0.85:0.95:300")
    group["lr"] = group["base_lr"] * lr_scale(step, ...)         the loop does this for every group

`named_state` gives the whole optimizer state as tensors named by parameter ("blocks.0.attn.qkv.weight/momentum_buffer")
and a JSON-able `meta`; `load_named_state` puts it back bit for bit, whatever the order or grouping of the
parameters is.

OPTIMIZERS is THE table of what can train a model. A new one is a file and a line. Names are loaded when they are first
asked for, so that reading the table does not wait for torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from muonlm.lazy import public


@dataclass(frozen=True)
class Entry:
    """What a name of the table stands for. "module:name" is text, loaded when it is needed; ".soap" is in this package.

    State      what is kept of a parameter between steps is AdamW's `exp_avg`, `exp_avg_sq` and `step`, unless the
               optimizer says otherwise: `state_layout`, `group_state` and `owners`, under "Asked" in state.py
    Gradients  are averaged over ranks when `step` is called, and weights are equal on all: an optimizer that computes
               the same on every rank may leave `process_group` alone. One that cannot refuses it with a UserError
    """

    build: str
    """(plan, *, lr, wd, decay, betas, eps, process_group, **keys of its section) -> torch.optim.Optimizer, over
    `plan.trained`. Every group has "name", "lr" and "base_lr", the peak that the schedule scales; "weight_decay" is
    what is shown as wd; "rule" is the name shown of who steps the group ("SOAP"), left out where that is AdamW."""
    section: str = ""
    """The section of a config that holds its own arguments: a field of `Config` with a class in config/schema.py. None
    of its keys may have the name of an argument of `build` above. Empty = none: [optim] is all."""
    watch: str = ".watch.watch:Watch"
    """What looks at it in the loop: a class of watch/watch.py, or a subclass of it elsewhere."""
    routed: Mapping[str, str] = field(default_factory=dict)
    """Keys of the section that are arguments of `route`, and by which name; `build` does not see them."""
    watched: tuple[str, ...] = ()
    """Keys of the section that are arguments of the watch; `build` does not see them."""
    rates: tuple[str, ...] = ()
    """Keys of the section that are learning rates: to be lowered with `lr` when a loss diverges."""
    baseline: bool = True
    """Whether a recipe's [baseline] speaks of it too: its `lr` is one of AdamW's kind, entry by entry of a weight."""
    exact: Mapping[str, str] = field(default_factory=dict)
    """What "auto" keys of the section become in a run in which no timing may decide anything."""


OPTIMIZERS = {
    "muon": Entry(
        ".muon.build:build",
        section="muon",
        watch=".watch.watch:MuonWatch",
        routed={"route": "overrides", "split_fused": "split_fused", "per_head": "per_head"},
        watched=("qk_clip", "clip_scope"),
        rates=("adamw_lr",),
        baseline=False,
        exact={"ns_dtype": "float32", "ns_method": "direct"},
    ),
    "adamw": Entry(".adamw:build"),
    "soap": Entry(".soap:build", section="soap"),
}

_HOME = {  # public name -> module that defines it
    "ActivityCheck": "watch.activity",
    "Diagnostics": "watch.diagnostics",
    "Muon": "muon.muon",
    "RoutingPlan": "routing.plan",
    "SOAP": "soap",
    "assert_complete": "routing.plan",
    "build_optimizer": "build",
    "build_watch": "build",
    "convert_lr": "rates",
    "create_muon_optimizer": "muon.build",
    "load_named_state": "state",
    "load_torch_state": "state",
    "lr_scale": "schedule",
    "momentum_at": "schedule",
    "named_state": "state",
    "newton_schulz": "muon.newton_schulz",
    "parse_momentum_warmup": "schedule",
    "plan_routes": "build",
    "qk_clip": "watch.qk_clip",
    "route": "routing.route",
}
__all__ = ["OPTIMIZERS", "Entry", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    return public(name, __name__, _HOME)
