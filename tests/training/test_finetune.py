"""SFT and DPO in the loop: what they start from, what they repeat, what many ranks change (nothing)."""

import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from muonlm.cli.main import main
from muonlm.config.recipes import load_recipe
from muonlm.config.runs import newest_run
from muonlm.data.prep.examples import prepare_examples
from muonlm.training.loop import train

STEPS = "--train.steps 6 --train.save_every 3 --train.global_batch 2048 --eval.every 3 --eval.iters 2 --eval.sample 8"
STEPS = [*STEPS.split(), "--log.every", "1"]
MODEL = ["--model.pattern", "MA", "--model.block_size", "256", "--data.tokenizer", "byte"]
DATA = ["--data", "word_problems:300:1-2", "--data.val", "hash:0.1"]


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """A pretrained model of two layers and an SFT run from it."""
    home = tmp_path_factory.mktemp("stages")
    assert main(["train", "quickstart", "--smoke", *DATA, *STEPS, *MODEL, "--out", str(home / "pre")]) == 0
    sft = ["--init-from", str(home / "pre"), "--train.objective", "sft", "--data.template", "qa", *DATA, *STEPS]
    assert main(["train", "quickstart", "--smoke", *sft, "--out", str(home / "sft")]) == 0
    return home


def finetune(stages, objective: str, out, *flags: str) -> list[str]:
    start = stages / {"sft": "pre", "dpo": "sft"}[objective]
    flags = ("--data.template", "qa", *DATA, *STEPS, "--out", str(out), *flags)
    return ["train", "quickstart", "--smoke", "--init-from", str(start), "--train.objective", objective, *flags]


def metrics(run) -> list[dict]:
    volatile = {"time", "eval_seconds", "step_ms", "tok_per_s", "train_seconds", "peak_memory_gib", "mfu"}
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in volatile} for line in lines]


def weights(run, step: int = 6) -> dict:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def test_the_first_step_sees_the_parents_weights_and_the_start_is_told(stages, tmp_path, capsys):
    assert main(finetune(stages, "sft", tmp_path / "run")) == 0
    said = " ".join(capsys.readouterr().out.split())
    start = json.loads((tmp_path / "run" / "config.json").read_text())["init_from"]
    assert f"starts from {start} (recipe quickstart)" in said and "template qa" in said and "layers MA" in said
    assert start.startswith(str(stages / "pre"))
    lines = metrics(tmp_path / "run")
    assert lines[0]["step"] == 0 and lines[-1]["val_loss"] < lines[0]["val_loss"]


@pytest.mark.parametrize("reference, bound", [("model", 0.0), ("cached", 1e-5)])
def test_dpo_begins_at_ln_2(stages, tmp_path, reference, bound, capsys):
    """Exactly, with the reference in memory: the same sums twice. Cached sums come from other batches: other orders of
    summation, 1e-6 of sums near 100 nats, times β / 2."""
    assert main(finetune(stages, "dpo", tmp_path / "run", "--dpo.reference", reference)) == 0
    first = next(line for line in metrics(tmp_path / "run") if "loss" in line)
    assert first["step"] == 1 and abs(first["loss"] - math.log(2)) <= bound + 1e-7  # the mean over pairs is fp32
    assert {"acc", "margin", "chosen", "rejected"} <= first.keys()
    said = capsys.readouterr().out
    assert re.search(r"% of \d+ pairs as preferred, 95 % interval \[", said)
    held_out = [line for line in metrics(tmp_path / "run") if "val_acc" in line]
    assert abs(held_out[0]["val_loss"] - math.log(2)) <= bound + 1e-7


def test_cached_and_kept_references_train_alike_and_the_cache_is_used_again(stages, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MUONLM_CACHE", str(tmp_path / "cache"))
    runs = {}
    for name, flags in {"cached": [], "again": [], "model": ["--dpo.reference", "model"]}.items():
        assert main(finetune(stages, "dpo", tmp_path / name, *flags)) == 0
        runs[name] = capsys.readouterr().out
    assert (
        "reference: log-probabilities of" in runs["cached"] and "reference: log-probabilities of" not in runs["again"]
    )
    assert len(list((tmp_path / "cache" / "reference").iterdir())) == 1
    a, b, c = (weights(tmp_path / name) for name in runs)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert all(torch.allclose(a[n], c[n], atol=1e-4) for n in a)  # sums in another order, six steps on


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_a_resumed_run_repeats_the_unbroken_one_bit_for_bit(stages, tmp_path, objective, cut_back, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(finetune(stages, objective, whole)) == 0
    cut_back(whole, cut, 3)
    monkeypatch.setenv("MUONLM_CACHE", str(tmp_path / "empty"))  # what a run needs to go on is in it, but for the data
    assert main(["train", "--resume", str(cut)]) == 0
    a, b = weights(whole), weights(cut)
    assert all(torch.equal(a[name], b[name]) for name in a) and metrics(whole) == metrics(cut)


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_two_ranks_train_as_one(stages, tmp_path, objective):
    """1e-4: sums over ranks are in another order, and AdamW divides the smallest gradients by their size."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "muonlm"]
    result = subprocess.run(
        [*launch, *finetune(stages, objective, tmp_path / "two")], capture_output=True, text=True, timeout=180
    )
    assert result.returncode == 0, result.stderr
    assert main(finetune(stages, objective, tmp_path / "one")) == 0
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in one.items():
        assert float((two[name] - value).norm()) <= 1e-4 * float(value.norm()), name
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a["step"] == b["step"]
        assert all(
            math.isclose(a[k], b[k], rel_tol=1e-3, abs_tol=1e-4) for k in a if k.endswith(("loss", "acc", "margin"))
        )


def test_prompts_are_not_trained_on(stages, tmp_path, monkeypatch):
    """The masked loss is the mean over the assistant's tokens: counted here from the text, by hand."""
    flags = {"init_from": str(stages / "pre"), "train.objective": "sft", "data.template": "qa"}
    flags |= {"data.source": "word_problems:300:1-2", "train.steps": 1, "train.global_batch": 2048}
    cfg = load_recipe("quickstart", flags | {"eval.sample": 0, "eval.every": 0}, smoke=True)
    report = train(cfg, tmp_path / "run")
    from muonlm.data.open import open_splits
    from muonlm.training.parallel import Dist

    data = open_splits(cfg, "conversations", 8, Dist(0, 1, torch.device("cpu")))
    batch = data.train.batch(0)
    texts = [data.train.tokenizer.decode(batch.targets[row][batch.targets[row] >= 0].tolist()) for row in range(8)]
    written = sum(len(text.replace("<|endoftext|>", "\0")) for text in texts)  # a byte is a token here
    assert batch.count == report["tokens"] == written
    assert all("Question" not in t and t.count("####") == t.count("<|endoftext|>") > 0 for t in texts)


@pytest.mark.parametrize(
    "flags, found, remedy",
    [
        (["--model.n_layer", "3"], "lacks 'blocks.2", "do not fit this model"),
        (["--model.d_model", "128"], "(257, 64) in the file, (257, 128) in the model", "do not fit"),
        (["--data.tokenizer", "bpe:300"], "bpe tokenizer of 300 tokens", "--tokenizer"),
        (["--data.template", "alpaca-plian"], "alpaca-plian", "alpaca-plain"),
        (["--dpo.beta", "0"], "dpo.beta = 0", "0.1 is usual"),
        (["--data.num_tokens", "1e6"], "conversations are read whole", "--train.steps"),
        (["--data.columns", "question"], "in the columns question", "question+answer"),
        (["--resume"], "--init-from starts a new one", "Choose one"),
    ],
)
def test_what_does_not_fit_the_parent_is_refused(stages, tmp_path, capsys, flags, found, remedy):
    assert main(finetune(stages, "sft", tmp_path / "run", *flags)) == 2
    error = capsys.readouterr().err
    assert found in error and remedy in error and "Traceback" not in error


def test_a_reference_whose_weights_are_gone_is_asked_for_by_name(stages, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(finetune(stages, "dpo", run, "--dpo.reference", "model")) == 0
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(
        json.dumps(config | {"init_from": str(tmp_path / "gone" / "checkpoints" / "step-1")})
    )
    assert main(["train", "--resume", str(run), "--train.steps", "7"]) == 2
    said = capsys.readouterr().err
    assert "gone/checkpoints/step-1 is gone, and its weights are the reference" in said and "damaged" not in said


def test_special_tokens_that_the_weights_have_no_rows_for_are_refused(stages, tmp_path, capsys):
    names = "<|im_start|>,<|im_end|>"
    flags = ["--data.template", "minimind-chatml", "--data.special", names]
    for rows in ([], ["--model.vocab_size", "259"]):
        assert main([*finetune(stages, "sft", tmp_path / "run"), *flags, *rows]) == 2
        said = capsys.readouterr().err
        assert f"257 rows of vocabulary; with the special tokens {names} there are 259" in said
        assert f"pretrain with them: --data.special '{names}'" in said
    assert main([*finetune(stages, "sft", tmp_path / "run"), *flags, "--data.special", ""]) == 0  # as it advises


def test_a_folder_made_with_another_template_is_refused_if_one_is_asked_for(stages, tmp_path, capsys):
    folder = tmp_path / "folder"
    prepare_examples("word_problems:60:1-2", folder, kind="sft", template="alpaca-plain", tokenizer="byte")
    wrong = [*finetune(stages, "sft", tmp_path / "run"), "--data", str(folder)]
    assert main(wrong) == 2
    assert (
        "template alpaca-plain, and qa is wanted; take it as it is with --data.template alpaca-plain"
        in capsys.readouterr().err
    )
    assert main([*wrong, "--data.template", "alpaca-plain"]) == 0


def test_a_recipe_can_name_the_run_that_it_starts_from(stages, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        f"init_from = {json.dumps(str(stages / 'pre'))}\nmodel.n_layer = 3\ndata.source = 'word_problems:60'\n"
    )
    cfg, fresh = (load_recipe(str(recipe), flags, smoke=True) for flags in ({}, {"init_from": "none"}))
    assert cfg.init_from == str(stages / "pre" / "checkpoints" / "step-00000006") and cfg.model.layers == "MA"
    assert cfg.data.tokenizer == str(stages / "pre" / "tokenizer.json")
    assert fresh.init_from == "" and fresh.data.tokenizer != cfg.data.tokenizer


def test_a_parents_run_beside_the_output_comes_before_later_ones_elsewhere(stages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("runs/newer", "mine/first", "mine/deeper/first"):
        shutil.copytree(stages / "pre", place)
        later = (stages / "pre" / "report.json").stat().st_mtime + {"mine/first": 10}.get(place, 99)
        os.utime(f"{place}/report.json", (later, later))
    assert newest_run("quickstart", "mine/second", shrunk=True) == tmp_path / "mine" / "first"
    assert (
        newest_run("quickstart", "other/second", shrunk=True)
        == newest_run("quickstart", shrunk=True)
        == tmp_path / "runs" / "newer"
    )
    assert newest_run("minimind/pretrain", "mine/second", shrunk=True) is None and newest_run("quickstart") is None


def test_a_reference_in_a_cache_that_cannot_be_written_is_used(stages, tmp_path, monkeypatch):
    assert main(finetune(stages, "dpo", tmp_path / "one")) == 0
    from muonlm.training.objectives import dpo as reference

    write = reference._write
    monkeypatch.setattr(reference, "_write", lambda path, tensors: write({tmp_path: path}[path.parent.parent], tensors))
    assert main(finetune(stages, "dpo", tmp_path / "two")) == 0  # nothing is written outside the run
    assert (tmp_path / "two" / "reference.safetensors").read_bytes() == (
        tmp_path / "one" / "reference.safetensors"
    ).read_bytes()


def test_what_rank_0_refuses_is_said_and_not_buried_under_the_others_tracebacks(stages, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"foo": 1}\n')
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "muonlm"]
    flags = [*finetune(stages, "sft", tmp_path / "run"), "--data", str(tmp_path / "bad.jsonl")]
    result = subprocess.run([*launch, *flags], capture_output=True, text=True, timeout=120)
    assert "no conversation in the columns foo" in result.stderr and "muonlm/data/open.py" not in result.stderr


def test_pretraining_rows_can_hide_documents_from_each_other(stages, tmp_path):
    flags = ["train", "quickstart", "--smoke", *DATA, *STEPS, *MODEL]
    losses = {}
    for reset in ("false", "true"):
        assert main([*flags, "--data.reset", reset, "--out", str(tmp_path / reset)]) == 0
        losses[reset] = [line["loss"] for line in metrics(tmp_path / reset) if "loss" in line]
    # an untrained head knows nothing of the rows; 1e-5: packed rows sum their losses in another order, in fp32
    assert abs(losses["false"][0] - losses["true"][0]) < 1e-5
    assert losses["false"][-1] != losses["true"][-1] and abs(losses["false"][-1] - losses["true"][-1]) < 0.1


def test_a_run_of_real_size_never_starts_from_a_smoke_run_by_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "road/pretrain", "--smoke", *DATA, "--train.steps", "2", "--eval.sample", "0"]) == 0
    capsys.readouterr()
    assert main(["train", "road/sft", *DATA, "--dry-run"]) == 2
    assert "muonlm train road/pretrain" in capsys.readouterr().err
    assert main(["train", "road/sft", "--smoke", *DATA, "--dry-run"]) == 0
    assert "runs/road/pretrain/checkpoints" in capsys.readouterr().out


def test_a_stage_killed_before_its_first_checkpoint_goes_on_from_its_parents_weights(stages, tmp_path, cut_back):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(finetune(stages, "sft", whole)) == 0
    cut_back(whole, cut, 0)
    assert main(["train", "--resume", str(cut)]) == 0
    a, b = weights(whole), weights(cut)
    assert all(torch.equal(a[name], b[name]) for name in a) and metrics(whole) == metrics(cut)


def test_a_run_lives_on_when_its_parent_has_moved(stages, tmp_path, monkeypatch):
    home = tmp_path / "home"
    shutil.copytree(stages / "pre", home / "pre")
    flags = finetune(stages, "sft", tmp_path / "run")
    flags[flags.index("--init-from") + 1] = str(home / "pre")
    assert main([*flags, "--train.steps", "3"]) == 0
    shutil.rmtree(home)
    monkeypatch.setenv("MUONLM_CACHE", str(tmp_path / "empty"))
    assert main(["train", "--resume", str(tmp_path / "run"), "--train.steps", "6"]) == 0
    assert len(weights(tmp_path / "run")) == len(weights(tmp_path / "run", 3))


def test_a_stage_that_leaves_its_parents_template_says_so(stages, tmp_path, capsys):
    flags = finetune(stages, "dpo", tmp_path / "run", "--train.steps", "1")
    assert main(flags) == 0
    assert "its own is" not in capsys.readouterr().out
    flags[flags.index("qa")] = "alpaca-plain"
    flags[flags.index(str(tmp_path / "run"))] = str(tmp_path / "other")
    assert main(flags) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "template alpaca-plain (its own is qa: --data.template qa keeps it)" in said


def test_a_run_is_not_evaluated_on_data_that_changed(stages, tmp_path, capsys):
    """The reference's sums that a run keeps are of the pairs as they were; held-out text may have been trained on."""
    from muonlm.data.synthetic.word_problems import rows

    pairs = tmp_path / "pairs.jsonl"
    lines = [json.dumps(row) for row in rows(120, (1, 2))]
    pairs.write_text("\n".join(lines))
    assert main(finetune(stages, "dpo", tmp_path / "run", "--data", str(pairs))) == 0
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0
    capsys.readouterr()
    pairs.write_text("\n".join(line.replace("apples", "plums") for line in lines))
    assert main(["eval", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "changed since" in said and f"--data {pairs}" in said
    assert main(["eval", str(tmp_path / "run"), "--data", str(pairs), "--json"]) == 0  # as it advises
    assert json.loads(capsys.readouterr().out)["val_loss"] > 0


def test_a_resumed_run_takes_any_way_of_saying_its_length(stages, tmp_path):
    assert main(finetune(stages, "sft", tmp_path / "run", "--train.steps", "2")) == 0
    last = next(line for line in reversed(metrics(tmp_path / "run")) if "epoch" in line)
    assert main(["train", "--resume", str(tmp_path / "run"), "--train.epochs", "1"]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["steps"] == math.ceil(
        last["step"] / last["epoch"]
    )


def test_a_finished_run_is_not_said_to_have_had_settings_that_trained_nothing(stages, tmp_path):
    assert main(finetune(stages, "sft", tmp_path / "run", "--train.steps", "1")) == 0
    before = (tmp_path / "run" / "config.json").read_text()
    assert main(["train", "--resume", str(tmp_path / "run"), "--optim.lr", "0.5"]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["optim"] == json.loads(before)["optim"]


def test_a_mistyped_run_to_resume_begins_no_other(stages, capsys):
    assert main(["train", "quickstart", "--smoke", *DATA, "--resume", str(stages / "sff")]) == 2
    assert f"there is no run to continue (no config.json). Did you mean '{stages / 'sft'}'?" in capsys.readouterr().err
    assert not (stages / "sff").exists()
