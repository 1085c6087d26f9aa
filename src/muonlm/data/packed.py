"""Packed data: the batch of step n is a pure function of (seed, step), read from sealed shards by memory map.

A split is one stream of N tokens x_0 … x_{N−1} (its shards, end to end). Position p, 0 ≤ p < R = N − 1, has the input
x_p and the target x_{p+1}; the R positions form a ring. With T = block_size an epoch e has n = ceil(R / T) samples:

    sample i covers the positions (φ_e + i·T + t) mod R,  t = 0 … T − 1,   φ_0 = 0, φ_e keyed by (seed, e)          (1)
    where i·T + t ≥ R (surplus of the last sample) the target is IGNORE: each epoch trains each target exactly once (2)
    sample k of the run = step·rows + row;  e = k div n,  i = π_e(k mod n),  π_e a keyed bijection of [0, n)        (3)

π_e is a Feistel network on Z_a × Z_b, a = ceil(√n), b = ceil(n / a): alternately l ← l + F(r) mod a and
r ← r + G(l) mod b, each invertible; since a·b < n + a, walking the cycle back into [0, n) is rarely needed. No table of
size n is ever built.

Shapes   inputs, targets (B, T) int64
Cost     O(B·T) per batch, whatever the corpus; resident memory is what the system caches of the mapped shards
Raises   UserError for a folder that is no packed data, is altered, or lacks the split: it names file and remedy
Source   M. Luby, C. Rackoff, "How to construct pseudorandom permutations", SIAM J. Comput. 17 (1988); cycle walking:
         J. Black, P. Rogaway, "Ciphers with arbitrary finite domains" (2002); mixing constants: splitmix64 (S. Vigna)
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from muonlm.errors import UserError
from muonlm.storage import fingerprint

from .prep.formats import foreign_index, foreign_tokenizer, is_foreign
from .text.tokenizer import Tokenizer

IGNORE = -100  # torch's cross_entropy default: a target that is not trained
FORMAT_VERSION = 1
INDEX_NAMES = ("index.json", "meta.json")  # layout "packed" and layout "bin" (nanoGPT's names)
LOOK = 1 << 20  # tokens that data.reset looks for an end of text in
ROUNDS = 6  # of the Feistel network; 4 suffice in theory for wide halves, ours are narrow (a, b ~ √n)


@dataclass
class Batch:
    inputs: Tensor  # (B, T) int64 token ids
    targets: Tensor  # (B, T) int64, IGNORE where nothing is trained
    count: int  # what the loss is divided by: trained targets, or pairs
    segments: Tensor | None = None  # (B, T) int64, 0, 1, … along a row: tokens see their own segment only; −1 = padding
    reference: Tensor | None = None  # (B, S) fp32: log-probability of each segment's targets under a frozen model
    pairs: bool = False  # segment 2j is preferred to segment 2j + 1

    @property
    def tokens(self) -> int:
        """Trained targets."""
        return int((self.targets != IGNORE).sum()) if self.pairs else self.count

    def split(self, rows: int) -> list["Batch"]:
        """Micro-batches of at most `rows` rows, none lost. An empty batch (a rank without rows) gives itself, once."""
        assert rows >= 1, rows
        if len(self.inputs) <= rows:
            return [self]
        return [self._rows(slice(at, at + rows)) for at in range(0, len(self.inputs), rows)]

    def _rows(self, rows: slice) -> "Batch":
        part = self._map(lambda t: t[rows])
        if self.pairs:
            part.count = int((part.segments.amax(1) + 1).sum()) // 2
        elif self.count == self.targets.numel():
            part.count = part.targets.numel()
        else:
            part.count = int((part.targets != IGNORE).sum())
        return part

    def to(self, device) -> "Batch":
        return self._map(lambda t: t.to(device, non_blocking=True))

    def _map(self, fn) -> "Batch":
        tensors = {f: getattr(self, f) for f in ("inputs", "targets", "segments", "reference")}
        return replace(self, **{name: None if t is None else fn(t) for name, t in tensors.items()})


def _keys(*what: int) -> np.ndarray:
    """Eight 64-bit keys from integers of any size."""
    return np.frombuffer(hashlib.blake2b(repr(what).encode(), digest_size=64).digest(), dtype="<u8")


class KeyedPermutation:
    """A bijection of [0, n) fixed by (seed, epoch); call it with an integer array of any shape."""

    def __init__(self, n: int, seed: int, epoch: int = 0):
        assert 1 <= n < 2**62, n
        self.n = n
        side = int(np.ceil(np.sqrt(n)))
        self._a, self._b = np.uint64(side), np.uint64(-(-n // side))
        self._keys = _keys(seed, epoch)

    def __call__(self, index) -> np.ndarray:
        index = np.asarray(index)
        assert index.size == 0 or (index.min() >= 0 and index.max() < self.n), (index, self.n)
        out = self._network(index.astype(np.uint64))
        outside = out >= self.n
        while outside.any():  # a point of [0, a·b) whose cycle leaves [0, n) walks on until it is back inside
            out[outside] = self._network(out[outside])
            outside = out >= self.n
        return out.astype(np.int64)

    def _network(self, x: np.ndarray) -> np.ndarray:
        left, right = x // self._b, x % self._b
        for i in range(0, ROUNDS, 2):
            left = (left + _mix(right ^ self._keys[i]) % self._a) % self._a
            right = (right + _mix(left ^ self._keys[i + 1]) % self._b) % self._b
        return left * self._b + right


def _mix(x: np.ndarray) -> np.ndarray:
    """Spread 64 bits over the upper 32; wraps modulo 2^64 as meant."""
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(31)
    x *= np.uint64(0x94D049BB133111EB)
    return x >> np.uint64(32)


def epochs_of(step: int, rows: int, samples: int, rank: int, world: int) -> Iterator[tuple[int, np.ndarray]]:
    """(3): (epoch e, k mod n) of this rank's contiguous share of the rows of global step `step`; nearly always one pair."""
    assert step >= 0 and 0 <= rank < world, (step, rank, world)
    at, end = step * rows + rows * rank // world, step * rows + rows * (rank + 1) // world
    while at < end:
        epoch = at // samples
        until = min(end, (epoch + 1) * samples)
        yield epoch, np.arange(at, until, dtype=np.int64) - epoch * samples
        at = until


class PackedData:
    """One split of a prepared folder. `rows` is the number of rows of the global step, over all ranks and micro-batches.

    reset: rows say where documents begin (Batch.segments), so that these do not see each other; needs a tokenizer with EOT.
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
                f"data.reset = true: the tokenizer of {self.path} has no end of text, so documents cannot be told apart"
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
        # Row p of a shard's window table is x_p … x_{p+T}: a view, no memory. None where the shard is shorter than T
        # + 1.
        windows = np.lib.stride_tricks.sliding_window_view
        self._windows = [windows(s, block_size + 1) if len(s) > block_size else None for s in self._shards]
        self._epoch: tuple[int, KeyedPermutation, int] | None = None  # (epoch, π, φ) last used
        if reset and split == "train" and self.tokenizer.eot_id not in self.tokens(LOOK):
            raise UserError(
                f"data.reset = true: the first {min(LOOK, self.num_tokens)} tokens of {self.path} hold no end of text, so "
                "documents cannot be told apart; leave it out, or prepare the text with --eod"
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
            phase = 0 if epoch == 0 else int(_keys(self.seed, epoch, "phase")[0]) % self._ring
            self._epoch = (epoch, KeyedPermutation(self._samples, self.seed, epoch), phase)
        return self._epoch[1:]

    def _assemble(self, sample: np.ndarray, phase: np.ndarray) -> Batch:
        """Samples of (1), each with its phase, as a batch."""
        rows, width = len(sample), self.block_size
        offset = sample * width
        start = (phase + offset) % self._ring
        if (
            len(self._shards) == 1 and rows and int(start.max()) + width <= self._ring
        ):  # the ordinary case: no row wraps
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

    def tokens(self, limit: int) -> np.ndarray:
        """The first `limit` tokens of the stream, or all of them."""
        return self._take(np.arange(min(limit, self.num_tokens)))

    def _take(self, position: np.ndarray) -> np.ndarray:
        """Tokens at any positions of the stream."""
        out = np.empty(len(position), np.int64)
        shard = np.searchsorted(self._ends, position, side="right")
        for s in np.unique(shard):
            here = shard == s
            out[here] = self._shards[s][position[here] - (self._ends[s] - len(self._shards[s]))]
        return out


def open_split(path: Path, index: dict, split: str, block_size: int, rows: int, tokenizer: str = ""):
    """(the index's record of a split, the tokenizer) of any prepared folder, after the checks that all of them share."""
    if block_size < 1 or rows < 1:
        raise UserError(f"block_size={block_size}, rows={rows}: both must be at least 1")
    if split not in index["splits"]:
        raise UserError(f"{path} has no split {split!r}; it has {', '.join(index['splits'])}")
    tok = foreign_tokenizer(path, tokenizer) if "foreign" in index else Tokenizer.load(path)
    if tok.fingerprint != index["tokenizer"]["fingerprint"]:
        raise UserError(f"{path / 'tokenizer.json'} is not the tokenizer this data was made with; {remake(path)}")
    return index["splits"][split], tok


def remake(path) -> str:
    return f"make it again: muonlm prep SOURCE --to {path} --overwrite"


def checksum(index: dict) -> str:
    return fingerprint({k: v for k, v in index.items() if k != "checksum"})


def read_index(path, tokenizer: str = "", *, block_size: int = 0) -> dict:
    """The index of a prepared folder after the cheap checks: it is ours, unaltered, and every shard has the recorded
    size. A folder of another format gets one made up (formats.foreign_index) for the tokenizer that is named."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; make it: muonlm prep SOURCE --to {path}")
    file = next((path / name for name in INDEX_NAMES if (path / name).is_file()), None)
    if is_foreign(path) and (file is None or file.name == "meta.json" and b'"format_version"' not in file.read_bytes()):
        return foreign_index(path, tokenizer, block_size=block_size)
    if file is None:
        raise UserError(f"{path} is not prepared data (no index.json in it); make it: muonlm prep {path} --to FOLDER")
    try:
        index = json.loads(file.read_text("utf-8"))
        version = index["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not an index of muonlm ({error}); {remake(path)}") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{file} has format_version {version}, this muonlm reads {FORMAT_VERSION}; {remake(path)}")
    if index.get("checksum") != checksum(index):
        raise UserError(f"{file} was altered after it was sealed (its checksum differs); {remake(path)}")
    for info in index["splits"].values():
        for shard in info["shards"]:
            want = shard.get("offset", 0) + shard["tokens"] * np.dtype(index["dtype"]).itemsize
            found = (path / shard["file"]).stat().st_size if (path / shard["file"]).is_file() else None
            if found is None:
                raise UserError(f"{path / shard['file']} is missing; {remake(path)}")
            if found != want:
                raise UserError(f"{path / shard['file']} has {found} bytes, its index says {want}; {remake(path)}")
    return index
