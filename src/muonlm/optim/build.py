"""Optimizers for a whole model: `build_optimizer` from a routing plan, `create_muon_optimizer` in one call.

plan = route(model)
optimizer = build_optimizer(plan, lr=0.02, adamw_lr=3e-4, cautious=True, variant="normuon")

optimizer = create_muon_optimizer(model, lr=3e-3)                    prints who is trained by what
"""

import torch
from torch import nn

from muonlm.errors import UserError

from .muon.muon import Muon
from .routing.route import RoutingPlan, route
from .schedule import parse_momentum_warmup

BACKENDS = {
    "newtonschulz5": {"coefficients": "keller", "ns_steps": 5},
    "newtonschulz10": {"coefficients": "deepseek", "ns_steps": 10},
    "cayley": {"ns_method": "cayley", "ns_dtype": "float32", "ns_steps": 5},
}


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
    momentum_warmup: str | None = None,
    decay: str = "2d",
    **muon,
) -> torch.optim.Optimizer:
    """Muon over the plan's groups, or torch.optim.AdamW(fused=True) with every parameter at `lr`.

    decay   AdamW only: "2d" decays matrices, embeddings and the head by `wd`; "all" decays every parameter
    muon    further arguments of `Muon`, which AdamW ignores
    """
    plan = route(plan_or_model) if isinstance(plan_or_model, nn.Module) else plan_or_model
    try:
        if name == "muon":
            groups = plan.groups(lr=lr, adamw_lr=adamw_lr, embed_lr=embed_lr, head_lr=head_lr, scalar_lr=scalar_lr, wd=wd,
                                 adamw_wd=adamw_wd, betas=betas, eps=eps)  # fmt: skip
            schedule = parse_momentum_warmup(momentum_warmup) if momentum_warmup else None
            return Muon(groups, momentum_schedule=schedule, **muon)
        if name == "adamw":
            return torch.optim.AdamW(_adamw_groups(plan, lr, wd, decay), lr=lr, betas=tuple(betas), eps=eps, fused=True)
    except UserError:
        raise
    except ValueError as error:  # the values came from a recipe or a flag
        raise UserError(f"[optim] {error}") from None
    raise UserError(f"unknown optimizer {name!r}; use --optim.name muon or --optim.name adamw")


def create_muon_optimizer(
    model: nn.Module,
    lr: float = 3e-3,
    momentum: float = 0.95,
    weight_decay: float = 0.01,
    nesterov: bool = True,
    backend: str = "newtonschulz5",
    decoupled_wd: bool = True,
    *,
    aux_lr: float | None = None,
    verbose: bool = True,
) -> Muon:
    """Route `model`, print the report, and return `Muon` under match_rms_adamw, where `lr` is an AdamW rate for all tensors.

    backend         orthogonality error ||O O^T - I||_F / sqrt(m) on a 256 x 256 Gaussian
    newtonschulz5   Keller's quintic, five steps; 0.35
    newtonschulz10  eight of them and two of (2, -1.5, 0.5), which settle what they leave oscillating; below 0.001
    cayley          five Cholesky solves in fp32, see newton_schulz.py; 0.02
    aux_lr          rate of the AdamW groups; None: `lr`. They are decayed by `weight_decay` too, vectors and norms never
    Raises          ValueError for an unknown backend and whatever `Muon` refuses. Source: infrabrew/mamba-recursive-model (signature)
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; use one of {', '.join(BACKENDS)}")
    aux = lr if aux_lr is None else aux_lr
    plan = route(model)
    groups = plan.groups(lr=lr, adamw_lr=aux, wd=weight_decay, adamw_wd=weight_decay)
    optimizer = Muon(
        groups, None, momentum, nesterov, decoupled_wd=decoupled_wd, lr_mode="match_rms_adamw", **BACKENDS[backend]
    )
    if verbose:
        print(plan.table(optimizer.param_groups), end="")
    return optimizer


def _adamw_groups(plan: RoutingPlan, lr: float, wd: float, decay: str) -> list[dict]:
    if decay not in ("all", "2d"):
        raise UserError(f'optim.decay={decay!r} is unknown; use "2d" (matrices, embeddings, head) or "all"')
    groups = {"decay": [], "no_decay": []}
    for d in plan.decisions:
        if d.route in ("muon", "adamw"):
            decayed = decay == "all" or (d.role != "scalar" and d.param.ndim >= 2)
            groups["decay" if decayed else "no_decay"].append((d.name, d.param))
    if not any(groups.values()):
        raise UserError("no parameter is left to train: all are frozen or excluded; remove an --muon.route ...=exclude")
    return [
        {"params": params, "name": name, "lr": lr, "base_lr": lr, "weight_decay": wd if name == "decay" else 0.0}
        for name, params in groups.items()
        if params
    ]
