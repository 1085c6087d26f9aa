"""Routing: every trainable tensor once, for the right reason; state keyed by name. Exact comparisons only."""

import json
import re

import pytest
import torch
from torch import nn

from muonlm.config import UserError
from muonlm.optim import Muon, build_optimizer, load_named_state, named_state, route


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.qkv.weight.muonlm = {"role": "matrix", "split": (0, [d, d, d]), "heads": (0, 6)}
        self.output = nn.Linear(d, d, bias=False)  # "output" inside a layer is a projection, not the head
        self.up = nn.Linear(d, 4 * d)
        self.norm_proj = nn.Linear(4 * d, d, bias=False)  # neither is this a norm
        self.router = nn.Linear(d, 4 * d, bias=False)


class GPT(nn.Module):
    def __init__(self, d=32, vocab=50, tie=True):
        super().__init__()
        self.head = nn.Linear(
            d, vocab, bias=False
        )  # defined first: the tied tensor must still go by its embedding's name
        self.wte = nn.Embedding(vocab, d)
        self.wpe = nn.Embedding(24, d)
        self.blocks = nn.ModuleList([Block(d)])
        self.header = nn.Linear(d, d, bias=False)
        self.scale = nn.Parameter(torch.ones(()))
        if tie:
            self.head.weight = self.wte.weight


def taken(plan):
    return {d.name: (d.route, d.role) for d in plan.decisions}


GPT_TABLE = {
    "wte.weight": ("adamw", "embed"),
    "wpe.weight": ("adamw", "scalar"),
    "blocks.0.norm.weight": ("adamw", "scalar"),
    "blocks.0.norm.bias": ("adamw", "scalar"),
    "blocks.0.qkv.weight": ("muon", "matrix"),
    "blocks.0.output.weight": ("muon", "matrix"),
    "blocks.0.up.weight": ("muon", "matrix"),
    "blocks.0.up.bias": ("adamw", "scalar"),
    "blocks.0.norm_proj.weight": ("muon", "matrix"),
    "blocks.0.router.weight": ("adamw", "scalar"),
    "header.weight": ("muon", "matrix"),
    "scale": ("adamw", "scalar"),
}


def test_golden_table_of_a_tied_gpt():
    plan = route(GPT())
    assert taken(plan) == GPT_TABLE
    tied = next(d for d in plan.decisions if d.name == "wte.weight")
    assert tied.aliases == ["head.weight"] and "tied to head.weight" in tied.reason
    assert all(d.reason for d in plan.decisions)


def test_golden_table_of_an_untied_gpt():
    assert taken(route(GPT(tie=False))) == GPT_TABLE | {"head.weight": ("adamw", "head")}


def test_an_untied_head_of_any_name_is_known_by_the_shape_of_the_embedding():
    model = nn.ModuleDict({"tokens": nn.Embedding(50, 32), "hidden": nn.Linear(32, 32), "to_words": nn.Linear(32, 50)})
    assert taken(route(model))["to_words.weight"] == ("adamw", "head")
    assert taken(route(model))["hidden.weight"] == ("muon", "matrix")


def test_every_trainable_parameter_is_in_exactly_one_group():
    model = GPT()
    model.blocks[0].up.weight.requires_grad_(False)
    for kwargs in ({"name": "muon", "adamw_lr": 1e-3}, {"name": "adamw"}):
        optimizer = build_optimizer(model, lr=0.02, **kwargs)
        ids = [id(p) for g in optimizer.param_groups for p in g["params"]]
        assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "flags, split",
    [
        ({}, {"split": (0, [32, 32, 32])}),
        ({"per_head": True}, {"heads": (0, 6)}),
        ({"split_fused": False}, None),
    ],
)
def test_fused_qkv_is_split_by_slice_by_head_or_not_at_all(flags, split):
    plan = route(GPT(), **flags)
    assert next(d for d in plan.decisions if d.name.endswith("qkv.weight")).split == split
    muon = build_optimizer(plan, lr=0.02, adamw_lr=1e-3).param_groups[0]
    assert muon["splits"][0] == split


def test_multihead_attention_in_proj_is_a_split_matrix():
    plan = route(nn.MultiheadAttention(32, 4))
    assert taken(plan) == {
        "in_proj_weight": ("muon", "matrix"),
        "in_proj_bias": ("adamw", "scalar"),
        "out_proj.weight": ("muon", "matrix"),
        "out_proj.bias": ("adamw", "scalar"),
    }
    assert plan.decisions[0].split == {"split": (0, [32, 32, 32])}
    assert route(nn.MultiheadAttention(32, 4), per_head=True).decisions[0].split == {"heads": (0, 12)}


def test_convolutions_go_to_muon_only_if_they_are_full_hidden_maps():
    model = nn.ModuleDict(
        {
            "pixels": nn.Conv2d(3, 32, 8, bias=False),
            "depthwise": nn.Conv1d(32, 32, 4, groups=32, bias=False),
            "plain1d": nn.Conv1d(32, 64, 3, bias=False),
            "plain2d": nn.Conv2d(32, 64, 3, bias=False),
            "transposed": nn.ConvTranspose1d(32, 64, 3, bias=False),
            "norm": nn.BatchNorm2d(64),
        }
    )
    table = {name.split(".")[0]: r for name, (r, _) in taken(route(model)).items()}
    assert table == {
        "pixels": "adamw",
        "depthwise": "adamw",
        "plain1d": "muon",
        "plain2d": "muon",
        "transposed": "adamw",
        "norm": "adamw",
    }
    optimizer = build_optimizer(model, lr=0.02, adamw_lr=1e-3)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert optimizer.ns_calls == 2  # flattened, not 64 matrices of 32x3


def test_small_and_three_dimensional_leftovers_go_to_adamw_and_stacked_experts_to_muon():
    model = nn.Module()
    model.narrow = nn.Linear(32, 4, bias=False)
    model.memory = nn.Parameter(torch.zeros(1, 20, 32))
    model.experts = nn.Module()
    model.experts.up = nn.Parameter(torch.zeros(4, 32, 64))
    model.A_log = nn.Parameter(torch.zeros(32, 16))
    assert {k: r for k, (r, _) in taken(route(model)).items()} == {
        "narrow.weight": "adamw", "memory": "adamw", "experts.up": "muon", "A_log": "adamw"}  # fmt: skip
    assert taken(route(model, min_dim=4))["narrow.weight"] == ("muon", "matrix")


def test_overrides_win_over_tags_and_the_first_match_wins():
    plan = route(GPT(), overrides=[(r"qkv", "adamw"), (r"blocks\.", "exclude"), (r"router", "muon"), ("^head", "muon")])
    table = {k: r for k, (r, _) in taken(plan).items()}
    assert table["blocks.0.qkv.weight"] == "adamw"
    assert table["blocks.0.router.weight"] == "exclude"
    assert table["wte.weight"] == "muon"  # matched by its alias head.weight
    groups = plan.groups(lr=0.02, adamw_lr=1e-3)
    assert {n for g in groups for n, _ in g["params"]} == {n for n, r in table.items() if r in ("muon", "adamw")}


@pytest.mark.parametrize(
    "override, message",
    [
        (("blocks.0.qvk", "adamw"), "matches no parameter; did you mean blocks.0.qkv.weight"),
        (("(", "adamw"), "is not a regular expression"),
        (("qkv", "sgd"), 'write "qkv=muon"'),
        (("scale", "muon"), 'write "scale=adamw"'),
    ],
)
def test_overrides_that_cannot_be_followed_are_refused(override, message):
    with pytest.raises(UserError, match=re.escape(message)):
        route(GPT(), overrides=[override])


def test_a_muon_run_without_a_muon_tensor_is_refused_and_adamw_is_not():
    model = nn.Embedding(50, 32)
    with pytest.raises(UserError, match="no parameter is routed to it.*use --optim.name adamw"):
        build_optimizer(model, lr=0.02, adamw_lr=1e-3)
    build_optimizer(model, name="adamw", lr=1e-3)


def test_groups_carry_their_own_rates_and_empty_ones_are_reported():
    model = nn.ModuleDict(
        {"wte": nn.Embedding(50, 32), "fc": nn.Linear(32, 64, bias=False), "lm_head": nn.Linear(32, 50, bias=False)}
    )
    plan = route(model)
    groups = plan.groups(lr=0.05, head_lr=0.008, embed_lr=0.6, scalar_lr=0.04, betas=(0.8, 0.95), eps=1e-8)
    assert [(g["name"], g["lr"], g["base_lr"]) for g in groups] == [
        ("muon", 0.05, 0.05),
        ("embed", 0.6, 0.6),
        ("head", 0.008, 0.008),
    ]
    assert "group scalar: empty" in plan.table(groups)
    with pytest.raises(UserError, match="--optim.adamw_lr or --optim.embed_lr"):
        plan.groups(lr=0.05)


def test_the_table_has_the_published_phrases_with_computed_numbers():
    model = GPT()
    plan = route(model)
    optimizer = build_optimizer(plan, lr=0.02, adamw_lr=5e-4, scalar_lr=5e-4)
    text = plan.table(optimizer.param_groups)
    muon = 3 * 32 * 32 + 32 * 32 + 2 * 4 * 32 * 32 + 32 * 32
    everything = sum(p.numel() for p in model.parameters())
    assert "[Muon] Assigning: blocks.0.qkv.weight (torch.Size([96, 32]))" in text
    assert "[AdamW] Assigning: wte.weight (torch.Size([50, 32]))" in text
    assert re.search(r"Muon optimizer params: 0\.01M \(5 tensors\)", text)
    assert re.search(r"AdamW optimizer params: \S+M \(7 tensors\)", text)
    assert f"Muon optimizes {100 * muon / everything:.1f}% of parameters" in text
    assert "Using Muon optimizer for 2D parameters (lr=0.02, momentum=0.95)" in text
    assert "Using AdamW optimizer for 1D/0D parameters (lr=0.0005)" in text
    up = next(line for line in text.splitlines() if line.startswith("blocks.0.up.weight |"))
    assert "128x32: 2.000" in up and f"{0.02 * 2 / 128**0.5:.2e}" in up and "hidden matrix 128x32" in up
    assert json.loads(json.dumps(plan.to_dict()))["muon_share"] == muon / everything


def test_adamw_decays_2d_weights_only_unless_told_to_decay_all():
    model = GPT(tie=False)
    by_name = {g["name"]: g for g in build_optimizer(model, name="adamw", lr=1e-3, wd=0.1).param_groups}
    of = {id(p): n for n, p in model.named_parameters()}
    decayed = {of[id(p)] for p in by_name["decay"]["params"]}
    assert decayed == {n for n, (_, role) in taken(route(model)).items() if role != "scalar"}
    assert by_name["no_decay"]["weight_decay"] == 0.0 and by_name["decay"]["weight_decay"] == 0.1
    (group,) = build_optimizer(model, name="adamw", lr=1e-3, wd=0.1, decay="all").param_groups
    assert len(group["params"]) == len(of) and group["base_lr"] == 1e-3


@pytest.mark.parametrize("change", [{"name": "sgd"}, {"decay": "some", "name": "adamw"}, {"coefficients": "keler"}, {"lr_mode": "x"},
                                    {"lr": -1.0}, {"momentum": 1.0}, {"ns_steps": 0}])  # fmt: skip
def test_bad_settings_reach_the_user_as_user_errors(change):
    with pytest.raises(UserError):
        build_optimizer(GPT(), **({"lr": 0.02, "adamw_lr": 1e-3} | change))


# ------------------------------------------------------------------------------------------------ named state


def run(model, optimizer, steps, seed=0):
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_named_state_round_trip_is_bit_exact_and_continues_the_run(name):
    def make():
        torch.manual_seed(0)
        model = GPT()
        kwargs = {"adamw_lr": 1e-3, "momentum_warmup": "0.85:0.95:10"} if name == "muon" else {}
        return model, build_optimizer(model, name=name, lr=0.02, wd=0.1, **kwargs)

    model, optimizer = make()
    run(model, optimizer, 4)
    tensors, meta = named_state(optimizer, model)
    assert "blocks.0.qkv.weight/" + ("momentum_buffer" if name == "muon" else "exp_avg") in tensors
    tensors, meta = {k: v.clone() for k, v in tensors.items()}, json.loads(json.dumps(meta))
    weights = {k: v.clone() for k, v in model.state_dict().items()}

    other, resumed = make()
    other.load_state_dict(weights)
    load_named_state(resumed, other, tensors, meta)
    again, meta_again = named_state(resumed, other)
    assert meta_again == meta and all(
        torch.equal(again[k], v) and again[k].dtype == v.dtype for k, v in tensors.items()
    )
    run(model, optimizer, 3, seed=1)
    run(other, resumed, 3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_missing_and_extra_names_and_changed_routes_are_refused_by_name():
    model = GPT()
    optimizer = build_optimizer(model, lr=0.02, adamw_lr=1e-3)
    run(model, optimizer, 1)
    tensors, meta = named_state(optimizer, model)
    key = "blocks.0.qkv.weight/momentum_buffer"
    with pytest.raises(UserError, match=re.escape(key)):
        load_named_state(optimizer, model, {k: v for k, v in tensors.items() if k != key}, meta)
    with pytest.raises(UserError, match="stray/momentum_buffer"):
        load_named_state(optimizer, model, tensors | {"stray/momentum_buffer": tensors[key]}, meta)
    changed = build_optimizer(route(model, overrides=[("qkv", "adamw")]), lr=0.02, adamw_lr=1e-3)
    with pytest.raises(UserError, match="is now trained by AdamW"):
        load_named_state(changed, model, tensors, meta)
    fewer = build_optimizer(route(model, overrides=[("header", "exclude")]), lr=0.02, adamw_lr=1e-3)
    with pytest.raises(UserError, match=re.escape("header.weight")):
        load_named_state(fewer, model, tensors, meta)
    adamw = build_optimizer(model, name="adamw", lr=1e-3)
    with pytest.raises(UserError, match="same --optim.name"):
        load_named_state(adamw, model, tensors, meta)


def test_a_plan_feeds_the_optimizer_with_names_for_its_messages():
    optimizer = build_optimizer(GPT(), lr=0.02, adamw_lr=1e-3)
    assert isinstance(optimizer, Muon)
    assert optimizer.param_groups[0]["param_names"][0] == "blocks.0.qkv.weight"
