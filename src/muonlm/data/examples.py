"""Examples: conversations (SFT) and preference pairs (DPO), from a sealed folder (prep/examples.py) into training rows.

Folder   layout "examples": SPLIT-tokens.bin, SPLIT-trained.bin (uint8, 1 = trained), SPLIT-lengths.bin (uint32, two a
         document: tokens, and how many of them precede the first trained one), tokenizer.json, index.json, and the
         template as TEMPLATE.toml.
         An SFT example is one document; a pair is two, chosen then rejected, each behind the prompt that both share.
         What follows a document's last trained token is not stored: it trains nothing and nothing sees it.

A document of n tokens is a segment of n − 1 positions, inputs x_0 … x_{n−2}, targets x_1 … x_{n−1} (IGNORE where not
trained). With T = block_size, a row holds whole items end to end: an item is an example, or a pair (two segments).

    plan   row by row, the largest size left that still fits (first fit decreasing), on counts per size          (1)
    fill   the items of a size go to the slots of that size in an order keyed by (seed, epoch)                   (2)
    order  sample k of the run = step·rows + row;  e = k div R,  row π_e(k mod R) of the plan, keyed by (seed, e)  (3)

The plan depends on the sizes alone, so every epoch has the same R rows, and holds each item exactly once.

Shapes   inputs, targets, segments (B, T) int64; reference (B, S) fp32; B rows, S the most segments of a row
Cost     O(B·T) a batch, files are mapped; O(n) integers an epoch for n items
Raises   UserError: a folder that is altered or of another kind, a block_size that leaves nothing to train
Source   D. S. Johnson et al., "Worst-case performance bounds for simple one-dimensional packing algorithms", SIAM J.
         Comput. 3 (1974): first fit decreasing needs at most 11/9 of the fewest rows, + 4
"""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from muonlm.config.schema import Config
from muonlm.errors import UserError
from muonlm.storage import fingerprint

from .batch import IGNORE, Batch, Dataset, Splits
from .packed import said
from .permutation import KeyedPermutation, epochs_of
from .prep.cache import by_one_rank
from .prep.examples import prepared_examples
from .prep.index import KINDS, open_split, read_examples
from .text.templates import TEMPLATES
from .text.templates import template as find_template

WINDOW = 1 << 22  # bytes of the mask looked at together
EVALUATION = 0  # key of the row order of `sequential`: the same for every run, so that losses compare


class ExampleData(Dataset):
    """One split of a folder made by `prepare_examples`. `rows`: of the global step, over all ranks and micro-batches.

    overlong, for an item of more than T positions: "cut" keeps the first T of an example; of a pair it takes away the
    beginning of the prompt (the same number of tokens from both sides), then ends. "drop" leaves the item out.
    """

    def __init__(
        self,
        path,
        split: str = "train",
        *,
        block_size: int,
        rows: int,
        seed: int,
        pack: bool = True,
        overlong: str = "cut",
    ):
        if overlong not in ("cut", "drop"):
            raise UserError(f"`overlong` = {overlong!r} is unknown; it is cut or drop")
        self.path = Path(path)
        self.index = read_examples(self.path)
        info, self.tokenizer = open_split(self.path, self.index, split, block_size, rows)
        self.split, self.block_size, self.rows, self.seed = split, block_size, rows, seed
        self.kind: str = self.index["kind"]
        self.template: str = _template_of(self.path, self.index)
        self.vocab_size: int = self.tokenizer.vocab_size
        what = [self.index["fingerprint"], bool(pack), overlong, block_size]
        self.fingerprint: str = fingerprint(what)
        self.reference: np.ndarray | None = None  # (num_examples, 2) fp32, set from outside: log-probabilities of pairs
        self._sides = 2 if self.kind == "preferences" else 1  # documents of an item

        dtype = np.dtype(self.index["dtype"]).newbyteorder("<")
        # np.asarray: the same map without memmap's slower indexing
        self._tokens = np.asarray(np.memmap(self.path / info["shards"][0]["file"], dtype, mode="r"))
        self._trained = np.asarray(np.memmap(self.path / info["trained"]["file"], np.uint8, mode="r"))
        lengths = np.fromfile(self.path / info["lengths"]["file"], "<u4").reshape(-1, 2).astype(np.int64)
        self._fit(lengths[:, 0], lengths[:, 1], overlong)
        n = self.num_examples = len(self._size)
        if pack:
            self._first, self._slot = plan(self._size, block_size)
        else:
            self._first, self._slot = np.arange(n + 1), np.arange(n)
        self._samples = len(self._first) - 1
        filled = self._size.sum() / (self._samples * block_size)
        what = KINDS[self.kind].items
        self.notes.insert(0, f"{split}: {n:,} {what} in {self._samples:,} rows of {block_size}, {filled:.1%} filled")
        # The seed of (2), unlike that of (3): else items and rows would move alike.
        self._fill_seed = int.from_bytes(hashlib.blake2b(f"fill {seed}".encode(), digest_size=8).digest())
        self._epoch: tuple[int, KeyedPermutation, np.ndarray] | None = None  # (epoch, π, items by size) last used

    def __len__(self) -> int:
        """Rows in one epoch."""
        return self._samples

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """This rank's contiguous share of the rows of global step `step`; together the ranks hold the world=1 batch."""
        items, per_row = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for epoch, run in epochs_of(step, self.rows, self._samples, rank, world):
            permutation, by_size = self._order(epoch)
            slots, counts = self._slots(permutation(run))
            items.append(by_size[slots])
            per_row.append(counts)
        return self._assemble(np.concatenate(items), np.concatenate(per_row))

    def sequential(self, rows: int, rank: int = 0, world: int = 1, *, limit: int = 0) -> Iterator[Batch]:
        """Every item once over all ranks, in an order that no seed changes; `limit`: the first so many rows of it.

        Rank r gets the rows [n·r/world, n·(r+1)/world), `rows` at a time: ranks may differ by one in the number of
        batches. The plan's own order would put the longest examples first: a keyed order makes `limit` a fair sample.
        """
        for items, per_row in self._in_order(rows, rank, world, limit):
            yield self._assemble(items, per_row)

    def pairs_in_order(self, rows: int) -> Iterator[tuple[Batch, np.ndarray]]:
        """Every pair once, with the numbers (B, P) of the pairs of each row, −1 where a row has fewer."""
        assert self._sides == 2, self.kind
        for items, per_row in self._in_order(rows, 0, 1, 0):
            numbers = np.full((len(per_row), per_row.max(initial=0)), -1, np.int64)
            numbers[np.arange(numbers.shape[1]) < per_row[:, None]] = items
            yield self._assemble(items, per_row), numbers

    def report(self, means: dict[str, float]) -> dict[str, float]:
        """Of conversations, with the perplexity of trained tokens."""
        return means if self._sides == 2 else means | {"perplexity": math.exp(min(means["loss"], 700.0))}

    def first_prompt(self) -> list[int]:
        """The tokens before the first reply of the first example in `sequential` order."""
        batch = next(self.sequential(1))
        first = int((batch.targets[0] != IGNORE).nonzero()[0])
        return batch.inputs[0, : first + 1].tolist()

    def _in_order(self, rows: int, rank: int, world: int, limit: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        by_size, permutation = np.argsort(self._size, kind="stable"), KeyedPermutation(self._samples, EVALUATION)
        n = min(limit or self._samples, self._samples)
        first, last = n * rank // world, n * (rank + 1) // world
        for at in range(first, max(last, first + 1), rows):  # a rank without rows takes part with an empty batch
            slots, per_row = self._slots(permutation(np.arange(at, min(at + rows, last), dtype=np.int64)))
            yield by_size[slots], per_row

    def _order(self, epoch: int) -> tuple[KeyedPermutation, np.ndarray]:
        """π_e of (3), and the items sorted by size, those of one size in the keyed order of (2)."""
        if self._epoch is None or self._epoch[0] != epoch:
            shuffled = KeyedPermutation(self.num_examples, self._fill_seed, epoch)(np.arange(self.num_examples))
            by_size = shuffled[np.argsort(self._size[shuffled], kind="stable")]
            self._epoch = (epoch, KeyedPermutation(self._samples, self.seed, epoch), by_size)
        return self._epoch[1:]

    def _slots(self, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The slots of these rows of the plan, one row after another, and how many each has."""
        counts = self._first[row + 1] - self._first[row]
        return self._slot[_ranges(self._first[row], counts)], counts

    def _assemble(self, items: np.ndarray, per_row: np.ndarray) -> Batch:
        """Rows of `per_row` items each, as a batch."""
        shape, sides = (len(per_row), self.block_size), self._sides
        document = (items[:, None] * sides + np.arange(sides)).ravel()
        per_row = per_row * sides
        ends = np.cumsum(per_row)
        row = np.repeat(np.arange(len(per_row)), per_row)
        segment = np.arange(len(document)) - (ends - per_row)[row]
        length = self._length[document]
        before = np.cumsum(length) - length
        column = before - before[ends - per_row][row]  # no row is empty
        source = _ranges(self._begin[document], length)
        place = _ranges(row * self.block_size + column, length)

        inputs, targets = np.zeros(shape, np.int64), np.full(shape, IGNORE)
        segments = np.full(shape, -1, np.int64)
        inputs.ravel()[place] = self._tokens[source]
        trained = self._trained[source + 1].astype(bool)
        targets.ravel()[place[trained]] = self._tokens[source[trained] + 1]
        segments.ravel()[place] = np.repeat(segment, length)
        batch = Batch(
            torch.from_numpy(inputs),
            torch.from_numpy(targets),
            len(items) if sides == 2 else int(trained.sum()),
            segments=torch.from_numpy(segments),
            pairs=sides == 2,
        )
        if self.reference is not None:
            reference = np.zeros((len(per_row), per_row.max(initial=0)), np.float32)
            reference[row, segment] = self.reference[items].ravel()
            batch.reference = torch.from_numpy(reference)
        return batch

    def _fit(self, tokens: np.ndarray, prompt: np.ndarray, overlong: str) -> None:
        """Where each document that is kept begins, its positions, the size of each item, and what to tell about it."""
        width, sides = self.block_size, self._sides
        begin = (np.cumsum(tokens) - tokens).reshape(-1, sides)
        length = (tokens - 1).reshape(-1, sides)
        long = length.sum(1) > width
        keep = ~long
        if overlong == "cut" and long.any():
            cut_begin, cut = begin[long], length[long]
            if sides == 2:
                # Something must stay in front of the first trained token, to predict it from.
                spare = prompt.reshape(-1, 2)[long].min(1) - 1
                front = np.minimum(-(-(cut.sum(1) - width) // 2), spare)[:, None]
                cut_begin, cut = cut_begin + front, cut - front
                # Then the longer side gives way until both have half; of an odd width the rejected has one more.
                half = np.array([width // 2, width - width // 2])
                cut = np.minimum(cut, np.maximum(half, width - cut[:, ::-1]))
            else:
                cut = np.minimum(cut, width)
            cut = _until_last_trained(self._trained, cut_begin.ravel() + 1, cut.ravel()).reshape(-1, sides)
            begin[long], length[long] = cut_begin, cut
            keep[long] = (cut > 0).all(1)
        self._begin, self._length = begin[keep].ravel(), length[keep].ravel()
        # uint16 where it suffices: numpy sorts it in linear time
        self._size = length[keep].sum(1).astype(np.uint16 if width < 2**16 else np.int64)
        what = KINDS[self.kind].items
        found, kept = int(long.sum()), int((long & keep).sum())
        self.notes: list[str] = []
        if found and overlong == "drop":
            self.notes.append(
                f"{self.split}: {found:,} {what} of more than {width} tokens left out (data.overlong drop)"
            )
        if kept:
            self.notes.append(f"{self.split}: {kept:,} {what} of more than {width} tokens cut (data.overlong cut)")
        if overlong == "cut" and found > kept:
            self.notes.append(
                f"{self.split}: {found - kept:,} {what} left out: cut to {width} tokens, no trained one is left"
            )
        if not len(self._size):
            need = int((tokens - 1).reshape(-1, sides).sum(1).max())
            raise UserError(
                f"{self.path}: none of the {len(long):,} {what} of split {self.split!r} fits a row of `block_size` "
                f"{width} (`overlong` {overlong}); all of them fit with `block_size` {need}"
            )


def plan(size: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(first, slot): row r holds the items A[slot[first[r] : first[r + 1]]] of any arrangement A sorted by size.

    First fit decreasing as in (1), on counts: a row's pattern is repeated while all its sizes last, so the work is
    that of the distinct patterns, not of the items.
    """
    count = np.bincount(size, minlength=width + 1)
    begin = np.cumsum(count) - count
    left = count.tolist()
    below = list(range(width + 1))  # leads to the largest size ≤ s of which some are left; 0 = none

    def largest(s: int) -> int:
        while s and not left[s]:
            below[s] = s = below[s - 1]  # shortens the path for the next time
        return s

    counts, slots = [], []
    while s := largest(width):
        room, pattern = width, []
        while s:
            many = min(left[s], room // s)
            pattern.append((s, many))
            room -= s * many
            s = largest(min(room, s - 1))
        times = min(left[s] // many for s, many in pattern)
        columns = []
        for s, many in pattern:
            used = begin[s] + count[s] - left[s]
            columns.append(np.arange(used, used + times * many).reshape(times, many))
            left[s] -= times * many
        rows = np.concatenate(columns, 1)
        counts.append(np.full(times, rows.shape[1]))
        slots.append(rows.ravel())
    return np.concatenate([[0], np.cumsum(np.concatenate(counts))]), np.concatenate(slots)


def _ranges(begin: np.ndarray, length: np.ndarray) -> np.ndarray:
    """begin_0 … begin_0 + length_0 − 1, begin_1 …, end to end."""
    before = np.cumsum(length) - length
    return np.arange(length.sum()) + np.repeat(begin - before, length)


def _until_last_trained(trained: np.ndarray, begin: np.ndarray, length: np.ndarray) -> np.ndarray:
    """How many of the `length` flags from `begin` on reach to the last one that is set; 0 if none is."""
    out = np.empty_like(length)
    offset = np.arange(length.max(initial=1))
    step = max(1, WINDOW // len(offset))
    for at in range(0, len(begin), step):
        here = slice(at, at + step)
        window = trained[np.minimum(begin[here, None] + offset, len(trained) - 1)].astype(bool)
        window &= offset < length[here, None]
        out[here] = np.where(window.any(1), len(offset) - window[:, ::-1].argmax(1), 0)
    return out


def _template_of(path: Path, index: dict) -> str:
    """What `template` would have to be: a built-in name, or the definition that lies in the folder."""
    definition = index["template"]
    known = TEMPLATES.get(definition["name"])
    if known is not None and find_template(definition) == known:
        return known.name
    return str((path / f"{definition['name']}.toml").resolve())


def open_conversations(cfg: Config, rows: int, dist) -> Splits:
    return _open(cfg, "sft", rows, dist)


def open_preferences(cfg: Config, rows: int, dist) -> Splits:
    return _open(cfg, "preferences", rows, dist)


def _open(cfg: Config, kind: str, rows: int, dist) -> Splits:
    """The splits of a config that names conversations or preferences: prepared once, into the cache."""
    d = cfg.data
    if not d.source:
        raise UserError(
            f"recipe {cfg.recipe} brings no {'preferences' if kind == 'preferences' else 'conversations'} of its own. "
            "Name some: `source` FILE.jsonl (docs/data.md shows the forms), or `source` word_problems:20000:1-3, which "
            "are made here."
        )
    if d.num_tokens:
        raise UserError(
            f"data.num_tokens = {d.num_tokens:,} is for text; conversations are read whole. Leave it out, and say how "
            "long to train with `steps` or `epochs`."
        )
    options = said(cfg) | {"kind": kind, "template": d.template or "qa"}
    folder = by_one_rank(lambda: prepared_examples(d.source, **options), dist)
    shape = dict(block_size=cfg.model.block_size, rows=rows, seed=cfg.seed, pack=d.pack, overlong=d.overlong)
    made = {split: ExampleData(folder, split, **shape) for split in ("train", "val")}
    own = made["train"].template
    if d.template and find_template(d.template) != find_template(own):  # a folder made by prep brings its own
        raise UserError(
            f"{folder} was prepared with template {own}, and {d.template} is wanted; take it as it is with "
            f"`template` {own}, or prepare it again: muonlm prep … --template {d.template}"
        )
    return Splits(made["train"], {"val": made["val"]})
