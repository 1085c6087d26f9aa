"""Training on the device: the tests marked `cuda` of the loop, of generation and of the verbs are the checks."""

import os

from .report import Stage
from .suite import run_tests

TESTS = [
    "tests/training/test_device.py",
    "tests/training/test_memory.py",
    "tests/test_engine.py",
    "tests/cli/test_on_a_device.py",
    "tests/export/test_hf.py",
]


def run(stage: Stage) -> None:
    if not stage.checks:
        return
    workers = max(2, (os.cpu_count() or 2) - 2)
    run_tests(stage, TESTS, workers=2 if stage.rehearse else workers, seconds=stage.left() - 5)
