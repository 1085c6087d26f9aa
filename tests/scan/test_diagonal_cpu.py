"""The numba kernels of the diagonal scan against the fp64 loop of scan/reference.py.

Letters as there: B batch, L time, D channels, N states. Tolerances are relative Frobenius errors, and those of the
specification for fp32 kernels; measured: 4e-7 forward and 5e-7 in gradients. A wrong term costs 1e-2 or more.
"""

import math
import subprocess
import sys
import threading

import pytest
import torch

from muonlm.scan import diagonal_cpu as cpu
from muonlm.scan import reference

pytestmark = pytest.mark.skipif(not cpu.available(torch.device("cpu")), reason="numba is not installed")

FORWARD, GRADIENT = 5e-6, 5e-5
KINDS = [(gate, gamma) for gate in ("longhorn", "mamba") for gamma in (0.0, 0.9)]
NAMES = ("delta", "A", "w", "k", "q", "S0", "M0")


def inputs(gate, gamma, *, B=2, L=37, D=33, N=5, seed=0):
    """Random fp32 inputs by name, with starting states and, as gy, gS, gM, gradients into all outputs."""
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    x = {
        "delta": torch.rand(B, L, D, generator=draw),
        "A": None,
        "w": normal(B, L, D),
        "k": normal(B, L, N),
        "q": normal(B, L, N),
    }
    if gate == "mamba":
        x["A"] = -8 * torch.rand(D, N, generator=draw)
    else:
        x["delta"] = x["delta"] / (1 + x["delta"] * x["k"].square().sum(-1, keepdim=True))
    x |= {"S0": normal(B, N, D), "M0": normal(B, N, D) if gamma else None}
    return x | {"gy": normal(B, L, D), "gS": normal(B, N, D), "gM": normal(B, N, D) if gamma else None}


def kernel(x, gamma, *, alpha=0.7, lengths=None, chunk=16):
    """-> (y, S, M), the gradients by name."""
    five = [x[name] for name in NAMES[:5]]
    *out, Sc, Mc = cpu.forward(*five, x["S0"], x["M0"], gamma, alpha, lengths, chunk)
    return out, dict(zip(NAMES, cpu.backward(*five, Sc, Mc, gamma, alpha, lengths, chunk, x["gy"], x["gS"], x["gM"])))


def loop(x, gamma, *, alpha=0.7, lengths=None, gradients=True):
    """The same from the reference in fp64."""
    x = {name: None if v is None else v.double() for name, v in x.items()}
    leaves = {name: x[name].requires_grad_(gradients) for name in NAMES if x[name] is not None}
    gate = (x["delta"], x["A"]) if x["A"] is not None else (x["delta"],)
    out = reference.diag_scan(gate, *(x[n] for n in NAMES[2:]), gamma=gamma, alpha=alpha, lengths=lengths)
    if not gradients:
        return out, {}
    loss = sum((o * g).sum() for o, g in zip(out, (x["gy"], x["gS"], x["gM"])) if o is not None and g is not None)
    return out, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))


def error(a, b):
    assert a.shape == b.shape
    return ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()


def assert_equal_to_the_loop(x, gamma, *, lengths=None, chunk=16):
    (out, grads), (ref, ref_grads) = kernel(x, gamma, lengths=lengths, chunk=chunk), loop(x, gamma, lengths=lengths)
    assert (out[2] is None) == (gamma == 0)
    for name, a, b in zip(("y", "S", "M"), out, ref):
        assert a is None or error(a, b) < FORWARD, name
    assert {name for name, g in grads.items() if g is not None} == set(ref_grads)
    for name, b in ref_grads.items():
        assert error(grads[name], b) < GRADIENT, name
    return out, grads


@pytest.mark.parametrize("gate, gamma", KINDS)
@pytest.mark.parametrize(
    "L, D, N, chunk", [(1, 64, 16, 16), (2, 24, 4, 64), (37, 33, 5, 16), (64, 64, 16, 64), (65, 100, 16, 32)]
)
def test_outputs_states_and_gradients_equal_the_loop(gate, gamma, L, D, N, chunk):
    assert_equal_to_the_loop(inputs(gate, gamma, L=L, D=D, N=N), gamma, chunk=chunk)


@pytest.mark.parametrize("gate, gamma", KINDS)
def test_rows_stop_at_their_lengths_and_padding_gets_zeros_and_copied_states(gate, gamma):
    lengths, chunk = torch.tensor([0, 16, 23, 40]), 16
    x = inputs(gate, gamma, B=4, L=40, D=72)
    (y, S, M), grads = assert_equal_to_the_loop(x, gamma, lengths=lengths, chunk=chunk)
    padding = torch.arange(40) >= lengths[:, None]
    for sequence in (y, *(grads[name] for name in ("delta", "w", "k", "q"))):
        assert not sequence[padding].any()
    assert torch.equal(S[0], x["S0"][0]) and torch.equal(grads["S0"][0], x["gS"][0])
    *_, Sc, Mc = cpu.forward(*(x[n] for n in NAMES), gamma, 0.7, lengths, chunk)
    assert torch.equal(Sc[0], x["S0"][0].expand(3, -1, -1)) and torch.equal(Sc[1, 2], S[1])
    assert (
        Mc is None if gamma == 0 else torch.equal(Mc[0], x["M0"][0].expand(3, -1, -1)) and torch.equal(Mc[1, 2], M[1])
    )


def test_missing_states_and_missing_gradients_count_as_zeros():
    x = inputs("mamba", 0.9)
    zeros = {name: torch.zeros_like(x[name]) for name in ("S0", "M0", "gS", "gM")}
    (out, grads), (ref, ref_grads) = kernel(x | dict.fromkeys(zeros), 0.9), kernel(x | zeros, 0.9)
    assert all(torch.equal(a, b) for a, b in zip(out, ref))
    assert all(torch.equal(grads[name], ref_grads[name]) for name in NAMES)


@pytest.mark.parametrize("gate, gamma", KINDS)
def test_the_chunk_length_changes_no_bit(gate, gamma):
    """Boundary states are the very states of the loop, and every sum keeps its order."""
    x = inputs(gate, gamma, L=83, N=16)
    (out, grads), *others = [kernel(x, gamma, chunk=chunk) for chunk in (64, 8, 16)]
    for other, other_grads in others:
        assert all(a is None or torch.equal(a, b) for a, b in zip(out, other))
        assert all(g is None or torch.equal(g, other_grads[name]) for name, g in grads.items())


def test_two_backwards_are_bitwise_equal_whatever_the_number_of_threads():
    x = inputs("mamba", 0.9, B=3, L=128, D=200, N=16)  # above SERIAL: the pieces do go to several threads
    assert 3 * 128 * 200 * 16 > cpu.SERIAL
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            results.append(kernel(x, 0.9))
    finally:
        torch.set_num_threads(before)
    for out, grads in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(out, results[0][0]))
        assert all(torch.equal(grads[name], results[0][1][name]) for name in NAMES)


@pytest.mark.parametrize("gate, gamma", KINDS)
def test_a_gate_that_closes_loses_no_accuracy(gate, gamma):
    x = inputs(gate, gamma, N=16)
    if gate == "longhorn":  # Δ k² = 1 − 1e-3: the rest of k is ~0
        x["k"][:, 9] = 1e-3
        x["k"][:, 9, 3] = 30.0
        x["delta"][:, 9] = 1 / (1 + x["k"][:, 9].square().sum(-1, keepdim=True))
    else:
        x["A"][:, 2], x["delta"][:, 9] = -90.0, 1.0
        x["A"][:, 3] = -1e4  # far below the range of exp
    out, grads = assert_equal_to_the_loop(x, gamma)
    assert all(v is None or v.isfinite().all() for v in (*out, *grads.values()))


@pytest.mark.parametrize("gate, gamma", KINDS)
@pytest.mark.parametrize("zero", ["k", "w", "delta", "all"])
def test_zero_tokens_have_finite_gradients(gate, gamma, zero):
    x = inputs(gate, gamma)
    for name in ("delta", "w", "k", "q") if zero == "all" else (zero,):
        x[name][0] = 0
    _, grads = assert_equal_to_the_loop(x, gamma)
    assert all(g is None or g.isfinite().all() for g in grads.values())


@pytest.mark.parametrize("gate", ["longhorn", "mamba"])
def test_8192_tokens_stay_finite_and_accurate(gate):
    x = inputs(gate, 0.9, B=1, L=8192, D=16, N=4)
    x["delta"] *= 1e-3  # gates near 1: the state accumulates
    (out, grads), (ref, _) = kernel(x, 0.9, chunk=64), loop(x, 0.9, gradients=False)
    # 8192 roundings of 6e-8 add up to 5e-6 if all of one sign; f itself, rounded near 1, gives as much again
    assert all(error(a, b) < 1e-5 for a, b in zip(out, ref))
    assert all(g is None or g.isfinite().all() for g in grads.values())


def test_the_exponential_is_within_2e_7_of_the_exact_one():
    """Through the kernel: S = exp(Δ A) S0 with A = −1, S0 = 1 and nothing written. 2e-7: 3.4 units of the last bit."""
    x = torch.cat([torch.linspace(0, 87, 400_000), torch.logspace(-30, 0, 1_000)])
    one, none = torch.ones(1, 1, len(x)), torch.zeros(1, 1, 1)
    _, S, *_ = cpu.forward(x[None, None], -one[0].mT.contiguous(), one, none, none, one, None, 0.0, 1.0, None, 64)
    exact = torch.exp(-x.double())
    assert ((S[0, 0] - exact) / exact).abs().max() < 2e-7
    assert S[0, 0, 0] == 1, "a step of 0 must keep the state exactly"


def test_a_nan_is_passed_on_to_its_row_alone():
    x = inputs("mamba", 0.9)
    x["delta"][0, 5, 7] = math.nan
    (y, S, _), grads = kernel(x, 0.9)
    assert (
        y[0, 5:, 7].isnan().all()
        and S[0, :, 7].isnan().all()
        and y[0, :5].isfinite().all()
        and grads["k"][0].isnan().any()
    )
    assert y[1].isfinite().all() and y[0, :, :7].isfinite().all() and grads["k"][1].isfinite().all()


def test_python_threads_may_call_at_once():
    cases = [
        (gate, gamma, inputs(gate, gamma, B=3, L=128, D=200, N=16, seed=i)) for i, (gate, gamma) in enumerate(KINDS)
    ]
    alone = [kernel(x, gamma) for _, gamma, x in cases]
    same, before = [], torch.get_num_threads()

    def repeat(case, expected):
        torch.set_num_threads(2)  # per thread, so that each caller also asks the shared pool for help
        for _ in range(10):
            out, grads = kernel(case[2], case[1])
            equal = all(a is None or torch.equal(a, b) for a, b in zip(out, expected[0]))
            same.append(equal and all(g is None or torch.equal(g, expected[1][name]) for name, g in grads.items()))

    threads = [threading.Thread(target=repeat, args=pair) for pair in zip(cases, alone)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(before)
    assert len(same) == 40 and all(same)


@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_what_is_kept_for_backward_is_the_states_at_chunk_starts(gamma):
    B, D, N, chunk = 2, 48, 16, 16
    for L in (64, 65, 256):
        x = inputs("longhorn", gamma, B=B, L=L, D=D, N=N)
        y, S, M, *kept = cpu.forward(*(x[n] for n in NAMES), gamma, 1.0, None, chunk)
        size = sum(v.untyped_storage().nbytes() for v in kept if v is not None)
        assert size == 4 * B * math.ceil(L / chunk) * N * D * (2 if gamma else 1)
        assert y.untyped_storage().nbytes() == 4 * B * L * D


def test_without_numba_auto_takes_the_chunked_form_and_cpu_is_refused():
    code = """
import subprocess
import sys
sys.modules["numba"] = None
import torch
from muonlm.scan import choose_backend
device = torch.device("cpu")
print(choose_backend("diag_scan", "auto", device, torch.float32))
try: choose_backend("diag_scan", "cpu", device, torch.float32)
except ValueError as error: print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout == (
        "chunked\n`backend` = 'cpu' needs a CPU with FMA and the package numba, and would run on cpu; "
        "use auto or chunked.\n"
    )
