"""Time and memory of the recurrences, forward and backward, beside the libraries that compute the same on a CPU.

    python benchmarks/scan.py [--only mamba,ops,mamba-mixer,delta,mamba2,scaling] [--repeats 5] [--long] [--quick]
                              [--json [FILE]]

Families, each at B 4 L 512 and at B 1 L 4096 (and small, with the token loops of scan/reference.py), D 512, N 16, fp32:
    mamba        from the step sizes on, y = scan + D u. Ours on numba (`ours`) and in PyTorch (`ours chunked`);
                 mambapy's selective_scan, that is pscan with the discretisation; transformers' slow path: its function
                 that mixers call without CUDA kernels (discretisation and a loop over tokens), not the mixer around it
    mamba-mixer  the same as whole mixers of equal weights, width 256: in_proj to out_proj
    ops          ours against ours, from W_dt t on (steps, gates and write norm included): M mamba, L longhorn, m and l
                 their Muon forms, in numba and in PyTorch
    delta        the gated delta rule, H 4, N 64, P 128: our delta_scan, fla's naive_chunk_gated_delta_rule, and
                 torch_chunk_gated_delta_rule of transformers' Qwen3-Next, all with chunks of 64
    mamba2       whole mixers of equal weights, width 256, 8 heads of 64, N 128: transformers' Mamba2Mixer at its
                 default chunk of 256 and at our 64
Gate     before any time is taken, outputs and all gradients of the arms of a family must agree: see AGREE
ms       median [range] over rounds. A round runs every arm once, in an order that rotates. transformers' slow path
         fills a (B,D,L,N) tensor of zeros for each of its L slices when it goes backward, time of L^2: at 512 tokens it
         runs once, where its peak is taken and uncompared (its gate is the small shape), and beyond QUADRATIC tokens
         not at all
ratios   median over rounds of (their time / our time in the same round); memory: their peak / our peak
peak     MiB by which the process grew from the moment that inputs and weights were there until the gradients were: the
         highest resident size (VmHWM, reset just before through /proc/self/clear_refs; where that is not allowed,
         ru_maxrss) less the resident size before. Each in a process of its own, forked before any of them has computed
         anything, after a run at a tiny shape. torch.profiler would not see what numba and MKL allocate; this sees all,
         and noise of about 1 MiB.
scaling  whole mixers, B 1, width 128 (D 256), L 512 to 8192: least-squares slope of log time and log peak over log L
long     --long: one step (loss, gradients, AdamW; blocks recomputed) of a 10M-parameter MuonLonghorn on a row of 32768
         tokens, and the peak resident size of that process: below 8 GB or not

The table goes to stderr, JSON to stdout or to a file. Peers that are not installed are listed with their reason.
"""

import argparse
import gc
import importlib
import inspect
import json
import math
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muonlm.config.schema import ModelConfig
from muonlm.model import build_model, count_parameters
from muonlm.model.mixers import MIXERS
from muonlm.scan import choose_backend, delta_scan, diag_scan, reference

AGREE = 1e-4  # relative Frobenius norm, fp32; sums over 4096 tokens in other orders, 2e-5 seen
LONG_LIMIT = 8e9
HEADS = 4
WIDE = {"d_state": 16, "n_head": 1, "mlp": "none", "delta_heads": HEADS, "vocab_size": 64, "init": "lm"}


@dataclass(frozen=True)
class Shape:
    B: int
    L: int
    D: int
    N: int = 16

    def __str__(self) -> str:
        return f"B{self.B} L{self.L} D{self.D}"


SMALL, TINY = Shape(1, 256, 128), Shape(1, 70, 64)
SHAPES = [SMALL, Shape(4, 512, 512), Shape(1, 4096, 512)]
LENGTHS = [512, 1024, 2048, 4096, 8192]

# ----------------------------------------------------------------------------------------------------------------- arms

Arm = Callable[[], Tensor]
"""One forward pass over leaves that it holds"""


@dataclass
class Case:
    """What one family does at one shape: leaves to differentiate by, and for every arm a function of nothing."""

    leaves: dict[str, list[Tensor]]  # by arm, or for all under ""
    arms: dict[str, Arm]
    weight: Tensor
    once: frozenset = frozenset()  # arms too slow for rounds: run once, where their peak is taken

    def run(self, name: str) -> list[Tensor]:
        """[output, *gradients] of Σ output·weight."""
        y = self.arms[name]()
        return [y.detach(), *torch.autograd.grad(y, self.leaves.get(name) or self.leaves[""], self.weight)]


def randn(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return torch.randn(*shape) * scale + shift


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def peer(module: str, name: str):
    """An attribute of a module that may be missing: None then, and the reason is kept."""
    try:
        # transformers' functions may hand over to CUDA libraries that are installed; their PyTorch form lies within
        found = getattr(importlib.import_module(module), name)
        return inspect.unwrap(found) if inspect.isfunction(found) else found
    except (ImportError, AttributeError) as error:
        MISSING[f"{module}.{name}"] = f"{type(error).__name__}: {error}".splitlines()[0]
        return None


MISSING: dict[str, str] = {}


QUADRATIC = 1024
"""Longest row of transformers' slow path: its backward fills a (B,D,L,N) tensor of zeros for each of the L slices"""


def once(s: Shape) -> frozenset:
    return frozenset(["transformers"] if s.L > SMALL.L else [])


def mamba(s: Shape) -> Case:
    delta = leaf(F.softplus(randn(s.B, s.L, s.D, shift=-4.0)))
    A = leaf(-torch.arange(1.0, s.N + 1).repeat(s.D, 1))
    u, k, q = leaf(randn(s.B, s.L, s.D)), leaf(randn(s.B, s.L, s.N)), leaf(randn(s.B, s.L, s.N, scale=s.N**-0.5))
    D = leaf(torch.ones(s.D))

    def ours(backend: str) -> Arm:
        return lambda: diag_scan((delta, A), delta * u, k, q, backend=backend)[0] + D * u

    arms = {"ours": ours("auto"), "ours chunked": ours("chunked")}
    if s.L <= SMALL.L:
        arms["reference"] = ours("reference")
    if block := peer(PEERS["mamba"][0], "MambaBlock"):
        arms["mambapy"] = lambda: block.selective_scan(None, u, delta, A, k, q, D)
    if s.L <= QUADRATIC and (slow := peer(PEERS["mamba"][1], "mamba_selective_scan")):
        arms["transformers"] = lambda: slow(*(x.mT for x in (u, delta)), A, k.mT, q.mT, D=D).mT
    return Case({"": [delta, A, u, k, q, D]}, arms, randn(s.B, s.L, s.D), once(s))


def ops(s: Shape) -> Case:
    T, u = leaf(randn(s.B, s.L, s.D)), leaf(randn(s.B, s.L, s.D))
    k, q = leaf(randn(s.B, s.L, s.N)), leaf(randn(s.B, s.L, s.N, scale=s.N**-0.5))

    def op(letter: str, backend: str) -> tuple[Arm, list[Tensor]]:
        mixer = mixer_of(letter, s.D // 2)
        own = [mixer.D, *([mixer.A_log, mixer.dt_proj.bias] if letter in "Mm" else [mixer.dt_head.bias])]

        def forward() -> Tensor:
            gate, writes = mixer.gate(T, k), mixer.writes
            w = writes(gate[0] * u, k)
            y, *_ = diag_scan(gate, w, k, q, gamma=writes.gamma, alpha=writes.alpha, backend=backend)
            return torch.addcmul(y, u, mixer.D)

        return forward, [T, u, k, q, *own]

    made = {
        letter + suffix: op(letter, backend)
        for suffix, backend in {"": "auto", " chunked": "chunked"}.items()
        for letter in "MLml"
    }
    leaves, arms = ({name: pair[i] for name, pair in made.items()} for i in (1, 0))
    return Case(leaves, arms, randn(s.B, s.L, s.D))


def delta(s: Shape) -> Case:
    H, N, P = HEADS, s.D // (2 * HEADS), s.D // HEADS
    lg = leaf(-F.softplus(randn(s.B, s.L, H, shift=-2.0)))
    b, u = leaf(torch.rand(s.B, s.L, H)), leaf(randn(s.B, s.L, H, P))
    k, q = (leaf(F.normalize(randn(s.B, s.L, H, N), dim=-1)) for _ in range(2))
    arms = {"ours": lambda: delta_scan(lg, b, u, k, q)[0]}
    if s.L <= SMALL.L:
        arms["reference"] = lambda: reference.delta_scan(lg, b, u, k, q)[0]
    if fla := peer(PEERS["delta"][0], "naive_chunk_gated_delta_rule"):
        arms["fla"] = lambda: fla(q=q, k=k, v=u, g=lg, beta=b, scale=1.0)[0]
    if qwen := peer(PEERS["delta"][1], "torch_chunk_gated_delta_rule"):
        arms["transformers"] = lambda: qwen(query=q * N**0.5, key=k, value=u, g=lg, beta=b)[0]  # it scales q itself
    return Case({"": [lg, b, u, k, q]}, arms, randn(s.B, s.L, H, P))


def mixer_of(letter: str, width: int, **options) -> nn.Module:
    """A mixer with the weights that our LM begins with."""
    cfg = ModelConfig(pattern=letter, n_layer=1, d_model=width, **WIDE | options)
    return build_model(cfg).blocks[0].mixer


def whole(letter: str, s: Shape, peers: dict[str, Callable], **options) -> Case:
    """Mixers of equal weights; `peers` builds theirs for a width."""
    x = leaf(randn(s.B, s.L, s.D // 2))
    ours = {"ours": mixer_of(letter, s.D // 2, **options)}
    theirs = {name: build(s.D // 2) for name, build in peers.items()}
    leaves, arms = {}, {}
    for name, mixer in (ours | theirs).items():
        mixer.load_state_dict(ours["ours"].state_dict())
        mixer.eval()
        weights = dict(mixer.named_parameters())
        leaves[name] = [x, *(weights[key] for key in sorted(weights))]
        arms[name] = (lambda m: lambda: m(x)[0])(mixer) if name == "ours" else (lambda m: lambda: m(x))(mixer)
    return Case(leaves, arms, randn(s.B, s.L, s.D // 2))


def mamba_mixer(s: Shape) -> Case:
    peers = {}
    if block := peer(PEERS["mamba"][0], "MambaBlock"):
        config = peer(PEERS["mamba"][0], "MambaConfig")
        peers["mambapy"] = lambda width: block(config(d_model=width, n_layers=1, d_state=s.N))
    if s.L <= QUADRATIC and (block_hf := peer(PEERS["mamba"][1], "MambaMixer")):
        config_hf = peer("transformers", "MambaConfig")
        peers["transformers"] = lambda width: block_hf(
            config_hf(hidden_size=width, state_size=s.N, num_hidden_layers=1), layer_idx=0
        )
    case = whole("M", s, peers)
    case.once = once(s)
    return case


def mamba2(s: Shape) -> Case:
    head = min(64, s.D // 2)
    peers = {}
    if block := peer(PEERS["mamba2"][0], "Mamba2Mixer"):
        config = peer("transformers", "Mamba2Config")

        def build(chunk: int) -> Callable:
            return lambda width: block(
                config(hidden_size=width, state_size=128, head_dim=head, num_heads=2 * width // head, n_groups=1,
                       num_hidden_layers=1, chunk_size=chunk), layer_idx=0)  # fmt: skip

        peers = {"transformers": build(256), "transformers C64": build(64)}
    return whole("D", s, peers, ssm_head=head, d_state=128)


FAMILIES = {"mamba": mamba, "mamba-mixer": mamba_mixer, "ops": ops, "delta": delta, "mamba2": mamba2}
SLOW = "transformers.models.{0}.modeling_{0}"
PEERS = {  # modules with code that we did not write
    "mamba": ["mambapy.mamba", SLOW.format("mamba")],
    "mamba-mixer": ["mambapy.mamba", SLOW.format("mamba")],
    "ops": [],
    "delta": ["fla.ops.gated_delta_rule.naive", SLOW.format("qwen3_next")],
    "mamba2": [SLOW.format("mamba2")],
}
RATIOS = {  # what the table divides: family -> [(title, numerator, denominator)], of time and of peak
    "mamba": [(f"{p} / {o}", p, o) for o in ("ours", "ours chunked") for p in ("mambapy", "transformers")],
    "mamba-mixer": [("mambapy / ours", "mambapy", "ours"), ("transformers / ours", "transformers", "ours")],
    "ops": [("longhorn / mamba", "L", "M"), ("muon_longhorn / longhorn", "l", "L"), ("muon_mamba / mamba", "m", "M"),
            ("muon_longhorn / longhorn, chunked", "l chunked", "L chunked")],
    "delta": [("fla / ours", "fla", "ours"), ("transformers / ours", "transformers", "ours")],
    "mamba2": [("transformers / ours", "transformers", "ours"),
               ("transformers C64 / ours", "transformers C64", "ours")],
}  # fmt: skip


def build(family: str, shape: Shape) -> Case:
    torch.manual_seed(0)
    return FAMILIES[family](shape)


def in_rounds(case: Case) -> list[str]:
    return [name for name in case.arms if name not in case.once]


def check(family: str, case: Case) -> dict[str, float]:
    """Each arm's largest relative deviation from the first arm that computes the same. Warms up too."""
    found, deviations = {}, {}
    for name in in_rounds(case):
        first = name.split()[0] if family == "ops" else next(iter(case.arms))
        results = case.run(name)
        if name == first:
            found[first], deviation = results, 0.0
        else:
            pairs = zip(results, found[first], strict=True)
            deviation = max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs)
        deviations[name] = deviation
        if not deviation <= AGREE:  # NaN too
            raise SystemExit(f"{family}: {name} deviates from {first} by {deviation:.1e}; no time is worth taking")
    return deviations


# ---------------------------------------------------------------------------------------------------------- measurement


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def interleaved(arms: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each arm in each round; every round begins with another arm."""
    names, times = list(arms), {name: [] for name in arms}
    for turn in range(repeats):
        gc.collect()  # once a round: it walks through everything that was imported, 0.2 s
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            times[name].append(seconds(arms[name]))
    return times


def summary(values: list[float]) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def ratio(above: list[float], below: list[float]) -> dict:
    return summary([a / b for a, b in zip(above, below, strict=True)])


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def high_water() -> int:
    """The highest resident size since reset_high_water(), in bytes."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_high_water() -> None:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def in_a_child(work: Callable[[], object]):
    """What work() returns, as JSON, from a forked process. Fork before anything is computed: threads do not survive."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reader)
            with os.fdopen(writer, "w") as out:
                json.dump(work(), out)
            code = 0
        except BaseException as error:  # the parent must not see two of itself
            print(f"in a measuring process: {type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    os.waitpid(pid, 0)
    return json.loads(text) if text else None


def growth(warm_up: Callable[[], object], prepare: Callable[[], Callable[[], object]]) -> tuple[int, float]:
    """Bytes by which the largest resident size during work = prepare() exceeds that before, and its seconds."""
    warm_up()
    work = prepare()
    gc.collect()
    reset_high_water()
    before = resident()
    took = seconds(work)
    return max(0, high_water() - before), took


def peak_of(family: str, shape: Shape, name: str) -> tuple[int | None, float | None]:
    def prepare():
        case = build(family, shape)
        return lambda: case.run(name)

    return in_a_child(lambda: growth(lambda: build(family, TINY).run(name), prepare)) or (None, None)


# --------------------------------------------------------------------------------------------------------------- stages


def measure(family: str, shapes: list[Shape], repeats: int, peaks: dict) -> dict:
    rows, ratios = [], []
    for shape in shapes:
        case = build(family, shape)
        deviations = check(family, case)
        times = interleaved({name: (lambda n=name: case.run(n)) for name in in_rounds(case)}, repeats)
        for name in case.once & case.arms.keys():
            _, took = peaks.get((family, shape, name), (None, None))
            if took:  # one run against every round of ours
                times[name], deviations[name] = [took] * repeats, None
        for name, values in times.items():
            rows.append({"family": family, "shape": str(shape), "arm": name, "seconds": summary(values),
                         "peak_bytes": peaks.get((family, shape, name), (None, None))[0],
                         "once": name in case.once, "deviation": deviations[name]})  # fmt: skip
        for title, above, below in RATIOS[family]:
            if above in times and below in times:
                pair = [peaks.get((family, shape, name), (None, None))[0] for name in (above, below)]
                memory = pair[0] / max(pair[1], 1) if None not in pair else None
                ratios.append({"family": family, "shape": str(shape), "ratio": title,
                               "time": ratio(times[above], times[below]), "memory": memory})  # fmt: skip
        note(f"{family} {shape}")
    return {"rows": rows, "ratios": ratios}


def mixer_step(letter: str, L: int) -> Callable[[], object]:
    torch.manual_seed(0)
    mixer = mixer_of(letter, 128, d_state=0)
    x = leaf(randn(1, L, 128))
    weight = torch.ones(1, L, 128)
    leaves = [x, *mixer.parameters()]
    return lambda: torch.autograd.grad(mixer(x)[0], leaves, weight)


def mixer_peak(letter: str, L: int) -> int | None:
    found = in_a_child(lambda: growth(mixer_step(letter, 70), lambda: mixer_step(letter, L)))
    return found[0] if found else None


def slope(lengths: list[int], values: list[float]) -> float:
    """Least squares of log value over log length."""
    x, y = [math.log(L) for L in lengths], [math.log(max(v, 1e-12)) for v in values]
    mx, my = statistics.mean(x), statistics.mean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y)) / sum((a - mx) ** 2 for a in x)


def scaling(letters: str, lengths: list[int], repeats: int, peaks: dict) -> list[dict]:
    rows = []
    for letter in letters:
        steps = {L: mixer_step(letter, L) for L in lengths}
        for step in steps.values():
            step()
        times = interleaved(steps, repeats)
        medians = [statistics.median(times[L]) for L in lengths]
        bytes_ = [peaks[letter, L] for L in lengths]
        rows.append({"mixer": letter, "lengths": lengths, "seconds": medians, "peak_bytes": bytes_,
                     "time_slope": slope(lengths, medians),
                     "memory_slope": None if None in bytes_ else slope(lengths, bytes_)})  # fmt: skip
        note(f"scaling {letter}")
    return rows


def long_step(length: int) -> dict:
    """One training step on one row of `length` tokens, as a process of its own."""
    cfg = ModelConfig(
        pattern="l", n_layer=8, d_model=256, n_head=1, vocab_size=4096, block_size=length, init="lm", tie=True
    )

    def work() -> dict:
        torch.manual_seed(0)
        model = build_model(cfg)
        model.recompute = True
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        tokens = torch.randint(cfg.vocab_size, (1, length + 1))

        def step() -> float:
            loss = model(tokens[:, :-1], tokens[:, 1:]) / length
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        losses = []
        took = seconds(lambda: losses.append(step()))
        return {"tokens": length, "parameters": count_parameters(cfg)["total"], "seconds": took, "loss": losses[0],
                "peak_resident_bytes": high_water(), "below_8_GB": high_water() < LONG_LIMIT}  # fmt: skip

    return in_a_child(work)


# --------------------------------------------------------------------------------------------------------------- report

STARTED = time.perf_counter()


def note(text: str) -> None:
    print(f"[{time.perf_counter() - STARTED:5.0f} s] {text}", file=sys.stderr, flush=True)


def machine() -> dict:
    return {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "isa": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__,
            "python": platform.python_version()}  # fmt: skip


def write(document: dict, where: str | None) -> None:
    """JSON to stdout ('-') or to a file; nothing if not asked for."""
    if where == "-":
        print(json.dumps(document, indent=1))
    elif where:
        with open(where, "w") as file:
            json.dump(document, file, indent=1)


def span(s: dict, scale: float = 1.0, form: str = ".1f") -> str:
    return f"{scale * s['median']:{form}} [{scale * s['min']:{form}}–{scale * s['max']:{form}}]"


def mib(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.1f}"


def table(document: dict) -> str:
    lines = [", ".join(f"{key} {value}" for key, value in document["machine"].items())]
    if document["rows"]:
        lines += ["", f"{'family':12} {'shape':16} {'arm':18} {'ms [range]':28} {'peak MiB':>9} {'deviation':>9}"]
        for r in document["rows"]:
            deviation = "once" if r["once"] else format(r["deviation"], "9.0e")
            lines.append(
                f"{r['family']:12} {r['shape']:16} {r['arm']:18} {span(r['seconds'], 1e3):28} "
                f"{mib(r['peak_bytes']):>9} {deviation:>9}"
            )
        lines += ["", f"{'family':12} {'shape':16} {'ratio':36} {'time [range]':24} {'memory':>7}"]
        for r in document["ratios"]:
            memory = "-" if r["memory"] is None else f"{r['memory']:.2f}"
            lines.append(
                f"{r['family']:12} {r['shape']:16} {r['ratio']:36} {span(r['time'], form='.2f'):24} {memory:>7}"
            )
    if document["scaling"]:
        lengths = document["scaling"][0]["lengths"]
        lines += [
            "",
            f"{'mixer':6} {'slope of time':>13} {'of peak':>8}   ms and MiB at L = {', '.join(map(str, lengths))}",
        ]
        for r in document["scaling"]:
            memory = "-" if r["memory_slope"] is None else f"{r['memory_slope']:.2f}"
            ms = ", ".join(f"{1e3 * s:.0f}" for s in r["seconds"])
            lines.append(
                f"{r['mixer']:6} {r['time_slope']:13.2f} {memory:>8}   {ms};  {', '.join(map(mib, r['peak_bytes']))}"
            )
    if long := document["long"]:
        size = f"{long['peak_resident_bytes'] / 1e9:.2f} GB ({'below' if long['below_8_GB'] else 'NOT below'} 8 GB)"
        took = f"step of {long['tokens']} tokens, {long['parameters']:,} parameters: {long['seconds']:.1f} s"
        lines += ["", f"{took}, peak resident {size}"]
    lines += [f"missing: {name} ({reason})" for name, reason in document["missing"].items()]
    return "\n".join(lines)


def main() -> None:
    known = [*FAMILIES, "scaling"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default=",".join(known), help=f"of {','.join(known)} (default: all); empty for --long alone"
    )
    parser.add_argument("--mixers", default="MmLlDdGgV", help="letters of the mixers that scaling measures")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--long", action="store_true", help="also a training step of 32768 tokens")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two rounds: does everything run?")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE")
    args = parser.parse_args()
    stages = [stage for stage in args.only.split(",") if stage]
    if unknown := [stage for stage in stages if stage not in known]:
        parser.error(f"unknown {unknown[0]!r}; use some of {','.join(known)}")
    families = [stage for stage in stages if stage in FAMILIES]
    repeats = min(args.repeats, 2) if args.quick else args.repeats
    shapes = [TINY] if args.quick else SHAPES
    lengths = [64, 128] if args.quick else LENGTHS
    torch.set_num_threads(args.threads)

    # Processes are forked here, while this one has imported everything and computed nothing.
    for module in sorted({module for family in families for module in PEERS[family]}):
        peer(module, "__name__")
    choose_backend("diag_scan", "auto", torch.device("cpu"), torch.float32)  # imports numba
    peaks = {}
    for family in families:
        for shape in shapes:
            for name in in_a_child(lambda: list(build(family, shape).arms)) or []:
                peaks[family, shape, name] = peak_of(family, shape, name)
        note(f"peaks of {family}")
    mixers = args.mixers if "scaling" in stages else ""
    mixer_peaks = {(letter, L): mixer_peak(letter, L) for letter in mixers for L in lengths}
    long = long_step(512 if args.quick else 32768) if args.long else None

    document = {"machine": machine(), "rows": [], "ratios": [], "long": long}
    for family in families:
        for key, value in measure(family, shapes, repeats, peaks).items():
            document[key] += value
    document["scaling"] = scaling(mixers, lengths, repeats, mixer_peaks) if mixers else []
    document["missing"] = MISSING
    print(table(document), file=sys.stderr)
    write(document, args.json)


if __name__ == "__main__":
    assert set(RATIOS) == set(FAMILIES) == set(PEERS) and set(MIXERS) >= set("MmLlDdGgV")
    main()
