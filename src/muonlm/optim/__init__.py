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
from .muon import Muon
from .newton_schulz import newton_schulz
from .routing import RoutingPlan, route
from .schedule import lr_scale, momentum_at, parse_momentum_warmup

__all__ = [
    "Muon",
    "RoutingPlan",
    "build_optimizer",
    "load_named_state",
    "lr_scale",
    "momentum_at",
    "named_state",
    "newton_schulz",
    "parse_momentum_warmup",
    "route",
]

GROUP_STATE = ("step", "ns_chosen", "ns_budget")  # what a group remembers; its hyper-parameters come from the config


def build_optimizer(
    plan_or_model: RoutingPlan | nn.Module,
    *,
    name: str = "muon",
    lr: float,
    adamw_lr: float | None = None,
    embed_lr: float | None = None,
    head_lr: float | None = None,
    scalar_lr: float | None = None,
    wd: float = 0.0,
    adamw_wd: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    momentum: float = 0.95,
    momentum_warmup: str | None = None,
    nesterov: bool = True,
    cautious: bool = False,
    ns_steps: int = 5,
    coefficients: str = "polar_express",
    ns_dtype: str = "auto",
    lr_mode: str = "original",
    decay: str = "2d",
) -> torch.optim.Optimizer:
    """Muon over the plan's groups, or torch.optim.AdamW(fused=True) with every parameter at `lr`.

    decay   AdamW only: "2d" decays matrices, embeddings and the head by `wd`; "all" decays every parameter
    """
    plan = route(plan_or_model) if isinstance(plan_or_model, nn.Module) else plan_or_model
    try:
        if name == "muon":
            groups = plan.groups(lr=lr, adamw_lr=adamw_lr, embed_lr=embed_lr, head_lr=head_lr, scalar_lr=scalar_lr, wd=wd,
                                 adamw_wd=adamw_wd, betas=betas, eps=eps)  # fmt: skip
            schedule = parse_momentum_warmup(momentum_warmup) if momentum_warmup else None
            return Muon(groups, lr=lr, momentum=momentum, nesterov=nesterov, momentum_schedule=schedule, cautious=cautious,
                        ns_steps=ns_steps, coefficients=coefficients, ns_dtype=ns_dtype, lr_mode=lr_mode)  # fmt: skip
        if name == "adamw":
            return torch.optim.AdamW(_adamw_groups(plan, lr, wd, decay), lr=lr, betas=tuple(betas), eps=eps, fused=True)
    except UserError:
        raise
    except ValueError as error:  # the values came from a recipe or a flag
        raise UserError(f"[optim] {error}") from None
    raise UserError(f"unknown optimizer {name!r}; use --optim.name muon or --optim.name adamw")


def _adamw_groups(plan: RoutingPlan, lr: float, wd: float, decay: str) -> list[dict]:
    if decay not in ("all", "2d"):
        raise UserError(f'optim.decay={decay!r} is unknown; use "2d" (matrices, embeddings, head) or "all"')
    groups = {"decay": [], "no_decay": []}
    for d in plan.decisions:
        if d.route in ("muon", "adamw"):
            decayed = decay == "all" or (d.role != "scalar" and d.param.ndim >= 2)
            groups["decay" if decayed else "no_decay"].append((d.name, d.param))
    if not any(groups.values()):
        raise UserError(
            "no parameter is left to train: all are frozen or excluded; remove an --optim.route ...=exclude"
        )
    return [
        {"params": params, "name": name, "lr": lr, "base_lr": lr, "weight_decay": wd if name == "decay" else 0.0}
        for name, params in groups.items()
        if params
    ]


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
