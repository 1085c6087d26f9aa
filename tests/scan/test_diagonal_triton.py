"""The Triton kernels of the diagonal scan against the loop in fp64: sequential and three-pass, in toy sizes.

Tests that call kernels are marked `cuda`: MUONLM_REHEARSE=1 TRITON_INTERPRET=1 pytest runs them interpreted. What the
scan gives as a whole is tested in test_device.py.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from muonlm.errors import UserError
from muonlm.scan import choose_backend, reference
from muonlm.scan import diagonal_triton as gpu

DEVICE = "cpu" if os.environ.get("MUONLM_REHEARSE") == "1" else "cuda"
NEEDS_TRITON = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="the package triton is not installed")
AHEAD = Path(__file__).parents[2] / "benchmarks" / "gpu_stages" / "ahead.py"


def kernels(test):
    return pytest.mark.cuda(NEEDS_TRITON(test))


# Relative Frobenius error of outputs and states, and of gradients; spec 8. fp32: only rounding and the order of sums
# differ, 3e-7 seen under the interpreter, and a device's exp is good to a few ulp. bf16: both sides get the same
# rounded inputs, so that gradients are off by their own rounding to bf16 alone (3e-3 seen).
FP32, BF16 = (5e-6, 5e-5), (1e-2, 2e-2)


def problem(*, mamba: bool, gamma: float, B=2, L=21, D=24, N=5, seed=0) -> dict:
    """Inputs of a scan whose gates spread over (0, 1), with initial states and a gradient for every output."""
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    s, k = torch.rand(B, L, D, generator=draw), normal(B, L, N)
    inputs = dict(
        delta=s if mamba else s / (1 + s * k.square().sum(-1, keepdim=True)),
        A=-3 * torch.rand(D, N, generator=draw) if mamba else None,
        w=normal(B, L, D),
        k=k,
        q=normal(B, L, N),
        S0=normal(B, N, D),
        M0=normal(B, N, D) if gamma else None,
    )
    grads = dict(gy=normal(B, L, D), gS=normal(B, N, D), gM=normal(B, N, D) if gamma else None)
    return dict(inputs=inputs, grads=grads, gamma=gamma, alpha=0.7)


def by_loop(inputs, grads, gamma, alpha, lengths=None) -> dict:
    """Outputs and gradients of reference.diag_scan in fp64, by autograd; gradients are named d_<input>."""
    x = {name: None if v is None else v.double().requires_grad_() for name, v in inputs.items()}
    gate = (x["delta"],) if x["A"] is None else (x["delta"], x["A"])
    outputs = reference.diag_scan(
        gate, x["w"], x["k"], x["q"], x["S0"], x["M0"], gamma=gamma, alpha=alpha, lengths=lengths
    )
    pairs = [(out, g.double()) for out, g in zip(outputs, grads.values()) if out is not None]
    torch.autograd.backward([out for out, _ in pairs], [g for _, g in pairs])
    found = dict(zip(("y", "S", "M"), outputs))
    found |= {f"d_{name}": None if v is None else v.grad for name, v in x.items()}
    return {name: None if v is None else v.detach() for name, v in found.items()}


def by_kernels(inputs, grads, gamma, alpha, lengths=None, *, chunk) -> dict:
    place = lambda v: None if v is None else v.to(DEVICE)  # noqa: E731
    delta, A, w, k, q, S0, M0 = map(place, inputs.values())
    lengths = place(lengths)
    y, S, M, Sc, Mc = gpu.forward(delta, A, w, k, q, S0, M0, gamma, alpha, lengths, chunk)
    back = gpu.backward(delta, A, w, k, q, Sc, Mc, gamma, alpha, lengths, chunk, *map(place, grads.values()))
    return dict(y=y, S=S, M=M) | {f"d_{name}": g for name, g in zip(inputs, back)}


def assert_close(got: dict, want: dict, tolerances: tuple[float, float]) -> None:
    assert got.keys() == want.keys()
    for name, exact in want.items():
        if exact is None:
            assert got[name] is None, name
            continue
        assert got[name].shape == exact.shape, name
        error = (got[name].double().cpu() - exact).norm() / exact.norm().clamp(min=1e-30)
        assert error < tolerances[name.startswith("d_")], f"{name}: {error:.1e}"


def assert_same(one: dict, other: dict) -> None:
    for name, value in one.items():
        assert (value is None and other[name] is None) or torch.equal(value, other[name]), name


@pytest.fixture
def form(monkeypatch):
    """form(workers, block) fixes the number of workers (1: sequential) and BLOCK_D, which the device would decide."""

    def fix(workers: int, block: int = 32):
        monkeypatch.setattr(gpu, "workers", lambda *_, **__: workers)
        monkeypatch.setattr(gpu, "tile", lambda N: (block, 1, 1))

    return fix


# workers 1: sequential. block 16: two blocks of channels, the second half empty. 21 tokens: ragged chunks and rungs.
CASES = {
    "longhorn with velocity, N 16, sequential": (dict(mamba=False, gamma=0.9, N=16), None, 1, 16, 16),
    "longhorn with velocity, N 4, three-pass": (dict(mamba=False, gamma=0.9, N=4), None, 2, 8, 32),
    "longhorn, N 5, three-pass, an empty row": (dict(mamba=False, gamma=0.0, N=5), (0, 18), 2, 8, 32),
    "mamba, N 16, sequential, a short row": (dict(mamba=True, gamma=0.0, N=16), (21, 6), 1, 8, 32),
    "mamba with velocity, N 4, sequential, an empty row": (dict(mamba=True, gamma=0.9, N=4), (18, 0), 1, 8, 16),
    "mamba with velocity, N 5, three-pass, a short row": (dict(mamba=True, gamma=0.9, N=5), (21, 13), 2, 8, 32),
}


@kernels
@pytest.mark.parametrize("case", CASES)
def test_sequential_and_three_pass_kernels_equal_the_loop(case, form):
    what, lengths, workers, chunk, block = CASES[case]
    form(workers, block)
    given = problem(**what) | dict(lengths=None if lengths is None else torch.tensor(lengths))
    got = by_kernels(**given, chunk=chunk)
    assert_close(got, by_loop(**given), FP32)
    for row, real in enumerate(lengths or ()):
        for name in ("y", "d_delta", "d_w", "d_k", "d_q"):
            assert not got[name][row, real:].any(), f"{name} at padding"


@kernels
@pytest.mark.parametrize("mamba, gamma, workers", [(False, 0.9, 1), (True, 0.0, 2)])
def test_the_kernels_compute_bf16_sequences_in_fp32(mamba, gamma, workers, form):
    form(workers)
    given = problem(mamba=mamba, gamma=gamma, N=4, L=21)
    for values, names in ((given["inputs"], ("delta", "w", "k", "q")), (given["grads"], ("gy",))):
        values |= {name: values[name].bfloat16() for name in names}
    got, want = by_kernels(**given, chunk=8), by_loop(**given)
    assert_close(got, want, BF16)
    assert all(got[f"d_{name}"].dtype == torch.bfloat16 for name in ("delta", "w", "k", "q"))
    unrounded = {name: got[name] for name in ("y", "S", "d_S0")}
    assert all(value.dtype == torch.float32 for value in unrounded.values())
    assert_close(unrounded, {name: want[name] for name in unrounded}, FP32)


@kernels
@pytest.mark.parametrize("workers", [1, 2])
def test_gates_near_zero_give_finite_gradients_equal_to_the_loop(workers, form):
    """One entry of k at 30, the others near 0: f = 1 − Δ k² is about 1e-3 there, and 0 to rounding at the last."""
    form(workers)
    given = problem(mamba=False, gamma=0.9, N=4, L=13)
    x = given["inputs"]
    x["k"] *= 1e-3
    x["k"][:, ::3, 1] = 30.0
    x["delta"] = 1 / (1 + x["k"].square().sum(-1, keepdim=True)) * torch.ones_like(x["w"])
    x["delta"][:, -1] = 1 / 900
    assert_close(by_kernels(**given, chunk=4), by_loop(**given), FP32)


@kernels
@pytest.mark.parametrize("mamba", [False, True])
def test_results_repeat_bit_for_bit_and_do_not_depend_on_the_number_of_workers(mamba, form):
    given = problem(mamba=mamba, gamma=0.9, N=4, L=7, B=1)
    form(2, 16)
    two = by_kernels(**given, chunk=2)
    assert_same(by_kernels(**given, chunk=2), two)
    form(3, 16)
    three = by_kernels(**given, chunk=2)
    two.pop("d_A"), three.pop("d_A")  # a sum over workers: repeatable, but its order is theirs
    assert_same(three, two)


@kernels
def test_the_kernels_read_strided_inputs_as_contiguous_ones(form):
    """k and q are slices of one projection, gy one number expanded, w transposed, Δ cut from a longer sequence."""
    form(1)
    given = problem(mamba=False, gamma=0.9, N=4, L=9)
    x, g = given["inputs"], given["grads"]
    x["k"], x["q"] = torch.cat([x["k"], torch.full((2, 9, 3), torch.nan), x["q"]], -1).split([4, 3, 4], -1)[::2]
    x["delta"] = torch.cat([x["delta"], torch.full((2, 4, 24), torch.nan)], 1)[:, :9]
    x["w"] = x["w"].mT.contiguous().mT
    g["gy"] = torch.tensor(0.3).expand(2, 9, 24)
    assert not any(v.is_contiguous() for v in (x["k"], x["q"], x["delta"], x["w"], g["gy"]))
    strided = by_kernels(**given, chunk=4)
    for values in (x, g):
        values |= {name: None if v is None else v.contiguous() for name, v in values.items()}
    assert_same(by_kernels(**given, chunk=4), strided)
    assert_close(strided, by_loop(**given), FP32)


@kernels
@pytest.mark.parametrize("L, workers", [(1, 1), (0, 1), (8, 2)])
def test_one_channel_one_state_and_missing_states_and_gradients_are_zeros(L, workers, form):
    form(workers)
    given = problem(mamba=False, gamma=0.5, B=1, L=L, D=1, N=1)
    inputs, grads = given["inputs"], given["grads"]
    got = by_kernels(inputs | dict(S0=None, M0=None), grads | dict(gS=None, gM=None), 0.5, 0.7, chunk=4)
    zero = torch.zeros(1, 1, 1)
    inputs, grads = inputs | dict(S0=zero, M0=zero), grads | dict(gS=zero, gM=zero)
    assert_same(by_kernels(inputs, grads, 0.5, 0.7, chunk=4), got)
    if L:
        assert_close(got, by_loop(inputs, grads, 0.5, 0.7), FP32)
    else:
        assert not any(v.any() for v in got.values() if v is not None)


@kernels
@pytest.mark.parametrize("workers", [1, 2])
def test_boundary_states_are_those_before_each_chunk(workers, form):
    form(workers)
    given = problem(mamba=True, gamma=0.9, N=4, L=10)
    x = given["inputs"]
    on_device = [v.to(DEVICE) for v in x.values()]
    _, _, _, Sc, Mc = gpu.forward(*on_device, 0.9, 0.7, None, 4)
    assert Sc.shape == Mc.shape == (2, 3, 4, 24)
    assert torch.equal(Sc[:, 0].cpu(), x["S0"]) and torch.equal(Mc[:, 0].cpu(), x["M0"])
    for j in (1, 2):
        first = x | {name: x[name][:, : 4 * j] for name in ("delta", "w", "k", "q")}
        want = by_loop(first, given["grads"] | dict(gy=torch.zeros(2, 4 * j, 24)), 0.9, 0.7)
        assert_close(dict(S=Sc[:, j], M=Mc[:, j]), {name: want[name] for name in ("S", "M")}, FP32)


@kernels
def test_more_states_than_registers_hold_are_refused():
    device = torch.device(DEVICE)
    assert choose_backend("diag_scan", "triton", device, torch.float32, 256) == "triton"
    with pytest.raises(UserError, match="`backend` = 'triton' holds at most 256 states, and `k` has 300; use auto"):
        choose_backend("diag_scan", "triton", device, torch.float32, 300)


@NEEDS_TRITON
def test_blocks_stay_within_the_registers():
    """16 cells of a tile a lane forward and 8 backward, as tile() promises, and a power of two of warps, at most 8."""
    for N in range(1, 257):
        block, forward, backward = gpu.tile(N)
        cells = gpu.triton.next_power_of_2(N) * block
        assert cells <= 16 * 32 * forward and cells <= 8 * 32 * backward, N
        assert forward in (1, 2, 4, 8) and backward in (1, 2, 4, 8), N


@NEEDS_TRITON
def test_only_rows_that_leave_the_device_idle_are_cut_into_passes(monkeypatch):
    device = type("Device", (), {"multi_processor_count": 100})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    cuda = torch.device("cuda")
    assert gpu.workers(400, 1, 64, cuda) == 1  # 4 warps an SM
    assert gpu.workers(400, 1, 64, cuda, enough=6) == 12  # 4 are not enough backward
    assert gpu.workers(100, 2, 64, cuda) == 24  # 2 an SM, 48 wanted
    assert gpu.workers(10, 1, 64, cuda) == 64  # no more than there are chunks
    assert gpu.workers(10, 1, 3, cuda) == 1  # too short to cut
    assert gpu.workers(10, 1, 64, torch.device("cpu")) == 1


def child(*argv: str, **env: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | env
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=env, timeout=600)


@NEEDS_TRITON
def test_the_kernels_compile_for_a_gpu_without_one(tmp_path):
    """The interpreter takes what the compiler refuses (types that change in a loop, say). All five for sm_80, bf16; the
    stage `kernels` compiles every scan's for sm_90, in a rehearsal too."""
    form = ("--arch", "80", "--dtype", "bfloat16", "--forms", "muon mamba")
    run = child(str(AHEAD), *form, TRITON_CACHE_DIR=str(tmp_path))
    assert run.returncode == 0, run.stdout + run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert all(0 < kernel["registers"] <= 255 for kernel in found)
    names = {kernel["kernel"] for kernel in found}
    assert {"summarize", "summarize_back", "boundaries", "forward_kernel", "backward_kernel"} <= names, names


REFUSED = """
import sys
import torch
from muonlm.scan import choose_backend
try: choose_backend("diag_scan", "triton", torch.device("cpu"), torch.float32)
except ValueError as error: print(type(error).__name__, error)
"""
MESSAGE = (
    "UserError `backend` = 'triton' needs a CUDA device (or TRITON_INTERPRET=1) and the package triton, "
    "and would run on cpu; use auto or chunked.\n"
)


def test_without_triton_the_module_imports_and_says_what_is_missing():
    run = child("-c", "import sys; sys.modules['triton'] = None" + REFUSED)
    assert run.stdout == MESSAGE, run


@NEEDS_TRITON
def test_tensors_off_the_device_are_refused():
    run = child("-c", REFUSED)
    assert run.stdout == MESSAGE, run
