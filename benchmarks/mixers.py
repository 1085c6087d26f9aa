"""What do the parts of the Muon forms bring, and which projections of a state space model are Muon's to train?

    OMP_NUM_THREADS=1 python benchmarks/mixers.py [--studies writes,routing,twins] [--seeds 1,2,3]
                                                   [--cache FILE] [--json OUT]

writes    MuonLonghorn's velocity and write norm, switched on one by one, under AdamW as in the
          paper, on associative recall (data/synthetic/recall.py; accuracy of the answers) and on text (`sotu`;
          held-out loss in nats). The arm with the Frobenius norm and alpha = 0.701 is a control: it must equal the
          one with both to rounding.
routing   Mamba on text: each of in_proj, x_proj, dt_proj, out_proj trained by Muon or left to AdamW.
twins     The three CPU recipes of state space models and, for each, an attention model of equal width and, by its
          MLP, equal size, on the same batches: bits per byte. The attention twin trains as `quickstart` does, whose
          rates were tuned for attention.
Tuning    writes, routing: every arm's rates by a coordinate search over `ladders` on seed 100, then fresh seeds.

Finished runs are kept in --cache, a line of JSON each. Differences are taken seed by seed (same batches, same initial
values).
"""

import argparse
import dataclasses
import hashlib
import json
import math
import time
from pathlib import Path

from learning import Trainer, mean_sd, say, short

from muonlm.config.recipes import load_recipe
from muonlm.config.schema import Config, flatten
from muonlm.errors import UserError
from muonlm.model import count_parameters
from muonlm.training.evaluate import evaluate

TUNING_SEED = 100
SMALL = {
    "model.n_layer": 2,
    "model.d_model": 128,
    "model.n_head": 4,
    "model.mlp": "none",
    "model.init": "lm",
    "sched.kind": "linear",
    "train.device": "cpu",
    "train.dtype": "float32",
    "muon.clip_scope": "all",
}
TEXT = {"data.source": "sotu", "data.tokenizer": "bpe:1024", "data.val": "hash:0.01", "model.block_size": 128}
TEXT |= {"train.steps": 200, "train.global_batch": 2048, "eval.iters": 12}
RECALL = {"data.source": "recall", "train.objective": "recall", "data.pairs": 4, "data.symbols": 64}
RECALL |= {"model.block_size": 32, "train.steps": 600, "train.global_batch": 2048, "model.d_model": 64}
RATES = [1e-3 * 2.0**k for k in range(7)]
ADAMW = {"optim.name": "adamw", "optim.wd": 0.0, "sched.warmup": 40}
STUDIES = {
    "writes": {
        "tasks": {"recall": RECALL | ADAMW, "text": TEXT | ADAMW},
        "base": {"model.pattern": "l"},
        "ladders": {"optim.lr": (RATES, 2)},
        "arms": {
            "neither (Longhorn)": {"model.beta": 0.0, "model.write_norm": "none"},
            "velocity": {"model.write_norm": "none"},
            "Newton-Schulz": {"model.beta": 0.0},
            "both (MuonLonghorn)": {},
            "velocity, Frobenius": {"model.write_norm": "frobenius"},
            "velocity, Frobenius x 0.701": {"model.write_norm": "frobenius", "model.alpha": 0.7010},
        },
    },
    "routing": {
        "tasks": {"text": TEXT | {"train.steps": 120, "sched.warmup": 12, "muon.momentum_warmup": "0.85:0.95:60"}},
        "base": {"model.pattern": "M", "muon.clip_scope": "aux"},
        "ladders": {"optim.lr": ([0.01 * 2.0**k for k in range(5)], 1), "muon.adamw_lr": (RATES, 3)},
        "arms": {
            name or "none": {
                "muon.route": [f"blocks.*({'|'.join(parts)}).weight={route}" for parts, route in rules if parts]
            }
            for name, rules in (
                (
                    "+".join(on),
                    [(on, "muon"), ([p for p in ("in_proj", "x_proj", "dt_proj", "out_proj") if p not in on], "adamw")],
                )
                for on in (
                    (),
                    ("in_proj",),
                    ("x_proj",),
                    ("dt_proj",),
                    ("out_proj",),
                    ("in_proj", "out_proj"),
                    ("in_proj", "x_proj", "out_proj"),
                    ("in_proj", "x_proj", "dt_proj", "out_proj"),
                )
            )
        },
    },
}
TWINS = ("muonssm/muonlonghorn-cpu", "mamba_slm/pretrain-cpu", "mamba_trainer/hybrid-cpu")


class Runs:
    """Results by what was asked for, kept in a file of JSON lines."""

    def __init__(self, path: Path):
        self.path, self.rows = path, {}
        if path.exists():
            self.rows = {row["key"]: row for row in map(json.loads, path.read_text().splitlines())}

    def get(self, cfg: Config) -> dict:
        asked = {
            key: value for key, value in flatten(cfg.to_dict()).items() if not key.startswith(("log", "train.save"))
        }
        key = hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=8).hexdigest()
        if key not in self.rows:
            began, trainer = time.perf_counter(), Trainer(cfg)
            result = {"val_loss": math.inf}
            while trainer.taken < trainer.cfg.train.steps and math.isfinite(trainer.step()):
                pass
            if trainer.taken == trainer.cfg.train.steps:
                result = evaluate(trainer.model, trainer.objective, trainer.data, trainer.cfg, trainer.dist)
            size = count_parameters(trainer.cfg.model)["total"]
            row = {"key": key, **result, "parameters": size, "seconds": round(time.perf_counter() - began, 1)}
            self.rows[key] = row
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write(json.dumps(row | {"config": asked}) + "\n")
        return self.rows[key]


def tuned(loss, ladders: dict) -> tuple[dict, float]:
    """Coordinate search: up or down each ladder while `loss` falls, until nothing changes."""
    at, tried = {knob: start for knob, (_, start) in ladders.items()}, {}

    def value(place: dict) -> float:
        spot = tuple(place.values())
        if spot not in tried:
            tried[spot] = loss({knob: ladders[knob][0][i] for knob, i in place.items()})
        return tried[spot]

    before = None
    while at != before:
        before = dict(at)
        for knob, (ladder, _) in ladders.items():
            for direction in (1, -1):
                while 0 <= at[knob] + direction < len(ladder):
                    there = at | {knob: at[knob] + direction}
                    if value(there) >= value(at):
                        break
                    at = there
    return {knob: ladders[knob][0][i] for knob, i in at.items()}, value(at)


def study(runs: Runs, name: str, seeds: list[int], only: str = "") -> dict:
    plan, table = STUDIES[name], {}
    for task, flags in plan["tasks"].items():
        table[task] = {}
        for arm, change in plan["arms"].items():
            if only and not {task, arm} & set(only.split(",")):
                continue
            base = SMALL | flags | plan["base"] | change
            ladders = plan["ladders"]
            if arm == "none":  # no tensor for Muon: AdamW on everything, as the same rates would have it
                base |= {"optim.name": "adamw", "muon.route": []}
                ladders = {"optim.lr": (RATES, 2)}

            def run(rates: dict, seed: int) -> dict:
                row = runs.get(Config.from_dict(base | rates | {"seed": seed}, "benchmarks/mixers.py"))
                say(
                    f"{task} | {arm} | seed {seed} {short(rates)}: {row['val_loss']:.4f} "
                    f"{row.get('val_acc', math.nan):.4f}  ({row['seconds']:.0f} s)"
                )
                return row

            best, _ = tuned(lambda rates: run(rates, TUNING_SEED)["val_loss"], ladders)
            table[task][arm] = {"rates": best, "runs": [{"seed": s} | run(best, s) for s in seeds]}
    return table


def twin(name: str, seed: int) -> tuple[Config, Config]:
    """A recipe and its attention twin: as wide, half as many layers where ours have no MLP, size matched by its MLP."""
    ours = load_recipe(name, {"seed": seed, "train.dtype": "bfloat16"})
    vocabulary = dataclasses.replace(ours.model, vocab_size=4096)
    size, layers = count_parameters(vocabulary)["total"], max(2, round(ours.model.n_layer * 0.5))
    best = min(
        (
            dataclasses.replace(vocabulary, pattern="A", n_layer=layers, mlp="relu2", d_ff=width)
            for width in range(64, 4096, 16)
        ),
        key=lambda cfg: abs(count_parameters(cfg)["total"] - size),
    )
    other = dataclasses.replace(best, vocab_size=0)
    quickstart = load_recipe("quickstart")
    return ours, dataclasses.replace(ours, model=other, optim=quickstart.optim, muon=quickstart.muon)


def twins(runs: Runs, seeds: list[int]) -> dict:
    table = {}
    for name in TWINS:
        rows = []
        for seed in seeds:
            ours, other = (runs.get(cfg) for cfg in twin(name, seed))
            rows.append({"seed": seed, "ours": ours, "attention": other, "ratio": ours["val_bpb"] / other["val_bpb"]})
            say(f"{name} seed {seed}: {ours['val_bpb']:.4f} attention {other['val_bpb']:.4f}")
        table[name] = {"rows": rows}
    return table


def report(document: dict) -> None:
    for name, tasks in document.items():
        print(f"\n## {name}")
        for task, arms in tasks.items():
            if not arms:
                continue
            if name == "twins":
                for row in arms["rows"]:
                    a, b = row["ours"], row["attention"]
                    print(
                        f"{task:28} seed {row['seed']}: {a['val_bpb']:.4f} bits per byte "
                        f"({a['parameters']:,} parameters); attention {b['val_bpb']:.4f} ({b['parameters']:,}); "
                        f"ratio {row['ratio']:.3f}"
                    )
                continue
            first = next(iter(arms.values()))
            print(f"{task:28} {'loss, mean ± sd':20} {'less the first arm':20} {'accuracy':18} rates")
            for arm, cell in arms.items():
                losses = [row["val_loss"] for row in cell["runs"]]
                gaps = [a - b["val_loss"] for a, b in zip(losses, first["runs"])]
                accuracy = mean_sd([row["val_acc"] for row in cell["runs"]]) if "val_acc" in cell["runs"][0] else ""
                print(f"{arm:28} {mean_sd(losses):20} {mean_sd(gaps, '+'):20} {accuracy:18} {short(cell['rates'])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", default="writes,routing,twins")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument(
        "--only", default="", help="these tasks and arms, to share the work between processes that write one cache"
    )
    parser.add_argument("--cache", type=Path, default=Path("runs/mixers.jsonl"))
    parser.add_argument("--json", metavar="FILE", help="also write all numbers here")
    args = parser.parse_args()
    studies, seeds = args.studies.split(","), [int(seed) for seed in args.seeds.split(",")]
    if unknown := sorted({*studies} - {*STUDIES, "twins"}):
        raise UserError(f"unknown study {unknown[0]!r}; they are {', '.join(STUDIES)}, twins")
    runs = Runs(args.cache)
    document = {
        name: twins(runs, seeds) if name == "twins" else study(runs, name, seeds, args.only) for name in studies
    }
    report(document)
    if args.json:
        Path(args.json).write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
