"""What `muonlm info` shows: tables that fit a terminal, one line a row in a pipe, the detail behind a flag."""

import dataclasses
import json
import re
import sys
import tomllib

import pytest

from muonlm.cli.facts import describe_keys, describe_recipes
from muonlm.cli.main import main
from muonlm.config.recipes import RECIPES, load_recipe, recipe_names
from muonlm.data.open import vocabulary
from muonlm.model import count_parameters


@pytest.fixture
def terminal(monkeypatch, capsys):
    """terminal(columns, words) -> the lines that `muonlm info` shows there."""

    def show(columns: int, *words: str) -> list[str]:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", "xterm")
        assert main(["info", *words]) == 0
        monkeypatch.delattr(sys.stdout, "isatty")
        return re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out).splitlines()

    return show


@pytest.mark.parametrize(
    "words", [(), ("--keys",), ("--presets",), ("minimind/pretrain",), ("keller/grokking",)], ids=str
)
def test_every_table_fits_a_terminal_of_80_columns(terminal, words):
    lines = terminal(80, *words)
    assert len(lines) > 5 and max(map(len, lines)) <= 80
    assert len(terminal(160, *words)) <= len(lines)


def test_the_list_groups_recipes_by_family(terminal):
    lines = terminal(120)
    names = [line.split(" ")[0] if line[:1] != " " else line.split()[0] for line in lines if line.strip()]
    assert names.index("quickstart") < names.index("keller/") < names.index("grokking") < names.index("minimind/")


def test_in_a_pipe_a_recipe_is_one_line_with_its_whole_name(capsys):
    assert main(["info"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert {line.split()[0] for line in lines[2:]} == set(recipe_names())
    assert len(lines) == 2 + len(recipe_names())


@pytest.mark.parametrize("found", describe_recipes(), ids=lambda found: found["recipe"])
def test_what_is_listed_of_a_recipe_is_true(found):
    assert 3 < len(found["what"]) < 100 and found["hardware"] in ("a GPU", "2 CPU cores")
    assert found["about"].startswith(("a GPU", "2 CPU cores", "EXPERIMENTAL"))
    cfg = load_recipe(found["recipe"], needs_parent=False)
    size = cfg.model.vocab_size or (50257 if cfg.data.tokenizer.startswith("gpt2:") else vocabulary(cfg)[0])
    counts = count_parameters(dataclasses.replace(cfg.model, vocab_size=size))
    near = [abs(found["parameters"] / counts[how] - 1) for how in ("tied", "untied", "total")]
    assert min(near) < 1e-3


def test_a_recipe_is_a_table_of_facts_and_one_of_routing_by_kind(capsys):
    assert main(["info", "minimind/pretrain"]) == 0
    out = capsys.readouterr().out
    assert "16 × attention, 6,194,880 parameters each" in out and "10 epochs of the data\n" in out
    (row,) = [line.split() for line in out.splitlines() if line.startswith("blocks.*.mlp.down.weight")]
    assert row == ["blocks.*.mlp.down.weight", "768x2048", "16", "25.2M", "Muon", "0.02", "4.4e-04"]
    assert "blocks.0." not in out and "--routing" in out
    assert main(["info", "minimind/pretrain", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    kinds = facts["routing_by_kind"]
    assert sum(kind["values"] for kind in kinds) == facts["parameters"]["total"]
    assert sum(kind["tensors"] for kind in kinds) == facts["routing"].count("] Assigning: ")
    assert main(["info", "minimind/pretrain", "--routing"]) == 0
    out = capsys.readouterr().out
    assert facts["routing"].strip() in out and "blocks.15.mlp.down.weight | 768x2048" in out


def test_a_recipe_for_adamw_has_facts_alone(capsys):
    assert main(["info", "muonssm/longhorn-97m"]) == 0
    assert "0.0% of the parameters" in capsys.readouterr().out
    assert main(["info", "muonssm/longhorn-97m", "--routing"]) == 0
    assert "AdamW trains every tensor" in capsys.readouterr().out


def test_an_optimizer_beside_muon_and_adamw_is_named_with_what_it_trains(capsys):
    assert main(["info", "quickstart", "--optim.name", "soap"]) == 0
    out = capsys.readouterr().out
    (row,) = [line.split() for line in out.splitlines() if line.startswith("blocks.*.mlp.down.weight")]
    assert row[4] == "SOAP" and "SOAP share" in out and "Muon" not in out
    assert main(["info", "quickstart", "--optim.name", "soap", "--routing"]) == 0
    out = capsys.readouterr().out
    assert "AdamW trains every tensor" not in out and "Muon" not in out and "1D/0D" not in out
    assert "[SOAP] Assigning: blocks.0.mlp.down.weight" in out
    assert "Using AdamW optimizer for groups decay, no_decay (lr=0.003)" in out


def test_keys_that_no_recipe_sets_are_marked_as_advanced(capsys):
    def settings(tree: dict) -> set[str]:
        own = {f"{name}.{leaf}" for name, table in tree.items() if isinstance(table, dict) for leaf in table}
        below = [tree[name] for name in ("smoke", "baseline") if name in tree] + list(tree.get("preset", {}).values())
        flat = {name for name in tree}
        return set().union(own, flat, *(settings(table) for table in below))

    text = [tomllib.loads(path.read_text("utf-8")) for path in RECIPES.rglob("*.toml")]
    used = set().union(*(settings(tree) for tree in text))
    table = {row["key"]: row["advanced"] for row in describe_keys()}
    assert {key for key, advanced in table.items() if not advanced} == used & table.keys()
    assert not table["model.d_model"] and table["dpo.reference"]
    assert main(["info", "--keys"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0][2:] for line in lines if line.startswith("--") and line.split()[1] == "*"} == {
        key for key, advanced in table.items() if advanced
    }


def test_info_is_headed_by_what_was_asked_and_says_what_to_type_for_more(finished, tmp_path, capsys):
    """Of a run its directory, of a recipe the flags too. A run is shown wherever it was trained."""
    assert main(["info", "shakespeare-cpu", "--smoke", "--model.n_layer", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "shakespeare-cpu --smoke --model.n_layer 3"
    assert lines[-1].endswith("muonlm info shakespeare-cpu --smoke --model.n_layer 3 --routing")
    run, config = tmp_path / "run", json.loads((finished / "config.json").read_text())
    run.mkdir()
    config["model"] |= {"pattern": "M", "scan": "triton"}
    config["train"]["device"] = "cuda"
    (run / "config.json").write_text(json.dumps(config))
    assert main(["info", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{run}: quickstart" and lines[-1].endswith(f"muonlm info {run} --routing")
