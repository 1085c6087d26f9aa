"""The step benchmark runs whole at toy size and its columns mean what its docstring says; no time is asserted here."""

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "optimizer_step.py"
PEERS = ("heavyball", "pytorch-optimizer", "optimuon", "optimuon-direct", "timm")  # may be absent


def run(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *flags], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def report() -> dict:
    done = run("--smoke", "--json", "--threads", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)  # and nothing else may be there


def test_every_arm_of_torch_and_of_ours_is_measured_on_both_sets(report):
    assert [reason for arm, reason in report["skipped"].items() if not arm.startswith(PEERS)] == []
    for name in ("smoke-gpt", "smoke-mamba"):
        arms = {row["arm"] for row in report["rows"] if row["set"] == name}
        assert {"torch", "keller-loop", "adamw-fused", "adamw-foreach", "ours", "ours-keller"} <= arms
    assert all(row["chosen"] for row in report["rows"] if row["arm"] == "ours")  # what the probe picked, by shape


def test_ratios_are_to_torch_and_to_adamw_in_the_same_round(report):
    rounds = {(row["set"], row["arm"]): row["ms_of_rounds"] for row in report["rows"]}
    for row in report["rows"]:
        mine = row["ms_of_rounds"]
        for column, baseline in {"over_torch": "torch", "over_adamw": "adamw-fused"}.items():
            ratios = [ms / rounds[row["set"], baseline][turn] for turn, ms in mine.items()]
            assert row[column] == statistics.median(ratios)
        assert len(mine) == row["n"] >= 2
        assert 0 < row["ms_p10"] <= row["ms"] <= row["ms_p90"] < math.inf
        assert report["ratios"][row["set"]][row["arm"]] == row["over_torch"]


def test_muon_keeps_4_bytes_a_parameter_and_adamw_8(report):
    for row in report["rows"]:
        if not row["arm"].startswith(PEERS):
            expected = 8.0 if row["arm"].startswith("adamw") else 4.0
            # AdamW has a step count of 4 bytes for each tensor besides, 0.01 a parameter at this size
            assert row["state_bytes_per_parameter"] == pytest.approx(expected, abs=0.02), row["arm"]


def test_the_peak_holds_what_an_update_needs_at_least(report):
    peaks = {(row["set"], row["arm"]): row["peak_temporary_bytes"] for row in report["rows"]}
    largest = 32 * 128  # parameters of smoke-gpt's largest matrix
    # torch.optim.Muon: fp32 U and at least X and its successor in bf16, at the same time
    assert peaks["smoke-gpt", "torch"] >= largest * (2 + 2)
    # AdamW fused writes in place: nothing but a few scalars
    assert peaks["smoke-gpt", "adamw-fused"] < 4 * largest


def test_the_same_coefficients_give_the_same_e_and_k_in_every_implementation(report):
    reference = report["spectrum"]["torch"]
    assert len(reference) == 4
    for arm in ("keller-loop", "ours-keller"):
        for problem, found in report["spectrum"][arm].items():
            # five bf16 iterations in another order of operations, 32 rows: up to 0.006 apart when this was written
            assert found["e"] == pytest.approx(reference[problem]["e"], abs=0.03), (arm, problem)
            assert found["k"] == pytest.approx(reference[problem]["k"], abs=0.03), (arm, problem)
    assert report["spectrum"]["ours"]["gauss 32x32"]["e"] < reference["gauss 32x32"]["e"]  # polar_express is more exact


def test_e_and_k_are_those_of_the_scalar_iteration_on_known_singular_values(report):
    values = [1 / i for i in range(1, 33)]
    norm = math.sqrt(sum(s * s for s in values))
    values = [s / norm for s in values]
    for _ in range(5):
        values = [3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5 for s in values]
    e = math.sqrt(statistics.mean((s * s - 1) ** 2 for s in values))
    k = math.sqrt(statistics.mean(s * s for s in values))
    for problem in ("1/k 32x32", "1/k 32x64"):
        found = report["spectrum"]["torch"][problem]
        assert (found["e"], found["k"]) == pytest.approx((e, k), abs=0.02)  # bf16: 0.002 apart when this was written


def test_the_share_of_the_training_step_is_a_fraction(report):
    (share,) = report["share"]
    assert share["tokens"] == 4 * 2 * 16
    low, high = share["share_p10_p90"]
    assert 0 < low <= share["share"] <= high < 1


def test_an_unknown_arm_is_refused_with_the_names_that_exist():
    done = run("--smoke", "--arms", "muun")
    assert done.returncode == 2
    assert "unknown 'muun'" in done.stderr and "ours-keller" in done.stderr
