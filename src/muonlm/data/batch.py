"""What data is: a batch of step n, and the Protocol that every data set meets."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from .text.tokenizer import Tokenizer

IGNORE = -100  # torch's cross_entropy default: a target that is not trained
EVALUATED = 1 << 14  # tokens of an evaluation batch


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


class Dataset(Protocol):
    """One split. Who derives from it inherits the answers of data that is neither text nor conversations."""

    vocab_size: int
    fingerprint: str  # of all that batches depend on but seed and rows; a resumed run compares it
    rows: int  # of the global step, over all ranks and micro-batches
    tokenizer: Tokenizer | None = None  # None: tokens are symbols, not text
    template: str = ""  # of conversations: a built-in name or a .toml file
    notes: Sequence[str] = ()  # what is to be told when a run begins

    def __len__(self) -> int:
        """Rows of one epoch."""
        ...

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """This rank's contiguous share of the rows of global step `step`; together the ranks hold the world=1 batch."""
        ...

    def sequential(self, rows: int, rank: int = 0, world: int = 1, *, limit: int = 0) -> Iterator[Batch]:
        """The split (its first `limit` rows) once, in an order that no seed changes, `rows` at a time.

        Rank r has rows n·r/world … n·(r+1)/world − 1: ranks may differ by one in the number of batches, and a rank
        without rows gives one empty batch.
        """
        ...

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps of one epoch; the last may go on into the next, and then this is no whole number."""
        return len(self) / self.rows

    def rows_to_evaluate(self, block_size: int) -> int:
        """Rows of an evaluation batch, where the user does not say."""
        return max(1, EVALUATED // block_size)

    def report(self, means: dict[str, float]) -> dict[str, float]:
        """The means over this split ("loss" in nats per item, and more), with what follows from them."""
        return means

    def first_prompt(self) -> list[int]:
        """The tokens before the first reply of the first conversation; none in any other data."""
        return []

    def text(self, tokens: int) -> bytes:
        """UTF-8 of the first `tokens` tokens of a split of plain text; empty for any other data."""
        return b""


@dataclass
class Splits:
    """Data of a run: what it trains on, and the named splits to evaluate (held-out; for accuracy, training too)."""

    train: Dataset
    evaluated: dict[str, Dataset]  # prefix of the metric -> split read in order

    @property
    def vocab_size(self) -> int:
        return self.train.vocab_size

    @property
    def fingerprint(self) -> str:
        return self.train.fingerprint

    @property
    def template(self) -> str:
        return self.train.template
