"""Prepare: documents → tokens → a sealed folder that training maps into memory; or the documents alone.

    layout "packed", "bin", "rows", "litpkds"   token files (formats.py)  tokenizer.json  index.json (bin: meta.json)
    layout "raw"                                raw-00000.jsonl … of {"text": …}          raw.json

Token files are flat little-endian uint16, or uint32 where the vocabulary needs it. A document is EOT + its tokens: EOT
comes first, so that a document's first token is predicted too. Without `eod`, or if the tokenizer has no EOT, documents
follow each other unmarked; that is usual in rows and litpkds.

Held out  a rule of held_out.py: "hash:0.01" where none is given; in rows and litpkds "last:0.05", as published, except
          from the hub or under num_tokens: "hash:0.05"
Units     tokens, bytes of UTF-8 text (EOT counts as a token of no bytes), documents. Bits per byte: see `bpb`
Memory    a few batches of text, whatever the corpus (build.py)
Safety    all is made aside and renamed at the end (partial.py). After a kill or Ctrl-C the same call goes on where the
          last save was, SAVE_SECONDS ago at most, to the same bytes as an undisturbed one; another command or changed
          sources begin again. An error removes the work, but not a full disk nor an error while a hub is read
Raises    UserError: bad sources, bad settings, existing target, full disk, splits of fewer than two tokens or of no row
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from muonlm.errors import UserError
from muonlm.storage import Growing, full_disk_told, is_full, write

from ..sources.expand import Source, expand, identity, licence
from ..text.tokenizer import made_from_text, resolve_tokenizer
from . import formats
from .build import Job, Progress, build, build_raw, is_file
from .cache import in_cache
from .held_out import parse
from .index import FORMAT_VERSION, checksum, has_tokens, read_index, stored
from .partial import Partial, kept_work, partial_path, refuse_target


def prepare(
    sources,
    to,
    *,
    tokenizer: str = "bpe:4096",
    columns=None,
    val: str | None = None,
    num_tokens: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    layout: str = "packed",
    special: Iterable[str] = (),
    name: str = "",
    split: str = "train",
    eod: bool | None = None,
    block_size: int = 4096,
    wait: bool = False,
) -> dict:
    """Make the sealed folder `to`; returns its index. Interrupted work of the same call is taken up again.

    num_tokens: stop with the piece (≤ 1 MB) of text that brings the training split to so many tokens, and go on only as
    long as the held-out split is empty (under tail and last: shorter than its fraction). name, split: of hub data sets.
    eod: mark documents; None = as usual in the layout. block_size: rows of rows and litpkds hold one token more.
    say: hears what is worth a line (licences, going on, beginning again). wait: for another process at the same target.
    """
    to, tell = Path(to).expanduser(), say or (lambda line: None)
    _check_settings(layout, val, num_tokens, block_size)
    if not partial_path(to).exists():
        refuse_target(to, overwrite)
    files = expand(sources, name=name, split=split)
    hub, special = any(s.form == "hub" for s in files), tuple(special)
    held = parse(val or _usual_rule(layout, hub, num_tokens))
    if held.rule == "-":
        raise UserError(
            "--val - would read standard input several times; save it first and name the file: --val FILE.txt"
        )
    fixed = None if layout == "raw" or made_from_text(tokenizer) else resolve_tokenizer(tokenizer, special=special)
    if hub and layout != "raw" and tokenizer == "char":
        raise UserError(
            "the tokenizer char needs all characters of the text first, and a data set of the hub is too long to be "
            "read twice; take --tokenizer byte, or save a part of it: muonlm prep ID --raw-only --split 'train[:1%]' "
            "--to FOLDER"
        )
    job = Job(
        files=files,
        val_files=expand(held.rule) if held.kind == "path" else [],
        held=held,
        tokenizer=fixed or tokenizer,
        columns=columns,
        num_tokens=num_tokens,
        layout=layout,
        special=special,
        eod=layout not in ("rows", "litpkds") if eod is None else eod,
        block_size=block_size,
        report=progress or (lambda stage, done, total: None),
    )
    for line in dict.fromkeys(filter(None, map(licence, job.files + job.val_files))):
        tell(line)

    def remedy() -> str:
        kept = kept_work(to)
        goes_on = f": it goes on from {kept}; or remove that folder and" if kept else ", or"
        return f"Make room and run the same command again{goes_on} choose another --to"

    with full_disk_told(to, remedy), Partial(to, wait=wait) as job.work:
        return _make(job, overwrite, hub, tell)


def _make(job: Job, overwrite: bool, hub: bool, tell) -> dict:
    """Under the lock: take up earlier work or begin, build, put in place."""
    work = job.work
    work.keep = begun = work.begun  # until it is certain that this command may dispose of it
    job.files = _spool_stdin(job.files, work.path)
    sizes = _stat(job.files + job.val_files)
    job.look_at_sources()
    key = job.key()
    if (state := work.peek(key)) and "sealed" in state and not work.out.exists():
        index = stored(work.to)
        if index and index["checksum"] == state["sealed"]:  # killed right after the rename
            tell(f"{work.to} was finished when the command was stopped")
            return index
    refuse_target(work.to, overwrite)
    job.state = work.load(key) or {"key": key}
    work.keep = hub
    if "splits" in job.state:
        tokens = sum(s.get("tokens", 0) for s in job.state["splits"].values())
        texts = sum(s["documents"] for s in job.state["splits"].values())
        tell(f"going on where the command was stopped: {texts:,} documents, {tokens:,} tokens are done")
    elif begun and len(job.state) == 1:
        tell("what an earlier command left unfinished is of other settings or sources: beginning again")
    try:
        if "sealed" not in job.state:
            index = build_raw(job) if job.layout == "raw" else build(job)
            for source, found in _stat(job.files + job.val_files).items():
                if sizes[source] != found:
                    raise UserError(f"{source} was changed while it was read; run the command again")
            index["checksum"] = checksum(index)
            file = work.out / {"raw": "raw.json", "bin": "meta.json"}.get(job.layout, "index.json")
            write(file, json.dumps(index, indent=1))
            job.save(sealed=index["checksum"])
        work.put_in_place()
        work.keep = False
        return stored(work.to)
    except OSError as error:
        work.keep |= is_full(error)
        raise
    except UserError as error:
        if work.keep:
            raise UserError(f"{error}. What is done is kept: the same command goes on from there") from None
        raise


def prepared(
    source,
    *,
    tokenizer: str = "bpe:4096",
    columns=None,
    val: str = "hash:0.01",
    num_tokens: int | None = None,
    special: Iterable[str] = (),
    name: str = "",
    split: str = "train",
    cache=None,
    progress: Progress | None = None,
) -> Path:
    """The prepared folder behind `--data`: `source` itself if it is one (ours or of another format that is read), else
    made once in the cache and found there again.

    The cache key covers the content of all sources and every setting. Processes may race: one works, the others wait
    and use its folder.
    """
    many = [source] if isinstance(source, (str, Path)) else list(source)
    one = Path(many[0]).expanduser() if len(many) == 1 else ""
    if one and (formats.is_foreign(one) or has_tokens(one)):
        if read_index(one, tokenizer)["layout"] == "examples":
            raise UserError(f"{one} holds conversations, not text; train on them with --train.objective sft or dpo")
        return one
    held, special = parse(val), tuple(special)
    try:
        files = expand(many, name=name, split=split)
    except UserError:
        if one and one.is_dir() and formats.token_files(one):
            raise UserError(f"{one} holds .bin files of unknown names; {formats.EXPECTED}") from None
        raise
    if any(s.name == "-" for s in files):
        raise UserError(
            "standard input can be read only once; save it first: muonlm prep - --to FOLDER, then --data FOLDER"
        )
    if num_tokens is None and any(s.form == "hub" for s in files):
        raise UserError(
            f"{one or 'a data set of the hub'} may have no end for this machine; say how much of it: "
            "--data.num_tokens 1e7, or prepare it once: muonlm prep ID --num-tokens 1e8 --to FOLDER"
        )
    key = {
        "format": FORMAT_VERSION,
        "sources": [identity(s) for s in files],
        "groups": [[*dict.fromkeys(s.group for s in files)].index(s.group) for s in files],  # what shares a weight
        "tokenizer": tokenizer if made_from_text(tokenizer) else resolve_tokenizer(tokenizer).fingerprint,
        "columns": columns if isinstance(columns, str) or columns is None else ",".join(columns),
        "val": [identity(s) for s in expand(val)] if held.kind == "path" else held.rule,
        "more": [num_tokens, special],
    }
    settings = dict(tokenizer=tokenizer, columns=columns, val=val, num_tokens=num_tokens, special=special)

    def make(to: Path) -> None:
        prepare(files, to, **settings, progress=progress, wait=True)

    return in_cache("data", key, read_index, make, cache)


# ----------------------------------------------------------------------------------------------------------------
# small steps


def _check_settings(layout: str, val: str | None, num_tokens: int | None, block_size: int) -> None:
    if layout not in (*formats.LAYOUTS, "raw"):
        raise UserError(f"layout {layout!r} is unknown; it is {', '.join(formats.LAYOUTS)} or raw")
    if num_tokens is not None and num_tokens < 2:
        raise UserError(f"num_tokens={num_tokens}: at least 2 are needed")
    if block_size < 1:
        raise UserError(f"block_size={block_size}: at least 1 is needed; 4096 is usual")
    if layout == "raw" and (val or num_tokens):
        raise UserError(
            "layout raw holds whole documents without tokens or splits: leave --val and --num-tokens to the command "
            "that makes tokens of it (from the hub, --split 'train[:1%]' takes a part)"
        )


def _usual_rule(layout: str, hub: bool, num_tokens: int | None) -> str:
    if layout not in ("rows", "litpkds"):
        return "hash:0.01"
    return "hash:0.05" if hub or num_tokens else "last:0.05"


def _stat(sources: list[Source]) -> dict[str, tuple[int, int]]:
    """File -> (bytes, time of the last change)."""
    found = {str(s.path): s.path.stat() for s in sources if is_file(s)}
    return {path: (info.st_size, info.st_mtime_ns) for path, info in found.items()}


def _spool_stdin(files: list[Source], folder: Path) -> list[Source]:
    """Standard input is read several times below: keep it beside the output until that is sealed."""
    if not any(s.name == "-" for s in files):
        return files
    spool = folder / "stdin.txt"
    with Growing(spool) as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    if not spool.stat().st_size:
        raise UserError("-:1: standard input is empty; pipe some text: cat FILE | muonlm prep - --to FOLDER")
    return [replace(s, path=spool) if s.name == "-" else s for s in files]
