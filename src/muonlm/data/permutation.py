"""Orders that need no memory: a keyed bijection of [0, n), and which part of which epoch a step falls into.

π is a Feistel network on Z_a × Z_b, a = ceil(√n), b = ceil(n / a): alternately l ← l + F(r) mod a and
r ← r + G(l) mod b, each invertible; since a·b < n + a, walking the cycle back into [0, n) is rarely needed. No table of
size n is ever built.

Source   M. Luby, C. Rackoff, "How to construct pseudorandom permutations", SIAM J. Comput. 17 (1988); cycle walking:
         J. Black, P. Rogaway, "Ciphers with arbitrary finite domains" (2002); mixing constants: splitmix64 (S. Vigna)
"""

import hashlib
from collections.abc import Iterator

import numpy as np

ROUNDS = 6  # of the Feistel network; 4 suffice in theory for wide halves, ours are narrow (a, b ~ √n)


def keyed(*what: int) -> np.ndarray:
    """Eight 64-bit keys from integers of any size."""
    return np.frombuffer(hashlib.blake2b(repr(what).encode(), digest_size=64).digest(), dtype="<u8")


class KeyedPermutation:
    """A bijection of [0, n) fixed by (seed, epoch); call it with an integer array of any shape."""

    def __init__(self, n: int, seed: int, epoch: int = 0):
        assert 1 <= n < 2**62, n
        self.n = n
        side = int(np.ceil(np.sqrt(n)))
        self._a, self._b = np.uint64(side), np.uint64(-(-n // side))
        self._keys = keyed(seed, epoch)

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
    """(epoch, places in its order) of this rank's contiguous share of the rows of global step `step`; mostly one pair.

    `samples`: rows of an epoch. Step s has the rows s·rows … (s + 1)·rows − 1 of the run, epoch after epoch.
    """
    assert step >= 0 and 0 <= rank < world, (step, rank, world)
    at, end = step * rows + rows * rank // world, step * rows + rows * (rank + 1) // world
    while at < end:
        epoch = at // samples
        until = min(end, (epoch + 1) * samples)
        yield epoch, np.arange(at, until, dtype=np.int64) - epoch * samples
        at = until
