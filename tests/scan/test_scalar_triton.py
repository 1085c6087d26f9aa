"""The Triton form of scalar_scan where the tests of every backend (test_device.py) do not look: widths of several
tiles, several programs a group, gradients of closed gates.

Tests that call kernels are marked `cuda`: MUONLM_REHEARSE=1 TRITON_INTERPRET=1 pytest runs them interpreted.
"""

import importlib.util
import os

import pytest
import torch

from muonlm.scan import reference, scalar_scan
from muonlm.scan import scalar_triton as gpu

REHEARSAL = os.environ.get("MUONLM_REHEARSE") == "1"
DEVICE = "cpu" if REHEARSAL else "cuda"
NEEDS_TRITON = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="the package triton is not installed")


def kernels(test):
    return pytest.mark.cuda(NEEDS_TRITON(test))


# Relative Frobenius error of outputs and states, and of gradients. 3e-7 was seen in both.
FP32 = (1e-5, 1e-5)


def problem(L=37, *, B=2, H=4, G=2, N=6, P=5, seed=0) -> dict:
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw).to(DEVICE)  # noqa: E731
    return dict(
        lg=-0.3 * normal(B, L, H).abs(),
        w=normal(B, L, H, P),
        k=normal(B, L, G, N) / N**0.5,
        q=normal(B, L, G, N),
        S0=normal(B, H, N, P),
        M0=normal(B, H, N, P),
    )


def run(given: dict, gamma: float, function=scalar_scan, **how) -> dict:
    """Outputs, and gradients of a random linear function of them all, named d_<input>."""
    leaves = {name: x.clone().requires_grad_() for name, x in given.items() if gamma or name != "M0"}
    found = function(**leaves, gamma=gamma, alpha=0.7, **how)
    outputs = {name: x for name, x in zip("ySM", found) if x is not None}
    draw = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=draw).to(x) for x in outputs.values()]
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), weights)
    return {name: x.detach() for name, x in outputs.items()} | {f"d_{n}": g for n, g in zip(leaves, grads)}


def agree(given: dict, gamma: float, *, chunk: int = 16, lengths=None, tolerances=FP32) -> dict:
    got = run(given, gamma, backend="triton", chunk=chunk, lengths=lengths)
    want = run({n: x.double() for n, x in given.items()}, gamma, reference.scalar_scan, lengths=lengths)
    for name, exact in want.items():
        error = (got[name].double() - exact).norm() / exact.norm().clamp(min=1e-30)
        assert error <= tolerances[name.startswith("d_")], f"{name}: {error:.1e}"
    return got


momenta = pytest.mark.parametrize("gamma", [0.0, 0.9])


@kernels
@momenta
@pytest.mark.parametrize("N, P", [(37, 33), (130, 16)] if REHEARSAL else [(6, 5), (16, 32), (37, 33), (130, 16)])
def test_keys_and_values_of_several_tiles_equal_the_loop(gamma, N, P):
    agree(problem(19, B=1, H=2, G=1, N=N, P=P), gamma)


@kernels
@momenta
@pytest.mark.parametrize("rounded", ["wkq", "w"])
def test_bf16_values_ask_for_bf16_factors_whatever_the_keys_are(gamma, rounded):
    """Two chunks, two blocks of keys, two pieces of values. 4e-3 was seen; without rounding it would be 1e-7."""
    given = problem(19 if REHEARSAL else 70, B=1, H=2, G=1, N=70, P=68)
    given |= {name: given[name].bfloat16() for name in rounded}
    got = agree(given, gamma, chunk=16 if REHEARSAL else 0, tolerances=(1e-2, 2e-2))
    assert all(got[f"d_{name}"].dtype == x.dtype for name, x in given.items() if gamma or name != "M0")
    exact = run({name: x.float() for name, x in given.items()}, gamma, backend="triton")
    assert (got["y"] - exact["y"]).norm() > 1e-4 * exact["y"].norm()


@kernels
@momenta
@pytest.mark.parametrize("chunk", [16, 0] if REHEARSAL else [1, 16, 24, 0, 100])
def test_no_chunk_length_changes_the_result(gamma, chunk):
    agree(problem(27), gamma, chunk=chunk, lengths=torch.tensor([27, 18], device=DEVICE))


@kernels
@momenta
@pytest.mark.parametrize("strength", [20.0] if REHEARSAL else [5.0, 13.7, 20.0, 79.0])
def test_the_gradient_of_nearly_closed_gates_is_not_lost(gamma, strength):
    """It is e⁻²⁰ of what a token's own write, which passes no gate, contributes to y."""
    given = problem(33, B=1)
    spread = torch.rand(given["lg"].shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    given["lg"] = -strength * (0.9 + 0.2 * spread)
    agree(given, gamma)


@kernels
@momenta
def test_gates_below_the_lowest_have_no_gradient(gamma):
    given = problem(21, B=1)
    given["lg"][:, 3:17] = -torch.inf
    got = agree(given, gamma)
    assert got["d_lg"][:, 3:17].eq(0).all() and got["d_lg"][:, 17:].ne(0).all()


@kernels
@momenta
def test_weak_gates_after_a_strong_one_are_summed_exactly(gamma):
    """Sums of 800 beside differences of 0.01: fp32 has steps of 6e-5 there."""
    given = problem(32, B=1)
    given["lg"][:, :10], given["lg"][:, 10:] = -80.0, -0.01 * torch.rand(1, 22, 4, device=DEVICE)
    agree(given, gamma, chunk=32)


@kernels
@momenta
def test_a_groups_heads_may_be_added_by_several_programs(gamma, monkeypatch):
    """Each writes its part of dk and dq, the last one less; a head of two pieces may be cut. Bits repeat."""
    given = problem(19, B=1, H=3, G=1, P=40)  # six pieces
    want = run(given, gamma, backend="triton", chunk=16)
    monkeypatch.setattr(gpu, "pieces_each", lambda *_: 4)
    one, two = (run(given, gamma, backend="triton", chunk=16) for _ in range(2))
    for name in one:
        assert torch.equal(one[name], two[name]), name
        assert (one[name] - want[name]).norm() <= 1e-6 * want[name].norm(), name


@kernels
def test_a_nan_among_the_gates_is_seen():
    given = problem(19, B=1)
    given["lg"][0, 4, 1] = torch.nan
    y = scalar_scan(**given, gamma=0.9, backend="triton", chunk=16)[0]
    assert y[0, 4:, 1].isnan().all() and y[0, :, [0, 2, 3]].isfinite().all()


@NEEDS_TRITON
def test_one_program_adds_all_heads_of_a_group_where_that_keeps_the_device_busy(monkeypatch):
    device = type("Device", (), {"multi_processor_count": 100})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    cuda = torch.device("cuda")
    assert gpu.pieces_each(500, 24, cuda) == 24
    assert gpu.pieces_each(200, 24, cuda) == 12  # two programs a group: four an SM
    assert gpu.pieces_each(3, 24, cuda) == 1  # no more than there are pieces
    assert gpu.pieces_each(3, 24, torch.device("cpu")) == 24
