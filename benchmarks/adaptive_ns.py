"""Adaptive Newton-Schulz budget: is the loss equal at <= 60 % of the Newton-Schulz flops?

    OMP_NUM_THREADS=1 python benchmarks/adaptive_ns.py --data tinyshakespeare.txt [--seeds 3] [--steps 200] [--json OUT]

Arms      fixed 5   five polar_express steps on every block: the default
          adaptive  per block the least k in 3..8 with f_k(sigma_05) >= 0.7, measured every --every steps
          fixed 3   three steps on every block: what a budget without any measurement would save
Pairing   a seed gives every arm the same initialisation and the same batches; differences are taken seed by seed
Model     a character Transformer, 4 layers of 128, 768 tokens a step, Muon lr 0.02 with q, k, v split, linear decay
          to 0
Flops     direct form, 4 m^2 n + 2 m^3 a step and block, counted with the budget in force; the svdvals of the
          measurement are added as 22 m^2 n (an upper bound of Golub and Reinsch's count for values only)
Units     final loss of the first --eval-rows held-out rows, nats per token; share of the flops of `fixed 5`
"""

import argparse
import dataclasses
import json
import statistics
import time

import torch

from muonlm.config.schema import Config
from muonlm.model import build_model
from muonlm.optim import lr_scale
from muonlm.optim.muon.muon import blocks
from muonlm.optim.watch.diagnostics import Diagnostics, block_list, ns_flops
from muonlm.training.evaluate import evaluate
from muonlm.training.objectives import OBJECTIVES
from muonlm.training.parallel import Dist
from muonlm.training.resolve import open_data, resolve
from muonlm.training.setup import make_optimizer, plan_routes

ARMS = {"fixed 5": {}, "adaptive": {}, "fixed 3": {"muon.ns_steps": 3}}
SVD_FLOPS = 22


def config(args, seed: int, flags: dict) -> Config:
    flat = {
        "seed": seed,
        "model.n_layer": 4,
        "model.d_model": 128,
        "model.n_head": 4,
        "model.d_ff": 512,
        "model.block_size": 64,
        "model.mlp": "relu2",
        "data.source": args.data,
        "data.tokenizer": "char",
        "data.val": "tail:0.1",
        "optim.lr": 0.02,
        "muon.adamw_lr": 3e-3,
        "muon.ns_dtype": "float32",
        "sched.kind": "linear",
        "train.steps": args.steps,
        "train.global_batch": 768,
        "train.dtype": "float32",
        "train.device": "cpu",
        "eval.rows": 64,
        "eval.iters": max(1, args.eval_rows // 64),
    }
    return Config.from_dict(flat | flags, "benchmarks/adaptive_ns.py")


def train(args, arm: str, seed: int, dist: Dist) -> dict:
    """One run: final loss, share of the flops, mean budget at the end."""
    cfg = config(args, seed, ARMS[arm])
    data = open_data(cfg, dist)
    cfg = resolve(cfg, data, 1)
    model, objective = build_model(cfg.model, dist.device, seed), OBJECTIVES[cfg.train.objective].function()
    optimizer = make_optimizer(cfg, plan_routes(cfg, model))
    groups = [g for g in optimizer.param_groups if g["use_muon"]]
    for group in groups:
        group["ns_method"] = "direct"  # no probe: the choice must not differ between arms
    found = [(g, name, blocks(p, split)[i].shape) for g in groups for name, p, split, i, _ in block_list(g)]
    shapes = [(g, name, min(shape), max(shape)) for g, name, shape in found]
    diagnostics = None
    if arm == "adaptive":
        diagnostics = Diagnostics(args.every, 0, advice=False, adaptive=True, seed=seed).attach(optimizer)
    spent, baseline, began = 0.0, 0.0, time.perf_counter()
    for step in range(cfg.train.steps):
        batch = data.train.batch(step, 0, 1)
        model.train()
        loss, count, _ = objective(model, batch)
        (loss / count).backward()
        scale = lr_scale(step, steps=cfg.train.steps, **dataclasses.asdict(cfg.sched))
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * scale
        spent += sum(ns_flops(m, n, g["ns_budget"].get(name, g["ns_steps"])) for g, name, m, n in shapes)
        baseline += sum(ns_flops(m, n, 5) for _, _, m, n in shapes)
        optimizer.step()
        optimizer.zero_grad()
        if diagnostics and diagnostics.due(step + 1):
            diagnostics.collect()
            spent += sum(SVD_FLOPS * m * m * n for _, _, m, n in shapes)
    budgets = [g["ns_budget"].get(name, g["ns_steps"]) for g, name, _, _ in shapes]
    return {
        "arm": arm,
        "seed": seed,
        "loss": evaluate(model, objective, data, cfg, dist)["val_loss"],
        "share": spent / baseline,
        "budgets": {k: budgets.count(k) for k in sorted(set(budgets))},
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="sotu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="steps between measurements")
    parser.add_argument("--eval-rows", type=int, default=512)
    parser.add_argument("--json", default="")
    args = parser.parse_args()
    dist, runs = Dist(0, 1, torch.device("cpu")), []
    for seed in range(args.seeds):
        for arm in ARMS:
            runs.append(train(args, arm, seed, dist))
            print(json.dumps(runs[-1]), flush=True)
    base = {r["seed"]: r["loss"] for r in runs if r["arm"] == "fixed 5"}
    for arm in ARMS:
        mine = [r for r in runs if r["arm"] == arm]
        change = [r["loss"] - base[r["seed"]] for r in mine]
        spread = statistics.stdev(change) if len(change) > 1 else 0.0
        print(
            f"{arm:9s} loss {statistics.mean(r['loss'] for r in mine):.4f}   minus fixed 5: "
            f"{statistics.mean(change):+.4f} [{min(change):+.4f}, {max(change):+.4f}] sd {spread:.4f}   flops "
            f"{statistics.mean(r['share'] for r in mine):.1%}"
        )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(runs, file, indent=1)


if __name__ == "__main__":
    main()
