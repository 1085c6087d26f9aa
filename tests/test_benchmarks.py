"""The benchmarks run whole at toy size and their columns mean what their docstrings say; no time is asserted here."""

import importlib
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PEERS = ("heavyball", "pytorch-optimizer", "optimuon", "optimuon-direct", "timm")  # may be absent


def run(script: str, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / script), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def document(script: str, *flags: str) -> dict:
    done = run(script, *flags, "--json", "--threads", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)  # and nothing else may be there


# ---- optimizer_step.py


@pytest.fixture(scope="module")
def report() -> dict:
    return document("optimizer_step.py", "--smoke")


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
    done = run("optimizer_step.py", "--smoke", "--arms", "muun")
    assert done.returncode == 2
    assert "unknown 'muun'" in done.stderr and "ours-keller" in done.stderr


# ---- scan.py


@pytest.fixture(scope="module")
def scans() -> dict:
    return document("scan.py", "--quick", "--only", "mamba,scaling", "--mixers", "lD", "--long")


@pytest.fixture
def scan(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("scan")


def test_scans_of_ours_are_there_and_peers_too_unless_named_as_missing(scans):
    arms = {(row["family"], row["arm"]) for row in scans["rows"]}
    assert {("mamba", "ours"), ("mamba", "ours chunked"), ("mamba", "reference")} <= arms
    peers = {"mambapy.mamba": ("mamba", "mambapy"), "transformers.models.mamba": ("mamba", "transformers")}
    for module, arm in peers.items():
        assert (arm in arms) != any(name.startswith(module) for name in scans["missing"]), arm


def test_scans_were_compared_before_they_were_timed(scans):
    deviations = [row["deviation"] for row in scans["rows"]]
    assert (
        max(deviations) < 1e-4 and sum(d > 0 for d in deviations) >= 3
    )  # other orders of summation: not bitwise equal


def test_ratios_of_scans_are_theirs_over_ours(scans):
    rows = {(row["family"], row["arm"]): row for row in scans["rows"]}
    assert scans["ratios"] or scans["missing"]
    for r in scans["ratios"]:
        above, below = (rows[r["family"], name] for name in r["ratio"].split(" / "))
        assert (
            above["seconds"]["min"] / below["seconds"]["max"]
            <= r["time"]["median"]
            <= above["seconds"]["max"] / below["seconds"]["min"]
        )
        assert r["memory"] == above["peak_bytes"] / max(below["peak_bytes"], 1)


def test_scaling_reports_the_slope_of_what_it_measured(scans, scan):
    assert [row["mixer"] for row in scans["scaling"]] == ["l", "D"]
    for row in scans["scaling"]:
        assert row["time_slope"] == pytest.approx(scan.slope(row["lengths"], row["seconds"]))
        assert len(row["peak_bytes"]) == len(row["lengths"]) and min(row["peak_bytes"]) >= 0


def test_the_slope_of_a_power_law_is_its_exponent(scan):
    for exponent in (0.5, 1.0, 2.0):
        assert scan.slope(scan.LENGTHS, [7 * L**exponent for L in scan.LENGTHS]) == pytest.approx(exponent)


def test_the_peak_is_what_a_piece_of_work_held_at_most_and_not_what_was_there_before(scan):
    ballast = b"x" * (96 << 20)  # freed or not, memory from before does not count

    def prepare():
        before = b"y" * (32 << 20)
        return lambda: (len(b"z" * (64 << 20)), len(before), len(ballast))

    found, _ = scan.in_a_child(lambda: scan.growth(lambda: len(b"w" * (128 << 20)), prepare))
    assert found == pytest.approx(64 << 20, abs=2 << 20)  # pages of code that is first used then


def test_a_failure_in_a_measuring_process_is_none_and_said(scan, capfd):
    assert scan.in_a_child(lambda: 1 / 0) is None
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_scan_that_computes_something_else_is_not_timed(scan):
    case = scan.build("ops", scan.TINY)
    right = case.arms["L"]
    case.arms, case.leaves["L wrong"] = {"L": right, "M": case.arms["M"]}, case.leaves["L"]
    assert scan.check("ops", case) == {"L": 0.0, "M": 0.0}  # two definitions: each is its own measure
    case.arms["L wrong"] = lambda: right() * 1.001
    with pytest.raises(SystemExit, match="L wrong deviates from L by"):
        scan.check("ops", case)


def test_the_long_step_counts_parameters_and_memory(scans):
    long = scans["long"]
    assert long["tokens"] == 512 and 8e6 < long["parameters"] < 12e6
    # weights, gradients and two moments in fp32 at the least
    assert long["peak_resident_bytes"] > 16 * long["parameters"] and long["below_8_GB"] == (
        long["peak_resident_bytes"] < 8e9
    )
    assert long["loss"] == pytest.approx(math.log(4096), abs=0.5)  # a new model knows nothing


def test_an_unknown_family_is_refused_with_the_names_that_exist():
    done = run("scan.py", "--only", "mumba")
    assert done.returncode == 2 and "unknown 'mumba'" in done.stderr and "mamba2" in done.stderr


# ---- decode.py


@pytest.fixture(scope="module")
def decoded() -> dict:
    pytest.importorskip("transformers")
    return document("decode.py", "--quick")["models"]["tiny"]


def test_decoding_compares_models_that_say_the_same(decoded):
    assert 0 < decoded["deviation"] < 1e-4 and decoded["generate"]["same_tokens"]


def test_the_speed_up_of_decoding_is_their_time_over_ours(decoded):
    ours, theirs = (decoded["generate"]["tokens_per_s"][name] for name in ("ours", "transformers"))
    assert ours["min"] / theirs["max"] <= decoded["generate"]["speedup"]["median"] <= ours["max"] / theirs["min"]
    medians = [rate["median"] for rate in decoded["position"]["tokens_per_s"].values()]
    assert len(medians) == 3 and decoded["position"]["spread"] == pytest.approx(max(medians) / min(medians) - 1)


def test_the_state_has_the_bytes_of_its_shapes_at_every_position(decoded):
    layers, inner, taps, width = 2, 64, 4, 16
    expected = 4 * layers * inner * (taps - 1 + width) + 8  # fp32 conv and S, and one int64 that counts tokens
    assert list(decoded["position"]["state_bytes"].values()) == [expected] * 3


# ---- throughput.py


def test_whole_steps_are_compared_with_the_plain_loop_and_logging_has_its_share(tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text("We the people of the United States. " * 300)
    small = ["--shapes", "4L/128", "--repeats", "1", "--steps", "2"]
    done = run("throughput.py", "--data", str(text), *small, "--json", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = json.loads(out.read_text())
    rows = {row["arm"]: row for row in result["rows"]}
    assert {"plain", "plain again", "ours adamw", "ours muon"} <= set(rows)
    for row in rows.values():
        assert row["speedup"] == pytest.approx(rows["plain"]["ms"] / row["ms"])  # one repeat: the ratio of the two
    assert 0 < result["overheads"]["batch_share"] and 0 < result["overheads"]["log_share"]
