"""Files: text in pieces and rows of records from one local file, in bounded memory.

    pieces(path, name, size)  text: (text, "name:line" where it begins, whether it is the last)
    rows_of[form](path, …)    records: (number, record) behind the first `skip`; form is rows, parquet or arrow

A piece ends behind a newline between two non-spaces, where the common pre-tokenizers give the tokens of the uncut text,
else at a SAFE_CUT, where GPT-2's does, else between two characters. The pieces of a document join to its text, exactly:
no newline is translated; a UTF-8 BOM is dropped.

Numbers  count lines of JSON (an array's row has the line it begins on), and rows of Parquet and Arrow, from 1
Skipping parses no line of JSON lines, decodes no batch of Arrow and reads no row group of Parquet
Raises   UserError naming file and line, what was found and what to type: binary data, bad UTF-8 with its byte offset,
         broken JSON, gzip, Parquet or Arrow, a missing column, no rows
"""

import codecs
import difflib
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from muonlm.errors import UserError

from ..text.tokenizer import SAFE_CUT

BLOCK = 1 << 20  # bytes read at once
LONGEST = 1 << 26  # characters of one row of a JSON array: a broken one is not read to the file's end
LINE_END = re.compile(r"(?<=\S)\n(?=\S)")
SPACE = re.compile(r"[ \t\r\n]*")
EACH = 'each line must be one object like {"text": "…"}'


# ------------------------------------------------------------------------------------------------------- plain text


def open_bytes(path: Path) -> BinaryIO:
    """Unpacked bytes of a file; "-" is standard input."""
    if str(path) == "-":
        return sys.stdin.buffer
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")


def pieces(path: Path, name: str, size: int) -> Iterator[tuple[str, str, bool]]:
    """Pieces of size … 2·size characters, the last one excepted."""
    held, line, empty = "", 1, True
    for text in _texts(path, name):
        empty = False
        held += text
        while len(held) >= 2 * size:  # so that a cut in the second half always leaves a rest
            cut = _cut(held, size)
            yield held[:cut], f"{name}:{line}", False
            line += held.count("\n", 0, cut)
            held = held[cut:]
    if empty:
        raise UserError(f"{name}:1: {'standard input' if name == '-' else 'the file'} is empty; give some text")
    yield held, f"{name}:{line}", True


def _cut(text: str, size: int) -> int:
    """Where to end a piece: at or after `size` characters, before 2·size."""
    if found := LINE_END.search(text, size, 2 * size):
        return found.end()
    found = SAFE_CUT.search(text, size, 2 * size)
    return found.start() if found else size


def _texts(path: Path, name: str) -> Iterator[str]:
    """The text of a file, block by block, never empty, without a BOM."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, offset, at_start = 1, 0, True
    for block in _blocks(path, name):
        text = _decode(decoder, block, name, line, offset)
        line += text.count("\n")
        offset += len(block)
        if at_start and text:
            text, at_start = text.removeprefix("\ufeff"), False
        if text:
            yield text
    _decode(decoder, b"", name, line, offset)


def _blocks(path: Path, name: str) -> Iterator[bytes]:
    file = open_bytes(path)
    try:
        while block := file.read(BLOCK):
            yield block
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{name} is a broken gzip file ({error}); copy or download it again") from None
    finally:
        if file is not sys.stdin.buffer:
            file.close()


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


# --------------------------------------------------------------------------------------------------- rows of records


def _json_rows(path: Path, name: str, columns: list[str] | None, skip: int) -> Iterator[tuple[int, dict]]:
    is_array = ".jsonl" not in path.name.lower() and next(_texts(path, name), "").lstrip()[:1] == "["
    found = islice(_array(path, name), skip, None) if is_array else _parsed_lines(path, name, skip)
    for number, row in found:
        if not isinstance(row, dict):
            raise UserError(f"{name}:{number}: a {type(row).__name__}, not an object; {EACH}")
        yield number, row


def _parsed_lines(path: Path, name: str, skip: int) -> Iterator[tuple[int, object]]:
    found = 0
    for number, line, offset in _lines(path, name):
        text = _decode(codecs.getincrementaldecoder("utf-8")(), line, name, number, offset)
        if number == 1:
            text = text.removeprefix("\ufeff")
        if not text.strip():
            continue
        found += 1
        if found <= skip:
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _broken(error, name, number) from None
        yield number, row
    if not found:
        raise UserError(f"{name}:1: no rows; {EACH}")


def _broken(error: Exception, name: str, line: int) -> UserError:
    reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
    return UserError(f"{name}:{line}: broken JSON ({reason}); {EACH}")


def _lines(path: Path, name: str) -> Iterator[tuple[int, bytes, int]]:
    """(line number, bytes without the newline, byte offset)."""
    rest, number, offset = b"", 1, 0
    for block in _blocks(path, name):
        *whole, rest = (rest + block).split(b"\n") if b"\n" in block else (rest + block,)
        for line in whole:
            yield number, line, offset
            number += 1
            offset += len(line) + 1
    if rest:
        yield number, rest, offset


def _array(path: Path, name: str) -> Iterator[tuple[int, object]]:
    """Rows of one JSON array. A row that does not parse may be cut by the block's end: it is tried again with more."""
    decoder, texts = json.JSONDecoder(), _texts(path, name)
    held = next(texts)
    at, line, found, wants_comma = held.index("[") + 1, 1, False, False
    line += held.count("\n", 0, at)
    while True:
        start = SPACE.match(held, at).end()
        line, at = line + held.count("\n", at, start), start
        if held[at : at + 1] == "]":
            break
        if wants_comma and held[at : at + 1] == ",":
            at, wants_comma = at + 1, False
            continue
        try:
            if wants_comma:
                raise json.JSONDecodeError("Expecting ',' or ']'", "", 0)
            row, end = decoder.raw_decode(held, at)
        except RecursionError as error:
            raise _broken(error, name, line) from None
        except ValueError as error:
            more = next(texts, "") if len(held) - at < LONGEST else ""
            if not more:
                raise _broken(error, name, line) from None
            held, at = held[at:] + more, 0
            continue
        yield line, row
        line, at, found, wants_comma = line + held.count("\n", at, end), end, True, True
    if not found:
        raise UserError(f"{name}:1: no rows; the array must hold rows")


def _parquet(path: Path, name: str, columns: list[str] | None, skip: int) -> Iterator[tuple[int, dict]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{name}:1: not a readable Parquet file ({_first_line(error)}); copy or download it again"
        ) from None
    with file:
        columns = chosen(columns, file.schema_arrow.names, f"{name}:1")
        if not file.metadata.num_rows:
            raise UserError(f"{name}:1: no rows; give a Parquet file with text in it")
        number, groups = 0, [*range(file.num_row_groups)]
        while groups and number + file.metadata.row_group(groups[0]).num_rows <= skip:
            number += file.metadata.row_group(groups.pop(0)).num_rows
        try:
            for batch in file.iter_batches(batch_size=1024, columns=columns or None, row_groups=groups):
                for row in batch.to_pylist():
                    number += 1
                    if number > skip:
                        yield number, row
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(
                f"{name}:{number + 1}: broken Parquet data ({_first_line(error)}); copy or download it again"
            ) from None


def _arrow(path: Path, name: str, columns: list[str] | None, skip: int) -> Iterator[tuple[int, dict]]:
    """The stream format, which `datasets` writes, and the file format."""
    import pyarrow
    import pyarrow.ipc

    number = 0
    try:
        with pyarrow.memory_map(str(path)) as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            reader = pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)
            columns = chosen(columns, reader.schema.names, f"{name}:1")
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
            for batch in batches:
                if number + batch.num_rows <= skip:
                    number += batch.num_rows
                    continue
                batch = batch.select(columns) if columns else batch
                for part in range(0, batch.num_rows, 1024):
                    for row in batch.slice(part, 1024).to_pylist():
                        number += 1
                        if number > skip:
                            yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{name}:{number + 1}: broken Arrow data ({_first_line(error)}); save or copy it again"
        ) from None
    if not number:
        raise UserError(f"{name}:1: no rows; give a data set with rows in it")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


rows_of = {"rows": _json_rows, "parquet": _parquet, "arrow": _arrow}


# ----------------------------------------------------------------------------------------------------------- columns


def chosen(columns: list[str] | None, found, where: str) -> list[str]:
    """Those to read: the named ones, which must be there, or all (none named); None: `text`, without it `content`."""
    if columns is None:
        columns = ["content" if "content" in found and "text" not in found else "text"]
    for column in columns:
        if column not in found:
            near = (difflib.get_close_matches(column, list(found), 1, 0.5) or list(found))[:1]
            remedy = f"try `columns` {near[0]}" if near else "give a file with such a column"
            raise UserError(f"{where}: no column {column!r}; found {', '.join(found) or 'none'}; {remedy}")
    return columns


def join(row: dict, columns: list[str], where: str) -> str:
    """The text of a row: its columns, joined with a newline."""
    values = []
    for column in columns:
        value = row[column]
        if not isinstance(value, str):
            others = ",".join(k for k, v in row.items() if isinstance(v, str)) or "NAME"
            raise UserError(
                f"{where}: column {column!r} holds {type(value).__name__} {str(value)[:40]!r}, not text; choose text "
                f"columns: `columns` {others}"
            )
        values.append(value)
    try:
        text = "\n".join(values)
        text.isascii() or text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: a lone surrogate (\\ud800 … \\udfff) is no character; take the row out") from None
    return text
