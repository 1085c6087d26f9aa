"""Stages: each starts from its parent's newest run, with its model and tokenizer, and no other start goes unsaid."""

import contextlib
import importlib
import json
import math
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from muonlm.cli.facts import describe
from muonlm.cli.main import main
from muonlm.config.recipes import load_recipe, read_recipe, recipe_names
from muonlm.config.schema import Config
from muonlm.data.prep.examples import prepare_examples
from muonlm.data.sources.expand import expand
from muonlm.data.sources.expand import rows as source_rows
from muonlm.data.text.tokenizer import resolve_tokenizer
from muonlm.evals.bpb import preferences
from muonlm.training.checkpoint import read

CHAINS = {
    "minimind": ("minimind/pretrain", "minimind/sft", "minimind/dpo"),
    "mamba_slm": ("mamba_slm/pretrain", "mamba_slm/sft"),
    "mamba_trainer": ("mamba_trainer/hybrid-small", "mamba_trainer/gsm8k-finetune"),
}
STAGES = [recipe for chain in CHAINS.values() for recipe in chain[1:]]
PARENTS = {stage: parent for chain in CHAINS.values() for parent, stage in zip(chain, chain[1:])}
TEMPLATE = dict(zip(STAGES, ("minimind-chatml", "minimind-chatml", "alpaca-plain", "qa"), strict=True))
SHORT = ("--train.steps", "3", "--eval.iters", "2", "--eval.sample", "8")
STILL = (
    "--optim.name",
    "adamw",
    "--optim.lr",
    "1e-30",
)  # far below the last bit of any weight; Muon refuses to stand still


@pytest.fixture(scope="module", params=CHAINS)
def chain(request, tmp_path_factory, text):
    """(folder, recipes, what each said): a family's stages one after another in a folder, as one types them."""
    folder, recipes, said = tmp_path_factory.mktemp(request.param), CHAINS[request.param], {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for recipe in recipes:
            own = ("--data", str(text), "--data.val", "tail:0.1") if recipe == recipes[0] else ()
            log = folder / "said.txt"
            said[recipe] = spoken(log, "train", recipe, "--smoke", *own, *SHORT)
    return folder, recipes, said


@pytest.fixture(scope="module")
def parent(tmp_path_factory, text):
    """A finished smoke run of minimind/pretrain, in a folder where it is the only one."""
    folder = tmp_path_factory.mktemp("parent")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        argv = ["train", "minimind/pretrain", "--smoke", "--data", str(text), "--data.val", "tail:0.1", *SHORT]
        assert main(argv) == 0
    return folder / "runs" / "minimind" / "pretrain"


@pytest.fixture
def here(parent, tmp_path, monkeypatch):
    """The current folder, with a copy of that run under runs/."""
    shutil.copytree(parent, tmp_path / "runs" / "minimind" / "pretrain")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def spoken(log: Path, *argv: str) -> str:
    """What a verb that succeeds prints (a module's fixture has no capsys)."""
    with log.open("w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        assert main(list(argv)) == 0, log.read_text()
    return log.read_text()


def alone(recipe: str, flags: dict | None = None, **options) -> Config:
    """The config of a recipe, whatever runs lie here."""
    return load_recipe(recipe, {"init_from": "none"} | (flags or {}), **options)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read(max((run / "checkpoints").glob("step-*")), state=False)[0]


def report(run: Path) -> dict:
    return json.loads((run / "report.json").read_text())


def sft(*flags: str) -> list[str]:
    return ["train", "minimind/sft", "--smoke", *SHORT, *flags]


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "total"),
    [
        ("minimind/sft", 104_034_048),
        ("minimind/dpo", 104_034_048),
        ("mamba_slm/sft", 129_123_072),
        ("mamba_trainer/gsm8k-finetune", 94_504_472),
    ],
)
def test_info_of_a_stage_is_that_of_its_model(recipe, total):
    assert describe(alone(recipe))["parameters"]["total"] == total
    assert alone(recipe).parent == PARENTS[recipe]


def test_rates_and_lengths_are_the_published_ones():
    """As the origins (README) publish them: rate, AdamW's beside it, momentum, warm-up; AdamW's alone."""
    found = {}
    for stage in STAGES:
        cfg, twin = alone(stage), alone(stage, {"optim.name": "adamw"})
        found[stage] = (cfg.optim.lr, cfg.muon.adamw_lr, cfg.muon.momentum, cfg.sched.warmup, twin.optim.lr)
    assert list(found.values()) == [
        (5e-3, 5e-7, 0.90, 0, 5e-7),
        (1e-3, 1e-8, 0.85, 0, 1e-8),
        (5e-5, 1e-5, 0.95, 6, 1e-5),
        (3e-3, 3e-4, 0.95, 1000, 3e-4),
    ]
    assert describe(alone("mamba_slm/sft"))["steps"] == 634
    assert [alone(stage).train.epochs for stage in STAGES[:2]] == [2, 2]
    assert describe(alone("minimind/sft"))["rows_per_step"] == 16
    dpo = alone("minimind/dpo")
    assert (describe(dpo)["rows_per_step"], dpo.data.pack, dpo.dpo.beta, dpo.log.every) == (4, False, 0.1, 10)
    gsm8k = alone("mamba_trainer/gsm8k-finetune")
    assert (gsm8k.train.steps, gsm8k.data.source, gsm8k.data.name) == (60_000, "openai/gsm8k", "main")
    assert alone("mamba_slm/sft").data.source == "tatsu-lab/alpaca"


@pytest.mark.parametrize("recipe", CHAINS["minimind"])
def test_minimind_has_the_published_ids_of_its_special_tokens(recipe):
    data = alone(recipe).data
    tokenizer = resolve_tokenizer("bpe:300", ["a text to learn from"], data.special.split(","))
    assert data.tokenizer == "bpe:6400"
    assert tokenizer.special == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}


def test_an_experimental_recipe_says_so(capsys):
    assert main(["info"]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("minimind/dpo "))
    assert "EXPERIMENTAL" in line


@pytest.mark.parametrize("recipe", [name for name in recipe_names() if name.startswith(tuple(CHAINS))])
def test_every_recipe_of_the_three_families_can_be_a_stage_or_be_followed_by_one_when_tiny(recipe):
    cfg = alone(recipe, smoke=True)
    assert "baseline" in read_recipe(recipe)
    if recipe in PARENTS:
        assert cfg.data.source.startswith("word_problems") and cfg.data.template == TEMPLATE[recipe]
        assert cfg.model == alone(PARENTS[recipe], smoke=True).model
    elif not recipe.endswith("-cpu"):  # those are quickstart's
        assert cfg.model.block_size == 256  # holds a word problem of two steps and its solution, byte by byte


# --- chains -----------------------------------------------------------------------------------------------------------


def test_each_stage_finds_its_parents_run_and_says_what_it_takes(chain):
    folder, recipes, said = chain
    assert "starts from" not in said[recipes[0]]
    for before, recipe in zip(recipes, recipes[1:]):
        run = folder / "runs" / before
        line = next(x for x in said[recipe].splitlines() if x.startswith("starts from"))
        count = f"{report(run)['parameters']:,} parameters"
        for fact in (f"{run}/checkpoints/step-", f"recipe {before}", count, f"{run}/tokenizer.json", TEMPLATE[recipe]):
            assert fact in line
        made = report(folder / "runs" / recipe)
        assert made["init_from"].startswith(str(run)) and made["steps"] == 3 and math.isfinite(made["val_loss"])
        assert (folder / "runs" / recipe / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()


def test_a_stage_leaves_everything_that_a_run_leaves(chain):
    folder, recipes, _ = chain
    for recipe in recipes:
        run = folder / "runs" / recipe
        names = {path.name for path in run.iterdir()}
        files = {"config.json", "environment.json", "routing.txt", "metrics.jsonl", "report.json", "tokenizer.json"}
        assert names >= files | {"samples", "checkpoints", "report"}
        assert json.loads((run / "config.json").read_text())["recipe"] == recipe


@pytest.mark.parametrize("chain", ["minimind"], indirect=True)  # the family that has preferences
def test_the_first_loss_of_preferences_is_that_of_a_coin(chain):
    folder, recipes, _ = chain
    first = json.loads((folder / "runs" / recipes[-1] / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0
    assert first["val_loss"] == pytest.approx(
        math.log(2), abs=1e-6
    )  # model = reference: every margin is 0 but for fp32


def test_a_stage_at_a_vanishing_rate_keeps_its_parents_weights_bit_for_bit(chain, monkeypatch):
    folder, recipes, _ = chain
    monkeypatch.chdir(folder)
    out = folder / "still"
    assert main(["train", recipes[1], "--smoke", *SHORT, "--train.steps", "1", *STILL, "--out", str(out)]) == 0
    before, after = weights(folder / "runs" / recipes[0]), weights(out)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


# --- which run --------------------------------------------------------------------------------------------------------


def test_the_run_that_finished_last_is_taken_and_one_that_did_not_finish_is_not(here, capsys):
    newer, unfinished = here / "runs" / "mine" / "newer", here / "runs" / "unfinished"
    for path in (newer, unfinished):
        shutil.copytree(here / "runs" / "minimind" / "pretrain", path)
    later = (newer / "report.json").stat().st_mtime + 10
    os.utime(newer / "report.json", (later, later))
    (unfinished / "report.json").unlink()
    assert main(sft("--dry-run", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["init_from"].startswith(str(newer))


def test_a_run_beside_the_output_is_found_too(parent, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(parent, tmp_path / "elsewhere" / "first")
    assert main(sft("--dry-run", "--json", "--out", "elsewhere/second")) == 0
    assert json.loads(capsys.readouterr().out)["init_from"].startswith(str(tmp_path / "elsewhere" / "first"))


def test_a_run_named_by_a_flag_comes_before_the_parents(here, capsys):
    other = here / "other"
    shutil.copytree(here / "runs" / "minimind" / "pretrain", other)
    checkpoint = next((other / "checkpoints").glob("step-*"))
    for name in ("other", str(checkpoint)):
        assert main(sft("--dry-run", "--json", "--init-from", name)) == 0
        assert json.loads(capsys.readouterr().out)["init_from"] == str(checkpoint)


def test_tiny_stages_begin_with_fresh_weights_where_no_parent_ran_and_say_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(sft("--train.steps", "1")) == 0
    assert "fresh weights: no run of minimind/pretrain is taken" in capsys.readouterr().out
    assert report(tmp_path / "runs" / "minimind" / "sft")["init_from"] == ""


def test_fresh_weights_can_be_asked_for(here, capsys):
    assert main(sft("--dry-run", "--json", "--init-from", "none")) == 0
    assert json.loads(capsys.readouterr().out)["init_from"] == ""


@pytest.mark.parametrize("stage", STAGES)
def test_without_a_parents_run_a_stage_names_the_command_that_makes_one(stage, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", stage]) == 2
    err = capsys.readouterr().err
    assert f"muonlm train {PARENTS[stage]};" in err and "--init-from" in err


def test_a_configuration_that_a_recipe_names_is_that_of_its_own_data_set():
    typed = {"own": {}, "other": {"data.source": "me/mine"}, "both": {"data.source": "me/mine", "data.name": "x"}}
    found = {source: alone("mamba_trainer/gsm8k-finetune", flags).data.name for source, flags in typed.items()}
    assert found == {"own": "main", "other": "", "both": "x"}


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert main(list(argv)) == 2
    return capsys.readouterr().err


def test_weights_of_another_shape_are_refused_with_both_shapes(here, capsys):
    said = refused(capsys, *sft("--model.d_model", "32"))
    assert "(259, 64)" in said and "(259, 32)" in said


def test_another_tokenizer_is_refused_as_a_flag_and_in_prepared_data(here, capsys):
    said = refused(capsys, *sft("--data.tokenizer", "bpe:300"))
    assert "bpe tokenizer of 300" in said and "byte tokenizer of 259" in said and "tokenizer.json" in said
    prepare_examples("word_problems:60", here / "made", kind="sft", template="minimind-chatml", tokenizer="bpe:320")
    said = refused(capsys, *sft("--data", "made"))
    assert "bpe tokenizer of 320" in said and "byte tokenizer of 259" in said


def test_going_on_and_starting_anew_are_not_asked_for_at_once(here, capsys):
    run = "runs/minimind/pretrain"
    said = refused(capsys, *sft("--resume", run, "--init-from", run))
    assert "--resume continues" in said and "--init-from starts a new one" in said


def test_a_place_that_cannot_be_written_is_refused_before_data_is_prepared_for_it(here, capsys, monkeypatch):
    (here / "file").write_text("mine")
    monkeypatch.setattr(
        importlib.import_module("muonlm.training.setup"), "open_data", lambda *_: pytest.fail("data was prepared")
    )
    for place in ("file/run", "/proc/run"):
        assert f"--out {place} cannot be written" in refused(capsys, *sft("--out", place))


def test_a_start_that_is_no_run_is_refused(here, capsys):
    assert "nothing-here" in refused(capsys, *sft("--init-from", "nothing-here"))


@pytest.mark.parametrize("verb", ["train", "info"])
def test_a_start_is_refused_by_all_who_read_it(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "'NO_SUCH_RUN' does not exist" in refused(capsys, verb, "road/sft", "--init-from", "NO_SUCH_RUN")


def test_info_shows_a_stage_without_a_parents_run_by_its_own_recipe_and_with_one_by_the_runs_model(here, capsys):
    assert main(["info", "minimind/sft", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["total"] == 104_034_048  # a smoke run is no parent
    assert main(["info", "minimind/sft", "--smoke", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["vocab_size"] == 259


def test_a_stage_can_be_resumed_and_keeps_its_start(here, capsys):
    assert main(sft("--train.steps", "1")) == 0
    run = here / "runs" / "minimind" / "sft"
    shutil.rmtree(here / "runs" / "minimind" / "pretrain" / "checkpoints")  # what began needs its parent no more
    capsys.readouterr()
    assert main(["train", "--resume", str(run), "--train.steps", "2"]) == 0
    assert report(run)["steps"] == 2 and "pretrain" in report(run)["init_from"]


# --- what is trained, and what a run tells ----------------------------------------------------------------------------


@pytest.mark.parametrize("chain", ["minimind"], indirect=True)
def test_the_mask_that_is_shown_is_the_assistants_text_and_its_stop(chain, monkeypatch, capsys):
    folder, (_, first, second), _ = chain
    monkeypatch.chdir(folder)
    before = sorted(folder.glob("runs/*/*"))
    assert main(["train", first, "--smoke", "--show-mask"]) == 0
    head, out = capsys.readouterr().out.split("\n", 1)
    (trained,) = re.findall(r"\[\[(.*?)\]\]", out, re.S)
    prompt = out.partition("[[")[0]
    assert re.fullmatch(r"[^<]*#### \d+<\|im_end\|>", trained) and prompt.endswith("<|im_start|>assistant\n")
    tokens, of_them = map(int, re.search(r"example: (\d+) tokens, (\d+) of them trained", head).groups())
    stop, others = "<|im_end|>", len(re.findall(r"<\|im_(?:start|end)\|>", prompt))
    assert of_them == len(trained) - len(stop) + 1  # a byte is a token, a special token is one
    assert tokens - of_them == len(re.sub(r"<\|im_(?:start|end)\|>", "", prompt).encode()) + others
    assert main(["train", second, "--smoke", "--show-mask", "--json"]) == 0
    sides = json.loads(capsys.readouterr().out)["examples"]
    (chosen, rejected) = [[text for text, trained in side["pieces"] if trained] for side in sides]
    assert len(chosen) == len(rejected) == 1 and chosen != rejected
    assert sides[0]["pieces"][0] == sides[1]["pieces"][0], "one prompt"
    assert sorted(folder.glob("runs/*/*")) == before, "nothing was trained"


def test_plain_text_has_no_mask_to_show(here, text, capsys):
    said = refused(capsys, "train", "quickstart", "--smoke", "--data", str(text), "--show-mask")
    assert "every token is trained" in said


@pytest.mark.parametrize("chain", ["minimind"], indirect=True)
def test_metrics_of_a_stage_tell_epoch_rates_time_and_perplexity(chain):
    folder, recipes, said = chain
    for recipe in recipes[1:]:
        lines = (folder / "runs" / recipe / "metrics.jsonl").read_text().splitlines()
        step = next(r for r in map(json.loads, lines) if "loss" in r)
        assert step.keys() >= {"step", "epoch", "loss", "lr_muon", "lr_adamw", "tokens", "train_seconds"}
        assert 0 < step["epoch"] < 1 and json.loads(lines[0])["eval_seconds"] > 0
        assert re.search(r"step 3/3  epoch 0\.0\d+  loss .* lr_muon .* lr_adamw", said[recipe])
    first = json.loads((folder / "runs" / recipes[1] / "metrics.jsonl").read_text().splitlines()[0])
    assert first["val_perplexity"] == pytest.approx(math.exp(first["val_loss"]))


@pytest.mark.parametrize("chain", ["minimind"], indirect=True)
def test_a_finished_run_says_why_it_stops_and_is_not_taken_back(chain, monkeypatch, capsys):
    """Fewer steps than were done once trained without end."""
    folder, recipes, _ = chain
    monkeypatch.chdir(folder)
    run = f"runs/{recipes[1]}"
    assert main(["train", "--resume", run]) == 0
    said = capsys.readouterr().out
    assert "has done its 3 steps" in said and f"--resume {run} --train.steps 6" in said and "--init-from" in said
    assert "has done 3 steps" in refused(capsys, "train", "--resume", run, "--train.steps", "2")


@pytest.mark.parametrize("chain", ["minimind"], indirect=True)
def test_preferences_are_evaluated_with_the_reference_of_the_run(chain, monkeypatch, capsys):
    folder, recipes, _ = chain
    monkeypatch.chdir(folder)
    run = Path("runs") / recipes[2]
    sums = (run / "reference.safetensors").read_bytes()
    assert main(["eval", str(run), "--limit", "2", "--checkpoint", "latest", "--json"]) == 0
    found, made = json.loads(capsys.readouterr().out), report(run)
    for key in ("val_loss", "val_acc", "val_margin"):  # the same batches: a few bits of fp32 at most
        assert found[key] == pytest.approx(made[key], abs=1e-6)
    assert main(["eval", str(run), "--data", "word_problems:40", "--json"]) == 0
    other = json.loads(capsys.readouterr().out)
    line = preferences({"val_acc": 0.5, "val_pairs": 37})  # 18 pairs and a tie: the interval lies about one half
    low, high = map(float, re.search(r"interval \[(.*)%, (.*)%\]", line).groups())
    assert low + high == pytest.approx(100)
    assert main(["eval", str(run), "--limit", "2"]) == 0
    assert preferences(json.loads((run / "evals" / "bpb.json").read_text())) in capsys.readouterr().out
    assert other["val_loss"] == pytest.approx(math.log(2), abs=0.05) and other["val_loss"] != found["val_loss"]
    assert (run / "reference.safetensors").read_bytes() == sums


def test_ctrl_c_before_the_first_step_of_dpo_says_how_to_go_on(here, monkeypatch, capsys):
    def pressed(*_):
        raise KeyboardInterrupt

    argv = [
        "train",
        "minimind/dpo",
        "--smoke",
        *SHORT,
        "--init-from",
        "runs/minimind/pretrain",
        "--data.template",
        "qa",
    ]
    with monkeypatch.context() as patch:
        patch.setattr("muonlm.training.objectives.dpo.log_probabilities", pressed)
        patch.setenv("MUONLM_CACHE", str(here / "cache"))
        assert main([*argv, "--out", "d"]) == 130
    assert "muonlm train --resume d" in capsys.readouterr().err
    assert main(["train", "--resume", "d"]) == 0 and report(here / "d")["steps"] == 3


# --- docs/data.md -----------------------------------------------------------------------------------------------------


def test_the_commands_of_the_page_about_data_work_as_they_are_typed(here, capsys):
    """prep lines run; train lines run as far as their config, tiny, with the preset that the page writes down."""
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")
    rows = [record for record, _ in source_rows(expand("word_problems:80"))]
    turns = (("user", "question"), ("assistant", "answer"))
    chats = [{"conversations": [{"role": role, "content": r[key]} for role, key in turns]} for r in rows]
    solved = [{key: r[key] for key in ("question", "rationale", "answer")} for r in rows]
    Path("corpus").mkdir()
    for name, records in {"chats": chats, "pairs": rows, "problems": solved, "corpus/a": rows}.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (preset,) = re.findall(r"```toml\n(.*?)```", page, re.S)
    Path("muonlm.toml").write_text(preset)
    lines = [line for block in re.findall(r"```bash\n(.*?)```", page, re.S) for line in block.splitlines()]
    assert len(lines) == 15 and all(line.startswith("muonlm ") for line in lines)
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        assert main(words + ["--smoke", "--dry-run"] * (words[0] == "train")) == 0, line
    assert prepared_kind("data/chats") == "sft" and prepared_kind("data/pairs") == "preferences"
    for recipe in re.findall(r"`((?:minimind|mamba_slm|mamba_trainer)/[\w-]+)`", page):
        assert recipe in recipe_names()


def prepared_kind(folder: str) -> str:
    return json.loads((Path(folder) / "index.json").read_text())["kind"]
