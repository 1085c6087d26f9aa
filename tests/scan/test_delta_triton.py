"""Gated DeltaNet's Triton scan where test_device.py does not look: many blocks, hard triangles, chunk lengths, bf16.

Tests that call kernels are marked `cuda`: MUONLM_REHEARSE=1 TRITON_INTERPRET=1 pytest runs them interpreted.

Tolerances of outputs and states, and of gradients: spec 8. Seen under the interpreter: fp32 3e-7; bf16 4e-3 and 7e-3 if
it rounded to nearest as a GPU does, but it cuts off, which is 9e-3 and 2e-2.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from muonlm.scan import delta_scan, reference

REHEARSAL = os.environ.get("MUONLM_REHEARSE") == "1"
DEVICE = "cpu" if REHEARSAL else "cuda"
NEEDS_TRITON = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="the package triton is not installed")
FP32, BF16 = (1e-5, 2e-4), (2e-2, 3e-2) if REHEARSAL else (1e-2, 3e-2)


def kernels(test):
    return pytest.mark.cuda(NEEDS_TRITON(test))


def problem(B=2, L=37, H=2, N=5, P=7, G=0, dtype=torch.float32, seed=0) -> dict:
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    return dict(
        lg=-normal(B, L, H).abs() * 0.3,
        b=torch.sigmoid(normal(B, L, H)),
        u=normal(B, L, H, P).to(dtype),
        k=F.normalize(normal(B, L, G or H, N), dim=-1).to(dtype),
        q=(normal(B, L, G or H, N) * N**-0.5).to(dtype),
        S0=normal(B, H, N, P),
    )


def run(scan, tensors: dict, dtype=None, **how) -> dict:
    """Outputs and the gradients of a random linear function of them, in the order of `tensors`."""
    leaves = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in tensors.items()}
    outputs = scan(**leaves, **how)
    draw = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=draw).to(out.device, out.dtype) for out in outputs]
    grads = torch.autograd.grad(list(outputs), list(leaves.values()), weights)
    found = {name: out.detach() for name, out in zip("yS", outputs)}
    return found | {f"d_{name}": g for name, g in zip(leaves, grads)}


def by_kernels(tensors: dict, lengths=None, **how) -> dict:
    tensors = {name: x.to(DEVICE) for name, x in tensors.items()}
    lengths = None if lengths is None else lengths.to(DEVICE)
    return run(delta_scan, tensors, lengths=lengths, backend="triton", **how)


def assert_equals_the_loop(tensors: dict, tolerances=FP32, lengths=None, **how) -> dict:
    got, want = by_kernels(tensors, lengths, **how), run(reference.delta_scan, tensors, torch.float64, lengths=lengths)
    for name, exact in want.items():
        assert got[name].shape == exact.shape, name
        error = (got[name].double().cpu() - exact).norm() / exact.norm().clamp(min=1e-30)
        assert error < tolerances[name.startswith("d_")], f"{name}: {error:.1e}"
    return got


@kernels
@pytest.mark.parametrize(
    "size, chunk",
    [
        (dict(L=70 if REHEARSAL else 150, B=1, H=1, N=70, P=70), 0),  # several blocks of keys and of values
        (dict(L=67 if REHEARSAL else 131, B=1, H=1, N=130, P=9), 64),  # all keys of a walk in 256
        (dict(L=35, B=1, H=1, N=20, P=40) if REHEARSAL else dict(L=70, N=20, P=40), 32),
        (dict(L=19 if REHEARSAL else 37, B=1, H=4, G=2), 16),  # two heads share a key
        (dict(L=2, B=1, H=1, N=1, P=1), 5),
    ],
)
def test_outputs_states_and_gradients_equal_the_loop(size, chunk):
    assert_equals_the_loop(problem(**size), chunk=chunk)


@kernels
def test_weak_gates_after_closed_ones_are_as_exact_as_alone():
    """Sums of log gates reach 5,000 inside a chunk, where fp32 is off by 2e-4, and so would their differences be."""
    given = problem(L=128, B=1, H=1, N=16, P=16)
    given["lg"][:, :60] = -80.0
    given["lg"][:, 100:102] = -torch.inf
    given["lg"][:, 120:] = 0.0
    assert_equals_the_loop(given, (2e-6, 4e-6))


@kernels
@pytest.mark.parametrize("strength", [1.0, 1.9])
def test_equal_keys_whose_triangle_has_no_powers_in_fp32_are_solved(strength):
    """All ones below the diagonal, nearly: the inverse has two diagonals, its Neumann series terms of 1e17. 1.9: b > 1
    (negative eigenvalues) makes errors change sign."""
    given = problem(L=130, B=1, H=1, N=16, P=16)
    given["k"][:] = given["k"][:, :1]
    given["b"][:] = strength
    given["lg"] *= 0.01
    assert_equals_the_loop(given)


@kernels
@pytest.mark.parametrize("size", [dict(L=70 if REHEARSAL else 150, B=1, H=1, N=70, P=70), dict(L=65, B=1, N=5, P=12)])
def test_bf16_values_make_bf16_factors_enough(size):
    """q and k may come in fp32, as from a mixer that normalises them: they are rounded."""
    given = problem(**size, dtype=torch.bfloat16)
    got = assert_equals_the_loop(given, BF16)
    assert all(got[f"d_{name}"].dtype == torch.bfloat16 for name in ("u", "k", "q"))
    assert all(got[name].dtype == torch.float32 for name in ("y", "S", "d_lg", "d_b", "d_S0"))
    wide = by_kernels(given | {name: given[name].float() for name in ("q", "k")})
    assert torch.equal(wide["y"], got["y"]) and wide["d_k"].dtype == torch.float32


@kernels
def test_a_nan_among_the_gates_is_seen():
    given = problem(L=37, B=1)
    given["lg"][0, 4, 1] = torch.nan
    got = by_kernels(given, chunk=16)
    assert got["y"][0, 4:, 1].isnan().all() and got["y"][0, :, 0].isfinite().all()
    assert got["d_lg"][0, 4, 1].isnan() and got["d_lg"][0, :, 0].isfinite().all()


@kernels
@pytest.mark.parametrize("N, P", [(1, 1), (24, 40), (40, 24)])
def test_strong_gates_in_bf16_leave_no_noise_in_their_gradients(N, P):
    """What a chunk adds and forgets again cancels in the gradient of lg only if both are rounded alike. The widths are
    those of other tilings: 16, 32 and 64 keys, 16, 32 and 64 values."""
    given = problem(L=100, B=1, H=1, N=N, P=P, dtype=torch.bfloat16)
    given["lg"] *= 30.0
    assert_equals_the_loop(given, BF16)


@kernels
def test_without_states_and_their_gradients_they_are_zeros():
    given = problem(L=20)
    zero = given | dict(S0=torch.zeros_like(given["S0"]))
    del given["S0"]
    got, want = by_kernels(given, chunk=16), by_kernels(zero, chunk=16)
    assert all(torch.equal(value, want[name]) for name, value in got.items())
    leaves = {name: x.to(DEVICE).requires_grad_() for name, x in given.items()}
    y, S = delta_scan(**leaves, backend="triton")
    only_y = torch.autograd.grad(y.sum(), list(leaves.values()), retain_graph=True)
    both = torch.autograd.grad(y.sum() + 0 * S.sum(), list(leaves.values()), retain_graph=True)
    assert all(map(torch.equal, only_y, both))
    torch.autograd.grad(S.sum(), [leaves["u"], leaves["k"]])


def child(*argv: str, **env: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | env
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=env, timeout=600)


def test_without_triton_the_module_imports_and_auto_takes_another():
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from muonlm.scan import choose_backend\n"
        "from muonlm.scan import delta_triton\n"
        "print(choose_backend('delta_scan', 'auto', torch.device('cuda'), torch.float32))"
    )
    run = child("-c", code)
    assert run.stdout == "chunked\n", run
