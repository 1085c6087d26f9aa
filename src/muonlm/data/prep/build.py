"""Build: the work of `prepare`, from the documents to files and their index, in steps that a kill cannot spoil.

Held-out rule, tokenizer, place in the stream and the length of every file are written down (Job.save) in this order,
each after what it stands for is on the disk. Built again from there, the files come out the same: documents have one
order, the held-out side of each is a function of the stream so far, and nothing depends on where batches or saves fall.

Memory    two batches of BATCH characters and what `tokenizers` makes of them; BPE trains on ≤ SAMPLE characters
Raises    UserError: bad text, splits of fewer than two tokens or of no row, a vocabulary that rows cannot hold
"""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import chain

import numpy as np

import muonlm
from muonlm.errors import UserError
from muonlm.storage import fingerprint

from ..sources.expand import PIECE, Document, Source, advance, documents, identity, licence, size
from ..text.tokenizer import Tokenizer, resolve_tokenizer
from . import formats
from .held_out import HeldOut, Sides, digest, digests, limit, settle
from .index import FORMAT_VERSION
from .partial import Partial
from .shards import RawShards, TokenShards

BATCH = 1 << 21  # characters tokenised at once: 128 parts keep all cores busy, and it is small beside torch
SAMPLE = 1 << 25  # characters that BPE is trained on: merges of common words settle long before
SAVE_SECONDS = 5.0  # between saves: what a kill costs at most

Progress = Callable[[str, int, int], None]  # (stage, bytes of text done, bytes of the sources or 0; equal at the end)


@dataclass
class Job:
    """One call of `prepare`: its settings, and how far it is."""

    files: list[Source]
    val_files: list[Source]
    held: HeldOut
    tokenizer: str | Tokenizer  # a spec that needs text, or the tokenizer itself
    columns: list[str] | str | None
    num_tokens: int | None
    layout: str
    special: tuple[str, ...]
    eod: bool
    block_size: int
    report: Progress
    work: Partial | None = None
    total: int = 0  # bytes of the files; 0 = unknown
    records: list[dict] = field(default_factory=list)  # of the sources, for the index
    state: dict = field(default_factory=dict)  # plain values; `save` writes them down

    def look_at_sources(self) -> None:
        sizes = [size(s) for s in self.files + self.val_files]
        self.total = sum(sizes) if all(sizes) else 0
        both = (("train", self.files), ("val", self.val_files))
        self.records = [source_record(s, split) for split, sources in both for s in sources]

    def key(self) -> str:
        """The command and the content of its sources."""
        what = {
            "format": [FORMAT_VERSION, muonlm.__version__, formats.SHARD],
            "sources": self.records,
            "order": [[s.group, s.weight] for s in self.files],
            "val": self.held.rule,
            "tokenizer": self.tokenizer if isinstance(self.tokenizer, str) else self.tokenizer.fingerprint,
            "settings": [self.columns, self.num_tokens, self.layout, self.special, self.eod, self.block_size],
        }
        return fingerprint(what)

    def read(self, start: dict | None = None) -> Iterator[Document]:
        return documents(self.files, columns=self.columns, start=start)

    def save(self, **news) -> None:
        self.state |= news
        self.work.save(self.state)


def build(job: Job) -> dict:
    _decide(job)
    tok, held = _tokenizer(job), job.held
    if job.layout in ("rows", "litpkds") and tok.dtype != np.uint16:
        raise UserError(
            f"the layout {job.layout} holds uint16 ids and this tokenizer has {tok.vocab_size} tokens; use --as packed"
        )
    saved = job.state.get("splits", {})
    splits = {
        name: TokenShards(job.work.out, name, job.layout, tok.dtype, job.block_size, saved.get(name))
        for name in ("train", "val")
    }
    try:
        if held.kind == "path" and job.state.get("phase", "val") == "val":
            whole = Sides(held, state=job.state.get("sides") or {"side": "val"})
            _encode(
                job,
                "val",
                documents(job.val_files, columns=job.columns, start=job.state.get("place")),
                whole,
                splits,
                tok,
            )
            job.save(phase="train", place=None, sides=None, splits={n: s.sync() for n, s in splits.items()})
        known = None
        if held.kind == "path":
            known = digests(documents(job.val_files, columns=job.columns))
        elif held.kind == "last":
            known = digests(job.read(), after=held.cut)
        sides = Sides(held, known, job.state.get("sides"))
        overlap = _encode(job, "train", job.read(job.state.get("place")), sides, splits, tok)
        job.report("tokenise", job.state["done"], job.state["done"])
        for part in splits.values():
            part.finish(tok)
    finally:
        for part in splits.values():
            part.files.abandon()
    _check_splits(job, splits)
    val_record = {"rule": held.rule, "fallback": held.fallback}
    if held.kind != "tail":
        val_record["overlap"] = overlap
    index = _index(job) | {
        "tokenizer": tok.record(),
        "vocab_size": tok.vocab_size,
        "dtype": tok.dtype.name,
        "eod": job.eod and tok.eot_id is not None,
        "splits": {name: part.record() for name, part in splits.items()},
        "val": val_record,
    }
    if job.layout in ("rows", "litpkds"):
        index["block_size"] = job.block_size
    if weights := {s.group: s.weight for s in job.files if s.weight is not None}:
        taken = job.state.get("mixture", {})
        everything = max(1, sum(taken.values()))
        index["mixture"] = [
            {"source": g, "weight": w, "characters": taken.get(g, 0), "share": taken.get(g, 0) / everything}
            for g, w in weights.items()
        ]
    # What training sees: content, not where it lies or when it was made.
    content = {n: [part.tokens, [s["blake2b"] for s in part.files.shards]] for n, part in splits.items()}
    index["fingerprint"] = fingerprint([tok.fingerprint, index["dtype"], content])
    return index


def build_raw(job: Job) -> dict:
    shards = RawShards(job.work.out, job.state.get("splits", {}).get("raw"))
    place, saved = copy.deepcopy(job.state.get("place")) or {}, time.monotonic()
    try:
        for document in job.read(job.state.get("place")):
            advance(place, document)
            shards.write(document.text, document.last)
            if time.monotonic() - saved >= SAVE_SECONDS:
                job.save(place=copy.deepcopy(place), splits={"raw": shards.sync()})
                job.report("write", shards.bytes, job.total)
                saved = time.monotonic()
        shards.finish()
        job.report("write", shards.bytes, shards.bytes)
    finally:
        shards.files.abandon()
    return _index(job) | shards.record()


def _index(job: Job) -> dict:
    return {
        "format_version": FORMAT_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "muonlm": muonlm.__version__,
        "layout": job.layout,
        "sources": job.records,
    }


def _decide(job: Job) -> None:
    """The held-out rule, settled once: what is written down stays."""
    if "held" in job.state:
        job.held = HeldOut(**job.state["held"])
        return
    settle(job.held, job.read, endless=any(s.form == "hub" for s in job.files))
    job.save(held=asdict(job.held))


def _tokenizer(job: Job) -> Tokenizer:
    file = job.work.out / "tokenizer.json"
    if job.state.get("tokenizer"):  # written down after the file was whole
        return Tokenizer.load(file)
    tok = job.tokenizer
    if not isinstance(tok, Tokenizer):
        job.report("make tokenizer", 0, job.total)
        texts = _sample(job)
        if tok == "char":  # the characters of both splits, else held-out text could not be encoded
            texts = chain(job.read(), documents(job.val_files, columns=job.columns) if job.val_files else ())
        tok = resolve_tokenizer(tok, texts, special=job.special)
    tok.save(job.work.out)
    job.save(tokenizer=tok.fingerprint)
    return tok


def _sample(job: Job) -> Iterator[str]:
    """Training text for BPE: all of it, or pieces spread over the corpus by their hash, SAMPLE characters at most; the
    first ones where the length of the corpus is unknown."""
    most = SAMPLE if job.num_tokens is None or job.total else min(SAMPLE, 8 * job.num_tokens)
    sides, taken = Sides(job.held), 0
    for document in job.read():
        for split, piece, _ in sides.parts(document):
            if split != "train":
                continue
            for at in range(0, len(piece.text), 2 * PIECE):  # a row comes whole, however long it is
                text = piece.text[at : at + 2 * PIECE]
                if job.total > SAMPLE and digest(text, b"muonlm sample") >= limit(SAMPLE / job.total):
                    continue
                taken += len(text)
                if taken > most and taken > len(text):
                    return
                yield text


def _encode(job: Job, phase: str, stream, sides: Sides, splits: dict[str, TokenShards], tok: Tokenizer) -> int:
    """Tokenise and write, in order. While `tokenizers` works on a batch (without the GIL), the one before is written
    and the next read. Returns the overlap."""
    eot = np.array([tok.eot_id] if job.eod and tok.eot_id is not None else [], dtype=tok.dtype)
    quota = _Quota(job, phase)
    mixture, done = dict(job.state.get("mixture", {})), job.state.get("done", 0)
    overlap = sides.state.overlap
    place = copy.deepcopy(job.state.get("place")) or {}
    waiting = None
    with ThreadPoolExecutor(1) as worker:
        for batch in chain(_batches(stream, sides, place), [None]):  # None: only the last one is left to write
            work = None
            if batch is not None:
                batch.items = [item for item in batch.items if quota.open(item[0], splits)]
                work = worker.submit(tok.encode_batch, [piece.text for _, piece, _ in batch.items])
            if waiting is not None:
                last, running = waiting
                done += _write(last.items, running, splits, tok, eot, quota, job, mixture)
                overlap = last.overlap
                job.report("tokenise", done, job.total)
                if quota.closed(splits):
                    break
                if last.place is not None:
                    synced = {name: part.sync() for name, part in splits.items()}
                    job.save(
                        phase=phase, place=last.place, sides=last.sides, splits=synced, mixture=dict(mixture), done=done
                    )
            waiting = batch and (batch, work)
    job.state |= {"mixture": mixture, "done": done}
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
            due = time.monotonic() - saved >= SAVE_SECONDS
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
        self.train = job.num_tokens if phase == "train" else None
        self.val = 0
        if self.train is not None and job.held.kind != "path":
            self.val = job.block_size + 1 if job.layout in ("rows", "litpkds") else 2
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


def _write(items, running, splits, tok, eot, quota: _Quota, job: Job, mixture: dict) -> int:
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
    weighted = job.files[0].weight is not None
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


def _check_splits(job: Job, splits: dict[str, TokenShards]) -> None:
    for name, part in splits.items():
        which = "training" if name == "train" else "held-out"
        if job.layout in ("rows", "litpkds") and part.tokens == 0:
            raise UserError(
                f"the {which} split has less than one row of {job.block_size + 1} tokens; give more text, shorter rows "
                f"(--block-size 256) or a larger fraction (--val last:0.2)"
            )
        if part.tokens < 2:
            raise UserError(
                f"the {which} split has {part.tokens} tokens, at least 2 are needed: the corpus is too short for "
                f"--data.val {job.held.rule}; give more text, a larger fraction (tail:0.5), or a file: --data.val PATH"
            )


def is_file(source: Source) -> bool:
    return source.form not in ("hub", "problems")


def source_record(source: Source, split: str) -> dict:
    """What an index says of a source."""
    form, what, _ = identity(source)
    record = {"path": source.name, "split": split, "form": form}
    if is_file(source):
        return record | {"bytes": source.path.stat().st_size, "sha256": what}
    return record | {"identity": what, "licence": licence(source)}
