"""Modular arithmetic: all pairs (a, b) of one operation modulo a prime p, in two splits. For grokking.

    a ∘ b ≡ answer (mod p),   a = 0 … p−1,   b = 0 … p−1, or b = 1 … p−1 where ∘ divides           (1)
    row      [eos, a, op, b, =] → answer                                                           (2)
    x/y      answer = a·b⁻¹ mod p, that is answer·b ≡ a. Drawing (x, y) and writing (x·y, y) → x gives the same rows.
    split    row i goes by the rank of its 64-bit hash under split_seed: the first round(train_fraction·n) train   (3)
    epoch e  rows in the order π_e, a keyed bijection (seed, e); batch k of the epoch holds the places
             k·rows … (k+1)·rows − 1, the last batch being short; step s is batch s mod m of epoch s div m,
             m = ceil(n / rows)                                                                                    (4)

Tokens   0 eos · 1 "=" · then the operations, in the order of OPERATIONS · then the numbers 0 … p−1; 234 at p = 223
Shapes   inputs (B, 5) int64 · targets (B,) int64, the token of the answer
Cost     all p² rows are built at once and held: 0.1 s at p = 223
Raises   UserError for an unknown operation or split, a number that is no prime or above MAX_PRIME, a fraction that
         empties a split
Source   A. Power et al., "Grokking", arXiv:2201.02177, appendix A.1.1 (operations: division is modular in all of them).
         Some ports slip twice: "x//y" as integer division, and x^3+xy^2+y in place of x^3+xy^2+x. Ours are as written.
"""

import difflib
import hashlib
import math
from collections.abc import Iterator

import numpy as np
import torch

from muonlm.config.schema import Config
from muonlm.errors import UserError

from ..batch import Batch, Dataset, Splits
from ..permutation import KeyedPermutation

# name: (symbol in a row, answer before the reduction mod p). `inv` is b⁻¹ mod p, 0 where b = 0.
# The powers are of numbers below MAX_PRIME, so int64 holds them exactly.
OPERATIONS = {
    "x+y": ("+", lambda x, y, inv: x + y),
    "x-y": ("-", lambda x, y, inv: x - y),
    "x/y": ("/", lambda x, y, inv: x * inv),
    "(x//y)if(y%2==1)else(x-y)": ("(x//y)if(y%2==1)else(x-y)", lambda x, y, inv: np.where(y % 2 == 1, x * inv, x - y)),
    "x^2+y^2": ("x^2+y^2", lambda x, y, inv: x**2 + y**2),
    "x^2+xy+y^2": ("x^2+xy+y^2", lambda x, y, inv: x**2 + x * y + y**2),
    "x^2+xy+y^2+x": ("x^2+xy+y^2+x", lambda x, y, inv: x**2 + x * y + y**2 + x),
    "x^3+xy": ("x^3+xy", lambda x, y, inv: x**3 + x * y),
    "x^3+xy^2+x": ("x^3+xy^2+x", lambda x, y, inv: x**3 + x * y**2 + x),
}
DIVIDES = ("x/y", "(x//y)if(y%2==1)else(x-y)")
EOS, EQUALS, FIRST_OPERATION = 0, 1, 2
MAX_PRIME = 4093  # the largest prime below 2^12: 17 million rows, 0.8 GiB


EVALUATED = 1 << 17  # tokens of an evaluation batch


class ModularData(Dataset):
    """One split. `rows`: of the global step; `operations`: how many of OPERATIONS the vocabulary holds."""

    def __init__(
        self,
        *,
        op: str = "x/y",
        prime: int = 223,
        train_fraction: float = 0.5,
        rows: int = 512,
        split: str = "train",
        split_seed: int = 42,
        seed: int = 8,
        operations: int = len(OPERATIONS),
    ):
        _check(op, prime, rows, split, operations)
        names = list(OPERATIONS)
        a, b = (grid.ravel() for grid in np.meshgrid(np.arange(prime), np.arange(op in DIVIDES, prime), indexing="ij"))
        inverse = np.array([0] + [pow(y, -1, prime) for y in range(1, prime)])
        answer = OPERATIONS[op][1](a, b, inverse[b]) % prime

        hashes = hashlib.shake_256(repr((split_seed, len(a))).encode()).digest(8 * len(a))
        order = np.argsort(np.frombuffer(hashes, "<u8"), kind="stable")
        cut = round(train_fraction * len(a)) if math.isfinite(train_fraction) else 0
        if not 0 < cut < len(a):
            raise UserError(
                f"`train_fraction` = {train_fraction} leaves {'no' if cut <= 0 else 'all'} rows of {len(a)} for "
                "training; give a number between 0 and 1, such as 0.5"
            )
        mine = order[:cut] if split == "train" else order[cut:]

        zero = FIRST_OPERATION + operations  # token of the number 0
        self.inputs = torch.empty(len(mine), 5, dtype=torch.int64)
        for place, token in enumerate((EOS, a[mine] + zero, FIRST_OPERATION + names.index(op), b[mine] + zero, EQUALS)):
            self.inputs[:, place] = torch.as_tensor(token)
        self.targets = torch.from_numpy(answer[mine] + zero)
        self.op, self.prime, self.rows, self.split, self.seed = op, prime, rows, split, seed
        self.vocab_size = zero + prime
        contents = hashlib.sha256(repr((self.vocab_size, tuple(self.inputs.shape))).encode())
        for tensor in (self.inputs, self.targets):
            contents.update(tensor.numpy().astype("<i8").tobytes())
        self.fingerprint: str = contents.hexdigest()

    def __len__(self) -> int:
        """Rows of this split."""
        return len(self.inputs)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """This rank's contiguous share of the rows of global step `step`, as in (4); of a short batch maybe none."""
        assert step >= 0 and 0 <= rank < world, (step, rank, world)
        epoch, k = divmod(step, self.steps_per_epoch)
        start, size = k * self.rows, min(self.rows, len(self) - k * self.rows)
        places = np.arange(start + size * rank // world, start + size * (rank + 1) // world)
        return self._take(torch.from_numpy(KeyedPermutation(len(self), self.seed, epoch)(places)))

    def sequential(self, rows: int, rank: int = 0, world: int = 1, *, limit: int = 0) -> Iterator[Batch]:
        """The split (its first `limit` rows) once, in order, `rows` at a time; rank r has n·r/world … n·(r+1)/world."""
        assert rows >= 1 and 0 <= rank < world, (rows, rank, world)
        n = min(limit or len(self), len(self))
        first, last = n * rank // world, n * (rank + 1) // world
        for at in range(first, max(last, first + 1), rows):  # a rank without rows takes part with an empty batch
            yield self._take(slice(at, min(at + rows, last)))

    @property
    def steps_per_epoch(self) -> int:
        """Every epoch ends in a short batch."""
        return math.ceil(len(self) / self.rows)

    def rows_to_evaluate(self, block_size: int) -> int:
        """More than of text: a row is five tokens."""
        return max(1, EVALUATED // block_size)

    def rows_as_dicts(self) -> list[dict]:
        """The split in order, to look at: {"a": 12, "op": "/", "b": 7, "answer": 161}."""
        zero, symbol = self.vocab_size - self.prime, OPERATIONS[self.op][0]
        numbers = torch.stack([self.inputs[:, 1], self.inputs[:, 3], self.targets], dim=1) - zero
        return [{"a": a, "op": symbol, "b": b, "answer": answer} for a, b, answer in numbers.tolist()]

    def _take(self, which) -> Batch:
        targets = self.targets[which]
        return Batch(self.inputs[which], targets, len(targets))


def _check(op: str, prime: int, rows: int, split: str, operations: int) -> None:
    """Refuse what a user can get wrong, with the nearest valid value; before anything is built."""
    if not 1 <= operations <= len(OPERATIONS):
        raise UserError(f"`operations` = {operations}; the vocabulary can hold 1 to {len(OPERATIONS)} operations")
    known = list(OPERATIONS)[:operations]
    if op not in known:
        nearest = difflib.get_close_matches(op, known, n=1, cutoff=0)[0]
        raise UserError(f"`op` = {op!r} is no operation; did you mean {nearest!r}? Choose from: {', '.join(known)}")
    if prime > MAX_PRIME:
        raise UserError(f"`prime` = {prime} would make {prime}² rows; the largest prime taken is {MAX_PRIME}")
    if not _is_prime(prime):
        nearest = min(filter(_is_prime, range(2, MAX_PRIME + 1)), key=lambda p: abs(p - prime))
        raise UserError(f"`prime` = {prime} is not a prime number; the nearest is {nearest}")
    if rows < 1:
        raise UserError(f"`rows` = {rows}: a step needs at least 1 row, such as 512")
    if split not in ("train", "val"):
        raise UserError(f"`split` = {split!r} is unknown; it is 'train' or 'val'")


def _is_prime(n: int) -> bool:
    return n >= 2 and all(n % k for k in range(2, math.isqrt(n) + 1))


def open_modular(cfg: Config, rows: int, dist) -> Splits:
    """Both splits are evaluated: grokking is what lies between their accuracies."""
    d = cfg.data
    options = dict(op=d.op, prime=d.prime, train_fraction=d.train_fraction, operations=d.operations)
    options |= dict(rows=rows, split_seed=cfg.seed, seed=cfg.seed)
    made = {split: ModularData(split=split, **options) for split in ("train", "val")}
    return Splits(made["train"], made)


def vocabulary(cfg: Config) -> tuple[int, str]:
    return FIRST_OPERATION + cfg.data.operations + cfg.data.prime, "end, =, operations and numbers"
