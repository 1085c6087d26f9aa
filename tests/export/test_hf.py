"""Weights go to transformers' Mamba and Mamba-2 and back, bit for bit, and both models then say the same."""

import copy

import pytest
import torch

from muonlm.config.schema import ModelConfig
from muonlm.engine import stream
from muonlm.errors import UserError
from muonlm.export.hf import from_transformers, to_transformers
from muonlm.model import build_model
from muonlm.sampling import Sampling

transformers = pytest.importorskip("transformers")

VOCAB = 61
COMMON = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 3,
    "hidden_size": 24,
    "conv_kernel": 3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
THEIRS = {
    "mamba tied": ("Mamba", {"state_size": 5, "time_step_rank": 3}),
    "mamba untied, biases": ("Mamba", {"state_size": 16, "tie_word_embeddings": False, "use_bias": True, "expand": 3}),
    "mamba other epsilon": ("Mamba", {"layer_norm_epsilon": 1e-2}),
    "mamba2": ("Mamba2", {"state_size": 8, "head_dim": 16, "num_heads": 3, "n_groups": 1, "chunk_size": 8}),
    "mamba2 groups, tied": (
        "Mamba2",
        {"state_size": 8, "head_dim": 8, "num_heads": 6, "n_groups": 2, "chunk_size": 16, "tie_word_embeddings": True},
    ),
}


def theirs_of(name: str, **changes):
    """A random model in which every parameter matters: what they fill with zeros, ones or equal rows is random too."""
    family, options = THEIRS[name]
    torch.manual_seed(0)
    config = getattr(transformers, family + "Config")(**COMMON | options | changes)
    model = getattr(transformers, family + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for block in model.backbone.layers:  # a tied head behind small branches would say the same token for ever
            block.mixer.out_proj.weight.mul_(10)
    return model


@pytest.fixture(params=THEIRS)
def pair(request):
    theirs = theirs_of(request.param)
    grouped = THEIRS[request.param][1].get("n_groups", 1) > 1
    if grouped and not hasattr(theirs.backbone.layers[0].mixer.norm, "group_size"):
        pytest.skip("this transformers normalises over all groups at once, which Mamba-2 does not")
    return theirs, from_transformers(theirs, block_size=128)


def tokens(B: int, T: int) -> torch.Tensor:
    return torch.randint(VOCAB, (B, T), generator=torch.Generator().manual_seed(1))


# fp32, three layers, logits of about 1: sums in another order differ by 2e-6 at most where this was written
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@torch.no_grad()
def test_logits_are_equal(pair):
    theirs, ours = pair
    x = tokens(2, 37)  # no multiple of any chunk
    expected = theirs(x).logits
    assert expected.std() > 0.1  # or equality would say little
    torch.testing.assert_close(ours(x)[0], expected, **CLOSE)


def test_gradients_are_equal(pair):
    theirs, ours = pair
    x = tokens(2, 20)
    theirs(x).logits.logsumexp(-1).sum().backward()
    ours(x)[0].logsumexp(-1).sum().backward()
    found = {name: p.grad for name, p in ours.named_parameters()}
    (last,) = [
        p.grad
        for name, p in theirs.named_parameters()
        if name.endswith(f".{COMMON['num_hidden_layers'] - 1}.mixer.A_log")
    ]
    # a gradient sums 40 tokens; the largest deviation seen was 1e-5 of the largest entry
    torch.testing.assert_close(found["blocks.2.mixer.A_log"], last, rtol=1e-4, atol=1e-4 * float(last.abs().max()))


@torch.no_grad()
def test_prefill_and_steps_give_the_logits_of_the_whole(pair):
    theirs, ours = pair
    x = tokens(2, 30)
    expected = theirs(x).logits
    logits, state = ours(x[:, :13])
    torch.testing.assert_close(logits, expected[:, :13], **CLOSE)
    for t in range(13, 30):
        logits, state = ours(x[:, t : t + 1], state=state)
        torch.testing.assert_close(logits[:, 0], expected[:, t], **CLOSE)


@torch.no_grad()
def test_greedy_generation_is_equal_for_50_tokens(pair):
    theirs, ours = pair
    prompt = tokens(1, 7)
    expected = theirs.generate(prompt, max_new_tokens=50, do_sample=False)[0, 7:].tolist()
    found = [step[0] for step in stream(ours, prompt[0].tolist(), Sampling(max_tokens=50, temperature=0))]
    assert len(set(expected)) > 3  # not one token over and over
    assert found == expected


def test_to_transformers_and_back_is_bitwise(pair):
    theirs, ours = pair
    again = to_transformers(ours)
    assert type(again) is type(theirs)
    mine, other = theirs.state_dict(), again.state_dict()
    assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)
    back = from_transformers(again, block_size=128)
    assert back.cfg == ours.cfg
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), back.state_dict().values(), strict=True))
    assert (again.lm_head.weight is again.backbone.embeddings.weight) == ours.cfg.tie  # still tied in training


@pytest.mark.parametrize("letter, heads", [("M", {}), ("D", {"ssm_head": 16})])
def test_a_model_of_ours_goes_out_and_comes_back(letter, heads):
    ours = build_model(
        ModelConfig(
            pattern=letter, n_layer=2, d_model=32, n_head=1, mlp="none", vocab_size=VOCAB, norm_eps=1e-5, **heads
        )
    ).eval()
    theirs = to_transformers(ours)
    x = tokens(2, 19)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, ours(x)[0], **CLOSE)
    back = from_transformers(theirs, block_size=ours.cfg.block_size)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), back.state_dict().values(), strict=True))


def test_bf16_weights_arrive_exactly_and_as_fp32():
    theirs = theirs_of("mamba tied").to(torch.bfloat16)
    ours = from_transformers(theirs)
    assert {w.dtype for w in ours.state_dict().values()} == {torch.float32}
    assert torch.equal(ours.embed.weight.bfloat16(), theirs.backbone.embeddings.weight)


def test_the_given_model_is_left_alone(pair):
    theirs, ours = pair
    before = copy.deepcopy(theirs.state_dict())
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], w) for name, w in theirs.state_dict().items())


@pytest.mark.parametrize(
    "name, change, word",
    [
        ("mamba tied", {"use_conv_bias": False}, "use_conv_bias"),
        ("mamba tied", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("mamba2", {"time_step_limit": (0.01, 0.1)}, "time_step_limit"),
        ("mamba2", {"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon"),
    ],
)
def test_what_ours_cannot_express_is_refused_by_name(name, change, word):
    with pytest.raises(UserError, match=word):
        from_transformers(theirs_of(name, **change))


def test_another_family_is_refused():
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11, n_positions=8)
    )
    with pytest.raises(UserError, match="'gpt2' has no counterpart"):
        from_transformers(theirs)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"pattern": "MA"}, "'MA' is no model"),
        ({"pattern": "m"}, "'m' is no model"),
        ({"mlp": "swiglu"}, "`mlp` = 'none'"),
        ({"norm": "layernorm"}, "`norm` = 'rmsnorm'"),
        ({"embed_conv": 2}, "`embed_conv` = 0"),
        ({"loops": 2}, "`loops` = 1"),
        ({"logit_softcap": 30.0}, "`logit_softcap` = 0"),
        ({"res_scale": "both"}, "`res_scale` = 'none'"),
        ({"pattern": "D", "ssm_head": 16, "norm_eps": 1e-6}, "`norm_eps` = 1e-05"),
    ],
)
def test_what_theirs_cannot_express_is_refused_by_name(change, word):
    cfg = ModelConfig(
        **{"pattern": "M", "n_layer": 2, "d_model": 16, "n_head": 1, "mlp": "none", "vocab_size": 11} | change
    )
    with pytest.raises(UserError, match=word):
        to_transformers(build_model(cfg, "meta"))


@pytest.mark.cuda
@torch.no_grad()
def test_an_exported_model_says_the_same_on_the_device(device, pair, within):
    """1e-5: as on the CPU, whose sums are in another order too."""
    theirs, ours = (copy.deepcopy(model).to(device) for model in pair)
    assert all(torch.equal(a, b) for a, b in zip(to_transformers(ours).parameters(), pair[0].parameters(), strict=True))
    x = tokens(2, 37).to(device)
    with torch.backends.cudnn.flags(enabled=False):  # its convolutions round to TF32
        expected = theirs(x).logits
    within("logits", float((ours(x)[0] - expected).abs().max() / expected.abs().max()), 1e-5)
