"""Stacked recursion and multi-scale attention against their equations, in fp64: pieces, masks, causality, gradients.

Tolerance 1e-11 where two orders of the same sums are compared in fp64: outputs are of order 1, sums of ≤ 100 terms.
"""

import pytest
import torch

from muonlm.config.schema import ModelConfig
from muonlm.engine import map_state
from muonlm.model.mixers import attention
from muonlm.model.mixers.multiscale import MultiScaleAttention
from muonlm.model.mixers.recursion import StackedRecursion

EXACT = {"rtol": 0, "atol": 1e-11}
VARIANTS = {
    "recursion": ("R", {}),
    "recursion of depth 2, biased": ("R", {"recursion_depth": 2, "bias": True}),
    "scales 1 2 4": ("S", {}),
    "scales 1 2 4 by SDPA": ("S", {"sdpa": True}),
    "scales 3 5": ("S", {"attention_scales": [3, 5], "n_kv_head": 2, "bias": True}),
    "no positions, no QK-norm": ("S", {"positions": "learned", "qk_norm": False, "attention_scales": [2]}),
    "softcap, partial rope": ("S", {"attn_softcap": 2.0, "rotary_fraction": 0.5, "n_kv_head": 1}),
}
D, T = 32, 22


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def mixer(request, monkeypatch):
    letter, options = request.param
    return make(letter, monkeypatch=monkeypatch, **options)


def make(letter, sdpa=False, monkeypatch=None, **options):
    if sdpa:
        monkeypatch.setattr(attention, "EXPLICIT_UP_TO", {})
    cfg = ModelConfig(**{"d_model": D, "n_head": 4, "vocab_size": 8} | options)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        mixer = {"R": StackedRecursion, "S": MultiScaleAttention}[letter](cfg).double().eval()
        for p in mixer.parameters():  # gains off 1, gates off uniform, logits large enough to matter
            p.data += torch.randn_like(p) * 0.3
    return mixer


def inputs(rows=3, length=T, seed=0):
    return torch.randn(rows, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_same_state(a, b):
    """Slots beyond the finished blocks may hold anything, so states are compared by what follows from them."""
    assert [t.dtype for t in a] == [t.dtype for t in b] and torch.equal(a[-1], b[-1])


@pytest.mark.parametrize("seed", range(4))
def test_prefill_in_any_pieces_equals_one_pass(mixer, seed):
    x, tail = inputs(), inputs(3, 5, seed=9)
    full, end = mixer(x)
    cuts = [[T], [1] * T, [T - 1, 1]][seed] if seed < 3 else torch.bincount(torch.randint(0, 6, (T,))).tolist()
    state, pieces, start = mixer.init_state(3, dtype=torch.float64), [], 0
    for size in filter(None, cuts):
        y, state = mixer(x[:, start : start + size], state)
        pieces.append(y)
        start += size
    torch.testing.assert_close(torch.cat(pieces, 1), full, **EXACT)
    assert_same_state(state, end)
    torch.testing.assert_close(mixer(tail, state)[0], mixer(tail, end)[0], **EXACT)


def test_decoding_without_gradients_appends_in_place_and_equals_prefill(mixer):
    x = inputs()
    full, _ = mixer(x)
    with torch.no_grad():
        y, state = mixer(x[:, :3])
        pieces = [y]
        for t in range(3, T):
            y, state = mixer(x[:, t : t + 1], state)
            pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), full, **EXACT)


def test_caches_grow_geometrically():
    mixer, seen = make("S"), set()
    with torch.no_grad():
        state = mixer.init_state(1, dtype=torch.float64)
        for t in range(64):
            _, state = mixer(inputs(1, 1, seed=t), state)
            seen.add(state[0].shape[2])
    assert seen == {1, 2, 4, 8, 16, 32, 64} and state[6].shape[2] == 16


@pytest.mark.parametrize("first", ["fresh", "continued"])
def test_masked_tokens_are_as_good_as_deleted(mixer, first):
    """Left, right, scattered, none, all, and all but one; rows then differ in length, and go on from there."""
    x, rows = inputs(6), 6
    mask = torch.rand(rows, T, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[0], mask[1], mask[2], mask[3], mask[4] = True, torch.arange(T) >= 7, torch.arange(T) < 9, False, False
    mask[4, 7] = True
    past = inputs(rows, 6, seed=5)
    begin = mixer(past)[1] if first == "continued" else None
    y, state = mixer(x, None if begin is None else map_state(torch.clone, begin), mask)
    assert torch.equal(y[~mask], torch.zeros_like(y[~mask])) and torch.isfinite(y).all()
    more, more_mask = inputs(rows, 5, seed=9), torch.tensor([[True, False, True, True, True]]).repeat(rows, 1)
    more_mask[0] = False  # the longest row gets nothing while shorter ones fill blocks
    then, end = mixer(more, map_state(torch.clone, state), more_mask)
    last, _ = mixer(inputs(rows, 4, seed=4), end)
    for row in range(rows):
        one = slice(row, row + 1)
        parts = [x[one][:, mask[row]], more[one][:, more_mask[row]], inputs(rows, 4, seed=4)[one]]
        before = [past[one]] if begin is not None else []
        whole, _ = mixer(torch.cat(before + parts, 1))
        got = torch.cat([y[one][:, mask[row]], then[one][:, more_mask[row]], last[one]], 1)
        torch.testing.assert_close(got, whole[:, 6 if before else 0 :], **EXACT)


def test_masked_rows_give_the_gradients_of_the_shortened_row(mixer):
    x, mask = inputs(1), torch.rand(1, T, generator=torch.Generator().manual_seed(3)) < 0.5
    weight = inputs(1, seed=8)
    parameters = list(mixer.parameters())
    masked = torch.autograd.grad((mixer(x, mask=mask)[0] * weight).sum(), parameters)
    short = torch.autograd.grad((mixer(x[:, mask[0]])[0] * weight[:, mask[0]]).sum(), parameters)
    for a, b in zip(masked, short):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_no_output_depends_on_a_later_token(mixer):
    x = inputs(1)
    before, _ = mixer(x)
    for t in (1, 7, 8, 15, T - 1):
        changed = x.clone()
        changed[0, t] += 1
        after, _ = mixer(changed)
        assert torch.equal(after[:, :t], before[:, :t]) and not torch.equal(after[:, t:], before[:, t:])


def test_no_gradient_flows_back_from_a_later_token(mixer):
    x = inputs(2).requires_grad_()
    y, _ = mixer(x)
    for t in (5, 6, 15):
        (grad,) = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
        assert torch.equal(grad[:, t + 1 :], torch.zeros_like(grad[:, t + 1 :])) and grad[:, : t + 1].any()


def test_gradients_flow_through_the_state_and_are_those_of_one_pass(mixer):
    x, weight = inputs(2), inputs(2, seed=8)
    parameters = list(mixer.parameters())
    whole = torch.autograd.grad((mixer(x)[0] * weight).sum(), parameters)
    y, state = mixer(x[:, :9])
    outputs = [y]
    for piece in x[:, 9:].split(3, 1):  # some of these find room in the cache
        y, state = mixer(piece, state)
        outputs.append(y)
    pieces = torch.autograd.grad((torch.cat(outputs, 1) * weight).sum(), parameters)
    for a, b in zip(pieces, whole):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
        assert torch.isfinite(b).all() and b.any()


def test_gradients_are_finite_where_nothing_is_seen_or_said(mixer):
    for x, mask in ((torch.zeros(2, 6, D), None), (torch.zeros(2, 1, D), None), (inputs(2, 6), torch.zeros(2, 6))):
        x = x.double().requires_grad_()
        y, _ = mixer(x, mask=None if mask is None else mask.bool())
        grads = torch.autograd.grad(y.sum(), [x, *mixer.parameters()], allow_unused=True)
        assert torch.isfinite(y).all() and all(g is None or torch.isfinite(g).all() for g in grads)


def test_a_cloned_state_branches(mixer):
    with torch.no_grad():
        _, state = mixer(inputs(2, 9))
        branch = map_state(torch.clone, state)
        a, _ = mixer(inputs(2, 3, seed=5), state)
        b, _ = mixer(inputs(2, 3, seed=5), branch)
    assert torch.equal(a, b)


def test_states_hold_the_batch_in_dimension_zero_and_rows_can_be_chosen(mixer):
    x, more = inputs(3, 7), inputs(4, 5, seed=2)
    rows = torch.tensor([2, 0, 0, 1])
    _, state = mixer(x)
    assert all(t.shape[0] == 3 for t in (*state, *mixer.init_state(3)))
    chosen, _ = mixer(more, map_state(lambda t: t.index_select(0, rows), state))
    direct, _ = mixer(torch.cat([x[rows], more], 1))
    torch.testing.assert_close(chosen, direct[:, 7:], **EXACT)


def test_bfloat16_autocast_keeps_sums_and_gate_wide():
    """8 bits of mantissa: 1e-2 of a value is 2.5 roundings; some ten follow each other here, mostly averaging out."""
    for letter in "RS":
        mixer, x = make(letter).float(), inputs(2).float()
        exact, _ = mixer(x)
        with torch.autocast("cpu", torch.bfloat16):
            y, state = mixer(x)
            step, _ = mixer(x[:, :1], state)
        assert (y - exact).norm() / exact.norm() < 2e-2 and torch.isfinite(step).all()
        assert state[0 if letter == "R" else 2].dtype == torch.float32


def test_the_recursion_is_the_equation_with_a_causal_prefix_mean():
    mixer, x = make("R", bias=True), inputs(1)
    y, _ = mixer(x)
    for t in range(T):
        mean = x[0, : t + 1].sum(0) / (t + 1)
        logits = mixer.gate.weight @ mean + mixer.gate.bias
        pi = logits.exp() / logits.exp().sum()
        r = m = x[0, t]
        out = torch.zeros(D, dtype=torch.float64)
        for j in range(3):
            c = r - r.mean()
            h = c / (c.square().mean() + 1e-6).sqrt() * mixer.norms[j].weight + mixer.norms[j].bias
            h = mixer.ups[j].weight @ h + mixer.ups[j].bias
            h = 0.5 * h * (1 + torch.erf(h / 2**0.5))
            r = r + mixer.downs[j].weight @ h + mixer.downs[j].bias
            m = mixer.memory.weight @ torch.cat([m, r]) + mixer.memory.bias
            out += pi[j] * (r + m)
        torch.testing.assert_close(y[0, t], out, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"attention_scales": [3, 5], "n_kv_head": 2}, {"qk_norm": False}], ids=str)
def test_multi_scale_attention_is_the_equation(options):
    mixer, x = make("S", **options), inputs(1)
    H, G, K, norm = 4, options.get("n_kv_head", 4), 8, options.get("qk_norm", True)
    projected = (x[0] @ mixer.qkv.weight.T).split([n * K for n in (H, G, G)] * len(mixer.scales), -1)

    def prepare(vector, gain, position):
        if norm:
            vector = vector / (vector.square().mean() + 1e-6).sqrt() * gain.weight
        out = torch.empty_like(vector)
        for i in range(K // 2):
            angle = torch.tensor(position * 10000.0 ** (-2 * i / K), dtype=torch.float64)
            out[i] = vector[i] * angle.cos() - vector[i + K // 2] * angle.sin()
            out[i + K // 2] = vector[i + K // 2] * angle.cos() + vector[i] * angle.sin()
        return out

    rows = torch.zeros(T, len(mixer.scales), H, K, dtype=torch.float64)
    for n, s in enumerate(mixer.scales):
        q, k, v = (p.view(T, -1, K) for p in projected[3 * n : 3 * n + 3])
        q_gain, k_gain = (mixer.q_norms[n], mixer.k_norms[n]) if norm else (None, None)
        for t in range(T):
            blocks = [j for j in range(T) if j * s + s - 1 <= t]
            for head in range(H):
                g = head * G // H
                query = prepare(q[t, head], q_gain, t)
                keys = [prepare(k[j * s : j * s + s, g].mean(0), k_gain, j * s + s - 1) for j in blocks]
                if blocks:
                    weights = torch.softmax(torch.stack([query @ key for key in keys]) / K**0.5, 0)
                    rows[t, n, head] = sum(w * v[j * s : j * s + s, g].mean(0) for w, j in zip(weights, blocks))
    torch.testing.assert_close(mixer(x)[0][0], rows.flatten(1) @ mixer.out.weight.T, **EXACT)


def test_scale_one_alone_is_ordinary_attention():
    mixer = make("S", attention_scales=[1], n_kv_head=2)
    plain = attention.Attention(mixer.cfg).double()
    names = {"q_norms.0.weight": "q_norm.weight", "k_norms.0.weight": "k_norm.weight"}
    plain.load_state_dict({names.get(name, name): p for name, p in mixer.state_dict().items()})
    x, mask = inputs(), torch.rand(3, T, generator=torch.Generator().manual_seed(1)) < 0.6
    for m in (None, mask):
        torch.testing.assert_close(mixer(x, mask=m)[0], plain(x, mask=m)[0], **EXACT)


def test_a_scale_longer_than_the_row_says_nothing():
    mixer = make("S", attention_scales=[30])
    y, state = mixer(inputs())
    assert torch.equal(y, torch.zeros_like(y))
    y, _ = mixer(inputs(3, 10), state)
    assert not y[:, :7].any() and bool((y[:, 7:] != 0).all())


def test_dropout_acts_on_attention_weights_in_training_only():
    mixer, x = make("S", dropout=0.5), inputs()
    assert torch.equal(mixer(x)[0], mixer(x)[0])
    mixer.train()
    assert not torch.equal(mixer(x)[0], mixer(x)[0])


def test_tags_name_every_slice_and_writers_write_to_the_stream():
    attend, recurse = make("S", n_kv_head=2), make("R")
    (tag,) = attend.tags().values()
    assert tag["split"] == (0, [32, 16, 16] * 3) and tag["heads"] == (0, 24)
    assert sum(tag["split"][1]) == len(attend.qkv.weight)
    assert recurse.tags() == {recurse.gate.weight: {"role": "scalar"}}
    for mixer, names in ((attend, {"out"}), (recurse, {"downs.0", "downs.1", "downs.2", "memory"})):
        found = {
            name for name, module in mixer.named_modules() if any(module is w for w in mixer.residual_projections())
        }
        assert found == names and all(w.out_features == D for w in mixer.residual_projections())
