"""Muon beside torch.optim.Muon and fused AdamW on the matrices of whole models, by benchmarks/optimizer_step.py.

checks    tests/optim/test_device.py: the steps of fp64, no wait for the device, whole steps in CUDA graphs
ms        median of a step between CUDA events, in interleaved rounds; ratios to torch.optim.Muon in the same rounds
ceiling   nominal flops, 5 (4 m² n + 2 m³) for every m x n matrix, a second, over those of a large bf16 product
peak      what torch had allocated beyond the state, at most
e         ‖X Xᵀ − I‖_F / √m of the first update, 256 x 1024: Gaussian / 1/k spectrum
busy      of one step, by the profiler: kernels, their time, that of products among them
"""

import contextlib
import gc
import time
from collections import defaultdict
from types import SimpleNamespace

import optimizer_step as bench
import torch

from muonlm.optim import Muon
from muonlm.optim.muon import fused

from .report import Stage
from .suite import run_tests

MAIN = ("torch", "adamw-fused", "ours", "ours-polar_express4")
FORMS = ("ours-normuon", "ours-hybrid-bf16", "ours-gram-fp16")
TRIED = ("captured", "without-kernels")
PRODUCTS = ("gemm", "nvjet", "cutlass", "symmetric")  # in the names of kernels
TARGET = 0.35  # of torch.optim.Muon, GPT-2 124M


def run(stage: Stage) -> None:
    bench.ARMS |= arms()
    workers, tests = 2 if stage.rehearse else 6, ["tests/optim/test_device.py"]
    if stage.checks:
        seconds = stage.left() - 20 if stage.rehearse or not stage.figures else 35.0
        stage.part("checks", lambda: run_tests(stage, tests, workers=workers, seconds=seconds))
    if not stage.figures:
        return
    errors = stage.part("e", lambda: spectra(stage))
    sets = bench.SMOKE if stage.rehearse else bench.SETS
    first, *others = ("smoke-gpt", "smoke-mamba") if stage.rehearse else ("c", "d", "e")
    stage.part(sets[first].title, lambda: compare(stage, first, sets[first], errors or {}), seconds=5)
    stage.part("busy", lambda: busy(stage, sets[first]), seconds=2)
    for key in others:
        stage.part(sets[key].title, lambda: summary(stage, key, sets[key]), seconds=3)


# ------------------------------------------------------------------------------------------------ arms


def arms() -> dict[str, bench.Arm]:
    return {
        "ours-normuon": bench.our(variant="normuon"),
        "ours-hybrid-bf16": bench.our(ns_method="hybrid", ns_dtype="bfloat16"),
        "ours-gram-fp16": bench.our(ns_method="gram", ns_dtype="float16"),
        "captured": bench.Arm(built(Captured), "", splits=True),
        "without-kernels": bench.Arm(built(Plain), "", splits=True),
    }


def built(kind: type, **options) -> bench.Build:
    return lambda params, splits, lr, wd: kind(
        [{"params": params, "splits": splits, "use_muon": True, "name": "matrices"}], lr, wd, **options
    )


class Captured(Muon):
    """Eager steps first, then one CUDA graph; gradients stay in their memory here."""

    def __init__(self, groups, lr, wd):
        super().__init__(groups, lr=lr, weight_decay=wd)
        self.taken, self.graph = 0, None

    def step(self, closure=None):
        self.taken += 1
        if self.graph is None and self.taken > 2 and self.param_groups[0]["params"][0].is_cuda:
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            gc.collect()  # what is freed during a capture, by chance, may end it
            with torch.cuda.graph(self.graph):
                super().step()
        if self.graph is None:
            super().step()
        else:
            self.graph.replay()


class Plain(Muon):
    """torch's own functions alone."""

    def __init__(self, groups, lr, wd):
        super().__init__(groups, lr=lr, weight_decay=wd)

    def step(self, closure=None):
        works, fused.works = fused.works, lambda device: False
        try:
            super().step()
        finally:
            fused.works = works


# ------------------------------------------------------------------------------------------------ figures


def spectra(stage: Stage) -> dict[str, str]:
    """e of every arm as "Gaussian/1/k"; an arm that fails says so when it is timed."""
    sizes = [(32, 64)] if stage.rehearse else [(256, 1024)]
    given, found = bench.problems(stage.device, sizes), {}
    for name in (*MAIN, *FORMS):
        if bench.ARMS[name].matrix:
            with contextlib.suppress(Exception):
                errors = bench.spectrum(bench.ARMS[name], given)
                found[name] = "/".join(f"{value['e']:.3f}" for value in errors.values())
    return found


def measured(stage: Stage, key: str, spec: bench.Set, names: tuple[str, ...], rounds: int, seconds: float) -> dict:
    """{arm: its row}; a FAILED row for each arm that failed."""
    args = SimpleNamespace(repeats=3 if stage.rehearse else rounds, budget=seconds)
    rows, skipped = bench.measure(key, spec, list(names), True, args, stage.device)
    for name, why in skipped.items():
        stage.row(f"{spec.title}: {name}", ok=False, note=why)
    return {row["arm"]: row for row in rows}


def compare(stage: Stage, key: str, spec: bench.Set, errors: dict[str, str]) -> None:
    """Every arm on the set whose ratio has a target."""
    found = measured(stage, key, spec, (*MAIN, *FORMS, *TRIED), 20, 8.0)
    ratio = found["ours"]["over_torch"]
    stage.row(f"{spec.title}: Muon over torch.optim.Muon", ratio, "x", target=TARGET, **found["ours"])
    for name in (*MAIN, *FORMS):
        if row := found.get(name):
            stage.row(f"{spec.title}: {name}", row["ms"], "ms", note=told(stage, row, errors.get(name, "")), **row)
    tried = {name: found[name] for name in TRIED if name in found}
    note = ", ".join(f"{name} {row['ms']:.2f}" for name, row in tried.items())
    stage.row(f"{spec.title}: tried, ms", None, note=note, tried=tried)


def summary(stage: Stage, key: str, spec: bench.Set) -> None:
    """One line for the set."""
    found = measured(stage, key, spec, (*MAIN, "without-kernels"), 6 if key == "e" else 15, 4.0)
    others = ", ".join(f"{name} {row['ms']:.2f} ms" for name, row in found.items() if name != "ours")
    note = f"{told(stage, found['ours'], '')}; {others}"
    stage.row(f"{spec.title}: Muon", found["ours"]["ms"], "ms", note=note, arms=found)


def told(stage: Stage, row: dict, error: str) -> str:
    parts = [f"{row['over_torch']:.2f}x torch", f"{row['over_adamw']:.1f}x AdamW"]
    if row["gflops_nominal"] and stage.ceilings.get("bf16_flops"):
        parts.append(f"{1e9 * row['gflops_nominal'] / stage.ceilings['bf16_flops']:.0%} of the bf16 ceiling")
    parts.append(f"+{row['peak_temporary_bytes'] / 2**20:.0f} MiB")
    if error:
        parts.append(f"e {error}")
    return ", ".join([*parts, *sorted(set(row["chosen"].values()))])


def busy(stage: Stage, spec: bench.Set) -> None:
    """Kernels of one step of ours and of torch's, and where their time goes; every kernel is in the JSON."""
    if stage.device.type != "cuda":
        stage.not_run("busy", "the profiler of a rehearsal sees no device")
        return
    workload, parts, listed = bench.Workload(spec.matrices, stage.device), [], {}
    for name in ("ours", "torch"):
        arm = bench.ARMS[name]
        optimizer = workload.build(arm)
        for step in range(3):
            workload.load(step, arm.splits)
            optimizer.step()
        torch.cuda.synchronize()
        began = time.perf_counter()
        optimizer.step()
        host = 1e3 * (time.perf_counter() - began)
        kernels = profiled(optimizer.step)
        total, products = (
            sum(sum(ms) for kernel, ms in kernels.items() if not only or any(p in kernel.lower() for p in PRODUCTS))
            for only in (False, True)
        )
        count = sum(map(len, kernels.values()))
        parts.append(f"{name} {count}: busy {total:.2f} ms, products {products:.2f}, host {host:.2f}")
        by_time = sorted(kernels.items(), key=lambda item: -sum(item[1]))
        listed[name] = [f"{sum(ms):8.3f} ms {len(ms):5} x {kernel[:150]}" for kernel, ms in by_time]
    stage.row(f"{spec.title}: kernels of a step", None, note="; ".join(parts), kernels=listed)


def profiled(work) -> dict[str, list[float]]:
    """{kernel: milliseconds of each launch} of work() on the GPU."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name].append(event.device_time / 1e3)
    return kernels
