"""Prepare: documents → tokens → a sealed folder that training maps into memory; or the documents alone.

    layout "packed", "bin", "rows", "litpkds"   token files (formats.py)  tokenizer.json  index.json (bin: meta.json)
    layout "raw"                                raw-00000.jsonl … of {"text": …}          raw.json

Token files are flat little-endian uint16, or uint32 where the vocabulary needs it. A document is EOT + its tokens: EOT
comes first, so that a document's first token is predicted too. Without `eod`, or if the tokenizer has no EOT, documents
follow each other unmarked; that is usual in rows and litpkds.

Held out  a rule of held_out.py: "hash:0.01" where none is given; in rows and litpkds "last:0.05", as published, except
          from the hub or under num_tokens: "hash:0.05"
Units     tokens, bytes of UTF-8 text (EOT counts as a token of no bytes), documents. Bits per byte: packed.bpb
Memory    a few batches of text, whatever the corpus (encode.py); BPE trains on ≤ SAMPLE characters
Safety    all is made aside and renamed at the end (sealed.py). Held-out rule, tokenizer, place in the stream and the
          length of every file are written down in this order, each after what it stands for is on the disk. After a
          kill or Ctrl-C the same call goes on where the last save was, SAVE_SECONDS ago at most, to the same bytes as
          an undisturbed one; another command or changed sources begin again. An error removes the work, but not a
          full disk nor an error while a hub is read
Raises    UserError: bad sources, bad settings, existing target, full disk, bad text, splits of fewer than two tokens or
          of no row, a vocabulary that rows cannot hold
"""

import copy
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import numpy as np

from muonlm.errors import UserError
from muonlm.storage import fingerprint

from ..sources.expand import PIECE, advance, expand, size
from ..text.tokenizer import Tokenizer, resolve_tokenizer
from . import formats, sealed
from .cache import in_cache
from .encode import Job, Progress, State, encode
from .held_out import HeldOut, Sides, digest, digests, limit, settle
from .index import checksum, has_tokens, read_index
from .options import PrepOptions, as_list
from .sealed import Log, refuse_early, tell_licences
from .shards import RawShards, TokenShards

SAMPLE = 1 << 25  # characters that BPE is trained on: merges of common words settle long before


def prepare(
    sources,
    to,
    *,
    overwrite: bool = False,
    wait: bool = False,
    log: Log | None = None,
    progress: Progress | None = None,
    **settings,
) -> dict:
    """Make the sealed folder `to`; returns its index. Interrupted work of the same call is taken up again.

    settings: of PrepOptions. Under num_tokens the work goes on only as long as the held-out split is empty (under tail
    and last: shorter than its fraction). wait, log: see `sealed`.
    """
    options = PrepOptions(**settings)
    refuse_early(to, overwrite)
    files = expand(sources, name=options.name, split=options.split)
    hub, held = any(s.form == "hub" for s in files), options.held(hub=any(s.form == "hub" for s in files))
    if held.rule == "-":
        raise UserError(
            "`val` - would read standard input several times; save it first and name the file: `val` FILE.txt"
        )
    fixed = None if options.layout == "raw" else options.fixed_tokenizer()
    if hub and options.layout != "raw" and options.tokenizer == "char":
        raise UserError(
            "the tokenizer char needs all characters of the text first, and a data set of the hub is too long to be "
            "read twice; take `tokenizer` byte, or save a part of it: muonlm prep ID --raw-only --split 'train[:1%]' "
            "--to FOLDER"
        )
    val_files = expand(held.rule) if held.kind == "path" else []
    tell_licences(files + val_files, log)
    with sealed.sealed(to, overwrite=overwrite, wait=wait, log=log) as work:
        report = progress or (lambda stage, done, total: None)
        files = work.spool_stdin(files)
        job = Job(options, files, val_files, held, fixed or options.tokenizer, work, report)
        if finished := work.begin(job.files, val_files, _what(job), keep=hub):
            return finished
        sizes = [size(s) for s in job.files + val_files]
        job.total = sum(sizes) if all(sizes) else 0
        job.state = State(**work.state)
        if done := job.state.splits:
            tokens, texts = (sum(s.get(unit, 0) for s in done.values()) for unit in ("tokens", "documents"))
            work.log(f"going on where the command was stopped: {texts:,} documents, {tokens:,} tokens are done")
        make = _make_raw if options.layout == "raw" else _make
        return work.complete(
            lambda: make(job), {"raw": "raw.json", "bin": "meta.json"}.get(options.layout, "index.json")
        )


def _what(job: Job) -> dict:
    """What decides the content of the folder beside the content of its sources."""
    o, tok = job.options, job.tokenizer
    return {
        "order": [[s.group, s.weight] for s in job.files],
        "val": job.held.rule,
        "tokenizer": tok.fingerprint if isinstance(tok, Tokenizer) else tok,
        "settings": [o.column_names, o.num_tokens, o.layout, o.special, o.marks, o.block_size, formats.SHARD],
    }


def prepared(source, *, cache=None, progress: Progress | None = None, **settings) -> Path:
    """The prepared folder behind `data.source`: itself if it is one (ours or of another format that is read), else made
    once in the cache and found there again.

    settings: of PrepOptions. The cache key covers the content of all sources and every setting. Processes may race: one
    works, the others wait and use its folder.
    """
    options, many = PrepOptions(**settings), as_list(source)
    one = Path(many[0]).expanduser() if len(many) == 1 else ""
    if one and (formats.is_foreign(one) or has_tokens(one)):
        if read_index(one, options.tokenizer)["layout"] == "examples":
            raise UserError(f"{one} holds conversations, not text; train on them with `objective` sft or dpo")
        return one
    try:
        files = expand(many, name=options.name, split=options.split)
    except UserError:
        if one and one.is_dir() and formats.token_files(one):
            raise UserError(f"{one} holds .bin files of unknown names; {formats.EXPECTED}") from None
        raise
    if any(s.name == "-" for s in files):
        raise UserError(
            "standard input can be read only once; save it first: muonlm prep - --to FOLDER, then `source` FOLDER"
        )
    if options.num_tokens is None and any(s.form == "hub" for s in files):
        raise UserError(
            f"{one or 'a data set of the hub'} may have no end for this machine; say how much of it: "
            "`num_tokens` 1e7, or prepare it once: muonlm prep ID --num-tokens 1e8 --to FOLDER"
        )
    key = options.cache_key(files) | {
        "groups": [[*dict.fromkeys(s.group for s in files)].index(s.group) for s in files],  # what shares a weight
        "more": [options.num_tokens, options.special],
    }

    def make(to: Path) -> None:
        prepare(files, to, progress=progress, wait=True, **settings)

    return in_cache("data", key, read_index, make, cache)


# ---------------------------------------------------------------------------------------------------------- the steps


def _make(job: Job) -> dict:
    """Fill work.out with token files and the tokenizer; returns the index."""
    options, held = job.options, _decide(job)
    tok = _tokenizer(job)
    if options.in_rows and tok.dtype != np.uint16:
        raise UserError(
            f"the layout {options.layout} holds uint16 ids and this tokenizer has {tok.vocab_size} tokens; use "
            "`layout` packed"
        )
    splits = {
        name: TokenShards(job.work.out, name, options.layout, tok.dtype, options.block_size, job.state.splits.get(name))
        for name in ("train", "val")
    }
    try:
        overlap = _encode_splits(job, held, splits, tok)
        job.report("tokenise", job.state.done, job.state.done)
        for part in splits.values():
            part.finish(tok)
    finally:
        for part in splits.values():
            part.files.abandon()
    _check_splits(job, splits)
    return _index(job, tok, splits, overlap)


def _encode_splits(job: Job, held: HeldOut, splits: dict[str, TokenShards], tok: Tokenizer) -> int:
    """All text into the files of its split; returns how many training documents equal a held-out one."""
    if held.kind == "path" and job.state.phase == "val":
        whole = Sides(held, state=job.state.sides or {"side": "val"})
        encode(job, "val", job.read_val(job.state.place), whole, splits, tok)
        job.save(phase="train", place=None, sides=None, splits={n: s.sync() for n, s in splits.items()})
    known = None
    if held.kind == "path":
        known = digests(job.read_val())
    elif held.kind == "last":
        known = digests(job.read(), after=held.cut)
    sides = Sides(held, known, job.state.sides)
    return encode(job, "train", job.read(job.state.place), sides, splits, tok)


def _index(job: Job, tok: Tokenizer, splits: dict[str, TokenShards], overlap: int) -> dict:
    options, held = job.options, job.held
    val = {"rule": held.rule, "fallback": held.fallback}
    if held.kind != "tail":
        val["overlap"] = overlap
    index = job.work.header(options.layout) | {
        "sources": job.work.records,
        "tokenizer": tok.record(),
        "vocab_size": tok.vocab_size,
        "dtype": tok.dtype.name,
        "eod": options.marks and tok.eot_id is not None,
        "splits": {name: part.record() for name, part in splits.items()},
        "val": val,
    }
    if options.in_rows:
        index["block_size"] = options.block_size
    if weights := {s.group: s.weight for s in job.files if s.weight is not None}:
        taken = job.state.mixture
        everything = max(1, sum(taken.values()))
        index["mixture"] = [
            {"source": g, "weight": w, "characters": taken.get(g, 0), "share": taken.get(g, 0) / everything}
            for g, w in weights.items()
        ]
    # What training sees: content, not where it lies or when it was made.
    content = {n: [part.tokens, [s["blake2b"] for s in part.files.shards]] for n, part in splits.items()}
    index["fingerprint"] = fingerprint([tok.fingerprint, index["dtype"], content])
    index["checksum"] = checksum(index)
    return index


def _make_raw(job: Job) -> dict:
    """Fill work.out with the documents as JSON lines; returns the index."""
    shards = RawShards(job.work.out, job.state.splits.get("raw"))
    place, saved = copy.deepcopy(job.state.place) or {}, time.monotonic()
    try:
        for document in job.read(job.state.place):
            advance(place, document)
            shards.write(document.text, document.last)
            if time.monotonic() - saved >= sealed.SAVE_SECONDS:
                job.save(place=copy.deepcopy(place), splits={"raw": shards.sync()})
                job.report("write", shards.bytes, job.total)
                saved = time.monotonic()
        shards.finish()
        job.report("write", shards.bytes, shards.bytes)
    finally:
        shards.files.abandon()
    index = job.work.header("raw") | {"sources": job.work.records} | shards.record()
    return index | {"checksum": checksum(index)}


def _decide(job: Job) -> HeldOut:
    """The held-out rule, settled once: what is written down stays."""
    if job.state.held:
        job.held = HeldOut(**job.state.held)
    else:
        settle(job.held, job.read, endless=any(s.form == "hub" for s in job.files))
        job.save(held=asdict(job.held))
    return job.held


def _tokenizer(job: Job) -> Tokenizer:
    if job.state.tokenizer:  # written down after the file was whole
        return Tokenizer.load(job.work.out / "tokenizer.json")
    tok = job.tokenizer
    if not isinstance(tok, Tokenizer):
        job.report("make tokenizer", 0, job.total)
        texts = _sample(job)
        if tok == "char":  # the characters of both splits, else held-out text could not be encoded
            texts = chain(job.read(), job.read_val() if job.val_files else ())
        tok = resolve_tokenizer(tok, texts, special=job.options.special)
    tok.save(job.work.out)
    job.save(tokenizer=tok.fingerprint)
    return tok


def _sample(job: Job) -> Iterator[str]:
    """Training text for BPE: all of it, or pieces spread over the corpus by their hash, SAMPLE characters at most; the
    first ones where the length of the corpus is unknown."""
    most = SAMPLE if job.options.num_tokens is None or job.total else min(SAMPLE, 8 * job.options.num_tokens)
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


def _check_splits(job: Job, splits: dict[str, TokenShards]) -> None:
    for name, part in splits.items():
        which = "training" if name == "train" else "held-out"
        if job.options.in_rows and part.tokens == 0:
            raise UserError(
                f"the {which} split has less than one row of {job.options.block_size + 1} tokens; give more text, "
                f"shorter rows (`block_size` 256) or a larger fraction (`val` last:0.2)"
            )
        if part.tokens < 2:
            raise UserError(
                f"the {which} split has {part.tokens} tokens, at least 2 are needed: the corpus is too short for "
                f"`val` {job.held.rule}; give more text, a larger fraction (tail:0.5), or a file: `val` PATH"
            )
