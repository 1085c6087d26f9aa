"""The loop on a GPU against the loop on the CPU, and what a run there owes: repetition, other devices, memory.

Rehearsed at toy size, the device is the CPU and the comparisons are of a run with itself.
"""

import dataclasses
import functools
import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.distributed
from safetensors.torch import load_file
from torch import Tensor

from muonlm.cli.main import main
from muonlm.optim.muon.distributed import Owners
from muonlm.training import parallel
from muonlm.training.loop import backward, loop, train
from muonlm.training.setup import setup

pytestmark = pytest.mark.cuda

FEW = os.environ.get("MUONLM_REHEARSE") == "1"  # a rehearsal tries the code of the tests, not all that they test
# Relative, of fp32. Sums in another order and functions rounded otherwise are noise of 1e-7 in every number. A CPU run
# with noise of 1e-7 on all weights, other micro-batches and other chunks differs from the one without, over all cases,
# by at most 1.3e-7 in the first loss, 1.4e-6 in a gradient, 2.2e-6 in a loss of 20 steps, to which Newton-Schulz and
# the steps amplify it. An H200 differs by no more (7e-8, 7e-7, 1.4e-6); ten times that is allowed.
FIRST, GRADIENT, LATER = 1e-6, 1e-5, 2e-5


def on_cpu(cfg):
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, device="cpu"))


def metrics(run) -> list[dict]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def losses(run) -> list[float]:
    return [line["loss"] for line in metrics(run) if "loss" in line]


def far(a: list[float], b: list[float]) -> float:
    """Largest relative difference."""
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


def plant(model) -> None:
    """A fault that the tests must see, with MUONLM_PLANT: a gradient with NaN in it, or 1 % too long; an exception."""
    fault = os.environ.get("MUONLM_PLANT", "")
    if fault == "exception":
        raise RuntimeError("a planted exception")
    if factor := {"nan": math.nan, "gradient": 1.01}.get(fault):
        next(model.parameters()).register_hook(lambda gradient: gradient * factor)


def traced(cfg, out, fault=lambda model: None) -> dict:
    """A run with the weights that it began with, and loss and gradients of its first step."""
    with parallel.start(cfg.train.device) as dist:
        job = setup(cfg, out, dist, resume=False, json_mode=True)
        weights = {name: p.detach().cpu().clone() for name, p in job.model.named_parameters()}
        fault(job.model)
        job.net.train()
        batch = job.data.train.batch(0)
        sums = backward(job, batch, scale=1 / batch.count)
        gradients = {name: p.grad.cpu().clone() for name, p in job.model.named_parameters() if p.grad is not None}
        for layer in job.watch.layers:
            layer.max_logit = None
        job.optimizer.zero_grad()
        loop(job)
    found = {"weights": weights, "gradients": gradients, "first": float(sums["loss"]) / batch.count}
    return found | {"losses": losses(out), "val": [line["val_loss"] for line in metrics(out) if "val_loss" in line]}


@pytest.fixture
def group(device):
    """A process group of this process alone."""
    there = torch.device("cuda:0" if device.type == "cuda" else "cpu")
    named = {"backend": "nccl", "device_id": there} if device.type == "cuda" else {"backend": "gloo"}
    torch.distributed.init_process_group(store=torch.distributed.HashStore(), rank=0, world_size=1, **named)
    yield parallel.Dist(0, 1, there, grouped=True)
    torch.distributed.destroy_process_group()


def test_one_rank_with_all_collectives_trains_as_without(config, group, tmp_path, monkeypatch, within):
    """DDP, Muon with owners, sums, broadcasts, barriers and the gathered state, over NCCL on a GPU.

    What one rank sums and gathers are its own numbers; DDP's buckets do not change them.
    """
    monkeypatch.setattr(Owners, "of", classmethod(lambda cls, named, grads: cls(torch.distributed.group.WORLD, grads)))
    cfg = config("hybrid", **{"train.micro_batch": 1})
    job = setup(cfg, tmp_path / "group", group, resume=False, json_mode=True)
    assert isinstance(job.net, torch.nn.parallel.DistributedDataParallel) and job.optimizer.replicas
    loop(job)
    monkeypatch.undo()
    del job
    train(cfg, tmp_path / "alone", json_mode=True)
    within("losses", far(losses(tmp_path / "group"), losses(tmp_path / "alone")), 1e-6)
    mine, theirs = (
        load_file(tmp_path / f"{run}/checkpoints/step-{cfg.train.steps:08}/state.safetensors")
        for run in ("group", "alone")
    )
    assert mine.keys() == theirs.keys()


@pytest.mark.parametrize("name", ["attention", "mamba"][: 1 if FEW else None])
def test_a_compiled_model_trains_to_the_same_losses_on_the_device(config, device, tmp_path, monkeypatch, within, name):
    """Fused kernels round differently. Rehearsed without making them, which takes a CPU a minute."""
    if device.type == "cpu":
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    flags = {"train.steps": 5, "model.n_layer": 1, "eval.rows": 2, "train.global_batch": 320, "model.block_size": 160}
    eager, compiled = (config(name, **flags, **{"train.compile": compile}) for compile in (False, True))
    train(eager, tmp_path / "eager", json_mode=True)
    torch._dynamo.utils.counters.clear()
    train(compiled, tmp_path / "compiled", json_mode=True)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0, "nothing was compiled"
    within("losses", far(losses(tmp_path / "compiled"), losses(tmp_path / "eager")), LATER)


@pytest.mark.parametrize(
    "name", ["sft", "hybrid", "attention", "window_attention", "muon_gated_deltanet"][: 2 if FEW else None]
)
def test_recomputed_blocks_change_no_bit_on_the_device(config, tmp_path, name):
    """The same operations on the same numbers, twice."""
    for recompute in (False, True):
        flags = {"train.recompute": recompute, "train.dtype": "bfloat16", "train.steps": 4}
        train(config(name, **flags), tmp_path / str(recompute), json_mode=True)
    assert losses(tmp_path / "True") == losses(tmp_path / "False")


def test_a_run_in_bf16_learns_and_a_resumed_one_repeats_it_to_the_bit(config, tmp_path, cut_back, case):
    """Settings as a user has them (Newton-Schulz's choice is timed once and kept), but for the dtype's name."""
    flags = {"train.dtype": "bfloat16", "muon.ns_dtype": "auto", "muon.ns_method": "auto", "train.keep": 2}
    if case in ("learned positions", "qk_clip"):  # drawn from the step's number; a GPU draws others than a CPU
        flags["model.dropout"] = 0.2
    cfg = config(case, **flags)
    half = cfg.train.steps // 2
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, save_every=half))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(cfg, whole, json_mode=True)
    found = losses(whole)
    assert all(map(math.isfinite, found)) and sum(found[-2:]) < sum(found[:2]), found
    cut_back(whole, cut, half)
    assert main(["train", "--resume", str(cut), "--json"]) == 0
    assert losses(cut) == found, "losses of the resumed run differ"
    for file in ("model", "state"):
        mine, theirs = (load_file(run / f"checkpoints/step-{2 * half:08}/{file}.safetensors") for run in (cut, whole))
        assert mine.keys() == theirs.keys()
        assert not [key for key in theirs if not torch.equal(mine[key], theirs[key])]


@pytest.mark.parametrize("name", ["hybrid", "muon_gated_deltanet", "sft"][: 1 if FEW else None])
@pytest.mark.parametrize("way", ["to the device", "to the cpu"])
def test_a_checkpoint_of_one_device_goes_on_on_the_other(config, device, tmp_path, cut_back, within, name, way):
    """As in the comparison of whole runs: the second half is on the other device."""
    first, second = ("cpu", str(device)) if way == "to the device" else (str(device), "cpu")
    cfg = config(name)
    half = cfg.train.steps // 2
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, device=first, save_every=half))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(cfg, whole, json_mode=True)
    cut_back(whole, cut, half)
    assert main(["train", "--resume", str(cut), "--train.device", second, "--json"]) == 0
    within("losses after the move", far(losses(cut), losses(whole)), LATER)


def test_the_device_trains_as_the_cpu_does(config, tmp_path, monkeypatch, within, case):
    """20 steps of Muon in fp32, at the tolerances above."""
    cfg, found = config(case), {}
    for where, run, fault in (("device", cfg, [plant] if case == "hybrid" else []), ("cpu", on_cpu(cfg), [])):
        monkeypatch.setenv("MUONLM_CACHE", str(tmp_path / where / "cache"))  # DPO's reference is computed on each
        found[where] = traced(run, tmp_path / where / "run", *fault)
    mine, theirs = found["device"], found["cpu"]
    assert mine["weights"].keys() == theirs["weights"].keys()
    assert all(torch.equal(mine["weights"][n], w) for n, w in theirs["weights"].items()), "other weights at step 0"
    within("loss of step 1", far([mine["first"]], [theirs["first"]]), FIRST)
    whole = norm(theirs["gradients"])
    assert mine["gradients"].keys() == theirs["gradients"].keys() and whole > 0
    for key, g in theirs["gradients"].items():
        error = norm({key: mine["gradients"][key] - g}) / max(norm({key: g}), 1e-2 * whole)
        within(f"gradient of {key}", error, GRADIENT)
    within("losses of all steps", far(mine["losses"], theirs["losses"]), LATER)
    within("held-out loss after them", far(mine["val"], theirs["val"]), LATER)
