"""Examples: conversations (SFT) and preference pairs (DPO), sealed in a folder and packed into training rows.

Folder   layout "examples": SPLIT-tokens.bin, SPLIT-trained.bin (uint8, 1 = trained), SPLIT-lengths.bin (uint32, two a
         document: tokens, and how many of them precede the first trained one), tokenizer.json, index.json, and the
         template as TEMPLATE.toml.
         An SFT example is one document; a pair is two, chosen then rejected, each behind the prompt that both share.
         What follows a document's last trained token is not stored: it trains nothing and nothing sees it.

A document of n tokens is a segment of n − 1 positions, inputs x_0 … x_{n−2}, targets x_1 … x_{n−1} (IGNORE where not
trained). With T = block_size, a row holds whole items end to end: an item is an example, or a pair (two segments).

    plan   row by row, the largest size left that still fits (first fit decreasing), on counts per size          (1)
    fill   the items of a size go to the slots of that size in an order keyed by (seed, epoch)                   (2)
    order  sample k of the run = step·rows + row;  e = k div R,  row π_e(k mod R) of the plan, as in packed.py   (3)

The plan depends on the sizes alone, so every epoch has the same R rows, and holds each item exactly once.

Held out  "hash:F"  examples whose prompt (the first user turn; without one, or if it is blank, the whole example) has a
                    keyed hash below F: equal prompts share a side. Where a side would be empty: tail:F, and the index
                    says so
          "tail:F"  the last F of the examples
          PATH      examples of their own
          Under tail and PATH, training examples whose prompt is held out are left out, and counted.
Shapes   inputs, targets, segments (B, T) int64; reference (B, S) fp32; B rows, S the most segments of a row
Cost     prepare: one pass to read, one to encode, 8 bytes of memory an example. Batches: O(B·T), files are mapped;
         O(n) integers an epoch for n items
Raises   UserError: bad sources or settings, no trained text, a folder that is altered or of another kind
Source   D. S. Johnson et al., "Worst-case performance bounds for simple one-dimensional packing algorithms", SIAM J.
         Comput. 3 (1974): first fit decreasing needs at most 11/9 of the fewest rows, + 4
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

import muonlm

from ..config import UserError
from ..data import held_out
from ..data.build import BATCH, SAMPLE, Progress
from ..data.conversations import Conversation, read_conversations, read_preferences
from ..data.packed import (
    FORMAT_VERSION,
    IGNORE,
    INDEX_NAMES,
    Batch,
    KeyedPermutation,
    canonical,
    checksum,
    read_index,
    remake,
)
from ..data.partial import Partial, refuse_target
from ..data.sources import Source, expand, identity, licence, rows, size
from ..data.templates import TEMPLATES, Template
from ..data.templates import template as find_template
from ..data.tokenizer import Tokenizer, made_from_text, resolve_tokenizer

KINDS = {"sft": "examples", "preferences": "pairs"}  # and what a message calls their items
WINDOW = 1 << 22  # bytes of the mask looked at together
TRAIN, VAL, LEFT_OUT = 0, 1, 2
EVALUATION = 0  # key of the row order of `sequential`: the same for every run, so that losses compare


class ExampleData:
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
        if block_size < 1 or rows < 1:
            raise UserError(f"block_size={block_size}, rows={rows}: both must be at least 1")
        if overlong not in ("cut", "drop"):
            raise UserError(f"data.overlong = {overlong!r} is unknown; it is cut or drop")
        self.path = Path(path)
        self.index = read_examples(self.path)
        if split not in self.index["splits"]:
            raise UserError(f"{self.path} has no split {split!r}; it has {', '.join(self.index['splits'])}")
        self.tokenizer = Tokenizer.load(self.path)
        if self.tokenizer.fingerprint != self.index["tokenizer"]["fingerprint"]:
            raise UserError(
                f"{self.path / 'tokenizer.json'} is not the tokenizer this data was made with; {remake(self.path)}"
            )
        self.split, self.block_size, self.rows, self.seed = split, block_size, rows, seed
        self.kind: str = self.index["kind"]
        self.template: str = _template_of(self.path, self.index)
        self.vocab_size: int = self.tokenizer.vocab_size
        what = [self.index["fingerprint"], bool(pack), overlong, block_size]
        self.fingerprint: str = hashlib.sha256(canonical(what)).hexdigest()
        self.reference: np.ndarray | None = None  # (num_examples, 2) fp32, set from outside: log-probabilities of pairs
        self._sides = 2 if self.kind == "preferences" else 1  # documents of an item

        info = self.index["splits"][split]
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
        what = KINDS[self.kind]
        self.notes.insert(0, f"{split}: {n:,} {what} in {self._samples:,} rows of {block_size}, {filled:.1%} filled")
        # The seed of (2), unlike that of (3): else items and rows would move alike.
        self._fill_seed = int.from_bytes(hashlib.blake2b(f"fill {seed}".encode(), digest_size=8).digest())
        self._epoch: tuple[int, KeyedPermutation, np.ndarray] | None = None  # (epoch, π, items by size) last used

    def __len__(self) -> int:
        """Rows in one epoch."""
        return self._samples

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """This rank's contiguous share of the rows of global step `step`; together the ranks hold the world=1 batch."""
        assert step >= 0 and 0 <= rank < world, (step, rank, world)
        first, last = self.rows * rank // world, self.rows * (rank + 1) // world
        run = np.arange(step * self.rows + first, step * self.rows + last, dtype=np.int64)
        items, per_row = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        at = 0
        while at < len(run):  # one turn per epoch that the step touches: nearly always one
            epoch = int(run[at]) // self._samples
            end = min(len(run), at + (epoch + 1) * self._samples - int(run[at]))
            permutation, by_size = self._order(epoch)
            slots, counts = self._slots(permutation(run[at:end] - epoch * self._samples))
            items.append(by_size[slots])
            per_row.append(counts)
            at = end
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
        what = KINDS[self.kind]
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
                f"{self.path}: none of the {len(long):,} {what} of split {self.split!r} fits a row of model.block_size "
                f"{width} (data.overlong {overlong}); all of them fit with --model.block_size {need}"
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


def read_examples(path) -> dict:
    """The index of a folder of examples after the cheap checks of `read_index`, and of the files beside the tokens."""
    path, index = Path(path), read_index(path)
    if index.get("layout") != "examples":
        raise UserError(
            f"{path} holds packed text, not examples; make them: muonlm prep FILE --as sft --template NAME --to FOLDER"
        )
    for info in index["splits"].values():
        for part, want in (("trained", info["tokens"]), ("lengths", 8 * info["documents"])):
            file = path / info[part]["file"]
            found = file.stat().st_size if file.is_file() else None
            if found != want:
                what = "is missing" if found is None else f"has {found} bytes, its index says {want}"
                raise UserError(f"{file} {what}; {remake(path)}")
    return index


def _template_of(path: Path, index: dict) -> str:
    """What --data.template would have to be: a built-in name, or the definition that lies in the folder."""
    definition = index["template"]
    known = TEMPLATES.get(definition["name"])
    if known is not None and find_template(definition) == known:
        return known.name
    return str((path / f"{definition['name']}.toml").resolve())


# -------------------------------------------------------------------------------------------------------------------
# making the folder


def prepare_examples(
    source,
    to,
    *,
    kind: str,
    template,
    tokenizer: str = "bpe:4096",
    columns=None,
    val: str = "hash:0.01",
    special: Iterable[str] = (),
    name: str = "",
    split: str = "train",
    overwrite: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    wait: bool = False,
) -> dict:
    """Make the sealed folder `to` from conversations (kind "sft") or preference pairs; returns its index.

    template: a name, a .toml file or a Template. A tokenizer that is made from text learns on what the template writes.
    say: hears the licences. wait: for another process at the same target.
    """
    form, special = _checked(kind, template), tuple(special)
    to = Path(to).expanduser()
    refuse_target(to, overwrite)
    fixed = None if made_from_text(tokenizer) else resolve_tokenizer(tokenizer, special=special)
    if fixed is not None:
        form.stop_id(fixed)  # refused before anything is read
    held = held_out.parse(val)
    files = expand(source, name=name, split=split)
    val_files = expand(val) if held.kind == "path" else []
    for line in dict.fromkeys(filter(None, map(licence, files + val_files))):
        (say or (lambda line: None))(line)
    try:
        with Partial(to, wait=wait) as work:
            refuse_target(to, overwrite)  # it may have appeared since
            work.load("")  # nothing is taken up: what an earlier kill left is emptied
            index = _build(files, val_files, work, kind, form, fixed or tokenizer, columns, held, special, progress)
            work.put_in_place()
            return index
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(to.parent).free
        raise UserError(
            f"the disk is full: writing {to} stopped with {free} bytes free; make room, or choose another --to (under train: "
            "export MUONLM_CACHE=DIR)"
        ) from None


def prepared_examples(
    source,
    *,
    kind: str,
    template,
    tokenizer: str = "bpe:4096",
    columns=None,
    val: str = "hash:0.01",
    special: Iterable[str] = (),
    name: str = "",
    split: str = "train",
    cache=None,
    progress: Progress | None = None,
) -> Path:
    """The folder behind `--data`: `source` itself if it is one, else made once in the cache and found there again.

    The cache key covers the content of all sources and every setting; a hub data set counts as what it is on the hub
    now. A folder brings its own template and tokenizer.
    """
    form, special = _checked(kind, template), tuple(special)
    many = [source] if isinstance(source, (str, Path)) else list(source)
    if len(many) == 1 and any((Path(many[0]) / n).is_file() for n in INDEX_NAMES):
        found = read_examples(many[0])["kind"]
        if found != kind:
            raise UserError(
                f"{many[0]} holds {KINDS[found]} ({found}), but {KINDS[kind]} ({kind}) are wanted; "
                f"train it with --train.objective {'sft' if found == 'sft' else 'dpo'}, or give other data"
            )
        return Path(many[0])
    held, files = held_out.parse(val), expand(many, name=name, split=split)
    if any(s.name == "-" for s in files):
        raise UserError(
            "standard input is taken for plain text, and rows are wanted here; save it first: --data FILE.jsonl"
        )
    key = {
        "format": FORMAT_VERSION,
        "kind": kind,
        "template": dataclasses.asdict(form),
        "sources": [identity(s) for s in files],
        "tokenizer": tokenizer if made_from_text(tokenizer) else resolve_tokenizer(tokenizer).fingerprint,
        "special": special,
        "columns": columns if isinstance(columns, str) or columns is None else ",".join(columns),
        "val": [identity(s) for s in expand(val)] if held.kind == "path" else held.rule,
    }
    home = Path(cache or os.environ.get("MUONLM_CACHE") or Path.home() / ".cache" / "muonlm")
    to = home / "examples" / hashlib.sha256(canonical(key)).hexdigest()[:20]
    if to.exists():
        try:
            read_examples(to)
            return to
        except UserError:
            shutil.rmtree(to, ignore_errors=True)  # ours, damaged: a cache may be made anew
    settings = dict(kind=kind, template=form, tokenizer=tokenizer, columns=columns, val=val, special=special)
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        prepare_examples(many, to, **settings, name=name, split=split, progress=progress, wait=True)
    except (UserError, OSError) as error:
        if to.exists():  # another process was first: its folder stands where ours was to go
            read_examples(to)
            return to
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"prepared examples are kept in {home}, which cannot be written ({error.strerror}); "
            "name another place: export MUONLM_CACHE=/tmp/muonlm"
        ) from None
    return to


def _checked(kind: str, template) -> Template:
    if kind not in KINDS:
        raise UserError(f"kind {kind!r} of examples is unknown; it is {' or '.join(KINDS)}")
    return template if isinstance(template, Template) else find_template(template)


class _Spool:
    """Items as JSON lines [where, shared turns, side, …], so that each source is read and understood just once."""

    def __init__(self, file: Path, kind: str, files: list[Source], columns, report):
        self.file, self.kind = file, kind
        self.skipped = {"untrained": 0, "empty": 0} | ({"equal": 0} if kind == "preferences" else {})
        self.prompts, self.bytes = array("Q"), 0  # a digest an item
        total = sum(size(s) for s in files)
        with open(file, "wb") as out:
            for item in self._items(rows(files, columns=columns)):
                if why := _no_use(item[1:]):
                    self.skipped[why] += 1
                    continue
                line = canonical(item) + b"\n"
                out.write(line)
                self.bytes += len(line)
                self.prompts.append(_prompt_digest(item[1:]))
                if len(self.prompts) % 1000 == 0 and self.bytes < total:
                    report("read", self.bytes, total)
        report("read", total, total)
        self.side = np.zeros(len(self.prompts), np.uint8)  # TRAIN, VAL or LEFT_OUT

    def _items(self, records) -> Iterator[list]:
        if self.kind == "sft":
            for conversation, where in read_conversations(records):
                yield [where, [], conversation]
        else:
            for shared, chosen, rejected, where in read_preferences(records):
                yield [where, shared, chosen, rejected]

    def __iter__(self) -> Iterator[tuple[int, int, list]]:
        """(side, bytes, item)."""
        with open(self.file, "rb") as lines:
            for side, line in zip(self.side, lines, strict=True):
                yield int(side), len(line), json.loads(line)

    def prompts_of(self, side: int) -> np.ndarray:
        return np.frombuffer(self.prompts, np.uint64)[self.side == side]


def _no_use(turns: list[Conversation]) -> str:
    """Why an item trains nothing: a side has no answer, or only blank ones, or both are equal. Empty: it trains."""
    _, *sides = turns
    if len(sides) == 2 and sides[0] == sides[1]:
        return "equal"
    for side in sides:
        answers = [turn for turn in side if turn["role"] == "assistant"]
        if not answers:
            return "untrained"
        if not any((turn["content"] + turn.get("rationale", "")).strip() for turn in answers):
            return "empty"
    return ""


def _prompt_digest(turns: list[Conversation]) -> int:
    shared, side, *_ = turns
    first = next((turn for turn in shared + side if turn["role"] == "user"), {})
    prompt = [first.get("content", ""), first.get("input", "")]
    hashed = prompt if "".join(prompt).strip() else turns  # else all examples without a prompt would share a side
    return int.from_bytes(hashlib.blake2b(canonical(hashed), digest_size=8, key=b"muonlm prompt").digest())


def _choose_sides(held: held_out.HeldOut, spools: list[_Spool], what: str) -> None:
    """Fill in each spool's `side`; the second, if there is one, is all held out."""
    first = spools[0]
    prompts, n = np.frombuffer(first.prompts, np.uint64), len(first.prompts)
    if n == 0:
        skipped = ", ".join(f"{count:,} {why}" for why, count in first.skipped.items())
        raise UserError(f"no {what} to train on: of the rows read, {skipped}; give data with answers of the assistant")
    if held.kind == "hash":
        first.side[prompts < np.uint64(int.from_bytes(held_out.limit(held.fraction)))] = VAL
        if len(np.unique(first.side)) == 1:
            first.side[:] = TRAIN
            held.kind, held.fallback = "tail", True
    if held.kind in ("tail", "last"):
        first.side[max(1, min(int((1 - held.fraction) * n), n - 1)) :] = VAL
    for spool in spools[1:]:
        spool.side[:] = VAL
    known = np.concatenate([spool.prompts_of(VAL) for spool in spools])
    first.side[(first.side == TRAIN) & np.isin(prompts, known)] = LEFT_OUT
    if not len(known):
        raise UserError(
            f"there are no {what} to hold out: {f'{n} in all' if len(spools) == 1 else 'none in --data.val'}; "
            "give more, or a file of some: --data.val PATH"
        )
    if not (first.side == TRAIN).any():
        raise UserError(
            f"all {n:,} {what} have the prompt of a held-out one, so none is left to train on; hold out others: "
            "--data.val PATH"
        )


def _learn(spec: str, spools: list[_Spool], form: Template, special: tuple[str, ...], report) -> Tokenizer:
    """The tokenizer of a spec that is made from text: char from all of it, bpe from training text, SAMPLE at most."""
    total = sum(spool.bytes for spool in spools)
    report("make tokenizer", 0, total)
    nth = 1 if spec == "char" else -(-total // SAMPLE)

    def texts() -> Iterator[str]:
        for spool in spools:
            for number, (side, _, (_, shared, *sides)) in enumerate(spool):
                if spec == "char" or (side == TRAIN and number % nth == 0):
                    for turns in sides:
                        yield from form.texts(shared + turns, special)

    return resolve_tokenizer(spec, texts(), special)


class _Writer:
    """Writes one split: three files, hashed on the way, and counts what goes in."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype):
        self.split, self.dtype = split, dtype.newbyteorder("<")
        names = {part: f"{split}-{part}.bin" for part in ("tokens", "trained", "lengths")}
        self.names, self.hashes = names, {part: hashlib.blake2b() for part in names}
        self._files = {part: open(folder / name, "wb") for part, name in names.items()}  # noqa: SIM115, see close
        self.tokens = self.documents = self.targets = 0

    def write(self, documents: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """(ids, trained) of each; trained[0] is False and trained[-1] True."""
        lengths = [(len(ids), int(trained.argmax())) for ids, trained in documents]
        content = {
            "tokens": np.concatenate([ids for ids, _ in documents]).astype(self.dtype, copy=False),
            "trained": np.concatenate([trained for _, trained in documents]).astype(np.uint8),
            "lengths": np.array(lengths, "<u4"),
        }
        for part, values in content.items():
            data = values.tobytes()
            self._files[part].write(data)
            self.hashes[part].update(data)
        self.tokens += len(content["tokens"])
        self.targets += int(content["trained"].sum())
        self.documents += len(documents)

    def close(self) -> None:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()

    def abandon(self) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):  # closing flushes: a full disk says so a second time
                file.close()

    def record(self, sides: int) -> dict:
        files = {part: {"file": name, "blake2b": self.hashes[part].hexdigest()} for part, name in self.names.items()}
        tokens = files.pop("tokens")
        return {
            "examples": self.documents // sides,
            "documents": self.documents,
            "tokens": self.tokens,
            "targets": self.targets,
            "shards": [{"file": tokens["file"], "tokens": self.tokens, "blake2b": tokens["blake2b"]}],
            **files,
        }


def _encode(spools: list[_Spool], writers: dict[int, _Writer], form: Template, tok: Tokenizer, report) -> None:
    """Tokenise BATCH bytes at a time and write them to their splits."""
    total, done = sum(spool.bytes for spool in spools), 0
    batch, size = [], 0

    def flush() -> None:
        conversations = [shared + turns for _, (_, shared, *sides) in batch for turns in sides]
        given = [len(shared) for _, (_, shared, *sides) in batch for _ in sides]
        try:
            encoded = form.encode_batch(conversations, tok, given=given)
        except UserError as error:  # a character outside a char vocabulary: find its row
            for _, (where, shared, *sides) in batch:
                for turns in sides:
                    try:
                        form.encode(shared + turns, tok)
                    except UserError as found:
                        raise UserError(f"{where}: {found}") from None
            raise error
        documents = iter(encoded)
        ready = {side: [] for side in writers}
        for side, (_, _, *sides) in batch:
            ready[side] += [_trimmed(*next(documents)) for _ in sides]
        for side, found in ready.items():
            if found:
                writers[side].write(found)

    for spool in spools:
        for side, length, item in spool:
            done += length
            if side in writers:
                batch.append((side, item))
                size += length
            if size >= BATCH:
                flush()
                batch, size = [], 0
                report("tokenise", done, total)
    if batch:
        flush()
    report("tokenise", total, total)


def _trimmed(ids: np.ndarray, trained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Without what follows the last trained token. The first token is no target, whatever the template says."""
    trained = trained.copy()
    trained[0] = False
    end = len(trained) - int(trained[::-1].argmax())
    assert trained[end - 1], "an answer trains its stop token at least, and something precedes it"
    return ids[:end], trained[:end]


def _build(files, val_files, work: Partial, kind, form, tokenizer, columns, held, special, progress) -> dict:
    report = progress or (lambda stage, done, total: None)
    spools = [_Spool(work.path / "train.jsonl", kind, files, columns, report)]
    if val_files:
        spools.append(_Spool(work.path / "val.jsonl", kind, val_files, columns, report))
    _choose_sides(held, spools, KINDS[kind])
    tok = tokenizer if isinstance(tokenizer, Tokenizer) else _learn(tokenizer, spools, form, special, report)
    writers = {TRAIN: _Writer(work.out, "train", tok.dtype), VAL: _Writer(work.out, "val", tok.dtype)}
    try:
        _encode(spools, writers, form, tok, report)
        for writer in writers.values():
            writer.close()
    finally:
        for writer in writers.values():
            writer.abandon()
    tok.save(work.out)
    definition = json.loads(canonical(dataclasses.asdict(form)))
    # JSON's strings and lists of strings are TOML's too
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in definition.items() if key != "name"]
    (work.out / f"{form.name}.toml").write_text("".join(lines), "utf-8")
    held_prompts = np.concatenate([spool.prompts_of(VAL) for spool in spools])
    index = {
        "format_version": FORMAT_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "muonlm": muonlm.__version__,
        "layout": "examples",
        "kind": kind,
        "template": definition,
        "sources": [_record(s, side) for side, many in (("train", files), ("val", val_files)) for s in many],
        "tokenizer": {
            "kind": tok.kind,
            "vocab_size": tok.vocab_size,
            "eot_id": tok.eot_id,
            "fingerprint": tok.fingerprint,
        },
        "vocab_size": tok.vocab_size,
        "dtype": tok.dtype.name,
        "splits": {w.split: w.record(2 if kind == "preferences" else 1) for w in writers.values()},
        "skipped": {why: sum(s.skipped[why] for s in spools) for why in spools[0].skipped},
        "val": {
            "rule": held.rule,
            "fallback": held.fallback,
            "left_out": int((spools[0].side == LEFT_OUT).sum()),
            "overlap": int(np.isin(spools[0].prompts_of(TRAIN), held_prompts).sum()),
        },
    }
    # What training sees: content, not where it lies or when it was made.
    content = {w.split: {part: h.hexdigest() for part, h in w.hashes.items()} for w in writers.values()}
    what = [tok.fingerprint, index["dtype"], kind, definition, content]
    index["fingerprint"] = hashlib.sha256(canonical(what)).hexdigest()
    index["checksum"] = checksum(index)
    (work.out / INDEX_NAMES[0]).write_text(json.dumps(index, indent=1), "utf-8")
    return index


def _record(source: Source, split: str) -> dict:
    return {"path": source.name, "split": split, "bytes": size(source), "content": identity(source)}
