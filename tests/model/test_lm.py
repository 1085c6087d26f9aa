"""Model: true counts, causality, masks, caches, and the options of attention, in fp64 where equality is claimed."""

import math

import pytest
import torch
import torch.nn.functional as F

from muonlm.config.recipes import load_recipe
from muonlm.config.schema import ModelConfig
from muonlm.engine import map_state
from muonlm.model import build_model, count_parameters, lm, loss
from muonlm.model.mixers import attention
from muonlm.model.mixers.attention import Attention

VARIANTS = {
    "plain": {},
    "gqa": {"n_kv_head": 2},
    "window": {"pattern": "W", "window": 5},
    "mixed": {"pattern": "AW", "window": 4, "n_kv_head": 1},
    "softcap": {"attn_softcap": 3.0, "logit_softcap": 10.0, "n_kv_head": 2},
    "softcap window": {"attn_softcap": 3.0, "pattern": "W", "window": 3},
    "learned": {
        "positions": "learned",
        "norm": "layernorm",
        "bias": True,
        "tie": True,
        "mlp": "gelu",
        "qk_norm": False,
    },
    "embedding convolution": {"embed_conv": 4, "positions": "learned"},
    "partial rope": {"rotary_fraction": 0.5, "norm": "rmsnorm_plain", "mlp": "relu2", "res_scale": "both"},
}


@pytest.fixture(autouse=True, params=["explicit", "sdpa"])
def attention_path(request, monkeypatch):
    """Every test of this file runs through both ways of computing attention."""
    monkeypatch.setattr(attention, "EXPLICIT_UP_TO", attention.EXPLICIT_UP_TO if request.param == "explicit" else {})


def small(**overrides) -> lm.LM:
    model = build_model(
        ModelConfig(**{"n_layer": 2, "d_model": 32, "n_head": 4, "vocab_size": 50, "block_size": 64} | overrides),
        seed=3,
    )
    return model.double().eval()


def tokens(rows=3, length=20, seed=0):
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("recipe", "preset", "vocab", "expected"),
    [
        ("keller/gpt", "", 50257, {"total": 162_129_408, "blocks": 84_934_656, "tied": 123_532_032}),
        ("keller/gpt", "", 50304, {"total": 162_201_600}),
        ("keller/gpt-shakespeare", "", 65, {"total": 85_034_496}),
        ("keller/nanogpt-char", "", 65, {"total": 10_745_088}),
        ("minimind/pretrain", "minimind-base", 6400, {"total": 104_034_048, "untied": 108_949_248}),
        ("minimind/pretrain", "minimind-small", 6400, {"total": 25_830_912, "untied": 29_107_712}),
        ("minimind/pretrain", "minimind-3", 6400, {"total": 63_912_192, "untied": 68_827_392}),
        ("keller/grokking", "", 234, {"total": 457_578, "tied": 457_578, "blocks": 396_544}),
        ("keller/grokking-plan", "", 231, {"total": 456_807}),
    ],
)
def test_parameter_counts_are_the_published_ones(recipe, preset, vocab, expected):
    cfg = load_recipe(recipe, {"model.vocab_size": vocab}, preset=preset).model
    counts = count_parameters(cfg)
    assert {key: counts[key] for key in expected} == expected


def test_counts_equal_those_of_the_allocated_model():
    cfg = ModelConfig(n_layer=2, d_model=32, n_head=4, vocab_size=50, block_size=64, tie=True)
    assert count_parameters(cfg)["total"] == sum(p.numel() for p in build_model(cfg).parameters())


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_prefill_in_any_pieces_equals_one_pass(variant):
    model, x = small(**variant), tokens()
    full, end = model(x)
    for cuts in ([20], [1] * 20, [7, 1, 1, 6, 5], [3, 17], [19, 1]):
        state, pieces, start = None, [], 0
        for size in cuts:
            y, state = model(x[:, start : start + size], state=state)
            pieces.append(y)
            start += size
        torch.testing.assert_close(torch.cat(pieces, 1), full, rtol=0, atol=1e-11)
        assert torch.equal(state[-1], end[-1])


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_masked_tokens_are_as_good_as_deleted(variant):
    model, x = small(**variant), tokens(4)
    mask = torch.rand(4, 20, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[0], mask[1, :5], mask[2, -4:], mask[3] = True, False, False, False
    mask[3, 7] = True
    y, state = model(x, mask=mask)
    following = tokens(4, 3, seed=9)
    then, _ = model(following, state=map_state(torch.clone, state))
    for row in range(4):
        short = x[row : row + 1, mask[row]]
        alone, alone_state = model(short)
        torch.testing.assert_close(y[row, mask[row]], alone[0], rtol=0, atol=1e-11)
        torch.testing.assert_close(
            then[row], model(following[row : row + 1], state=alone_state)[0][0], rtol=0, atol=1e-11
        )


def test_attention_outputs_zero_at_masked_positions():
    layer = small().blocks[0].mixer
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    mask = torch.tensor([[True] * 6, [False, True, False, True, True, False]])
    y, _ = layer(x, mask=mask)
    assert torch.equal(y[~mask], torch.zeros_like(y[~mask])) and bool((y[mask] != 0).all())
    nothing, _ = layer(x, mask=torch.zeros_like(mask))
    assert torch.equal(nothing, torch.zeros_like(x))


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_no_output_depends_on_a_later_token(variant):
    model, x = small(**variant), tokens(1)
    before, _ = model(x)
    for t in (1, 9, 19):
        changed = x.clone()
        changed[0, t] = (changed[0, t] + 1) % 50
        after, _ = model(changed)
        assert torch.equal(after[:, :t], before[:, :t]) and not torch.equal(after[:, t], before[:, t])


def test_a_cloned_state_branches():
    model, x = small(), tokens(1, 10)
    _, state = model(x)
    branch = map_state(torch.clone, state)
    a, _ = model(tokens(1, 2, seed=5), state=state)
    b, _ = model(tokens(1, 2, seed=5), state=branch)
    assert torch.equal(a, b)


def test_grouped_queries_equal_repeated_heads():
    grouped = small(n_kv_head=2, n_layer=1, qk_norm=False)
    full = small(n_layer=1, qk_norm=False)
    full.load_state_dict({k: v for k, v in grouped.state_dict().items() if "qkv" not in k}, strict=False)
    q, k, v = grouped.blocks[0].mixer.qkv.weight.split([32, 16, 16])
    repeated = [m.view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32) for m in (k, v)]
    full.blocks[0].mixer.qkv.weight.data = torch.cat([q, *repeated])
    torch.testing.assert_close(grouped(tokens())[0], full(tokens())[0], rtol=0, atol=1e-12)


def test_attention_matches_the_equations():
    cfg = ModelConfig(n_layer=1, d_model=24, n_head=2, vocab_size=9, block_size=16)
    layer = build_model(cfg).double().blocks[0].mixer
    x = torch.randn(1, 7, 24, dtype=torch.float64)
    q, k, v = (t.view(7, 2, 12) for t in (x[0] @ layer.qkv.weight.T).split(24, -1))

    def norm_rotate(t):
        t = t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        out = torch.empty_like(t)
        for pos in range(7):
            for i in range(6):
                angle = torch.tensor(pos * 10000.0 ** (-2 * i / 12), dtype=torch.float64)
                out[pos, :, i] = t[pos, :, i] * angle.cos() - t[pos, :, i + 6] * angle.sin()
                out[pos, :, i + 6] = t[pos, :, i + 6] * angle.cos() + t[pos, :, i] * angle.sin()
        return out

    q, k = norm_rotate(q), norm_rotate(k)
    rows = []
    for t in range(7):
        w = torch.softmax(torch.einsum("hk,shk->hs", q[t], k[: t + 1]) / 12**0.5, -1)
        rows.append(torch.einsum("hs,shk->hk", w, v[: t + 1]).reshape(-1))
    torch.testing.assert_close(layer(x)[0][0], torch.stack(rows) @ layer.out.weight.T, rtol=0, atol=1e-12)


def test_window_cache_stays_bounded():
    model = small(pattern="W", window=5)
    _, state = model(tokens())
    for _ in range(3):
        _, state = model(tokens(3, 1), state=state)
    assert state[0][0].shape[2] == 4, "a window of w keys needs the last w − 1"


def test_softcap_bounds_logits():
    model = small(logit_softcap=2.0)
    model.head.weight.data *= 1000
    assert bool((model(tokens())[0].abs() <= 2.0).all())


def test_loss_sum_is_the_cross_entropy_of_the_logits_whole_or_in_chunks(monkeypatch):
    model, x = small(), tokens()
    targets = torch.randint(0, 50, (3, 20))
    targets[0, :5] = -100
    expected = F.cross_entropy(model(x)[0].flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    whole = model(x, targets)
    grads = torch.autograd.grad(whole, list(model.parameters()))
    monkeypatch.setattr(lm, "LOGITS_PER_CHUNK", 50 * 7)
    chunked = model(x, targets)
    torch.testing.assert_close(whole, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(chunked, expected, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(chunked, list(model.parameters())), grads):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def gradients(model, *inputs, scale: float = 1.0):
    nats = model(*inputs)
    return nats, torch.autograd.grad(nats * scale, list(model.parameters()))


def as_on_a_gpu(monkeypatch, logits_at_a_time: int, unused: int) -> None:
    monkeypatch.setattr(loss, "in_one_pass", lambda device: True)
    monkeypatch.setattr(loss, "logits_at_a_time", lambda device: logits_at_a_time)
    monkeypatch.setattr(loss, "unused_logits", lambda vocab_size, device: unused)


def agree(found, expected, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=0)
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-3 * rtol)


@pytest.mark.parametrize("tie", [False, True])
def test_the_loss_of_a_gpu_has_the_gradient_of_autograd(tie, monkeypatch):
    """In one chunk and in several, with columns beside the vocabulary's, masked targets, a scaled loss."""
    model, x, targets = small(tie=tie), tokens(), tokens(seed=1)
    targets[0, :5] = -100
    targets[2] = -100
    expected = gradients(model, x, targets, scale=0.3)
    for logits_at_a_time, unused in ((10**6, 0), (10**6, 14), (64 * 7, 14), (1, 0)):
        as_on_a_gpu(monkeypatch, logits_at_a_time, unused)
        agree(gradients(model, x, targets, scale=0.3), expected)
    assert model(x, targets, per_token=True).shape == x.shape


def test_the_loss_of_a_gpu_rounds_like_autograd_under_autocast(monkeypatch):
    """Logits and their gradient are bf16 in both; measured 3e-3 of each gradient's norm."""
    torch.manual_seed(0)
    model, x, targets = small().float(), tokens(), tokens(seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(model, x, targets)
        as_on_a_gpu(monkeypatch, 10**6, 14)
        found = gradients(model, x, targets)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=0)
    for a, b in zip(found[1], expected[1], strict=True):
        assert a.dtype == b.dtype and (a - b).norm() <= 2e-2 * b.norm()


def test_a_gpu_aligns_the_rows_of_the_logits():
    gpu = torch.device("cuda")
    assert [loss.unused_logits(size, gpu) for size in (50257, 50264, 65)] == [47, 0, 63]
    assert loss.unused_logits(50257, torch.device("cpu")) == 0 and not loss.in_one_pass(torch.device("cpu"))


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_compiled_model_trains_as_before_with_one_graph_for_all_blocks(device, monkeypatch):
    torch._dynamo.reset()
    model, x, targets = small(n_layer=5), tokens(), tokens(seed=1)
    targets[0, :5] = -100
    expected = gradients(model, x, targets)
    if device == "gpu":
        as_on_a_gpu(monkeypatch, 50 * 30, 0)  # two chunks of one shape
    counters = torch._dynamo.utils.counters
    counters.clear()
    model.compile(backend="aot_eager")
    agree(gradients(model, x, targets), expected)
    graphs = {"cpu": 2, "gpu": 1}[device]  # of the block, and of the loss, which is no graph on a GPU
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]


@pytest.mark.parametrize("pattern", ["A", "W"])
def test_a_compiled_block_of_attention_makes_nothing_on_the_cpu(pattern):
    """Its count of tokens would: on a GPU a graph with a tensor of the CPU waits a minute for a C++ compiler."""
    torch._dynamo.reset()
    made = []

    def keep(graph, inputs):
        made.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    model, x = small(pattern=pattern), tokens()
    model.compile(backend=torch._dynamo.backends.common.aot_autograd(fw_compiler=keep))
    gradients(model, x, x)
    assert any("softmax" in name for name in made) and not any("aten.full." in name for name in made)


def test_a_scan_breaks_the_graph_of_a_block_once_whatever_the_depth():
    counters, found = torch._dynamo.utils.counters, []
    for depth in (1, 5):
        torch._dynamo.reset()
        counters.clear()
        model, x = small(pattern="D", n_layer=depth), tokens()
        model.compile(backend="aot_eager")
        agree(gradients(model, x, x), gradients(small(pattern="D", n_layer=depth), x, x))
        (reason,) = counters["graph_break"]
        assert "disable" in reason
        found.append(counters["stats"]["unique_graphs"])
    assert found[0] == found[1] <= 5, found


@pytest.mark.parametrize("init", ["gpt2", "zero_out"])
def test_initial_loss_is_that_of_a_uniform_guess(init):
    model = small(init=init)
    loss = model(tokens(), tokens(seed=1)) / 60
    assert abs(loss.item() - math.log(50)) < (0.05 if init == "gpt2" else 1e-9)


def test_the_seed_alone_decides_the_weights():
    a, b, c = (build_model(ModelConfig(n_layer=1, d_model=16, n_head=2, vocab_size=9), seed=s) for s in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.embed.weight, c.embed.weight)


def test_fused_matrices_tell_the_routing_where_their_parts_are():
    layer = Attention(ModelConfig(d_model=32, n_head=4, n_kv_head=2))
    tag = layer.tags()[layer.qkv.weight]
    assert (
        tag["split"] == (0, [32, 16, 16])
        and tag["heads"] == (0, 8)
        and sum(tag["split"][1]) == layer.qkv.weight.shape[0]
    )


def test_rope_depends_on_relative_position_only():
    cos, sin = attention.rope_table(64, 8, 10000.0, torch.device("cpu"), torch.float64)
    q, k = torch.randn(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 1, 8, dtype=torch.float64)
    at = lambda t, i: attention.rotate(t, cos[i : i + 1], sin[i : i + 1])  # noqa: E731
    assert torch.allclose((at(q, 9) * at(k, 4)).sum(), (at(q, 45) * at(k, 40)).sum(), rtol=1e-12)
    assert not torch.allclose((at(q, 9) * at(k, 4)).sum(), (at(q, 9) * at(k, 5)).sum(), rtol=1e-3)


@pytest.mark.parametrize("kind", ["one step", "two micro-batches", "recomputed"])
def test_repeatable_attention_orders_its_own_backward_alone(kind):
    """Long rows, as SDPA has them on a CPU: torch's switch is on in SDPA's backward pass, and off before and after."""
    model = build_model(ModelConfig(n_layer=2, d_model=32, n_head=4, vocab_size=50, block_size=192), seed=1)
    tokens = torch.arange(193).remainder(7)[None].expand(2, -1)
    seen = []
    for block in model.blocks:
        block.mixer.repeatable = True
        block.mixer.qkv.register_full_backward_pre_hook(
            lambda *_: seen.append(torch.are_deterministic_algorithms_enabled())
        )
    model.recompute = kind == "recomputed"
    switched, real = [], torch.use_deterministic_algorithms

    def switch(on):
        switched.append(on)
        real(on)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "use_deterministic_algorithms", switch)
        for part in tokens.split(1 if kind == "two micro-batches" else 2):
            model(part[:, :-1], part[:, 1:]).backward()
    steps = 2 if kind == "two micro-batches" else 1
    assert switched == [True, False] * 2 * steps and seen == [False] * 2 * steps
    assert not torch.are_deterministic_algorithms_enabled()


def test_attention_with_a_mask_is_the_same_in_the_form_that_suits_a_gpu():
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 5, 6, dtype=torch.float64, generator=draw)
    k, v = torch.randn(2, 2, 2, 7, 6, dtype=torch.float64, generator=draw)
    some = torch.rand(5, 7, generator=draw) < 0.6
    some[:, 0] = True
    for visible in (some, torch.ones(1, 1, dtype=torch.bool)):  # the second: all keys, as a token of decoding sees them
        expected = F.scaled_dot_product_attention(q, k, v, visible, enable_gqa=True)
        got = attention.masked_attention(q, k, v, visible, 0.0)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
