"""Out of memory: a real allocation fails, in a process of its own, and what the run says of it."""

import os
import subprocess
import sys

import pytest
import torch

from muonlm.config.recipes import load_recipe
from muonlm.errors import out_of_memory
from muonlm.training import memory

CHILD = """
import os, sys
import torch
from muonlm.cli.main import main
from muonlm.training import loop, setup

device, phase, *argv = sys.argv[1:]

def leave(mib):
    if device == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + mib * 2**20) / total)
    else:
        import ctypes, resource
        ctypes.CDLL(None).malloc_trim(0)
        used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + mib * 2**20, -1))

def limited(function):
    def call(*args, **kwargs):
        leave(8)
        return function(*args, **kwargs)
    return call

if phase == "step":
    loop.backward = limited(loop.backward)
elif phase == "evaluation":
    loop.evaluate = limited(loop.evaluate)
else:
    make = setup.make_optimizer
    def limited_optimizer(*args, **kwargs):
        optimizer = make(*args, **kwargs)
        optimizer.step = limited(optimizer.step)
        return optimizer
    setup.make_optimizer = limited_optimizer
sys.exit(main(argv))
"""
PHASES = {  # settings; what is said to have been tried, what to type
    "step": (
        {"train.global_batch": 128 * 64},
        ["forward and backward of 128 rows × 64 tokens", "Try --train.micro_batch 64 (", "No checkpoint was written"],
    ),
    "evaluation": (
        {"train.global_batch": 256, "eval.rows": 128},
        [
            "the held-out loss of 128 rows × 64 tokens",
            "Try --eval.rows 64 (",
            "The last checkpoint is",
            "--eval.rows 64.",
        ],
    ),
    "optimizer": (
        {"train.global_batch": 64, "model.d_model": 1024},
        ["the weights, and what the optimizer keeps of them,", "Try a shorter block (--model.block_size 32)"],
    ),
}


def fails(phase: str, device: torch.device, text, folder) -> None:
    settings, said = PHASES[phase]
    settings = {
        "train.device": device.type,
        "model.d_model": 256,
        "data.source": text,
        "out": folder / phase,
    } | settings
    settings |= {"train.steps": 2, "train.save_every": 1, "eval.every": 0, "eval.sample": 0, "data.val": "tail:0.5"}
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, device.type, phase, "train", "quickstart", "--smoke", *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert done.stderr.startswith("muonlm: out of memory: ") and "GiB" in done.stderr
    for words in said:
        assert words in done.stderr, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of a process's memory is read in /proc")
@pytest.mark.parametrize("phase", PHASES)
def test_a_run_that_does_not_fit_on_a_cpu_says_what_to_try(text, tmp_path, phase):
    fails(phase, torch.device("cpu"), text, tmp_path)


@pytest.mark.cuda
@pytest.mark.parametrize("phase", PHASES)
def test_a_run_that_does_not_fit_on_the_device_says_what_to_try(device, text, tmp_path, phase):
    fails(phase, device, text, tmp_path)


def test_a_single_row_is_recomputed_then_cut_then_the_model_shrinks(tmp_path):
    row = {"train.micro_batch": 1, "model.block_size": 96}
    first = memory.step(load_recipe("quickstart", row))
    assert first.flag == "--train.recompute true" and "--model.block_size 48" in first.more
    last = memory.step(load_recipe("quickstart", row | {"train.recompute": True}))
    assert last.flag == "" and last.more.endswith("a smaller model (--model.n_layer 1)")
    flat = memory.step(load_recipe("quickstart", row | {"train.recompute": True, "model.n_layer": 1}))
    assert flat.more.endswith("a smaller model (--model.d_model 128)")


def test_only_what_lacked_memory_is_told_as_such(tmp_path):
    work = memory.weights(load_recipe("quickstart"))
    with pytest.raises(RuntimeError, match="^something else$"), memory.told(torch.device("cpu"), tmp_path, work):
        raise RuntimeError("something else")
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and out_of_memory(MemoryError())
