"""QK-clip: after the optimizer's step, shrink the query and key weights of heads whose logits grew too large.

    S_h = max over batch, queries and visible keys of q·k/√K, and over ranks     measured in the step's forward passes
    g_h = min(1, τ / S_h)
    W_q[h], b_q[h] ← g_h^a · (W_q[h], b_q[h]);    W_k[h], b_k[h] ← g_h^(1−a) · (W_k[h], b_k[h])            a = alpha
    grouped queries (H query heads, G < H key heads):  a = 1. A key head serves H/G query heads, most of them innocent.

q and k are linear in (W, b), and rotary embeddings, whole or partial, are linear in q and k: each logit of head h is
multiplied by exactly g_h, so on the same batch and weights the largest becomes τ. S_h is that of the weights before the
step: on the next batch a logit may exceed τ by what one step adds. Heads with S_h ≤ τ keep their bits. Momentum is not
scaled.

Not for  QK-norm: the norm divides the scale out again (our Attention.qk_heads refuses; yours is unknown here).
Cost     one all-reduce of all S_h and one device synchronisation a step; weights are touched only in layers above τ.
Raises   UserError, before any weight is changed: no measurement, one that is not finite, shapes that do not fit, τ ≤ 0,
         a ∉ [0, 1]
Source   MuonClip: Kimi K2, arXiv 2507.20534 §2.1 (τ = 100, a = ½)
"""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from muonlm.errors import UserError

Layer = tuple[Sequence[Tensor], Sequence[Tensor], Tensor | None]


@torch.no_grad()
def qk_clip(
    layers: Iterable[Layer], tau: float = 100.0, alpha: float = 0.5, *, process_group=None
) -> dict[str, float | int]:
    """Clip in place; returns {"max_logit": largest S_h before the clip, "clipped_heads": how many exceeded τ}.

    layers         (q, k, max_logit) of each: lists of views with the head axis first, weight (heads, K, D) and, if any,
                   bias (heads, K), that share the parameters' memory; max_logit (H,), which is used up: set to −∞,
                   ready for the next step. Ours: `layer.track_logits = True`, later `layer.qk_heads()`.
    process_group  ranks over which S_h is the maximum; None = all of torch.distributed, where that is initialised.
                   Every rank must call, with the same layers: it is a collective.

    Your own model, with H heads, G key heads, q (B, H, T, K) and k (B, G, T, K) after the rotation:

        import torch
        from muonlm.model.mixers.attention import max_logits
        from muonlm.optim.watch.qk_clip import qk_clip

        # in your attention's forward, of every micro-batch; self.peak starts as torch.full((H,), -torch.inf)
        self.peak = torch.maximum(self.peak, max_logits(q, k, scale=K**-0.5))
        # after optimizer.step()
        def heads(linear, n):
            return [p.unflatten(0, (n, -1)) for p in (linear.weight, linear.bias) if p is not None]
        metrics = qk_clip([(heads(a.q_proj, H), heads(a.k_proj, G), a.peak) for a in attentions], tau=100.0)
    """
    layers = list(layers)
    _check(layers, tau, alpha)
    sizes, device = [len(q[0]) for q, _, _ in layers], layers[0][0][0].device
    measured = [torch.full((n,), -math.inf) if top is None else top for n, (_, _, top) in zip(sizes, layers)]
    S = torch.cat([top.to(device, torch.promote_types(top.dtype, torch.float32)) for top in measured])
    S.nan_to_num_(nan=math.inf, posinf=math.inf, neginf=-math.inf)  # the maximum of NaN and 1 is 1 to some backends
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(S, dist.ReduceOp.MAX, process_group)
    values = [top.tolist() for top in S.cpu().split(sizes)]
    for i, tops in enumerate(values):
        if -math.inf in tops:
            raise UserError(
                f"qk_clip: no logit of layer {i} was measured since the last clip; set track_logits = True on every "
                f"attention layer before the forward pass, and run it in training mode (your own: raise max_logit)"
            )
        if not all(map(math.isfinite, tops)):
            raise UserError(
                f"qk_clip: head {[math.isfinite(s) for s in tops].index(False)} of layer {i} has a logit that is not "
                f"finite; nothing was scaled. Lower `lr`, or go back to the last good checkpoint"
            )
    g = tau / S.clamp(min=tau)  # exactly 1 up to tau, also below 0
    for (q, k, top), mine, tops in zip(layers, g.split(sizes), values):
        if max(tops) > tau:
            a = alpha if len(q[0]) == len(k[0]) else 1.0
            _scale(q, mine**a)
            if a < 1:
                _scale(k, mine ** (1 - a))
        if top is not None:
            top.fill_(-math.inf)
    flat = sum(values, [])
    return {"max_logit": max(flat), "clipped_heads": sum(s > tau for s in flat)}


def _scale(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply head h of each tensor by factor[h] in place; bf16 weights are multiplied in fp32 and rounded once."""
    for t in tensors:
        t.mul_(factor.to(t.device).view(-1, *[1] * (t.ndim - 1)))


def _check(layers: list[Layer], tau: float, alpha: float) -> None:
    if not 0 < tau < math.inf:
        raise UserError(f"qk_clip: tau = {tau} must be a finite number above 0; 100 is usual")
    if not 0 <= alpha <= 1:
        raise UserError(f"qk_clip: alpha = {alpha}, the queries' share of the scaling, must be in [0, 1]; 0.5 is usual")
    if not layers:
        raise UserError("qk_clip: there is no layer to clip; give one (q, k, max_logit) for each attention layer")
    for i, (q, k, top) in enumerate(layers):
        H, G = {len(t) for t in q}, {len(t) for t in k}
        if len(H) != 1 or len(G) != 1 or min(H) % min(G) or (top is not None and top.shape != (min(H),)):
            qs, ks, tops = ([tuple(t.shape) for t in ts if t is not None] for ts in (q, k, [top]))
            raise UserError(
                f"qk_clip: layer {i} has q {qs}, k {ks}, max_logit {tops}; give lists of views with the head "
                f"axis first, as weight.unflatten(0, (heads, -1)), key heads that divide the query heads, and one "
                f"max_logit for each query head"
            )
        for t in (*q, *k):
            if t.grad_fn is not None and not t._is_view():
                raise UserError(
                    f"qk_clip: a tensor {tuple(t.shape)} of layer {i} is computed from the parameter, no view of it: "
                    f"scaling it changes nothing; use weight.unflatten(0, (heads, -1)), slices, .T, not .reshape"
                )
