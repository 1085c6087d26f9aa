"""Index: what a prepared folder says of itself, and whether that is still so.

    index.json   layouts packed, rows, litpkds, examples        meta.json   layout bin (nanoGPT's name)
    raw.json     layout raw                                     metadata.json   chain-of-thought rows

Every index carries "format_version", "layout" and a "checksum" of itself; those of token files carry the size and the
blake2b of every file, the tokenizer's record, and a "fingerprint" of the content that training sees.
Raises    UserError: no prepared data, altered, of another version, a file missing or of another size: it names file and
          remedy
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from muonlm.errors import UserError
from muonlm.storage import digest, fingerprint

from ..text.templates import template
from ..text.tokenizer import Tokenizer
from .formats import foreign_index, foreign_tokenizer, is_foreign

FORMAT_VERSION = 1
INDEX_NAMES = ("index.json", "meta.json")  # of token files
OURS = (*INDEX_NAMES, "raw.json", "metadata.json")


@dataclass(frozen=True)
class Kind:
    """A kind of examples, as an index calls it."""

    items: str  # what a message calls them
    objective: str  # that trains on them, for messages


KINDS = {"sft": Kind("examples", "sft"), "preferences": Kind("pairs", "dpo")}


def remake(path) -> str:
    return f"make it again: muonlm prep SOURCE --to {path} --overwrite"


def checksum(index: dict) -> str:
    return fingerprint({k: v for k, v in index.items() if k != "checksum"})


def is_ours(path: Path) -> bool:
    """Whether a folder was made here, damaged or not; the index.json of a web site does not count."""
    for name in OURS:
        if (path / name).is_file():
            with open(path / name, "rb") as file:
                head = file.read(4096)
            if b'"format_version"' in head and b'"layout"' in head:
                return True
    return False


def has_tokens(path: Path) -> bool:
    """Whether an index of token files lies in a folder, ours or not."""
    return any((path / name).is_file() for name in INDEX_NAMES)


def stored(folder: Path) -> dict | None:
    """The index in a folder of any layout, unchecked."""
    for name in OURS:
        try:
            return json.loads((folder / name).read_text("utf-8"))
        except (OSError, ValueError):
            continue
    return None


def read_index(path, tokenizer: str = "", *, block_size: int = 0) -> dict:
    """The index of a folder of tokens after the cheap checks: it is ours, unaltered, and every shard has the recorded
    size. A folder of another format gets one made up (formats.foreign_index) for the tokenizer that is named."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; make it: muonlm prep SOURCE --to {path}")
    file = next((path / name for name in INDEX_NAMES if (path / name).is_file()), None)
    if is_foreign(path) and (file is None or file.name == "meta.json" and b'"format_version"' not in file.read_bytes()):
        return foreign_index(path, tokenizer, block_size=block_size)
    if file is None:
        raise UserError(f"{path} is not prepared data (no index.json in it); make it: muonlm prep {path} --to FOLDER")
    try:
        index = json.loads(file.read_text("utf-8"))
        version = index["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not an index of muonlm ({error}); {remake(path)}") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{file} has format_version {version}, this muonlm reads {FORMAT_VERSION}; {remake(path)}")
    if index.get("checksum") != checksum(index):
        raise UserError(f"{file} was altered after it was sealed (its checksum differs); {remake(path)}")
    for info in index["splits"].values():
        for shard in info["shards"]:
            want = shard.get("offset", 0) + shard["tokens"] * np.dtype(index["dtype"]).itemsize
            _check_size(path, shard["file"], want)
    return index


def read_examples(path) -> dict:
    """The index of a folder of examples after the cheap checks of `read_index`, and of the files beside the tokens."""
    path, index = Path(path), read_index(path)
    if index.get("layout") != "examples":
        raise UserError(
            f"{path} holds packed text, not examples; make them: muonlm prep FILE --as sft --template NAME --to FOLDER"
        )
    for info in index["splits"].values():
        for part, want in (("trained", info["tokens"]), ("lengths", 8 * info["documents"])):
            _check_size(path, info[part]["file"], want)
    return index


def _check_size(path: Path, name: str, want: int) -> None:
    file = path / name
    if not file.is_file():
        raise UserError(f"{file} is missing; {remake(path)}")
    if (found := file.stat().st_size) != want:
        raise UserError(f"{file} has {found} bytes, its index says {want}; {remake(path)}")


def open_split(path: Path, index: dict, split: str, block_size: int, rows: int, tokenizer: str = ""):
    """(the index's record of a split, the tokenizer) of any prepared folder, after the checks that all share."""
    if block_size < 1 or rows < 1:
        raise UserError(f"`block_size` {block_size}, `rows` {rows}: both must be at least 1")
    if split not in index["splits"]:
        raise UserError(f"{path} has no split {split!r}; it has {', '.join(index['splits'])}")
    tok = foreign_tokenizer(path, tokenizer) if "foreign" in index else Tokenizer.load(path)
    if tok.fingerprint != index["tokenizer"]["fingerprint"]:
        raise UserError(f"{path / 'tokenizer.json'} is not the tokenizer this data was made with; {remake(path)}")
    return index["splits"][split], tok


def verify(path) -> dict:
    """Compare every file of a prepared folder (text or conversations) with its index, which is returned: token files
    by their hashes, index, tokenizer and template by what they say. A UserError names the first that differs."""
    path, index = Path(path), read_index(path)
    if "foreign" in index:
        raise UserError(f"{path} was made by another program and records no hashes to compare with; {remake(path)}")
    for record in hashed_files(index):
        file = path / record["file"]
        if not file.is_file():
            raise UserError(f"{file} is missing; {remake(path)}")
        if digest(file) != record["blake2b"]:
            raise UserError(f"{file} was altered: its content differs from the recorded hash; {remake(path)}")
    if Tokenizer.load(path).fingerprint != index["tokenizer"]["fingerprint"]:
        raise UserError(
            f"{path / 'tokenizer.json'} was altered: its fingerprint differs from the index; {remake(path)}"
        )
    if form := index.get("template"):
        file = path / f"{form['name']}.toml"
        if template(file) != template(form):
            raise UserError(f"{file} was altered: the template differs from the index; {remake(path)}")
    return index


def hashed_files(index: dict) -> list[dict]:
    """The records {"file", "blake2b", …} of all token files of an index."""
    more = ("trained", "lengths")  # beside the tokens of conversations
    return [
        r for info in index["splits"].values() for r in info["shards"] + [info[part] for part in more if part in info]
    ]
