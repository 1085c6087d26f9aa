# type: ignore  (the language is Triton's: Python's types do not apply)
"""Pieces of a model that PyTorch does in many passes over memory, as one Triton kernel each way: on a GPU.

    cross_entropy(logits, targets)    Σ −log softmax(z_i)[t_i] over t_i ≥ 0, and its gradient in place of the logits
    rotate(x, cos, sin)               mixers/attention.py's, differentiable
    swiglu(x)                         SiLU(g) ⊙ u of x = [g; u], differentiable; keeps x alone

kernels.py says where they are used.

Shapes   logits (n,V), targets (n,) int64 · x (B,T,H,K), cos and sin (T,K/2) · x (…,2F)
Dtypes   fp32, bf16 or fp16; arithmetic in fp32
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from muonlm.scan.launch import on_device


@triton.jit
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
        with on_device(logits.device):
            _cross_entropy[(n,)](
                logits, targets, nats, logits.stride(0), V, BLOCK=block, num_warps=max(1, block // 512)
            )
    return nats.sum(), logits


@triton.jit
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
        with on_device(x.device):
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


@triton.jit
def _swiglu(x, y, F, BLOCK: tl.constexpr):
    n, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(x + n * 2 * F + i, mask=i < F, other=0.0).to(tl.float32)
    u = tl.load(x + n * 2 * F + F + i, mask=i < F, other=0.0).to(tl.float32)
    tl.store(y + n * F + i, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), mask=i < F)


@triton.jit
def _swiglu_back(x, dy, dx, F, BLOCK: tl.constexpr):
    n, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(x + n * 2 * F + i, mask=i < F, other=0.0).to(tl.float32)
    u = tl.load(x + n * 2 * F + F + i, mask=i < F, other=0.0).to(tl.float32)
    d = tl.load(dy + n * F + i, mask=i < F, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(dx + n * 2 * F + i, (d * u * s * (1.0 + g * (1.0 - s))).to(dx.dtype.element_ty), mask=i < F)
    tl.store(dx + n * 2 * F + F + i, (d * g * s).to(dx.dtype.element_ty), mask=i < F)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        y = torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=x.dtype, device=x.device)
        _launch_rows(_swiglu, y, x, y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        _launch_rows(_swiglu_back, dy, x, dy.contiguous(), dx)
        return dx


def _launch_rows(kernel, y: Tensor, *tensors: Tensor) -> None:
    """One program for each 1,024 of the F columns of a row of y (…,F)."""
    F = y.shape[-1]
    block = min(1024, triton.next_power_of_2(F))
    if y.numel():
        with on_device(y.device):
            kernel[(y.numel() // F, triton.cdiv(F, block))](*tensors, F, BLOCK=block, num_warps=4)


def swiglu(x: Tensor) -> Tensor:
    return _SwiGLU.apply(x.contiguous())
