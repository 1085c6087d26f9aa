"""Optimizers: Muon with its AdamW groups, the routing of tensors between them, schedules, and state keyed by parameter name.

    plan = route(model)                        who is trained by what, and why
    optimizer = build_optimizer(plan, lr=0.02, adamw_lr=3e-4, momentum_warmup="0.85:0.95:300")
    group["lr"] = group["base_lr"] * lr_scale(step, ...)         the loop does this for every group

`named_state` gives the whole optimizer state as tensors named by parameter ("blocks.0.attn.qkv.weight/momentum_buffer")
and a JSON-able `meta`; `load_named_state` puts it back bit for bit, whatever the order or grouping of the parameters is.
"""

import torch
from torch import Tensor, nn

from ..config import UserError
from .build import build_optimizer, create_muon_optimizer
from .muon import Muon
from .newton_schulz import newton_schulz
from .qk_clip import qk_clip
from .routing import RoutingPlan, route
from .schedule import lr_scale, momentum_at, parse_momentum_warmup

__all__ = [
    "Muon",
    "RoutingPlan",
    "build_optimizer",
    "create_muon_optimizer",
    "load_named_state",
    "lr_scale",
    "momentum_at",
    "named_state",
    "newton_schulz",
    "parse_momentum_warmup",
    "qk_clip",
    "route",
]

GROUP_STATE = ("step", "ns_chosen", "ns_budget")  # what a group remembers; its hyper-parameters come from the config


def named_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], dict]:
    """({"<parameter>/<key>": tensor}, meta). The tensors are the optimizer's own, not copies: save them before stepping on."""
    names = _names(optimizer, model)
    tensors = {f"{name}/{key}": value for name, p in names.items() for key, value in optimizer.state.get(p, {}).items()}
    assert all(isinstance(value, Tensor) for value in tensors.values())
    groups = {g["name"]: {key: g[key] for key in GROUP_STATE if key in g} for g in optimizer.param_groups}
    return tensors, {
        "optimizer": type(optimizer).__name__,
        "parameters": sorted(names),
        "tensors": sorted(tensors),
        "groups": {name: dict(values, **_copied(values)) for name, values in groups.items()},
    }


def load_named_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor], meta: dict
) -> None:
    """The inverse of `named_state`, for an optimizer built over the same parameters; nothing is changed if a name is wrong."""
    names = _names(optimizer, model)
    if meta["optimizer"] != type(optimizer).__name__:
        raise UserError(f"the checkpoint holds {meta['optimizer']} state, this run uses {type(optimizer).__name__}; "
                        f"resume with the same --optim.name, or start anew with --init-from")  # fmt: skip
    _same("parameter", names, meta["parameters"])
    _same("optimizer tensor", tensors, meta["tensors"])
    _same("group", [g["name"] for g in optimizer.param_groups], meta["groups"])
    muon = {id(p) for g in optimizer.param_groups if g.get("use_muon") for p in g["params"]}
    state: dict[str, dict[str, Tensor]] = {}
    for full, value in tensors.items():
        name, _, key = full.rpartition("/")
        if name not in names:
            raise UserError(f"the checkpoint's optimizer tensor {full} belongs to no parameter of this run")
        p = names[name]
        if key not in ({"momentum_buffer"} if id(p) in muon else {"exp_avg", "exp_avg_sq", "step"}):
            raise UserError(f"the checkpoint's {full} does not fit: {name} is now trained by {'Muon' if id(p) in muon else 'AdamW'}; "
                            f"resume with the same --optim.route")  # fmt: skip
        if key != "step" and value.shape != p.shape:
            raise UserError(f"the checkpoint's {full} has shape {tuple(value.shape)}, the parameter {tuple(p.shape)}; "
                            f"resume with the same model")  # fmt: skip
        state.setdefault(name, {})[key] = value.to(p.device, copy=True)
    optimizer.state.clear()
    for name, values in state.items():
        optimizer.state[names[name]] = values
    for group in optimizer.param_groups:
        group.update(_copied(meta["groups"][group["name"]]))


def _copied(values: dict) -> dict:
    return {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}


def _names(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter for everything the optimizer trains; a tied tensor goes by its first name in the model."""
    of = {id(p): name for name, p in model.named_parameters()}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(id(p) in of for p in params), "the optimizer trains a tensor that is not in this model"
    assert all("name" in group for group in optimizer.param_groups), "state is keyed by group name; use build_optimizer"
    return {of[id(p)]: p for p in params}


def _same(what: str, found, expected) -> None:
    if missing := sorted(set(expected) - set(found)):
        raise UserError(f"the checkpoint's {what} {missing[0]!r} is missing here ({len(missing)} in all); "
                        f"resume with the same model and routing, from a complete checkpoint")  # fmt: skip
    if extra := sorted(set(found) - set(expected)):
        raise UserError(f"the {what} {extra[0]!r} is not in the checkpoint's list ({len(extra)} in all); "
                        f"resume with the same model and routing, from a complete checkpoint")  # fmt: skip
