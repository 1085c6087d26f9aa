"""The checks of a stage are the tests marked `cuda`: here they run side by side, and survive each other's crashes.

Kernels compile on CPU cores, so many processes are many times faster than one. A CUDA error poisons its process: the
worker ends, and another goes on with the tests that have no result.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from . import interpreter
from .report import Stage, records

ROOT = Path(__file__).resolve().parents[2]
PYTEST = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
POISONED = (
    "CUDA error",
    "CUDA driver error",
    "illegal memory access",
    "device-side assert",
    "unspecified launch failure",
)


class Recorder:
    """pytest plugin of a worker: runs these tests only; a line of JSON as each begins and as it ends."""

    def __init__(self, path: Path, tests: list[str]):
        self.path, self.tests = path, set(tests)

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if item.nodeid in self.tests]

    def write(self, **line) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")

    def pytest_runtest_logstart(self, nodeid, location):
        self.write(test=nodeid, outcome="begun")

    def pytest_runtest_logreport(self, report):
        text = "" if report.passed else str(report.longrepr)
        if report.when == "call" or not report.passed:
            self.write(
                test=report.nodeid,
                outcome=report.outcome,
                seconds=report.duration,
                text=text[-4000:],
                figures=[value for name, value in report.user_properties if name == "within"],
            )
        if any(sign in text for sign in POISONED):
            os._exit(70)  # nothing that this process says of the GPU can be believed any more


def worker(arguments: list[str]) -> None:
    """In a process of its own: LOG, a file that lists the tests to run, and the paths where they are."""
    import pytest

    interpreter.mend()
    log, tests, *paths = arguments
    recorder = Recorder(Path(log), Path(tests).read_text("utf-8").splitlines())
    pytest.main([*PYTEST, "-m", "cuda", *paths], plugins=[recorder])


@dataclass
class Worker:
    """A share of the tests, and the process that runs what is left of it."""

    log: Path
    tests: list[str]
    paths: list[str]
    results: dict[str, dict] = field(default_factory=dict)
    process: subprocess.Popen | None = None
    begun: str = ""  # the test that runs, or ran when its time was over

    def start(self) -> None:
        left = [test for test in self.tests if test not in self.results]
        listed = self.log.with_suffix(".txt")
        listed.write_text("\n".join(left))
        command = [sys.executable, "-m", "gpu_stages.suite", str(self.log), str(listed), *self.paths]
        with open(self.log.with_suffix(".log"), "a") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT
            )

    def read(self) -> None:
        """Take up what the log says; a test that began and never ended crashed its process."""
        begun = ""
        for line in records(self.log):
            if line["outcome"] == "begun":
                begun = line["test"]
                continue
            kept = self.results.get(line["test"], {})
            if kept.get("outcome") != "failed":  # a failed call is not forgotten for its teardown
                self.results[line["test"]] = line
        self.begun = "" if begun in self.results else begun
        if self.begun and self.process and self.process.poll() is not None:
            self.fail(begun)

    def fail(self, test: str) -> None:
        output = self.log.with_suffix(".log").read_text("utf-8", errors="replace")[-3000:]
        code = self.process.returncode if self.process else None
        text = f"E the process ended with exit code {code}: {output.strip().splitlines()[-1:]}\n{output}"
        self.results[test] = {"test": test, "outcome": "failed", "seconds": 0.0, "text": text, "figures": []}

    @property
    def left(self) -> list[str]:
        return [test for test in self.tests if test not in self.results]


def environment() -> dict[str, str]:
    """Tests without installation; one thread each, since they run side by side."""
    paths = [str(ROOT / "benchmarks"), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


def collect(paths: list[str]) -> list[str]:
    command = [sys.executable, "-m", "pytest", *PYTEST, "--collect-only", "-m", "cuda", *paths]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    if not tests or done.returncode:
        raise RuntimeError(f"pytest collected nothing in {paths}: {(done.stdout + done.stderr)[-600:]}")
    return tests


def shared_out(tests: list[str], workers: int) -> list[list[str]]:
    """A share for each worker. Tests of the same parameters, but for a number at their end, compile the same kernels:
    one process does them all, the others that are left go where least is."""
    alike: dict[str, list[str]] = defaultdict(list)
    for test in tests:
        found = re.search(r"\[([^\]]*?)(-\d+)?\]$", test)
        alike[found[1] if found else test].append(test)
    shares: list[list[str]] = [[] for _ in range(min(workers, len(alike)))]
    for group in sorted(alike.values(), key=len, reverse=True):
        min(shares, key=len).extend(group)
    return shares


def run_tests(stage: Stage, paths: list[str], *, workers: int, seconds: float) -> None:
    """Run the `cuda` tests of `paths` for at most `seconds`; a row for each test function, and for each failure."""
    end = time.monotonic() + seconds
    tests = collect(paths)
    share = shared_out(tests, workers)
    team = [Worker(stage.out / f"{stage.name}-{i}.tests.jsonl", part, paths) for i, part in enumerate(share)]
    for one in team:
        one.start()
    busy = list(team)
    while busy and time.monotonic() < end:
        time.sleep(0.1)
        for one in list(busy):
            if one.process and one.process.poll() is None:
                continue
            before = len(one.left)
            one.read()
            if one.left and len(one.left) == before:  # it ended before its first test: so would the next
                one.fail(one.left[0])
            elif one.left:
                one.start()
                continue
            busy.remove(one)
    for one in busy:
        if one.process:
            one.process.kill()
            one.process.wait()
    results: dict[str, dict] = {}
    for one in team:
        one.process = None
        one.read()
        results |= one.results
    told(stage, tests, results)
    if begun := [one.begun.split("::test_")[-1] for one in team if one.begun]:
        stage.not_run("  begun when the time was over", "; ".join(begun)[:300])


def told(stage: Stage, tests: list[str], results: dict[str, dict]) -> None:
    """Rows: test functions with how many passed and the figure nearest to its tolerance; every failure. One row a file
    for all that passed and told no figure."""
    plain: dict[str, list[float]] = defaultdict(list)
    functions: dict[str, list[str]] = defaultdict(list)
    for test in tests:
        functions[test.split("[")[0]].append(test)
    for function, cases in functions.items():
        found = [results[test] for test in cases if test in results]
        passed = [r for r in found if r["outcome"] == "passed"]
        failed = [r for r in found if r["outcome"] == "failed"]
        skipped = len(found) - len(passed) - len(failed)
        figures = [figure for r in found for figure in r["figures"]]
        worst = max(figures, key=lambda f: f["error"] / max(f["tolerance"], 1e-300), default=None)
        note = f"worst {worst['error']:.1e} of {worst['tolerance']:.0e}: {worst['what']}" if worst else ""
        if skipped:
            note = f"{skipped} skipped; {note}"
        name = function.split("::test_")[-1].replace("_", " ")
        if len(passed) == len(cases) and not worst:
            plain[Path(function.split("::")[0]).stem] += [r["seconds"] for r in passed]
            continue
        if lost := len(cases) - len(found):
            note = f"{lost} not run; {note}"
        row = {"figure": f"{len(passed)}/{len(cases)}", "seconds": sum(r["seconds"] for r in found)}
        if failed or passed and not lost:
            stage.row(name, ok=not failed, note=note, **row)
        else:
            stage.not_run(name, note, **row)
        for r in failed:
            lines = [text for text in r["text"].splitlines() if text.startswith("E ")] or r["text"].splitlines()
            why = lines[0][:160] if lines else "no reason given"
            stage.row("  " + r["test"].split("::test_")[-1][-50:], ok=False, note=why, text=r["text"])
    for file, seconds in plain.items():
        stage.row(f"more of {file}", f"{len(seconds)}/{len(seconds)}", ok=True, seconds=sum(seconds))


if __name__ == "__main__":
    worker(sys.argv[1:])
