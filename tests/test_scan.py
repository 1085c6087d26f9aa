"""The diagonal scan: every backend beside the loop that defines it, its gradients, and what may not go wrong."""

import math

import pytest
import torch

from muonlm.config import UserError
from muonlm.scan import chunked, choose_backend, diag_scan, gain, reference, write_norm
from muonlm.scan.writes import newton_schulz

F64 = torch.float64
KINDS = [("longhorn", 0.0), ("longhorn", 0.9), ("mamba", 0.0), ("mamba", 0.9)]


def inputs(kind, gamma, B=3, L=37, D=6, N=4, dtype=F64, seed=0):
    """[Δ, A or None, w, k, q, S0, M0 or None] of sizes that occur: Δ of Longhorn as its closed form gives it."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=F64)  # noqa: E731
    k, q, w, s = draw(B, L, N), draw(B, L, N), draw(B, L, D), draw(B, L, D).sigmoid()
    delta = s if kind == "mamba" else s / (1 + s * k.square().sum(-1, keepdim=True))
    A = -torch.rand(D, N, generator=g, dtype=F64) * 3 if kind == "mamba" else None
    states = [draw(B, N, D), draw(B, N, D) if gamma else None]
    return [None if x is None else x.to(dtype).requires_grad_() for x in (delta, A, w, k, q, *states)]


def scan(kind, tensors, gamma, **options):
    delta, A, w, k, q, S0, M0 = tensors
    gate = (kind, delta) if A is None else (kind, delta, A)
    return diag_scan(gate, w, k, q, S0, M0, gamma=gamma, alpha=0.7, **options)


def results(kind, tensors, gamma, **options):
    """Outputs, and gradients of a loss that sees y, S and M, as fp64."""
    outs = [x for x in scan(kind, tensors, gamma, **options) if x is not None]
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(7), dtype=F64) for x in outs]
    loss = sum((x.double() * w).sum() for x, w in zip(outs, weights))
    leaves = [x for x in tensors if x is not None]
    return [x.detach().double() for x in (*outs, *torch.autograd.grad(loss, leaves))]


def error(found, true):
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(found, true, strict=True))


@pytest.mark.parametrize("lengths", [None, [37, 20, 0]], ids=["full", "padded"])
@pytest.mark.parametrize(("kind", "gamma"), KINDS)
@pytest.mark.parametrize("scratch", [1 << 24, 1], ids=["at once", "chunk by chunk"])
def test_the_chunked_form_is_the_loop(kind, gamma, lengths, scratch, monkeypatch):
    monkeypatch.setattr(chunked, "SCRATCH", scratch)
    lengths = None if lengths is None else torch.tensor(lengths)
    tensors = inputs(kind, gamma)
    true = results(kind, tensors, gamma, backend="reference", lengths=lengths)
    for chunk in (1, 8, 16, 37, 64):
        found = results(kind, tensors, gamma, backend="chunked", chunk=chunk, lengths=lengths)
        assert error(found, true) < 1e-11, chunk  # fp64, sums of 37 terms


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9])
def test_lengths_around_a_chunk(length):
    for kind, gamma in KINDS:
        tensors = inputs(kind, gamma, L=length)
        true = results(kind, tensors, gamma, backend="reference")
        assert error(results(kind, tensors, gamma, backend="chunked", chunk=8), true) < 1e-11


@pytest.mark.parametrize(("kind", "gamma"), KINDS)
def test_all_gradients_are_those_of_finite_differences(kind, gamma):
    tensors = inputs(kind, gamma, B=2, L=5, D=3, N=2)
    given = [x for x in tensors if x is not None]

    def run(*values):
        values = iter(values)
        outs = scan(kind, [None if x is None else next(values) for x in tensors], gamma, backend="chunked", chunk=2)
        return tuple(x for x in outs if x is not None)

    assert torch.autograd.gradcheck(run, given)


def test_fp32_stays_close_to_fp64():
    for kind, gamma in KINDS:
        true = results(kind, inputs(kind, gamma), gamma, backend="reference")
        found = results(kind, inputs(kind, gamma, dtype=torch.float32), gamma, backend="chunked", chunk=8)
        assert error(found, true) < 5e-6  # mixers.md §8


def test_a_sequence_may_be_cut_anywhere():
    for kind, gamma in KINDS:
        delta, A, w, k, q, S0, M0 = inputs(kind, gamma)
        y, S, M = scan(kind, (delta, A, w, k, q, S0, M0), gamma, backend="chunked", chunk=8)
        parts, state = [], (S0, M0)
        for piece in (slice(0, 5), slice(5, 6), slice(6, 37)):
            part, *state = scan(kind, (delta[:, piece], A, w[:, piece], k[:, piece], q[:, piece], *state), gamma,
                                backend="chunked", chunk=8)  # fmt: skip
            parts.append(part)
        assert error([torch.cat(parts, 1), state[0]], [y, S]) < 1e-12
        assert (M is None) == (gamma == 0) and (M is None or error([state[1]], [M]) < 1e-12)


def test_a_gate_of_zero_hurts_nothing():
    """f = 0 exactly (Δ k² = 1) and f = exp(−200): nothing may be divided by it, and no logarithm taken."""
    for kind, gamma in KINDS:
        tensors = inputs(kind, gamma)
        with torch.no_grad():
            tensors[3][:, 11] = 0
            tensors[3][:, 11, 1] = 30
            tensors[0][:, 11] = 1 / 900 if kind == "longhorn" else 200
            tensors[2][:, 20], tensors[3][:, 21], tensors[4][:, 22] = 0, 0, 0
        true = results(kind, tensors, gamma, backend="reference")
        found = results(kind, tensors, gamma, backend="chunked", chunk=8)
        assert all(x.isfinite().all() for x in found)
        assert error(found, true) < 1e-11


def test_saved_memory_grows_with_the_chunks_and_not_with_every_state():
    """Stored: inputs, outputs and N·D numbers a chunk; never N·D numbers a token."""

    def saved(L):
        sizes = []
        tensors = inputs("longhorn", 0.9, B=1, L=L, D=32, N=16, dtype=torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            scan("longhorn", tensors, 0.9, backend="chunked", chunk=64)
        return sum(sizes)

    per_token = (saved(1024) - saved(512)) / 512
    assert per_token == 2 * 32 + 2 * 16 + 2 * 32 * 16 / 64  # Δ, w; k, q; S and M once in 64 tokens


# --- choosing -----------------------------------------------------------------------------------------------------------------


def test_auto_takes_what_can_run_here():
    cpu = torch.device("cpu")
    assert choose_backend("auto", cpu, torch.float32) == "cpu"  # numba is a dependency
    assert choose_backend("auto", cpu, F64) == "chunked"
    assert choose_backend("auto", torch.device("meta"), torch.float32) == "chunked"
    assert choose_backend("reference", cpu, torch.float32) == "reference"


@pytest.mark.parametrize(("backend", "dtype", "says"), [("cpu", F64, "fp64"), ("numba", torch.float32, "not known")])
def test_a_backend_that_cannot_run_is_refused(backend, dtype, says):
    with pytest.raises(UserError, match=says):
        choose_backend(backend, torch.device("cpu"), dtype)


# --- the write's normalisation -------------------------------------------------------------------------------------------------


def test_the_gain_is_the_published_table():
    table = [0.7010, 1.1136, 0.7207, 1.0900, 0.6964, 1.1188, 0.7277, 1.0810]
    assert [round(gain("newton_schulz", "quintic", s), 4) for s in range(1, 9)] == table
    assert [gain("newton_schulz", "cubic", s) for s in (1, 3)] == [1.0, 1.0] and gain("frobenius", "quintic", 3) == 1.0


@pytest.mark.parametrize("poly", ["quintic", "cubic"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_newton_schulz_on_a_rank_one_write_is_the_closed_form(poly, steps):
    """Values and gradients of the matrix iteration, both orientations: k eᵀ has one singular value, and φ acts on it alone."""
    g = torch.Generator().manual_seed(steps)
    for N, D in ((4, 24), (24, 4)):
        e, k = (torch.randn(5, n, generator=g, dtype=F64, requires_grad=True) for n in (D, N))
        weight = torch.randn(5, N, D, generator=g, dtype=F64)
        closed = k[..., None] * write_norm(e, k, gain("newton_schulz", poly, steps), 1e-6)[..., None, :]
        matrix = newton_schulz(k[..., None] * e[..., None, :], steps=steps, poly=poly)
        assert error([closed], [matrix]) < 1e-13
        found, true = (torch.autograd.grad((x * weight).sum(), (e, k)) for x in (closed, matrix))
        assert error(found, true) < 1e-12


def test_a_silent_token_writes_nothing_and_has_finite_gradients():
    e, k = torch.zeros(3, 8, requires_grad=True), torch.zeros(3, 4, requires_grad=True)
    write_norm(e, k, 0.7, 1e-6).sum().backward()
    assert e.grad.isfinite().all() and k.grad.isfinite().all() and e.grad.abs().max() > 0
    small = torch.full((1, 8), 1e-9)  # below the floor the map is linear
    ones = torch.ones(1, 4)
    torch.testing.assert_close(write_norm(2 * small, ones, 0.7, 1e-6), 2 * write_norm(small, ones, 0.7, 1e-6))


def test_the_size_of_value_and_key_does_not_matter():
    g = torch.Generator().manual_seed(0)
    e, k = torch.randn(5, 8, generator=g, dtype=F64), torch.randn(5, 4, generator=g, dtype=F64)
    write = lambda e, k: k[..., None] * write_norm(e, k, 0.7, 1e-6)[..., None, :]  # noqa: E731
    assert error([write(7 * e, k), write(e, 7 * k)], [write(e, k)] * 2) < 1e-13
    assert math.isclose(float(write(e, k)[0].norm()), 0.7, rel_tol=1e-12)


def test_real_tokens_of_lengths():
    assert reference.real_tokens(torch.tensor([2, 0]), 2, 3, "cpu").tolist() == [[True, True, False], [False] * 3]
