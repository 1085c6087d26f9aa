"""The order of layers: each wins over those before it, and a mistake is told with the layer that it stands in."""

import json
import shutil

import pytest

from muonlm.config.recipes import SMOKE, USERS_FILE, Layer, combine, load_recipe, resume
from muonlm.config.runs import read_config
from muonlm.config.schema import Config
from muonlm.errors import UserError


@pytest.fixture
def desk(tmp_path, monkeypatch, finished):
    """A folder with a recipe that sets log.every in every table, from 1 on, and a finished run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "run")
    tables = ("preset.p.log", "baseline.log", "preset.p.baseline.log", "smoke.log")
    lines = ["log.every = 1", *(f"[{table}]\nevery = {i}" for i, table in enumerate(tables, 2))]
    (tmp_path / "mine.toml").write_text("\n".join(lines))
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "options", "every"),
    [
        ({}, {}, 1),
        ({}, {"preset": "p"}, 2),
        ({"optim.name": "adamw"}, {}, 3),
        ({"optim.name": "soap"}, {}, 3),  # its rates are of AdamW's kind
        ({"optim.name": "adamw"}, {"preset": "p"}, 4),
        ({"optim.name": "adamw"}, {"preset": "p", "smoke": True}, 5),
        ({"optim.name": "adamw", "log.every": "6"}, {"preset": "p", "smoke": True}, 6),
    ],
)
def test_each_layer_wins_over_those_before_it(desk, flags, options, every):
    assert load_recipe("mine.toml", flags, **options).log.every == every


def test_a_run_hands_down_its_model_over_smoke_and_under_flags(desk):
    from_run = {"init_from": "run"}
    stored = read_config("run")
    assert stored.model.block_size == SMOKE["model.block_size"] and stored.model.n_layer == 2
    cfg = load_recipe("keller/gpt", from_run)
    assert cfg.model == stored.model and cfg.data.tokenizer == str(desk / "run" / "tokenizer.json")
    assert cfg.init_from.startswith(str(desk / "run" / "checkpoints"))
    assert load_recipe("keller/gpt", from_run | {"model.dropout": "0.1"}).model.dropout == 0.1
    assert load_recipe("keller/gpt", {"init_from": "none"}).init_from == ""


def test_a_layer_that_says_a_thing_one_way_replaces_the_other_ways():
    recipe = Layer(
        "recipe", {"train": {"epochs": 2, "tokens": 1000, "global_batch": 64}, "data": {"source": "a/b", "name": "x"}}
    )
    assert combine(recipe, Layer("flag", {"train.steps": "5"})).keys() & {"train.epochs", "train.tokens"} == set()
    assert combine(recipe, Layer("flag", {"train.steps": "0"}))["train.epochs"] == 2  # says nothing
    assert "train.global_batch" not in combine(recipe, Layer("flag", {"train.accum": "2"}))
    assert "data.name" not in combine(recipe, Layer("flag", {"data.source": "c/d"}))
    assert combine(recipe, Layer("flag", {"data.source": "c/d", "data.name": "y"}))["data.name"] == "y"


@pytest.mark.parametrize(
    ("written", "options", "place"),
    [
        ("log.every = 0", {}, r"\(recipe mine.toml\)"),
        ("[preset.p]\nlog.every = 0", {"preset": "p"}, r"\(recipe mine.toml \[preset.p\]\)"),
        ("[baseline]\nlog.every = 0", {}, r"\(recipe mine.toml \[baseline\]\)"),
        ("[smoke]\nlog.every = 0", {}, r"\(recipe mine.toml \[smoke\]\)"),
        ("", {"flags": {"log.every": "0"}}, r"\(command line\)"),
    ],
)
def test_a_mistake_is_told_with_its_place_even_in_a_table_that_is_not_used(desk, written, options, place):
    (desk / "mine.toml").write_text(written)
    with pytest.raises(UserError, match=rf"log.every = 0 {place} must be at least 1"):
        load_recipe("mine.toml", **options)


def test_presets_of_the_folder_are_read_from_python_too(desk):
    (desk / USERS_FILE).write_text("[presets.p]\nlog.every = 77")
    assert load_recipe("mine.toml", preset="p").log.every == 77


def test_a_resumed_run_keeps_what_makes_it_that_run(desk):
    tree = json.loads((desk / "run" / "config.json").read_text())
    tree["data"] |= {"source": "some/data", "name": "main"}
    (desk / "run" / "config.json").write_text(json.dumps(tree))
    stored = read_config("run")
    same = {"data.source": "some/data", "train.global_batch": str(stored.train.global_batch), "optim.betas": "0.8,0.95"}
    assert resume("run", same | {"optim.betas": ",".join(map(str, stored.optim.betas))}) == stored
    assert resume("run", {"train.epochs": "2"}).train.steps == 0 and resume("run", {"optim.lr": "1"}).optim.lr == 1
    for key, value in (("data.source", "other/data"), ("optim.name", "adamw"), ("model.n_layer", "3"), ("seed", "5")):
        with pytest.raises(UserError, match=f"{key} = .* in run run and cannot become '?{value}.*--init-from run"):
            resume("run", {key: value})


def test_a_config_without_layers_is_the_defaults():
    assert combine() == {} and Config.from_dict({}) == Config()
