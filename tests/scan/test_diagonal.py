"""The diagonal scan: every backend beside the loop that defines it, its gradients, and what may not go wrong."""

import math

import pytest
import torch

from muonlm.scan import diag_scan, gain, implicit_step, reference, write_norm
from muonlm.scan import diagonal_torch as chunked
from muonlm.scan.writes import normalize_matrix

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
    gate = (delta,) if A is None else (delta, A)
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
        assert error(found, true) < 5e-6  # fp32: other orders of sums


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


# --- the write's normalisation ----------------------------------------------------------------------------------------


def test_the_gain_is_the_published_table():
    table = [0.7010, 1.1136, 0.7207, 1.0900, 0.6964, 1.1188, 0.7277, 1.0810]
    assert [round(gain("newton_schulz", "quintic", s), 4) for s in range(1, 9)] == table
    assert [gain("newton_schulz", "cubic", s) for s in (1, 3)] == [1.0, 1.0] and gain("frobenius", "quintic", 3) == 1.0


@pytest.mark.parametrize("poly", ["quintic", "cubic"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_newton_schulz_on_a_rank_one_write_is_the_closed_form(poly, steps):
    """Values and gradients of the matrix iteration, wide and tall: k eᵀ has one singular value; φ acts on it alone."""
    g = torch.Generator().manual_seed(steps)
    for N, D in ((4, 24), (24, 4)):
        e, k = (torch.randn(5, n, generator=g, dtype=F64, requires_grad=True) for n in (D, N))
        weight = torch.randn(5, N, D, generator=g, dtype=F64)
        closed = k[..., None] * write_norm(e, k, gain("newton_schulz", poly, steps), 1e-6)[..., None, :]
        matrix = normalize_matrix(k[..., None] * e[..., None, :], steps=steps, poly=poly)
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


# --- through diag_scan with the compiled kernels ----------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "chunked", "reference"])
def test_half_precision_inputs_and_autocast_change_no_arithmetic(backend):
    """bf16 rounds the inputs; everything after is fp32, forward and backward, also where autocast is on."""
    for kind, gamma in KINDS:
        rounded = [x if x is None else x.detach().bfloat16() for x in inputs(kind, gamma)]
        plain = [x if x is None else x.float().requires_grad_() for x in rounded]
        true = results(kind, plain, gamma, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            found = results(kind, plain, gamma, backend=backend)
            if backend == "reference":  # its backward is autograd's, on which autocast has its hand
                found, true = found[:2], true[:2]
            y, S, _ = scan(kind, rounded, gamma, backend=backend)
        assert y.dtype == S.dtype == torch.float32
        assert error(found, true) < 1e-6 and error([y.double()], true[:1]) < 1e-6


def test_lengths_beyond_the_row_mean_its_end_and_may_change_after_the_forward_pass():
    for backend in ("cpu", "chunked"):
        for kind, gamma in KINDS:
            tensors = inputs(kind, gamma, dtype=torch.float32)
            true = results(kind, tensors, gamma, backend=backend, lengths=torch.tensor([37, 20, 5]))
            lengths = torch.tensor([99, 20, 5], dtype=torch.int32)
            y, S, _ = scan(kind, tensors, gamma, backend=backend, lengths=lengths)
            lengths.fill_(1)  # the backward pass has its own copy
            weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=F64)
            (grad,) = torch.autograd.grad((y.double() * weight).sum() + 0 * S.sum(), tensors[2])
            assert (
                error([y.double(), S.double()], true[:2]) < 1e-6
                and grad[2, 5:].abs().max() == 0 != grad[0, 36].abs().max()
            )


def test_shapes_that_do_not_fit_never_reach_the_kernels():
    delta, _, w, k, q, S0, M0 = (x if x is None else x.detach().float() for x in inputs("longhorn", 0.9))
    wrong = [
        {"gate": (delta[..., :1],)},
        {"k": k[:, :5]},
        {"q": q[..., :2]},
        {"S0": S0[:1]},
        {"lengths": torch.tensor([3])},
    ]
    for change in wrong:
        given = {"gate": (delta,), "w": w, "k": k, "q": q, "S0": S0, "M0": M0, "gamma": 0.9} | change
        with pytest.raises(AssertionError):
            diag_scan(**given)


def test_padding_may_hold_anything():
    """NaN beyond a row's end reaches neither outputs nor gradients."""
    lengths = torch.tensor([37, 20, 0])
    for backend in ("cpu", "chunked"):
        for kind, gamma in KINDS:
            clean = inputs(kind, gamma, dtype=torch.float32)
            true = results(kind, clean, gamma, backend=backend, lengths=lengths)
            dirty = [x if x is None else x.detach().clone() for x in clean]
            for i in (0, 2, 3, 4):
                dirty[i][1, 20:] = dirty[i][2] = float("nan")
            dirty = [x if x is None else x.requires_grad_() for x in dirty]
            assert error(results(kind, dirty, gamma, backend=backend, lengths=lengths), true) == 0


def test_a_compiled_model_calls_the_same_kernels():
    """Without the guard dynamo traces into numba, and results are silently wrong. One graph backend is enough."""
    tensors = [x if x is None else x.detach().float().requires_grad_() for x in inputs("mamba", 0.9)]
    compiled = torch.compile(lambda *args: scan("mamba", args, 0.9, backend="cpu")[0] * 2, backend="aot_eager")
    for length in (37, 20):
        part = [x[:, :length] if i in (0, 2, 3, 4) else x for i, x in enumerate(tensors)]
        assert error([compiled(*part).double()], [2 * scan("mamba", part, 0.9, backend="cpu")[0].double()]) == 0
        grads = (
            torch.autograd.grad(f.sum(), tensors)
            for f in (compiled(*part), 2 * scan("mamba", part, 0.9, backend="cpu")[0])
        )
        assert error(*([g.double() for g in one] for one in grads)) < 1e-6


def test_the_meta_device_knows_the_shapes():
    meta = [x if x is None else x.detach().to("meta", torch.float32) for x in inputs("longhorn", 0.9)]
    y, S, M = scan("longhorn", meta, 0.9)
    assert y.shape == (3, 37, 6) and S.shape == M.shape == (3, 4, 6)


def test_what_surrounds_the_scan_has_exact_gradients():
    """write_norm, also with k shared by heads and below its floor, and Longhorn's step, against finite differences."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=F64).requires_grad_()  # noqa: E731
    assert torch.autograd.gradcheck(lambda e, k: write_norm(e, k, 0.7, 1e-6), (draw(2, 3, 5), draw(2, 3, 4)))
    assert torch.autograd.gradcheck(lambda e, k: write_norm(e, k, 0.7, 1e-6), (draw(2, 3, 2, 5), draw(2, 3, 1, 4)))
    assert torch.autograd.gradcheck(lambda e, k: write_norm(e, k, 0.7, 1e3), (draw(2, 3, 5), draw(2, 3, 4)))
    assert torch.autograd.gradcheck(implicit_step, (draw(2, 3, 5), draw(2, 3, 4)))
    x, k = torch.tensor([[-90.0, 0.0, 90.0]], requires_grad=True), torch.full((1, 4), 30.0)
    implicit_step(x, k).sum().backward()  # s = 8e-40, ½, 1; n = 3600
    assert x.grad.isfinite().all()
