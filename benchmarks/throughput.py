"""Tokens per second of a whole training step, beside a plain loop and transformers' GPT-2 at the same shape.

    python benchmarks/throughput.py [--repeats 5] [--steps 6] [--json OUT]

Arms, interleaved in one process; every repeat runs each for `steps` steps and takes the median step:
    plain        our LM (nanoGPT's architecture) in a textbook loop: fp32, eager, SDPA, torch.optim.AdamW as it comes
    plain again  the same once more: what no difference looks like (A/A)
    ours adamw   `muonlm train` with the same model and AdamW: the real loop, its data, logging, clipping and chosen
                 dtype included
    ours muon    the same with Muon
    gpt2         transformers' GPT2LMHeadModel of that shape in the textbook loop (where transformers is installed)

Also prints how much of our step goes to batch assembly and logging. Prints a table and JSON.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from muonlm.config.recipes import load_recipe
from muonlm.config.runs import read_config
from muonlm.data.packed import PackedData
from muonlm.data.prep.text import prepare
from muonlm.model import build_model
from muonlm.model.mixers import attention
from muonlm.training.loop import train
from muonlm.training.run import Run

SHAPES = {  # name: (model flags, rows)
    "4L/128": ({"model.n_layer": 4, "model.n_head": 4, "model.d_model": 128, "model.block_size": 64}, 12),
    "6L/384": ({"model.n_layer": 6, "model.n_head": 6, "model.d_model": 384, "model.block_size": 256}, 16),
}


def textbook(loss_of, parameters, data: PackedData, steps: int) -> float:
    """Median seconds of a step of the loop that everybody writes first."""
    optimizer, times = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1), []
    for step in range(steps):
        begin = time.perf_counter()
        batch = data.batch(step)
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        loss.item()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def ours(flags: dict, optimizer: str, data: Path, steps: int, folder: Path) -> tuple[float, str, dict]:
    """(median seconds of a step of `muonlm train`, dtype it chose, what it logged of the last step)."""
    cfg = load_recipe(
        "keller/nanogpt-char",
        flags
        | {
            "optim.name": optimizer,
            "data.source": str(data),
            "train.steps": steps + 1,
            "log.every": 1,
            "eval.sample": 0,
            "eval.every": 0,
            "eval.iters": 1,
            "sched.warmup": 0,
        },
    )
    out = Path(tempfile.mkdtemp(dir=folder)) / "run"
    train(cfg, out, json_mode=True)
    history = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    logged = [record for record in history if "step_ms" in record]
    return statistics.median(r["step_ms"] for r in logged[1:]) / 1e3, read_config(out).train.dtype, logged[-1]


def overheads(data: PackedData, record: dict, step_seconds: float, folder: Path) -> dict[str, float]:
    """Shares of a step: assembling a batch; recording and showing a line like `record` every 10 steps, the default."""
    run = Run(folder, load_recipe("quickstart"), steps=10**6, json_mode=True)
    batch, log = [], []
    for step in range(1, 101):
        begin = time.perf_counter()
        data.batch(step)
        middle = time.perf_counter()
        run.record(record | {"step": step})
        run.show(record | {"step": step}, 1.0)
        batch.append(middle - begin)
        log.append((time.perf_counter() - middle) / 10)
    return {"batch_share": statistics.median(batch) / step_seconds, "log_share": statistics.median(log) / step_seconds}


def gpt2(model_cfg):
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(
        vocab_size=model_cfg.vocab_size,
        n_positions=model_cfg.block_size,
        n_embd=model_cfg.d_model,
        n_layer=model_cfg.n_layer,
        n_head=model_cfg.n_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(shape)


def measure(name: str, text: str, repeats: int, steps: int, folder: Path) -> dict:
    flags, rows = SHAPES[name]
    flags = flags | {
        "model.dropout": 0.0,
        "train.global_batch": rows * flags["model.block_size"],
        "train.dtype": "auto",
    }
    packed = folder / "data"
    if not packed.exists():
        prepare([text], packed, tokenizer="char", val="tail:0.1")
    data = PackedData(packed, "train", block_size=flags["model.block_size"], rows=rows, seed=0)
    cfg = load_recipe("keller/nanogpt-char", flags | {"model.vocab_size": data.vocab_size}).model
    plain = build_model(cfg)
    tokens = rows * cfg.block_size

    def plain_loss(batch):
        logits, _ = plain(batch.inputs)
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())

    def run_plain():
        kept, attention.EXPLICIT_UP_TO = attention.EXPLICIT_UP_TO, {}  # a textbook model calls SDPA
        try:
            return textbook(plain_loss, list(plain.parameters()), data, steps)
        finally:
            attention.EXPLICIT_UP_TO = kept

    dtypes, logged = {}, {}

    def run_ours(optimizer):
        arm = f"ours {optimizer}"
        seconds, dtypes[arm], logged[arm] = ours(flags, optimizer, packed, steps, folder)
        return seconds

    arms = {
        "plain": run_plain,
        "plain again": run_plain,
        "ours adamw": lambda: run_ours("adamw"),
        "ours muon": lambda: run_ours("muon"),
    }
    try:
        hf = gpt2(cfg)
        arms["gpt2"] = lambda: textbook(
            lambda b: F.cross_entropy(hf(b.inputs).logits.flatten(0, 1), b.targets.flatten()),
            list(hf.parameters()),
            data,
            steps,
        )
    except ImportError:
        print("transformers is not installed: no gpt2 arm", file=sys.stderr)
    seconds = {arm: [] for arm in arms}
    for _ in range(repeats):
        for arm, run in arms.items():
            seconds[arm].append(run())
    rows_out = []
    for arm, times in seconds.items():
        ratio = [p / t for p, t in zip(seconds["plain"], times)]
        rows_out.append(
            {
                "shape": name,
                "arm": arm,
                "ms": 1e3 * statistics.median(times),
                "ms_range": [1e3 * min(times), 1e3 * max(times)],
                "tok_per_s": tokens / statistics.median(times),
                "speedup": statistics.median(ratio),
                "speedup_range": [min(ratio), max(ratio)],
                "dtype": dtypes.get(arm, "float32"),
            }
        )
    shares = overheads(data, logged["ours muon"], statistics.median(seconds["ours muon"]), folder)
    return {"rows": rows_out, "overheads": {"shape": name, **shares}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/tinyshakespeare.txt")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = [measure(name, args.data, args.repeats, args.steps, Path(folder)) for name in args.shapes.split(",")]
    print(
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{torch.backends.cpu.get_cpu_capability()}, {args.repeats} interleaved repeats of {args.steps} steps"
    )
    print(f"{'shape':8} {'arm':12} {'dtype':9} {'ms/step [range]':28} {'tok/s':>9}   speed-up over plain [range]")
    for result in results:
        for r in result["rows"]:
            (least, most), (low, high) = r["ms_range"], r["speedup_range"]
            left = f"{r['shape']:8} {r['arm']:12} {r['dtype']:9} {r['ms']:9.1f} [{least:.1f}–{most:.1f}]"
            print(f"{left:60} {r['tok_per_s']:9,.0f}   {r['speedup']:.2f} [{low:.2f}–{high:.2f}]")
        o = result["overheads"]
        print(f"{o['shape']:8} batch assembly {o['batch_share']:.2%} of a step, logging {o['log_share']:.2%}")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))
    print(
        json.dumps({f"{r['shape']} {r['arm']}": round(r["speedup"], 3) for result in results for r in result["rows"]})
    )


if __name__ == "__main__":
    main()
