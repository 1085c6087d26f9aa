"""The real training step of six recipes at their own sizes: tokens/s, MFU, memory, where the time goes.

Each recipe is a process of its own that holds a Setup and runs `training.loop.loop` on synthetic tokens; the loop is
stopped after some steps by its data. All start and compile side by side, which takes a minute; then they are measured
one after another: none shares the device while another is timed.

    step        the recipe's own model, block, micro-batch and optimizer. A global batch of more than MICRO_BATCHES
                micro-batches is cut to them; "n of N × r rows" says so. The optimizer's share is then larger than in
                training: own_mfu and own_tokens_per_s in the JSON are computed for the whole batch
    parts       forward, backward (with the casts of weights and the sums of gradients), optimizer with its watch, data
                (what of batch assembly the device waits for), rest (clipping, copies, the loop): between events on the
                device's timeline, so they add up to the step
    MFU         train_flops_per_token · tokens/s over the card's dense bf16 peak; `of ceiling`: over the product that
                stage `ceilings` measured
    busy        share of a step in which kernels run, and the kernels that take most of it, by torch.profiler
    largest     the micro-batch that memory allows: predicted from the peaks of two sizes, then tried
MUONLM_CASES=keller/gpt,minimind measures these alone, in less time.
Planted    MUONLM_PLANT=exception raises in the process of one recipe, nan spoils a weight of another: FAILED rows
"""

import contextlib
import dataclasses
import gc
import math
import multiprocessing
import os
import sys
import time
import traceback
from collections import defaultdict
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

from muonlm.config.recipes import load_recipe
from muonlm.config.schema import Config
from muonlm.data.text.tokenizer import Tokenizer, expected_size
from muonlm.model import train_flops_per_token
from muonlm.training import parallel
from muonlm.training.loop import loop
from muonlm.training.resolve import rows_per_step
from muonlm.training.setup import Setup, setup

from .report import Stage, reason
from .timing import median_ms

CASES = {  # name in the table: recipe, what is changed of it
    "keller/gpt": ("keller/gpt", {}),
    "keller/gpt 32 rows": ("keller/gpt", {"train.micro_batch": 32}),
    "minimind": ("minimind/pretrain", {}),
    "muonlonghorn-97m": ("muonssm/muonlonghorn-97m", {}),
    "mamba_slm": ("mamba_slm/pretrain", {}),
    "gdn-170m": ("muonssm/gdn-170m", {}),
    "hybrid-small-std": ("mamba_trainer/hybrid-small-standard", {}),
}
VARIANTS = ("keller/gpt 32 rows",)  # of which no largest micro-batch is sought
MICRO_BATCHES = 8  # of a measured step, at most
TARGETS = {"keller/gpt": 50.0, "keller/gpt 32 rows": 50.0}  # % MFU, compiled
TOKENS = 1 << 22  # synthetic ones
KERNELS = 15  # in the JSON
PARTS = ("forward", "backward", "optimizer", "data", "rest")
REHEARSED = ("keller/gpt", "muonlonghorn-97m")  # compiled in a rehearsal
FAULTY = {"exception": "minimind", "nan": "mamba_slm"}  # planted fault: the recipe that shall show it


def run(stage: Stage) -> None:
    """Figures of all compiled, then eager ones, then the largest micro-batches, as time allows."""
    benches = {name: Process(name, stage) for name in chosen(stage)}
    try:
        prepare(stage, benches)
        stage.part("attention of keller/gpt", partial(attention, stage))
        for name, bench in alive(benches):
            if bench.compiled:
                stage.part(f"{name} compiled", partial(tell, stage, bench, name, "compiled"), seconds=5)
        for name, bench in alive(benches):
            stage.part(f"{name} eager", partial(tell, stage, bench, name, "eager"), seconds=5)
        for name, bench in alive(benches):
            wanted = name in REHEARSED if stage.rehearse else name not in VARIANTS
            bench.ask("park") if wanted else bench.end()
        for name, bench in alive(benches):
            stage.part(f"{name}: park", partial(bench.answer, stage))
        for name, bench in alive(benches):
            stage.part(f"{name} largest micro-batch", partial(tell_largest, stage, bench, name), seconds=6)
            bench.end()
    finally:
        for bench in benches.values():
            bench.end()


def chosen(stage: Stage) -> list[str]:
    names = os.environ.get("MUONLM_CASES", "").split(",")
    if unknown := set(names) - {"", *CASES}:
        raise ValueError(f"MUONLM_CASES: {', '.join(sorted(unknown))} is none of {', '.join(CASES)}")
    return [name for name in CASES if names == [""] or name in names if not (stage.rehearse and name in VARIANTS)]


def alive(benches: dict[str, "Process"]) -> list[tuple[str, "Process"]]:
    return [(name, bench) for name, bench in benches.items() if bench.process.is_alive()]


def prepare(stage: Stage, benches: dict[str, "Process"]) -> None:
    """Start and compile all side by side. Nothing is timed before the last is ready: who is late is ended."""
    until = time.monotonic() + min(120.0, 0.65 * stage.left())
    for name, bench in benches.items():
        if not stage.part(f"{name}: start", partial(bench.answer, stage, until)):
            bench.end()
        elif name in REHEARSED or not stage.rehearse:
            bench.ask("compile")
            bench.compiled = True
    if stage.rehearse:
        stage.not_run("compiled: the other recipes", "a rehearsal makes the graphs of two, without kernels")
    took = {}
    for name, bench in alive(benches):
        if bench.compiled:
            took[name] = stage.part(f"{name}: compile", partial(bench.answer, stage, until))
            bench.compiled = took[name] is not None
    note = ", ".join(f"{name} {seconds:.0f}" for name, seconds in took.items() if seconds is not None)
    stage.row("compiling and a first step", max([t for t in took.values() if t], default=None), "s", note=note, **took)


def attention(stage: Stage) -> None:
    """What torch's attention kernels take for keller/gpt's shape, forward and backward."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    B, H, T, K = (2, 2, 64, 16) if stage.rehearse else (8, 12, 1024, 64)
    packed = torch.randn(B, T, 3 * H, K, device=stage.device, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(B, H, T, K, device=stage.device, dtype=torch.bfloat16)

    def both():
        q, k, v = (part.transpose(1, 2) for part in packed.chunk(3, 2))
        F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(dy)

    kernels = {"default": contextlib.nullcontext}
    if not stage.rehearse:
        choices = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
        kernels |= {name: partial(sdpa_kernel, backend) for name, backend in choices.items()}
    ms = {}
    for name, chosen in kernels.items():
        try:
            with chosen():
                ms[name] = median_ms(both, stage.device, seconds=0.1).median
        except RuntimeError as error:  # a kernel that is not for this card
            ms[name] = reason(error)
    note = ", ".join(f"{name} {t:.3f}" if isinstance(t, float) else f"{name}: {t}" for name, t in ms.items())
    stage.row(
        "attention of keller/gpt", ms["default"], "ms", note=f"{B} × {T}, {H} heads of {K}, both ways: {note}", **ms
    )


def tell(stage: Stage, bench: "Process", name: str, how: str) -> None:
    bench.ask("measure", how)
    found = bench.answer(stage) | {"how": how}
    found |= compared(stage, found["flops_per_s"])
    shares = " ".join(f"{part} {100 * found['shares'][part]:.0f}" for part in PARTS)
    step = f"{found['ms']:.1f} ms for {found['micro_batches']} of {found['own_micro_batches']} × {found['rows']} rows"
    note = f"{percent(found)}; {step}: {shares} %, busy {100 * found['busy']:.0f} %; {found['peak_gib']:.1f} GiB"
    stage.row(f"{name} {how}", found["tokens_per_s"], "tokens/s", note=note, **found)
    if how == "compiled" and name in TARGETS:
        stage.row(f"{name} MFU", 100 * found["mfu"], "%", target=TARGETS[name], better="higher", note="compiled")


def tell_largest(stage: Stage, bench: "Process", name: str) -> None:
    bench.ask("largest")
    found = bench.answer(stage)
    found |= compared(stage, found["flops_per_s"])
    rate = f"{found['tokens_per_s']:,.0f} tokens/s eager, {percent(found)}"
    note = f"{found['peak_gib']:.0f} of {found['limit_gib']:.0f} GiB; {rate}"
    stage.row(f"{name} largest micro-batch", found["rows"], "rows", note=note, **found)


def compared(stage: Stage, flops_per_s: float) -> dict[str, float]:
    """Fractions of the card's peak, and of what was measured on it."""
    peak = parallel.peak_flops(stage.device) or (float("inf") if stage.rehearse else float("nan"))  # an unknown card
    fractions = {"mfu": flops_per_s / peak}
    if stage.ceilings.get("bf16_flops"):
        fractions["of_ceiling"] = flops_per_s / stage.ceilings["bf16_flops"]
    return fractions


def percent(found: dict) -> str:
    ceiling = f" ({100 * found['of_ceiling']:.0f} % of the ceiling)" if "of_ceiling" in found else ""
    return f"MFU {100 * found['mfu']:.1f} %{ceiling}"


# ------------------------------------------------------------------------------------------- a recipe in its process


class Reported(Exception):
    """What the process of a recipe raised, in words."""


class Process:
    """A Bench in a process of its own, which answers one question after another. The first is whether it is ready."""

    def __init__(self, name: str, stage: Stage):
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        where = stage.out / "throughput" / name.replace("/", "-")
        rank = 2 * list(CASES).index(name)  # of the processes that compile side by side: the first cases come first
        self.process = spawn.Process(target=serve, args=(theirs, name, where, stage.rehearse, rank))
        self.process.start()
        theirs.close()
        self.compiled = False

    def ask(self, question: str, *args) -> None:
        with contextlib.suppress(OSError):  # it has died, as its answer will tell
            self.pipe.send((question, args))

    def answer(self, stage: Stage, until: float = math.inf):
        """Raises Reported with what was raised there or killed it; TimeoutError, and ends it, if it is late."""
        patience = max(0.0, min(stage.left() - 5, until - time.monotonic()))
        if not self.pipe.poll(patience):
            self.end()
            raise TimeoutError("no answer in the time that it has")
        try:
            good, found = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(5)
            raise Reported(f"its process has ended, exit code {self.process.exitcode}") from None
        if not good:
            raise Reported(found)
        return found

    def end(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()


def serve(pipe, name: str, where: Path, rehearse: bool, nice: int) -> None:
    """The process of a recipe."""
    os.nice(nice)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # of 16 cores, and six compile at once
    if rehearse:  # no C++ compiler is needed to see that the graphs can be made
        torch.compile = partial(torch.compile, backend="aot_eager")
        torch.set_num_threads(1)
    bench, found, question, args = None, None, "ready", ()
    with contextlib.ExitStack() as stack:
        while True:
            try:
                if bench is None:
                    bench = Bench(name, where, rehearse, stack)
                found = getattr(bench, question)(*args)
                pipe.send((True, found))
            except Exception as error:
                traceback.print_exception(error)
                pipe.send((False, reason(error)))
                error.__traceback__ = None  # it holds what was allocated
                if bench is None or "CUDA error" in str(error):  # nothing can be asked of a broken context
                    return
            found = None
            release(bench.job)
            try:
                question, args = pipe.recv()
            except EOFError:
                return


class Bench:
    """A recipe set up for training on synthetic tokens; every question is a method."""

    def __init__(self, name: str, where: Path, rehearse: bool, stack: contextlib.ExitStack):
        cfg, self.own_rows = config(name, where, rehearse)
        dist = stack.enter_context(parallel.start(cfg.train.device))
        self.name, self.job = name, setup(cfg, where / "run", dist, resume=False, json_mode=True)
        self.device = dist.device
        self.forms = {}
        self.milliseconds = 100 if rehearse else 1200  # of steps that are timed
        if planted("nan", name):
            next(self.job.model.parameters()).data.fill_(float("nan"))
        few = min(2, self.job.cfg.train.micro_batch)  # kernels are compiled, memory is left to the others
        steps(self.sized(few, few), 1)

    def sized(self, rows: int, micro_batch: int) -> Setup:
        """The run with this many rows a step."""
        train = self.job.cfg.train
        train = dataclasses.replace(train, micro_batch=micro_batch, global_batch=rows * self.job.cfg.model.block_size)
        self.job.data.train.rows = rows
        return dataclasses.replace(self.job, cfg=dataclasses.replace(self.job.cfg, train=train))

    def as_cut(self) -> Setup:
        train, block = self.job.cfg.train, self.job.cfg.model.block_size
        return self.sized(train.global_batch // block, train.micro_batch)

    def ready(self) -> bool:
        return True

    def compile(self) -> float:
        """Seconds of a first compiled step, of which the stage's log has torch's own account. What does not fit into
        memory beside the others is tried again later."""
        began = time.monotonic()
        model = self.job.model
        eager = model.run_block, model.chunk_loss
        model.compile()
        self.forms = {"eager": eager, "compiled": (model.run_block, model.chunk_loss)}
        micro_batch = self.job.cfg.train.micro_batch
        with contextlib.suppress(torch.OutOfMemoryError):
            steps(self.sized(micro_batch, micro_batch), 1)
        print(self.name, torch._dynamo.utils.compile_times(), file=sys.stderr, flush=True)
        return time.monotonic() - began

    def take(self, how: str) -> None:
        model = self.job.model
        model.run_block, model.chunk_loss = self.forms.get(how, (model.run_block, model.chunk_loss))

    def park(self) -> bool:
        """Leave the device's memory to the others."""
        self.job.optimizer.state.clear()
        self.move("cpu")
        return True

    def move(self, device) -> None:
        for p in self.job.model.parameters():
            p.data = p.data.to(device)

    def measure(self, how: str) -> dict:
        if planted("exception", self.name):
            raise RuntimeError("a planted exception")
        self.take(how)
        job = self.as_cut()
        warm = steps(job, 2)
        count = int(min(20, max(3, self.milliseconds / between(warm[-1][0], warm[-1][-1]))))
        reset_peak(self.device)
        with collections() as collected:
            marks = steps(job, count)
        ms = float(np.median([between(step[0], step[-1]) for step in marks]))
        found = self.speed(job, ms) | {"peak_gib": peak_bytes(self.device) / 2**30, "steps": count}
        times = defaultdict(float)
        for step in marks:
            for (part, begin), (_, end) in zip(step, step[1:]):
                times[part] += between((part, begin), ("", end)) / count
        own, here = self.own_rows, job.cfg.train.global_batch // job.cfg.model.block_size
        whole = (times["forward"] + times["backward"] + times["data"]) * own / here + times["optimizer"] + times["rest"]
        rate = 1e3 * own * job.cfg.model.block_size / whole
        found |= {
            "rows": job.cfg.train.micro_batch,
            "micro_batches": -(-here // job.cfg.train.micro_batch),
            "own_micro_batches": -(-own // job.cfg.train.micro_batch),
            "shares": {part: times[part] / sum(times.values()) for part in PARTS},
            "part_ms": dict(times),
            "python_gc_ms": sum(collected) / count,
            "own_tokens_per_s": rate,
        }
        return found | profiled(job, ms)

    def speed(self, job: Setup, ms: float) -> dict[str, float]:
        rate = 1e3 * job.cfg.train.global_batch / ms
        flops = train_flops_per_token(job.cfg.model)
        return {"ms": ms, "tokens_per_s": rate, "flops_per_token": flops, "flops_per_s": flops * rate}

    def largest(self) -> dict:
        """The peaks of two sizes give a line; where it meets the limit, and a little below, is tried."""
        self.move(self.device)
        self.take("eager")
        limit = free_bytes(self.device)
        small = self.job.cfg.train.micro_batch
        low, high = (self.peak(rows) for rows in (small, 2 * small))
        slope = max(1.0, (high - low) / small)
        rows = max(small, int(small + (0.95 * limit - low) / slope))
        step = max(1, 1 << rows.bit_length() >> 4)  # 8 to 16 sizes to a power of two
        for attempt in range(4):
            rows = max(small, rows // step * step - attempt * step)
            try:
                peak = self.peak(rows)
            except torch.OutOfMemoryError as error:
                error.__traceback__ = None
                release(self.job)
                continue
            marks = steps(self.sized(rows, rows), 3)
            ms = float(np.median([between(step[0], step[-1]) for step in marks]))
            found = {"rows": rows, "peak_gib": peak / 2**30, "limit_gib": limit / 2**30, "tries": attempt + 1}
            return found | self.speed(self.sized(rows, rows), ms) | {"bytes_a_row": slope}
        raise torch.OutOfMemoryError(f"not even {rows} rows fit")

    def peak(self, rows: int) -> int:
        """Bytes of one step of one micro-batch of so many rows."""
        release(self.job)
        reset_peak(self.device)
        steps(self.sized(rows, rows), 1)
        return peak_bytes(self.device, rows)


def planted(fault: str, name: str) -> bool:
    return os.environ.get("MUONLM_PLANT") == fault and FAULTY[fault] == name


def config(name: str, where: Path, rehearse: bool) -> tuple[Config, int]:
    """The recipe on synthetic tokens, its batch cut to MICRO_BATCHES; and its own rows a step."""
    recipe, changed = CASES[name]
    own = load_recipe(recipe, {"train.micro_batch": 2} if rehearse else changed, smoke=rehearse)
    rows, micro_batch = rows_per_step(own, world=1), own.train.micro_batch
    flags = {
        "data.source": str(synthetic(where / "data", expected_size(own.data.tokenizer)[0])),
        "data.tokenizer": "char",  # a folder of tokens says which
        "train.global_batch": min(rows, MICRO_BATCHES * micro_batch) * own.model.block_size,
        "train.micro_batch": micro_batch,
        "train.steps": 10**6,  # the data ends it
        "train.dtype": "bfloat16",
        "train.save_every": 0,
        "eval.every": 0,
    }
    return load_recipe(recipe, flags, smoke=rehearse), rows


def synthetic(folder: Path, vocab_size: int) -> Path:
    """TOKENS uniform ids and a tokenizer with so many."""
    folder.mkdir(parents=True)
    chars = "".join(chr(code) for code in range(0x100, 0x100 + vocab_size))
    Tokenizer({"muonlm": "char", "chars": chars, "eot": False}).save(folder)
    ids = np.random.default_rng(0).integers(vocab_size, size=TOKENS, dtype=np.uint16)
    ids.tofile(folder / "train.bin")
    ids[: TOKENS >> 6].tofile(folder / "val.bin")
    return folder


# --------------------------------------------------------------------------------------- the loop, watched from outside


class Enough(Exception):
    """The steps that were wanted are done."""


Mark = tuple[str, "torch.cuda.Event | float"]  # what begins, and when


def steps(job: Setup, count: int) -> list[list[Mark]]:
    """Run `count` steps of the loop: of each the marks of its parts, and its end."""
    device, marks = job.dist.device, []
    data, clipped = job.data.train, parallel.clip

    def mark(what: str) -> None:
        marks[-1].append((what, now(device)))

    class Watched:
        def __getattr__(self, name):
            return getattr(data, name)

        def batch(self, *args):
            if marks:
                mark("end")
            if len(marks) == count:
                raise Enough
            marks.append([])
            mark("data")
            found = data.batch(*args)
            mark("rest")
            return found

    def loss(*args):
        mark("forward")
        found = job.loss(*args)
        mark("backward")
        return found

    def clip(*args):
        mark("rest")
        return clipped(*args)

    hooks = [
        job.optimizer.register_step_pre_hook(lambda *_: mark("optimizer")),
        job.optimizer.register_step_post_hook(lambda *_: mark("rest")),
    ]
    watched = dataclasses.replace(job, data=dataclasses.replace(job.data, train=Watched()), loss=loss)
    try:
        with mock.patch.object(parallel, "clip", clip), contextlib.suppress(Enough):
            loop(watched)
    finally:
        for hook in hooks:
            hook.remove()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return marks


def now(device: torch.device):
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(begin: Mark, end: Mark) -> float:
    """Milliseconds."""
    if isinstance(begin[1], float):
        return 1e3 * (end[1] - begin[1])
    return begin[1].elapsed_time(end[1])


@contextlib.contextmanager
def collections():
    """Milliseconds of each run of Python's collector of cycles: a step waits for it."""
    found, began = [], 0.0

    def note(phase: str, info: dict) -> None:
        nonlocal began
        if phase == "start":
            began = time.perf_counter()
        else:
            found.append(1e3 * (time.perf_counter() - began))

    gc.callbacks.append(note)
    try:
        yield found
    finally:
        gc.callbacks.remove(note)


def profiled(job: Setup, ms: float) -> dict:
    """Which share of a step of `ms` kernels run, and the KERNELS that take most of it."""
    cuda = job.dist.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    try:
        with torch.profiler.profile(activities=[activity]) as profile:
            steps(job, 1)
        entries = [
            (event.self_device_time_total if cuda else event.self_cpu_time_total, event.count, event.key)
            for event in profile.key_averages()
            if not event.is_user_annotation
        ]
    except Exception as error:  # a profiler that is not allowed costs no more than its figures
        return {"busy": float("nan"), "kernels": [], "profiler": reason(error)}
    entries.sort(reverse=True)
    top = [{"ms": us / 1e3, "calls": count, "kernel": key[:120]} for us, count, key in entries[:KERNELS]]
    launches = sum(count for _, count, _ in entries)
    return {"busy": sum(us for us, *_ in entries) / 1e3 / ms, "launches": launches, "kernels": top}


# ---------------------------------------------------------------------------------------------- memory of the device


def release(job: Setup) -> None:
    for p in job.model.parameters():
        p.grad = None
    gc.collect()
    if job.dist.device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(device: torch.device, rows: int = 0) -> int:
    """On a CPU, which does not count, made up: 1 MiB and one a row."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else (1 + rows) << 20


def free_bytes(device: torch.device) -> int:
    """What this process may still take, or has."""
    if device.type != "cuda":
        return 10 << 20
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
