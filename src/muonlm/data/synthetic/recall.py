"""Multi-query associative recall (MQAR): pairs are shown once, then keys are asked for their values, many in one row.

    row      k_1 v_1 k_2 v_2 … k_K v_K, then T − 2K slots: in K of them a key again, elsewhere the blank           (1)
    target   at the slot that asks for k_i: v_i. IGNORE everywhere else, the pairs included                        (2)
    slots    drawn without replacement, slot i = 1 … T − 2K with weight i^(a − 1); a = 1 is uniform, a = 0.01 (the
             default) nearly 1/i, so that most questions come soon and a few late; the keys fill them in an order
             drawn at random                                                                                       (3)
    row i    of a split is a function of (seed, split, i) alone: its random numbers are the outputs i·W … (i + 1)·W − 1
             of a SplitMix64 generator keyed by (seed, split). Step s trains on rows s·rows … (s + 1)·rows − 1      (4)

Training rows never repeat; the validation split is its first `held_out` rows and has another key, so that the two meet
only by chance: there are (keys!/(keys − K)!)² sets of pairs. Every key is asked once; keys and values are each distinct
within a row.

Tokens   0 blank · 1 … A keys · A + 1 … 2A values, A = ⌊(vocab − 1) / 2⌋
Shapes   inputs, targets (B, T) int64; K targets a row
Cost     O(rows · (A + T)) random numbers a step: 0.4 ms for 64 rows at the defaults, 15 ms with 4096 keys, 256 tokens
Raises   UserError for a row too short for its pairs and questions (3K > T), fewer keys than pairs, an unknown split
Source   S. Arora et al., "Zoology", arXiv:2312.04927, section 4 and appendix. Their code fills the other slots with
         random tokens instead of one blank and asks at every other slot only; theirs also fixes a training set, ours is
         endless.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch

from muonlm.config.schema import Config
from muonlm.errors import UserError

from ..batch import IGNORE, Batch, Dataset, Splits

BLANK = 0
EPOCH = 1 << 16  # rows that an epoch counts as, though none comes twice
GOLDEN, MIX_1, MIX_2 = (
    np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)  # SplitMix64


class RecallData(Dataset):
    """One split. `rows`: of the global step, over all ranks and micro-batches; `length`: T of (1)."""

    def __init__(
        self,
        *,
        pairs: int = 8,
        length: int = 64,
        vocab: int = 256,
        rows: int = 64,
        seed: int = 0,
        split: str = "train",
        power: float = 0.01,
        held_out: int = 1024,
    ):
        _check(pairs, length, vocab, rows, split, power, held_out)
        self.pairs, self.length, self.rows, self.split, self.power = pairs, length, rows, split, power
        self.vocab_size, self.alphabet = vocab, (vocab - 1) // 2
        self._key = np.frombuffer(hashlib.blake2b(repr((seed, split)).encode(), digest_size=8).digest(), "<u8")[0]
        self._size = EPOCH if split == "train" else held_out
        sample = self._rows(np.arange(min(16, self._size)))  # a change of the numbers or of their use would show here
        contents = hashlib.sha256(repr((pairs, length, vocab, seed, split, power, self._size)).encode())
        contents.update(sample.inputs.numpy().astype("<i8").tobytes())
        self.fingerprint: str = contents.hexdigest()

    def __len__(self) -> int:
        """Rows of this split; of the endless training split, those that count as an epoch."""
        return self._size

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """This rank's contiguous share of the rows of global step `step`, as in (4). Held-out rows come round again."""
        assert step >= 0 and 0 <= rank < world, (step, rank, world)
        index = step * self.rows + np.arange(self.rows * rank // world, self.rows * (rank + 1) // world)
        return self._rows(index if self.split == "train" else index % self._size)

    def sequential(self, rows: int, rank: int = 0, world: int = 1, *, limit: int = 0) -> Iterator[Batch]:
        """The split (its first `limit` rows) once, in order, `rows` at a time; rank r has n·r/world … n·(r+1)/world."""
        assert rows >= 1 and 0 <= rank < world, (rows, rank, world)
        n = min(limit or self._size, self._size)
        first, last = n * rank // world, n * (rank + 1) // world
        for at in range(first, max(last, first + 1), rows):  # a rank without rows takes part with an empty batch
            yield self._rows(np.arange(at, min(at + rows, last)))

    def _rows(self, index: np.ndarray) -> Batch:
        """The rows of these numbers (4)."""
        B, K, A, slots = len(index), self.pairs, self.alphabet, self.length - 2 * self.pairs
        noise = self._uniform(index, 2 * A + slots + K)
        for_keys, for_values, for_slots, for_order = np.split(noise, np.cumsum([A, A, slots]), axis=1)
        keys, values = 1 + _smallest(for_keys, K), 1 + A + _smallest(for_values, K)
        # An exponential clock of rate w_i in every slot: the first K to ring are a draw without replacement by weight.
        rate = np.arange(1, slots + 1) ** (self.power - 1.0)
        where = 2 * K + np.sort(_smallest(-np.log1p(-for_slots) / rate, K))
        order = _smallest(for_order, K)

        inputs = np.full((B, self.length), BLANK, np.int64)
        targets = np.full((B, self.length), IGNORE, np.int64)
        inputs[:, 0 : 2 * K : 2], inputs[:, 1 : 2 * K : 2] = keys, values
        np.put_along_axis(inputs, where, np.take_along_axis(keys, order, 1), 1)
        np.put_along_axis(targets, where, np.take_along_axis(values, order, 1), 1)
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), B * K)

    def _uniform(self, index: np.ndarray, width: int) -> np.ndarray:
        """(len(index), width) numbers in [0, 1): outputs i·width … of SplitMix64, by random access; uint64 wraps."""
        counter = index.astype(np.uint64)[:, None] * np.uint64(width) + np.arange(1, width + 1, dtype=np.uint64)
        z = self._key + counter * GOLDEN
        z = (z ^ (z >> np.uint64(30))) * MIX_1
        z = (z ^ (z >> np.uint64(27))) * MIX_2
        return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def _smallest(x: np.ndarray, count: int) -> np.ndarray:
    """Where the `count` smallest numbers of each row stand, the smallest first."""
    found = np.argpartition(x, count - 1, axis=1)[:, :count]
    return np.take_along_axis(found, np.take_along_axis(x, found, 1).argsort(1), 1)


def _check(pairs: int, length: int, vocab: int, rows: int, split: str, power: float, held_out: int) -> None:
    """Refuse what a user can get wrong, with the nearest valid value; before anything is built."""
    for name, value in (("pairs", pairs), ("rows", rows), ("held_out", held_out)):
        if value < 1:
            raise UserError(f"`{name}` = {value} must be at least 1")
    if 3 * pairs > length:
        raise UserError(
            f"`pairs` = {pairs} need {3 * pairs} tokens (key, value and question each), but a row has {length}; "
            f"use `pairs` {max(1, length // 3)} or `block_size` {3 * pairs}"
        )
    if (vocab - 1) // 2 < pairs:
        raise UserError(
            f"a vocabulary of {vocab} holds {max(0, (vocab - 1) // 2)} keys, fewer than `pairs` {pairs}; use `symbols` "
            f"{2 * pairs + 1} or more"
        )
    if not 0 < power < float("inf"):
        raise UserError(f"`power` = {power} must be a number above 0: 0.01 asks early, 1 asks anywhere")
    if split not in ("train", "val"):
        raise UserError(f"`split` = {split!r} is unknown; it is 'train' or 'val'")


def open_recall(cfg: Config, rows: int, dist) -> Splits:
    d = cfg.data
    options = dict(pairs=d.pairs, length=cfg.model.block_size, vocab=d.symbols, rows=rows, seed=cfg.seed)
    made = {split: RecallData(split=split, **options) for split in ("train", "val")}
    return Splits(made["train"], {"val": made["val"]})


def vocabulary(cfg: Config) -> tuple[int, str]:
    return cfg.data.symbols, "data.symbols"
