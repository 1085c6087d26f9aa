"""Prepare examples: conversations or preference pairs → a template's tokens → the sealed folder that examples.py reads.

Held out  "hash:F"  examples whose prompt (the first user turn; without one, or if it is blank, the whole example) has a
                    keyed hash below F: equal prompts share a side. Where a side would be empty: tail:F, and the index
                    says so
          "tail:F"  the last F of the examples
          PATH      examples of their own
          Under tail and PATH, training examples whose prompt is held out are left out, and counted.
Steps     read every row once into spools of understood items; choose sides; make the tokenizer; encode. Each is written
          down when it is done, the first and the last while they go on, too: after a kill the same call goes on there
          (sealed.py), to the same bytes
Cost      one pass to read, one to encode, 8 bytes of memory an example
Raises    UserError: bad sources or settings, no trained text, a folder of another kind
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import numpy as np

from muonlm.errors import UserError
from muonlm.storage import Growing, canonical, digest, fingerprint, write

from ..sources.expand import expand, refuse_text
from ..text.templates import Template
from ..text.tokenizer import Tokenizer, resolve_tokenizer
from . import sealed
from .cache import in_cache
from .encode import BATCH, Progress
from .index import INDEX_NAMES, KINDS, checksum, has_tokens, read_examples
from .options import PrepOptions, as_list
from .sealed import Log, refuse_early, tell_licences
from .spool import LEFT_OUT, TRAIN, VAL, Job, Spool, State, choose_sides
from .text import SAMPLE

SPLITS = {TRAIN: "train", VAL: "val"}
PARTS = ("tokens", "trained", "lengths")  # files of a split


def prepare_examples(
    sources,
    to,
    *,
    overwrite: bool = False,
    wait: bool = False,
    log: Log | None = None,
    progress: Progress | None = None,
    **settings,
) -> dict:
    """Make the sealed folder `to` from conversations (kind "sft") or preference pairs; returns its index.

    settings: of PrepOptions. A tokenizer that is made from text learns on what the template writes. wait, log: see
    `sealed`.
    """
    options = PrepOptions(**settings)
    form = options.form
    refuse_early(to, overwrite)
    fixed = options.fixed_tokenizer()
    if fixed is not None:
        form.stop_id(fixed)  # refused before anything is read
    held = options.held()
    files = expand(sources, name=options.name, split=options.split)
    val_files = expand(held.rule) if held.kind == "path" else []
    refuse_text(files + val_files)
    tell_licences(files + val_files, log)
    with sealed.sealed(to, overwrite=overwrite, wait=wait, log=log) as work:
        report = progress or (lambda stage, done, total: None)
        job = Job(options, form, files, val_files, held, fixed or options.tokenizer, work, report)
        if finished := work.begin(files, val_files, _what(job), keep=any(s.form == "hub" for s in files)):
            return finished
        job.state = State(**work.state)
        if read := sum(spool["items"] for spool in job.state.spools):
            done = f"{read:,} examples are read, {job.state.encoded:,} encoded"
            work.log(f"going on where the command was stopped: {done}")
        return work.complete(lambda: _make(job), INDEX_NAMES[0])


def prepared_examples(source, *, cache=None, progress: Progress | None = None, **settings) -> Path:
    """The folder behind `data.source`: itself if it is one, else made once in the cache and found there again.

    settings: of PrepOptions. The cache key covers the content of all sources and every setting; a hub data set counts
    as what it is on the hub now. A folder brings its own template and tokenizer.
    """
    options, many = PrepOptions(**settings), as_list(source)
    kind, form = options.kind, options.form
    one = Path(many[0]).expanduser() if len(many) == 1 else None
    if one and has_tokens(one):
        found = read_examples(one)["kind"]
        if found != kind:
            raise UserError(
                f"{one} holds {KINDS[found].items} ({found}), but {KINDS[kind].items} ({kind}) are wanted; train it "
                f"with `objective` {KINDS[found].objective}, or give other data"
            )
        return one
    files = expand(many, name=options.name, split=options.split)
    if any(s.name == "-" for s in files):
        raise UserError(
            "standard input is taken for plain text, and rows are wanted here; save it first: `source` FILE.jsonl"
        )
    more = {"kind": kind, "template": asdict(form), "special": options.special}

    def make(to: Path) -> None:
        prepare_examples(many, to, progress=progress, wait=True, **settings)

    return in_cache("examples", options.cache_key(files) | more, read_examples, make, cache)


def _what(job: Job) -> dict:
    """What decides the content of the folder beside the content of its sources."""
    o, tok = job.options, job.tokenizer
    return {
        "kind": o.kind,
        "template": asdict(job.form),
        "val": job.held.rule,
        "tokenizer": tok.fingerprint if isinstance(tok, Tokenizer) else tok,
        "settings": [o.column_names, o.special],
    }


def _make(job: Job) -> dict:
    """Fill work.out; returns the index."""
    spools = [Spool(job, 0, job.files)]
    if job.val_files:
        spools.append(Spool(job, 1, job.val_files))
    for spool in spools:
        spool.fill()
    choose_sides(job.held, spools, job.items)
    tok = _tokenizer(job, spools)
    saved = job.state.splits
    writers = {side: _Writer(job.work.out, name, tok.dtype, saved.get(name)) for side, name in SPLITS.items()}
    try:
        _encode(job, spools, writers, tok)
        for writer in writers.values():
            writer.close()
    finally:
        for writer in writers.values():
            writer.abandon()
    definition = json.loads(canonical(asdict(job.form)))
    # JSON's strings and lists of strings are TOML's too
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in definition.items() if key != "name"]
    write(job.work.out / f"{job.form.name}.toml", "".join(lines))
    return _index(job, definition, spools, writers, tok)


def _index(job: Job, definition: dict, spools: list[Spool], writers: dict[int, "_Writer"], tok: Tokenizer) -> dict:
    kind, held = job.options.kind, job.held
    held_prompts = np.concatenate([spool.prompts_of(VAL) for spool in spools])
    index = job.work.header("examples") | {
        "kind": kind,
        "template": definition,
        "sources": job.work.records,
        "tokenizer": tok.record(),
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
    content = {w.split: w.hashes for w in writers.values()}
    index["fingerprint"] = fingerprint([tok.fingerprint, index["dtype"], kind, definition, content])
    index["checksum"] = checksum(index)
    return index


# ------------------------------------------------------------------------------------------------- tokenising, writing


def _tokenizer(job: Job, spools: list[Spool]) -> Tokenizer:
    if job.state.tokenizer:  # written down after the file was whole
        return Tokenizer.load(job.work.out / "tokenizer.json")
    tok = job.tokenizer
    if not isinstance(tok, Tokenizer):
        tok = _learn(tok, spools, job.form, job.options.special, job.report)
    tok.save(job.work.out)
    job.save(tokenizer=tok.fingerprint)
    return tok


def _learn(spec: str, spools: list[Spool], form: Template, special: tuple[str, ...], report) -> Tokenizer:
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
    """Writes the three files of one split, and counts what goes in. saved: what `sync` gave."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, saved: dict | None = None):
        self.split, self.folder, self.dtype = split, folder, dtype.newbyteorder("<")
        counts = saved or {"tokens": 0, "documents": 0, "targets": 0}
        self.tokens, self.documents, self.targets = counts["tokens"], counts["documents"], counts["targets"]
        self.names = {part: f"{split}-{part}.bin" for part in PARTS}
        sizes = saved["sizes"] if saved else dict.fromkeys(PARTS)
        self._files = {part: Growing(folder / name, sizes[part]) for part, name in self.names.items()}
        self.hashes: dict[str, str] = {}  # of the whole files, from the disk

    def write(self, documents: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """(ids, trained) of each; trained[0] is False and trained[-1] True."""
        lengths = [(len(ids), int(trained.argmax())) for ids, trained in documents]
        content = {
            "tokens": np.concatenate([ids for ids, _ in documents]).astype(self.dtype, copy=False),
            "trained": np.concatenate([trained for _, trained in documents]).astype(np.uint8),
            "lengths": np.array(lengths, "<u4"),
        }
        for part, values in content.items():
            self._files[part].write(values.tobytes())
        self.tokens += len(content["tokens"])
        self.targets += int(content["trained"].sum())
        self.documents += len(documents)

    def sync(self) -> dict:
        """The record of what is now safe on the disk."""
        for file in self._files.values():
            file.sync()
        counts = {"tokens": self.tokens, "documents": self.documents, "targets": self.targets}
        return counts | {"sizes": {part: file.size for part, file in self._files.items()}}

    def close(self) -> None:
        for part, file in self._files.items():
            file.close()
            self.hashes[part] = digest(self.folder / self.names[part])

    def abandon(self) -> None:
        for file in self._files.values():
            file.abandon()

    def record(self, sides: int) -> dict:
        files = {part: {"file": name, "blake2b": self.hashes[part]} for part, name in self.names.items()}
        tokens = files.pop("tokens")
        return {
            "examples": self.documents // sides,
            "documents": self.documents,
            "tokens": self.tokens,
            "targets": self.targets,
            "shards": [{"file": tokens["file"], "tokens": self.tokens, "blake2b": tokens["blake2b"]}],
            **files,
        }


def _encode(job: Job, spools: list[Spool], writers: dict[int, _Writer], tok: Tokenizer) -> None:
    """Tokenise BATCH bytes at a time and write them to their splits, behind the items that are encoded already."""
    total, done, number = sum(spool.bytes for spool in spools), 0, 0
    batch, held, saved = [], 0, time.monotonic()  # held: bytes of the batch
    for side, length, item in chain.from_iterable(spools):
        done, number = done + length, number + 1
        if number <= job.state.encoded:
            continue
        if side in writers:
            batch.append((side, item))
            held += length
        if held >= BATCH:
            _encode_batch(batch, writers, job.form, tok)
            batch, held = [], 0
            job.report("tokenise", done, total)
            if time.monotonic() - saved >= sealed.SAVE_SECONDS:
                job.save(encoded=number, splits={w.split: w.sync() for w in writers.values()})
                saved = time.monotonic()
    if batch:
        _encode_batch(batch, writers, job.form, tok)
    job.report("tokenise", total, total)


def _encode_batch(batch: list[tuple[int, list]], writers: dict[int, _Writer], form: Template, tok: Tokenizer) -> None:
    """(side, item) of each."""
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


def _trimmed(ids: np.ndarray, trained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Without what follows the last trained token. The first token is no target, whatever the template says."""
    trained = trained.copy()
    trained[0] = False
    end = len(trained) - int(trained[::-1].argmax())
    assert trained[end - 1], "an answer trains its stop token at least, and something precedes it"
    return ids[:end], trained[:end]
