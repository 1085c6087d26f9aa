"""Prepare: documents → tokens → a sealed folder that training maps into memory.

    layout "packed"  train-00000.bin … val-00000.bin …  tokenizer.json  index.json      shards of ≤ SHARD tokens
    layout "bin"     train.bin  val.bin                 tokenizer.json  meta.json       nanoGPT's names, same content

Shards are flat little-endian uint16, or uint32 where the vocabulary needs it. A document is EOT + its tokens: EOT comes
first, so that a document's first token is predicted too. A tokenizer without EOT concatenates documents.

Held out  "hash:F"  a document whose keyed hash, as a number in [0, 1), is below F. The hash is of its first HASHED
                    characters: it depends on neither file, order nor F, so equal documents share a side, and raising F
                    only adds documents. Where a side would be empty (one long file) it falls back to tail:F, and the
                    index says so.
          "tail:F"  the last F of the characters of the whole stream: the first int((1 − F)·characters) train, as
                    nanoGPT splits; at least two are held out. A document that is cut becomes two.
          PATH      documents of their own; the index counts the training documents that equal one ("overlap").
Units     tokens, bytes of UTF-8 text (EOT counts as a token of no bytes), documents. Bits per byte: see `bpb`.
Memory    two batches of BATCH characters and what `tokenizers` makes of them, whatever the corpus; BPE trains on
          ≤ SAMPLE characters; under a PATH rule 8 bytes a held-out document
Safety    all is written aside, synced, renamed at the end; any failure removes it and leaves an older target as it was
Raises    UserError: bad sources, bad settings, existing target, full disk, splits of fewer than two tokens
"""

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

import muonlm

from ..config import UserError
from ..data import sources as sources_module
from ..data.packed import FORMAT_VERSION, INDEX_NAMES, canonical, checksum, read_index, remake
from ..data.sources import Document, Source, documents, expand
from ..data.tokenizer import Tokenizer, made_from_text, resolve_tokenizer

SHARD = 2**28  # tokens: 0.5 GB in uint16
BATCH = 1 << 21  # characters tokenised at once: 128 parts keep all cores busy, and it is small beside torch
SAMPLE = 1 << 25  # characters that BPE is trained on: merges of common words settle long before
HASHED = (
    1 << 16
)  # characters of a document that choose its side; less than a piece, so known before anything is written
assert HASHED < sources_module.PIECE

Progress = Callable[[str, int, int], None]  # (stage, bytes of text done, bytes of the source files)


@dataclass
class _Held:
    """A parsed rule for the held-out split."""

    kind: str  # "hash", "tail" or "path"
    fraction: float
    rule: str
    cut: int = 0  # tail: characters that train
    fallback: bool = False


@dataclass
class _Split:
    """Writes one split's shards and counts what goes in."""

    folder: Path
    name: str
    dtype: np.dtype
    layout: str
    tokens: int = 0
    bytes: int = 0
    documents: int = 0
    shards: list[dict] = field(default_factory=list)
    _file: object = None
    _hash: object = None

    def write(self, ids: np.ndarray) -> None:
        while len(ids):
            if self._file is None or (self.layout == "packed" and self.shards[-1]["tokens"] == SHARD):
                self._next_shard()
            room = SHARD - self.shards[-1]["tokens"] if self.layout == "packed" else len(ids)
            now, ids = ids[:room], ids[room:]
            data = now.astype(self.dtype.newbyteorder("<"), copy=False).tobytes()
            self._file.write(data)
            self._hash.update(data)
            self.shards[-1]["tokens"] += len(now)
            self.tokens += len(now)

    def _next_shard(self) -> None:
        self.close()
        name = f"{self.name}.bin" if self.layout == "bin" else f"{self.name}-{len(self.shards):05d}.bin"
        self._file, self._hash = open(self.folder / name, "wb"), hashlib.blake2b()  # noqa: SIM115, closed by close()
        self.shards.append({"file": name, "tokens": 0})

    def close(self) -> None:
        """Seal the open shard: bytes on the disk, hash in the record."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self.shards[-1]["blake2b"] = self._hash.hexdigest()
            self._file = None

    def abandon(self) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError:  # closing flushes: a full disk says so a second time
                pass

    def record(self) -> dict:
        return {"tokens": self.tokens, "bytes": self.bytes, "documents": self.documents, "shards": self.shards}


def prepare(
    sources,
    to,
    *,
    tokenizer: str = "bpe:4096",
    columns=None,
    val: str = "hash:0.01",
    num_tokens: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    layout: str = "packed",
) -> dict:
    """Make the sealed folder `to` from local sources; returns its index.

    num_tokens: stop with the piece (≤ 1 MB) of text that brings the training split to so many tokens.
    """
    if layout not in ("packed", "bin"):
        raise UserError(f"layout {layout!r} is unknown; it is packed or bin")
    if num_tokens is not None and num_tokens < 2:
        raise UserError(f"num_tokens={num_tokens}: at least 2 are needed")
    to = Path(to).expanduser()
    _refuse_target(to, overwrite)
    files, held = expand(sources), _parse_val(val)
    fixed = None if made_from_text(tokenizer) else resolve_tokenizer(tokenizer)
    val_files = expand(val) if held.kind == "path" else []
    _make_folder(to.parent)
    aside = to.parent / f".{to.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        aside.mkdir()
        files = _spool_stdin(files, aside)
        index = _build(files, val_files, aside, held, fixed or tokenizer, columns, num_tokens, layout, progress)
        for source in {s.path for s in files if s.path.parent == aside}:
            source.unlink()
        _put_in_place(aside, to, overwrite)
        return index
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(to.parent).free
            raise UserError(
                f"the disk is full: writing {to} stopped with {free} bytes free; choose another --to"
            ) from None
        raise
    finally:  # also on Ctrl-C; after success it is gone already
        shutil.rmtree(aside, ignore_errors=True)


def prepared(
    source,
    *,
    tokenizer: str = "bpe:4096",
    columns=None,
    val: str = "hash:0.01",
    cache=None,
    progress: Progress | None = None,
) -> Path:
    """The prepared folder behind `--data`: `source` itself if it is one, else made once in the cache and found there
    again.

    The cache key covers the content of all sources and every setting. Processes may race: each writes aside, one
    rename wins,
    the others use its folder.
    """
    many = [source] if isinstance(source, (str, Path)) else list(source)
    one = many[0] if len(many) == 1 else ""
    if one and any((Path(one) / name).is_file() for name in INDEX_NAMES):
        read_index(one)
        return Path(one)
    held = _parse_val(val)
    files = expand(many)
    if any(s.name == "-" for s in files):
        raise UserError(
            "standard input can be read only once; save it first: muonlm prep - --to FOLDER, then --data FOLDER"
        )
    key = {
        "format": FORMAT_VERSION,
        "sources": [[s.form, _hash_file(s.path)] for s in files],
        "tokenizer": tokenizer if made_from_text(tokenizer) else resolve_tokenizer(tokenizer).fingerprint,
        "columns": columns if isinstance(columns, str) or columns is None else ",".join(columns),
        "val": [[s.form, _hash_file(s.path)] for s in expand(val)] if held.kind == "path" else held.rule,
    }
    home = Path(cache or os.environ.get("MUONLM_CACHE") or Path.home() / ".cache" / "muonlm")
    to = home / "data" / hashlib.sha256(canonical(key)).hexdigest()[:20]
    if to.exists():
        try:
            read_index(to)
            return to
        except UserError:
            shutil.rmtree(to, ignore_errors=True)  # ours, damaged: a cache may be made anew
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        prepare(many, to, tokenizer=tokenizer, columns=columns, val=val, progress=progress)
    except (UserError, OSError) as error:
        if to.exists():  # another process was first: its folder stands where ours was to go
            read_index(to)
            return to
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"prepared text is kept in {home}, which cannot be written ({error.strerror}); "
            "name another place: export MUONLM_CACHE=/tmp/muonlm"
        ) from None
    return to


def verify(path) -> dict:
    """Hash every shard of a prepared folder against its index, which is returned. A UserError names the first file
    that differs."""
    path, index = Path(path), read_index(path)
    for info in index["splits"].values():
        for shard in info["shards"]:
            with open(path / shard["file"], "rb") as file:
                found = hashlib.file_digest(file, hashlib.blake2b).hexdigest()
            if found != shard["blake2b"]:
                raise UserError(
                    f"{path / shard['file']} was altered: its content differs from the recorded hash; {remake(path)}"
                )
    if Tokenizer.load(path).fingerprint != index["tokenizer"]["fingerprint"]:
        raise UserError(
            f"{path / 'tokenizer.json'} was altered: its fingerprint differs from the index; {remake(path)}"
        )
    return index


def bpb(nats_per_token: float, index_split: dict) -> float:
    """Bits per byte of a split from the mean loss over all its targets (its N − 1 tokens after the first):

    bpb = nats_per_token · (N − 1) / (ln 2 · bytes)
    """
    return nats_per_token * (index_split["tokens"] - 1) / (math.log(2) * index_split["bytes"])


# -------------------------------------------------------------------------------------------------------------------
# the work


def _build(files, val_files, aside, held, tokenizer, columns, num_tokens, layout, progress) -> dict:
    report = progress or (lambda stage, done, total: None)
    total = sum(s.path.stat().st_size for s in files + val_files)
    _decide(files, held, columns)
    tok = _tokenizer(tokenizer, files, val_files, held, columns, total, report)
    splits = {name: _Split(aside, name, tok.dtype, layout) for name in ("train", "val")}
    try:
        if held.kind == "path":
            seen: set[bytes] = set()
            val_stream = (
                ("val", d, new) for _, d, new in _assign(documents(val_files, columns=columns), held, seen, None)
            )
            _encode(val_stream, splits, tok, None, report, total)
            overlap = [0]
            stream = _assign(documents(files, columns=columns), held, seen, overlap)
        else:
            stream, overlap = _assign(documents(files, columns=columns), held, None, None), [0]
        _encode(stream, splits, tok, num_tokens, report, total)
        for split in splits.values():
            split.close()
    finally:
        for split in splits.values():
            split.abandon()
    for name, split in splits.items():
        if split.tokens < 2:
            raise UserError(
                f"the {'training' if name == 'train' else 'held-out'} split has {split.tokens} tokens, at least 2 are "
                f"needed: the "
                f"corpus is too short for --data.val {held.rule}; give more text, a larger fraction (tail:0.5), or a "
                f"file: --data.val PATH"
            )
    val_record = {"rule": held.rule, "fallback": held.fallback}
    if held.kind != "tail":
        val_record["overlap"] = overlap[0]
    tok.save(aside)
    index = {
        "format_version": FORMAT_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "muonlm": muonlm.__version__,
        "layout": layout,
        "sources": [_source_record(s, "train") for s in files] + [_source_record(s, "val") for s in val_files],
        "tokenizer": {
            "kind": tok.kind,
            "vocab_size": tok.vocab_size,
            "eot_id": tok.eot_id,
            "fingerprint": tok.fingerprint,
        },
        "vocab_size": tok.vocab_size,
        "dtype": tok.dtype.name,
        "splits": {name: split.record() for name, split in splits.items()},
        "val": val_record,
    }
    # What training sees: content, not where it lies or when it was made.
    content = {name: [split.tokens, [s["blake2b"] for s in split.shards]] for name, split in splits.items()}
    index["fingerprint"] = hashlib.sha256(canonical([tok.fingerprint, index["dtype"], content])).hexdigest()
    index["checksum"] = checksum(index)
    name = INDEX_NAMES[1 if layout == "bin" else 0]
    (aside / name).write_text(json.dumps(index, indent=1), "utf-8")
    return index


def _decide(files: list[Source], held: _Held, columns) -> None:
    """Settle a hash rule that would leave a split empty, and where a tail begins."""
    if held.kind == "hash":
        sides = set()
        for document in _first_pieces(documents(files, columns=columns)):
            sides.add(_digest(document.text) < _limit(held.fraction))
            if len(sides) == 2:
                return
        held.kind, held.fallback = "tail", True
    if held.kind == "tail":
        characters = sum(len(d.text) for d in documents(files, columns=columns))
        held.cut = max(0, min(int((1 - held.fraction) * characters), characters - 2))


def _tokenizer(spec: str | Tokenizer, files, val_files, held, columns, total, report) -> Tokenizer:
    if isinstance(spec, Tokenizer):
        return spec
    report("make tokenizer", 0, total)
    if spec == "char":  # the characters of both splits, else held-out text could not be encoded
        return resolve_tokenizer(spec, documents(files + val_files, columns=columns))
    return resolve_tokenizer(spec, _sample(_assign(documents(files, columns=columns), held, None, None), total))


def _sample(stream, total: int) -> Iterator[str]:
    """Training text for BPE: all of it, or pieces spread over the corpus by their hash, SAMPLE characters at most."""
    taken = 0
    for split, document, _ in stream:
        if split != "train" or (total > SAMPLE and _digest(document.text, b"muonlm sample") >= _limit(SAMPLE / total)):
            continue
        taken += len(document.text)
        if taken > SAMPLE:
            return
        yield document.text


def _assign(stream: Iterable[Document], held: _Held, seen, overlap) -> Iterator[tuple[str, Document, bool]]:
    """(split, piece, whether a document begins with it) for every piece; a piece across the tail's cut comes in two.

    seen, overlap: path rule only. Without overlap, digests are gathered in seen; with it, training documents in seen
    are counted.
    """
    begins, side, at = True, "train", 0
    for piece in stream:
        if begins and held.kind == "hash":
            side = "val" if _digest(piece.text) < _limit(held.fraction) else "train"
        if begins and seen is not None:
            digest = _digest(piece.text)
            if overlap is None:
                seen.add(digest)
            else:
                overlap[0] += digest in seen
        if held.kind == "tail":
            room = held.cut - at
            at += len(piece.text)
            if 0 < room < len(piece.text):
                yield "train", Document(piece.text[:room], piece.origin, True), begins
                yield "val", Document(piece.text[room:], piece.origin, piece.last), True
                side, begins = "val", piece.last
                continue
            new_side = "train" if room > 0 else "val"
            begins, side = begins or new_side != side, new_side
        yield side, piece, begins
        begins = piece.last


def _encode(stream, splits: dict[str, _Split], tok: Tokenizer, num_tokens, report, total: int) -> None:
    """Tokenise and write, in order. While `tokenizers` works on a batch (without the GIL), the one before is written
    and the next read."""
    eot = np.array([] if tok.eot_id is None else [tok.eot_id], dtype=tok.dtype)
    done = 0
    with ThreadPoolExecutor(1) as worker:
        waiting = None
        for batch in _batches(stream):
            job = worker.submit(tok.encode_batch, [piece.text for _, piece, _ in batch])
            if waiting is not None:
                done = _write(*waiting, splits, tok, eot, num_tokens, done)
                report("tokenise", done, total)
                if num_tokens is not None and splits["train"].tokens >= num_tokens:
                    return
            waiting = (batch, job)
        if waiting is not None:
            done = _write(*waiting, splits, tok, eot, num_tokens, done)
            report("tokenise", done, total)


def _write(batch, job, splits, tok, eot, num_tokens, done: int) -> int:
    try:
        encoded = job.result()
    except UserError:  # a character outside a char vocabulary; the tokenizer cannot know the file, so find it
        for _, piece, _ in batch:
            try:
                tok.encode_batch([piece.text])
            except UserError as error:
                raise UserError(f"{piece.origin}: {error}") from None
        raise
    ready: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    queued = 0  # training tokens in `ready`
    for (name, piece, begins), ids in zip(batch, encoded, strict=True):
        if name == "train" and num_tokens is not None and splits["train"].tokens + queued >= num_tokens:
            continue
        split = splits[name]
        if begins:
            ready[name].append(eot)
        ready[name].append(ids)
        if name == "train":
            queued += len(ids) + len(eot) * begins
        size = len(piece.text) if piece.text.isascii() else len(piece.text.encode())
        split.bytes += size
        split.documents += begins
        done += size
    for name, arrays in ready.items():
        if arrays:
            splits[name].write(np.concatenate(arrays))
    return done


def _batches(stream) -> Iterator[list]:
    batch, size = [], 0
    for item in stream:
        if not item[1].text:  # an empty row is no document; an empty last piece adds nothing
            continue
        batch.append(item)
        size += len(item[1].text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ----------------------------------------------------------------------------------------------------------------
# small steps


def _parse_val(val: str) -> _Held:
    rule = re.fullmatch(r"(hash|tail):(.*)", str(val))
    if rule is None:
        if str(val) in ("hash", "tail") or re.fullmatch(r"[0-9.]+", str(val)):
            raise UserError(f"--data.val {val} is incomplete; write hash:0.01, tail:0.1 or the path of held-out text")
        return _Held("path", 0.0, str(val))
    try:
        fraction = float(rule[2])
    except ValueError:
        fraction = math.nan
    if not 0 < fraction < 1:
        raise UserError(f"--data.val {val}: the fraction must lie between 0 and 1, like {rule[1]}:0.1")
    return _Held(rule[1], fraction, str(val))


def _digest(text: str, key: bytes = b"muonlm held-out") -> bytes:
    return hashlib.blake2b(text[:HASHED].encode(), digest_size=8, key=key).digest()


def _limit(fraction: float) -> bytes:
    """A digest, read as a big-endian fraction of 2^64, is below `fraction` iff it is below these bytes."""
    return min(int(fraction * 2**64), 2**64 - 1).to_bytes(8, "big")


def _first_pieces(stream: Iterable[Document]) -> Iterator[Document]:
    begins = True
    for piece in stream:
        if begins and piece.text:
            yield piece
        begins = piece.last


def _hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _source_record(source: Source, split: str) -> dict:
    return {"path": source.name, "split": split, "bytes": source.path.stat().st_size, "sha256": _hash_file(source.path)}


def _spool_stdin(files: list[Source], aside: Path) -> list[Source]:
    """Standard input is read several times below: keep it beside the output until that is sealed."""
    if not any(s.name == "-" for s in files):
        return files
    with open(aside / "stdin.txt", "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    if not (aside / "stdin.txt").stat().st_size:
        raise UserError("-:1: standard input is empty; pipe some text: cat FILE | muonlm prep - --to FOLDER")
    return [Source(aside / "stdin.txt", "-", "text") if s.name == "-" else s for s in files]


def _refuse_target(to: Path, overwrite: bool) -> None:
    if not to.exists() or (to.is_dir() and not any(to.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{to} exists already; add --overwrite to replace it, or choose another --to")
    if not to.is_dir() or not any((to / name).is_file() for name in INDEX_NAMES):
        raise UserError(f"{to} is not prepared data, so --overwrite would delete something else; choose another --to")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}); choose another --to") from None


def _put_in_place(aside: Path, to: Path, overwrite: bool) -> None:
    """Sync, then rename. With `overwrite` an older target steps aside first and comes back if the rename fails."""
    for file in aside.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    old = to.parent / f".{to.name}.old-{os.getpid()}-{secrets.token_hex(4)}"
    replaces = overwrite and to.exists() and any((to / name).is_file() for name in INDEX_NAMES)
    if replaces:
        os.rename(to, old)
    try:
        os.replace(aside, to)  # onto nothing or an empty folder
    except OSError as error:
        if replaces:
            os.rename(old, to)
            raise
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise UserError(f"{to} was made by another process meanwhile; add --overwrite to replace it") from None
        raise
    if replaces:
        shutil.rmtree(old, ignore_errors=True)
    handle = os.open(to.parent, os.O_RDONLY)
    try:
        os.fsync(handle)  # the rename itself
    finally:
        os.close(handle)
