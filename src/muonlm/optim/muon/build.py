"""Muon for a whole model: from a routing plan, or in one call.

optimizer = create_muon_optimizer(model, lr=3e-3)                    prints who is trained by what
"""

from torch import nn

from ..routing.plan import RoutingPlan
from ..routing.route import route
from ..schedule import parse_momentum_warmup
from .muon import Muon

BACKENDS = {
    "newtonschulz5": {"coefficients": "keller", "ns_steps": 5},
    "newtonschulz10": {"coefficients": "deepseek", "ns_steps": 10},
    "cayley": {"ns_method": "cayley", "ns_dtype": "float32", "ns_steps": 5},
}


def build(
    plan: RoutingPlan,
    *,
    lr: float,
    wd: float,
    decay: str,
    betas: tuple[float, float],
    eps: float,
    process_group=None,
    adamw_lr: float | None = None,
    embed_lr: float | None = None,
    head_lr: float | None = None,
    scalar_lr: float | None = None,
    adamw_wd: float = 0.0,
    momentum_warmup: str | None = None,
    **muon,
) -> Muon:
    """Muon over the plan's groups.

    lr, wd           of the matrices; `decay` is not asked: vectors are never decayed, embeddings and head by `adamw_wd`
    embed_lr, head_lr, scalar_lr   rates of AdamW's groups; 0 or None: `adamw_lr`
    momentum_warmup  "0.85:0.95:300", see schedule.py; empty or None: constant
    muon             further arguments of `Muon`
    """
    groups = plan.groups(
        lr=lr,
        adamw_lr=adamw_lr,
        embed_lr=embed_lr or None,
        head_lr=head_lr or None,
        scalar_lr=scalar_lr or None,
        wd=wd,
        adamw_wd=adamw_wd,
        betas=betas,
        eps=eps,
    )
    schedule = parse_momentum_warmup(momentum_warmup) if momentum_warmup else None
    return Muon(groups, momentum_schedule=schedule, process_group=process_group, **muon)


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
    """Route `model`, print the report, and return `Muon` under match_rms_adamw: `lr` is an AdamW rate for all tensors.

    backend         orthogonality error ||O O^T - I||_F / sqrt(m) on a 256 x 256 Gaussian
    newtonschulz5   Keller's quintic, five steps; 0.35
    newtonschulz10  eight of them and two of (2, -1.5, 0.5), which settle what they leave oscillating; below 0.001
    cayley          five Cholesky solves in fp32, see newton_schulz.py; 0.02
    aux_lr          rate of the AdamW groups; None: `lr`. `weight_decay` decays them too, but no vectors
    Raises          ValueError for an unknown backend and whatever `Muon` refuses
    Source          the signature: infrabrew/mamba-recursive-model
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
