"""The Muon optimizer's arithmetic against references written here from the equations, in fp64 where it matters."""

import math

import pytest
import torch

from muonlm.optim import Muon
from muonlm.optim.muon.newton_schulz import newton_schulz

SHAPES = [(24, 24), (48, 24), (24, 64)]
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
KELLER = [(3.4445, -4.7750, 2.0315)] * 5
EXACT = {"ns_method": "direct", "ns_dtype": "float32"}  # no probe: the same arithmetic on every machine


def tensors(shapes=SHAPES, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter((torch.randn(s, generator=g, dtype=torch.float64) * 0.1).to(dtype)) for s in shapes]


def gradients(shapes, t, scale=1.0):
    g = torch.Generator().manual_seed(1000 + t)
    return [torch.randn(s, generator=g, dtype=torch.float64) * scale for s in shapes]


def feed(params, t, scale=1.0):
    for p, g in zip(params, gradients([p.shape for p in params], t, scale), strict=True):
        p.grad = g.to(p.dtype)


def drive(optimizer, params, steps, first=0, scale=1.0):
    for t in range(first, first + steps):
        feed(params, t, scale)
        optimizer.step()


def flat(params):
    return torch.cat([p.detach().flatten().double() for p in params])


def polar(U, schedule=POLAR_EXPRESS, c0=1.02):
    """NS on singular values in fp64: no product of matrices is shared with the code under test."""
    P, s, Qh = torch.linalg.svd(U.double(), full_matrices=False)
    s = s / (U.double().norm() * c0) if U.any() else s
    for a, b, c in schedule:
        s = a * s + b * s**3 + c * s**5
    return P @ torch.diag(s) @ Qh


FACTORS = {
    "original": lambda A, B: max(1.0, A / B) ** 0.5,
    "match_rms_adamw": lambda A, B: 0.2 * max(A, B) ** 0.5,
    "spectral": lambda A, B: (A / B) ** 0.5,
    "none": lambda A, B: 1.0,
}


class Reference:
    """Muon of one matrix in fp64, one equation to a line."""

    def __init__(
        self, W, lr=0.02, mu=0.95, nesterov=True, wd=0.0, form="ema", decay="decoupled", mode="original", **ns
    ):
        self.W, self.M = W.detach().double().clone(), torch.zeros(W.shape, dtype=torch.float64)
        self.lr, self.mu, self.nesterov, self.wd = lr, mu, nesterov, wd
        self.form, self.decay, self.mode, self.ns = form, decay, mode, ns

    def step(self, G):
        lr, mu, wd, W = self.lr, self.mu, self.wd, self.W
        G = G.double() + (wd * W if self.decay == "coupled" else 0.0)
        gain = 1 - mu if self.form == "ema" else 1.0
        self.M = mu * self.M + gain * G
        U = gain * G + mu * self.M if self.nesterov else self.M
        O = self.O = polar(U, **self.ns)
        keep = {"decoupled": 1.0, "coupled": 0.0, "cautious": (O * W >= 0).double()}[self.decay]
        self.W = W - lr * wd * keep * W - lr * FACTORS[self.mode](*W.shape) * O


def compare(params, references, optimizer, steps, atol=2e-5, rtol=1e-4):
    """fp32 products against fp64: square Gaussians have singular values near 0, where the map's slope of 1000 shows."""
    for t in range(steps):
        feed(params, t)
        for p, r in zip(params, references, strict=True):
            r.step(p.grad)
        optimizer.step()
    for p, r in zip(params, references, strict=True):
        torch.testing.assert_close(p.detach().double(), r.W, rtol=rtol, atol=atol)


# ------------------------------------------------------------------------------------------------ torch.optim.Muon


TORCHS = {"lr": 1e-3, "weight_decay": 0.1}  # its defaults


@pytest.mark.parametrize("mode", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compat_torch_is_bit_equal_to_torch_optim_muon_for_fifty_steps(mode, nesterov, decay, dtype):
    a, b = tensors(dtype=dtype), tensors(dtype=dtype)
    if dtype == torch.bfloat16 and not nesterov:
        pytest.skip("torch 2.13 normalises its own momentum buffer here: .bfloat16() of a bf16 tensor is no copy")
    ours = Muon(a, lr=0.01, weight_decay=decay, nesterov=nesterov, lr_mode=mode, compat="torch")
    theirs = torch.optim.Muon(b, lr=0.01, weight_decay=decay, nesterov=nesterov, adjust_lr_fn=mode)
    drive(ours, a, 50)
    drive(theirs, b, 50)
    for p, q in zip(a, b, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(ours.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"])


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ({"lr_mode": "match_rms_adamw"}, {"adjust_lr_fn": "match_rms_adamw"}),
        ({"coefficients": [(2.0, -1.5, 0.5)], "ns_steps": 7}, {"ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 7}),
        ({"momentum": 0.5, "nesterov": False}, {"momentum": 0.5, "nesterov": False}),
    ],
)
def test_compat_torch_follows_the_settings_that_torch_has(ours, theirs):
    a, b = tensors(), tensors()
    drive(Muon(a, compat="torch", **TORCHS, **ours), a, 5)
    drive(torch.optim.Muon(b, **TORCHS, **theirs), b, 5)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_compat_torch_keeps_the_clamp_of_tiny_gradients_and_follows_a_scheduler():
    a, b = tensors(), tensors()
    pairs = [(Muon(a, compat="torch", **TORCHS), a), (torch.optim.Muon(b, **TORCHS), b)]
    for optimizer, params in pairs:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        for t, scale in enumerate((1e-9, 1e-12, 1.0)):
            feed(params, t, scale)
            optimizer.step()
            scheduler.step()
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_compat_torch_takes_a_tensor_rate_like_torch():
    a, b = tensors(), tensors()
    drive(Muon(a, lr=torch.tensor(0.02), weight_decay=0.1, compat="torch"), a, 5)
    drive(torch.optim.Muon(b, lr=torch.tensor(0.02)), b, 5)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("kwargs", [{"coefficients": "polar_express"}, {"ns_method": "gram"}, {"ns_dtype": "float32"}])
def test_compat_torch_obeys_or_refuses_what_is_set_beside_it_but_never_ignores_it(kwargs):
    """Only arguments left unset take the mode's defaults."""
    try:
        optimizer = Muon(tensors(), compat="torch", **kwargs)
    except ValueError as refusal:
        assert next(iter(kwargs)) in str(refusal)
    else:
        key, value = next(iter(kwargs.items()))
        assert optimizer.param_groups[0][key] == value


@pytest.mark.parametrize("batched", [True, False])
def test_bf16_keller_stays_near_torch_optim_muon(batched):
    a, b = tensors(), tensors()
    drive(
        Muon(a, lr=0.01, coefficients="keller", ns_method="direct", ns_dtype="bfloat16", batch_by_shape=batched), a, 50
    )
    drive(torch.optim.Muon(b, lr=0.01, weight_decay=0.0), b, 50)
    for p, q in zip(a, b, strict=True):  # bf16 has 8 bits, and the norm is taken before or after the cast
        assert (p - q).norm() <= 1e-2 * q.norm()


# ------------------------------------------------------------------------------------------------ references


@pytest.mark.parametrize("mode", FACTORS)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("form", ["ema", "classical"])
@pytest.mark.parametrize("decay", ["decoupled", "cautious", "coupled"])
@pytest.mark.filterwarnings("ignore:decoupled_wd")
def test_fp32_steps_equal_an_fp64_reference_of_the_equations(mode, nesterov, form, decay):
    params = tensors()
    references = [Reference(p, 0.02, 0.9, nesterov, 0.5, form, decay, mode) for p in params]
    optimizer = Muon(
        params,
        0.02,
        0.9,
        nesterov,
        0.5,
        momentum_form=form,
        decoupled_wd=decay != "coupled",
        cautious=decay == "cautious",
        lr_mode=mode,
        **EXACT,
    )
    compare(params, references, optimizer, 5)


def test_fp64_parameters_are_trained_in_fp64():
    params = tensors(dtype=torch.float64)
    references = [Reference(p, 0.02, 0.95, True, 0.1) for p in params]
    optimizer = Muon(params, 0.02, weight_decay=0.1)
    compare(params, references, optimizer, 5, atol=1e-11, rtol=1e-11)  # slope 1e3 x 1e-16 x 5 steps
    assert all(state["momentum_buffer"].dtype == torch.float64 for state in optimizer.state.values())


def test_one_group_may_hold_fp32_and_fp64_parameters_of_one_shape():
    params = [*tensors([(24, 64)]), *tensors([(24, 64)], seed=1, dtype=torch.float64)]
    references = [Reference(p) for p in params]
    optimizer = Muon(params, ns_method="auto")
    compare(params, references, optimizer, 2, atol=0.05)  # the fp32 one may run in bf16
    torch.testing.assert_close(params[1].data, references[1].W, rtol=0, atol=1e-11)


def test_kellers_settings_repeat_his_published_loop():
    """github.com/KellerJordan/Muon: lerp momentum, Nesterov lerp, keller x5, decoupled decay, sqrt(max(1, rows /
    cols))."""
    params = tensors()
    W = [p.detach().double() for p in params]
    B = [torch.zeros_like(w) for w in W]
    lr, wd, beta = 0.02, 0.1, 0.95
    optimizer = Muon(params, lr, beta, True, wd, coefficients="keller", **EXACT)
    for t in range(5):
        feed(params, t)
        for i, p in enumerate(params):
            B[i] = B[i] + (1 - beta) * (p.grad.double() - B[i])
            update = p.grad.double() + beta * (B[i] - p.grad.double())
            update = polar(update, KELLER, 1.0) * max(1, W[i].shape[0] / W[i].shape[1]) ** 0.5
            W[i] = W[i] * (1 - lr * wd) - lr * update
        optimizer.step()
    for p, w in zip(params, W, strict=True):
        torch.testing.assert_close(p.double(), w, rtol=1e-4, atol=2e-5)


def test_moonlights_settings_repeat_its_published_loop():
    """github.com/MoonshotAI/Moonlight: buf = mu buf + g, g + mu buf, keller x5, 0.2 sqrt(max(A, B)), decoupled
    decay."""
    params = tensors()
    W = [p.detach().double() for p in params]
    B = [torch.zeros_like(w) for w in W]
    lr, wd, mu = 1e-2, 0.1, 0.95
    optimizer = Muon(
        params, lr, mu, True, wd, momentum_form="classical", coefficients="keller", lr_mode="match_rms_adamw", **EXACT
    )
    for t in range(5):
        feed(params, t)
        for i, p in enumerate(params):
            B[i] = mu * B[i] + p.grad.double()
            u = polar(p.grad.double() + mu * B[i], KELLER, 1.0)
            W[i] = W[i] * (1 - lr * wd)
            W[i] = W[i] - lr * 0.2 * max(W[i].shape) ** 0.5 * u
        optimizer.step()
    for p, w in zip(params, W, strict=True):
        torch.testing.assert_close(p.double(), w, rtol=1e-4, atol=2e-5)


def test_classical_and_ema_momentum_give_the_same_weights_and_buffers_that_differ_by_one_minus_mu():
    a, b = tensors(dtype=torch.float64), tensors(dtype=torch.float64)
    ema, classical = Muon(a, momentum=0.9), Muon(b, momentum=0.9, momentum_form="classical")
    drive(ema, a, 10)
    drive(classical, b, 10)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(ema.state[p]["momentum_buffer"], 0.1 * classical.state[q]["momentum_buffer"])


@pytest.mark.parametrize(
    "coefficients, steps, method",
    [
        ("polar_express4", 4, "auto"),
        ("polar_express", 5, "cayley"),
        ("cans", 5, "gram"),
        ([(2.0, -1.5, 0.5)], 12, "hybrid"),
    ],
)
def test_every_way_to_orthogonalise_reaches_the_weights(coefficients, steps, method):
    (p,) = tensors([(24, 64)])
    start = p.detach().clone()
    feed([p], 0)
    optimizer = Muon([p], lr=1.0, coefficients=coefficients, ns_steps=steps, ns_method=method, ns_dtype="float32")
    optimizer.step()
    O = (start - p.detach()).double()
    s = torch.linalg.svdvals(O)
    assert (
        optimizer.ns_calls == 1 and float(s.max()) < 1.4 and (coefficients == "polar_express4" or float(s.min()) > 0.6)
    )  # aspect 2.7: easy
    method = "direct" if method == "auto" else method
    torch.testing.assert_close(O, newton_schulz(p.grad.double(), steps, coefficients, method), rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------ by hand, on 2 x 2

CUBIC = {"coefficients": [(1.5, -0.5, 0.0)], "ns_steps": 1, **EXACT}
F = 0.8838834764831845  # 1.5 s - 0.5 s^3 at s = 1 / sqrt 2: what one cubic step makes of a scaled orthogonal 2 x 2


def stepped(W, G, **kwargs):
    p = torch.nn.Parameter(torch.tensor(W))
    p.grad = torch.tensor(G)
    optimizer = Muon([p], **CUBIC, **kwargs)
    optimizer.step()
    return p, optimizer


def close(p, W):
    torch.testing.assert_close(p.detach(), torch.tensor(W), rtol=1e-6, atol=1e-6)  # some ten fp32 roundings


def test_decoupled_decay_by_hand():
    p, _ = stepped([[1.0, 0.0], [0.0, 3.0]], [[1.0, 0.0], [0.0, -1.0]], lr=0.1, weight_decay=1.0)
    close(p, [[0.9 - 0.1 * F, 0.0], [0.0, 2.7 + 0.1 * F]])


def test_cautious_decay_by_hand_spares_what_the_update_pushes_away_from_zero():
    p, _ = stepped([[1.0, 0.0], [0.0, 3.0]], [[1.0, 0.0], [0.0, -1.0]], lr=0.1, weight_decay=1.0, cautious=True)
    close(p, [[0.9 - 0.1 * F, 0.0], [0.0, 3.0 + 0.1 * F]])


def test_coupled_decay_by_hand_turns_the_direction_and_shrinks_nothing():
    with pytest.warns(UserWarning, match="decoupled_wd=False"):
        p, _ = stepped(
            [[1.0, 0.0], [0.0, 3.0]], [[1.0, 0.0], [0.0, -1.0]], lr=0.1, weight_decay=1.0, decoupled_wd=False
        )
    close(p, [[1.0 - 0.1 * F, 0.0], [0.0, 3.0 - 0.1 * F]])  # G + W = diag(2, 2)


def test_decay_follows_the_learning_rate_by_hand():
    p, optimizer = stepped(
        [[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [-1.0, 0.0]], lr=0.1, weight_decay=1.0, wd_follows_lr=True
    )
    close(p, [[0.9, -0.1 * F], [0.1 * F, 0.9]])  # at the peak: wd itself
    optimizer.param_groups[0]["lr"] = 0.05
    optimizer.step()  # wd_t = 1.0 x .05 / .1 = 0.5, so W shrinks by .025
    close(p, [[0.9 * 0.975, -0.1 * F * 0.975 - 0.05 * F], [0.1 * F * 0.975 + 0.05 * F, 0.9 * 0.975]])


def test_decay_that_follows_the_rate_knows_the_peak_of_one_cycle():
    """OneCycleLR starts at a 25th of its peak: wd_t = wd lr_t / lr_peak never exceeds wd."""
    p = torch.nn.Parameter(torch.eye(2))
    optimizer = Muon([p], lr=0.1, momentum=0.0, weight_decay=1.0, wd_follows_lr=True, **CUBIC)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10, cycle_momentum=False)
    for _ in range(10):
        lr, before = optimizer.param_groups[0]["lr"], p.detach().clone()
        p.grad = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        optimizer.step()
        scheduler.step()
        assert float(p.detach()[0, 0] / before[0, 0]) == pytest.approx(1 - lr * (lr / 0.1), abs=1e-6)


def test_decay_that_follows_a_rate_of_zero_is_zero():
    p, _ = stepped([[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [-1.0, 0.0]], lr=0.0, weight_decay=1.0, wd_follows_lr=True)
    close(p, [[1.0, 0.0], [0.0, 1.0]])


def test_momentum_by_hand():
    """G = I, then -0.8 I, mu = .9: M = .1, then .09 - .08 = .01 > 0; Nesterov's U = .009 - .08 < 0 turns round,
    plain U = M does not."""
    for nesterov, moved in ((True, 0.0), (False, -0.2 * F)):
        p = torch.nn.Parameter(torch.zeros(2, 2))
        optimizer = Muon([p], lr=0.1, momentum=0.9, nesterov=nesterov, **CUBIC)
        for size in (1.0, -0.8):
            p.grad = size * torch.eye(2)
            optimizer.step()
        close(p, [[moved, 0.0], [0.0, moved]])
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], 0.01 * torch.eye(2), rtol=1e-5, atol=1e-7)


def test_the_momentum_schedule_passes_85_90_95_at_0_150_300_and_is_what_the_buffer_feels():
    (p,) = tensors([(8, 8)])
    optimizer = Muon([p], momentum_schedule=[(0, 0.85), (300, 0.95)], **EXACT)
    M = torch.zeros(8, 8, dtype=torch.float64)
    for t in range(303):
        feed([p], t)
        optimizer.step()
        mu = 0.85 + 0.1 * min(t, 300) / 300
        M = mu * M + (1 - mu) * p.grad.double()
        if t in (0, 150, 300, 302):
            assert optimizer.param_groups[0]["momentum"] == pytest.approx({0: 0.85, 150: 0.90}.get(t, 0.95), abs=1e-12)
    torch.testing.assert_close(
        optimizer.state[p]["momentum_buffer"].double(), M, rtol=1e-4, atol=1e-6
    )  # 300 fp32 lerps


def test_the_schedule_counts_steps_without_gradients_too():
    (p,) = tensors([(8, 8)])
    optimizer = Muon([p], momentum_schedule=[(0, 0.5), (10, 0.7), (12, 0.9), (20, 0.1)])
    seen = []
    for _ in range(25):
        optimizer.step()
        seen.append(optimizer.param_groups[0]["momentum"])
    assert [seen[t] for t in (0, 5, 10, 11, 12, 16, 20, 24)] == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 0.5, 0.1, 0.1])


# ------------------------------------------------------------------------------------------------ learning-rate modes


@pytest.mark.parametrize("mode", [*FACTORS, lambda A, B: A / (A + B)])
@pytest.mark.parametrize("shape", [(64, 64), (128, 48), (48, 128)])
def test_the_measured_update_rms_is_the_predicted_one_times_k(mode, shape):
    A, B = shape
    p = torch.nn.Parameter(torch.zeros(shape))
    feed([p], 0)
    O = polar(p.grad)
    k = float(O.norm()) / min(A, B) ** 0.5
    factor = FACTORS[mode](A, B) if isinstance(mode, str) else mode(A, B)
    Muon([p], lr=0.1, lr_mode=mode, **EXACT).step()
    predicted = 0.1 * factor / math.sqrt(max(A, B))
    assert p.square().mean().sqrt().item() == pytest.approx(predicted * k, rel=1e-4) and 0.85 < k < 1.15


def test_match_rms_adamw_moves_by_rms_target_times_lr_for_any_shape():
    for shape in ((64, 64), (96, 32), (32, 160)):
        p = torch.nn.Parameter(torch.zeros(shape))
        feed([p], 0)
        Muon(
            [p], lr=0.1, lr_mode="match_rms_adamw", rms_target=0.3, coefficients="deepseek", ns_steps=10, **EXACT
        ).step()
        assert p.square().mean().sqrt().item() == pytest.approx(0.3 * 0.1, rel=2e-3)  # k = 1 within .001 for this set


def test_a_fused_matrix_carries_the_shape_of_the_whole_and_its_slices_their_own():
    whole, split = (torch.nn.Parameter(torch.zeros(96, 32)) for _ in range(2))
    for p in (whole, split):
        feed([p], 0)
    Muon([whole], lr=0.1, **EXACT).step()
    Muon([{"params": [split], "splits": [{"split": (0, [32, 32, 32])}]}], lr=0.1, **EXACT).step()
    O = polar(whole.grad)
    torch.testing.assert_close(whole.detach().double(), -0.1 * 3**0.5 * O, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        split.detach().double(), -0.1 * torch.cat([polar(g) for g in split.grad.split(32)]), rtol=1e-4, atol=2e-5
    )


# ------------------------------------------------------------------------------------------------ variants


def variant_reference(variant, W, steps, lr, wd, b2, sign):
    """A variant of optim/muon/variants.py by its equations; gradients are seeded; `reduce_short` for NorMuon."""
    A, B = W.shape
    W, M, v = W.detach().double().clone(), torch.zeros(A, B).double(), 0.0
    R0 = W.norm()
    for t in range(steps):
        (G,) = gradients([(A, B)], t)
        G = G.float().double()
        M = 0.95 * M + 0.05 * G
        U = 0.05 * G + 0.95 * M
        O = polar(U.sign() if variant == "adamuon" and sign else U)
        s = max(1, A / B) ** 0.5
        if variant == "normuon":
            v = b2 * v + (1 - b2) * (O * O).mean(1 if A >= B else 0, keepdim=True)
            O2 = O / (v**0.5 + 1e-10)
            O = O2 * O.norm() / O2.norm()
        if variant == "adamuon":
            v = b2 * v + (1 - b2) * O * O
            O2 = O / (v**0.5 + 1e-10)
            O, s = 0.2 * (A * B) ** 0.5 * O2 / O2.norm(), 1.0
        if variant == "hyperball":
            V = W - lr * R0 * O / O.norm()
            W = R0 * V / V.norm()
        else:
            W = (1 - lr * wd) * W - lr * s * O
    return W


@pytest.mark.parametrize(
    "variant, sign", [("normuon", True), ("adamuon", True), ("adamuon", False), ("hyperball", True)]
)
@pytest.mark.parametrize("shape", [(24, 24), (48, 24), (24, 64)])
def test_variants_equal_their_literal_equations(variant, sign, shape):
    wd = 0.0 if variant == "hyperball" else 0.3
    for dtype, within in ((torch.float64, 1e-9), (torch.float32, 2e-3)):
        # fp32: entries of O near 0 are divided by their own small root mean square, so their relative error shows
        (p,) = tensors([shape], dtype=dtype)
        start = p.detach().clone()
        optimizer = Muon(
            [p],
            0.02,
            weight_decay=wd,
            variant=variant,
            beta2=0.9,
            adamuon_sign=sign,
            ns_method="direct",
            ns_dtype="auto" if dtype == torch.float64 else "float32",
        )
        for t in range(4):
            (G,) = gradients([shape], t)
            p.grad = G.float().to(dtype)
            optimizer.step()
        expected = variant_reference(variant, start, 4, 0.02, wd, 0.9, sign)
        assert (p.double() - expected).norm() <= within * (expected - start.double()).norm()


def test_normuon_keeps_the_norm_of_the_update_and_evens_out_its_rows():
    p, q = tensors([(64, 32)]), tensors([(64, 32)])
    for x in (p[0], q[0]):
        feed([x], 0)
        x.grad[:32] *= 0.01
        x.data.zero_()
    Muon(p, lr=1.0, **EXACT).step()
    Muon(q, lr=1.0, variant="normuon", **EXACT).step()
    assert float(q[0].norm()) == pytest.approx(float(p[0].norm()), rel=1e-5)
    plain, even = (x[0].detach().norm(dim=1) for x in (p, q))
    assert float(plain.max() / plain.min()) > 1.5
    assert float(even.max() / even.min()) < 1.001  # first step: v is O's own mean


def test_adamuon_has_the_update_rms_of_its_target():
    p = torch.nn.Parameter(torch.zeros(48, 32))
    optimizer = Muon([p], lr=0.1, variant="adamuon", rms_target=0.3, lr_mode="original", **EXACT)
    feed([p], 0)
    optimizer.step()
    assert p.square().mean().sqrt().item() == pytest.approx(0.03, rel=1e-5)  # lr x target, whatever lr_mode says


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hyperball_keeps_every_blocks_norm(dtype):
    params = tensors([(24, 48), (48, 24), (3, 16, 16)], dtype=dtype)
    before = [params[0].norm(), *(b.norm() for b in params[1].split(24)), *(b.norm() for b in params[2])]
    groups = [{"params": params, "use_muon": True, "splits": [None, {"heads": (0, 2)}, None]}]
    optimizer = Muon(groups, lr=0.1, variant="hyperball", **EXACT)
    drive(optimizer, params, 20)
    after = [params[0].norm(), *(b.norm() for b in params[1].split(24)), *(b.norm() for b in params[2])]
    assert [float(a) for a in after] == pytest.approx(
        [float(b) for b in before], rel=1e-5 if dtype == torch.float32 else 8e-3
    )
    assert (flat(params) - flat(tensors([(24, 48), (48, 24), (3, 16, 16)], dtype=dtype))).norm() > 1.0


def test_hyperball_refuses_decay_and_a_weight_of_zero():
    with pytest.raises(ValueError, match='`weight_decay` = 0.1.*0 with variant="hyperball"'):
        Muon(tensors(), variant="hyperball", weight_decay=0.1)
    p = torch.nn.Parameter(torch.zeros(8, 8))
    p.grad = torch.eye(8)
    with pytest.raises(ValueError, match="blocks.0.up.weight"):
        Muon([("blocks.0.up.weight", p)], variant="hyperball", **EXACT).step()


@pytest.mark.parametrize("variant", ["muon", "normuon", "adamuon", "hyperball"])
@pytest.mark.parametrize("batched", [True, False])
def test_variants_act_on_every_block_alone(variant, batched):
    shape, cut = (48, 32), lambda t: t.split(16, 0)
    (whole,) = tensors([shape], dtype=torch.float64)
    parts = [torch.nn.Parameter(c.detach().clone()) for c in cut(whole)]
    kwargs = {"lr": 0.05, "variant": variant, "ns_method": "direct", "batch_by_shape": batched}
    one, many = Muon([{"params": [whole], "splits": [{"heads": (0, 3)}]}], **kwargs), Muon(parts, **kwargs)
    for t in range(3):
        feed([whole], t)
        for part, g in zip(parts, cut(whole.grad), strict=True):
            part.grad = g.clone()
        one.step()
        many.step()
    torch.testing.assert_close(whole.detach(), torch.cat([p.detach() for p in parts]), rtol=1e-9, atol=1e-10)


# ------------------------------------------------------------------------------------------------ blocks


@pytest.mark.parametrize("limit", [1, 2 * 24 * 48 * 4, 2**28])
@pytest.mark.parametrize("variant", ["muon", "normuon"])
def test_batches_equal_single_matrices_whatever_the_memory_limit(limit, variant):
    shapes = [(24, 48), (48, 24), (24, 48), (24, 24), (24, 48)]
    a, b = tensors(shapes), tensors(shapes)
    kwargs = {"variant": variant, "weight_decay": 0.1, **EXACT}
    batched, single = Muon(a, max_batch_bytes=limit, **kwargs), Muon(b, batch_by_shape=False, **kwargs)
    drive(batched, a, 3)
    drive(single, b, 3)
    assert batched.ns_calls == single.ns_calls == 5
    torch.testing.assert_close(flat(a), flat(b), rtol=0, atol=2e-5)  # fp32 GEMMs of other sizes sum in another order


CUTS = [
    ({"split": (0, [24, 16, 8])}, lambda t: t.split([24, 16, 8])),
    ({"heads": (0, 6)}, lambda t: t.split(8)),
    ({"split": (1, [16, 24])}, lambda t: t.split([16, 24], 1)),
    ({"heads": (1, 4)}, lambda t: t.split(10, 1)),
    ({"split": (0, [24, 16, 8]), "heads": (0, 6)}, lambda t: t.split([24, 16, 8])),
    ({}, lambda t: (t,)),
]


@pytest.mark.parametrize("tag, cut", CUTS)
@pytest.mark.parametrize("by_group", [True, False])
def test_a_split_parameter_moves_like_its_slices_by_hand(tag, cut, by_group):
    (whole,) = tensors([(48, 40)])
    references = [Reference(c, 0.05, 0.95, True, 0.1) for c in cut(whole.data)]
    if not by_group:
        whole.muonlm = tag
    optimizer = Muon(
        [{"params": [whole]} | ({"splits": [tag]} if by_group else {})], lr=0.05, weight_decay=0.1, **EXACT
    )
    for t in range(3):
        feed([whole], t)
        for r, g in zip(references, cut(whole.grad), strict=True):
            r.step(g)
        optimizer.step()
    assert optimizer.ns_calls == len(references)
    for r, c in zip(references, cut(whole.data), strict=True):
        torch.testing.assert_close(c.double(), r.W, rtol=1e-4, atol=5e-5)


def test_stacks_are_experts_convolutions_are_flattened_and_flatten_treats_a_stack_like_one():
    conv, stack, other = tensors([(24, 4, 3, 3), (3, 24, 32), (16, 4, 9)])
    references = [Reference(conv.flatten(1)), *(Reference(m) for m in stack), Reference(other.flatten(1))]
    feed([conv, stack, other], 0)
    for r, g in zip(references, [conv.grad.flatten(1), *stack.grad, other.grad.flatten(1)], strict=True):
        r.step(g)
    groups = [{"params": [conv, stack, other], "use_muon": True, "splits": [None, None, {"flatten": True}]}]
    optimizer = Muon(groups, **EXACT)
    optimizer.step()
    assert optimizer.ns_calls == 5
    for r, got in zip(references, [conv.flatten(1), *stack, other.flatten(1)], strict=True):
        torch.testing.assert_close(got.detach().double(), r.W, rtol=1e-4, atol=2e-5)


def test_splits_of_a_stack_cut_every_expert():
    (stack,) = tensors([(2, 32, 24)])
    references = [Reference(half, 0.05) for m in stack for half in m.split(16)]
    optimizer = Muon([{"params": [stack], "use_muon": True, "splits": [{"split": (1, [16, 16])}]}], lr=0.05, **EXACT)
    feed([stack], 0)
    for r, g in zip(references, [h for m in stack.grad for h in m.split(16)], strict=True):
        r.step(g)
    optimizer.step()
    assert optimizer.ns_calls == 4
    torch.testing.assert_close(
        stack.detach().double().flatten(0, 1), torch.cat([r.W for r in references]), rtol=1e-4, atol=2e-5
    )


@pytest.mark.parametrize("mode", FACTORS)
@pytest.mark.parametrize("variant", ["muon", "normuon", "adamuon"])
@pytest.mark.parametrize("shape", [(24, 48), (48, 24), (32, 32)])
def test_a_transposed_parameter_moves_like_its_transpose(mode, variant, shape):
    (p,) = tensors([shape], dtype=torch.float64)
    q = torch.nn.Parameter(p.detach().mT.clone())  # (in, out), like transformers' Conv1D
    kwargs = {"lr": 0.05, "weight_decay": 0.1, "lr_mode": mode, "variant": variant, "ns_method": "direct"}
    plain, turned = Muon([p], **kwargs), Muon([{"params": [q], "splits": [{"transposed": True}]}], **kwargs)
    for t in range(2):
        feed([p], t)
        q.grad = p.grad.mT.clone()
        plain.step()
        turned.step()
    torch.testing.assert_close(q.detach().mT, p.detach(), rtol=1e-9, atol=1e-10)


def test_a_transposed_split_uses_the_shape_of_the_transposed_block():
    (p,) = tensors([(24, 96)])  # (in, 4 out)
    references = [Reference(c.mT, 0.05) for c in p.detach().split([24, 72], 1)]
    optimizer = Muon([{"params": [p], "splits": [{"split": (1, [24, 72]), "transposed": True}]}], lr=0.05, **EXACT)
    feed([p], 0)
    for r, g in zip(references, p.grad.split([24, 72], 1), strict=True):
        r.step(g.mT)
    optimizer.step()
    torch.testing.assert_close(p.detach().double().mT, torch.cat([r.W for r in references]), rtol=1e-4, atol=2e-5)


ADAMW = {"betas": (0.8, 0.98), "eps": 1e-9, "weight_decay": 0.05}


@pytest.mark.parametrize("dim, sizes, aux", [(0, [24, 16, 4], [2]), (0, [4, 24, 4, 16], [0, 2]), (1, [8, 32, 3], [2])])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "cautious": True},
        {"variant": "normuon"},
        {"weight_decay": 0.1, "decoupled_wd": False},
    ],
)
@pytest.mark.filterwarnings("ignore:decoupled_wd")
def test_slices_left_to_adamw_equal_torch_adamw_and_the_rest_is_untouched(dim, sizes, aux, kwargs):
    shape = (sum(sizes), 24) if dim == 0 else (24, sum(sizes))
    (p,) = tensors([shape])
    parts = [torch.nn.Parameter(c.clone()) for c in p.detach().split(sizes, dim)]
    group = {"params": [p], "splits": [{"split": (dim, sizes), "adamw": aux}], "slices": {"lr_ratio": 0.1, **ADAMW}}
    mixed = Muon([group], lr=0.05, **kwargs, **EXACT)
    muon = Muon([q for i, q in enumerate(parts) if i not in aux], lr=0.05, **kwargs, **EXACT)
    adamw = torch.optim.AdamW([parts[i] for i in aux], lr=0.05 * 0.1, foreach=False, **ADAMW)
    for t in range(4):
        feed([p], t)
        for q, g in zip(parts, p.grad.split(sizes, dim), strict=True):
            q.grad = g.clone()
        for optimizer in (mixed, muon, adamw):
            optimizer.step()
        assert mixed.ns_calls == len(parts) - len(aux)
    for i, (got, q) in enumerate(zip(p.detach().split(sizes, dim), parts, strict=True)):
        torch.testing.assert_close(got, q.detach(), rtol=0, atol=1e-6 if i in aux else 5e-5)
        assert i not in aux or not torch.equal(got, tensors([shape])[0].detach().split(sizes, dim)[i])
    names = {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"} | (
        {"second_momentum"} if "variant" in kwargs else set()
    )
    assert set(mixed.state[p]) == names
    entries = sum(parts[i].numel() for i in aux)
    assert mixed.state[p]["exp_avg"].numel() == mixed.state[p]["exp_avg_sq"].numel() == entries


def test_slices_follow_the_schedule_of_the_muon_rate():
    (p,) = tensors([(20, 24)])
    q = torch.nn.Parameter(p.detach()[16:].clone())
    group = {"params": [p], "splits": [{"split": (0, [16, 4]), "adamw": [1]}], "slices": {"lr_ratio": 0.1, **ADAMW}}
    mixed, adamw = Muon([group], lr=0.05, **EXACT), torch.optim.AdamW([q], lr=0.005, foreach=False, **ADAMW)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (mixed, adamw)]
    for t in range(4):
        feed([p], t)
        q.grad = p.grad[16:].clone()
        for optimizer, scheduler in zip((mixed, adamw), schedulers, strict=True):
            optimizer.step()
            scheduler.step()
    torch.testing.assert_close(p.detach()[16:], q.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_groups_are_bit_equal_to_torch_adamw(dtype):
    shapes = [(24, 24), (7,), (), (3, 4, 5)]
    a, b = tensors(shapes, dtype=dtype), tensors(shapes, dtype=dtype)
    kwargs = {"lr": 3e-3, "betas": (0.8, 0.98), "eps": 1e-9, "weight_decay": 0.1}
    ours = Muon([{"params": a, "use_muon": False, **kwargs}])
    theirs = torch.optim.AdamW(b, fused=True, **kwargs)
    drive(ours, a, 10)
    drive(theirs, b, 10)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True)) and ours.ns_calls == 0


# ------------------------------------------------------------------------------------------------ hard gradients


@pytest.mark.parametrize("variant", ["muon", "normuon", "adamuon", "hyperball"])
@pytest.mark.parametrize("cautious", [True, False])
def test_a_zero_gradient_moves_nothing_and_tiny_ones_move_as_far_as_any(variant, cautious):
    params = tensors([(24, 24)] * 5)
    before = [p.detach().clone() for p in params]
    optimizer = Muon(params, variant=variant, cautious=cautious, **EXACT)
    feed(params, 0)
    params[0].grad = torch.zeros_like(params[0])
    params[1].grad *= 1e-30
    params[2].grad *= 1e-37  # below 1.2e-38 fp32 is subnormal: the momentum's factor .05 and .0975 takes entries there
    params[3].grad[5] = 0.0
    optimizer.step()
    moved = [float((p - b).norm()) for p, b in zip(params, before, strict=True)]
    assert torch.equal(params[0], before[0]) and moved[1] == pytest.approx(moved[4], rel=0.05)  # other Gaussians
    assert moved[2] == pytest.approx(moved[4], rel=0.1) and all(torch.isfinite(p).all() for p in params)
    assert variant == "hyperball" or torch.equal(params[3][5], before[3][5])


@pytest.mark.parametrize("scale", [1e-20, 1e-8, 1e8])
@pytest.mark.parametrize("variant", ["muon", "normuon", "adamuon", "hyperball"])
@pytest.mark.parametrize("coefficients, steps", [("polar_express", 5), ("polar_express4", 4)])
def test_the_scale_of_the_gradient_does_not_matter(scale, variant, coefficients, steps):
    a, b = tensors(), tensors()
    kwargs = {"variant": variant, "coefficients": coefficients, "ns_steps": steps, **EXACT}
    drive(Muon(a, **kwargs), a, 3)
    drive(Muon(b, **kwargs), b, 3, scale=scale)
    # a rounding more (6e-8), grown by slopes of 1000 on the tiny singular values of the square matrix
    assert (flat(a) - flat(b)).norm() <= 1e-3 * (flat(a) - flat(tensors())).norm()


def test_a_nonfinite_gradient_spoils_its_own_weights_alone_as_documented():
    params = tensors([(24, 24)] * 3)
    feed(params, 0)
    params[0].grad[1, 2], params[2].grad[3, 4] = float("nan"), float("inf")
    Muon(params, **EXACT).step()
    assert [bool(torch.isfinite(p).all()) for p in params] == [False, True, False]


def test_a_single_row_is_normalised_and_warned_about():
    p, q = tensors([(1, 30), (30, 1)])
    with pytest.warns(UserWarning, match=r"\(1, 30\)"):
        optimizer = Muon([p, q], lr=0.1, coefficients=[(2.0, -1.5, 0.5)], ns_steps=12, **EXACT)
    start = [x.detach().clone() for x in (p, q)]
    feed([p, q], 0)
    optimizer.step()
    torch.testing.assert_close(start[0] - p, 0.1 * p.grad / p.grad.norm(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(start[1] - q, 0.1 * 30**0.5 * q.grad / q.grad.norm(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("none_grad", ["skip", "zero"])
def test_a_missing_gradient_is_skipped_or_counts_as_zero(none_grad):
    p, q = tensors([(24, 24), (24, 48)])
    optimizer = Muon([p, q], none_grad=none_grad, momentum=0.5, weight_decay=0.1, **EXACT)
    drive(optimizer, [p, q], 1)
    before, buffer = q.detach().clone(), optimizer.state[q]["momentum_buffer"].clone()
    feed([p], 1)
    q.grad = None
    optimizer.step()
    if none_grad == "skip":
        assert (
            torch.equal(q, before)
            and torch.equal(optimizer.state[q]["momentum_buffer"], buffer)
            and optimizer.ns_calls == 1
        )
    else:
        torch.testing.assert_close(optimizer.state[q]["momentum_buffer"], 0.5 * buffer)
        assert not torch.equal(q, before) and optimizer.ns_calls == 2


# ------------------------------------------------------------------------------------------------ precision


def exact_value(p, state):
    """The fp32 number that a bf16 weight and its 16 further bits stand for."""
    return ((p.detach().view(torch.int16).int() << 16) + state["mantissa"].int()).view(torch.float32)


CASES = [
    ({"weight_decay": 0.1}, None),
    ({"weight_decay": 0.1, "cautious": True}, None),
    ({"variant": "normuon"}, None),
    ({"variant": "adamuon"}, None),
    ({"variant": "hyperball"}, None),
    (
        {"weight_decay": 0.1, "momentum_form": "classical"},
        [None, {"heads": (0, 2)}, {"split": (1, [60, 4]), "adamw": [1]}],
    ),
]


@pytest.mark.parametrize("kwargs, splits", CASES)
def test_bf16_parameters_are_as_exact_as_an_fp32_run_with_the_same_gradients(kwargs, splits):
    coarse = tensors(dtype=torch.bfloat16)
    fine = [torch.nn.Parameter(p.detach().float()) for p in coarse]
    more = {"splits": splits, "slices": {"lr_ratio": 0.1, **ADAMW}} if splits else {}
    a, b = (Muon([{"params": ps, **more}], lr=1e-3, **kwargs, **EXACT) for ps in (coarse, fine))
    for t in range(8):
        feed(coarse, t)
        for p, q in zip(coarse, fine, strict=True):
            q.grad = p.grad.float()
        a.step()
        b.step()
    for p, q in zip(coarse, fine, strict=True):
        assert a.state[p]["momentum_buffer"].dtype == torch.float32
        assert torch.equal(exact_value(p, a.state[p]), q)
        assert (p.float() - q).abs().le((q.bfloat16().float() - q).abs()).all()  # p itself is the nearest bf16
        assert a.state[p]["mantissa"].element_size() == 2


def test_without_the_mantissa_bf16_weights_lose_small_updates():
    runs = {}
    for keep in (True, False):
        params = tensors(dtype=torch.bfloat16)
        for p in params:
            p.data.fill_(1.0)  # half an ulp is 2^-9: a step of 1e-4 / sqrt(24) vanishes
        optimizer = Muon(params, lr=1e-4, param_dtype_comp=keep, **EXACT)
        drive(optimizer, params, 5)
        runs[keep] = [exact_value(p, optimizer.state[p]) - 1.0 if keep else p.detach().float() - 1.0 for p in params]
        assert all(("mantissa" in optimizer.state[p]) == keep for p in params)
    assert all(x.any() for x in runs[True]) and not any(x.any() for x in runs[False])


@pytest.mark.parametrize("variant", ["muon", "normuon", "adamuon", "hyperball"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_parameters_stay_near_an_fp32_run(variant, dtype):
    a, b = tensors(dtype=dtype), [torch.nn.Parameter(p.detach().float()) for p in tensors(dtype=dtype)]
    x, y = (Muon(ps, lr=0.01, variant=variant, param_dtype_comp=False, **EXACT) for ps in (a, b))
    scale = 6e3 if dtype == torch.float16 else 1.0  # squares of these gradients overflow fp16
    for t in range(10):
        feed(a, t, scale)
        for p, q in zip(a, b, strict=True):
            q.grad = p.grad.float()
        x.step()
        y.step()
    start = flat(tensors(dtype=dtype))
    assert all(torch.isfinite(p).all() and x.state[p]["momentum_buffer"].dtype == torch.float32 for p in a)
    # each step rounds weights of ~ .1 by 2^-12 (fp16) or 2^-9 (bf16) of their size at most, at random; steps are lr-
    # sized
    assert (flat(a) - flat(b)).norm() <= (0.02 if dtype == torch.float16 else 0.1) * (flat(b) - start).norm()


@pytest.mark.parametrize("form", ["ema", "classical"])
def test_a_bf16_state_is_the_rounding_of_the_exact_update_and_takes_two_bytes(form):
    params = tensors()
    optimizer = Muon(params, momentum=0.9, momentum_form=form, state_dtype=torch.bfloat16, **EXACT)
    before = [torch.zeros(p.shape, dtype=torch.float64) for p in params]
    for t in range(4):
        feed(params, t)
        optimizer.step()
        for i, p in enumerate(params):
            M = optimizer.state[p]["momentum_buffer"]
            exact = 0.9 * before[i] + (0.1 if form == "ema" else 1.0) * p.grad.double()
            before[i] = M.double()
            # the fp32 rounding before (2^-24) tips one in some 2^15 to the other side; updating in bf16 would tip a
            # third
            assert (M != exact.float().bfloat16()).double().mean() < 0.01
    state = sum(v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values())
    assert state == 2 * sum(p.numel() for p in params)


def test_training_with_a_bf16_state_drifts_by_little():
    a, b = tensors(), tensors()
    drive(Muon(a, state_dtype=torch.bfloat16, **EXACT), a, 20)
    drive(Muon(b, **EXACT), b, 20)
    # 2^-9 relative per step and entry, remembered for some 20 steps: 1 % in the direction; up to 10 x on tiny singular
    # values
    assert (flat(a) - flat(b)).norm() <= 0.05 * (flat(b) - flat(tensors())).norm()


def test_plain_muon_keeps_four_bytes_and_normuon_little_more():
    for variant, extra in (("muon", 0), ("normuon", 4 * 64), ("adamuon", 4 * 24 * 64), ("hyperball", 4)):
        (p,) = tensors([(24, 64)])
        optimizer = Muon([p], variant=variant, **EXACT)
        drive(optimizer, [p], 1)
        assert sum(v.numel() * v.element_size() for v in optimizer.state[p].values()) == 4 * p.numel() + extra


def test_gram_in_bf16_is_refused_by_the_optimizer_and_float32_named():
    with pytest.raises(ValueError, match='not accurate in bfloat16.*`ns_dtype` "float32"'):
        Muon(tensors(), ns_method="gram", ns_dtype="bfloat16")
    with pytest.raises(ValueError, match="Cholesky"):
        Muon(tensors(), ns_method="cayley", ns_dtype="bfloat16")


# ------------------------------------------------------------------------------------------------ learning


@pytest.mark.parametrize("variant", ["muon", "normuon", "adamuon"])
def test_a_quadratic_converges(variant):
    target = gradients([(16, 24)], 7)[0].float()
    p = torch.nn.Parameter(torch.zeros(16, 24))
    optimizer = Muon([p], lr=0.5, momentum=0.9, variant=variant, **EXACT)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / 150)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (p - target).square().sum()
        loss.backward()
        optimizer.step()
        scheduler.step()
    assert (p - target).square().sum() < 1e-3 * target.square().sum()


def test_a_matrix_factorisation_converges():
    g = torch.Generator().manual_seed(0)
    target = torch.randn(24, 4, generator=g) @ torch.randn(4, 32, generator=g)
    U, V = (torch.nn.Parameter(torch.randn(s, generator=g) * 0.1) for s in ((24, 8), (8, 32)))
    optimizer = Muon([U, V], lr=0.3, momentum=0.9, **EXACT)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / 200)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (U @ V - target).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
    assert loss < 1e-3 * target.square().mean()
