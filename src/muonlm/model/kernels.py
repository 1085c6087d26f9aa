# type: ignore  (the language is Triton's: Python's types do not apply)
"""Two pieces of a Transformer that PyTorch does in many passes over memory, as one Triton kernel each: on a GPU.

    cross_entropy(logits, targets)    Σ −log softmax(z_i)[t_i] over t_i ≥ 0, and its gradient in place of the logits
    rotate(x, cos, sin)               mixers/attention.py's, differentiable

torch.compile fuses the plain forms: inside its graphs these are not used.

Shapes   logits (n,V), targets (n,) int64 · x (B,T,H,K), the last dimension contiguous, cos and sin (T,K/2)
Dtypes   fp32, bf16 or fp16; arithmetic in fp32
"""

import warnings
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # `available` tells
    triton, tl = None, SimpleNamespace(constexpr=None)

jit: Any = triton.jit if triton else lambda kernel: kernel  # reads TRITON_INTERPRET now: set it before this import
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def available(x: Tensor) -> bool:
    """Whether a kernel can run on x, and should."""
    return x.is_cuda and x.dtype in DTYPES and not torch.compiler.is_compiling() and _launches()


@cache
def _launches() -> bool:
    """Triton may be there without the C compiler that it needs, or without a driver for this card: tried once."""
    if triton is None:
        return False
    try:
        cross_entropy(torch.zeros(1, 128, device="cuda"), torch.zeros(1, dtype=torch.long, device="cuda"))
        return True
    except Exception as error:  # whatever it is, PyTorch can do without
        warnings.warn(f"Triton cannot run here ({error}); training is slower without its kernels", stacklevel=2)
        return False


@jit
def _cross_entropy(logits, targets, nats, stride, V, BLOCK: tl.constexpr):
    """A row: two passes over its logits, the second from cache."""
    i = tl.program_id(0).to(tl.int64)
    row, lane = logits + i * stride, tl.arange(0, BLOCK)
    target = tl.load(targets + i)
    trained = target >= 0
    own = tl.load(row + tl.maximum(target, 0)).to(tl.float32)  # before the reductions, whose barriers keep the order
    top, total = tl.full([BLOCK], -3.0e38, tl.float32), tl.zeros([BLOCK], tl.float32)  # −∞ − (−∞) would be NaN
    for at in range(0, V, BLOCK):
        z = tl.load(row + at + lane, mask=at + lane < V, other=-3.0e38).to(tl.float32)
        higher = tl.maximum(top, z)
        total = total * tl.exp(top - higher) + tl.where(at + lane < V, tl.exp(z - higher), 0.0)
        top = higher
    highest = tl.max(top, 0)
    log_sum = highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))
    tl.store(nats + i, tl.where(trained, log_sum - own, 0.0))
    for at in range(0, V, BLOCK):
        z = tl.load(row + at + lane, mask=at + lane < V, other=0.0).to(tl.float32)
        g = tl.exp(z - log_sum) - tl.where(at + lane == target, 1.0, 0.0)
        g = tl.where(trained, g, 0.0)
        tl.store(row + at + lane, g.to(logits.dtype.element_ty), mask=at + lane < V)


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(the sum () in fp32, the gradient): `logits` is overwritten."""
    (n, V), targets = logits.shape, targets.contiguous()
    nats = torch.empty(n, dtype=torch.float32, device=logits.device)
    block = min(4096, max(128, triton.next_power_of_2(V)))
    if n:
        with _on(logits):
            _cross_entropy[(n,)](
                logits, targets, nats, logits.stride(0), V, BLOCK=block, num_warps=max(1, block // 512)
            )
    return nats.sum(), logits


@jit
def _rotate(x, cos, sin, y, T, x_b, x_t, x_h, H, sign, BH: tl.constexpr, HALF: tl.constexpr, BHALF: tl.constexpr):
    """All heads of a token; sign = −1 turns back."""
    t, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head, i = tl.arange(0, BH)[:, None], tl.arange(0, BHALF)[None, :]
    inside = (head < H) & (i < HALF)
    c = tl.load(cos + t * HALF + i, mask=i < HALF, other=0.0).to(tl.float32)
    s = sign * tl.load(sin + t * HALF + i, mask=i < HALF, other=0.0).to(tl.float32)
    source = x + b * x_b + t * x_t + head * x_h + i
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    goal = y + ((b * T + t) * H + head) * (2 * HALF) + i
    tl.store(goal, (first * c - second * s).to(y.dtype.element_ty), mask=inside)
    tl.store(goal + HALF, (second * c + first * s).to(y.dtype.element_ty), mask=inside)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    B, T, H, K = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = torch.empty(B, T, H, K, dtype=x.dtype, device=x.device)
    heads, half = triton.next_power_of_2(H), triton.next_power_of_2(K // 2)
    if x.numel():
        with _on(x):
            _rotate[(T, B)](
                x, cos, sin, y, T, *x.stride()[:3], H, sign, BH=heads, HALF=K // 2, BHALF=half,
                num_warps=min(8, max(1, heads * half // 128)),
            )  # fmt: skip
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return _turned(dy, *ctx.saved_tensors, -1.0), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The whole width of every head, one angle a token: cos and sin (T,K/2)."""
    return _Rotate.apply(x, cos.contiguous(), sin.contiguous())


def _on(x: Tensor):
    """Triton launches on the current device: make it x's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
