"""The pull-in example: one script, three ways to run it, one curve."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

SCRIPT = str(Path(__file__).parents[1] / "examples" / "train_gpt2.py")
TWO_RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def losses(command) -> list[float]:
    run = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert run.returncode == 0, run.stderr
    return [float(loss) for loss in re.findall(r"^step \d+ loss (\S+)$", run.stdout, re.MULTILINE)]


@pytest.fixture(scope="module")
def alone():
    return losses([sys.executable, SCRIPT])


def test_gpt2_of_transformers_learns(alone):
    assert len(alone) == 20 and alone[-1] < alone[0] - 1.0


@pytest.mark.parametrize("flags", [[], ["--fsdp"]], ids=["ddp", "fsdp2"])
def test_two_ranks_print_the_losses_of_one(alone, flags):
    """2e-6 of 5: losses have six decimals, and sums over ranks are in another order; measured 1e-6."""
    assert losses([*TWO_RANKS, SCRIPT, *flags]) == pytest.approx(alone, rel=0, abs=1e-5)
