"""How much training time does held-out loss 1.88 on tiny Shakespeare (characters) take?

    python benchmarks/time_to_loss.py --data tinyshakespeare.txt [--repeats 5] [--json OUT]

Arms, run one after the other in every repeat, each a real `muonlm train` process with the repeat's number as seed:
    ours        shakespeare-cpu
    nanogpt     keller/nanogpt-char --preset cpu: nanoGPT's documented CPU settings (fp32, AdamW, 2000 steps) in our
                loop
    nanogpt-bf16   the same with the dtype that our probe chooses, as the strongest form of the baseline

Loss: nats per character over the whole last 10 % of the text, in windows of the model's own block. Time: training
seconds (evaluation, data preparation and start-up not counted) until the first evaluation at or below the target; a run
that never gets there counts with all of its training time, which favours it. Prints medians with ranges, the ratio of
each repeat, and JSON.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ARMS = {
    "ours": ["shakespeare-cpu"],
    "nanogpt": ["keller/nanogpt-char", "--preset", "cpu", "--eval.rows", "512"],
    "nanogpt-bf16": ["keller/nanogpt-char", "--preset", "cpu", "--eval.rows", "512", "--train.dtype", "auto"],
}


def measure(arm: str, data: str, seed: int, target: float, folder: Path) -> dict:
    out = folder / f"{arm}-{seed}"
    command = [
        sys.executable,
        "-m",
        "muonlm",
        "train",
        *ARMS[arm],
        "--data",
        data,
        "--seed",
        str(seed),
        "--eval.sample",
        "0",
        "--out",
        str(out),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    report = json.loads(done.stdout)
    history = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    reached = next((r for r in history if r.get("val_loss", target + 1) <= target), None)
    return {
        "arm": arm,
        "seed": seed,
        "final_loss": report["val_loss"],
        "reached": reached is not None,
        "seconds": reached["train_seconds"] if reached else report["train_seconds"],
        "steps": reached["step"] if reached else report["steps"],
        "total_seconds": report["train_seconds"],
        "ms_per_step": 1e3 * report["train_seconds"] / report["steps"],
        "dtype": report["dtype"],
    }


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}–{max(values):.{digits}f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/tinyshakespeare.txt")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--target", type=float, default=1.88)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--json", metavar="FILE", help="also write the rows here")
    args = parser.parse_args()
    arms, rows = args.arms.split(","), []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.repeats):
            for arm in arms:
                rows.append(measure(arm, args.data, seed, args.target, Path(folder)))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    by = {arm: [row for row in rows if row["arm"] == arm] for arm in arms}
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{args.repeats} interleaved repeats, target {args.target}"
    )
    print(
        f"{'arm':14} {'reached':8} {'final loss':22} {'steps':>6} {'ms/step':22} {'seconds to target':26} "
        "baseline / ours"
    )
    ratios = {}
    for arm, mine in by.items():
        ratios[arm] = [row["seconds"] / ours["seconds"] for row, ours in zip(mine, by.get("ours", []))]
        print(
            f"{arm:14} {sum(r['reached'] for r in mine)}/{len(mine):<6} "
            f"{spread([r['final_loss'] for r in mine], 4):22} "
            f"{statistics.median(r['steps'] for r in mine):6.0f} {spread([r['ms_per_step'] for r in mine]):22} "
            f"{spread([r['seconds'] for r in mine]):26} {spread(ratios[arm], 1) if ratios[arm] else ''}"
        )
    document = {
        "rows": rows,
        "ratios": ratios,
        "median_ratio": {arm: statistics.median(r) for arm, r in ratios.items() if r},
    }
    if args.json:
        Path(args.json).write_text(json.dumps(document, indent=1))
    print(json.dumps(document["median_ratio"]))


if __name__ == "__main__":
    main()
