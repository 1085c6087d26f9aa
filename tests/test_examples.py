"""The examples run as they are printed: GPT-2 pulled in, three ways with one curve, and the road's three stages."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from muonlm.cli.main import main

pytest.importorskip("transformers")

ROAD = Path(__file__).parents[1] / "examples" / "road.sh"
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


def test_the_road_runs_its_three_stages_and_prints_an_exam_after_each(tmp_path):
    out = tmp_path / "road"
    data = ["prep", "word_problems:300:1-2", "--tokenizer", "bpe:400:digits", "--val", "hash:0.1"]
    assert main([*data, "--to", str(out / "data")]) == 0  # the script finds its text prepared, and less of it
    flags = ["--smoke", "--data.val", "hash:0.05", "--train.steps", "3", "--eval.iters", "1", "--eval.sample", "4"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command, env = ["bash", str(ROAD), "adamw", "3", str(out), *flags], os.environ | {"PATH": path, "EXAM": "12"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=400, env=env)
    assert run.returncode == 0, run.stderr
    exams = re.findall(r"(\w+) \(step-\d+\): word_problems \((train|held_out)\) exact", run.stdout)
    once = [(stage, split) for stage in ("pretrain", "sft", "dpo") for split in ("train", "held_out")]
    assert exams == once * 2
    assert "starts from" in run.stdout and "reference: log-probabilities" in run.stdout
