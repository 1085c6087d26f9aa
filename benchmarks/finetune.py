"""Fine-tuning: trained tokens per second with and without packing, and what a DPO step costs beside SFT.

    python benchmarks/finetune.py [--json [FILE]] [--patterns A,M] [--data gsm8k,alpaca] [--repeats 5] [--threads 2]
                                  [--quick]

packing  forward, backward and Muon's step on batches of ROWS rows of T positions (conversations of ../shared/data in
         template qa or alpaca-plain, BPE of 4,096): several examples a row (data.pack), one a row padded to T, and one
         a row padded to the longest of its batch, the usual compromise. Trained tokens a second; the ratio is
         packed / padded.
dpo      a step on pairs with cached reference sums, beside an SFT step on the same rows and targets; ratio of times
         dpo / sft, and the same with the reference model in memory.

Each round runs all variants in turn on fresh batches; medians [range] over rounds, ratios are medians of paired ratios.
The table goes to stderr, JSON to stdout or to a file.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from scan import machine, note, ratio, span, summary, write

from muonlm.config.schema import Config, ModelConfig
from muonlm.data.batch import IGNORE
from muonlm.data.examples import ExampleData
from muonlm.data.prep.examples import prepare_examples
from muonlm.model import build_model
from muonlm.training.objectives.dpo import DPO, segment_sums
from muonlm.training.objectives.next_token import next_token
from muonlm.training.setup import make_optimizer, plan_routes

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SETS = {  # file, kind, template
    "gsm8k": ("gsm8k_train.jsonl", "sft", "qa"),
    "alpaca": ("alpaca_seed_tasks.jsonl", "sft", "alpaca-plain"),
    "hh": ("hh_rlhf_harmless_test.jsonl.gz", "preferences", "qa"),
}
ROWS, T = 8, 512


def prepared(name: str, folder: Path) -> Path:
    file, kind, template = SETS[name]
    source, to = SHARED / file, folder / name
    if not source.exists():
        raise SystemExit(f"{source} is absent; this benchmark needs the shared data")
    prepare_examples(source, to, kind=kind, template=template, tokenizer="bpe:4096", val="tail:0.1")
    return to


def plain(batch, *, trim: bool):
    """One example a row as any loop computes it: padding goes through the whole model.

    `trim`: pad up to the longest row of the batch instead of to T.
    """
    width = int((batch.segments >= 0).any(0).nonzero().max()) + 1 if trim else batch.inputs.shape[1]
    return replace(batch, inputs=batch.inputs[:, :width], targets=batch.targets[:, :width], segments=None)


class Trainer:
    def __init__(self, pattern: str, vocab: int, width: int):
        cfg = Config(
            model=ModelConfig(pattern=pattern, n_layer=4, d_model=width, n_head=4, vocab_size=vocab, block_size=T)
        )
        self.model = build_model(cfg.model, torch.device("cpu"), 0)
        self.optimizer = make_optimizer(cfg, plan_routes(cfg, self.model))

    def step(self, objective, batch) -> float:
        """Seconds."""
        begin = time.perf_counter()
        loss, count, _ = objective(self.model, batch)
        (loss / count).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - begin


def packing(pattern: str, name: str, folder: Path, repeats: int, width: int) -> dict:
    data = {pack: ExampleData(folder, block_size=T, rows=ROWS, seed=0, pack=pack) for pack in (True, False)}
    trainer = Trainer(pattern, data[True].vocab_size, width)
    rates = {"packed": [], "padded": [], "padded to the longest": []}
    for round_ in range(repeats + 1):
        for variant, values in rates.items():
            batch = data[variant == "packed"].batch(round_)
            batch = batch if variant == "packed" else plain(batch, trim=variant.endswith("longest"))
            seconds = trainer.step(next_token, batch)
            if round_:  # the first round pays for what is made once
                values.append(batch.count / seconds)
    return {
        "pattern": pattern,
        "data": name,
        "tokens_per_second": {k: summary(v) for k, v in rates.items()},
        "ratio": {k: ratio(rates["packed"], v) for k, v in rates.items() if k != "packed"},
        "filled": data[True].notes[0],
    }


def preference(pattern: str, folder: Path, repeats: int, width: int) -> dict:
    data = ExampleData(folder, block_size=T, rows=ROWS, seed=0)
    trainer = Trainer(pattern, data.vocab_size, width)
    frozen = build_model(trainer.model.cfg, torch.device("cpu"), 0).requires_grad_(False).eval()
    seconds = {"sft": [], "dpo cached": [], "dpo model": []}
    for round_ in range(repeats + 1):
        batch = data.batch(round_)
        answers = replace(batch, pairs=False, count=int((batch.targets != IGNORE).sum()))
        with torch.no_grad():
            known = replace(batch, reference=segment_sums(frozen, batch))
        for variant, found in (
            ("sft", trainer.step(next_token, answers)),
            ("dpo cached", trainer.step(DPO(), known)),
            ("dpo model", trainer.step(DPO(reference=frozen), batch)),
        ):
            if round_:
                seconds[variant].append(found)
    return {
        "pattern": pattern,
        "seconds": {k: summary(v) for k, v in seconds.items()},
        "ratio": {k: ratio(v, seconds["sft"]) for k, v in seconds.items() if k != "sft"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patterns", default="A,M,MA")
    parser.add_argument("--data", default="gsm8k,alpaca")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one repeat, narrow: does it run?")
    parser.add_argument("--json", nargs="?", const="-", help="write JSON to stdout, or to a file")
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.width, args.patterns = 1, 64, "A"
    torch.set_num_threads(args.threads)
    results = {
        "machine": machine(),
        "rows": ROWS,
        "positions": T,
        "width": args.width,
        "repeats": args.repeats,
        "packing": [],
        "dpo": [],
    }
    with tempfile.TemporaryDirectory() as home:
        folders = {name: prepared(name, Path(home)) for name in [*args.data.split(","), "hh"]}
        for pattern in args.patterns.split(","):
            for name in args.data.split(","):
                found = packing(pattern, name, folders[name], args.repeats, args.width)
                results["packing"].append(found)
                rates, ratios = found["tokens_per_second"].items(), found["ratio"].items()
                note(
                    f"{pattern:3} {name:7} trained tokens/s: "
                    + ", ".join(f"{k} {span(v, form='.0f')}" for k, v in rates)
                )
                note("            packed / " + ", ".join(f"{k} {span(v, form='.2f')}" for k, v in ratios))
            found = preference(pattern, folders["hh"], args.repeats, args.width)
            results["dpo"].append(found)
            note(f"{pattern:3} " + ", ".join(f"{k} / sft {span(v, form='.3f')}" for k, v in found["ratio"].items()))
    write(results, args.json)


if __name__ == "__main__":
    main()
