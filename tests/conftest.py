"""What tests share: the device of tests marked `cuda`; for whole verbs a cache of their own, a little text, a run."""

import json
import os
import random
import shutil
import signal

import pytest
import torch

from muonlm.cli.main import main
from muonlm.config.recipes import load_recipe
from muonlm.model.mixers import MIXERS

WORDS = "the of and people union states government law peace war nation great united congress power shall every year"
WORDS = WORDS.split()
TINY = [
    "--train.steps",
    "6",
    "--eval.every",
    "3",
    "--eval.iters",
    "2",
    "--train.save_every",
    "3",
    "--log.every",
    "1",
    "--eval.sample",
    "8",
]


REHEARSAL = os.environ.get("MUONLM_REHEARSE") == "1"  # benchmarks/gpu.py --rehearse: toy sizes, on the CPU


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() or REHEARSAL:
        return
    skip = pytest.mark.skip(reason="torch sees no CUDA device; benchmarks/gpu.py --rehearse runs it on a CPU")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def device() -> torch.device:
    """Where a test marked `cuda` runs; a rehearsal's are small enough for a CPU."""
    return torch.device("cpu" if REHEARSAL else "cuda")


@pytest.fixture
def within(record_property):
    """within(what, error, tolerance): error <= tolerance, which NaN is not; benchmarks/gpu.py shows the figures."""

    def check(what: str, error: float, tolerance: float) -> None:
        error = float(error)
        record_property("within", {"what": what, "error": error, "tolerance": tolerance})
        assert error <= tolerance, f"{what}: {error:.2e} of {tolerance:.0e}"

    return check


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Prepared text goes into a directory of this session, not into the user's cache; subprocesses inherit it."""
    patch = pytest.MonkeyPatch()
    patch.setenv("MUONLM_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("OMP_NUM_THREADS", "1")
    # `pytest &` starts with Ctrl-C ignored, and so would every process that a test starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """60 documents of made-up sentences, one a line of JSON: 40 kB, no package needed."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "made-up.jsonl"
    path.write_text(
        "\n".join(json.dumps({"text": " ".join(draw.choices(WORDS, k=110)) + "."}) for _ in range(60)), "utf-8"
    )
    return path


@pytest.fixture(scope="session")
def smoke(text):
    """smoke(out, *flags) -> argv of a six-step run of the smoke recipe on `text`."""
    return lambda out, *flags: [
        "train",
        "quickstart",
        "--smoke",
        "--data",
        str(text),
        "--data.val",
        "tail:0.1",
        "--out",
        str(out),
        *TINY,
        *flags,
    ]


@pytest.fixture(scope="session")
def finished(tmp_path_factory, smoke):
    """A run that has ended, to read from; tests that damage it work on a copy."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main(smoke(out)) == 0
    return out


@pytest.fixture(scope="session")
def cut_back():
    """cut_back(run, copy, step): a copy of a finished run as a kill after its checkpoint `step` leaves it; 0: none."""

    def cut(run, copy, step):
        shutil.copytree(run, copy)
        (copy / "report.json").unlink()
        if not step:
            shutil.rmtree(copy / "checkpoints")
            return
        kept = f"step-{step:08}"
        for later in (copy / "checkpoints").glob("step-*"):
            if later.name > kept:
                shutil.rmtree(later)
        for pointer in ("latest", "best"):
            (copy / "checkpoints" / pointer).write_text(kept)

    return cut


# --- tiny runs of every mixer and objective, for the loop on a device and on one that is pretended --------------------

# name -> settings beside those of `config`. Gates, writes and positions of all kinds, the data of all objectives.
LETTERS = {entry.name: {"model.pattern": entry.letter} for entry in MIXERS.values()}
LOOPED = {"loops": {"model.loops": 2, "model.pattern": "AM", "model.inject": True}}
HYBRID = {"hybrid": {"model.pattern": "MMMA", "model.n_layer": 4}}
OTHERS = {
    "learned positions": {
        "model.positions": "learned",
        "model.norm": "layernorm",
        "model.mlp": "swiglu",
        "model.tie": False,
        "model.n_kv_head": 1,
        "model.attn_softcap": 20.0,
    },
    "qk_clip": {"model.qk_norm": False, "muon.qk_clip": 0.05},
    # many blocks of keys, whose sums a GPU adds in any order unless told; tokens for the embedding's other kernel
    "long rows": {"train.repeatable": True, "train.micro_batch": 4},
    "reset": {"model.pattern": "MA", "data.reset": True},
}
SMALL = {"optim.lr": 2e-3, "muon.adamw_lr": 3e-4, "muon.head_lr": 3e-4}  # of a DPO loss near 0 little can be compared
OBJECTIVES = {
    "grokking": {},
    "sft": {"model.pattern": "MA", "train.objective": "sft", "data.template": "qa"},
    "dpo": {"model.pattern": "MA", "train.objective": "dpo", "data.template": "qa"} | SMALL,
}
CASES = LETTERS | LOOPED | HYBRID | OTHERS | OBJECTIVES
ROWS = {"long rows": 1024, "gdn_velocity_ns": 64}  # tokens in a row on a GPU; else 160: some chunks and a rest
REHEARSED = ["hybrid", "muon_mamba", "qk_clip", "long rows", "reset", *OBJECTIVES]  # all are seen by test_placement.py


@pytest.fixture(params=REHEARSED if REHEARSAL else CASES)
def case(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def files(text, tmp_path_factory):
    """Data of each objective: made-up sums, right and wrong answers."""
    folder, draw = tmp_path_factory.mktemp("files"), random.Random(0)
    sft, dpo = [], []
    for _ in range(100):
        a, b = draw.randrange(100), draw.randrange(10 ** draw.randrange(1, 4))
        question, right, wrong = f"What is {a} + {b}?", f"It is {a + b}.", f"Perhaps {a + b + draw.choice([-1, 1])}?"
        sft.append({"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": right}]})
        dpo.append({"prompt": question, "chosen": right, "rejected": wrong})
    found = {"text": text}
    for name, rows in {"sft": sft, "dpo": dpo}.items():
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return found


@pytest.fixture
def config(files, device):
    """config(name, **flags) -> Config of a case of CASES on the device."""
    toy = device.type == "cpu"

    def make(name: str, **flags):
        objective = name if name in OBJECTIVES else "text"
        block = (40 if objective == "text" else 128) if toy else ROWS.get(name, 160)
        base = {
            "train.device": str(device),
            "train.dtype": "float32",
            "train.steps": 4 if toy else 20,
            "train.micro_batch": 2,
            "train.save_every": 0,
            "eval.every": 0,
            "eval.iters": 2,
            "eval.sample": 0,
            "log.every": 1,
            "log.diagnostics": 2 if toy else 10,
            "log.spectra": 2 if toy else 10,
            "optim.name": "muon",
        }
        if objective == "grokking":
            return load_recipe("keller/grokking-quick", base | {"train.micro_batch": 40} | flags, smoke=True)
        base |= {
            "data.source": str(files[objective]),
            "data.val": "tail:0.1",
            "data.tokenizer": "byte",
            "model.init": "lm",  # zero_out, the recipe's, leaves most gradients of the first step at zero
            "model.d_model": 32 if toy else 64,
            "model.block_size": block,
            "model.delta_heads": 2,
            "model.ssm_head": 16,
            "model.window": 24,
            "train.global_batch": 4 * block,
        }
        return load_recipe("quickstart", base | CASES[name] | flags, smoke=True)

    return make
