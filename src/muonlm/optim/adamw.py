"""AdamW: torch.optim.AdamW(fused=True) over a plan, and the same step for the groups of other optimizers that need it.

    M <- b1 M + (1 - b1) G     V <- b2 V + (1 - b2) G * G
    W <- (1 - lr wd) W - lr (M / (1 - b1^t)) / (sqrt(V / (1 - b2^t)) + eps)

State    `exp_avg`, `exp_avg_sq` as the parameter, `step` (): the number of steps, fp32
Source   Loshchilov and Hutter, arXiv 1711.05101; the arithmetic is torch's
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from muonlm.errors import UserError

from .tensors import Kept, local

if TYPE_CHECKING:
    from .routing.plan import Decision, RoutingPlan


def build(
    plan: "RoutingPlan", *, lr: float, wd: float, decay: str, betas: tuple[float, float], eps: float, process_group=None
) -> torch.optim.AdamW:
    """torch's, with every parameter at `lr`. On many ranks each takes the same step: `process_group` adds nothing."""
    return torch.optim.AdamW(groups(plan.trained, lr, wd, decay), lr=lr, betas=betas, eps=eps, fused=True)


def groups(decisions: list["Decision"], lr: float, wd: float, decay: str) -> list[dict]:
    """Groups "decay" and "no_decay" with their names, rates and weight decay; empty ones are left out."""
    if decay not in ("all", "2d"):
        raise UserError(f'`decay` = {decay!r} is unknown; use "2d" (matrices, embeddings, head) or "all"')
    members: dict[str, list] = {"decay": [], "no_decay": []}
    for d in decisions:
        decayed = decay == "all" or (d.role != "scalar" and d.param.ndim >= 2)
        members["decay" if decayed else "no_decay"].append((d.name, d.param))
    return [
        {"params": params, "name": name, "lr": lr, "base_lr": lr, "weight_decay": wd if name == "decay" else 0.0}
        for name, params in members.items()
        if params
    ]


def layout(p: Tensor) -> dict[str, Kept]:
    """{key: (shape, dtype)} of the state of one parameter."""
    like = (tuple(p.shape), p.dtype)
    return {"exp_avg": like, "exp_avg_sq": like, "step": ((), torch.float32)}


def step(group: dict, state: Mapping[Tensor, dict], gradients: Mapping[Tensor, Tensor]) -> None:
    """One step of the parameters of `group` that have a gradient, bit for bit as torch.optim.AdamW(fused=True).

    group   lr, betas, eps, weight_decay. `state` is made where it is missing. DTensors are stepped shard by shard
    """
    params = [p for p in group["params"] if p in gradients]
    if not params:
        return
    for p in params:
        if not state[p]:
            state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state[p]["exp_avg"] = torch.zeros_like(p)
            state[p]["exp_avg_sq"] = torch.zeros_like(p)
    states = [state[p] for p in params]
    adamw(
        [local(p) for p in params],
        [local(gradients[p]) for p in params],
        [local(s["exp_avg"]) for s in states],
        [local(s["exp_avg_sq"]) for s in states],
        [],
        [s["step"] for s in states],
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
