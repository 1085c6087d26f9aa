"""The matrix forms of the head recurrences against the loops of scan/reference.py.

Tolerances, relative Frobenius error. Measured in fp64: 3e-16 forward, 2e-15
gradients (allowed 1e-11, 1e-10: an error in a formula is far above either); in fp32: 2e-7 and 4e-7 (allowed 1e-5, and
1e-4 or 2e-4: sums of many rounded products, in another order on another machine).
"""

import functools
import inspect

import pytest
import torch

from muonlm import scan
from muonlm.scan import heads, reference

B, H, N, P = 3, 4, 6, 5
FORMS = [("scalar", 0.0), ("scalar", 0.9), ("delta", None), ("delta_momentum", 0.0), ("delta_momentum", 0.9)]
VELOCITY = dict(gamma=0.9, alpha=0.7, norm="newton_schulz", steps=1, poly="quintic", eps=1e-6)
each_form = pytest.mark.parametrize("form, gamma", FORMS)


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are small: threads would cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def names(form):
    value = "u" if form in ("delta", "velocity") else "w"
    wanted = ["lg", "b", value, "k", "q", "S0", "M0"]
    return [n for n in wanted if not (n == "b" and form == "scalar" or n == "M0" and form == "delta")]


def inputs(form, L, *, batch=B, G=H, dtype=torch.float64, N=N, P=P, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    k = torch.nn.functional.normalize(normal(batch, L, G, N), dim=-1)
    value = normal(batch, L, H, P)
    every = dict(
        lg=-normal(batch, L, H).abs() * 0.3,
        b=torch.sigmoid(normal(batch, L, H)),
        u=value,
        w=value,
        k=k,
        q=normal(batch, L, G, N),
        S0=normal(batch, H, N, P),
        M0=normal(batch, H, N, P),
    )
    return {n: every[n].to(dtype) for n in names(form)}


def options(form, gamma):
    return {"delta": {}, "velocity": VELOCITY}.get(form, dict(gamma=gamma, alpha=0.7))


def run(module, form, tensors, **kw):
    """The outputs that are not None, and the gradients of a random linear function of all of them (y, S and M)."""
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    outputs = [o for o in getattr(module, f"{form}_scan")(**leaves, **kw) if o is not None]
    draw = torch.Generator().manual_seed(1)
    loss = sum((o.double() * torch.randn(o.shape, generator=draw, dtype=torch.float64)).sum() for o in outputs)
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return outputs, {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(leaves, grads)}


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-6)).item()


def agree(form, gamma, tensors, forward=1e-11, backward=1e-10, loop=None, **kw):
    """`loop`: the tensors of the loop where they are not the same."""
    lengths = {"lengths": kw.pop("lengths")} if "lengths" in kw else {}
    got, got_grads = run(scan, form, tensors, **options(form, gamma), **lengths, **kw)
    want, want_grads = run(reference, form, loop or tensors, **options(form, gamma), **lengths)
    assert len(got) == len(want)
    for g, w in zip(got, want):
        assert g.shape == w.shape and torch.isfinite(g).all() and error(g, w) < forward
    for n in want_grads:
        assert torch.isfinite(got_grads[n]).all() and error(got_grads[n], want_grads[n]) < backward, n


@each_form
@pytest.mark.parametrize("L", [1, 2, 15, 16, 17, 63, 64, 65])
def test_outputs_states_and_gradients_equal_the_loop(form, gamma, L):
    agree(form, gamma, inputs(form, L, batch=2, N=4, P=3), chunk=16)


@each_form
@pytest.mark.parametrize("chunk", [8, 16, 64, 0])
def test_no_chunk_length_changes_the_result(form, gamma, chunk):
    agree(form, gamma, inputs(form, 70), chunk=chunk)


@each_form
@pytest.mark.parametrize("L", [1, 37])
def test_padding_writes_nothing_and_copies_both_states(form, gamma, L):
    tensors, lengths = inputs(form, L), torch.tensor([L, 0, L // 2])
    agree(form, gamma, tensors, lengths=lengths, chunk=16)
    y, S, *_ = getattr(scan, f"{form}_scan")(**tensors, **options(form, gamma), lengths=lengths, chunk=16)
    assert y[1].eq(0).all() and y[2, L // 2 :].eq(0).all() and error(S[1], tensors["S0"][1]) < 1e-15


@each_form
@pytest.mark.parametrize("G", [1, 2])
def test_a_group_of_heads_shares_its_keys_and_queries(form, gamma, G):
    agree(form, gamma, inputs(form, 37, G=G), chunk=16)


@pytest.mark.parametrize("gamma", [0.0, 0.9])
@pytest.mark.parametrize("cached", [1, 2 * 2 * N * P, 10**9])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_no_tiling_changes_the_result(gamma, cached, device, monkeypatch):
    """One row at a time, two rows and a rest, all of them; and, as off a CPU, all chunks at once."""
    tiles = heads._tiles
    monkeypatch.setattr(heads, "CACHED", cached)
    monkeypatch.setattr(heads, "_tiles", lambda *args: tiles(*args[:-1], torch.device(device)))
    agree("scalar", gamma, inputs("scalar", 37, G=2), lengths=torch.tensor([37, 0, 21]), chunk=8)


@each_form
def test_fp32_is_within_the_specified_error_of_the_fp64_loop(form, gamma):
    tensors = inputs(form, 150, batch=2, dtype=torch.float32, N=16, P=16)
    double = {n: t.double() for n, t in tensors.items()}
    agree(form, gamma, tensors, 1e-5, 1e-4 if form == "scalar" else 2e-4, loop=double, chunk=64)


@each_form
@pytest.mark.parametrize("lg", [-80.0, -1e4, -torch.inf])
@pytest.mark.parametrize("dtype, forward, backward", [(torch.float64, 1e-11, 1e-10), (torch.float32, 1e-5, 2e-4)])
def test_a_chunk_of_closed_gates_is_finite_and_equal_to_the_loop(form, gamma, lg, dtype, forward, backward):
    tensors = inputs(form, 40, dtype=dtype)
    tensors["lg"][:, 8:24] = lg
    agree(form, gamma, tensors, forward, backward, loop={n: t.double() for n, t in tensors.items()}, chunk=8)


@pytest.mark.parametrize("gamma", [0.0, 0.9])
@pytest.mark.parametrize("strength", [5.0, 13.7, 20.0])
def test_the_gradient_of_nearly_closed_gates_is_not_lost(gamma, strength):
    """It is e^−strength of what a token's own write, which passes no gate, contributes to y."""
    tensors = inputs("scalar", 40, dtype=torch.float32)
    tensors["lg"] = -strength * (0.9 + 0.2 * torch.rand(B, 40, H, generator=torch.Generator().manual_seed(2)))
    agree("scalar", gamma, tensors, 1e-5, 1e-5, loop={n: t.double() for n, t in tensors.items()}, chunk=16)


@each_form
def test_zero_keys_have_finite_gradients(form, gamma):
    tensors = inputs(form, 20)
    tensors["k"][:, 3:12] = 0
    agree(form, gamma, tensors, chunk=8)


@each_form
def test_gradients_equal_finite_differences(form, gamma):
    tensors = inputs(form, 5, batch=1, N=2, P=2)
    scan_of = getattr(scan, f"{form}_scan")

    def f(*leaves):
        outputs = scan_of(**dict(zip(tensors, leaves)), **options(form, gamma), lengths=torch.tensor([4]), chunk=2)
        return tuple(o for o in outputs if o is not None)

    leaves = [t.requires_grad_() for n, t in tensors.items()]
    if not gamma and "M0" in tensors:  # without momentum M0 is not read
        leaves.pop()
    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)


@each_form
def test_four_thousand_tokens_stay_finite(form, gamma):
    tensors = inputs(form, 4096, batch=1, dtype=torch.float32)
    if "lg" in tensors:
        tensors["lg"] *= 1e-3  # nearly open gates: the state is at its largest
    outputs, grads = run(scan, form, tensors, **options(form, gamma))
    assert all(torch.isfinite(t).all() for t in (*outputs, *grads.values()))


@each_form
def test_autocast_does_not_reach_the_products(form, gamma):
    """Bitwise: the same fp32 operations must run, in the forward and in the backward pass."""
    tensors = inputs(form, 40, dtype=torch.float32)
    plain, plain_grads = run(scan, form, tensors, **options(form, gamma), chunk=16)
    with torch.autocast("cpu", torch.bfloat16):
        got, grads = run(scan, form, tensors, **options(form, gamma), chunk=16)
    assert all(map(torch.equal, plain, got)) and all(torch.equal(grads[n], plain_grads[n]) for n in grads)


@each_form
def test_bf16_inputs_are_widened_first(form, gamma):
    low = inputs(form, 40, dtype=torch.bfloat16)
    wide = {n: t.float() for n, t in low.items()}
    got, want = (run(scan, form, t, **options(form, gamma))[0] for t in (low, wide))
    for a, b in zip(got, want):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@each_form
def test_one_token_at_a_time_equals_the_whole_sequence(form, gamma):
    tensors = inputs(form, 9)
    step = functools.partial(getattr(scan, f"{form}_scan"), **options(form, gamma))
    whole = step(**tensors, chunk=4)
    states = {n: t for n, t in tensors.items() if n in ("S0", "M0")}
    for t in range(9):
        y, *new = step(**{n: x[:, t : t + 1] for n, x in tensors.items() if n not in states}, **states)
        assert error(y[:, 0], whole[0][:, t]) < 1e-11
        states = dict(zip(states, new))
    assert all(error(a, b) < 1e-11 for a, b in zip(new, whole[1:]) if a is not None)


def test_without_momentum_the_open_loop_is_the_delta_rule():
    t = inputs("delta", 50)
    y, S = scan.delta_scan(**t, chunk=16)
    w = t.pop("u") * t["b"].unsqueeze(-1)
    y2, S2, M = scan.delta_momentum_scan(**t, w=w, gamma=0.0, alpha=1.0, chunk=16)
    assert M is None and error(y2, y) < 1e-11 and error(S2, S) < 1e-11


def test_without_momentum_the_velocity_is_not_returned():
    assert scan.scalar_scan(**inputs("scalar", 20), gamma=0.0)[2] is None
    assert scan.scalar_scan(**inputs("scalar", 20), gamma=0.5)[2] is not None


def outside(name):
    module = pytest.importorskip("fla.ops.gated_delta_rule.naive", reason="flash-linear-attention is not installed")
    return inspect.unwrap(getattr(module, name))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["naive_recurrent_gated_delta_rule", "naive_chunk_gated_delta_rule"])
def test_flash_linear_attention_computes_the_same_delta_rule(name):
    """1e-5: theirs is fp32."""
    t = inputs("delta", 50, dtype=torch.float32)
    y, S = scan.delta_scan(**t, chunk=16)
    theirs = outside(name)(
        q=t["q"], k=t["k"], v=t["u"], beta=t["b"], g=t["lg"], scale=1.0, initial_state=t["S0"], output_final_state=True
    )
    assert error(y, theirs[0]) < 1e-5 and error(S, theirs[1]) < 1e-5


@pytest.mark.parametrize("norm, steps", [("newton_schulz", 2), ("frobenius", 1), ("none", 1)])
def test_the_velocity_form_equals_its_loop(norm, steps, monkeypatch):
    monkeypatch.setitem(VELOCITY, "norm", norm)
    monkeypatch.setitem(VELOCITY, "steps", steps)
    agree("velocity", None, inputs("velocity", 21, G=2), lengths=torch.tensor([21, 0, 13]), chunk=8)
    agree("velocity", None, inputs("velocity", 21), chunk=64)


def test_the_velocity_form_in_fp32_is_within_the_specified_error():
    tensors = inputs("velocity", 60, dtype=torch.float32)
    agree("velocity", None, tensors, 1e-4, 1e-3, loop={n: t.double() for n, t in tensors.items()}, chunk=16)


@pytest.mark.parametrize("form, gamma", [*FORMS, ("velocity", None)])
def test_saved_memory_is_linear_in_the_length_and_holds_no_state_per_token(form, gamma):
    wide = 16
    state = H * wide * wide * 4

    def saved(L):
        tensors = inputs(form, L, batch=1, dtype=torch.float32, N=wide, P=wide)
        leaves = {n: t.requires_grad_() for n, t in tensors.items()}
        seen = {}

        def pack(t):
            storage = t.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes(), t  # held, so that no address is used twice
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = getattr(scan, f"{form}_scan")(**leaves, **options(form, gamma), chunk=16)
        del out
        return sum(n for n, _ in seen.values())

    short, long = saved(64), saved(128)
    assert long < 2.1 * short  # linear; the margin is the state one past the last chunk
    assert long < 0.75 * 128 * state  # a state per token alone would be 128 of them
