"""Σ −log p(target) of a linear head on a GPU, with the gradient made in the same pass over the logits.

    z = x Wᵀ;  L = Σ_i −log softmax(z_i)[t_i] over t_i ≥ 0;  G = softmax(z) − onehot(t), 0 where t < 0
    x̄ = G W;  W̄ = Gᵀ x

Autograd would keep the logits, or make them again, and read and write them some ten times. L is a sum, so its gradient
is known up to a factor when L is: chunk by chunk, z becomes G, G becomes x̄ and a part of W̄, and nothing of size n·V is
kept.

Shapes   x (n,d) · W (V,d) · targets t (n,) int64, negative: not trained
Dtypes   products in the autocast dtype, if there is one; softmax, L and the sums over chunks in at least fp32
There is no second derivative.
"""

# autograd.Function.backward is declared with *grads.
# pyright: reportIncompatibleMethodOverride=false

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import kernels_for
from .norm import wide

LARGEST = 1 << 28  # logits at a time, of up to 16 B each


def in_one_pass(device: torch.device) -> bool:
    """Where it is worth it. CPUs compute the same sums in another order."""
    return device.type == "cuda"


def logits_at_a_time(device: torch.device) -> int:
    """What a GPU may spend on logits: at most an eighth of its memory, at 16 B each."""
    return (
        min(LARGEST, torch.cuda.get_device_properties(device).total_memory >> 7) if device.type == "cuda" else LARGEST
    )


def unused_logits(vocab_size: int, device: torch.device) -> int:
    """How many columns the head gets on a GPU beside its own: tensor cores want rows of whole 16 B, and a product with
    GPT-2's 50,257 columns takes several times as long as one with 50,304."""
    return -vocab_size % 64 if device.type == "cuda" and vocab_size % 8 else 0


def padded(weight: Tensor, unused: int) -> tuple[Tensor, Tensor | None]:
    """W with so many rows more, and the bias that makes their logits exp(−1e9) = 0 (fp16: −65504) in every sum."""
    if not unused:
        return weight, None
    bias = F.pad(weight.new_zeros(len(weight)), (0, unused), value=max(-1e9, torch.finfo(weight.dtype).min))
    return F.pad(weight, (0, 0, 0, unused)), bias


def nats_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """L (), at least fp32, and G in the dtype of the logits (n,V), which may be overwritten."""
    if fast := kernels_for(logits):
        return fast.cross_entropy(logits, targets)
    log_p = torch.log_softmax(logits, -1, dtype=wide(logits.dtype))
    trained, index = targets >= 0, targets.clamp(min=0)[:, None]
    nats = -torch.where(trained, log_p.gather(1, index).squeeze(1), 0).sum()
    G = log_p.exp_().scatter_add_(1, index, log_p.new_full(index.shape, -1.0))
    return nats, torch.mul(G, trained[:, None], out=torch.empty_like(logits))


class OnePass(torch.autograd.Function):
    """OnePass.apply(x, W, targets, logits at a time) -> L."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, most: int) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        with torch.autocast(kind, enabled=False):
            W, bias = padded(weight.to(dtype), unused_logits(len(weight), x.device))
            h, dx = x.to(dtype), torch.empty_like(x)
            nats, dW = 0.0, None
            parts = max(1, -(-len(x) * len(W) // most))
            rows = max(1, -(-len(x) // parts))
            for at in range(0, max(len(x), 1), rows):
                part = slice(at, at + rows)
                some, G = nats_and_gradient(F.linear(h[part], W, bias), targets[part])
                nats, dx[part] = nats + some, G @ W
                product = (G.mT @ h[part]).to(wide(dtype))
                dW = product if dW is None else dW.add_(product)
        ctx.grads = dx, dW[: len(weight)].to(weight.dtype)
        return nats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor):
        dx, dW = ctx.grads
        return dx * g, dW * g, None, None
