"""One step of the matrices of a group: pieces of one shape are orthogonalised together, then their weights change.

    update(group, pieces, observe)                               the equations of muon.py from U to W

Shapes   a batch (N, A, B) holds as many pieces as `max_batch_bytes` allows
GPU      U is made in bfloat16 where Newton-Schulz works in it, and O added to the weights in it: a step is bound by
         memory as much as by products, and these are half of its bytes. On a CPU both are fp32, or fp64.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from muonlm.scan.launch import on_device

from . import fused
from .memory import batch_bytes
from .newton_schulz import iterate, orthogonalise, triples
from .probe import Choice, choose
from .variants import adapt, stay_on_sphere


@dataclass
class Piece:
    """One matrix in the current step; all views have the parameter's orientation."""

    name: str
    weight: Tensor  # where - lr s O is added: the parameter, or its fp32 master
    grad: Tensor
    momentum: Tensor  # fp32 after this step's update
    state: Tensor | None  # flat, of the variant
    factor: float
    transposed: bool = False  # stored (in, out)


@dataclass
class Observation:
    """What diagnostics see of one batch in a sampled step, before the weights change."""

    names: list[str]
    U: Tensor  # (N, m, n), wide: the input of Newton-Schulz at any scale
    O: Tensor  # (N, m, n), wide: its result before s(A, B) and before the variant
    weights: list[Tensor]
    factors: list[float]
    lr: float
    weight_decay: float
    step: int


NARROW_ON = ("cuda",)  # devices where U is made in bfloat16
Observer = Callable[[Observation], None]


def update(group: dict, pieces: list[Piece], observe: Observer | None = None) -> int:
    """Orthogonalise the pieces, batched by shape, and change their weights. Returns how many were orthogonalised.

    observe   called with every batch before its weights change; not with compat="torch"
    """
    decay = decay_rate(group)
    buckets = defaultdict(list)
    for piece in pieces:
        key = (*piece.weight.shape, piece.factor, piece.transposed, piece.momentum.dtype, piece.momentum.device)
        buckets[key if group["batch_by_shape"] else len(buckets)].append(piece)
    for bucket in buckets.values():
        with on_device(bucket[0].momentum.device):
            _update_bucket(bucket, group, decay, observe)
    return len(pieces)


def _update_bucket(bucket: list[Piece], group: dict, decay: float | Tensor, observe: Observer | None) -> None:
    """As many pieces of one shape at a time as `max_batch_bytes` holds."""
    entries = bucket[0].weight.numel() * bucket[0].momentum.element_size()
    per_batch = max(1, batch_bytes(group, bucket[0].momentum.device) // entries)
    for i in range(0, len(bucket), per_batch):
        batch = bucket[i : i + per_batch]
        way = None if group["compat"] else _choice(batch, group, len(bucket))
        at_once = way is not None and _at_once(batch, group, way[1], decay)
        if decays(decay) and not group["cautious"] and not at_once:
            torch._foreach_mul_([piece.weight for piece in batch], 1.0 - _rate(group) * decay)
        if way is None:
            O = _torch_orthogonalise(batch, group)
        else:
            O = _direction(batch, group, way, at_once, observe)
        if at_once and not isinstance(decay, Tensor):
            weights = [piece.weight for piece in batch]
            factor = 1.0 if group["variant"] == "adamuon" else batch[0].factor
            fused.change(weights, O, group["lr"], decay, factor, group["cautious"])
        else:
            _move(batch, group, O, decay if group["cautious"] else 0.0)
        del O  # before the next batch needs its memory


def _choice(batch: list[Piece], group: dict, count: int) -> Choice:
    """Method and dtype of a batch, one of a bucket of `count` pieces."""
    (A, B), momentum = batch[0].weight.shape, batch[0].momentum
    return choose(group, A, B, count, momentum.dtype, momentum.device)


def _at_once(batch: list[Piece], group: dict, dtype: torch.dtype, decay: float | Tensor) -> bool:
    """Whether the kernels of fused.py do the elementwise work of a batch."""
    plain = (
        group["variant"] != "hyperball" and group["nesterov"] and not (group["compile"] or isinstance(decay, Tensor))
    )
    narrow = dtype == torch.bfloat16 and batch[0].momentum.device.type in NARROW_ON
    return plain and narrow and fused.fits([t for piece in batch for t in (piece.weight, piece.grad, piece.momentum)])


def _direction(batch: list[Piece], group: dict, way: Choice, at_once: bool, observe: Observer | None) -> Tensor:
    """O (N, A, B) of a batch after the variant (hyperball: before it)."""
    first, variant, (method, dtype) = batch[0], group["variant"], way
    wide, device = first.momentum.dtype, first.momentum.device
    if at_once:
        mu, grads, momenta = group["momentum"], [piece.grad for piece in batch], [piece.momentum for piece in batch]
        U, norm = fused.directions(grads, momenta, mu / (1.0 - mu) if group["momentum_form"] == "ema" else mu)
    else:
        U = _stack(batch, group, dtype if dtype == torch.bfloat16 and device.type in NARROW_ON else wide)
        norm = None
    before = U.to(wide, copy=True) if observe else None
    if variant == "adamuon" and group["adamuon_sign"]:
        U.sign_()
        norm = None
    polar = _compiled() if group["compile"] else orthogonalise
    O = polar(U, group["coefficients"], group["ns_steps"], method, dtype, norm)
    O = U.copy_(O) if O.dtype != U.dtype else O
    if observe and before is not None:
        observe(_observation(batch, group, before, O.to(wide)))
    if variant != "muon":
        O = O.to(wide)
    if variant in ("normuon", "adamuon"):
        O = adapt(variant, O, _states(batch), group["beta2"], group["rms_target"], first.transposed)
    return O


def _states(batch: list[Piece]) -> list[Tensor]:
    return [piece.state for piece in batch if piece.state is not None]


def _observation(batch: list[Piece], group: dict, U: Tensor, O: Tensor) -> Observation:
    tall = U.shape[1] > U.shape[2]
    return Observation(
        names=[piece.name for piece in batch],
        U=U.mT if tall else U,
        O=O.mT if tall else O,
        weights=[piece.weight for piece in batch],
        factors=[piece.factor for piece in batch],
        lr=float(group["lr"]),
        weight_decay=group["weight_decay"],
        step=group["step"],
    )


def _move(batch: list[Piece], group: dict, O: Tensor, cautious_decay: float | Tensor) -> None:
    """Change the weights of a batch by its directions O (N, A, B), which are used up."""
    weights, lr = [piece.weight for piece in batch], _rate(group)
    if group["variant"] == "hyperball":
        stay_on_sphere(weights, O, _states(batch), lr)
        return
    directions = list(O.unbind(0))
    if decays(cautious_decay):
        keep = [(o * w).ge_(0.0).to(w.dtype) for o, w in zip(directions, weights, strict=True)]
        torch._foreach_mul_(keep, weights)  # what decays: W where the update pulls the same way, 0 elsewhere
        torch._foreach_mul_(keep, lr * cautious_decay)
        torch._foreach_sub_(weights, keep)
    scale = lr * (1.0 if group["variant"] == "adamuon" else batch[0].factor)
    if isinstance(scale, Tensor):  # stays on the device: no synchronisation
        torch._foreach_sub_(weights, [o.to(batch[0].momentum.dtype) * scale for o in directions])
    else:
        torch._foreach_add_(weights, directions, alpha=-scale)


def _rate(group: dict) -> float | Tensor:
    """lr, as a number under compat="torch": a tensor would round its bf16 updates once more."""
    return float(group["lr"]) if group["compat"] else group["lr"]


def decay_rate(group: dict) -> float | Tensor:
    """The decoupled decay of this step, before lr; a tensor where it follows a rate that is one: nothing waits."""
    decay = group["weight_decay"] if group["decoupled_wd"] else 0.0
    if not (decay and group["wd_follows_lr"]):
        return decay
    peaks = (group.get(key) for key in ("base_lr", "max_lr", "initial_lr", "first_lr"))
    # the loop's, OneCycleLR's, other schedulers', the constructor's
    peak = next((peak for peak in peaks if isinstance(peak, Tensor) or peak), 0.0)
    if isinstance(peak, Tensor):
        peak = peak.clamp(min=torch.finfo(peak.dtype).tiny)
    return decay * group["lr"] / peak if decays(peak) else 0.0


def decays(rate: float | Tensor) -> bool:
    """Whether there is something to do; a tensor is not looked into."""
    return isinstance(rate, Tensor) or bool(rate)


def direction(group: dict, G: Tensor, M: Tensor, out: Tensor) -> Tensor:
    """U, written to `out`; in a narrower dtype at another scale, which Newton-Schulz does not see."""
    mu = group["momentum"]
    if not group["nesterov"]:
        return out.copy_(M)
    if group["momentum_form"] == "classical":
        return torch.add(G, M, alpha=mu, out=out)
    if out.dtype == G.dtype:
        return torch.lerp(G, M, mu, out=out)
    return torch.add(G, M, alpha=mu / (1.0 - mu), out=out)  # lerp takes one dtype only; add rounds but the sum


def _stack(batch: list[Piece], group: dict, dtype: torch.dtype) -> Tensor:
    """U of pieces that share a shape, as one contiguous batch (N, A, B)."""
    first = batch[0].momentum
    U = torch.empty(len(batch), *first.shape, dtype=dtype, device=first.device)
    for piece, slot in zip(batch, U.unbind(0), strict=True):
        direction(group, piece.grad, piece.momentum, slot)
    return U


def _torch_orthogonalise(batch: list[Piece], group: dict) -> Tensor:
    """What torch.optim.Muon does, in its order: bf16 first, then a norm clamped at 1e-7, one matrix a time."""
    (piece,) = batch
    g, m = piece.grad, piece.momentum
    X = (g.lerp(m, group["momentum"]) if group["nesterov"] else m).to(torch.bfloat16, copy=True)
    X = X.mT if g.shape[0] > g.shape[1] else X
    X.div_(X.norm().clamp(min=1e-7))
    O = iterate(X, triples(group["coefficients"], group["ns_steps"]))
    # a bf16 add_ rounds differently with other strides
    return (O.contiguous().mT if g.shape[0] > g.shape[1] else O)[None]


_compiled_orthogonalise = None


def _compiled():
    global _compiled_orthogonalise
    if _compiled_orthogonalise is None:
        _compiled_orthogonalise = torch.compile(orthogonalise, dynamic=False)
    return _compiled_orthogonalise
