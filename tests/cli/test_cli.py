"""The command line: one JSON document per verb, exit codes, and what a new user's mistakes are answered with."""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from muonlm.cli.main import VERBS, main


@pytest.fixture
def desk(tmp_path, monkeypatch, finished, text):
    """A directory with what the mistakes below need; `runs/done` is a finished run, the good files are fine."""
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/done").symlink_to(finished)
    Path("good.txt").write_text("some words to learn from.\n" * 200)
    Path("good.jsonl").write_bytes(text.read_bytes())
    Path("empty.txt").touch()
    Path("photo.txt").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    Path("latin1.txt").write_bytes("café\n".encode("latin1"))
    Path("broken.jsonl").write_text('{"text": "fine"}\n{"text": "cut\n')
    Path("other.jsonl").write_text('{"contents": "words"}\n')
    Path("notes.docx").write_bytes(b"PK")
    Path("bad.toml").write_text("[model\n")
    Path("typo.toml").write_text("[optim]\nlearning_rate = 1\n")
    Path("used").mkdir()
    Path("used/diary.txt").write_text("mine")
    Path("folder").mkdir()
    return tmp_path


SMALL = "--smoke --data good.txt --data.val tail:0.1"

# typed | fragments of the answer: what was wrong, and what to type instead
MISTAKES = [
    ("trian", "unknown verb 'trian'", "'train'"),
    ("train quikstart", "unknown recipe 'quikstart'", "'quickstart'"),
    ("train my.toml", "'my.toml' does not exist", "looked in"),
    ("train bad.toml", "bad.toml is not valid TOML", "line 1"),
    ("train typo.toml", "unknown key 'optim.learning_rate'", "'optim.lr'"),
    ("info muonssm/muonlonghorn-cpu --model.scan triton", "--model.scan 'triton' needs a CUDA device", "use auto"),
    ("train muonssm/muonlonghorn-cpu --dry-run --model.scan triton", "--model.scan 'triton' needs a", "use auto"),
    ("train --optim.zzz 0.1", "unknown key '--optim.zzz'", "muonlm info --keys"),
    ("train --modle.n_layer 4", "unknown key '--modle.n_layer'", "'model.n_layer'"),
    ("train --steps 100", "unexpected argument '--steps'", "'--train.steps'"),
    ("train --lr 0.1", "unexpected argument '--lr'", "'--optim.lr'"),
    ("train --optim.d_model 64", "unknown key '--optim.d_model'", "'model.d_model'"),
    ("train --train.steps ten", "train.steps = 'ten'", "a whole number"),
    ("train --train.steps", "--train.steps needs a value", "--train.steps 100"),
    ("train --optim.lr -0.1", "optim.lr = -0.1", "above 0"),
    ("train --model.mlp swiglue", "model.mlp = 'swiglue'", "'swiglu'"),
    ("train --model.d_model 250 --model.n_head 4", "not a multiple of --model.n_head 4", "--model.d_model 2"),
    ("train --dry-run --model.n_head 3", "not a multiple of --model.n_head 3", "--model.d_model 255"),
    ("train --optim.name adam", "optim.name = 'adam'", "'adamw'"),
    ("train --train.budget 512x4k", "not a budget", "tsz512x4k_10B"),
    ("train --train.steps 10 --train.epochs 2", "both set the length of the run", "keep one"),
    ("train --train.device cuda", "sees no CUDA device", "--train.device cpu"),
    ("train quickstart --preset small", "has no preset 'small'", "none"),
    ("train minimind/pretrain --preset minimind-smal", "has no preset 'minimind-smal'", "'minimind-small'"),
    ("train --seeds 1,two", "--seeds '1,two'", "1,2,3"),
    ("train --seeds 1,1", "--seeds '1,1'", "different"),
    ("train shakespeare", "brings no text of its own", "--data FILE_OR_FOLDER"),
    ("train --smoke --data god.txt", "god.txt does not exist", "good.txt"),
    ("train --smoke --data empty.txt", "empty.txt", "the file is empty"),
    ("train --smoke --data photo.txt", "photo.txt:", "binary"),
    ("train --smoke --data latin1.txt", "latin1.txt:1", "iconv"),
    ("train --smoke --data broken.jsonl", "broken.jsonl:2: broken JSON", "one object"),
    ("train --smoke --data other.jsonl", "text", "--data.columns contents"),
    ("train --smoke --data notes.docx", "notes.docx", ".txt"),
    ("train --smoke --data folder", "folder", "holds no"),
    ("train --smoke --data roneneldan/TinyStories", "Hugging Face data set", "--data sotu"),
    ("train --smoke --data good.txt --data.tokenizer bpe", "tokenizer", "bpe:4096"),
    ("train --smoke --data good.txt --data.val 0.1", "incomplete", "tail:0.1"),
    (f"train {SMALL} --model.vocab_size 100", "smaller than the tokenizer's 257", "--model.vocab_size 257"),
    (f"train {SMALL} --train.global_batch 500", "not a multiple of model.block_size = 64", "--train.global_batch 512"),
    (f"train {SMALL} --train.steps 5 --sched.warmup 10", "--sched.warmup 10 does not fit into 5 steps", "from 0 to 5"),
    (f"train {SMALL} --out used", "--out used is already in use", "--out used-2"),
    (f"train {SMALL} --out runs/done", "--out runs/done is already in use", "muonlm train --resume runs/done"),
    (f"train {SMALL} --out good.txt/run", "cannot be written", "--out"),
    (f"train {SMALL} --muon.coefficients kellr", "kellr", "keller"),
    (f"train {SMALL} --init-from runs/doen", "'runs/doen' does not exist", "'runs/done'"),
    (f"train {SMALL} --model.d_model 32 --init-from runs/done", "do not fit this model", "(257, 64) in the file"),
    ("train --resume", "--resume needs to know the run", "muonlm train --resume RUN"),
    ("train --resume runs/doen", "there is no run to continue", "'runs/done'"),
    ("train --resume runs/done --model.n_layer 3", "model.n_layer = 2", "--init-from runs/done"),
    ("train --resume runs/done --seed 8", "seed = 1337", "cannot become 8"),
    ("train keller/gpt --resume runs/done", "was made by recipe", "leave the recipe out"),
    ("train --resume runs/done --init-from runs/done", "Choose one", "--resume"),
    ("generate", "RUN", "--help"),
    ("generate runs", "is not a run directory", "'runs/done'"),
    ("generate quickstart", "does not exist", "A run is a folder"),
    ("generate runs/done --temperature -1", "--temperature -1.0", "0.8 is usual"),
    ("generate runs/done --temperature hot", "--temperature", "invalid float value: 'hot'"),
    ("generate runs/done --top-p 90", "--top-p 90.0", "(0, 1]"),
    ("generate runs/done --stop END", "'END' is 3 tokens", "exactly one"),
    ("generate runs/done --promt hi", "unexpected argument '--promt'", "'--prompt'"),
    ("generate runs/done --checkpoint step-9", "no checkpoint 'step-9'", "step-00000006"),
    ("eval runs/done --tasks bpc", "unknown task 'bpc'", "'bpb'"),
    ("eval runs/done --limit -3", "--limit -3", "0 (everything)"),
    ("eval folder", "is not a run directory", "muonlm train"),
    ("eval runs/done/checkpoints", "is not a run directory", "runs/done'"),
    ("prep good.txt", "--to", "--help"),
    ("prep good.txt --to used", "used exists already", "--overwrite"),
    ("prep good.txt --to new --num-tokens many", "--num-tokens 'many'", "1e8"),
    ("prep nothing/*.txt --to new", "matches no file", "nothing"),
    ("prep good.txt --to new --as litpack", "litpack", "packed"),
    ("info quikstart", "unknown recipe 'quikstart'", "'quickstart'"),
    ("info --toml runs/nowhere", "neither a recipe nor a run", "muonlm info"),
    ("doctor --jsn", "unexpected argument '--jsn'", "'--json'"),
]


def on_disk(folder: Path) -> dict:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


@pytest.mark.parametrize(
    "typed, fragments", [(typed, fragments) for typed, *fragments in MISTAKES], ids=[m[0] for m in MISTAKES]
)
def test_a_mistake_is_answered_with_what_to_type_and_leaves_nothing_behind(desk, capsys, typed, fragments):
    before = on_disk(desk)
    code = main(shlex.split(typed))
    out, err = capsys.readouterr()
    assert code == 2, (out, err)
    for fragment in fragments:
        assert fragment in err, err
    assert err.startswith("muonlm: ") and len(err.strip().splitlines()) == 1 and "Traceback" not in err
    assert on_disk(desk) == before


def test_an_error_with_json_is_one_document_too(desk, capsys):
    assert main(["train", "quikstart", "--json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": err.removeprefix("muonlm: ").strip(), "exit_code": 2}


def test_debug_shows_the_traceback(desk, capsys):
    assert main(["train", "quikstart", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_every_verb_prints_exactly_one_json_document(desk, capsys):
    calls = {
        "train": [*shlex.split(f"train {SMALL} --train.steps 2 --eval.sample 4 --out made")],
        "train seeds": [*shlex.split(f"train {SMALL} --train.steps 2 --eval.sample 4 --seeds 1,2 --out many")],
        "dry run": ["train", "--dry-run"],
        "prep": ["prep", "good.jsonl", "--to", "packed", "--tokenizer", "byte", "--val", "tail:0.1"],
        "generate": ["generate", "runs/done", "--prompt", "the — ünïcödé ☃", "--samples", "2", "--max-tokens", "5"],
        "eval": ["eval", "made", "many-seed1"],
        "info": ["info", "keller/gpt"],
        "info run": ["info", "runs/done"],
        "recipes": ["info"],
        "keys": ["info", "--keys"],
        "doctor": ["doctor"],
    }
    answers = {}
    for name, argv in calls.items():
        assert main([*argv, "--json"]) == 0, name
        answers[name] = json.loads(capsys.readouterr().out)  # raises if there is anything else
    assert {"val_loss", "val_bpb", "train_seconds", "steps", "tokens", "parameters", "run"} <= answers["train"].keys()
    assert [r["run"] for r in answers["train seeds"]] == ["many-seed1", "many-seed2"]
    assert answers["prep"]["splits"]["val"]["tokens"] > 0
    assert len(answers["generate"]["samples"]) == 2 and answers["generate"]["prompt"] == "the — ünïcödé ☃"
    assert (
        answers["eval"][0]["val_bpb"] == pytest.approx(answers["train"]["val_bpb"])
        and "trigram_bpb" in answers["eval"][0]
    )
    assert answers["info"]["parameters"]["tied"] < answers["info"]["parameters"]["untied"]
    assert any(r["recipe"] == "keller/grokking" for r in answers["recipes"]) and any(
        k["key"] == "optim.lr" for k in answers["keys"]
    )
    assert all(check["pass"] for check in answers["doctor"])


def test_generate_prints_the_prompt_and_the_text_that_json_holds(finished, capsys):
    argv = ["generate", str(finished), "--prompt", "the people", "--max-tokens", "20", "--seed", "3"]
    assert main([*argv, "--json"]) == 0
    text = json.loads(capsys.readouterr().out)["samples"][0]
    assert main(argv) == 0
    assert capsys.readouterr().out == f"the people{text}\n"


def test_help_and_version(capsys):
    assert main([]) == 0 == main(["--help"])
    assert "muonlm train" in capsys.readouterr().out
    assert main(["--version"]) == 0
    for verb in VERBS:
        with pytest.raises(SystemExit) as left:
            main([verb, "--help"])
        assert left.value.code == 0 and f"muonlm {verb}" in capsys.readouterr().out


def test_a_resolved_recipe_can_be_printed_edited_and_used(desk, capsys):
    assert main(["info", "keller/gpt-shakespeare", "--toml"]) == 0
    Path("mine.toml").write_text(capsys.readouterr().out.replace("n_layer = 12", "n_layer = 3"))
    assert main(["train", "mine.toml", "--dry-run", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["model"]["n_layer"] == 3 and tree["model"]["res_scale"] == "attn"


# --- real processes: signals, pipes, places that cannot be written ---------------------------------------------------


def start(*argv, **kwargs) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "muonlm", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert condition(), process.communicate()


def begun(run) -> bool:
    file = Path(run) / "metrics.jsonl"
    return file.exists() and file.read_text().count("\n") >= 3


def test_ctrl_c_saves_and_says_how_to_go_on(desk):
    run = start("train", *shlex.split(SMALL), "--train.steps", "100000", "--log.every", "1", "--out", "long")
    wait_for(lambda: begun("long"), run)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130 and "muonlm train --resume long" in out and not err
    assert Path("long/checkpoints/latest").exists() and not Path("long/report.json").exists()


def test_ctrl_c_while_text_is_prepared_ends_in_one_line_and_leaves_nothing_but_what_the_next_run_takes_up(desk):
    with open("big.txt", "w") as file:
        file.write("many different words make a tokenizer work for a while. " * 200_000)
    run = start("prep", "big.txt", "--to", "out/data", "--tokenizer", "byte")
    wait_for(lambda: list(Path("out").glob(".data*/out")), run)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130 and err.count("\n") == 1 and err.startswith("muonlm: interrupted")
    left = [path.name for path in Path("out").iterdir()]  # nothing before the first save; what is kept is named
    assert left == [".data.partial"] and ".data.partial" in err if "kept" in err else not left


def test_a_reader_that_goes_away_does_not_end_a_run(desk):
    train = f"{shlex.quote(sys.executable)} -m muonlm train {SMALL} --train.steps 3 --out piped"
    line = f"{train} | head -1; exit ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and run.stdout.count("\n") == 1 and not run.stderr
    assert Path("piped/report.json").exists()


@pytest.mark.parametrize("size, file", [(3100, "routing.txt"), (20_000, "step-00000004")])
def test_a_disk_that_fills_up_is_one_message(desk, size, file):
    """A real limit of the system on the size of a file: first the routing table does not fit, then the weights."""
    import resource

    prepare = f"train {SMALL} --train.steps 1 --eval.sample 1 --out warm"
    assert main(shlex.split(prepare)) == 0
    assert 3100 < Path("warm/routing.txt").stat().st_size < 20_000 and Path("warm/config.json").stat().st_size < 3100
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # noqa: E731
    run = start("train", *shlex.split(SMALL), "--train.steps", "4", "--out", "full", preexec_fn=limit)
    out, err = run.communicate(timeout=60)
    assert (
        run.returncode == 2
        and err.startswith("muonlm: ")
        and "Traceback" not in err
        and err.count("\n") == 1
        and file in err
    ), err


def test_a_cache_that_cannot_be_written_is_named_with_the_way_to_move_it(desk, monkeypatch, capsys):
    monkeypatch.setenv("MUONLM_CACHE", str(desk / "good.txt"))
    Path("new.txt").write_text("some other words.\n" * 200)
    assert main(["train", "--smoke", "--data", "new.txt", "--out", "run"]) == 2
    assert "export MUONLM_CACHE=" in capsys.readouterr().err and not Path("run").exists()
