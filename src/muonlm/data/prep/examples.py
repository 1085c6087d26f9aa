"""Prepare examples: conversations or preference pairs → a template's tokens → the sealed folder that examples.py reads.

Held out  "hash:F"  examples whose prompt (the first user turn; without one, or if it is blank, the whole example) has a
                    keyed hash below F: equal prompts share a side. Where a side would be empty: tail:F, and the index
                    says so
          "tail:F"  the last F of the examples
          PATH      examples of their own
          Under tail and PATH, training examples whose prompt is held out are left out, and counted.
Cost      one pass to read, one to encode, 8 bytes of memory an example
Raises    UserError: bad sources or settings, no trained text, a folder of another kind
"""

import dataclasses
import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

import muonlm
from muonlm.errors import UserError
from muonlm.storage import Growing, canonical, fingerprint, full_disk_told, write

from ..sources.expand import Source, expand, identity, licence, rows, size
from ..text.conversations import Conversation, read_conversations, read_preferences
from ..text.templates import Template
from ..text.templates import template as find_template
from ..text.tokenizer import Tokenizer, made_from_text, resolve_tokenizer
from . import held_out
from .build import BATCH, SAMPLE, Progress, source_record
from .cache import in_cache
from .index import FORMAT_VERSION, INDEX_NAMES, KINDS, checksum, has_tokens, read_examples
from .partial import Partial, refuse_target

TRAIN, VAL, LEFT_OUT = 0, 1, 2


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
    room = "Make room, or choose another --to (under train: export MUONLM_CACHE=DIR)"
    with full_disk_told(to, lambda: room), Partial(to, wait=wait) as work:
        refuse_target(to, overwrite)  # it may have appeared since
        work.load("")  # nothing is taken up: what an earlier kill left is emptied
        index = _build(files, val_files, work, kind, form, fixed or tokenizer, columns, held, special, progress)
        work.put_in_place()
        return index


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
    one = Path(many[0]).expanduser() if len(many) == 1 else None
    if one and has_tokens(one):
        found = read_examples(one)["kind"]
        if found != kind:
            raise UserError(
                f"{one} holds {KINDS[found]} ({found}), but {KINDS[kind]} ({kind}) are wanted; "
                f"train it with --train.objective {'sft' if found == 'sft' else 'dpo'}, or give other data"
            )
        return one
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
    settings = dict(kind=kind, template=form, tokenizer=tokenizer, columns=columns, val=val, special=special)

    def make(to: Path) -> None:
        prepare_examples(many, to, **settings, name=name, split=split, progress=progress, wait=True)

    return in_cache("examples", key, read_examples, make, cache)


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
        with Growing(file) as out:
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
        self._files = {part: Growing(folder / name) for part, name in names.items()}
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
            file.close()

    def abandon(self) -> None:
        for file in self._files.values():
            file.abandon()

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
    write(work.out / f"{form.name}.toml", "".join(lines))
    held_prompts = np.concatenate([spool.prompts_of(VAL) for spool in spools])
    index = {
        "format_version": FORMAT_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "muonlm": muonlm.__version__,
        "layout": "examples",
        "kind": kind,
        "template": definition,
        "sources": [source_record(s, side) for side, many in (("train", files), ("val", val_files)) for s in many],
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
    content = {w.split: {part: h.hexdigest() for part, h in w.hashes.items()} for w in writers.values()}
    what = [tok.fingerprint, index["dtype"], kind, definition, content]
    index["fingerprint"] = fingerprint(what)
    index["checksum"] = checksum(index)
    write(work.out / INDEX_NAMES[0], json.dumps(index, indent=1))
    return index
