"""Held-out loss of a run, in nats per token and bits per byte, and what a counting model makes of the same bytes.

    bits per byte = Σ nats over all predicted tokens / (ln 2 · UTF-8 bytes of the text)
    trigram       p(c | ab) = (n(abc) + 1) / (n(ab) + 256), counted on the training bytes

The trigram is the floor that any model worth training must beat; both see the same split.
"""

import json
from pathlib import Path

import numpy as np
import torch

from muonlm.data.batch import Splits
from muonlm.errors import UserError
from muonlm.training import checkpoint
from muonlm.training.dpo import dpo_objective
from muonlm.training.loop import evaluate, open_data
from muonlm.training.objectives import OBJECTIVES
from muonlm.training.parallel import Dist, start

TRIGRAM_TOKENS = 1 << 24  # more text would not change the counts that matter, and costs seconds


def bits_per_byte(
    source: str | Path, *, data: str = "", limit: int = 0, which: str = "best", device: str = "cpu"
) -> dict:
    """Evaluate the checkpoint of a run on its own held-out split, or on the held-out split of other text (`data`), with its tokenizer."""
    run, path = checkpoint.locate(source, which)
    cfg = checkpoint.read_config(run)
    cfg.eval.iters = limit
    if data:
        if not (run / "tokenizer.json").exists():
            raise UserError(f"run {run} has no tokenizer, so --data {data} cannot be read with it.")
        cfg.data.source, cfg.data.tokenizer = data, str(run / "tokenizer.json")
    with start(device) as dist:
        splits, meta = open_data(cfg, dist), checkpoint.read_meta(path)
        if not data and meta["data"] != splits.fingerprint:  # its held-out part may have been trained on
            raise UserError(
                f"run {run} was trained on other data: {cfg.data.source!r} changed since. Put the old data back, or name what is "
                f"to be measured: --data {cfg.data.source}"
            )
        model, _ = checkpoint.load(path, dist.device)
        if cfg.train.objective == "dpo":
            if data:
                cfg.dpo.reference = "model"  # the sums that the run keeps are of its own pairs
            objective = dpo_objective(cfg, model, splits, run, started=True, dist=dist, say=lambda line: None)
        else:
            objective = OBJECTIVES[cfg.train.objective]
        result = evaluate(model, objective, splits, cfg, dist)
    result |= {"run": str(run), "checkpoint": path.name, "step": meta["step"]}
    return result | trigram_reference(splits)


def for_scale(run: str | Path) -> dict:
    """What the bits per byte of a finished run are to be seen beside: those of the untrained model and of the byte trigram."""
    alone = Dist(0, 1, torch.device("cpu"))  # under torchrun rank 0 does this without the others
    reference = trigram_reference(open_data(checkpoint.read_config(Path(run)), alone))
    lines = (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    first = next((r for r in map(json.loads, lines) if "val_bpb" in r), {})
    return reference | ({"untrained_bpb": first["val_bpb"]} if first.get("step") == 0 else {})


def trigram_reference(splits: Splits) -> dict:
    """{"trigram_bpb": …} counted on the training split (its first TRIGRAM_TOKENS) and charged on the held-out one; {} without text."""
    train, held_out = (split.text(TRIGRAM_TOKENS) for split in (splits.train, splits.evaluated["val"]))
    if not train:
        return {}
    return {"trigram_bpb": trigram_bpb(np.frombuffer(train, np.uint8), np.frombuffer(held_out, np.uint8))}


def trigram_bpb(train: np.ndarray, held_out: np.ndarray) -> float:
    """Bits per byte of an add-one byte trigram model; the first two bytes are charged as uniform."""
    if len(held_out) < 3:
        return 8.0
    code = train.astype(np.int64)
    triples = (
        np.bincount(code[:-2] * 65536 + code[1:-1] * 256 + code[2:], minlength=1 << 24)
        if len(code) > 2
        else np.zeros(1 << 24, np.int64)
    )
    pairs = triples.reshape(-1, 256).sum(1)
    h = held_out.astype(np.int64)
    context = h[:-2] * 256 + h[1:-1]
    probability = (triples[context * 256 + h[2:]] + 1) / (pairs[context] + 256)
    return float((-np.log2(probability).sum() + 16) / len(h))
