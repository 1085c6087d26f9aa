"""Muon and Newton-Schulz against references written here from the equations, in fp64 where it matters."""

import copy
import io
import math
import pickle

import pytest
import torch

import muonlm.optim.muon as muon_module
from muonlm.optim import Muon, newton_schulz
from muonlm.optim.newton_schulz import COEFFICIENTS, WHOLE, triples

SHAPES = [(24, 24), (48, 24), (24, 64)]


def tensors(shapes=SHAPES, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter((torch.randn(s, generator=g, dtype=torch.float64) * 0.1).to(dtype)) for s in shapes]


def feed(params, seed, scale=1.0):
    g = torch.Generator().manual_seed(1000 + seed)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=g, dtype=torch.float64) * scale).to(p.dtype)


def drive(optimizer, params, steps, first=0):
    for t in range(first, first + steps):
        feed(params, t)
        optimizer.step()


def polar(U, steps=5, name="polar_express", c0=1.02):
    """The iteration in fp64, on singular values: no product of matrices is shared with the code under test."""
    P, s, Qh = torch.linalg.svd(U.double(), full_matrices=False)
    s = s / (U.double().norm() * c0)
    for a, b, c in triples(name, steps):
        s = a * s + b * s**3 + c * s**5
    return P @ torch.diag(s) @ Qh


# ------------------------------------------------------------------------------------------------ Newton-Schulz

RANGES = [  # set, steps, output range for singular values in [1e-2, 1], from the scalar map (spec muon.md 1.2)
    ("keller", 5, 0.682, 1.134),
    ("you", 5, 0.978, 1.032),
    ("polar_express", 5, 0.859, 1.141),
    ("cans", 5, 0.884, 1.120),
    ("cubic", 5, 0.774, 1.300),
    ("deepseek", 10, 1.000, 1.000),
    ("accurate12", 12, 1.000, 1.000),
]


@pytest.mark.parametrize("name, steps, low, high", RANGES)
def test_singular_values_of_at_least_a_hundredth_land_in_the_published_range(name, steps, low, high):
    g = torch.Generator().manual_seed(0)
    s = torch.logspace(-2, 0, 64, dtype=torch.float64)
    P, Q = (torch.linalg.qr(torch.randn(64, 64, generator=g, dtype=torch.float64))[0] for _ in range(2))
    c0 = 1.02 if name == "polar_express" else 1.0
    s = s / s.norm()  # what the iteration sees: the range of the table needs s / c0 >= 1e-2, so keep only those
    out = newton_schulz(P @ torch.diag(s) @ Q.T, steps, name)
    got = (P.T @ out @ Q).diagonal()[s / c0 >= 1e-2]
    assert len(got) > 20 and got.min() > low - 2e-3 and got.max() < high + 2e-3  # the table has three digits


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("shape", [(32, 32), (64, 32), (32, 80), (3, 24, 40), (2, 2, 40, 24)])
def test_every_set_equals_the_scalar_map_of_the_singular_values(name, shape):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    steps = len(COEFFICIENTS[name]) if name in WHOLE else 5
    out = newton_schulz(G, steps, name).reshape(-1, *shape[-2:])
    for matrix, result in zip(G.reshape(-1, *shape[-2:]), out, strict=True):
        expected = polar(matrix, steps, name, 1.02 if name == "polar_express" else 1.0)
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)  # fp64 roundings grown by slopes up to 1e5


@pytest.mark.parametrize("name, cosine", [("keller", 0.97), ("polar_express", 0.99)])
def test_gaussian_matrices_come_close_to_their_polar_factor(name, cosine):
    G = torch.randn(96, 160, generator=torch.Generator().manual_seed(2))
    P, _, Qh = torch.linalg.svd(G, full_matrices=False)
    assert torch.cosine_similarity(newton_schulz(G, 5, name).flatten(), (P @ Qh).flatten(), dim=0) >= cosine


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e-8, 1e8, 1e30])
def test_the_scale_of_the_input_does_not_matter(scale):
    G = torch.randn(24, 40, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        newton_schulz(G * scale), newton_schulz(G), rtol=0, atol=2e-5
    )  # one rounding of G, amplified


def test_zero_gives_exactly_zero_and_subnormal_or_rank_one_input_is_finite():
    G = torch.randn(4, 16, 24, generator=torch.Generator().manual_seed(4))
    G[1] = 0
    G[2] = 1e-45
    G[3, :, 1:] = 0
    out = newton_schulz(G)
    assert torch.isfinite(out).all() and (out[1] == 0).all()
    assert out[2].norm() == pytest.approx(1.0, abs=0.16) and out[3].norm() == pytest.approx(1.0, abs=0.16)  # f(1/1.02)
    assert torch.isnan(newton_schulz(torch.full((4, 4), float("nan")))).all()


def test_symmetries_transpose_batch_and_rotation():
    g = torch.Generator().manual_seed(5)
    G = torch.randn(3, 24, 40, generator=g, dtype=torch.float64)
    Q, V = (torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0] for n in (24, 40))
    before = G.clone()
    torch.testing.assert_close(newton_schulz(G.mT), newton_schulz(G).mT, rtol=0, atol=0)
    torch.testing.assert_close(
        newton_schulz(G), torch.stack([newton_schulz(m) for m in G]), rtol=0, atol=1e-12
    )  # bmm vs mm
    torch.testing.assert_close(newton_schulz(Q @ G @ V), Q @ newton_schulz(G) @ V, rtol=0, atol=1e-10)
    assert torch.equal(G, before)


@pytest.mark.parametrize(
    "args, message",
    [
        ((0,), "ns_steps"),
        ((5, "polarexpress"), "polar_express"),
        ((5, [(1, 2)]), "triples"),
        ((5, "deepseek"), "use ns_steps=10"),
    ],
)
def test_bad_iterations_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        newton_schulz(torch.eye(3), *args)


# ------------------------------------------------------------------------------------------------ Muon


@pytest.mark.parametrize("mode", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov, decay", [(True, 0.0), (True, 0.1), (False, 0.1)])
def test_compat_torch_is_bit_equal_to_torch_optim_muon(mode, nesterov, decay):
    a, b = tensors(), tensors()
    ours = Muon(a, lr=0.01, weight_decay=decay, nesterov=nesterov, lr_mode=mode, compat="torch")
    theirs = torch.optim.Muon(b, lr=0.01, weight_decay=decay, nesterov=nesterov, adjust_lr_fn=mode)
    drive(ours, a, 20)
    drive(theirs, b, 20)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_batched_bf16_keller_stays_near_torch_optim_muon():
    a, b = tensors(), tensors()
    drive(Muon(a, lr=0.01, coefficients="keller", ns_dtype="bfloat16"), a, 20)
    drive(torch.optim.Muon(b, lr=0.01, weight_decay=0.0), b, 20)
    start = tensors()
    for p, q, s in zip(
        a, b, start, strict=True
    ):  # bf16 has 8 bits; normalising before or after the cast moves the last ones
        assert (p - q).norm() <= 2e-2 * (q - s).norm()


@pytest.mark.parametrize("mode", ["original", "match_rms_adamw", "spectral", "none"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("cautious", [True, False])
def test_fp32_steps_equal_an_fp64_reference_of_the_equations(mode, nesterov, cautious):
    params = tensors()
    W = [p.detach().double() for p in params]
    M = [torch.zeros_like(w) for w in W]
    lr, wd, mu = 0.02, 0.5, 0.9
    optimizer = Muon(params, lr, mu, nesterov, wd, cautious=cautious, lr_mode=mode, ns_dtype="float32")
    for t in range(5):
        feed(params, t)
        for i, p in enumerate(params):
            G = p.grad.double()
            M[i] = mu * M[i] + (1 - mu) * G
            O = polar((1 - mu) * G + mu * M[i] if nesterov else M[i])
            A, B = W[i].shape
            s = {
                "original": max(1, A / B) ** 0.5,
                "match_rms_adamw": 0.2 * max(A, B) ** 0.5,
                "spectral": (A / B) ** 0.5,
                "none": 1,
            }[mode]
            keep = (O * W[i] >= 0) if cautious else 1.0
            W[i] = W[i] - lr * wd * keep * W[i] - lr * s * O
        optimizer.step()
    for p, w in zip(params, W, strict=True):
        torch.testing.assert_close(
            p.double(), w, rtol=1e-4, atol=2e-5
        )  # fp32 products; square Gaussians have tiny sigmas


def test_cautious_decay_matches_a_two_by_two_by_hand():
    p = torch.nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
    p.grad = torch.eye(2)  # O = f(1/sqrt 2 / 1.02) I: agrees in sign with W at (0, 0) only
    o = float(polar(torch.eye(2))[0, 0])
    Muon([p], lr=0.1, weight_decay=0.5, cautious=True, ns_dtype="float32").step()
    torch.testing.assert_close(p.data, torch.tensor([[1 - 0.05 - 0.1 * o, 0], [0, -1 - 0.1 * o]]), rtol=1e-5, atol=1e-6)


def test_batches_equal_single_matrices_whatever_the_memory_limit():
    shapes = [(24, 48), (48, 24), (24, 48), (24, 24), (24, 48)]
    runs = []
    for limit in (1, 2 * 24 * 48 * 4, 2**28):
        params = tensors(shapes)
        optimizer = Muon(params, ns_dtype="float32", max_batch_bytes=limit)
        drive(optimizer, params, 3)
        assert optimizer.ns_calls == 5
        runs.append(torch.cat([p.detach().flatten() for p in params]))
    for r in runs[1:]:
        torch.testing.assert_close(r, runs[0], rtol=0, atol=1e-5)  # fp32 GEMMs of other sizes sum in another order


@pytest.mark.parametrize(
    "tag, cut",
    [
        ({"split": (0, [24, 16, 8])}, lambda t: t.split([24, 16, 8])),
        ({"heads": (0, 6)}, lambda t: t.split(8)),
        ({"split": (1, [16, 24])}, lambda t: t.split([16, 24], 1)),
        ({"heads": (1, 4)}, lambda t: t.split(10, 1)),
        ({"split": (0, [24, 16, 8]), "heads": (0, 6)}, lambda t: t.split([24, 16, 8])),
    ],
)
def test_a_split_parameter_moves_like_its_slices_by_hand(tag, cut):
    (whole,) = tensors([(48, 40)])
    parts = [torch.nn.Parameter(c.clone()) for c in cut(whole.data)]
    whole.muonlm = tag
    kwargs = {"lr": 0.05, "weight_decay": 0.1, "ns_dtype": "float32", "lr_mode": "original"}
    one, many = Muon([whole], **kwargs), Muon(parts, **kwargs)
    for t in range(3):
        feed([whole], t)
        for part, g in zip(parts, cut(whole.grad), strict=True):
            part.grad = g.clone()
        one.step()
        many.step()
    assert one.ns_calls == many.ns_calls == len(parts)
    for part, c in zip(parts, cut(whole.data), strict=True):
        torch.testing.assert_close(c, part.data, rtol=0, atol=1e-5)  # the order within a batch may differ


def test_convolutions_are_flattened_and_three_dimensions_are_a_stack():
    conv, stack = tensors([(24, 4, 3, 3), (3, 24, 32)])
    flat = torch.nn.Parameter(conv.detach().flatten(1).clone())
    loose = [torch.nn.Parameter(m.clone()) for m in stack.data]
    feed([conv, stack], 0)
    flat.grad = conv.grad.flatten(1)
    for p, g in zip(loose, stack.grad, strict=True):
        p.grad = g
    optimizer = Muon([{"params": [conv, stack], "use_muon": True}], ns_dtype="float32")
    optimizer.step()
    Muon([flat, *loose], ns_dtype="float32").step()
    assert optimizer.ns_calls == 4
    torch.testing.assert_close(conv.data.flatten(1), flat.data, rtol=0, atol=1e-6)
    torch.testing.assert_close(stack.data, torch.stack([p.data for p in loose]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_groups_are_bit_equal_to_torch_adamw_fused(dtype):
    shapes = [(24, 24), (7,), (), (3, 4, 5)]
    a, b = tensors(shapes, dtype=dtype), tensors(shapes, dtype=dtype)
    kwargs = {"lr": 3e-3, "betas": (0.8, 0.98), "eps": 1e-9, "weight_decay": 0.1}
    ours = Muon([{"params": a, "use_muon": False, **kwargs}])
    theirs = torch.optim.AdamW(b, fused=True, **kwargs)
    drive(ours, a, 10)
    drive(theirs, b, 10)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True)) and ours.ns_calls == 0


def test_a_zero_gradient_moves_nothing_and_a_missing_one_is_skipped():
    params = tensors()
    before = [p.detach().clone() for p in params]
    optimizer = Muon(params, ns_dtype="float32")
    params[0].grad, params[1].grad = torch.zeros_like(params[0]), torch.full_like(params[1], 1e-30)
    optimizer.step()
    assert torch.equal(params[0], before[0]) and torch.equal(params[2], before[2])
    assert params[2] not in optimizer.state and optimizer.ns_calls == 2
    assert (params[1] - before[1]).norm() > 0.01  # 1e-30 is a direction like any other


def make_mixed(dtype=torch.float32):
    params = tensors([*SHAPES, (24,)], dtype=dtype)
    groups = [
        {"params": params[:3], "use_muon": True, "name": "muon"},
        {"params": params[3:], "use_muon": False, "lr": 1e-3, "name": "rest"},
    ]
    return params, Muon(groups, momentum_schedule=[(0, 0.85), (300, 0.95)], weight_decay=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_in_the_middle_of_the_momentum_warmup_is_bit_exact(dtype):
    params, optimizer = make_mixed(dtype)
    drive(optimizer, params, 7)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    others, resumed = make_mixed(dtype)
    for p, q in zip(others, params, strict=True):
        p.data.copy_(q)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert resumed.state[others[0]]["momentum_buffer"].dtype == torch.float32
    drive(optimizer, params, 5, first=7)
    drive(resumed, others, 5, first=7)
    assert resumed.param_groups[0]["momentum"] == pytest.approx(0.85 + 0.1 * 11 / 300, abs=1e-12)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_and_pickles_go_on_like_the_original_with_their_splits(clone):
    params = tensors([(48, 24)])
    params[0].muonlm = {"split": (0, [24, 24])}
    optimizer = Muon(params, ns_dtype="float32")
    drive(optimizer, params, 2)
    other = clone(optimizer)
    twins = other.param_groups[0]["params"]
    drive(optimizer, params, 2, first=2)
    drive(other, twins, 2, first=2)
    assert other.ns_calls == 2 and torch.equal(params[0], twins[0]) and params[0] is not twins[0]


def test_momentum_follows_the_schedule_of_the_optimizers_own_steps():
    _params, optimizer = make_mixed()
    seen = []
    for _ in range(301):
        optimizer.step()  # no gradients: the step is counted all the same
        seen.append(optimizer.param_groups[0]["momentum"])
    assert [seen[t] for t in (0, 150, 300)] == [pytest.approx(m, abs=1e-12) for m in (0.85, 0.90, 0.95)]


def test_the_dtype_choice_is_made_once_stored_and_forced_by_the_environment(monkeypatch):
    params = tensors([(24, 48), (48, 24)])
    optimizer = Muon(params)
    drive(optimizer, params, 1)
    assert set(optimizer.param_groups[0]["ns_chosen"]) == {"24x48"}
    saved = optimizer.state_dict()
    saved["param_groups"][0]["ns_chosen"] = {"24x48": "direct bfloat16"}  # a file from another machine is obeyed
    a, b = tensors([(24, 48), (48, 24)]), tensors([(24, 48), (48, 24)])
    loaded, forced = Muon(a), Muon(b, ns_dtype="bfloat16")
    loaded.load_state_dict(saved)
    loaded.state.clear()
    drive(loaded, a, 1)
    drive(forced, b, 1)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    monkeypatch.setenv("MUONLM_NS_DTYPE", "half")
    with pytest.raises(ValueError, match="MUONLM_NS_DTYPE='half'"):
        drive(Muon(a), a, 1)


def test_closure_schedulers_and_late_groups_work():
    params, optimizer = make_mixed()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 / (1 + t))
    late = torch.nn.Parameter(torch.ones(24, 24))
    calls = []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in [*params, late])
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    scheduler.step()
    assert loss.requires_grad and len(calls) == 1
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 0.0005]
    optimizer.add_param_group({"params": [late]})
    optimizer.step(closure)
    assert optimizer.ns_calls == 4 and not torch.equal(late, torch.ones(24, 24))


def test_update_rms_is_the_predicted_one():
    for mode, s in (
        ("original", math.sqrt(2)),
        ("match_rms_adamw", 0.2 * math.sqrt(128)),
        ("spectral", math.sqrt(2)),
        ("none", 1.0),
    ):
        p = torch.nn.Parameter(torch.zeros(128, 64))
        feed([p], 0)
        Muon([p], lr=0.1, lr_mode=mode, ns_dtype="float32").step()
        # k of this set on a Gaussian is 1.01 +- .01 for square, up to 1.141 at the edge of its range for 2:1
        assert p.square().mean().sqrt().item() == pytest.approx(0.1 * s / math.sqrt(128), rel=0.142)


BAD = [
    ({"lr": -1.0}, "lr=-1.0"),
    ({"lr": float("nan")}, "lr=nan"),
    ({"momentum": 1.0}, "momentum=1.0"),
    ({"weight_decay": -0.1}, "weight_decay"),
    ({"lr_mode": "keller"}, "one of original"),
    ({"ns_dtype": "int8"}, "ns_dtype='int8'"),
    ({"momentum_schedule": [(5, 0.9), (1, 0.95)]}, "must rise"),
    ({"compat": "keller"}, 'compat="torch"'),
]


@pytest.mark.parametrize("kwargs, message", BAD)
def test_bad_hyperparameters_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Muon(tensors(), **kwargs)


BAD_GROUPS = [
    ({"shape": (24,)}, {}, "parameter w of shape|parameter w has shape"),
    ({"shape": (24,)}, {"use_muon": True}, "is no matrix.*use_muon=False"),
    ({"shape": (24, 24), "dtype": torch.complex64}, {}, "parameter w is torch.complex64"),
    ({"shape": (24, 24)}, {"use_muon": False}, "has no lr"),
    ({"shape": (24, 24)}, {"use_muon": False, "lr": 1e-3, "momentum": 0.9}, "sets momentum"),
    ({"shape": (24, 24)}, {"betas": (0.9, 0.9)}, "sets betas"),
    ({"shape": (24, 24)}, {"use_muon": False, "lr": 1e-3, "betas": (0.9, 1.0)}, "betas"),
    ({"shape": (24, 24)}, {"splits": [{"split": (0, [8, 8])}]}, "parameter w does not add up to its 24"),
    ({"shape": (24, 24)}, {"splits": [{"heads": (0, 5)}]}, "5 heads do not divide the 24"),
    ({"shape": (24, 24)}, {"splits": [{"heads": (2, 4)}]}, "along dimension 2"),
]


@pytest.mark.parametrize("tensor, group, message", BAD_GROUPS)
def test_tensors_and_groups_that_cannot_work_are_refused_by_name(tensor, group, message):
    p = torch.nn.Parameter(torch.zeros(tensor["shape"], dtype=tensor.get("dtype", torch.float32)))
    with pytest.raises(ValueError, match=message):
        Muon([{"params": [("w", p)], **group}])


def test_duplicates_sparse_gradients_and_equal_group_names_are_refused():
    p, q = tensors([(24, 24), (24, 24)])
    with pytest.raises(ValueError, match="more than one parameter group"):
        Muon([{"params": [p]}, {"params": [p]}])
    with pytest.raises(ValueError, match="two groups are named 'a'"):
        Muon([{"params": [p], "name": "a"}, {"params": [q], "name": "a"}])
    p.grad = torch.eye(24).to_sparse()
    with pytest.raises(ValueError, match="sparse gradient"):
        Muon([p]).step()


def test_loading_a_state_keeps_the_splits_of_the_model_at_hand():
    a, b = tensors([(48, 24)]), tensors([(48, 24)])
    b[0].muonlm = {"heads": (0, 4)}
    whole, heads = Muon(a, ns_dtype="float32"), Muon(b, ns_dtype="float32")
    drive(whole, a, 1)
    heads.load_state_dict(whole.state_dict())
    drive(heads, b, 1)
    assert heads.ns_calls == 4


def test_dtype_choices_made_ahead_are_those_of_the_first_step(monkeypatch):
    probed = []
    monkeypatch.setattr(
        muon_module, "probe_dtype", lambda rows, columns, count: probed.append((rows, columns, count)) or "bfloat16"
    )
    weights = [torch.nn.Parameter(torch.randn(s)) for s in ((16, 32), (32, 16), (48, 16))]
    weights[2].muonlm = {"split": (0, [16, 16, 16])}
    optimizer = Muon(weights)
    assert optimizer.choose_methods() == [{"16x32": "bfloat16", "16x16": "bfloat16"}]
    assert sorted(probed) == [(16, 16, 3), (16, 32, 2)]
    for w in weights:
        w.grad = torch.randn_like(w)
    optimizer.step()
    assert len(probed) == 2, "the step found every choice made"
