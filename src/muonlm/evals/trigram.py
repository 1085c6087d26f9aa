"""What a counting model makes of the bytes that a run is measured on.

    p(c | ab) = (n(abc) + 1) / (n(ab) + 256), counted on the training bytes

This byte trigram is the floor that any model worth training must beat; both see the same split.
"""

import json
from pathlib import Path

import numpy as np
import torch

from muonlm.config.runs import read_config
from muonlm.data.batch import Splits
from muonlm.training.parallel import Dist
from muonlm.training.resolve import open_data

COUNTED = 1 << 24  # training tokens; more text would not change the counts that matter, and costs seconds


def for_scale(run: str | Path) -> dict:
    """What the bits per byte of a finished run are seen beside: those of the untrained model and of the trigram."""
    alone = Dist(0, 1, torch.device("cpu"))  # under torchrun rank 0 does this without the others
    reference = trigram_reference(open_data(read_config(Path(run)), alone))
    lines = (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    first = next((r for r in map(json.loads, lines) if "val_bpb" in r), {})
    return reference | ({"untrained_bpb": first["val_bpb"]} if first.get("step") == 0 else {})


def trigram_reference(splits: Splits) -> dict:
    """{"trigram_bpb": …}: counted on the first of the training split, charged on the held-out one; {} without text."""
    train, held_out = (split.text(COUNTED) for split in (splits.train, splits.evaluated["val"]))
    if not train:
        return {}
    return {"trigram_bpb": trigram_bpb(np.frombuffer(train, np.uint8), np.frombuffer(held_out, np.uint8))}


def trigram_bpb(train: np.ndarray, held_out: np.ndarray) -> float:
    """Bits per byte of an add-one byte trigram model; the first two bytes are charged as uniform."""
    if len(held_out) < 3:
        return 8.0
    code = train.astype(np.int64)
    if len(code) > 2:
        triples = np.bincount(code[:-2] * 65536 + code[1:-1] * 256 + code[2:], minlength=1 << 24)
    else:
        triples = np.zeros(1 << 24, np.int64)
    pairs = triples.reshape(-1, 256).sum(1)
    h = held_out.astype(np.int64)
    context = h[:-2] * 256 + h[1:-1]
    probability = (triples[context * 256 + h[2:]] + 1) / (pairs[context] + 256)
    return float((-np.log2(probability).sum() + 16) / len(h))
