"""What the table of optimizers is asked: who trains which tensor, the optimizer, and what watches it.

    plan = plan_routes("muon", model, per_head=True)     route(model) with the arguments of that optimizer
    optimizer = build_optimizer(plan, lr=0.02, adamw_lr=3e-4, cautious=True, variant="normuon")
    watch = build_watch("muon", optimizer, model, every=100, qk_clip=100.0)
    with watch.step(1):
        optimizer.step()

All three take every key of the optimizer's section and use their own.

Raises   UserError for an unknown name, and for values that the optimizer cannot use
"""

from difflib import get_close_matches
from typing import TYPE_CHECKING

import torch
from torch import nn

from muonlm.errors import UserError
from muonlm.lazy import load

from . import OPTIMIZERS, Entry
from .routing.plan import RoutingPlan
from .routing.route import route

if TYPE_CHECKING:
    from .watch.watch import Watch


SHARED = ("lr", "wd", "decay", "betas", "eps")  # what every optimizer is given, keys of [optim]


def entry_of(name: str) -> Entry:
    if name not in OPTIMIZERS:
        near = get_close_matches(str(name), OPTIMIZERS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(OPTIMIZERS)}"
        raise UserError(f"`name` = {name!r} is no optimizer: {hint}")
    return OPTIMIZERS[name]


def plan_routes(name: str, model: nn.Module, **own) -> RoutingPlan:
    """The routes of `model` under the optimizer's own settings of routing."""
    return route(model, **{argument: own[key] for key, argument in entry_of(name).routed.items() if key in own})


def build_optimizer(
    plan_or_model: RoutingPlan | nn.Module,
    *,
    name: str = "muon",
    lr: float,
    wd: float = 0.0,
    decay: str = "2d",
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    process_group=None,
    **own,
) -> torch.optim.Optimizer:
    """The optimizer `name` over the plan's tensors.

    lr, wd   of the matrices, or of everything where one rate is for all
    decay    where one rate is for all: "2d" decays matrices, embeddings and the head by `wd`; "all" decays every
             parameter
    own      the keys of the optimizer's section: of Muon see muon/build.py, of SOAP soap.py; torch's AdamW has none
    """
    entry = entry_of(name)
    plan = route(plan_or_model) if isinstance(plan_or_model, nn.Module) else plan_or_model
    own = {key: value for key, value in own.items() if key not in (*entry.routed, *entry.watched)}
    shared = {"lr": lr, "wd": wd, "decay": decay, "betas": tuple(betas), "eps": eps, "process_group": process_group}
    with as_user_errors():
        return load(entry.build, __package__)(plan, **shared, **own)


def build_watch(
    name: str, optimizer: torch.optim.Optimizer, model: nn.Module, *, every=0, spectra=0, advice=True, seed=0, **own
) -> "Watch":
    """What watches `optimizer` in a loop; see watch/watch.py.

    every    steps between measurements, where the optimizer can be measured; 0 = none
    spectra  steps between those of singular values; rounded up to a multiple of `every`
    advice   whether measurements are turned into lines of advice
    """
    entry = entry_of(name)
    own = {key: value for key, value in own.items() if key in entry.watched}
    with as_user_errors():
        return load(entry.watch, __package__)(
            name, optimizer, model, every=every, spectra=spectra, advice=advice, seed=seed, **own
        )


class as_user_errors:
    """A ValueError of torch or of our own optimizers is a UserError here: the values came from a recipe or a flag."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, ValueError) and not isinstance(error, UserError):
            raise UserError(str(error)) from None
