"""Times and memory of a piece of work on the device, or on the CPU in a rehearsal."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Times:
    """Milliseconds of n calls."""

    median: float
    p10: float
    p90: float
    n: int


def summary(ms: list[float]) -> Times:
    deciles = statistics.quantiles(ms, n=10, method="inclusive") if len(ms) > 1 else 9 * ms
    return Times(statistics.median(ms), deciles[0], deciles[8], len(ms))


def one_call(work: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of work(), its launches included."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)
    began = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - began)


def median_ms(work: Callable[[], object], device: torch.device, *, seconds: float = 0.3, warmup: int = 2) -> Times:
    """Call work() for about `seconds`, at least three times after `warmup` calls, each between CUDA events."""
    for _ in range(warmup):
        work()
    ms: list[float] = []
    began = time.monotonic()
    while len(ms) < 3 or time.monotonic() - began < seconds and len(ms) < 1000:
        ms.append(one_call(work, device))
    return summary(ms)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most that torch had allocated during work() above what it had before; 0 on a CPU, where it does not count."""
    if device.type != "cuda":
        work()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def graph_ms(work: Callable[[], object], calls: int) -> float:
    """Milliseconds a call of `calls` in a CUDA graph: a launch takes the host longer than some kernels take."""
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            work()
    graph.replay()
    return one_call(graph.replay, torch.device("cuda")) / calls
