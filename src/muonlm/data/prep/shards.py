"""Shards: the files of one split while they are written. `sync` makes what was written safe and tells how much it is;
opened again with that record, the files are cut back to it and written on, whatever a kill had left.

A shard's hash (blake2b, of the whole file with its header) is taken when it is full, from the disk.
Units    tokens; bytes of UTF-8 text; documents
"""

import json
from pathlib import Path

import numpy as np

from muonlm.errors import UserError
from muonlm.storage import Growing, digest

from ..text.tokenizer import Tokenizer
from . import formats

RAW_SHARD = 1 << 28  # bytes of JSON lines


class Files:
    """Files that grow one after the other, each with a record {"file": name, …, "blake2b": hash once it is full}."""

    def __init__(self, folder: Path, shards: list[dict], size: int):
        """size: bytes of the last file that count, if it is not full."""
        self.folder, self.shards = folder, shards
        self._file: Growing | None = None
        if shards and "blake2b" not in shards[-1]:
            self._file = Growing(folder / shards[-1]["file"], size)

    @property
    def size(self) -> int:
        """Bytes of the file that grows."""
        return 0 if self._file is None else self._file.size

    @property
    def open(self) -> dict | None:
        """The record of the file that grows."""
        return None if self._file is None else self.shards[-1]

    def begin(self, name: str, **record) -> None:
        self.seal()
        (self.folder / name).parent.mkdir(exist_ok=True)
        self._file = Growing(self.folder / name)
        self.shards.append({"file": name, **record})

    def write(self, data: bytes) -> None:
        self._file.write(data)

    def overwrite_start(self, data: bytes) -> None:
        self._file.overwrite_start(data)

    def sync(self) -> None:
        if self._file is not None:
            self._file.sync()

    def seal(self) -> None:
        """The open file is full: sync, close, hash."""
        if self._file is None:
            return
        self._file.close()
        self._file = None
        self.shards[-1]["blake2b"] = digest(self.folder / self.shards[-1]["file"])

    def abandon(self) -> None:
        if self._file is not None:
            self._file.abandon()


class TokenShards:
    """Token files of one split, in one of formats.LAYOUTS."""

    def __init__(self, folder: Path, split: str, layout: str, dtype: np.dtype, block_size: int, saved=None):
        """saved: what `sync` gave."""
        self.split, self.layout, self.row = split, layout, block_size + 1
        self._dtype = dtype.newbyteorder("<")
        self._full = formats.shard_tokens(layout, split, block_size)
        self._offset = len(formats.header(layout, 0))
        saved = saved or {"tokens": 0, "bytes": 0, "documents": 0, "shards": [], "size": 0, "pending": []}
        self.tokens, self.bytes, self.documents = saved["tokens"], saved["bytes"], saved["documents"]
        # Tokens of a row that is not whole yet: files only ever grow, else what a state counts could be gone
        self._pending = np.array(saved["pending"], dtype)
        self.files = Files(folder, saved["shards"], saved["size"])

    def write(self, ids: np.ndarray) -> None:
        files = self.files
        self.tokens += len(ids)
        if self.layout in ("rows", "litpkds"):
            ids = np.concatenate([self._pending, ids])
            whole = len(ids) // self.row * self.row
            ids, self._pending = ids[:whole], ids[whole:]
        while len(ids):
            if files.open is None or files.open["tokens"] == self._full:
                name = formats.shard_file(self.layout, self.split, len(files.shards))
                files.begin(name, tokens=0, **({"offset": self._offset} if self._offset else {}))
                files.write(formats.header(self.layout, self._full))
            room = self._full - files.open["tokens"]
            now, ids = ids[:room], ids[room:]
            files.write(now.astype(self._dtype, copy=False).tobytes())
            files.open["tokens"] += len(now)

    def record(self) -> dict:
        shards = [dict(s) for s in self.files.shards]
        return {"tokens": self.tokens, "bytes": self.bytes, "documents": self.documents, "shards": shards}

    def sync(self) -> dict:
        """The record of what is now safe on the disk."""
        self.files.sync()
        return self.record() | {"size": self.files.size, "pending": self._pending.tolist()}

    def finish(self, tok: Tokenizer) -> None:
        """Nothing follows: an incomplete last row is dropped, the last file's header and hash are made."""
        if len(self._pending):
            special = np.isin(self._pending, list(tok.special.values()))
            # A character whose bytes the cut parts is counted as U+FFFD, three bytes: of no weight beside a row
            self.bytes -= len(tok.decode(self._pending[~special]).encode())
            self.tokens -= len(self._pending)
        if self._offset and self.files.open is not None:
            self.files.overwrite_start(formats.header(self.layout, self.files.open["tokens"]))
        self.files.seal()


class RawShards:
    """Documents as JSON lines {"text": …}; a document that comes in pieces becomes one line, never held whole."""

    def __init__(self, folder: Path, saved=None):
        """saved: what `sync` gave."""
        saved = saved or {"bytes": 0, "documents": 0, "shards": [], "size": 0, "inside": False}
        self.bytes, self.documents = saved["bytes"], saved["documents"]
        self._inside = saved["inside"]  # a document whose line is not ended
        self.files = Files(folder, saved["shards"], saved["size"])

    def write(self, text: str, last: bool) -> None:
        if not text and not self._inside:  # an empty row is no document
            return
        files, data = self.files, json.dumps(text, ensure_ascii=False)[1:-1]
        if not self._inside:
            if files.open is None or files.size >= RAW_SHARD:
                files.begin(f"raw-{len(files.shards):05d}.jsonl", documents=0)
            data = '{"text": "' + data
            self.documents += 1
            files.open["documents"] += 1
        self._inside = not last
        files.write((data + '"}\n' if last else data).encode())
        self.bytes += len(text.encode())

    def record(self) -> dict:
        return {"bytes": self.bytes, "documents": self.documents, "shards": [dict(s) for s in self.files.shards]}

    def sync(self) -> dict:
        """The record of what is now safe on the disk."""
        self.files.sync()
        return self.record() | {"size": self.files.size, "inside": self._inside}

    def finish(self) -> None:
        assert not self._inside
        if not self.documents:
            raise UserError("the sources hold no text, so there is nothing to write; look at their columns (--columns)")
        self.files.seal()
