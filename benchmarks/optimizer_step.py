"""How long does one optimizer step over a model's hidden matrices take, ours beside everybody else's?

    python benchmarks/optimizer_step.py --json [FILE] [--markdown FILE] [--sets a,b,c,d] [--arms ours,timm]
    python benchmarks/optimizer_step.py --spectrum            only e and k of every arm, no timing (seconds)
    python benchmarks/optimizer_step.py --smoke --json        tiny matrices, a few steps: does everything run?

Sets     a  GPT char 4L/128, 0.79M parameters · b  GPT 6L/384, 10.6M · c  GPT-2 124M, 84.9M: q, k, v and o apart
         d  Mamba 130M, 24 layers of in_proj, x_proj, dt_proj, out_proj and the convolution, 89.8M
         e  GPT-2 774M, 708M: for a GPU
         In d ours takes the convolution (1536, 1, 4) as it is stored, and cuts in_proj into its two halves; the others
         get the convolution as the matrix (1536, 4) of the same memory, since torch.optim.Muon refuses 3-D, and
         orthogonalise in_proj as one matrix (10 % fewer FLOPs).
Method   All arms run in one process on the same weights, in an order that rotates every round. Before each step, not
         timed, the gradients are copied anew from one Gaussian vector read at 4 offsets: the same for every arm,
         fresh for the momentum, and safe from those that write into p.grad. Rounds after warm-up: a 40 after 5; b 30
         after 5, side arms in every 5th; c, d and e 3 after 2, main arms only (side arms if --arms names them).
         --repeats and --budget (seconds a set, though never below 3 rounds) change that; column n says how often each
         arm ran.
ms       median [10th to 90th percentile] of a step: wall clock on a CPU, CUDA events between synchronisations on a GPU
ratios   / torch, / adamw: median over rounds of this arm's time over torch.optim.Muon's (AdamW fused) in the same round
GFLOP/s  nominal: 5 (4 m^2 n + 2 m^3) for every m x n matrix, whatever the arm really does, over the median time
e, k     ||X X^T - I||_F / sqrt(m) and ||X||_F / sqrt(m), X the first update of a zero weight at lr 1 and no decay, from
         a Gaussian and from a 1/k spectrum, 256 x 256 and 256 x 1024. Every arm's shape factor is 1 there, and the
         first momentum is a multiple of the gradient, so X is what the arm makes of the gradient. Ideal: e = 0, k = 1.
state    bytes of all tensors in optimizer.state, per parameter
peak     temporary bytes: the most that torch had allocated from the optimizer's construction to the end of its second
         step, less its state; so probes, and workspaces that it keeps, count. CPU: the [memory] events of
         torch.profiler, which do not see what oneDNN or MKL allocate by themselves. GPU: max_memory_allocated.
share    of a training step: forward and backward of our LM in the dtype that our probe chooses, then one step of the
         whole routed optimizer (AdamW groups included); median of optimizer / (forward + backward + optimizer).

The table goes to stderr, JSON and Markdown to stdout or to a file. Peers that are not installed, or fail, are listed
with their reason. On 2 cores without AMX allow 3 minutes for a,b and 6 for c,d.
"""

import argparse
import gc
import importlib
import importlib.machinery
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_stages import timing
from gpu_stages.timing import one_call
from torch import Tensor, nn

from muonlm.config.recipes import load_recipe
from muonlm.model import build_model
from muonlm.optim import Muon, build_optimizer, route
from muonlm.training import parallel

LR, WD, MOMENTUM = 0.02, 0.01, 0.95
KELLER = (3.4445, -4.7750, 2.0315)
SHARE_BUDGET = 20.0  # seconds, after three measurements
STARTED = time.perf_counter()
BASELINES = ("torch", "adamw-fused")  # the denominators of the ratio columns: always measured
OFFSETS = [977 * i for i in range(4)]  # where a step's gradients begin in the noise vector

# ------------------------------------------------------------------------------------------------------- parameter sets


@dataclass(frozen=True)
class Matrix:
    shape: tuple[int, ...]
    split: dict | None = None
    """Entry of Muon's `splits`, as the module docstring tells"""

    @property
    def flat(self) -> tuple[int, int]:
        return self.shape[0], math.prod(self.shape[1:])

    def blocks(self, splits: bool) -> list[tuple[int, int]]:
        rows, columns = self.flat
        if splits and self.split and "split" in self.split:
            return [(part, columns) for part in self.split["split"][1]]
        return [(rows, columns)]


@dataclass(frozen=True)
class Set:
    title: str
    matrices: list[Matrix]
    repeats: int
    budget: float
    """Seconds of interleaved rounds after which no new one begins"""
    warmup: int = 5
    every: int = 1
    """Rounds from one measurement of a side arm to the next; 0: side arms only when --arms names them"""
    share: tuple[dict, int, int] | None = None
    """Model flags, rows of a micro-batch and number of them, for the share of the training step"""


def gpt(layers: int, width: int) -> list[Matrix]:
    """q, k, v, o, MLP up and MLP down of every layer."""
    return layers * [*4 * [Matrix((width, width))], Matrix((4 * width, width)), Matrix((width, 4 * width))]


def mamba(layers: int, width: int, rank: int, state: int) -> list[Matrix]:
    inner = 2 * width
    halves = {"split": (0, [inner, inner])}  # x and the gate z
    return layers * [
        Matrix((2 * inner, width), halves),
        Matrix((rank + 2 * state, inner)),
        Matrix((inner, rank)),
        Matrix((width, inner)),
        Matrix((inner, 1, 4), {"flatten": True}),
    ]


def shape(layers: int, heads: int, width: int, block: int) -> dict:
    return {"model.n_layer": layers, "model.n_head": heads, "model.d_model": width, "model.block_size": block}


SETS = {
    "a": Set("GPT char 4L/128", gpt(4, 128), 40, 60.0, share=(shape(4, 4, 128, 64), 12, 1)),
    "b": Set("GPT 6L/384", gpt(6, 384), 30, 75.0, every=5, share=(shape(6, 6, 384, 256), 16, 4)),
    "c": Set("GPT-2 124M", gpt(12, 768), 3, 120.0, warmup=2, every=0),
    "d": Set("Mamba 130M", mamba(24, 768, 48, 16), 3, 120.0, warmup=2, every=0),
    "e": Set("GPT-2 774M", gpt(36, 1280), 3, 120.0, warmup=2, every=0),
}
SMOKE = {
    "smoke-gpt": Set("smoke", gpt(1, 32), 4, 20.0, warmup=2, share=(shape(1, 2, 32, 16), 4, 2)),
    "smoke-mamba": Set("smoke", mamba(1, 32, 4, 2), 4, 20.0, warmup=2, every=2),
}

# ----------------------------------------------------------------------------------------------------------------- arms


class KellerLoop(torch.optim.Optimizer):
    """Muon as usually written: M <- mu M + (1 - mu) G, U = (1 - mu) G + mu M, bf16 Newton-Schulz, matrix by matrix."""

    def __init__(self, params, lr: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        a, b, c = KELLER
        for group in self.param_groups:
            for p in group["params"]:
                M = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                M.lerp_(p.grad, 1.0 - MOMENTUM)
                X = p.grad.lerp(M, MOMENTUM).bfloat16()
                tall = X.shape[0] > X.shape[1]
                X = X.mT if tall else X
                X = X / (X.norm() + 1e-7)
                for _ in range(5):
                    R = X @ X.mT
                    X = a * X + (b * R + c * R @ R) @ X
                X = X.mT if tall else X
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(X.to(p.dtype), alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


Build = Callable[[list[nn.Parameter], list[dict | None], float, float], torch.optim.Optimizer]
"""(parameters, splits, lr, weight decay) -> optimizer; peers ignore the splits"""


def ours(**options) -> Build:
    return lambda params, splits, lr, wd: Muon(
        [{"params": params, "splits": splits, "use_muon": True, "name": "matrices"}], lr=lr, weight_decay=wd, **options
    )


def keller_loop(params, splits, lr, wd):
    return KellerLoop(params, lr=lr, weight_decay=wd)


def torch_muon(params, splits, lr, wd):
    return torch.optim.Muon(params, lr=lr, weight_decay=wd, momentum=MOMENTUM)


def adamw(**options) -> Build:
    return lambda params, splits, lr, wd: torch.optim.AdamW(params, lr=lr, weight_decay=wd, **options)


def heavyball(params, splits, lr, wd):
    module = importlib.import_module("heavyball")
    # on 2 cores compiling its step took 72 s for set a alone, with recompilations in the first four steps
    module.utils.compile_mode = "default" if params[0].is_cuda else None
    return module.Muon(params, lr=lr, betas=(MOMENTUM, 0.99), weight_decay=wd)


def pytorch_optimizer(params, splits, lr, wd):
    module = importlib.import_module("pytorch_optimizer")
    return module.Muon([{"params": params, "use_muon": True}], lr=lr, momentum=MOMENTUM, weight_decay=wd)


def optimuon(**options) -> Build:
    def build(params, splits, lr, wd):
        module = importlib.import_module("optimuon")
        plain = {"normuon": False, "cautious_wd": False}  # on by default there; plain Muon is what is compared
        return module.Muon(params, lr=lr, momentum=MOMENTUM, weight_decay=wd, **plain, **options)

    return build


def timm(params, splits, lr, wd):
    """Its optimizer module alone: the package imports torchvision, which the optimizer does not need."""
    found = importlib.machinery.PathFinder.find_spec("timm")
    if found is None:
        raise ModuleNotFoundError("No module named 'timm'")
    root = Path(found.submodule_search_locations[0])
    for name, folder in {"timm": root, "timm.optim": root / "optim"}.items():
        if name not in sys.modules:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(folder)]
    module = importlib.import_module("timm.optim.muon")
    return module.Muon(params, lr=lr, momentum=MOMENTUM, weight_decay=wd, nesterov=True, adjust_lr_fn="original")


@dataclass(frozen=True)
class Arm:
    build: Build
    form: str
    """What it computes, where the optimizer does not say so itself"""
    main: bool = False
    """Measured in every round, and on the large sets"""
    splits: bool = False
    """Takes true tensors and `splits`; the others get 2-D views"""
    matrix: bool = True
    """Orthogonalises, so that GFLOP/s, e and k mean something"""
    fp16: bool = False
    """Multiplies in fp16: on a CPU only measured on sets below a million parameters, unless asked for"""


def our(main: bool = False, **options) -> Arm:
    return Arm(ours(**options), "", main, splits=True)


ARMS = {
    "torch": Arm(torch_muon, "keller x5, bf16, loop", main=True),
    "keller-loop": Arm(keller_loop, "keller x5, bf16, loop"),
    "adamw-fused": Arm(adamw(fused=True), "-", main=True, matrix=False),
    "adamw-foreach": Arm(adamw(foreach=True), "-", matrix=False),
    "ours": our(main=True),
    "ours-direct-bf16": our(ns_method="direct", ns_dtype="bfloat16"),
    "ours-direct-fp32": our(ns_method="direct", ns_dtype="float32"),
    "ours-gram-fp32": our(ns_method="gram", ns_dtype="float32"),
    "ours-cayley": our(ns_method="cayley", ns_dtype="float32"),
    "ours-keller": our(coefficients="keller"),
    "ours-polar_express4": our(main=True, coefficients="polar_express4", ns_steps=4),
    "heavyball": Arm(heavyball, "its set x5, bf16, eager on CPU"),
    "pytorch-optimizer": Arm(pytorch_optimizer, "keller x5, bf16"),
    "optimuon": Arm(optimuon(), "polar express x5, Gram fp16", fp16=True),
    "optimuon-direct": Arm(optimuon(gram_ns=False), "polar express x5, bf16"),
    "timm": Arm(timm, "its quintic x5, bf16"),
}
PEERS = ("heavyball", "pytorch-optimizer", "optimuon", "timm")  # distributions whose versions are reported

# ---------------------------------------------------------------------------------------------------------- measurement


class Workload:
    """A set's weights and gradients, as true tensors and as 2-D views of the same memory, and the pool of gradients."""

    def __init__(self, matrices: list[Matrix], device: torch.device):
        draw = torch.Generator(device).manual_seed(0)  # a CPU needs ten seconds for the largest set
        sizes = [math.prod(m.shape) for m in matrices]
        noise = torch.randn(sum(sizes) + max(OFFSETS), generator=draw, device=device) * 1e-3
        weights = torch.randn(sum(sizes), generator=draw, device=device) * 0.02
        begins = [sum(sizes[:i]) for i in range(len(sizes))]
        self.pool = [
            [noise[o + b : o + b + size].view(m.flat) for b, size, m in zip(begins, sizes, matrices)] for o in OFFSETS
        ]
        self.splits = [m.split for m in matrices]
        self.params, self.grads = {}, {}
        base = [w.clone() for w in weights.split(sizes)]
        buffers = [torch.zeros_like(w) for w in base]
        for true, shapes in {True: [m.shape for m in matrices], False: [m.flat for m in matrices]}.items():
            self.params[true] = [nn.Parameter(w.view(s)) for w, s in zip(base, shapes)]
            self.grads[true] = [g.view(s) for g, s in zip(buffers, shapes)]

    def load(self, step: int, true: bool) -> None:
        torch._foreach_copy_(self.grads[False], self.pool[step % len(self.pool)])
        for p, g in zip(self.params[true], self.grads[true]):
            p.grad = g  # heavyball takes p.grad away

    def build(self, arm: Arm) -> torch.optim.Optimizer:
        return arm.build(self.params[arm.splits], self.splits, LR, WD)


def tensors(value) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def state_bytes(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> int:
    weights = {p.untyped_storage().data_ptr() for p in params}
    storages = {t.untyped_storage().data_ptr(): t for t in tensors(dict(optimizer.state))}
    return sum(t.untyped_storage().nbytes() for pointer, t in storages.items() if pointer not in weights)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes that torch had allocated at once during work(), above what it had before."""
    if device.type == "cuda":
        return timing.peak_bytes(work, device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    events.sort(key=lambda e: float(e["ts"]))
    level = peak = 0
    for event in events:
        if event["args"]["Device Type"] == 0:
            level += event["args"]["Bytes"]
            peak = max(peak, level)
    return peak


def begin(arm: Arm, workload: Workload, device: torch.device) -> tuple[torch.optim.Optimizer, int, int]:
    """(the optimizer after two steps, bytes of state, peak temporary bytes)."""
    made = []
    gc.collect()  # what others left is not to be freed while this one is measured

    def first_steps():
        made.append(workload.build(arm))
        for step in range(2):
            workload.load(step, arm.splits)
            made[0].step()

    peak = peak_bytes(first_steps, device)
    state = state_bytes(made[0], workload.params[arm.splits])
    return made[0], state, max(0, peak - state)


def chosen(optimizer: torch.optim.Optimizer) -> dict:
    """What "auto" chose, by shape, where the optimizer says."""
    return {k: str(v) for g in optimizer.param_groups for k, v in g.get("ns_chosen", {}).items()}


def summary(values: list[float]) -> dict[str, float]:
    deciles = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else 9 * values
    return {"median": statistics.median(values), "p10": deciles[0], "p90": deciles[8]}


def measure(
    key: str, spec: Set, names: list[str], asked: bool, args, device: torch.device
) -> tuple[list[dict], dict[str, str]]:
    """(a row per arm, the reasons of those that failed) for one parameter set."""
    workload, skipped, running = Workload(spec.matrices, device), {}, {}
    parameters = sum(p.numel() for p in workload.params[True])
    repeats, budget = args.repeats or spec.repeats, args.budget or spec.budget
    every = spec.every or int(asked)
    for name in names:
        if not ARMS[name].main and not every:
            continue
        if ARMS[name].fp16 and device.type == "cpu" and parameters > 1e6 and not asked:
            skipped[name] = "most CPUs emulate fp16, so that a step takes a minute; name it in --arms to insist"
            continue
        note(f"set {key}: {name} begins")
        try:
            running[name] = begin(ARMS[name], workload, device)
        except Exception as error:  # a peer may break in any way; its reason belongs into the table, the others go on
            skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    gc.collect()
    times: dict[str, dict[int, float]] = defaultdict(dict)
    began, warmup = time.perf_counter(), max(0, spec.warmup - 2)  # two steps were taken above
    note(f"set {key}: {len(running)} arms, at most {repeats} rounds or {budget:.0f} s")
    for turn in range(-warmup, repeats):
        due = [name for name in running if ARMS[name].main or turn % every == 0]
        for name in due[turn % len(due) :] + due[: turn % len(due)]:
            workload.load(turn, ARMS[name].splits)
            times[name][turn] = one_call(running[name][0].step, device)
        if turn >= 2 and time.perf_counter() - began > budget:
            break
    rows = []
    for name, (optimizer, state, peak) in running.items():
        arm, mine = ARMS[name], {turn: ms for turn, ms in times[name].items() if turn >= 0}
        ms = summary(list(mine.values()))
        shapes = [sorted(block) for m in spec.matrices for block in m.blocks(arm.splits)]
        flops = sum(5 * (4 * m * m * n + 2 * m**3) for m, n in shapes)
        over = {b: summary([ms / times[b][turn] for turn, ms in mine.items()]) for b in BASELINES if b in running}
        rows.append(
            {
                "set": key,
                "arm": name,
                "n": len(mine),
                "ms_of_rounds": mine,
                "ms": ms["median"],
                "ms_p10": ms["p10"],
                "ms_p90": ms["p90"],
                "over_torch": over.get("torch", {}).get("median"),
                "over_torch_p10_p90": [over["torch"]["p10"], over["torch"]["p90"]] if "torch" in over else None,
                "over_adamw": over.get("adamw-fused", {}).get("median"),
                "gflops_nominal": flops / ms["median"] / 1e6 if arm.matrix else None,
                "state_bytes_per_parameter": state / parameters,
                "peak_temporary_bytes": peak,
                "parameters": parameters,
                "form": arm.form,
                "chosen": chosen(optimizer),
            }
        )
    if not all(p.isfinite().all() for p in workload.params[True]):
        raise RuntimeError(f"set {key}: some arm made the shared weights infinite; its timings mean nothing")
    return rows, skipped


def problems(device: torch.device, sizes: list[tuple[int, int]]) -> dict[str, Tensor]:
    """A Gaussian, and a matrix of singular values 1, 1/2, 1/3, ..., of each size."""
    draw = torch.Generator().manual_seed(0)
    found = {}
    for m, n in sizes:
        found[f"gauss {m}x{n}"] = torch.randn(m, n, generator=draw)
        P = torch.linalg.qr(torch.randn(m, m, generator=draw, dtype=torch.float64)).Q
        Q = torch.linalg.qr(torch.randn(n, m, generator=draw, dtype=torch.float64)).Q
        found[f"1/k {m}x{n}"] = ((P / torch.arange(1, m + 1)) @ Q.mT).float()
    return {name: G.to(device) for name, G in found.items()}


def spectrum(arm: Arm, given: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """e and k of the arm's real first update."""
    found = {}
    for name, G in given.items():
        weight = nn.Parameter(torch.zeros_like(G))
        optimizer = arm.build([weight], [None], 1.0, 0.0)
        weight.grad = G.clone()
        optimizer.step()
        X, m = -weight.detach().double(), G.shape[0]
        defect = X @ X.mT - torch.eye(m, dtype=X.dtype, device=X.device)
        found[name] = {"e": (defect.norm() / m**0.5).item(), "k": (X.norm() / m**0.5).item()}
    return found


def share(key: str, spec: Set, repeats: int, device: torch.device) -> dict:
    """How much of a whole training step is the optimizer's, with our model, routing and defaults."""
    flags, rows, micro = spec.share
    cfg = load_recipe("keller/nanogpt-char", flags | {"model.dropout": 0.0, "model.vocab_size": 65}).model
    model = build_model(cfg, device)
    optimizer = build_optimizer(route(model), lr=LR, adamw_lr=3e-4)
    draw = torch.Generator().manual_seed(0)
    batches = [torch.randint(65, (rows, cfg.block_size + 1), generator=draw).to(device) for _ in range(micro)]

    def loss(tokens: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens[:, :-1])[0].float().flatten(0, 1), tokens[:, 1:].flatten())

    dtype, _ = parallel.choose_dtype(lambda: loss(batches[0][: max(1, rows // 4)]), device)

    def forward_backward():
        for tokens in batches:
            with parallel.autocast(device, dtype):
                part = loss(tokens) / micro
            part.backward()

    passes, steps, began = [], [], time.perf_counter()
    for turn in range(repeats + 1):  # the first one warms up and probes
        if turn > 3 and time.perf_counter() - began > SHARE_BUDGET:
            break
        model.zero_grad()
        ms = one_call(forward_backward, device), one_call(optimizer.step, device)
        if turn:
            passes.append(ms[0])
            steps.append(ms[1])
    shares = summary([o / (f + o) for f, o in zip(passes, steps)])
    return {
        "set": key,
        "tokens": rows * micro * cfg.block_size,
        "dtype": dtype,
        "n": len(steps),
        "forward_backward_ms": statistics.median(passes),
        "optimizer_ms": statistics.median(steps),
        "share": shares["median"],
        "share_p10_p90": [shares["p10"], shares["p90"]],
    }


# --------------------------------------------------------------------------------------------------------------- report


def note(text: str) -> None:
    print(f"{time.perf_counter() - STARTED:6.1f} s  {text}", file=sys.stderr, flush=True)


def machine(device: torch.device) -> dict:
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    info = dict(line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    info = {k.strip(): v.strip() for k, v in info.items()}
    flags = info.get("flags", "").split()
    versions = {}
    for name in PEERS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "flags": {f: f in flags for f in ("avx512f", "avx512_bf16", "amx_bf16", "amx_tile")},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "peers": versions,
    }


@dataclass
class Report:
    meta: dict
    rows: list[dict] = field(default_factory=list)
    share: list[dict] = field(default_factory=list)
    spectrum: dict[str, dict] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def document(self) -> dict:
        ratios = defaultdict(dict)
        for r in self.rows:
            ratios[r["set"]][r["arm"]] = r["over_torch"]
        return {**vars(self), "ratios": ratios}

    def tables(self) -> list[tuple[list[str], list[list[str]]]]:
        """(header, rows) of: times, e and k, shares; only those that were measured."""
        found = []
        if self.rows:
            header = ["set", "arm", "n", "ms [p10–p90]", "/ torch", "/ adamw", "GFLOP/s", "state B/param", "peak MB"]
            header.append("form")
            found.append((header, [self._time_row(r) for r in self.rows]))
        if self.spectrum:
            names = list(next(iter(self.spectrum.values())))
            values = [[arm, *(f"{v[n]['e']:.4f} / {v[n]['k']:.3f}" for n in names)] for arm, v in self.spectrum.items()]
            found.append((["arm", *(f"e / k, {n}" for n in names)], values))
        if self.share:
            header = ["set", "tokens a step", "dtype", "forward + backward ms", "optimizer ms", "share [p10–p90]"]
            found.append((header, [self._share_row(s) for s in self.share]))
        return found

    @staticmethod
    def _share_row(s: dict) -> list[str]:
        low, high = s["share_p10_p90"]
        times = f"{s['forward_backward_ms']:.1f}", f"{s['optimizer_ms']:.2f}"
        return [s["set"], f"{s['tokens']:,}", s["dtype"], *times, f"{s['share']:.1%} [{low:.1%}–{high:.1%}]"]

    @staticmethod
    def _time_row(r: dict) -> list[str]:
        def number(value: float | None, digits: int) -> str:
            return "-" if value is None else f"{value:.{digits}f}"

        digits = 1 if r["ms"] >= 100 else 2
        picks = ", ".join(sorted(set(r["chosen"].values())))
        median, low, high = (number(r[column], digits) for column in ("ms", "ms_p10", "ms_p90"))
        return [
            *(r["set"], r["arm"], str(r["n"]), f"{median} [{low}–{high}]"),
            *(number(r["over_torch"], 3), number(r["over_adamw"], 2), number(r["gflops_nominal"], 0)),
            *(number(r["state_bytes_per_parameter"], 2), number(r["peak_temporary_bytes"] / 1e6, 2)),
            r["form"] or picks or "as asked",
        ]

    def text(self, markdown: bool) -> str:
        m = self.meta
        on = [name for name, present in m["flags"].items() if present]
        has = f"{m['capability']} ({' '.join(on)})"
        lines = [f"{m['device']}: {m['cpu']}, {m['cores']} cores, {m['threads']} threads, {has}, torch {m['torch']}"]
        for header, rows in self.tables():
            widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
            padded = [[cell.ljust(w) for cell, w in zip(row, widths)] for row in [header, *rows]]
            if markdown:
                padded.insert(1, ["-" * w for w in widths])
            edge, bar = ("| ", " | ") if markdown else ("", "  ")
            lines += ["", *(edge + bar.join(row) + edge[::-1] for row in padded)]
        lines += [""] + [f"not measured: {arm}: {reason}" for arm, reason in self.skipped.items()]
        return "\n".join(lines)


def write(text: str, target: str) -> None:
    print(text) if target == "-" else Path(target).write_text(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", default="a,b", help="of a, b, c, d, e (default: a,b)")
    always = " and ".join(BASELINES)
    parser.add_argument(
        "--arms", help=f"of {', '.join(ARMS)}; {always} always run (default: all; main ones on c, d, e)"
    )
    parser.add_argument("--repeats", type=int, help="measured rounds (default: 40 on a, 30 on b, 3 on the others)")
    parser.add_argument("--budget", type=float, help="seconds of rounds per set (default: 60, 75, 120, 120, 120)")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE")
    parser.add_argument("--markdown", nargs="?", const="-", metavar="FILE")
    parser.add_argument("--spectrum", action="store_true", help="only e and k")
    parser.add_argument("--no-share", action="store_true", help="leave out the share of the training step")
    parser.add_argument("--smoke", action="store_true", help="tiny sets, a few steps")
    args = parser.parse_args()
    sets = SMOKE if args.smoke else SETS
    keys = list(SMOKE) if args.smoke else args.sets.split(",")
    names = args.arms.split(",") if args.arms else list(ARMS)
    for given, known in ((keys, sets), (names, ARMS)):
        if unknown := [g for g in given if g not in known]:
            parser.error(f"unknown {unknown[0]!r}; use some of {','.join(known)}")
    names = [name for name in ARMS if name in names or name in BASELINES]
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler of peak_bytes() writes two lines for every arm
    report = Report(machine(device))
    given = problems(device, [(32, 32), (32, 64)] if args.smoke else [(256, 256), (256, 1024)])
    for name in names:
        if ARMS[name].matrix:
            try:
                report.spectrum[name] = spectrum(ARMS[name], given)
            except Exception as error:  # see measure()
                report.skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    alive = [name for name in names if name not in report.skipped]
    for key in [] if args.spectrum else keys:
        rows, skipped = measure(key, sets[key], alive, args.arms is not None, args, device)
        report.rows += rows
        report.skipped |= {f"{name} on {key}": reason for name, reason in skipped.items()}
        gc.collect()
        if sets[key].share and not args.no_share:
            note(f"set {key}: share of the training step")
            repeats = 3 if args.smoke or key == "b" else 20
            report.share.append(share(key, sets[key], repeats, device))
    print(report.text(markdown=False), file=sys.stderr)
    if args.markdown:
        write(report.text(markdown=True), args.markdown)
    if args.json:
        write(json.dumps(report.document(), indent=1), args.json)


if __name__ == "__main__":
    main()
