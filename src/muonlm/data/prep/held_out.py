"""Held-out text: the rule that gives each document of a stream to one of the splits, "train" or "val".

    "hash:F"  a document whose keyed hash, as a number in [0, 1), is below F. The hash is of its first HASHED
              characters: it depends on neither file, order nor F, so equal documents share a side, and raising F only
              adds documents
    "last:F"  the last F of the documents: of n, the first int((1 − F)·n) train
    "tail:F"  the last F of the characters of the whole stream: the first int((1 − F)·characters) train, as nanoGPT
              splits; at least two are held out. A document that is cut becomes two
    PATH      documents of their own

Where hash or last would leave a side empty (one long file) they fall back to tail:F. Under PATH and last, the training
documents that equal a held-out one are counted ("overlap"); under hash there is none.
Cost      hash: a look at the first documents. last and tail: one reading of the stream beforehand, last a second one.
          PATH and last: 8 bytes of memory a held-out document
Raises    UserError for a rule that is none; for last and tail on a stream without an end of its own (a data set hub)
"""

import hashlib
import math
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np

from muonlm.errors import UserError

from ..sources import expand as sources_module
from ..sources.expand import Document

HASHED = 1 << 16  # characters of a document that choose its side
assert HASHED < sources_module.PIECE, "less than a piece, so a side is known before anything is written"

Read = Callable[[], Iterable[Document]]  # the stream from its beginning


@dataclass
class HeldOut:
    """A parsed rule; `settle` fills in what depends on the text."""

    kind: str  # "hash", "last", "tail" or "path"
    fraction: float
    rule: str
    cut: int = 0  # tail: characters that train; last: documents that train
    fallback: bool = False


@dataclass
class State:
    """Where a reading of the stream stands; plain values, so that it can be written down and taken up again."""

    begins: bool = True  # the next piece begins a document
    side: str = "train"  # of the document being read
    at: int = 0  # characters (tail) or documents (last) so far
    overlap: int = 0

    def copy(self) -> dict:
        return asdict(self)


def parse(val: str) -> HeldOut:
    rule = re.fullmatch(r"(hash|last|tail):(.*)", str(val))
    if rule is None:
        if str(val) in ("hash", "last", "tail") or re.fullmatch(r"[0-9.]+", str(val)):
            raise UserError(f"`val` {val} is incomplete; write hash:0.01, tail:0.1 or the path of held-out text")
        return HeldOut("path", 0.0, str(val))
    try:
        fraction = float(rule[2])
    except ValueError:
        fraction = math.nan
    if not 0 < fraction < 1:
        raise UserError(f"`val` {val}: the fraction must lie between 0 and 1, like {rule[1]}:0.1")
    return HeldOut(rule[1], fraction, str(val))


def settle(held: HeldOut, read: Read, *, endless: bool) -> None:
    """Find where a tail or the last documents begin; settle a rule that would leave a split empty.

    endless: the stream is too long to be read beforehand.
    """
    if endless and held.kind in ("last", "tail"):
        raise UserError(
            f"--val {held.rule} needs the length of the whole text, which a data set of the hub does not tell; "
            f"hold documents out by their hash: --val hash:{held.fraction:g}"
        )
    if held.kind == "hash":
        sides = set()
        for document in first_pieces(read()):
            sides.add(digest(document.text) < limit(held.fraction))
            if len(sides) == 2:
                return
        held.kind, held.fallback = "tail", True
    if held.kind == "last":
        documents = sum(1 for _ in first_pieces(read()))
        held.cut = int((1 - held.fraction) * documents)
        if 0 < held.cut < documents:
            return
        held.kind, held.fallback = "tail", True
    if held.kind == "tail":
        characters = sum(len(d.text) for d in read())
        held.cut = max(0, min(int((1 - held.fraction) * characters), characters - 2))


class Sides:
    """Gives the pieces of a stream, in order, to their splits."""

    def __init__(self, held: HeldOut, known: np.ndarray | None = None, state: dict | None = None):
        """known: `digests` of the held-out documents, where overlap is to be counted."""
        self.held, self.known = held, known
        self.state = State(**(state or {}))

    def parts(self, piece: Document) -> list[tuple[str, Document, bool]]:
        """(split, piece, whether a document begins with it): one, or two where the tail's cut lies in it, or none."""
        held, s = self.held, self.state
        if not piece.text:  # an empty row is no document; an empty last piece adds nothing
            s.begins = s.begins or piece.last
            return []
        if s.begins:
            if held.kind == "hash":
                s.side = "val" if digest(piece.text) < limit(held.fraction) else "train"
            elif held.kind == "last":
                s.side = "train" if s.at < held.cut else "val"
                s.at += 1
            if self.known is not None and s.side == "train":
                s.overlap += _among(digest(piece.text), self.known)
        begins, s.begins = s.begins, piece.last
        if held.kind != "tail":
            return [(s.side, piece, begins)]
        room = held.cut - s.at
        s.at += len(piece.text)
        if 0 < room < len(piece.text):
            s.side = "val"
            head, rest = replace(piece, text=piece.text[:room], last=True), replace(piece, text=piece.text[room:])
            return [("train", head, begins), ("val", rest, True)]
        side = "train" if room > 0 else "val"
        begins, s.side = begins or side != s.side, side
        return [(side, piece, begins)]


def digests(stream: Iterable[Document], after: int = 0) -> np.ndarray:
    """Of every document but the first `after`: sorted, 8 bytes each."""
    found = array("Q")
    for number, document in enumerate(first_pieces(stream)):
        if number >= after:
            found.append(int.from_bytes(digest(document.text)))
    return np.unique(np.array(found, np.uint64))


def _among(found: bytes, known: np.ndarray) -> bool:
    value = np.uint64(int.from_bytes(found))
    at = int(np.searchsorted(known, value))
    return bool(at < len(known) and known[at] == value)


def digest(text: str, key: bytes = b"muonlm held-out") -> bytes:
    return hashlib.blake2b(text[:HASHED].encode(), digest_size=8, key=key).digest()


def limit(fraction: float) -> bytes:
    """A digest, read as a big-endian fraction of 2^64, is below `fraction` iff it is below these bytes."""
    return min(int(fraction * 2**64), 2**64 - 1).to_bytes(8, "big")


def first_pieces(stream: Iterable[Document]) -> Iterator[Document]:
    """The first piece of every document that has text."""
    begins = True
    for piece in stream:
        if begins and piece.text:
            yield piece
            begins = piece.last
        else:
            begins = begins or piece.last
