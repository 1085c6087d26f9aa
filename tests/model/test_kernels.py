"""Triton kernels of the model room against PyTorch in fp64; marked `cuda`, run interpreted in a rehearsal.

Tolerances: fp32 sums of 5,000 exponentials, 1e-5; bf16 keeps 8 bits, 4e-3 of the largest entry, and the interpreter
cuts off where a GPU rounds.
"""

import importlib.util
import os

import pytest
import torch
import torch.nn.functional as F

from muonlm.model import kernels
from muonlm.model.mixers.attention import rope_table

REHEARSAL = os.environ.get("MUONLM_REHEARSE") == "1"
NEEDS_TRITON = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="the package triton is not installed")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def on_a_gpu(test):
    return pytest.mark.cuda(NEEDS_TRITON(test))


def fast():
    from muonlm.model import triton_kernels

    return triton_kernels


def far(found, expected) -> float:
    """The largest difference, over the largest entry."""
    return float((found.double().cpu() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


@on_a_gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("V", [65, 128, 5003] if REHEARSAL else [65, 128, 5003, 50304, 151936])
def test_cross_entropy_and_its_gradient_are_those_of_fp64(V, dtype, device, within):
    """With targets that are not trained, at both ends of the vocabulary, unlikely columns, logits far from 0."""
    draw = torch.Generator().manual_seed(V)
    logits = (30 + 5 * torch.randn(7, V, generator=draw)).to(dtype)
    logits[:, V // 2] = -1e9
    targets = torch.randint(V, (7,), generator=draw)
    targets[:4] = torch.tensor([-100, 0, V - 1, V // 3])
    true = logits.double().requires_grad_()
    nats = F.cross_entropy(true, targets, ignore_index=-100, reduction="sum")
    (gradient,) = torch.autograd.grad(nats, true)
    given = logits.to(device, copy=True)
    found, G = fast().cross_entropy(given, targets.to(device))
    within("loss", abs(found.item() - nats.item()) / nats.item(), 1e-5)
    within("gradient", far(G, gradient), TOLERANCE[dtype])
    assert G.dtype == dtype and not G[0].any() and G.data_ptr() == given.data_ptr()


@on_a_gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rotation_and_its_gradient_are_those_of_fp64(dtype, device, within):
    """Heads and widths that are no powers of two, a slice of a fused projection, a gradient with other strides."""
    B, T, H, K = 2, 9, 3, 20
    draw = torch.Generator().manual_seed(0)
    fused, dy = torch.randn(B, T, 2 * H, K, generator=draw).to(dtype), torch.randn(B, H, T, K, generator=draw).to(dtype)
    tables = rope_table(16, K, 100.0, torch.device("cpu"), torch.float64)
    cos, sin = (table[:T].to(dtype) for table in tables)

    def turned(fused, dy, cos, sin, turn):
        fused = fused.detach().requires_grad_()
        y = turn(fused[:, :, :H], cos, sin)
        y.backward(dy.transpose(1, 2))
        return y.detach(), fused.grad

    def plain(x, cos, sin):
        a, b = x.chunk(2, -1)
        cos, sin = cos[:, None], sin[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    expected = turned(*(t.double() for t in (fused, dy, cos, sin)), plain)
    found = turned(*(t.to(device) for t in (fused, dy, cos, sin)), fast().rotate)
    within("output", far(found[0], expected[0]), TOLERANCE[dtype])
    within("gradient", far(found[1], expected[1]), TOLERANCE[dtype])
    assert found[0].dtype == found[1].dtype == dtype


@on_a_gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [24, 1100])
def test_swiglu_and_its_gradient_are_those_of_fp64(width, dtype, device, within):
    draw = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(2, 5, 2 * width, generator=draw)).to(dtype)
    dy = torch.randn(5, 2, width, generator=draw).to(dtype).transpose(0, 1)

    def both(x, dy, act):
        x = x.detach().requires_grad_()
        y = act(x)
        y.backward(dy)
        return y.detach(), x.grad

    def plain(x):
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    expected, found = both(x.double(), dy.double(), plain), both(x.to(device), dy.to(device), fast().swiglu)
    within("output", far(found[0], expected[0]), TOLERANCE[dtype])
    within("gradient", far(found[1], expected[1]), TOLERANCE[dtype])
    assert found[0].dtype == found[1].dtype == dtype


def test_cpus_do_without_the_kernels():
    assert kernels.kernels_for(torch.zeros(2)) is None


def test_a_gpu_on_which_triton_cannot_run_does_without_the_kernels(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(kernels.torch, "zeros", fails)
    with pytest.warns(UserWarning, match="C compiler"):
        assert kernels._kernels.__wrapped__() is None
