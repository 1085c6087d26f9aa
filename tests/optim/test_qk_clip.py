"""QK-clip: what is measured is the largest logit of each head, and after the clip it is tau, whatever the attention."""

import copy
import inspect
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from muonlm.config.schema import ModelConfig
from muonlm.errors import UserError
from muonlm.model import build_model
from muonlm.model.mixers import attention
from muonlm.model.mixers.attention import Attention, max_logits
from muonlm.optim.watch.qk_clip import qk_clip

VARIANTS = {
    "mha": {},
    "gqa": {"n_kv_head": 2},
    "mqa": {"n_kv_head": 1, "bias": True},
    "biases": {"bias": True},
    "partial rotary": {"rotary_fraction": 0.5},
    "no rotary": {"positions": "learned", "bias": True},
    "window": {"pattern": "W", "window": 4, "n_kv_head": 2},
    "softcap": {"attn_softcap": 5.0},
}
# Logits are sums of D and then K fp32 products, rounded differently by differently shaped products: about √(D·K)·2⁻²⁴ =
# 1e-6 of the sum of their sizes, which is a few times the largest logit.
FP32 = 1e-5
BF16 = 2**-7  # two weights, each rounded to 8 bits


@pytest.fixture(params=["explicit", "sdpa"])
def path(request, monkeypatch):
    monkeypatch.setattr(attention, "EXPLICIT_UP_TO", attention.EXPLICIT_UP_TO if request.param == "explicit" else {})
    return request.param


def layer_with_hot_heads(seed=0, **overrides) -> Attention:
    """A tracked attention layer of 4 heads of width 8; heads grow in size, so that their largest logits differ."""
    cfg = ModelConfig(**{"n_layer": 1, "d_model": 32, "n_head": 4, "vocab_size": 9, "qk_norm": False} | overrides)
    layer = build_model(cfg, seed=seed).blocks[0].mixer
    with torch.no_grad():
        torch.manual_seed(seed)
        for p in (layer.qkv.weight, layer.qkv.bias):
            if p is not None:
                p.normal_()
        layer.qkv.weight.unflatten(0, (-1, 8))[:4].mul_(torch.tensor([0.1, 0.3, 1.0, 3.0])[:, None, None])
    layer.track_logits = True
    return layer.train()


def batch(seed=1, length=12):
    return torch.randn(3, length, 32, generator=torch.Generator().manual_seed(seed))


def max_of(layer: Attention, x) -> torch.Tensor:
    """max_logit of one forward of a copy."""
    layer = copy.deepcopy(layer)
    layer.max_logit = None
    layer(x)
    return layer.max_logit


def logits_by_hand(layer: Attention, x, mask=None) -> torch.Tensor:
    """Per head the largest logit, pair by pair from the equations, in fp64; masked tokens are deleted beforehand."""
    layer, top = copy.deepcopy(layer).double(), torch.full((layer.heads,), -math.inf, dtype=torch.float64)
    r = layer.rotary_width // 2 if layer.cfg.positions == "rope" else 0
    for b, row in enumerate(x.double()):
        row = row if mask is None else row[mask[b]]
        heads = layer.qkv(row).detach().unflatten(-1, (-1, layer.width))  # (T, H + 2G, K)
        angle = torch.arange(len(row))[:, None] * 10000.0 ** (-torch.arange(r, dtype=torch.float64) / max(r, 1))
        z = torch.polar(torch.ones_like(angle), angle)[:, None] * torch.complex(heads[..., :r], heads[..., r : 2 * r])
        heads = torch.cat([z.real, z.imag, heads[..., 2 * r :]], -1)
        for h in range(layer.heads):
            key = layer.heads + h * layer.kv_heads // layer.heads
            for t in range(len(row)):
                for j in range(max(0, t - layer.window + 1) if layer.window else 0, t + 1):
                    top[h] = max(top[h], heads[t, h] @ heads[j, key] / layer.width**0.5)
    return top


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_the_measurement_is_the_largest_logit_of_each_head(variant, path):
    layer = layer_with_hot_heads(**variant)
    layer(batch())
    torch.testing.assert_close(layer.max_logit.double(), logits_by_hand(layer, batch()), rtol=FP32, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_after_the_clip_no_logit_of_the_same_batch_exceeds_tau(variant, alpha):
    layer = layer_with_hot_heads(**variant)
    layer(batch())
    before = layer.max_logit.clone()
    tau = float(before.sort().values[1:3].mean())
    metrics = qk_clip([layer.qk_heads()], tau=tau, alpha=alpha)
    assert metrics == {"max_logit": float(before.max()), "clipped_heads": 2}
    torch.testing.assert_close(
        logits_by_hand(layer, batch()), before.clamp(max=tau).double(), rtol=FP32, atol=0, msg="g_h·S_h, and no more"
    )
    layer(batch())
    assert float(layer.max_logit.max()) <= tau * (1 + FP32)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_heads_below_tau_keep_their_bits_and_so_do_values_and_outputs(variant):
    layer = layer_with_hot_heads(**variant)
    layer(batch())
    tau = float(layer.max_logit.sort().values[1:3].mean())
    hot, before = layer.max_logit > tau, copy.deepcopy(layer).requires_grad_(False)
    assert 0 < hot.sum() < 4
    qk_clip([layer.qk_heads()], tau=tau)
    grouped = layer.kv_heads != layer.heads
    touched = torch.cat([hot, hot if not grouped else torch.zeros(layer.kv_heads, dtype=torch.bool)])
    touched = torch.cat([touched, torch.zeros(layer.kv_heads, dtype=torch.bool)])
    for name, old in before.qkv.named_parameters():
        new, old = (t.unflatten(0, (-1, 8)) for t in (getattr(layer.qkv, name), old))
        assert torch.equal(new[~touched], old[~touched])
        assert all(not torch.equal(a, b) for a, b in zip(new[touched], old[touched]))
    assert all(torch.equal(a, b) for a, b in zip(layer.out.parameters(), before.out.parameters()))


def test_alpha_is_the_share_of_the_queries():
    for alpha in (0.0, 0.3, 1.0):
        layer = layer_with_hot_heads(bias=True)
        layer(batch())
        g = (1.0 / layer.max_logit.clamp(min=1.0)).double()
        before = layer.qkv.weight.detach().clone(), layer.qkv.bias.detach().clone()
        qk_clip([layer.qk_heads()], tau=1.0, alpha=alpha)
        factor = torch.cat([g**alpha, g ** (1 - alpha), torch.ones(4)]).repeat_interleave(8)
        for old, new in zip(before, (layer.qkv.weight, layer.qkv.bias)):
            expected = factor.view(-1, *[1] * (old.ndim - 1)) * old.double()
            torch.testing.assert_close(new.double(), expected, rtol=4 * 2**-24, atol=0)  # g, its power, a product


def test_tracking_changes_no_output_and_costs_nothing_when_off_or_in_evaluation(path, monkeypatch):
    layer = layer_with_hot_heads(n_kv_head=2)
    on = layer(batch())[0]
    layer.track_logits, layer.max_logit = False, None
    calls = []
    monkeypatch.setattr(attention, "max_logits", lambda *a, **k: calls.append(1))
    assert torch.equal(layer(batch())[0], on)
    layer.track_logits = True
    layer.eval()(batch())
    assert not calls and layer.max_logit is None
    layer.train()(batch())
    assert calls, "the switch is what kept it from being called"


def test_both_ways_of_computing_attention_measure_the_same(monkeypatch):
    results = []
    for limits in (attention.EXPLICIT_UP_TO, {}):
        monkeypatch.setattr(attention, "EXPLICIT_UP_TO", limits)
        layer = layer_with_hot_heads(n_kv_head=2)
        layer(batch())
        results.append(layer.max_logit)
    assert torch.equal(*results), "one function measures for both"


@pytest.mark.parametrize("window", [0, 4])
def test_masked_tokens_are_not_measured(path, window):
    layer = layer_with_hot_heads(**({"pattern": "W", "window": window} if window else {}))
    x = batch()
    mask = torch.rand(3, 12, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[0, :4], mask[1, -4:] = False, False  # padding left and right: the leftmost see nothing at all
    x[~mask] *= 1000  # one pair with a masked token would outdo all others
    layer(x, mask=mask)
    torch.testing.assert_close(layer.max_logit.double(), logits_by_hand(layer, x, mask), rtol=FP32, atol=0)


def test_a_mask_without_holes_and_a_cache_are_measured_too(path):
    layer, x = layer_with_hot_heads(), batch()
    layer(x, mask=torch.ones(3, 12, dtype=torch.bool))
    torch.testing.assert_close(layer.max_logit.double(), logits_by_hand(layer, x), rtol=FP32, atol=0)
    layer.max_logit = None
    _, state = layer(x[:, :5])
    layer(x[:, 5:], state)
    torch.testing.assert_close(layer.max_logit.double(), logits_by_hand(layer, x), rtol=FP32, atol=0)


def test_a_token_beyond_the_window_is_not_measured(path):
    x = batch()
    x[:, 0] *= 1000
    x[:, 1:4] = 0  # those that see token 0 through a window of 4, itself apart, have no query
    layer = layer_with_hot_heads(pattern="W", window=4)
    layer(x)
    expected = logits_by_hand(layer, x)
    torch.testing.assert_close(layer.max_logit.double(), expected, rtol=FP32, atol=0)
    layer.window, layer.max_logit = 0, None
    layer(x)
    assert bool((layer.max_logit > 2 * expected).any()), "or the window would hide nothing"


def test_measurements_accumulate_over_micro_batches_and_are_used_up_by_the_clip():
    layer, x = layer_with_hot_heads(), batch(seed=3)
    own = []
    for part in x.split(1):
        own.append(max_of(layer, part))
        layer(part)
    by_parts = layer.max_logit
    assert len(set(torch.stack(own).argmax(0).tolist())) > 1, "the maxima must not all lie in one micro-batch"
    layer.max_logit = None
    layer(x)
    torch.testing.assert_close(by_parts, layer.max_logit, rtol=FP32, atol=0)
    weight = layer.qkv.weight
    qk_clip([layer.qk_heads()], tau=1.0)
    after = weight.detach().clone()
    assert bool((layer.max_logit == -math.inf).all())
    with pytest.raises(UserError, match="no logit of layer 0 was measured"):
        qk_clip([layer.qk_heads()], tau=1.0)
    layer(x)
    qk_clip([layer.qk_heads()], tau=1.0)  # the largest are 1 now: a stale measurement would shrink the heads again
    torch.testing.assert_close(weight.detach(), after, rtol=FP32, atol=0)


@pytest.mark.parametrize("visible", [None, "window", "rows"])
def test_chunks_bound_the_memory_and_change_nothing(visible, monkeypatch):
    B, H, G, T, K = 2, 6, 3, 50, 8
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(B, H, T, K, generator=g), torch.randn(B, G, T, K, generator=g)
    t = torch.arange(T)
    if visible == "window":
        visible = (t[None] <= t[:, None]) & (t[None] > t[:, None] - 7)
    elif visible == "rows":
        visible = torch.rand(B, 1, T, T, generator=g) < 0.3
    whole = max_logits(q, k, visible, scale=0.25)
    mask = torch.ones(T, T).tril().bool() if visible is None else visible
    by_hand = (0.25 * q @ k.repeat_interleave(2, 1).mT).masked_fill(~mask, -math.inf).amax((0, 2, 3))
    torch.testing.assert_close(whole, by_hand, rtol=FP32, atol=0)

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype != torch.bool:
                self.numel = max(self.numel, out.numel())
            return out

    with Largest() as unbounded:
        max_logits(q, k, visible, scale=0.25)
    assert unbounded.numel >= B * H * T * T
    for limit in (7 * B * H * T, 20 * B * H * T, 1):  # seven queries, twenty, and one: the least there can be
        monkeypatch.setattr(attention, "MEASURED_LOGITS", limit)
        with Largest() as bounded:
            chunked = max_logits(q, k, visible, scale=0.25)
        assert bounded.numel <= max(limit, B * H * T, q.numel())  # q itself may be viewed whole
        torch.testing.assert_close(chunked, whole, rtol=FP32, atol=0)


def test_qk_norm_is_refused_and_the_text_says_what_to_type():
    layer = layer_with_hot_heads(qk_norm=True)
    layer(batch())
    assert layer.max_logit is not None, "measuring is fine, it is clipping that has no effect"
    with pytest.raises(UserError, match=r"Use `qk_clip` 0, or `qk_norm` false"):
        layer.qk_heads()


def test_bf16_weights_and_autocast_are_clipped_to_their_precision(path):
    layer = layer_with_hot_heads(bias=True).bfloat16()
    layer(batch().bfloat16())
    tau = float(layer.max_logit.sort().values[1:3].mean())
    assert qk_clip([layer.qk_heads()], tau=tau)["clipped_heads"] == 2 and layer.qkv.weight.dtype == torch.bfloat16
    layer(batch().bfloat16())
    assert float(layer.max_logit.max()) == pytest.approx(tau, rel=2 * BF16)  # weights and activations both
    layer = layer_with_hot_heads(bias=True)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            layer(batch())[0].sum().backward()
        assert layer.max_logit.dtype == torch.float32
        metrics = qk_clip([layer.qk_heads()], tau=10.0)
    assert metrics["max_logit"] == pytest.approx(10, rel=BF16) and layer.qkv.weight.dtype == torch.float32


def test_heads_without_a_positive_logit_are_left_alone():
    q, k = torch.ones(3, 3, 4), torch.ones(3, 3, 4)
    metrics = qk_clip([([q], [k], torch.tensor([-3.0, 0.0, 400.0]))], tau=100.0)
    assert metrics == {"max_logit": 400.0, "clipped_heads": 1}
    for t in (q, k):
        assert bool((t[:2] == 1).all() and (t[2] == 0.5).all())


def test_a_logit_that_is_not_finite_stops_before_anything_is_scaled():
    for bad in (math.nan, math.inf):
        q, k = torch.ones(2, 3, 4), torch.ones(2, 3, 4)
        fine = ([q], [k], torch.tensor([500.0, 1.0]))
        with pytest.raises(UserError, match="head 1 of layer 1 has a logit that is not finite"):
            qk_clip([fine, ([q], [k], torch.tensor([1.0, bad]))])
        assert bool((q == 1).all() and (k == 1).all()) and float(fine[2][0]) == 500


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"tau": 0.0}, "tau = 0.0 must be a finite number above 0"),
        ({"tau": math.nan}, "tau = nan"),
        ({"alpha": 1.5}, r"alpha = 1.5, .* must be in \[0, 1\]"),
        ({"layers": []}, "there is no layer"),
        ({"layers": [([torch.ones(4, 2, 3)], [torch.ones(3, 2, 3)], torch.ones(4))]}, "key heads that divide"),
        ({"layers": [([torch.ones(8, 3)], [torch.ones(8, 3)], torch.ones(4))]}, "layer 0 has q .*head axis first"),
        ({"layers": [([torch.ones(4, 2, 3), torch.ones(8)], [torch.ones(4, 2, 3)], torch.ones(4))]}, "layer 0 has q"),
        ({"layers": [([torch.ones(4, 2, 3)], [torch.ones(4, 2, 3)], None)]}, "no logit of layer 0 was measured"),
    ],
)
def test_mistakes_are_named(arguments, text):
    good = [([torch.ones(4, 2, 3)], [torch.ones(4, 2, 3)], torch.ones(4))]
    with pytest.raises(UserError, match=text):
        qk_clip(**{"layers": good} | arguments)


def test_a_copy_in_place_of_a_view_is_refused_but_the_transpose_of_a_conv1d_is_a_view():
    fused = torch.nn.Parameter(torch.ones(6, 12))  # transformers' Conv1D: (in, out), q k v side by side
    copied = fused.T[:4].reshape(2, 12)  # (4, 6) with strides (1, 12) cannot be viewed so
    k = fused.T[4:8].unflatten(0, (2, 2))
    with pytest.raises(UserError, match="no view of it"):
        qk_clip([([copied], [k], torch.tensor([200.0, 1.0]))])
    qk_clip([([fused.T[:4].unflatten(0, (2, 2))], [k], torch.tensor([400.0, 1.0]))])
    assert torch.equal(fused[:, [0, 1, 4, 5]], torch.full((6, 4), 0.5)) and bool((fused[:, [2, 3, 6, 7, 8]] == 1).all())


def test_the_example_for_your_own_model_runs_as_printed():
    code = textwrap.dedent(inspect.getdoc(qk_clip).split("after the rotation:")[1])
    forward = "\n".join(line.strip() for line in code.splitlines() if "self.peak =" in line)
    rest = "\n".join(line for line in code.splitlines() if "self.peak =" not in line)

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj = torch.nn.Linear(16, 16), torch.nn.Linear(16, 8, bias=False)
            self.peak = torch.full((4,), -torch.inf)

        def forward(self, x):
            q = self.q_proj(x).unflatten(-1, (4, 4)).transpose(1, 2)
            k = self.k_proj(x).unflatten(-1, (2, 4)).transpose(1, 2)
            exec(forward, {"self": self, "q": q, "k": k, "K": 4, "torch": torch, "max_logits": max_logits})

    attentions, x = [Own(), Own()], 100 * torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    peaks = []
    for _ in range(2):
        for a in attentions:
            a(x)
        scope = {"attentions": attentions, "H": 4, "G": 2, "K": 4}
        exec(rest, scope)
        peaks.append(scope["metrics"]["max_logit"])
    assert peaks[0] > 200 and peaks[1] == pytest.approx(100, rel=FP32)


def test_copies_and_checkpoints_carry_no_measurement():
    layer = layer_with_hot_heads()
    layer(batch())
    assert not any("max_logit" in name for name in layer.state_dict())


RANK = """
import sys, torch, torch.distributed as dist
from test_qk_clip import batch, layer_with_hot_heads
from muonlm.errors import UserError
from muonlm.optim.watch.qk_clip import qk_clip
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
layer, idle = layer_with_hot_heads(bias=True), layer_with_hot_heads(seed=5)
layer(batch(seed=1 + rank))
if rank == 1:
    idle(batch(seed=7))  # this rank alone had rows for the second layer
metrics = qk_clip([layer.qk_heads(), idle.qk_heads()], tau=2.0)
torch.save([metrics, layer.qkv.weight.data, layer.qkv.bias.data, idle.qkv.weight.data], f"{folder}/{rank}.pt")
for bad_rank in (0, 1):  # whichever rank holds the NaN, both must stop: the replicas stay equal
    peak = torch.tensor([float("nan") if rank == bad_rank else 500.0])
    try:
        qk_clip([([torch.ones(1, 2, 2)], [torch.ones(1, 2, 2)], peak)])
    except UserError as error:
        assert "head 0 of layer 0 has a logit that is not finite" in str(error), error
    else:
        raise AssertionError(f"rank {rank} went on though rank {bad_rank} had a NaN")
dist.barrier()  # a rank that leaves while the other still talks has aborted the other at its exit
dist.destroy_process_group()
"""


def test_two_ranks_clip_alike_and_as_one_process_with_both_batches(tmp_path):
    here = str(Path(__file__).parent)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(r), str(tmp_path)], cwd=here, stderr=subprocess.PIPE, text=True
        )
        for r in (0, 1)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=60)
        assert rank.returncode == 0, errors
    layer, idle = layer_with_hot_heads(bias=True), layer_with_hot_heads(seed=5)
    layer(batch(seed=1))
    first = layer.max_logit
    layer(batch(seed=2))
    assert 0 < (layer.max_logit > first).sum() < 4, "each rank must hold the largest logit of some head"
    idle(batch(seed=7))
    metrics = qk_clip([layer.qk_heads(), idle.qk_heads()], tau=2.0)
    for rank in (0, 1):
        theirs, *weights = torch.load(tmp_path / f"{rank}.pt")
        assert theirs == metrics  # same products on the same machine: bit for bit
        for a, b in zip(weights, (layer.qkv.weight, layer.qkv.bias, idle.qkv.weight)):
            assert torch.equal(a, b)
