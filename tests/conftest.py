"""What tests share: the device of tests marked `cuda`; for whole verbs a cache of their own, a little text, a run."""

import json
import os
import random
import shutil
import signal

import pytest
import torch

from muonlm.cli.main import main

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
