"""Measurements against exact values, advice against planted faults and a healthy run, checks against sabotage."""

import json
import math

import pytest
import torch

from muonlm.errors import UserError
from muonlm.optim import Muon
from muonlm.optim.muon import cut, update
from muonlm.optim.muon.newton_schulz import newton_schulz
from muonlm.optim.muon.update import Observation
from muonlm.optim.watch.activity import ActivityCheck, MuonInactive
from muonlm.optim.watch.advice import Advice
from muonlm.optim.watch.diagnostics import (
    Diagnostics,
    exact_error,
    hutchinson_error,
    merge,
    probe_vectors,
)

SHAPES = [(32, 32), (64, 32), (32, 48)]
EXACT = dict(ns_dtype="float32", ns_method="direct")  # no probe: tests must not depend on timings


def make(shapes=SHAPES, seed=0, splits=None, **options):
    """Named matrices in one Muon group and a vector in an AdamW group."""
    g = torch.Generator().manual_seed(seed)
    params = [(f"layer{i}.weight", torch.nn.Parameter(torch.randn(s, generator=g) * 0.1)) for i, s in enumerate(shapes)]
    bias = torch.nn.Parameter(torch.zeros(8))
    muon = dict(params=params, use_muon=True, name="muon") | ({"splits": splits} if splits else {})
    optimizer = Muon([muon, dict(params=[("bias", bias)], use_muon=False, lr=1e-3, name="adamw")], **(EXACT | options))
    return optimizer, [p for _, p in params]


def feed(params, step, rank=None):
    g = torch.Generator().manual_seed(1000 + step)
    for p in params:
        full = torch.randn(p.shape, generator=g)
        thin = torch.randn(p.shape[0], rank or 1, generator=g) @ torch.randn(rank or 1, p.shape[1], generator=g)
        p.grad = (thin if rank else full).to(p.dtype)


def run(optimizer, params, diagnostics, steps, loss=lambda t: 2.0):
    """Metrics and advice of `steps` steps with independent random gradients."""
    metrics, lines = {}, []
    for t in range(1, steps + 1):
        feed(params, t)
        optimizer.step()
        if diagnostics.due(t):
            metrics |= diagnostics.collect()
        lines += diagnostics.advise(t, loss=loss(t))
    return metrics, lines


# ------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("m, n", [(128, 128), (128, 512), (256, 256)])
@pytest.mark.parametrize("spectrum", ["gauss", "1/k", "flat tail"])
@pytest.mark.parametrize("coefficients", ["polar_express", "keller"])
def test_four_probes_estimate_the_orthogonality_error_within_15_percent(m, n, spectrum, coefficients):
    g = torch.Generator().manual_seed(1)
    G = torch.randn(m, n, generator=g)
    if spectrum != "gauss":
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        k = torch.arange(1, m + 1.0)
        G = U @ torch.diag(1 / k if spectrum == "1/k" else torch.where(k < m / 2, 1.0, 1e-4)) @ Vh
    O = newton_schulz(G, coefficients=coefficients)
    z = probe_vectors(f"probe/{m}", m, 4, O)
    # relative spread of e from 4 probes is below sqrt(2 kurtosis / m) / 4: 6 % at m = 128, so 15 % are 2.5 spreads
    assert hutchinson_error(O, z) == pytest.approx(float(exact_error(O)), rel=0.15)


def test_signals_equal_their_definitions_on_a_hand_made_observation():
    optimizer, params = make([(64, 32)])
    d = Diagnostics(every=1, spectra_every=1).attach(optimizer)
    feed(params, 0)
    U, W = params[0].grad.mT.clone(), params[0].detach().clone()
    optimizer.step()
    m = d.collect()
    update = params[0].detach() - W
    sigma = torch.linalg.svdvals(U / U.norm())
    O = update.mT / (-0.02 * math.sqrt(2))
    exact = {
        "muon/update_rms_max": update.square().mean().sqrt(),
        "muon/weight_rms_max": W.square().mean().sqrt(),
        "muon/u_w_max": update.norm() / W.norm(),
        "muon/predicted_rms_median": 0.02 * math.sqrt(2) / 8,
        "muon/k_median": O.norm() / math.sqrt(32),
        "muon/orthogonality_error_exact": (O @ O.mT - torch.eye(32)).norm() / math.sqrt(32),
        "muon/sigma_05": torch.quantile(sigma, 0.05),
        "muon/sigma_95": torch.quantile(sigma, 0.95),
    }
    for key, value in exact.items():
        assert m[key] == pytest.approx(float(value), rel=1e-3), (
            key
        )  # fp32; the update is a difference of weights ~100x larger
    assert m["muon/worst_layer"] == m["muon/sigma_05_layer"] == "layer0.weight"
    # power steps approach sigma_1 from below; 4 of them on a Gaussian spectrum come within 10 %
    assert 0.9 * W.svd().S[0] < m["muon/spectral_norm_w_max"] <= 1.0001 * W.svd().S[0]
    assert m["muon/layers"] == 1 and not m["muon/zero_update_layers"] and not m["muon/nonfinite_layers"]
    json.dumps(m, allow_nan=False)


def test_a_warm_power_vector_finds_the_spectral_norm_of_a_steady_matrix():
    optimizer, params = make([(64, 64)], lr=0.0)
    d = Diagnostics(every=1, spectra_every=0).attach(optimizer)
    metrics, _ = run(optimizer, params, d, 60)
    top = torch.linalg.svdvals(params[0].detach())[0]
    assert metrics["muon/spectral_norm_w_max"] == pytest.approx(float(top), rel=1e-3)  # 240 steps converge; 4 would not
    assert set(optimizer.state[params[0]]) == {"momentum_buffer"}


def test_successive_directions_are_compared_on_the_sampled_layer_only():
    optimizer, params = make(momentum=0.0, nesterov=False)
    d = Diagnostics(every=5, spectra_every=10).attach(optimizer)
    seen = []
    for t in range(1, 21):
        feed(params, 0 if t <= 10 else t)  # one and the same gradient, then new ones
        optimizer.step()
        if d.due(t) and (m := d.collect()):
            seen.append(m)
    assert [("muon/cos_previous" in m) for m in seen] == [False, True, False, True]
    assert seen[1]["muon/cos_previous"] == pytest.approx(1.0, abs=1e-5)
    assert abs(seen[3]["muon/cos_previous"]) < 0.2  # independent: spread 1/sqrt(1024..2048) = 0.03
    assert not d._previous


def observation(optimizer, params, names, step):
    feed(params, step)
    every = {name: p for name, p in zip(optimizer.param_groups[0]["param_names"], params)}
    result = []
    for name in names:  # shapes differ, so one batch each
        w = every[name].detach()
        U = every[name].grad if w.shape[0] <= w.shape[1] else every[name].grad.mT
        result.append(Observation([name], U[None], newton_schulz(U)[None], [w], [1.0], 0.02, 0.0, step))
    return result


def test_values_do_not_depend_on_how_matrices_are_spread_over_ranks():
    optimizer, params = make(lr_mode="none")
    names = optimizer.param_groups[0]["param_names"]
    one, two, three = (Diagnostics(every=10, spectra_every=10, seed=3).attach(optimizer) for _ in range(3))
    for step in (9, 10, 20):
        for o in observation(optimizer, params, names, step):
            one.observe(o)
        for o in observation(optimizer, params, names[:1], step):
            two.observe(o)
        for o in observation(optimizer, params, names[1:], step):
            three.observe(o)
        parts = [three._measured, two._measured]
        assert merge(parts) == merge([one._measured])  # bit for bit: each matrix is measured by itself
        assert merge([*parts, parts[0]]) == merge(parts)
        alone = one.collect()
        assert (alone == {}) == (step == 9)
        two._measured, three._measured = {}, {}


def test_the_global_random_state_is_untouched_and_weights_do_not_change():
    plain, params = make(splits=[{"heads": (0, 2)}, None, None])
    watched, same = make(splits=[{"heads": (0, 2)}, None, None])
    d = Diagnostics(every=1, spectra_every=2).attach(watched)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for t in range(4):
        for optimizer, ps in ((plain, params), (watched, same)):
            feed(ps, t)
            optimizer.step()
        metrics = d.collect()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(params, same))
    assert metrics["muon/layers"] == 4


def test_off_means_that_nothing_is_observed(monkeypatch):
    monkeypatch.setattr(Diagnostics, "observe", lambda *_: pytest.fail("observed"))
    optimizer, params = make()
    d = Diagnostics(every=0, spectra_every=0).attach(optimizer)
    assert run(optimizer, params, d, 3)[0] == {}
    optimizer, params = make()
    d = Diagnostics(every=10, spectra_every=20).attach(optimizer)
    run(optimizer, params, d, 9)
    assert [t for t in range(1, 41) if d.due(t)] == [10, 19, 20, 30, 39, 40]


def test_settings_that_do_not_fit_are_refused_with_what_to_type():
    with pytest.raises(UserError, match="spectra_every=100 is no multiple of every=30.*use 300"):
        Diagnostics(every=30, spectra_every=100)


@pytest.mark.parametrize("variant", ["normuon", "adamuon", "hyperball"])
def test_variants_and_bf16_weights_are_measured_and_pass_the_activity_check(variant):
    optimizer, params = make(variant=variant)
    for p in params:
        p.data = p.data.bfloat16()
    d, check = Diagnostics(every=1, spectra_every=1).attach(optimizer), ActivityCheck(optimizer, every=1)
    for t in range(1, 4):
        feed(params, t)
        before = params[0].detach().float()
        with check(t):
            optimizer.step()
        metrics = d.collect()
        assert not d.advise(t, 2.0)
    moved = (params[0].detach().float() - before).square().mean().sqrt()
    assert metrics["muon/layers"] == 3
    assert metrics["muon/update_rms_max"] >= 0.5 * float(moved)


# ------------------------------------------------------------------------------------------------ advice


def test_advice_is_silent_on_a_healthy_run_of_200_steps():
    """A two-layer network learns a teacher's function, with a noisy loss, a last layer that starts at 0, a cooldown."""
    g = torch.Generator().manual_seed(0)
    W1 = torch.nn.Parameter(torch.randn(64, 32, generator=g) * 32**-0.5)
    W2 = torch.nn.Parameter(torch.zeros(32, 64))
    teacher = torch.randn(32, 32, generator=g) * 32**-0.5
    named = [("fc.weight", W1), ("proj.weight", W2)]
    optimizer = Muon([dict(params=named, use_muon=True, name="m")], lr=0.02, weight_decay=0.05, cautious=True, **EXACT)
    d, check, lines, losses = (
        Diagnostics(every=10, spectra_every=50).attach(optimizer),
        ActivityCheck(optimizer, 20),
        [],
        [],
    )
    for t in range(1, 201):
        x = torch.randn(256, 32, generator=g)
        loss = ((x @ W1.T).relu() @ W2.T - torch.tanh(x @ teacher.T)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 0.02 * min(1.0, (200 - t) / 100)
        with check(t):
            optimizer.step()
        if d.due(t):
            d.collect()
        losses.append(loss.item())
        lines += d.advise(t, loss=losses[-1])
    assert lines == []
    assert losses[-1] < 0.3 * losses[0]


def test_too_high_a_rate_is_named_with_its_layer_after_200_steps():
    optimizer, params = make(lr=5.0, weight_decay=0.1)
    _, lines = run(optimizer, params, Diagnostics(every=20, spectra_every=0).attach(optimizer), 260)
    assert [line.partition(" (")[0] for line in lines] == [
        "Muon lr too high: u/w > 0.05 for 200 steps in layer2.weight; try lr/2"
    ] or (len(lines) == 1 and lines[0].startswith("Muon lr too high: u/w > 0.05 for 200 steps in layer"))


def test_too_low_a_rate_is_named_but_a_cooldown_is_not_one():
    optimizer, params = make(lr=1e-6)
    d = Diagnostics(every=10, spectra_every=0).attach(optimizer)
    _, lines = run(optimizer, params, d, 30)
    assert len(lines) == 1 and lines[0].startswith("lr too low: u/w < 0.0001")
    optimizer, params = make(lr=0.02)
    optimizer.param_groups[0]["lr"] = 1e-6  # first_lr stays 0.02
    assert run(optimizer, params, Diagnostics(every=10, spectra_every=0).attach(optimizer), 30)[1] == []


def test_an_identity_in_place_of_newton_schulz_is_told(monkeypatch):
    monkeypatch.setattr(update, "orthogonalise", lambda U, *_: U)
    optimizer, params = make(momentum=0.0)
    lines = run(optimizer, params, Diagnostics(every=2, spectra_every=0).attach(optimizer), 2)[1]
    assert any(line.startswith("NS output error ") and "ns_steps+2" in line for line in lines)
    assert any("x the prediction: check lr_mode" in line for line in lines)


def test_a_rate_in_the_units_of_another_lr_mode_is_told():
    optimizer, params = make(lr=0.05, lr_mode="match_rms_adamw")
    _, lines = run(optimizer, params, Diagnostics(every=2, spectra_every=0).attach(optimizer), 2)
    assert len(lines) == 1
    assert (
        lines[0].startswith("update RMS 0.01 is 50x the prediction: check lr_mode")
        or "x the prediction: check lr_mode" in lines[0]
    )
    assert run(*(pair := make(lr=5e-3, lr_mode="match_rms_adamw")), Diagnostics(2, 0).attach(pair[0]), 2)[1] == []


def test_a_factor_that_is_not_the_lr_modes_is_told():
    optimizer, params = make()
    d = Diagnostics(every=2, spectra_every=0).attach(optimizer)
    factor = cut.shape_factor
    cut.shape_factor = lambda *a: 40.0 * factor(*a)
    try:
        _, lines = run(optimizer, params, d, 2)
    finally:
        cut.shape_factor = factor
    assert [line for line in lines if "is 40x the prediction: check lr_mode" in line]


def test_a_layer_without_gradient_and_one_with_a_zero_gradient_are_told():
    optimizer, params = make()
    d = Diagnostics(every=1, spectra_every=0).attach(optimizer)
    feed(params, 0)
    params[0].grad = None
    params[1].grad.zero_()
    optimizer.step()
    metrics = d.collect()
    lines = d.advise(1, 2.0)
    assert "Muon inactive: no Newton-Schulz call for layer0.weight" in lines
    assert any(line.startswith("dead layer: the gradient of layer1.weight") for line in lines)
    assert metrics["muon/zero_update_layers"] == 1 and metrics["muon/layers"] == 2


def test_a_broken_gradient_is_told_and_spoils_no_metric():
    optimizer, params = make()
    d = Diagnostics(every=1, spectra_every=1).attach(optimizer)
    feed(params, 0)
    params[0].grad[0, 0] = math.nan  # the first: a maximum that starts with NaN stays NaN
    optimizer.step()
    metrics = d.collect()
    assert metrics["muon/nonfinite_layers"] == 1
    json.dumps(metrics, allow_nan=False)
    assert d.advise(1, 2.0)[0].startswith(
        "non-finite update in layer0.weight at step 1: skip or stop; lower optim.lr (now 0.02)"
    )


def test_a_loss_spike_is_told_once():
    advice, lines = Advice(), []
    for t in range(60):
        loss = 3.0 - 0.02 * t + 0.05 * math.sin(7 * t) + (1.5 if t in (40, 41, 50) else 0.0)
        lines += advice.lines(t, loss)
    assert len(lines) == 1
    assert lines[0].startswith("loss spike +1.") and "at step 40: try a lower lr or a longer warm-up" in lines[0]
    quiet = Advice()
    for t in range(20):
        lines = quiet.lines(t, 9.0 if t == 19 else 2.0)
    assert len(lines) == 1 and lines[0].startswith("loss spike +7 at step 19: ")


def test_each_kind_is_said_at_most_once_in_1000_steps():
    advice = Advice()
    told = [t for t in range(2500) if advice.lines(t, 9.0 if t % 50 == 49 else 2.0)]
    assert told == [49, 1049, 2049]


@pytest.mark.parametrize("drift, told", [(True, True), (False, False)])
def test_weights_that_grow_linearly_without_decay_are_told_and_a_random_walk_is_not(drift, told):
    optimizer, _ = make()
    d = Diagnostics(every=100, spectra_every=0).attach(optimizer)
    lines = []
    for t in range(100, 3001, 100):
        rms = 1e-4 * t if drift else 1e-3 * math.sqrt(t)
        layer = dict(
            step=t,
            lr=0.02,
            weight_decay=0.0,
            nonfinite=0.0,
            zero_update=0.0,
            k=1.0,
            weight_rms=rms,
            update_rms=1e-4,
            predicted_rms=1e-4,
            u_w=1e-4 / rms,
        )
        d.advice.see(dict.fromkeys(d.names, layer), d.names, {n: d._group(n) for n in d.names})
        lines += d.advise(t, 2.0)
    assert (
        bool([x for x in lines if x.startswith("weight RMS growing linearly with wd=0: set wd or hyperball")]) == told
    )
    assert told or not lines


def test_advice_can_be_switched_off():
    optimizer, _ = make()
    assert Diagnostics(advice=False).attach(optimizer).advise(1, loss=1.0) == []


# ------------------------------------------------------------------------------------------------ activity


SETTINGS = [
    {},
    dict(weight_decay=2.0),
    dict(weight_decay=2.0, cautious=True),
    dict(weight_decay=1.0, wd_follows_lr=True, nesterov=False),
    dict(lr_mode="match_rms_adamw", lr=1e-3),
    dict(compat="torch", ns_dtype="auto", ns_method="auto"),
    dict(momentum_form="classical", coefficients="keller"),
    dict(coefficients="polar_express4", ns_steps=4),
    dict(coefficients=[(1.5, -0.5, 0.0)]),  # a weak set is the user's choice, not a fault
    dict(ns_method="cayley"),
    dict(splits=[{"split": (0, [12, 20])}, {"heads": (1, 4)}, {"transposed": True}]),
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("rank", [None, 3])
def test_an_honest_step_passes_the_activity_check_even_where_gradients_lack_rank(options, rank):
    optimizer, params = make(**options)
    check = ActivityCheck(optimizer, every=1)
    for t in range(1, 5):
        feed(params, t, rank if t == 1 else None)
        if t == 2:
            params[0].grad.zero_()
        with check(t):
            optimizer.step()


def test_a_parameter_without_gradient_or_without_direction_is_no_fault():
    optimizer, params = make()
    check = ActivityCheck(optimizer)
    feed(params, 0)
    params[0].grad = None
    params[1].grad.zero_()
    with check(1):
        optimizer.step()
    assert optimizer.ns_calls == 2
    optimizer.param_groups[0]["lr"] = 0.0
    with check(1000):
        optimizer.step()


@pytest.mark.parametrize("scale", [1e-3, 1.0, None])
def test_an_identity_in_place_of_newton_schulz_fails_the_check_at_any_scale(monkeypatch, scale):
    monkeypatch.setattr(update, "orthogonalise", lambda U, *_: U)
    optimizer, params = make(momentum=0.0)
    feed(params, 0)
    for p in params:  # None: so that even the update's RMS is right
        p.grad.mul_(scale or max(p.shape) ** -0.5)
    words = r"layer0.weight: (the update is not orthogonal|update RMS .* is .*x the prediction)"
    with pytest.raises(MuonInactive, match=words), ActivityCheck(optimizer)(1):
        optimizer.step()


def test_a_dropped_newton_schulz_or_step_fails_the_check(monkeypatch):
    optimizer, params = make()
    feed(params, 0)
    with (
        pytest.raises(MuonInactive, match=r"Muon inactive: 0 Newton-Schulz calls for 3 blocks .*layer0.weight"),
        ActivityCheck(optimizer)(1),
    ):
        for p in params:  # what DeepSpeed #8441 did
            p.data.add_(p.grad, alpha=-0.1)
    optimizer.ns_calls = 3
    with pytest.raises(MuonInactive, match="layer0.weight has a gradient but no momentum"), ActivityCheck(optimizer)(1):
        pass
    optimizer.step()
    with pytest.raises(MuonInactive, match="layer0.weight did not move"), ActivityCheck(optimizer)(1):
        pass
    with ActivityCheck(optimizer, every=10)(5):  # not due
        pass
    with pytest.raises(MuonInactive, match="2 Newton-Schulz calls for 3"), ActivityCheck(optimizer)(1):
        params[0].grad = None
        optimizer.step()


def test_a_wrong_shape_factor_fails_the_check(monkeypatch):
    optimizer, params = make()
    check = ActivityCheck(optimizer)
    feed(params, 0)
    factor = cut.shape_factor
    with pytest.raises(MuonInactive, match=r"is .*x the prediction .*lr_mode original"), check(1):
        monkeypatch.setattr(cut, "shape_factor", lambda *a: 40.0 * factor(*a))
        optimizer.step()


def test_flattened_shards_and_missing_muon_groups_are_refused_with_the_reason():
    optimizer, params = make()
    params[1].data = params[1].data.flatten()[:100]
    with pytest.raises(MuonInactive, match=r"layer1.weight has become a flat tensor of shape \(100,\).*fully_shard"):
        with ActivityCheck(optimizer)(1):
            pytest.fail("stepped")
    with pytest.raises(ValueError, match="flattened matrix must be gathered"):
        Muon([dict(params=[("w", torch.nn.Parameter(torch.zeros(64)))], use_muon=True)])
    with pytest.raises(MuonInactive, match="AdamW has no group with use_muon=True"):
        ActivityCheck(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2, 2))]))


# ------------------------------------------------------------------------------------------------ ranks


def measured(**options):
    """Metrics after four checked steps on four matrices."""
    optimizer, params = make([*SHAPES, (32, 32)], batch_by_shape=False, **options)
    d, check = Diagnostics(every=1, spectra_every=2).attach(optimizer), ActivityCheck(optimizer, every=1)
    for t in range(1, 5):
        feed(params, t)
        if t == 2:
            params[0].grad = None
        with check(t):
            optimizer.step()
        metrics = d.collect()
    with pytest.raises(MuonInactive, match="0 Newton-Schulz calls for 4 blocks"), check(5):
        optimizer.ns_calls = 0
    return metrics


def _rank(rank, store, out):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    result = measured(process_group="world", grads="averaged")
    out.with_suffix(f".{rank}").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


def test_two_ranks_that_share_the_matrices_report_and_decide_what_one_does(tmp_path):
    torch.multiprocessing.spawn(_rank, (tmp_path / "store", tmp_path / "out"), 2)
    one, first, second = measured(), *(json.loads((tmp_path / f"out.{rank}").read_text()) for rank in (0, 1))
    assert first == second
    # unbatched fp32: equal bit for bit on one thread; more threads may add up in another order
    assert {k: v for k, v in one.items() if isinstance(v, str)} == {
        k: v for k, v in first.items() if isinstance(v, str)
    }
    numbers = {k: v for k, v in one.items() if not isinstance(v, str)}
    assert {k: first[k] for k in numbers} == pytest.approx(numbers, rel=1e-5)
    assert numbers["muon/layers"] == 4 and "muon/cos_previous" in numbers
