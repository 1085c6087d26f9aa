"""benchmarks/gpu.py: the rehearsal passes; what goes wrong in a stage or a test is a row that ends nothing else."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


@pytest.fixture
def stage(gpu, tmp_path):
    from gpu_stages.report import Stage

    return Stage("kernels", tmp_path, 60.0, rehearse=True)


def rows(folder: Path, name: str = "kernels") -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]


# ---- stages


@pytest.mark.parametrize(
    "script, why",
    [
        ("raise SystemExit(3)", "the stage ended with exit code 3"),
        ("import os; os.abort()", "the stage ended with exit code -6"),
        ("import time; time.sleep(60)", "ended after its 1 s"),
    ],
)
def test_a_stage_that_dies_or_is_late_is_a_failed_row(script, why, gpu, tmp_path, monkeypatch):
    (tmp_path / "stage.py").write_text(script)
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "stage.py"))
    monkeypatch.setattr(gpu, "GRACE", 0.0)
    args = SimpleNamespace(out=tmp_path, text=tmp_path / "text.txt", rehearse=True, only=None)
    gpu.start(args, "kernels", 1.0)
    (row,) = rows(tmp_path)
    assert (row["verdict"], row["note"]) == ("FAILED", why)


def test_an_exception_in_a_part_is_a_failed_row_and_the_next_part_runs(stage, tmp_path):
    stage.part("one", lambda: 1 / 0)
    stage.part("two", lambda: stage.row("two", 3.0, "ms"))
    stage.part("three", lambda: stage.row("three"), seconds=1e6)
    one, two, three = rows(tmp_path)
    assert one["verdict"] == "FAILED" and one["note"] == "ZeroDivisionError: division by zero"
    assert two["figure"] == 3.0 and three["verdict"] == "not run" and "no time" in three["note"]


def test_a_target_is_met_or_missed_but_not_by_a_rehearsal(stage, tmp_path):
    stage.row("rehearsed", 9.0, target=1.0)
    stage.rehearse = False
    stage.row("slow", 9.0, target=1.0)
    stage.row("fast", 0.9, target=1.0)
    stage.row("high", 0.9, target=0.5, better="higher")
    stage.row("lost", float("nan"), target=1.0)
    assert [row["verdict"] for row in rows(tmp_path)] == ["", "missed", "met", "met", "missed"]


# ---- tests marked cuda

TESTS = """
import os
import pytest
pytestmark = pytest.mark.cuda
@pytest.mark.parametrize("i", range(3))
def test_near(i, record_property):
    record_property("within", {"what": f"case {i}", "error": i * 1e-7, "tolerance": 1e-6})
def test_wrong():
    assert 1 == 2
def test_poisoned():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_crashing():
    os.abort()
def test_after():
    pass
"""


def test_tests_survive_a_crash_and_each_failure_is_a_row(stage, tmp_path):
    from gpu_stages.suite import run_tests

    (tmp_path / "test_made_up.py").write_text(TESTS)
    run_tests(stage, [str(tmp_path)], workers=2, seconds=60)
    found = {row["what"]: row for row in rows(tmp_path)}
    assert found["near"]["figure"] == "3/3" and found["near"]["note"] == "worst 2.0e-07 of 1e-06: case 2"
    assert found["more of test_made_up"]["verdict"] == "ok" and found["more of test_made_up"]["figure"] == "1/1"
    for name, why in {
        "wrong": "assert 1 == 2",
        "poisoned": "illegal memory access",
        "crashing": "exit code -6",
    }.items():
        assert found[name]["verdict"] == "FAILED" and why in found[f"  {name}"]["note"], name


def test_tests_that_cannot_be_collected_are_an_error_with_its_reason(stage, tmp_path):
    from gpu_stages.suite import run_tests

    (tmp_path / "test_broken.py").write_text("import nothing_of_that_name")
    with pytest.raises(RuntimeError, match="nothing_of_that_name"):
        run_tests(stage, [str(tmp_path)], workers=1, seconds=60)


FAULTS = {  # MUONLM_PLANT: the tests of a stage that must see it, and what they say
    "gradient": ("scan/test_device.py", "strided and delta and chunked and not muon and not open", "d_k"),
    "nan": ("training/test_device.py", "trains_as_the_cpu and hybrid", "gradient norm nan at step 1"),
    "sync": ("optim/test_device.py", "matrices_never_waits and default-float32-number", "the host waits for it"),
    "exception": ("training/test_device.py", "trains_as_the_cpu and hybrid", "a planted exception"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails_the_checks_that_it_concerns(fault):
    file, chosen, why = FAULTS[fault]
    tests = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "cuda", "-k", chosen, str(tests / file)]
    env = os.environ | {"MUONLM_PLANT": fault, "MUONLM_REHEARSE": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 1 and "1 failed" in done.stdout and why in done.stdout, done.stdout[-2000:]


# ---- the whole

NOT_REHEARSED = ("fla", "compiled: the other", "busy", "kernels of a step", "shares a row", "programs a row")


def run(out: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(out), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


def test_an_unknown_stage_is_refused_with_the_names_that_exist(tmp_path):
    done = run(tmp_path, "--stages", "kernel")
    assert done.returncode == 2 and "unknown stage 'kernel'" in done.stderr and "throughput" in done.stderr


def test_a_planted_exception_ends_a_part_and_no_stage(tmp_path):
    done = run(tmp_path, "--rehearse", "--stages", "ceilings,quality", "--plant", "exception", "--minutes", "5")
    found = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    failed = [(row["stage"], row["what"]) for row in found if row["verdict"] == "FAILED"]
    assert done.returncode == 1 and failed == [("ceilings", "launch"), ("quality", "shakespeare to 1.4697")], failed
    assert [row["verdict"] for row in found if row["what"] == "stage"] == ["ok", "ok"]


def test_a_stage_alone_adds_to_what_the_folder_holds(tmp_path):
    for flags in ("--stages", "ceilings"), ("--stages", "kernels", "--only", "checks", "--minutes", "0.001"):
        run(tmp_path, "--rehearse", *flags)
    found = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {row["stage"] for row in found} == {"ceilings", "kernels"}


def test_the_whole_examination_can_be_rehearsed_on_a_cpu(gpu, tmp_path):
    done = run(tmp_path / "out", "--rehearse", "--minutes", "14")
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())["rows"]
    assert {row["stage"] for row in found} == set(gpu.SHARES)
    lost = [row["what"] for row in found if row["verdict"] == "not run"]
    assert all(any(part in what for part in NOT_REHEARSED) for what in lost), lost
    assert len(found) < 100
    assert (tmp_path / "out" / "gpu.md").read_text("utf-8").count("\n") > len(found)
