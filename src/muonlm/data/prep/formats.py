"""Formats: how prepared tokens lie on the disk, ours and other people's. Ids are flat and little-endian.

    packed    train-00000.bin …  val-00000.bin …                                uint16 or uint32, ≤ SHARD tokens each
    bin       train.bin  val.bin                                                the same, one file a split (nanoGPT)
    rows      train/train_slim_00000.bin …  validation/validation_00000.bin …   uint16, rows of block_size + 1 tokens
    litpkds   train/train_slim_0000000000.bin …  validation/validation_…        the same rows behind a header

    header (24 bytes) = b"LITPKDS" · uint64 version = 1 · uint8 code = 8 (uint16) · uint64 tokens in the file       (1)

Rows follow each other in the stream without a gap, so that any of these is a stream of tokens with files as shards; the
rows of a file are of interest to other readers only. A last, incomplete row is dropped. Only the last file of a split
may be shorter, and its header says so; a reader that takes one size for all files (TinyLlama's) should skip that one.

Foreign   a folder without our index is read where its files have these names, at its top or in train/, validation/,
          val/: train.bin and val.bin; train_*.bin and validation*.bin or val_*.bin, each with or without (1). It names
          no tokenizer unless tokenizer.json lies in it: the caller does. A meta.pkl is never opened: a pickle can run
          any program. Text bytes are counted from the ids, beyond EXACT tokens extrapolated
Cost      foreign_index reads headers, a few blocks of each file and ≤ EXACT tokens a split
Raises    UserError for files that are short, odd-sized, of another type or another tokenizer, naming what is expected
Source    the format: Lit-GPT's packed data set; nanoGPT's data/*/prepare.py
"""

import hashlib
import json
import struct
from pathlib import Path

import numpy as np

from muonlm.errors import UserError
from muonlm.storage import fingerprint

from ..text.tokenizer import Tokenizer, made_from_text, resolve_tokenizer

LAYOUTS = ("packed", "bin", "rows", "litpkds")
SHARD = 2**28  # tokens of a packed shard: 0.5 GB in uint16
ROWS = {"train": 100_000, "val": 10_000}  # rows of a headerless file
LITPKDS_ROWS = 1000  # of a file with header: its readers want many files (8 a process), 8 MB each at 4097
NAMES = {"train": "train/train_slim", "val": "validation/validation"}
MAGIC, HEADER = b"LITPKDS", struct.Struct("<7sQBQ")  # (1)
CODES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float32", 7: "float64", 8: "uint16"}
EXPECTED = (
    "expected: train_slim*.bin and validation*.bin (or train_*.bin and val_*.bin, or train.bin and val.bin), "
    "little-endian uint16, rows of block_size + 1 tokens (4097), with or without a LITPKDS header"
)
FOLDERS = (".", "train", "validation", "val")
LOOK = 1 << 16  # tokens looked at in each of three places of a file
EXACT = 1 << 26  # tokens of a split whose text bytes are counted: 0.3 s


# -------------------------------------------------------------------------------------------------------- what we write


def shard_file(layout: str, split: str, number: int) -> str:
    if layout == "packed":
        return f"{split}-{number:05d}.bin"
    if layout == "bin":
        return f"{split}.bin"
    return f"{NAMES[split]}_{number:0{10 if layout == 'litpkds' else 5}d}.bin"


def shard_tokens(layout: str, split: str, block_size: int) -> int:
    """Tokens that fill a file."""
    if layout in ("packed", "bin"):
        return SHARD if layout == "packed" else 2**62
    return (block_size + 1) * (LITPKDS_ROWS if layout == "litpkds" else ROWS[split])


def header(layout: str, tokens: int) -> bytes:
    return HEADER.pack(MAGIC, 1, 8, tokens) if layout == "litpkds" else b""


# ------------------------------------------------------------------------------------------- what others have written


def _split_of(name: str) -> str | None:
    if name.startswith(("train_", "train.")):
        return "train"
    return "val" if name.startswith(("validation", "val_", "val.")) else None


def token_files(path: Path) -> list[Path]:
    """Every .bin file where foreign data lies."""
    return sorted(file for folder in FOLDERS for file in (path / folder).glob("*.bin") if file.is_file())


def is_foreign(path) -> bool:
    """Whether a folder holds token files with the names of a known format."""
    path = Path(path)
    return path.is_dir() and any(_split_of(file.name) for file in token_files(path))


def foreign_tokenizer(path, tokenizer: str) -> Tokenizer:
    """The tokenizer of a folder without our index: its own tokenizer.json where none that could fit is named."""
    path = Path(path)
    if tokenizer and not made_from_text(tokenizer):
        return resolve_tokenizer(tokenizer)
    if (path / "tokenizer.json").is_file():
        return Tokenizer.load(path)
    said = ""
    if (path / "meta.json").is_file():
        try:
            meta = json.loads((path / "meta.json").read_text("utf-8"))
            known = [f"{k} {meta[k]}" for k in ("tokenizer", "vocab_size") if k in meta]
            said = f" (its meta.json says {', '.join(known)})" if known else ""
        except (ValueError, TypeError):
            said = ""
    elif (path / "meta.pkl").is_file():
        said = (
            " (its meta.pkl is not opened, a pickle can run any program; characters of your own text: "
            "muonlm prep input.txt --as bin --tokenizer char --val tail:0.1 --to FOLDER)"
        )
    raise UserError(
        f"{path} holds token ids and does not say whose{said}; name the tokenizer it was made with: "
        "`tokenizer` gpt2:PATH/merges.txt, PATH/tokenizer.json or byte"
    )


def foreign_index(path, tokenizer: str = "", *, block_size: int = 0) -> dict:
    """An index like that of our own folders, for one that has none; its shards carry the "offset" where ids begin.

    block_size: a row length that headerless files may have beside powers of two + 1; 0 = none.
    """
    path = Path(path)
    files: dict[str, list[Path]] = {"train": [], "val": []}
    for file in token_files(path):
        if split := _split_of(file.name):
            files[split].append(file)
    for split, found in files.items():
        if not found:
            wanted = "train_*.bin" if split == "train" else "validation*.bin or val_*.bin"
            raise UserError(f"{path} holds no {wanted}; {EXPECTED}")
    tok = foreign_tokenizer(path, tokenizer)
    kinds, splits, prints = set(), {}, {}
    for split, found in files.items():
        shards, prints[split], rows = [], [], []
        for file in found:
            kind, tokens, offset = _measure(file)
            kinds.add(kind)
            if kind == "rows":
                rows.append((file, tokens))
            prints[split].append([tokens, _look(file, tokens, offset, tok)])
            shards.append({"file": str(file.relative_to(path)), "tokens": tokens, "offset": offset})
        _check_rows(rows, block_size)
        splits[split] = {"tokens": sum(s["tokens"] for s in shards), "documents": 0, "shards": shards}
        splits[split] |= _text_bytes(path, splits[split], tok)
    index = {
        "layout": " and ".join(sorted(kinds)),
        "foreign": True,
        "tokenizer": tok.record(),
        "vocab_size": tok.vocab_size,
        "dtype": "uint16",
        "splits": splits,
        "val": {"rule": "as found", "fallback": False},
    }
    index["fingerprint"] = fingerprint([tok.fingerprint, "uint16", prints])
    return index


def _measure(file: Path) -> tuple[str, int, int]:
    """(layout, tokens, bytes before the first token) of one file."""
    size = file.stat().st_size
    with open(file, "rb") as handle:
        start = handle.read(HEADER.size)
    if start.startswith(MAGIC):
        if size < HEADER.size:
            raise UserError(f"{file} ends inside its LITPKDS header ({size} bytes); {EXPECTED}")
        _, version, code, tokens = HEADER.unpack(start)
        if version != 1:
            raise UserError(f"{file} has LITPKDS version {version}, this muonlm reads 1; {EXPECTED}")
        if code != 8:
            raise UserError(f"{file} holds {CODES.get(code, 'ids of an unknown type')} (code {code}); {EXPECTED}")
        if size != HEADER.size + 2 * tokens:
            raise UserError(
                f"{file} has {size} bytes where its header says {HEADER.size + 2 * tokens} ({tokens} tokens); copy or "
                f"make it again. {EXPECTED}"
            )
        kind, offset = "litpkds", HEADER.size
    else:
        if size % 2:
            raise UserError(f"{file} has {size} bytes, an odd number, so it is no uint16; {EXPECTED}")
        kind, tokens, offset = "bin" if file.name in ("train.bin", "val.bin") else "rows", size // 2, 0
    if tokens < 2:
        raise UserError(f"{file} is too short: {tokens} tokens; {EXPECTED}")
    return kind, tokens, offset


def _check_rows(files: list[tuple[Path, int]], block_size: int) -> None:
    """Headerless rows do not say how long they are; one usual length must divide every file, else one was cut short."""
    lengths = [4097, *([block_size + 1] if block_size > 0 else []), *(2**k + 1 for k in range(6, 17))]
    fits = [r for r in lengths if all(tokens % r == 0 for _, tokens in files)]
    if fits:
        return
    most = max(lengths, key=lambda r: sum(tokens % r == 0 for _, tokens in files))
    file, tokens = next(f for f in files if f[1] % most)
    raise UserError(
        f"{file} has {tokens} tokens, no whole number of rows of {most}; copy or make it again, or set "
        f"`block_size` to the row length − 1. {EXPECTED}"
    )


def _look(file: Path, tokens: int, offset: int, tok: Tokenizer) -> str:
    """Check three places of a file against the type and the vocabulary; their hash stands for its content."""
    ids = np.memmap(file, "<u2", mode="r", offset=offset, shape=(tokens,))
    seen = hashlib.blake2b(digest_size=32)
    for at in (0, max(0, (tokens - LOOK) // 2), max(0, tokens - LOOK)):
        part = np.asarray(ids[at : at + LOOK])
        seen.update(part.tobytes())
        for half in (0, 1):  # the high halves of uint32 ids below 65536 are zeros
            if len(part) >= 64 and not part[half::2].any() and part[1 - half :: 2].any():
                raise UserError(f"{file}: every second id is 0, as in 32-bit ids; {EXPECTED}")
        _check_ids(file, part, tok)
    return seen.hexdigest()


def _check_ids(file: Path, ids: np.ndarray, tok: Tokenizer) -> None:
    if (most := int(ids.max())) >= tok.vocab_size:
        raise UserError(
            f"{file} holds the id {most}, the tokenizer {tok.kind} has {tok.vocab_size}: it was made with another one "
            f"(`tokenizer`) or is no uint16; {EXPECTED}"
        )


def _text_bytes(path: Path, split: dict, tok: Tokenizer) -> dict:
    """UTF-8 bytes of a split's text, special tokens none: exact up to EXACT tokens, beyond that extrapolated."""
    sizes = None
    if tok._bytes is not None:  # decoding is joining these: a table serves
        sizes = np.array([len(b) for b in tok._bytes])
        sizes[list(tok.special.values())] = 0
    limit = EXACT if sizes is not None else EXACT >> 6  # decoding is slower than a table
    found = counted = 0
    for shard in split["shards"]:
        ids = np.memmap(path / shard["file"], "<u2", mode="r", offset=shard["offset"], shape=(shard["tokens"],))
        for at in range(0, min(len(ids), limit - counted), 1 << 20):
            part = np.asarray(ids[at : at + min(1 << 20, limit - counted)])
            _check_ids(path / shard["file"], part, tok)
            counted += len(part)
            found += int(sizes[part].sum()) if sizes is not None else len(tok.decode(part).encode())
    whole = counted == split["tokens"]
    return {"bytes": found if whole else found * split["tokens"] // counted, "bytes_exact": whole}
