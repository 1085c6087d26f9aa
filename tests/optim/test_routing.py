"""Routing: every trainable tensor once, for the right reason; state keyed by name. Exact comparisons only."""

import json
import re

import pytest
import torch
from torch import nn

from muonlm.config.recipes import load_recipe
from muonlm.config.schema import ModelConfig
from muonlm.errors import UserError
from muonlm.model import build_model
from muonlm.optim import Muon, assert_complete, build_optimizer, load_named_state, named_state, route


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


def test_the_last_layer_of_a_plain_sequential_language_model_is_its_head():
    model = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 50))
    assert [taken(route(model))[f"{i}.weight"] for i in (1, 3)] == [("muon", "matrix"), ("adamw", "head")]


def test_an_untied_head_is_known_by_its_shape_even_if_two_embeddings_are_one():
    model = nn.ModuleDict({"source": nn.Embedding(50, 32), "target": nn.Embedding(50, 32), "words": nn.Linear(32, 50)})
    model["target"].weight = model["source"].weight
    assert taken(route(model))["words.weight"] == ("adamw", "head")


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


def by_name(plan):
    return {d.name: d for d in plan.decisions}


def short(plan):
    """Tensor -> route; a split shows its sizes, ~ marks slices of AdamW, T stores (in, out).

    Vectors are left out after a look at them: none is Muon's, and each has the role that is never decayed.
    """
    table = {}
    for d in plan.decisions:
        if len(d.shape) < 2:
            assert (d.route, d.role) == ("adamw", "scalar"), d
            continue
        s = d.split or {}
        sizes = (
            [f"~{n}" if i in s.get("adamw", ()) else str(n) for i, n in enumerate(s["split"][1])]
            if "split" in s
            else []
        )
        cut = f" {'+'.join(sizes)} of dim {s['split'][0]}" if sizes else ""
        cut += f" {s['heads'][1]} heads of dim {s['heads'][0]}" if "heads" in s else ""
        cut += " flat" * ("flatten" in s) + " T" * ("transposed" in s)
        table[d.name] = d.route + cut + (f" {d.role}" if d.route == "adamw" else "")
        assert d.reason
    return table


def complete(model, plan):
    """Every trainable parameter once, by identity, in the groups."""
    ids = [id(p) for g in plan.groups(lr=0.02, adamw_lr=1e-3) for _, p in g["params"]]
    assert sorted(ids) == sorted({id(p) for p in model.parameters() if p.requires_grad})


# ------------------------------------------------------------------------------------------------ our models


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_golden_table_of_our_gpt(tie):
    cfg = ModelConfig(vocab_size=50, d_model=32, n_layer=1, n_head=2, n_kv_head=2, mlp="gelu", block_size=24, tie=tie)
    model = build_model(cfg)
    plan = route(model)
    assert short(plan) == {
        "embed.weight": "adamw embed",
        "blocks.0.mixer.qkv.weight": "muon 32+32+32 of dim 0",
        "blocks.0.mixer.out.weight": "muon",
        "blocks.0.mlp.up.weight": "muon",
        "blocks.0.mlp.down.weight": "muon",
    } | ({} if tie else {"head.weight": "adamw head"})
    assert plan.counts()["muon"] == 12 * 32 * 32
    complete(model, plan)


@pytest.mark.parametrize("d_model, n_layer, share", [(768, 16, 95.2), (512, 8, 87.3)])
def test_golden_table_and_published_share_of_a_minimind_type_model(d_model, n_layer, share):
    cfg = load_recipe("minimind/pretrain", {"model.d_model": d_model, "model.n_layer": n_layer}).model
    cfg.vocab_size = 6400
    plan = route(build_model(cfg, "meta"))  # shapes are enough
    ff, kv = cfg.ff_width, d_model // 4
    assert short(plan) == {"embed.weight": "adamw embed"} | {
        f"blocks.{i}.{k}": v
        for i in range(n_layer)
        for k, v in {
            "mixer.qkv.weight": f"muon {d_model}+{kv}+{kv} of dim 0",
            "mixer.out.weight": "muon",
            "mlp.up.weight": f"muon {ff}+{ff} of dim 0",
            "mlp.down.weight": "muon",
        }.items()
    }
    assert f"Muon optimizes {share}% of parameters" in plan.table()


# ------------------------------------------------------------------------------------------------ state-space models
# Names and shapes of our mixers, and of others' models. `tag` sets what our model classes would set.

E, WIDE, RANK, N = 32, 64, 2, 16  # model width, inner width, rank of the step size, state size


class Mamba(nn.Module):
    def __init__(self, tag=False, dt="dt_proj"):
        super().__init__()
        self.in_proj = nn.Linear(E, 2 * WIDE, bias=False)
        self.conv1d = nn.Conv1d(WIDE, WIDE, 4, groups=WIDE)
        self.x_proj = nn.Linear(WIDE, RANK + 2 * N, bias=False)
        setattr(self, dt, nn.Linear(RANK, WIDE))
        if dt == "dt_proj":  # Longhorn has no A
            self.A_log = nn.Parameter(torch.zeros(WIDE, N))
        self.D = nn.Parameter(torch.ones(WIDE))
        self.out_proj = nn.Linear(WIDE, E, bias=False)
        if tag:
            self.in_proj.weight.muonlm = {"role": "matrix", "split": (0, [WIDE, WIDE])}
            self.x_proj.weight.muonlm = {"role": "matrix", "split": (0, [RANK, N, N])}
            getattr(self, dt).weight.muonlm = {"role": "scalar"}


class Mamba2(nn.Module):
    def __init__(self, tag=False, heads=4):
        super().__init__()
        self.in_proj = nn.Linear(E, 2 * WIDE + 2 * N + heads, bias=False)
        self.conv1d = nn.Conv1d(WIDE + 2 * N, WIDE + 2 * N, 4, groups=WIDE + 2 * N)
        self.A_log, self.D, self.dt_bias = (nn.Parameter(torch.ones(heads)) for _ in range(3))
        self.norm = nn.RMSNorm(WIDE)
        self.out_proj = nn.Linear(WIDE, E, bias=False)
        if tag:
            self.in_proj.weight.muonlm = {"role": "matrix", "split": (0, [WIDE, WIDE, N, N, heads])}


class GatedDeltaNet(nn.Module):
    def __init__(self, tag=False, heads=20):  # so many heads that their gates have a matrix's shape
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(E, 40, bias=False), nn.Linear(E, 40, bias=False)
        self.v_proj, self.g_proj = nn.Linear(E, 60, bias=False), nn.Linear(E, 60, bias=False)
        self.a_proj, self.b_proj = nn.Linear(E, heads, bias=False), nn.Linear(E, heads, bias=False)
        self.conv = nn.Parameter(torch.zeros(140, 1, 4))
        self.A_log, self.dt_bias = nn.Parameter(torch.ones(heads)), nn.Parameter(torch.ones(heads))
        self.norm = nn.RMSNorm(3)
        self.o_proj = nn.Linear(60, E, bias=False)
        if tag:
            for head in (self.a_proj, self.b_proj):
                head.weight.muonlm = {"role": "scalar"}


MAMBA_TABLE = {
    "in_proj.weight": "muon 64+64 of dim 0",
    "conv1d.weight": "adamw scalar",
    "x_proj.weight": "muon ~2+16+16 of dim 0",
    "dt_proj.weight": "adamw scalar",
    "A_log": "adamw scalar",
    "out_proj.weight": "muon",
}
LONGHORN_TABLE = {k.replace("dt_proj", "dt_head"): v for k, v in MAMBA_TABLE.items() if k != "A_log"}
MAMBA2_TABLE = {
    "in_proj.weight": "muon 64+64+16+16+~4 of dim 0",
    "conv1d.weight": "adamw scalar",
    "out_proj.weight": "muon",
}
GDN_TABLE = {
    **{f"{n}_proj.weight": "muon" for n in "qkvg"},
    **{f"{n}_proj.weight": "adamw scalar" for n in "ab"},
    "conv": "adamw scalar",
    "o_proj.weight": "muon",
}


@pytest.mark.parametrize("tag", [False, True], ids=["by name", "by tag"])
@pytest.mark.parametrize(
    "make, golden, muon, adamw",  # values each trains, counted by hand from the shapes
    [
        (
            Mamba,
            MAMBA_TABLE,
            2 * 64 * 32 + 2 * 16 * 64 + 32 * 64,
            (64 * 4 + 64) + 2 * 64 + (2 * 64 + 64) + 64 * 16 + 64,
        ),
        (
            lambda tag: Mamba(tag, dt="dt_head"),
            LONGHORN_TABLE,
            2 * 64 * 32 + 2 * 16 * 64 + 32 * 64,
            (64 * 4 + 64) + 2 * 64 + (2 * 64 + 64) + 64,
        ),
        (Mamba2, MAMBA2_TABLE, 160 * 32 + 32 * 64, 4 * 32 + (96 * 4 + 96) + 3 * 4 + 64),
        (GatedDeltaNet, GDN_TABLE, 200 * 32 + 60 * 32, 2 * 20 * 32 + 140 * 4 + 2 * 20 + 3),
    ],
    ids=["mamba", "longhorn", "mamba2", "gated deltanet"],
)
def test_golden_tables_of_state_space_mixers(make, golden, muon, adamw, tag):
    model = make(tag)
    plan = route(model)
    table = short(plan)
    assert table == golden
    assert plan.counts() == {"muon": muon, "adamw": adamw}
    assert muon + adamw == sum(p.numel() for p in model.parameters())
    complete(model, plan)


@pytest.mark.parametrize(
    "x_proj, expected", [("split", "muon ~2+16+16 of dim 0"), ("fused", "muon"), ("adamw", "adamw matrix")]
)
def test_x_proj_is_split_fused_or_left_to_adamw_whatever_its_tag_says(x_proj, expected):
    for tag in (False, True):
        assert short(route(Mamba(tag), x_proj=x_proj))["x_proj.weight"] == expected


def test_a_fused_state_space_projection_of_unknown_layout_is_left_to_adamw():
    mixer = Mamba2()
    mixer.in_proj = nn.Linear(E, 300, bias=False)  # more rows than z, x, B, C and dt need
    decision = by_name(route(mixer))["in_proj.weight"]
    assert decision.route == "adamw" and "slices cannot be found: tag it" in decision.reason
    mixer.in_proj.weight.muonlm = {"role": "matrix", "split": (0, [200, 100])}
    assert short(route(mixer))["in_proj.weight"] == "muon 200+100 of dim 0"


@pytest.mark.parametrize("rows", [2 * WIDE + 4, 2 * WIDE + 4 + 3])
def test_slices_that_are_empty_or_do_not_add_up_are_not_believed(rows):
    mixer = Mamba2()
    mixer.conv1d = None  # nothing else to check them by
    mixer.in_proj = nn.Linear(E, rows, bias=False)
    assert short(route(mixer))["in_proj.weight"] == "adamw matrix"


def test_heads_side_by_side_are_cut_one_by_one_unless_they_are_too_thin():
    class CodeGenAttention(nn.Module):
        def __init__(self, name, width):
            super().__init__()
            self.num_attention_heads, self.head_dim = 64 // width, width
            setattr(self, name, nn.Linear(64, 192, bias=False))

    make = lambda name, width: route(nn.ModuleDict({"attn": CodeGenAttention(name, width)}))  # noqa: E731
    assert short(make("qkv_proj", 16)) == {"attn.qkv_proj.weight": "muon 12 heads of dim 0"}
    (thin,) = make("query_key_value", 8).decisions
    assert (thin.route, thin.split) == ("muon", None) and "8 rows are under 16" in thin.reason


@pytest.mark.parametrize(
    "name", ["in_proj", "x_proj", "in_proj_qkv", "in_proj_qkvz", "qkv", "gate_up_proj", "kv_b_proj"]
)
def test_a_half_built_or_unusual_mixer_is_routed_without_a_crash(name):
    """Only some of the attributes that a layout is read from are there, or they are of another type."""
    for present in (["A_log"], ["dt_bias"], ["dt_proj"], ["dt_proj", "x_proj"], ["dt_bias", "out_proj"], []):
        mixer = nn.Module()
        mixer.dt_bias = mixer.conv1d = None
        mixer.heads = nn.ModuleList([nn.Identity()])
        for part in set(present) - {name}:
            setattr(mixer, part, nn.Parameter(torch.zeros(32, 16)))
        setattr(mixer, name, nn.Linear(32, 50, bias=False))
        decision = by_name(route(nn.ModuleDict({"mixer": mixer})))[f"mixer.{name}.weight"]
        assert decision.route == "adamw" or decision.split is None


def test_in_proj_and_gates_are_plain_matrices_where_there_is_no_state_space_model():
    model = nn.ModuleDict({n: nn.Linear(32, 64, bias=False) for n in ("in_proj", "x_proj", "a_proj", "b_proj", "gate")})
    assert set(short(route(model)).values()) == {"muon"}


def test_golden_table_of_a_hybrid_with_its_extras():
    class Layer(nn.Module):
        def __init__(self, mixer):
            super().__init__()
            self.mixer = mixer
            self.depth_gate = nn.Linear(E, 3)  # over the outputs of earlier layers
            self.memory = nn.Linear(E, E)

    class Hybrid(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(48, E)
            self.meta_tokens = nn.Parameter(torch.zeros(20, E))
            self.blocks = nn.ModuleList([Layer(Mamba()), Layer(nn.MultiheadAttention(E, 2))])
            self.lm_head = nn.Linear(E, 48, bias=False)
            self.lm_head.weight = self.embed.weight

    model = Hybrid()
    plan = route(model)
    extras = {"depth_gate.weight": "adamw matrix", "memory.weight": "muon"}
    attention = {"in_proj_weight": "muon 32+32+32 of dim 0", "out_proj.weight": "muon"}
    assert short(plan) == {
        "embed.weight": "adamw embed",
        "meta_tokens": "adamw scalar",
        **{f"blocks.0.mixer.{k}": v for k, v in MAMBA_TABLE.items()},
        **{f"blocks.1.mixer.{k}": v for k, v in attention.items()},
        **{f"blocks.{i}.{k}": v for i in (0, 1) for k, v in extras.items()},
    }
    assert by_name(plan)["embed.weight"].aliases == ["lm_head.weight"]
    complete(model, plan)


def test_slices_under_min_dim_carry_the_rate_of_adamw_in_their_group():
    plan = route(Mamba())
    (muon,) = [g for g in plan.groups(lr=0.02, adamw_lr=1e-3, scalar_lr=5e-4, wd=0.1) if g["use_muon"]]
    slices = muon["slices"]
    assert slices == {"lr_ratio": 5e-4 / 0.02, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    assert muon["lr"] * slices["lr_ratio"] == pytest.approx(5e-4, rel=1e-12)  # fp64 product of a quotient
    index = [n for n, _ in muon["params"]].index("x_proj.weight")
    assert muon["splits"][index] == {"split": (0, [2, 16, 16]), "adamw": [0]}
    assert by_name(plan)["x_proj.weight"].counts() == {"muon": 32 * 64, "adamw": 2 * 64}
    assert all("slices" not in g for g in route(Mamba(), x_proj="fused").groups(lr=0.02, adamw_lr=1e-3))
    with pytest.raises(UserError, match="scalar parameters.*`scalar_lr`"):
        x_proj = nn.Linear(WIDE, 34, bias=False)
        x_proj.weight.muonlm = {"role": "matrix", "split": (0, [2, 32])}
        route(x_proj).groups(lr=0.02)
    with pytest.raises(UserError, match="set `lr` above 0"):
        plan.groups(lr=0.0, adamw_lr=1e-3)


def test_a_tag_may_leave_slices_to_adamw_and_every_expert_of_a_stack_is_cut_alike():
    layer = nn.Linear(32, 96, bias=False)
    layer.weight.muonlm = {"role": "matrix", "split": (0, [32, 64]), "adamw": [0]}
    assert short(route(layer)) == {"weight": "muon ~32+64 of dim 0"}
    stack = nn.Module()
    stack.experts = nn.Parameter(torch.zeros(3, 40, 32))
    stack.experts.muonlm = {"role": "matrix", "split": (1, [32, 8])}
    (decision,) = route(stack).decisions
    assert decision.split == {"split": (1, [32, 8]), "adamw": [1]} and decision.block_shapes() == [(32, 32)] * 3


def test_a_split_with_only_thin_slices_goes_to_adamw():
    layer = nn.Linear(32, 24, bias=False)
    layer.weight.muonlm = {"role": "matrix", "split": (0, [8, 8, 8])}
    (decision,) = route(layer).decisions
    assert decision.route == "adamw" and "all its slices, [8, 8, 8], are under 16" in decision.reason
    assert short(route(layer, min_dim=8)) == {"weight": "muon 8+8+8 of dim 0"}
    assert short(route(layer, split_fused=False)) == {"weight": "muon"}


# ----------------------------------------------------------------------------------------------- models of other people

TINY = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
GQA = TINY | {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48}
LLAMA_ATTENTION = {f"self_attn.{n}_proj.weight": "muon" for n in "qkvo"}
ENDS = {"embed_tokens.weight": "adamw embed", "lm_head.weight": "adamw head"}
ATTENTION = 64 * 64 * 2 + 32 * 64 * 2  # values of q, o and of k, v with half as many heads

ARCHITECTURES = {  # class -> (config, tensors of two dimensions and more, values trained by Muon)
    "GPT2LMHeadModel": (
        dict(vocab_size=96, n_embd=32, n_head=2, n_layer=1, n_positions=24, add_cross_attention=True),
        {
            "wte.weight": "adamw embed",  # tied
            "wpe.weight": "adamw scalar",
            "attn.c_attn.weight": "muon 32+32+32 of dim 1 T",
            "attn.c_proj.weight": "muon T",
            "crossattention.c_attn.weight": "muon 32+32 of dim 1 T",
            "crossattention.q_attn.weight": "muon T",
            "crossattention.c_proj.weight": "muon T",
            "mlp.c_fc.weight": "muon T",
            "mlp.c_proj.weight": "muon T",
        },
        (4 + 4 + 8) * 32 * 32,
    ),
    "LlamaForCausalLM": (
        GQA,
        ENDS | LLAMA_ATTENTION | {f"mlp.{n}_proj.weight": "muon" for n in ("gate", "up", "down")},
        ATTENTION + 3 * 48 * 64,
    ),
    "Phi3ForCausalLM": (
        TINY | {"num_key_value_heads": 2, "intermediate_size": 48, "pad_token_id": 0},
        ENDS
        | {
            "self_attn.qkv_proj.weight": "muon 64+32+32 of dim 0",
            "self_attn.o_proj.weight": "muon",
            "mlp.gate_up_proj.weight": "muon 48+48 of dim 0",
            "mlp.down_proj.weight": "muon",
        },
        ATTENTION + 3 * 48 * 64,
    ),
    "GPTNeoXForCausalLM": (
        TINY | {"intermediate_size": 128},
        {
            "embed_in.weight": "adamw embed",
            "attention.query_key_value.weight": "muon 12 heads of dim 0",  # q, k, v of head 0, then of head 1, ...
            "attention.dense.weight": "muon",
            "mlp.dense_h_to_4h.weight": "muon",
            "mlp.dense_4h_to_h.weight": "muon",
            "lm_head.weight": "adamw head",
        },
        4 * 64 * 64 + 2 * 128 * 64,
    ),
    "BertForMaskedLM": (
        TINY | {"intermediate_size": 128, "max_position_embeddings": 24},
        {
            "embeddings.word_embeddings.weight": "adamw embed",  # tied to cls.predictions.decoder
            "embeddings.position_embeddings.weight": "adamw scalar",
            "embeddings.token_type_embeddings.weight": "adamw embed",
            **{f"attention.self.{n}.weight": "muon" for n in ("query", "key", "value")},
            "attention.output.dense.weight": "muon",  # "output" is no head here
            "intermediate.dense.weight": "muon",
            "output.dense.weight": "muon",
            "cls.predictions.transform.dense.weight": "muon",
        },
        5 * 64 * 64 + 2 * 128 * 64,
    ),
    "MambaForCausalLM": (
        dict(vocab_size=96, hidden_size=32, num_hidden_layers=1, state_size=16),
        {"embeddings.weight": "adamw embed", **{f"mixer.{k}": v for k, v in MAMBA_TABLE.items()}},
        128 * 32 + 2 * 16 * 64 + 32 * 64,
    ),
    "Mamba2ForCausalLM": (
        dict(vocab_size=96, hidden_size=32, num_hidden_layers=1, state_size=16, num_heads=4, head_dim=16, n_groups=2),
        {
            "embeddings.weight": "adamw embed",
            "mixer.conv1d.weight": "adamw scalar",
            "mixer.in_proj.weight": "muon 64+64+32+32+~4 of dim 0",
            "mixer.out_proj.weight": "muon",
            "lm_head.weight": "adamw head",
        },
        192 * 32 + 32 * 64,
    ),
    "MixtralForCausalLM": (
        GQA | {"num_local_experts": 4},
        ENDS
        | LLAMA_ATTENTION
        | {
            "mlp.gate.weight": "adamw scalar",
            "mlp.experts.gate_up_proj": "muon 48+48 of dim 1",
            "mlp.experts.down_proj": "muon",
        },
        ATTENTION + 4 * 3 * 48 * 64,
    ),
    "GptOssForCausalLM": (
        GQA | {"num_local_experts": 20},
        ENDS
        | LLAMA_ATTENTION
        | {
            "mlp.router.weight": "adamw scalar",  # 20x64 by shape
            "mlp.experts.gate_up_proj": "muon T",  # columns of gate and up alternate
            "mlp.experts.gate_up_proj_bias": "adamw scalar",  # 20x96 by shape
            "mlp.experts.down_proj": "muon T",
            "mlp.experts.down_proj_bias": "adamw scalar",
        },
        ATTENTION + 20 * 3 * 48 * 64,
    ),
    "Qwen3NextForCausalLM": (
        GQA
        | dict(moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
        | dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16)
        | {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
        ENDS
        | {
            "0.linear_attn.conv1d.weight": "adamw scalar",
            # q, k, v, z of each key head in turn
            "0.linear_attn.in_proj_qkvz.weight": "muon 16+16+32+32+16+16+32+32 of dim 0",
            "0.linear_attn.in_proj_ba.weight": "adamw scalar",
            "0.linear_attn.out_proj.weight": "muon",
            "1.self_attn.q_proj.weight": "muon 8 heads of dim 0",  # 4 heads, each with its gate
            **{f"1.self_attn.{n}_proj.weight": "muon" for n in "kvo"},
            **{
                f"{i}.mlp.{k}": v
                for i in (0, 1)
                for k, v in {
                    "gate.weight": "adamw scalar",
                    "experts.gate_up_proj": "muon 32+32 of dim 1",
                    "experts.down_proj": "muon",
                    **{f"shared_expert.{n}_proj.weight": "muon" for n in ("gate", "up", "down")},
                    "shared_expert_gate.weight": "adamw scalar",
                }.items()
            },
        },
        (192 * 64 + 64 * 64) + (ATTENTION + 64 * 64) + 2 * (4 + 1) * 3 * 32 * 64,
    ),
    "DeepseekV3ForCausalLM": (
        TINY
        | dict(kv_lora_rank=32, q_lora_rank=24, qk_rope_head_dim=8, v_head_dim=16, qk_nope_head_dim=16)
        | dict(intermediate_size=48, first_k_dense_replace=1, num_key_value_heads=4),
        ENDS
        | {
            "self_attn.q_a_proj.weight": "muon",
            "self_attn.q_b_proj.weight": "muon",
            "self_attn.kv_a_proj_with_mqa.weight": "muon 32+~8 of dim 0",
            "self_attn.kv_b_proj.weight": "muon 16+16+16+16+16+16+16+16 of dim 0",  # k, v of each head
            "self_attn.o_proj.weight": "muon",
            **{f"mlp.{n}_proj.weight": "muon" for n in ("gate", "up", "down")},
        },
        24 * 64 + 96 * 24 + 32 * 64 + 128 * 32 + 64 * 64 + 3 * 48 * 64,
    ),
    "WhisperForConditionalGeneration": (
        dict(vocab_size=96, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2)
        | dict(decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=20)
        | dict(max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1),
        {
            "encoder.conv1.weight": "adamw embed",  # reads the spectrum
            "encoder.conv2.weight": "muon flat",
            "encoder.embed_positions.weight": "frozen",
            "decoder.embed_tokens.weight": "adamw embed",
            "decoder.embed_positions.weight": "adamw scalar",
            **{
                f"{s}.self_attn.{n}_proj.weight": "muon" for s in ("encoder", "decoder") for n in ("q", "k", "v", "out")
            },
            **{f"decoder.encoder_attn.{n}_proj.weight": "muon" for n in ("q", "k", "v", "out")},
            **{f"{s}.fc{i}.weight": "muon" for s in ("encoder", "decoder") for i in (1, 2)},
        },
        32 * 96 + 12 * 32 * 32 + 4 * 32 * 64,
    ),
}
PREFIX = re.compile(r"^(model|backbone|transformer|gpt_neox|bert)\.|(h|layers|encoder\.layer)\.\d\.")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_golden_tables_of_transformers_models(architecture):
    transformers = pytest.importorskip("transformers")
    settings, golden, muon = ARCHITECTURES[architecture]
    kind = getattr(transformers, architecture)
    model = kind(kind.config_class(**settings))
    plan = route(model)
    numbered = settings.get("num_hidden_layers") == 2
    found = {
        PREFIX.sub("", n) if not numbered else n.removeprefix("model.").removeprefix("layers."): v
        for n, v in short(plan).items()
    }
    assert found == golden
    assert len(found) == len(short(plan))
    assert plan.counts()["muon"] == muon
    assert sum(plan.counts().values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    complete(model, plan)


def test_slices_named_by_the_layout_are_those_that_the_model_cuts():
    """GPT-NeoX mixes its heads: block 3h of the split must be the query rows of head h, as the model reads them."""
    transformers = pytest.importorskip("transformers")
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**TINY, intermediate_size=128))
    layer = model.gpt_neox.layers[0].attention
    split = next(d.split for d in route(model).decisions if d.name.endswith("query_key_value.weight"))
    weight, (dim, n) = layer.query_key_value.weight, split["heads"]
    mine = weight.unflatten(dim, (n, -1))  # (3H, 16, 64)
    theirs = weight.view(4, 3 * layer.head_size, 64).chunk(3, dim=1)  # what forward() does with the outputs
    for h in range(4):
        assert all(torch.equal(mine[3 * h + i], theirs[i][h]) for i in range(3))


def test_per_head_cuts_the_projections_of_a_foreign_model_too():
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GQA))
    table = short(route(model, per_head=True))
    layer = "model.layers.0.self_attn."
    assert [table[f"{layer}{n}_proj.weight"] for n in "qkvo"] == ["muon 4 heads of dim 0"] + [
        "muon 2 heads of dim 0"
    ] * 2 + ["muon"]


def tiny_gpt2():
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**ARCHITECTURES["GPT2LMHeadModel"][0]))


@pytest.mark.parametrize("make", [Mamba, Mamba2, GatedDeltaNet, lambda: nn.MultiheadAttention(32, 4), tiny_gpt2])
def test_muon_follows_the_plan_every_block_once_and_every_weight_moves(make):
    model = make()
    plan = route(model)
    optimizer = Muon(plan.groups(lr=0.02, adamw_lr=1e-3), ns_dtype="float32")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert optimizer.ns_calls == sum(len(d.block_shapes()) for d in plan.decisions if d.route == "muon")
    assert all((p != before[n]).any() for n, p in model.named_parameters())
    for d in (d for d in plan.decisions if d.split and d.split.get("adamw")):
        dim, sizes = d.split["split"]
        for i, (new, old) in enumerate(zip(d.param.split(sizes, dim), before[d.name].split(sizes, dim), strict=True)):
            # AdamW's first step is lr sign(G), so its largest entry is lr to an ulp of W (1e-8 of 1e-3, far inside
            # rel=1e-3)
            rate = (new - old).abs().max().item()
            assert (rate == pytest.approx(1e-3, rel=1e-3)) == (i in d.split["adamw"])


# ------------------------------------------------------------------------------------------------ modules a user brings


def test_names_that_only_resemble_a_norm_a_head_or_a_decay_are_projections():
    model = nn.ModuleDict({"wte": nn.Embedding(50, 32)})
    for name in ("norm_proj", "D", "header", "lm_header", "embedding_proj", "head_mix", "biased", "routers", "prompt"):
        model[name] = nn.Linear(32, 48, bias=False)
    model["lm_head"] = nn.Linear(32, 50, bias=False)
    table = short(route(model))
    assert {n for n, v in table.items() if v != "muon"} == {"wte.weight", "lm_head.weight"}
    assert table["lm_head.weight"] == "adamw head"


def test_no_hidden_matrix_is_taken_for_a_head_because_of_its_shape():
    """A byte vocabulary of 256 and an up-projection 256x64 have one shape; as a square embedding and matrix do."""
    model = nn.ModuleDict({"wte": nn.Embedding(256, 64), "lm_head": nn.Linear(64, 256, bias=False)})
    model["up"] = nn.Linear(64, 256, bias=False)
    assert short(route(model))["up.weight"] == "muon"  # the head is known by its name
    model["decoder"] = model["lm_head"]
    del model["lm_head"]
    model["decoder"].weight = model["wte"].weight
    assert short(route(model))["up.weight"] == "muon"  # the head is known by its tie
    positions = nn.ModuleDict({"wte": nn.Embedding(50, 32), "wpe": nn.Embedding(48, 32), "mix": nn.Linear(32, 48)})
    assert short(route(positions))["mix.weight"] == "muon"
    square = nn.ModuleDict({"wte": nn.Embedding(32, 32), "mix": nn.Linear(32, 32, bias=False)})
    assert short(route(square))["mix.weight"] == "muon"


def test_heads_in_lists_and_in_layers_are_known_by_names_that_mean_nothing_else():
    model = nn.ModuleDict(
        {"wte": nn.Embedding(50, 32), "lm_heads": nn.ModuleList([nn.Linear(32, 50, bias=False) for _ in range(2)])}
    )
    model["layers"] = nn.ModuleList(
        [nn.ModuleDict({n: nn.Linear(32, 50, bias=False) for n in ("lm_head", "output", "head")})]
    )
    table = short(route(model))
    assert [table[n] for n in ("lm_heads.0.weight", "lm_heads.1.weight", "layers.0.lm_head.weight")] == [
        "adamw head"
    ] * 3
    assert table["layers.0.output.weight"] == table["layers.0.head.weight"] == "muon"


def test_an_embedding_class_of_ones_own_and_bare_tables_are_not_orthogonalised():
    class TokenEmbedding(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(50, 32))

    class PerHeadRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(20, 16))

    class LearnedPositionalEmbedding(nn.Embedding):
        pass

    model = nn.Module()
    model.tokens, model.norm, model.where = TokenEmbedding(), PerHeadRMSNorm(), LearnedPositionalEmbedding(24, 32)
    model.pos_embed, model.register_tokens = nn.Parameter(torch.zeros(24, 32)), nn.Parameter(torch.zeros(20, 32))
    model.hidden = nn.Linear(32, 32)
    assert short(route(model)) == {
        "tokens.table": "adamw embed",
        "norm.weight": "adamw scalar",
        "where.weight": "adamw scalar",
        "pos_embed": "adamw scalar",
        "register_tokens": "adamw scalar",
        "hidden.weight": "muon",
    }


def test_routers_are_left_to_adamw_and_gates_of_an_mlp_are_not():
    class MoE(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(32, 24, bias=False)  # 24 experts: a matrix by shape
            self.experts = nn.ModuleList([nn.ModuleDict({"gate": nn.Linear(32, 48, bias=False)}) for _ in range(2)])

    class TopkGate(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(24, 32))

    model = nn.ModuleDict({"moe": MoE(), "router": nn.ModuleDict({"layer": nn.Linear(32, 24, bias=False)})})
    model["choose"] = TopkGate()
    assert short(route(model)) == {
        "moe.gate.weight": "adamw scalar",
        "moe.experts.0.gate.weight": "muon",
        "moe.experts.1.gate.weight": "muon",
        "router.layer.weight": "adamw scalar",
        "choose.weight": "adamw scalar",
    }


def test_stacks_of_experts_are_known_by_their_name_class_or_number_and_other_stacks_are_left_to_adamw():
    class SwitchExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.thin = nn.Parameter(torch.zeros(4, 48, 32)), nn.Parameter(torch.zeros(4, 48, 8))

    model = nn.Module()
    model.a, model.b, model.c = SwitchExperts(), nn.Module(), nn.Module()
    model.b.num_experts, model.b.w = 4, nn.Parameter(torch.zeros(4, 48, 32))
    model.c.w, model.c.one = nn.Parameter(torch.zeros(4, 48, 32)), nn.Parameter(torch.zeros(1, 48, 32))
    assert short(route(model)) == {
        "a.up": "muon",
        "a.thin": "adamw matrix",
        "b.w": "muon",
        "c.w": "adamw scalar",
        "c.one": "adamw scalar",
    }
    assert by_name(route(model))["a.up"].block_shapes() == [(48, 32)] * 4


def test_lora_factors_follow_their_flag():
    class LoRALinear(nn.Module):  # names of peft
        def __init__(self):
            super().__init__()
            self.base_layer = nn.Linear(32, 48, bias=False)
            self.base_layer.weight.requires_grad_(False)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(32, 4, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(4, 48, bias=False)})

    model = nn.ModuleDict({"q_proj": LoRALinear()})
    factors = ["q_proj.lora_A.default.weight", "q_proj.lora_B.default.weight"]
    for lora, expected in (("adamw", "adamw matrix"), ("muon", "muon")):
        table = short(route(model, lora=lora))
        assert [table[f] for f in factors] == [expected] * 2 and table["q_proj.base_layer.weight"] == "frozen"
    with pytest.raises(UserError, match="lora='both' is unknown; use one of muon, adamw"):
        route(model, lora="both")


def test_wrapped_modules_keep_their_route():
    mixer = Mamba()
    mixer.x_proj = nn.ModuleDict({"base_layer": mixer.x_proj})
    wrapped = short(route(mixer, x_proj="adamw"))
    assert wrapped["x_proj.base_layer.weight"] == "adamw matrix"  # the mixer around the wrapper was seen
    model = GPT(tie=False)
    model.head = nn.ModuleDict({"base_layer": model.head})
    compiled = torch.compile(model)  # adds a prefix and compiles nothing before the first call
    assert short(route(compiled))["_orig_mod.head.base_layer.weight"] == "adamw head"
    assert short(route(compiled))["_orig_mod.blocks.0.output.weight"] == "muon"


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
        "narrow.weight": "adamw",
        "memory": "adamw",
        "experts.up": "muon",
        "A_log": "adamw",
    }
    assert taken(route(model, min_dim=4))["narrow.weight"] == ("muon", "matrix")


# -------------------------------------------------------------------------------------------- overrides, groups, checks


def test_an_override_beats_a_tag_a_tag_the_owner_the_owner_a_name_and_a_name_the_shape():
    layer = nn.ModuleDict({"dt_proj": nn.Linear(32, 48, bias=False)})
    assert short(route(layer)) == {"dt_proj.weight": "adamw scalar"}  # name beats shape
    layer["dt_proj"].weight.muonlm = {"role": "matrix"}
    assert short(route(layer)) == {"dt_proj.weight": "muon"}  # tag beats name
    assert short(route(layer, overrides=[("dt_proj", "adamw")])) == {"dt_proj.weight": "adamw matrix"}
    table = nn.ModuleDict({"router": nn.Embedding(50, 32)})
    assert short(route(table)) == {"router.weight": "adamw embed"}  # owner beats name
    table["router"].weight.muonlm = {"route": "muon"}
    assert short(route(table)) == {"router.weight": "muon"}  # tag beats owner
    attention = nn.MultiheadAttention(32, 4, kdim=8, vdim=8)
    assert short(route(attention))["k_proj_weight"] == "muon"  # owner beats shape: 32x8


def test_overrides_may_set_rates_decay_and_splits():
    plan = route(
        GPT(),
        overrides=[
            ("up.weight", "muon", {"lr_mult": 2, "split": (0, [120, 8]), "adamw": [1]}),
            ("norm_proj", "muon", {"lr_mult": 2, "wd": 0.0}),
            ("qkv", "muon", {"heads": (0, 12)}),
            ("wte", "adamw", {"wd": 0.1}),
            ("wpe", "adamw", {"lr_mult": 0.5}),
        ],
    )
    table = short(plan)
    assert (
        table["blocks.0.up.weight"] == "muon 120+~8 of dim 0"
        and table["blocks.0.qkv.weight"] == "muon 12 heads of dim 0"
    )
    groups = {g["name"]: g for g in plan.groups(lr=0.02, adamw_lr=1e-3, wd=0.05)}
    assert {n: [name for name, _ in g["params"]] for n, g in groups.items() if n != "scalar"} == {
        "muon": ["blocks.0.qkv.weight", "blocks.0.output.weight", "header.weight"],
        "muon x2": ["blocks.0.up.weight"],
        "muon x2 wd 0": ["blocks.0.norm_proj.weight"],
        "embed wd 0.1": ["wte.weight"],
        "scalar x0.5": ["wpe.weight"],
    }
    assert [(g["lr"], g["base_lr"], g["weight_decay"]) for g in groups.values()] == [
        (0.02, 0.02, 0.05),
        (0.04, 0.04, 0.05),
        (0.04, 0.04, 0.0),
        (1e-3, 1e-3, 0.1),
        (1e-3, 1e-3, 0.0),
        (5e-4, 5e-4, 0.0),
    ]
    assert "slices" in groups["muon x2"] and "slices" not in groups["muon"]
    text = plan.table(list(groups.values()))
    assert "group embed: empty" not in text and "group head: empty" in text
    assert "AdamW trains thin slices of them at lr=0.002" in text  # lr_mult is the tensor's, so it doubles 1e-3 too
    assert "Using Muon optimizer for 2D parameters (lr=0.02, momentum=0.95)" in text


def test_tags_may_set_rates_and_decay_without_deciding_the_route():
    model = GPT()
    model.blocks[0].output.weight.muonlm = {"lr_mult": 2.0, "wd": 0.3}
    plan = route(model)
    assert taken(plan) == GPT_TABLE
    assert by_name(plan)["blocks.0.output.weight"].reason == "hidden matrix 32x32"
    names = [g["name"] for g in plan.groups(lr=0.02, adamw_lr=1e-3)]
    assert names == ["muon", "muon x2 wd 0.3", "embed", "scalar"]


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
        (("qkv", "muon", {"lr": 1.0}), "sets 'lr'; it can set lr_mult, wd, split, heads, adamw"),
        (("qkv", "muon", {"lr_mult": 0.0}), "lr_mult=0.0; use a finite number above 0"),
        (("qkv", "adamw", {"wd": -0.1}), "wd=-0.1; use a finite number at least 0"),
        (("qkv", "adamw", {"heads": (0, 6)}), 'which only Muon follows; write "qkv=muon"'),
        (("qkv", "muon", {"heads": (0, 6), "split": (0, [48, 48])}), "either split (with adamw, if need be) or heads"),
        (("qkv", "muon", {"split": (0, [48, 40])}), "give sizes that add up to that dimension"),
        (("qkv", "muon", {"heads": (0, 7)}), "or a number of heads that divides it"),
        (("qkv", "muon", {"split": (2, [48, 48])}), "cuts dimension 2"),
        (("qkv", "muon", {"split": (0, [48, 48]), "adamw": [2]}), "count from 0 and leave at least one to Muon"),
        (("qkv", "muon", {"split": (0, [48, 48]), "adamw": [0, 1]}), "leave at least one to Muon"),
    ],
)
def test_overrides_that_cannot_be_followed_are_refused(override, message):
    with pytest.raises(UserError, match=re.escape(message)):
        route(GPT(), overrides=[override])


def test_a_muon_run_without_a_muon_tensor_is_refused_and_adamw_is_not():
    model = nn.Embedding(50, 32)
    with pytest.raises(UserError, match="no parameter is routed to it.*use `name` adamw"):
        build_optimizer(model, lr=0.02, adamw_lr=1e-3)
    build_optimizer(model, name="adamw", lr=1e-3)


def test_a_plan_without_muon_feeds_adamw_and_feeds_muon_only_if_told():
    plan = route(GPT(), overrides=[(".*", "adamw")])
    optimizer = build_optimizer(plan, name="adamw", lr=1e-3)  # no word about Muon
    assert_complete(optimizer, plan)
    assert re.search(r"^Muon optimizer params: \S+M \(0 tensors\)$", plan.table(optimizer.param_groups), re.M)
    with pytest.raises(UserError, match="allow_empty_muon=True"):
        plan.groups(lr=0.02, adamw_lr=1e-3)
    groups = plan.groups(lr=0.02, adamw_lr=1e-3, allow_empty_muon=True)
    assert [g["name"] for g in groups] == ["embed", "scalar"] and not any(g["use_muon"] for g in groups)


def test_a_frozen_model_is_listed_but_not_counted_and_cannot_be_trained():
    model = GPT().requires_grad_(False)
    plan = route(model)
    assert {r for r, _ in taken(plan).values()} == {"frozen"} and plan.counts() == {"muon": 0, "adamw": 0}
    assert "[frozen] Assigning: wte.weight" in plan.table()
    assert plan.to_dict()["muon_share"] == 0.0
    for empty in (False, True):
        with pytest.raises(UserError, match="all are frozen or excluded; set requires_grad=True"):
            plan.groups(lr=0.02, adamw_lr=1e-3, allow_empty_muon=empty)


def flat_param(model):
    model._flat_param = nn.Parameter(torch.zeros(4096))


def marked_flat(model):
    model.handle = nn.Parameter(torch.zeros(4096))
    model.handle._is_flat_param = True


def flat_weight(model):
    model.header.weight = nn.Parameter(torch.zeros(1024))


def zero3(model):
    model.header.weight = nn.Parameter(torch.zeros(0))
    model.header.weight.ds_id = 7


@pytest.mark.parametrize(
    "wrap, why", [(flat_param, "FSDP1"), (marked_flat, "FSDP1"), (flat_weight, "flattened"), (zero3, "ZeRO-3")]
)
def test_flattened_shards_are_refused_for_muon_with_the_reason_and_taken_by_adamw(wrap, why):
    model = GPT()
    wrap(model)
    plan = route(model)
    with pytest.raises(UserError, match=f"{why}.*orthogonalises whole matrices.*fully_shard"):
        plan.groups(lr=0.02, adamw_lr=1e-3)
    assert_complete(build_optimizer(plan, name="adamw", lr=1e-3), model)


def test_assert_complete_finds_lost_doubled_and_foreign_parameters():
    model = GPT()
    optimizer = build_optimizer(model, lr=0.02, adamw_lr=1e-3)
    assert_complete(optimizer, model)
    group = optimizer.param_groups[0]
    lost = group["params"].pop(0)
    with pytest.raises(
        UserError, match="blocks.0.qkv.weight is trainable but in no group of the optimizer \\(1 in all"
    ):
        assert_complete(optimizer, model)
    group["params"] += [lost, lost]
    with pytest.raises(UserError, match="blocks.0.qkv.weight is in two groups"):
        assert_complete(optimizer, model)
    group["params"][-1] = nn.Parameter(torch.zeros(3))
    with pytest.raises(UserError, match="trains 1 tensors that are not trainable parameters of this model"):
        assert_complete(optimizer, model)
    plan = route(model, overrides=[("header", "exclude")])
    left_out = build_optimizer(plan, lr=0.02, adamw_lr=1e-3)
    assert_complete(left_out, plan)
    with pytest.raises(UserError, match="header.weight is trainable but in no group"):
        assert_complete(left_out, model)


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
    with pytest.raises(UserError, match="give `adamw_lr` 3e-4 or `embed_lr`"):
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
    sizes = f"{0.02 / 128**0.5:.2e} to {0.02 / 32**0.5:.2e}"  # 32x128; squares, and 128x32 by its factor of 2
    assert f"Using lr mode original: an orthogonal update of Muon has RMS {sizes}" in text
    up = next(line for line in text.splitlines() if line.startswith("blocks.0.up.weight |"))
    assert "128x32: 2.000" in up and f"{0.02 * 2 / 128**0.5:.2e}" in up and "hidden matrix 128x32" in up
    assert json.loads(json.dumps(plan.to_dict()))["muon_share"] == muon / everything


def test_the_json_report_has_rates_splits_and_predictions_of_every_tensor():
    model = GPT()
    model.blocks[0].up.weight.requires_grad_(False)
    plan = route(model)
    groups = build_optimizer(plan, lr=0.02, adamw_lr=5e-4, wd=0.1).param_groups
    report = json.loads(json.dumps(plan.to_dict(groups)))
    rows = {row["name"]: row for row in report["tensors"]}
    qkv = rows["blocks.0.qkv.weight"]
    assert qkv == {
        "name": "blocks.0.qkv.weight",
        "aliases": [],
        "shape": [96, 32],
        "numel": 96 * 32,
        "by": "Muon",
        "route": "muon",
        "role": "matrix",
        "split": {"split": [0, [32, 32, 32]]},
        "lr_mult": 1.0,
        "group": "muon",
        "lr": 0.02,
        "wd": 0.1,
        "blocks": [{"shape": [32, 32], "s": 1.0, "update_rms": 0.02 / 32**0.5}],
        "reason": "tagged matrix by its model class",
    }
    assert rows["wte.weight"]["aliases"] == ["head.weight"] and rows["wte.weight"]["lr"] == 5e-4
    assert rows["blocks.0.up.weight"]["route"] == "frozen" and "lr" not in rows["blocks.0.up.weight"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report["muon_params"] + report["adamw_params"] == trained
    adamw = plan.to_dict(build_optimizer(plan, name="adamw", lr=1e-3).param_groups)
    assert adamw["muon_params"] == 0 and adamw["adamw_params"] == trained


def test_fan_out_and_fan_in_of_transposed_and_thin_slices_are_those_of_the_map():
    class Conv1D(nn.Module):  # transformers' layer for GPT-2
        def __init__(self, nf, nx):
            super().__init__()
            self.nf = nf
            self.weight = nn.Parameter(torch.empty(nx, nf))

    up = nn.ModuleDict({"c_fc": Conv1D(128, 32)})
    plan = route(up)
    assert plan.decisions[0].split == {"transposed": True} and plan.decisions[0].block_shapes() == [(128, 32)]
    (row,) = plan.to_dict(plan.groups(lr=0.02))["tensors"]
    assert row["blocks"] == [{"shape": [128, 32], "s": 2.0, "update_rms": 0.02 * 2.0 / 128**0.5}]  # s = sqrt(128 / 32)
    assert by_name(route(Mamba2()))["in_proj.weight"].block_shapes() == [(64, 32)] * 2 + [(16, 32)] * 2


def test_the_table_counts_slices_of_adamw_as_adamw():
    plan = route(Mamba())
    text = plan.table(plan.groups(lr=0.02, adamw_lr=1e-3))
    counts = plan.counts()
    assert f"Muon optimizer params: {counts['muon'] / 1e6:.6f}M (3 tensors)" in text
    assert f"AdamW optimizer params: {counts['adamw'] / 1e6:.6f}M (6 tensors)" in text
    assert f"Muon optimizes {100 * counts['muon'] / sum(counts.values()):.1f}% of parameters" in text
    assert plan.to_dict()["muon_params"] == counts["muon"]
    line = next(line for line in text.splitlines() if line.startswith("x_proj.weight |"))
    assert "| 2176 values | Muon | matrix | lr 0.02 | wd 0 | split (0, [2, 16, 16]) adamw [0] |" in line


def test_adamw_decays_2d_weights_only_unless_told_to_decay_all():
    model = GPT(tie=False)
    by_name = {g["name"]: g for g in build_optimizer(model, name="adamw", lr=1e-3, wd=0.1).param_groups}
    of = {id(p): n for n, p in model.named_parameters()}
    decayed = {of[id(p)] for p in by_name["decay"]["params"]}
    assert decayed == {n for n, (_, role) in taken(route(model)).items() if role != "scalar"}
    assert by_name["no_decay"]["weight_decay"] == 0.0 and by_name["decay"]["weight_decay"] == 0.1
    (group,) = build_optimizer(model, name="adamw", lr=1e-3, wd=0.1, decay="all").param_groups
    assert len(group["params"]) == len(of) and group["base_lr"] == 1e-3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "sgd"}, "`name` = 'sgd' is no optimizer"),
        ({"name": "adamw", "decay": "some"}, "`decay` = 'some'"),
        ({"coefficients": "keler"}, "`coefficients` = 'keler' is unknown: did you mean 'keller'"),
        ({"lr_mode": "x"}, "`lr_mode` = 'x'"),
        ({"lr": -1.0}, "`lr` = -1.0"),
        ({"momentum": 1.0}, "`momentum` = 1.0"),
        ({"ns_steps": 0}, "`ns_steps` = 0"),
    ],
)
def test_bad_settings_reach_the_user_as_user_errors_that_name_the_argument(change, message):
    muon = {} if "name" in change else {"adamw_lr": 1e-3}
    with pytest.raises(UserError, match=message):
        build_optimizer(GPT(), **({"lr": 0.02} | muon | change))


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
    with pytest.raises(UserError, match="qkv.weight now keeps exp_avg"):
        load_named_state(changed, model, tensors, meta)
    fewer = build_optimizer(route(model, overrides=[("header", "exclude")]), lr=0.02, adamw_lr=1e-3)
    with pytest.raises(UserError, match=re.escape("header.weight")):
        load_named_state(fewer, model, tensors, meta)
    adamw = build_optimizer(model, name="adamw", lr=1e-3)
    with pytest.raises(UserError, match="same `name`"):
        load_named_state(adamw, model, tensors, meta)


def test_a_plan_feeds_the_optimizer_with_names_for_its_messages():
    optimizer = build_optimizer(GPT(), lr=0.02, adamw_lr=1e-3)
    assert isinstance(optimizer, Muon)
    assert optimizer.param_groups[0]["param_names"][0] == "blocks.0.qkv.weight"


@pytest.mark.parametrize(
    "tag",
    [
        {"role": "matirx"},
        {"route": "Muon"},
        "muon",
        {"split": [32, 32]},
        {"lr_mult": "2"},
        {"splits": (0, [32, 32])},
        {"split": (0, [32, 32]), "adamw": [5]},
        {"heads": (0, 5)},
    ],
    ids=str,
)
def test_a_tag_that_cannot_be_followed_is_refused_by_the_tensors_name(tag):
    model = torch.nn.Sequential(torch.nn.Linear(32, 64))
    model[0].weight.muonlm = tag
    with pytest.raises(UserError, match="0.weight"):
        route(model)


def test_the_gates_of_recurrent_layers_are_orthogonalised_apart():
    plan = route(torch.nn.LSTM(32, 16))
    assert [d.split for d in plan.decisions if d.route == "muon"] == [{"split": (0, [16] * 4)}] * 2
    assert route(torch.nn.GRU(32, 16)).decisions[0].split == {"split": (0, [16] * 3)}


@pytest.mark.parametrize("variant", ["adamuon", "hyperball"])
def test_the_predicted_update_of_variants_is_the_measured_one(variant):
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
    plan = route(model)
    optimizer = Muon(plan.groups(lr=0.02), variant=variant, ns_dtype="float32")
    [row] = plan.to_dict(optimizer.param_groups)["tensors"]
    before = model[0].weight.detach().clone()
    model[0].weight.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    moved = (model[0].weight - before).square().mean().sqrt().item()
    # hyperball projects back to the sphere, which takes a part of the second order in lr
    assert row["blocks"][0]["update_rms"] == pytest.approx(moved, rel=0.05)
