"""Config: layers, strictness, and messages that contain the fix."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muonlm.cli.facts import describe_keys
from muonlm.config.model import ModelConfig
from muonlm.config.recipes import RECIPES, load_recipe, recipe_names
from muonlm.config.runs import upgrade
from muonlm.config.schema import Config, keys
from muonlm.errors import UserError


def test_config_survives_json_and_toml():
    cfg = load_recipe("keller/gpt", {"muon.route": "blocks.0=adamw,head=muon", "optim.betas": "0.8,0.99"})
    assert Config.from_dict(cfg.to_dict()) == cfg
    assert Config.from_dict(tomllib.loads(cfg.to_toml())) == cfg


def test_a_baseline_does_not_lengthen_a_smoke_run():
    adamw = {"optim.name": "adamw"}
    assert load_recipe("road/pretrain", adamw).sched.warmup == 20
    assert load_recipe("road/pretrain", adamw, smoke=True).sched.warmup == 1


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_plain_smoked_and_as_adamw(name):
    alone = {"init_from": "none"}  # whatever runs lie here
    assert load_recipe(name, alone).recipe == name
    assert load_recipe(name, alone, smoke=True).train.steps <= 50
    twin = load_recipe(name, alone | {"optim.name": "adamw"})
    assert twin.optim.name == "adamw" and twin.optim.lr < 0.015, "an AdamW rate is never the Muon one"


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_header_says_what_it_is(name):
    assert (RECIPES / f"{name}.toml").read_text().startswith(f"# {name} · ")


def test_flags_beat_presets_beat_recipes_and_baseline_fills_the_rest():
    assert load_recipe("keller/nanogpt-char").model.d_model == 384
    assert load_recipe("keller/nanogpt-char", preset="cpu").model.d_model == 128
    assert load_recipe("keller/nanogpt-char", {"model.d_model": "64"}, preset="cpu").model.d_model == 64
    assert load_recipe("keller/gpt", {"optim.name": "adamw"}).optim.lr == 1.8e-3
    assert load_recipe("keller/gpt", {"optim.name": "adamw", "optim.lr": "7e-4"}).optim.lr == 7e-4


def test_a_flag_for_the_length_of_a_run_replaces_the_recipe_s():
    assert load_recipe("minimind/pretrain").train.epochs == 10
    cfg = load_recipe("minimind/pretrain", {"train.steps": "1e3"})
    assert (cfg.train.steps, cfg.train.epochs) == (1000, 0)


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        ({"optim.lrr": "1"}, ["optim.lrr", "Did you mean 'optim.lr'?"]),
        ({"muon.beta": "1"}, ["muon.beta", "Did you mean 'muon.beta2'?"]),  # not dpo.beta, which is nearer elsewhere
        ({"muon.n_layer": "1"}, ["muon.n_layer", "Did you mean 'model.n_layer'?"]),
        ({"optim": "1"}, ["section", "optim.name"]),
        ({"optim.lr": "fast"}, ["optim.lr = 'fast'", "a number"]),
        ({"optim.lr": "nan"}, ["optim.lr", "a number"]),
        ({"optim.lr": "0"}, ["optim.lr = 0", "above 0"]),
        ({"optim.name": "moun"}, ["moun", "'muon'"]),
        ({"train.steps": "1.5"}, ["train.steps = '1.5'", "whole number"]),
        ({"train.steps": "-1"}, ["train.steps = -1", "at least 0"]),
        ({"train.steps": "10", "train.epochs": "1"}, ["train.steps and train.epochs", "keep one"]),
        ({"train.budget": "big"}, ["train.budget = 'big'", "tsz512x4k_10B"]),
        ({"model.pattern": "AXM"}, ["'X'", "A attention"]),
        ({"model.tie": "maybe"}, ["model.tie", "true or false"]),
        ({"model.dropout": "1"}, ["model.dropout", "[0, 1)"]),
        ({"muon.momentum": "1"}, ["muon.momentum", "[0, 1)"]),
        ({"optim.betas": "0.9"}, ["optim.betas", "2 numbers"]),
        ({"muon.route": "blocks"}, ["blocks", "=adamw"]),
        ({"track": "wandbb"}, ["'wandb'"]),
    ],
)
def test_a_wrong_setting_is_refused_with_the_fix(flags, fragments):
    with pytest.raises(UserError) as error:
        load_recipe("quickstart", flags)
    for fragment in fragments:
        assert fragment in str(error.value)


def test_an_unknown_recipe_or_preset_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match="Did you mean 'quickstart'"):
        load_recipe("quickstrat")
    with pytest.raises(UserError, match="no preset 'cpuu'.*'cpu'"):
        load_recipe("keller/nanogpt-char", preset="cpuu")
    with pytest.raises(UserError, match="does not exist"):
        load_recipe(str(tmp_path / "mine.toml"))
    broken = tmp_path / "broken.toml"
    broken.write_text("[model\n")
    with pytest.raises(UserError, match="not valid TOML"):
        load_recipe(str(broken))
    broken.write_text("[modell]\nn_layer = 2\n")
    with pytest.raises(UserError, match="modell.n_layer.*'model.n_layer'"):
        load_recipe(str(broken))
    (tmp_path / "a.toml").write_text(f'extends = "{tmp_path}/b.toml"')
    (tmp_path / "b.toml").write_text(f'extends = "{tmp_path}/a.toml"')
    with pytest.raises(UserError, match="circle"):
        load_recipe(str(tmp_path / "a.toml"))


def test_hyphens_and_underscores_are_equal():
    assert load_recipe("quickstart", {"model.n-layer": "2"}).model.n_layer == 2


def test_every_key_has_help():
    table = describe_keys()
    assert {row["key"] for row in table} == set(keys())
    assert all(len(row["help"]) > 10 for row in table)


def test_the_number_of_keys_does_not_grow_unnoticed():
    assert len(keys()) == 139, "each key is one more thing to know: if this one is worth it, write the new number here"


@given(st.integers(1, 9999), st.integers(1, 64), st.sampled_from("MB"), st.integers(1, 999))
def test_budgets_parse(rows, length, unit, total):
    cfg = load_recipe("quickstart", {"train.budget": f"tsz{rows}x{length}k_{total}{unit}"})
    assert cfg.train.parse_budget() == (rows * length * 1024, total * {"M": 10**6, "B": 10**9}[unit])


def test_the_config_of_an_older_run_is_read():
    """Muon's settings stood in [optim]; selectors, always at -1 in a resolved config, beside the pattern."""
    old = Config(model=ModelConfig(pattern="LW")).to_dict()
    old["optim"] |= {"qk_clip": 50.0} | {key: value for key, value in old.pop("muon").items() if key != "qk_clip"}
    old["model"] |= {"gated_delta_per_layer": -1, "muon_longhorn_per_layer": -1, "longhorn_per_layer": -1}
    new = Config.from_dict(upgrade(old))
    assert (new.model.pattern, new.muon.qk_clip) == ("LW", 50.0)
    with pytest.raises(UserError, match="Did you mean 'model.pattern'"):
        load_recipe("quickstart", {"model.longhorn_per_layer": "2"})
