"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner, for matrices; everything else is trained by Adam itself.

    first gradient    L = (1 - b2) G G^T,   R = (1 - b2) G^T G,   Q_L, Q_R = eigenvectors, largest eigenvalue first
    step t = 1, 2, ... with every later one
    M <- b1 M + (1 - b1) G                                   in the space of the weights
    V <- b2 V + (1 - b2) G' * G',   G' = Q_L^T G Q_R         in the eigenbasis
    N = Q_L (M' / (sqrt(V / (1 - b2^t)) + eps)) Q_R^T,       M' = Q_L^T (M / (1 - b1^t)) Q_R
    W <- (1 - lr wd) W - lr N
    L <- b2 L + (1 - b2) G G^T,   R <- b2 R + (1 - b2) G^T G
    every `frequency` steps   Q_L <- QR(L Q_L),   Q_R <- QR(R Q_R)               one step of orthogonal iteration

The first gradient moves no matrix: it is diagonal in its own basis, so that Adam would divide rounding by rounding.
V keeps its place when the basis turns: between two turns the basis moves little. QR may flip the sign of a column: V
does not see it, and M is kept outside of the basis.

Shapes   W, G, M, V (A, B) · L, Q_L (A, A) · R, Q_R (B, B). A 3-D tensor (E, A, B) is E matrices, each with bases of
         its own
Units    lr is of AdamW's kind; the paper uses 3e-3 with betas (0.95, 0.95) and frequency 10
State    all fp32, fp64 for fp64 parameters: `exp_avg` M, `exp_avg_sq` V, `left` L, `right` R, `left_basis`,
         `right_basis`, `step`. Others: AdamW's
Cost     a step: 2 AB (A + B) flops to turn M and G and to turn N back, and for L and R as much; every `frequency` steps
         two QR. Memory 8 (AB + A^2 + B^2) bytes a matrix, so what the routing calls embedding or head stays with Adam
Raises   UserError for a frequency below 1, and under torchrun: it runs on one process
Source   Vyas et al., arXiv 2409.11321, algorithm 3, and its authors' code for the first gradient; other than there, QR
         does not sort the columns anew
"""

from collections.abc import Callable

import torch
from torch import Tensor

from muonlm.errors import UserError

from . import adamw
from .routing.plan import RoutingPlan
from .tensors import Kept


def build(
    plan: RoutingPlan,
    *,
    lr: float,
    wd: float,
    decay: str,
    betas: tuple[float, float],
    eps: float,
    process_group=None,
    frequency: int = 10,
) -> "SOAP":
    """SOAP over the plan: matrices (and stacks of them) are what it routes to Muon; one `lr` for all."""
    if process_group is not None:
        raise UserError('`name` = "soap" runs on one process: start it without torchrun, or use "muon" or "adamw"')
    matrices = [d for d in plan.trained if d.route == "muon" and d.param.ndim in (2, 3)]
    params = [(d.name, d.param) for d in matrices]
    groups = [
        {
            "params": params,
            "name": "matrices",
            "matrices": True,
            "rule": "SOAP",
            "lr": lr,
            "base_lr": lr,
            "weight_decay": wd,
        }
    ]
    others = [d for d in plan.trained if d not in matrices]
    groups += [group | {"matrices": False} for group in adamw.groups(others, lr, wd, decay)]
    return SOAP([group for group in groups if group["params"]], lr=lr, betas=betas, eps=eps, frequency=frequency)


class SOAP(torch.optim.Optimizer):
    """See the module docstring. Groups say matrices=True, or False for what Adam trains."""

    def __init__(self, groups, lr=3e-3, betas=(0.95, 0.95), eps=1e-8, weight_decay=0.0, frequency=10):
        if not isinstance(frequency, int) or frequency < 1:
            raise UserError(f"`frequency` = {frequency!r} is no number of steps; use 1 or more, 10 is usual")
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, frequency=frequency, matrices=True)
        super().__init__(groups, defaults)

    def state_layout(self, p: Tensor, group: dict) -> dict[str, Kept]:
        """{key: (shape, dtype)} of the state of one parameter."""
        if not group["matrices"]:
            return adamw.layout(p)
        (*stack, A, B), dtype = p.shape, torch.promote_types(p.dtype, torch.float32)
        moment, left, right = (tuple(p.shape), dtype), ((*stack, A, A), dtype), ((*stack, B, B), dtype)
        shapes = {"left": left, "right": right, "left_basis": left, "right_basis": right}
        return {"step": ((), torch.float32), "exp_avg": moment, "exp_avg_sq": moment} | shapes

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            gradients = {p: p.grad for p in group["params"] if p.grad is not None}
            if group["matrices"]:
                for p, grad in gradients.items():
                    self._turned_step(p, grad.to(torch.promote_types(p.dtype, torch.float32)), group)
            else:
                adamw.step(group, self.state, gradients)
        return loss

    def _turned_step(self, p: Tensor, G: Tensor, group: dict) -> None:
        state, (b1, b2) = self.state[p], group["betas"]
        squares = {"left": G @ G.mT, "right": G.mT @ G}
        if not state:
            for key, (shape, dtype) in self.state_layout(p, group).items():
                state[key] = torch.zeros(shape, dtype=dtype, device=p.device if shape else "cpu")
            for side, square in squares.items():
                state[side].lerp_(square, 1.0 - b2)
                state[side + "_basis"].copy_(torch.linalg.eigh(state[side]).eigenvectors.flip(-1))
            return
        state["step"] += 1
        t, M, V = int(state["step"]), state["exp_avg"], state["exp_avg_sq"]
        QL, QR = state["left_basis"], state["right_basis"]
        M.lerp_(G, 1.0 - b1)
        V.lerp_((QL.mT @ G @ QR).square_(), 1.0 - b2)
        N = (QL.mT @ M @ QR).div_((V / (1.0 - b2**t)).sqrt_().add_(group["eps"]))
        update = (QL @ N @ QR.mT).to(p.dtype)
        p.mul_(1.0 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] / (1.0 - b1**t))
        for side, square in squares.items():
            state[side].lerp_(square, 1.0 - b2)
            if t % group["frequency"] == 0:
                state[side + "_basis"].copy_(torch.linalg.qr(state[side] @ state[side + "_basis"]).Q)
