"""Encode: a stream of documents → tokens → the files of its splits, in steps that a kill cannot spoil.

Documents have one order, the held-out side of each is a function of the stream so far, and nothing depends on where
batches or saves fall: taken up again from a save, the files come out the same.

Memory    two batches of BATCH characters and what `tokenizers` makes of them
"""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import chain

import numpy as np

from muonlm.errors import UserError

from ..sources.expand import Document, Source, advance, documents
from ..text.tokenizer import Tokenizer
from . import sealed
from .held_out import HeldOut, Sides
from .options import PrepOptions
from .sealed import Work
from .shards import TokenShards

BATCH = 1 << 21  # characters tokenised at once: 128 parts keep all cores busy, and it is small beside torch

Progress = Callable[[str, int, int], None]  # (stage, bytes of text done, bytes of the sources or 0; equal at the end)


@dataclass
class State:
    """How far the work on text is, in plain values: each is written down after what it stands for is on the disk."""

    held: dict | None = None  # the held-out rule, once it is settled
    tokenizer: str = ""  # fingerprint of out/tokenizer.json, once it is there
    phase: str = "val"  # the stream that is being read: held-out documents of their own, then "train"
    place: dict | None = None  # in that stream
    sides: dict | None = None
    splits: dict = field(default_factory=dict)  # name -> what its files hold
    mixture: dict = field(default_factory=dict)  # source -> characters of training text taken
    done: int = 0  # bytes of text


@dataclass
class Job:
    """What is made of which sources, and how far it is."""

    options: PrepOptions
    files: list[Source]
    val_files: list[Source]
    held: HeldOut
    tokenizer: str | Tokenizer  # a spec that needs text, or the tokenizer itself
    work: Work
    report: Progress
    total: int = 0  # bytes of the files; 0 = unknown
    state: State = field(default_factory=State)

    def read(self, start: dict | None = None) -> Iterator[Document]:
        return documents(self.files, columns=self.options.columns, start=start)

    def read_val(self, start: dict | None = None) -> Iterator[Document]:
        return documents(self.val_files, columns=self.options.columns, start=start)

    def save(self, **news) -> None:
        for name, value in news.items():
            setattr(self.state, name, value)
        self.work.save(asdict(self.state))


def encode(job: Job, phase: str, stream, sides: Sides, splits: dict[str, TokenShards], tok: Tokenizer) -> int:
    """Tokenise and write, in order. While `tokenizers` works on a batch (without the GIL), the one before is written
    and the next read. Returns the overlap."""
    eot = np.array([tok.eot_id] if job.options.marks and tok.eot_id is not None else [], dtype=tok.dtype)
    quota, state = _Quota(job, phase), job.state
    overlap = sides.state.overlap
    place = copy.deepcopy(state.place) or {}
    waiting = None
    with ThreadPoolExecutor(1) as worker:
        for batch in chain(_batches(stream, sides, place), [None]):  # None: only the last one is left to write
            running = None
            if batch is not None:
                batch.items = [item for item in batch.items if quota.open(item[0], splits)]
                running = worker.submit(tok.encode_batch, [piece.text for _, piece, _ in batch.items])
            if waiting is not None:
                last, encoded = waiting
                state.done += _write(last.items, encoded, splits, tok, eot, quota, job)
                overlap = last.overlap
                job.report("tokenise", state.done, job.total)
                if quota.closed(splits):
                    break
                if last.place is not None:
                    synced = {name: part.sync() for name, part in splits.items()}
                    job.save(phase=phase, place=last.place, sides=last.sides, splits=synced)
            waiting = batch and (batch, running)
    return overlap


@dataclass
class _Batch:
    items: list[tuple[str, Document, bool]]
    overlap: int  # behind it, as the next two
    place: dict | None  # in the stream; None = no save is due
    sides: dict | None


def _batches(stream: Iterable[Document], sides: Sides, place: dict) -> Iterator[_Batch]:
    items, characters, saved = [], 0, time.monotonic()
    for document in stream:
        advance(place, document)
        items += sides.parts(document)
        characters += len(document.text)
        if characters >= BATCH:
            due = time.monotonic() - saved >= sealed.SAVE_SECONDS
            if due:
                saved = time.monotonic()
            yield _Batch(
                items, sides.state.overlap, copy.deepcopy(place) if due else None, sides.state.copy() if due else None
            )
            items, characters = [], 0
    if items:
        yield _Batch(items, sides.state.overlap, None, None)


class _Quota:
    """How many tokens num_tokens leaves room for. The held-out split must not stay empty for it."""

    def __init__(self, job: Job, phase: str):
        self.train = job.options.num_tokens if phase == "train" else None
        self.val = 0
        if self.train is not None and job.held.kind != "path":
            self.val = job.options.block_size + 1 if job.options.in_rows else 2
            if job.held.kind in ("tail", "last"):
                self.val = max(self.val, math.ceil(self.train * job.held.fraction / (1 - job.held.fraction)))

    def open(self, name: str, splits, queued: dict[str, int] | None = None) -> bool:
        """Whether a piece for this split is still wanted, `queued` tokens after those written."""
        if self.train is None:
            return True
        queued = queued or {"train": 0, "val": 0}
        if splits["train"].tokens + queued["train"] < self.train:
            return True
        return name == "val" and splits["val"].tokens + queued["val"] < self.val

    def closed(self, splits) -> bool:
        return not self.open("train", splits) and not self.open("val", splits)


def _write(items, running, splits, tok, eot, quota: _Quota, job: Job) -> int:
    """Write an encoded batch; returns its bytes of text."""
    try:
        encoded = running.result()
    except UserError:  # a character outside a char vocabulary; the tokenizer cannot know the file, so find it
        for _, piece, _ in items:
            try:
                tok.encode_batch([piece.text])
            except UserError as error:
                raise UserError(f"{piece.origin}: {error}") from None
        raise
    ready: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    queued, done = {"train": 0, "val": 0}, 0
    weighted, mixture = job.files[0].weight is not None, job.state.mixture
    for (name, piece, begins), ids in zip(items, encoded, strict=True):
        if not quota.open(name, splits, queued):
            continue
        split = splits[name]
        if begins:
            ready[name].append(eot)
        ready[name].append(ids)
        queued[name] += len(ids) + len(eot) * begins
        text_bytes = len(piece.text) if piece.text.isascii() else len(piece.text.encode())
        split.bytes += text_bytes
        split.documents += begins
        done += text_bytes
        if weighted and name == "train":
            group = job.files[piece.source].group
            mixture[group] = mixture.get(group, 0) + len(piece.text)
    for name, arrays in ready.items():
        if arrays:
            splits[name].write(np.concatenate(arrays))
    return done
