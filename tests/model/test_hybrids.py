"""Whole models of every mixer, pattern, loop and recursion: cuts, masks, causality, initial values, learning."""

import math
import re

import pytest
import torch
from torch import nn

from muonlm.cli.facts import describe
from muonlm.cli.tables import config_rows
from muonlm.config.recipes import load_recipe
from muonlm.config.schema import ModelConfig
from muonlm.engine import map_state, stream
from muonlm.errors import UserError
from muonlm.model import build_model, check_model, count_parameters, layer_parameters, lm, train_flops_per_token
from muonlm.model.mixers import MIXERS
from muonlm.optim import Muon, route
from muonlm.sampling import Sampling

SMALL = {"n_layer": 2, "d_model": 32, "n_head": 4, "vocab_size": 50, "block_size": 64, "delta_heads": 2, "ssm_head": 16}
SMALL |= {"d_state": 4, "scan_chunk": 8, "window": 5, "init": "lm"}
VARIANTS = {entry.name: {"pattern": entry.letter} for entry in MIXERS.values()}
VARIANTS |= {
    "lW": {"pattern": "lW"},
    "GA, no MLP": {"pattern": "GA", "mlp": "none", "embed_conv": 4},
    "MSR": {"pattern": "MSR", "n_layer": 3, "mlp": "none", "norm": "layernorm", "bias": True, "positions": "learned"},
    "looped": {"pattern": "lA", "loops": 3},
    "looped middle, injected": {"pattern": "Mdg", "n_layer": 3, "loops": 2, "loop_blocks": "1:3", "inject": True},
    "reference": {"pattern": "ld", "scan": "reference"},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def small(**overrides) -> lm.LM:
    return build_model(ModelConfig(**SMALL | overrides), seed=3).double().eval()


def tokens(rows=3, length=20, seed=0):
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


@every_variant
def test_prefill_in_any_pieces_equals_one_pass(variant):
    model, x = small(**variant), tokens()
    full, end = model(x)
    for cuts in ([20], [1] * 20, [7, 1, 1, 6, 5], [19, 1]):
        state, pieces = model.init_state(3, dtype=torch.float64), []
        for piece in x.split(cuts, 1):
            y, state = model(piece, state=state)
            pieces.append(y)
        torch.testing.assert_close(torch.cat(pieces, 1), full, rtol=0, atol=1e-11)
        assert torch.equal(state[-1], end[-1])


@every_variant
def test_masked_tokens_are_as_good_as_deleted(variant):
    """Outputs of real tokens, what follows from the state, the loss and its gradients; one row has no real token."""
    model, x = small(**variant), tokens(5)
    mask = torch.rand(5, 20, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[0], mask[1, :5], mask[2, -4:], mask[3] = True, False, False, False
    y, state = model(x, mask=mask)
    following = tokens(5, 3, seed=9)
    then, _ = model(following, state=map_state(torch.clone, state))
    for row in range(5):
        if row == 3:
            alone_state = model.init_state(1, dtype=torch.float64)
        else:
            alone, alone_state = model(x[row : row + 1, mask[row]])
            torch.testing.assert_close(y[row, mask[row]], alone[0], rtol=0, atol=1e-11)
        expected = model(following[row : row + 1], state=alone_state)[0][0]
        torch.testing.assert_close(then[row], expected, rtol=0, atol=1e-11)
    parameters = list(model.parameters())
    loss = model(x, torch.where(mask, tokens(5, seed=4), -100), mask=mask)
    rows = [r for r in range(5) if r != 3]
    apart = sum(model(x[r : r + 1, mask[r]], tokens(5, seed=4)[r : r + 1, mask[r]]) for r in rows)
    torch.testing.assert_close(loss, apart, rtol=1e-12, atol=0)
    for a, b in zip(*(torch.autograd.grad(one, parameters, allow_unused=True) for one in (loss, apart)), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@every_variant
def test_full_masks_and_empty_batches_are_ordinary(variant):
    model, x = small(**variant), tokens()
    masked, state = model(x, mask=torch.ones_like(x, dtype=torch.bool))
    torch.testing.assert_close(masked, model(x)[0], rtol=0, atol=1e-12)
    assert state[-1].tolist() == [20, 20, 20]
    loss = model(x[:0], x[:0])  # a rank without rows takes part
    loss.backward()
    assert loss == 0 and model(x[:0])[0].shape == (0, 20, 50)


@every_variant
def test_a_bf16_model_and_bf16_autocast_stay_near_fp32(variant):
    if "reference" in variant.values():
        pytest.skip("the loop is slow, and its arithmetic is that of the other forms")
    model, x = build_model(ModelConfig(**SMALL | variant), seed=3).eval(), tokens()
    true = model(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(x)[0]
    bare = model.to(torch.bfloat16)(x)[0]
    for found in (cast, bare):
        assert (found.float() - true).norm() / true.norm() < 0.05  # 8 bits, through up to six layers


@every_variant
def test_no_output_depends_on_a_later_token(variant):
    """By perturbation, and by the gradient of an early output with respect to the embeddings of later tokens."""
    model, x = small(**variant), tokens(1)
    before, _ = model(x)
    for t in (1, 9, 19):
        changed = x.clone()
        changed[0, t] = (changed[0, t] + 1) % 50
        after, _ = model(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-12)
        assert (after[:, t] - before[:, t]).abs().max() > 1e-6
    seen = []
    model.embed.register_forward_hook(lambda module, given, out: seen.append(out) or out.retain_grad())
    model(x)[0][0, 9].sum().backward()
    reach = seen[0].grad[0].abs().amax(-1)
    assert reach[10:].max() == 0 and reach[9] > 0 and reach[:9].max() > 0


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
@pytest.mark.parametrize("letter", "MmLl")
def test_a_model_in_fp32_follows_the_loop_in_fp64(letter, backend):
    """Through the mixers, with the compiled kernels: logits, and gradients of all parameters together."""
    model = small(pattern=letter, scan="reference", d_state=16)
    fast = build_model(ModelConfig(**SMALL | {"pattern": letter, "scan": backend, "d_state": 16}), seed=3).eval()
    outs = []
    for one in (fast, model):
        loss = one(tokens(), tokens(seed=4))
        grads = torch.autograd.grad(loss, list(one.parameters()))
        outs.append((one(tokens())[0].double(), torch.cat([g.flatten().double() for g in grads])))
    for found, true in zip(*outs):
        assert (found - true).norm() / true.norm() < 5e-6  # fp32 against fp64, through a whole model


def test_recomputed_blocks_give_the_same_loss_and_gradients_and_keep_less():
    """Dropout included: the second run of a block draws the numbers of the first."""
    x, kept, results = tokens(), [], []
    model = small(pattern="lGA", n_layer=3, dropout=0.1).train()
    for model.recompute in (False, True):
        sizes = {}
        torch.manual_seed(5)
        hook = lambda t: sizes.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(hook, lambda t: t):
            loss = model(x, tokens(seed=4))
        kept.append(sum(sizes.values()))
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert kept[1] < kept[0] / 3


def test_each_application_of_a_looped_block_has_a_state_of_its_own():
    model = small(pattern="l", loops=3)
    assert len(model(tokens())[1]) == len(model.init_state(3)) == 2 * 3 + 2
    once = small(pattern="l", loops=1)
    assert count_parameters(model.cfg) == count_parameters(once.cfg)
    assert (model(tokens())[0] - once(tokens())[0]).abs().max() > 1e-3
    model.cfg.loops = 1  # may change after training
    once.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(tokens())[0], once(tokens())[0], rtol=0, atol=0)


@pytest.mark.parametrize("init", ["lm", "dt_small", "stack", "gpt2", "zero_out"])
def test_initial_values_of_each_regime(init):
    wide = {"d_model": 256, "n_head": 4, "n_layer": 3, "d_state": 16, "ssm_head": 64, "delta_heads": 4, "mlp": "none"}
    model = build_model(ModelConfig(**SMALL | wide | {"pattern": "MLD", "loops": 3, "init": init}), seed=1)
    mamba, longhorn, mamba2 = (block.mixer for block in model.blocks)
    steps = nn.functional.softplus(mamba.dt_proj.bias)
    assert (
        1e-4 <= steps.min() and steps.max() <= 0.1 + 1e-6 and 0.005 < steps.median() < 0.02
    )  # log-uniform in [.001, .1]
    torch.testing.assert_close(mamba.A_log[5].exp(), torch.arange(1.0, 17.0))
    assert (
        mamba.dt_proj.weight.abs().max() <= 16**-0.5 and mamba.dt_proj.weight.std() > 0.13
    )  # uniform ± R^−½ in all regimes
    assert 1 <= mamba2.A_log.exp().min() and mamba2.A_log.exp().max() <= 16 and bool((mamba2.D == 1).all())
    s = torch.sigmoid(longhorn.dt_head.bias)
    assert (s.max() < 0.096 and s.min() > 9e-4) if init == "dt_small" else bool((s == 0.5).all())
    branches = {"zero_out": math.inf, "stack": 2 * 9}.get(init, 9)  # nine applications, one branch each
    spread = {"lm": 512**-0.5 / 3**0.5, "dt_small": 512**-0.5 / 3**0.5}.get(init, 0.02) / branches**0.5
    assert longhorn.out_proj.weight.std().item() == pytest.approx(spread, rel=0.02, abs=1e-12)
    inside = {"lm": 256**-0.5 / 3**0.5, "dt_small": 256**-0.5 / 3**0.5, "zero_out": 256**-0.5}.get(init, 0.02)
    assert longhorn.in_proj.weight.std().item() == pytest.approx(inside, rel=0.02)
    taps = (512 * 4) ** -0.5 if init == "stack" else 4**-0.5 / 3**0.5
    assert longhorn.conv1d.weight.std().item() == pytest.approx(taps, rel=0.06)


def test_tied_models_share_the_storage():
    model = small(tie=True, pattern="M")
    assert model.head is None and "head.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("letter", MIXERS)
def test_a_small_model_of_each_letter_learns_a_repeated_batch_by_heart(letter, optimizer):
    """Loss below 0.1 on 32 tokens: every gradient arrives, through the kernels that training uses (fp32, numba)."""
    torch.manual_seed(0)
    size = {"n_layer": 1, "d_model": 64, "delta_heads": 2, "delta_key": 16, "tie": False}
    model = build_model(ModelConfig(**SMALL | size | {"pattern": letter}), seed=1)
    if optimizer == "muon":
        method = {"ns_method": "direct", "ns_dtype": "float32", "ns_steps": 3}
        opt = Muon(route(model).groups(lr=0.05, adamw_lr=2e-2), **method)
    else:
        opt = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    x, y = tokens(1, 32), tokens(1, 32, seed=1)
    loss = math.inf
    for _ in range(80):
        total = model(x, y) / 32
        total.backward()
        opt.step()
        opt.zero_grad()
        loss = total.item()
        if loss < 0.1:
            break
    assert loss < 0.1, loss


def test_names_and_letters_of_a_pattern_are_the_same():
    assert ModelConfig(**SMALL | {"pattern": "mamba, mamba,attention"}).pattern == "MMA"
    assert ModelConfig(**SMALL | {"pattern": "Muon_Longhorn"}).pattern == "l"
    assert ModelConfig(**SMALL | {"pattern": "M,attention"}).pattern == "MA"
    check_model(ModelConfig(**SMALL | {"pattern": "M", "d_model": 33}))  # heads and RoPE concern attention alone


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"pattern": "mambo"}, "Did you mean 'mamba'? Mixers: A attention, "),
        ({"pattern": "mambo,A"}, "stacked_recursion; Muon forms: m, d, l, g, V."),
        ({"pattern": "recursio"}, "Did you mean 'stacked_recursion'?"),
        ({"pattern": ""}, "unknown letters"),
        ({"pattern": "D", "ssm_head": 48}, "use `ssm_head` 16"),
        ({"pattern": "D", "ssm_groups": 3}, "use `ssm_groups` 1"),
        ({"pattern": "G", "delta_heads": 32}, "use `delta_heads` 1"),
        ({"n_head": 3}, "`d_model` = 32 is not a multiple of `n_head` = 3; use `d_model` 33"),
        ({"n_kv_head": 3}, "use `n_kv_head` 2"),
        ({"n_head": 32}, "`positions` learned"),
        ({"kind": "modular", "n_head": 3}, "use `d_model` 33"),
        ({"beta": 1.0}, "beta"),
        ({"write_eps": 1e-25}, "1e-18"),
        ({"alpha": math.inf}, "a number"),
        ({"pattern": "mmma"}, "Write A for a"),
        ({"pattern": "S", "attention_scales": [1, 128]}, "from 1 to `block_size` = 64"),
        ({"loop_blocks": "1:9"}, "n_layer = 2"),
        ({"loop_blocks": "all"}, "FIRST:END"),
        ({"scan": "cuda"}, "triton"),
    ],
)
def test_impossible_models_are_refused_with_the_way_out(keys, says):
    with pytest.raises(UserError, match=re.escape(says)):
        check_model(ModelConfig(**SMALL | keys))


def test_a_recurrent_model_writes_beyond_its_block_size_with_a_state_of_constant_size():
    """Sixty-four tokens are its training rows; the engine carries the state on and never reads the past again."""
    model = small(pattern="lW").float()
    assert (
        model.context is None
        and small(pattern="lA").context == 64
        and small(positions="learned", pattern="l").context == 64
    )
    lengths = []
    model.register_forward_pre_hook(lambda module, given: lengths.append(given[0].shape[1]))
    out = [step[0] for step in stream(model, [1, 2, 3], Sampling(max_tokens=150, temperature=0))]
    assert len(out) == 150 and lengths == [3] + [1] * 149
    x = torch.tensor([[1, 2, 3, *out]])
    assert model(x)[0][0, 2:-1].argmax(-1).tolist() == out  # as a single pass over everything would


def test_flops_count_every_application_and_only_attention_grows_with_the_context():
    of = lambda **keys: train_flops_per_token(ModelConfig(**SMALL | keys))  # noqa: E731
    assert of(pattern="M", block_size=64) == of(pattern="M", block_size=128)
    assert of(pattern="A", block_size=128) - of(pattern="A", block_size=64) == 2 * 12 * 64 * 32
    assert of(pattern="W", block_size=128) == of(pattern="W", block_size=64)
    head = 6 * 50 * 32
    assert of(pattern="l", loops=3) - head == pytest.approx(3 * (of(pattern="l") - head))
    cfg = ModelConfig(**SMALL | {"pattern": "M"})
    assert of(pattern="M") == 6 * (sum(layer_parameters(cfg)) + 50 * 32) + 2 * 35 * 4 * 64


def test_info_names_every_layer_with_its_write_gain():
    rows = dict(config_rows(describe(load_recipe("muonssm/muonlonghorn-cpu"))))
    assert rows["layers"] == "2 × muon_longhorn, 540,288 parameters each, write gain 0.7010"
    assert "1,081,344 without embeddings" in rows["parameters"]
