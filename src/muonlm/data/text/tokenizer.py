"""Tokenizers: text to ids and back. Five kinds behind one class, all stored as JSON, never pickle.

    byte   id = UTF-8 byte (0 … 255), EOT = 256; vocabulary 257
    char   id = rank among the corpus's sorted distinct characters; EOT last, if the corpus has several documents
    bpe    byte-level BPE trained by `tokenizers`, GPT-2's pre-tokenizer; EOT `<|endoftext|>` = 0. bpe:N:digits makes
           every digit a token, which small models need for arithmetic
    gpt2   GPT-2's vocabulary, rebuilt from its merges file: 256 bytes, 50,000 merges, EOT = 50256
    hf     any other Hugging Face tokenizer.json; EOT: its special token of a usual name (EOT_NAMES), or None

More special tokens (<|im_start|>, <think>) can be asked for: behind EOT in bpe (1, 2, …), at the end of the vocabulary
in the others, hf and gpt2 only those they lack. `special` maps the name of every special token, EOT too, to its id.

`encode` is for plain text: a special token's name in the text is encoded as the characters it is made of, so that a
document cannot forge an end of text. Whoever wants a special token puts its id there. No kind adds tokens of its own
(no BOS). `decode` takes any ids: bytes that are no UTF-8, and ids beyond the vocabulary, give U+FFFD; a special token
gives its name.

bpe, gpt2 and hf are stored as plain tokenizer.json of Hugging Face, byte and char as {"muonlm": kind, …}.
Cost     byte and char: numpy, no Python loop over characters. BPE: `tokenizers`, all cores in encode_batch
Raises   UserError: unknown spec, unreadable file, a character that a char vocabulary lacks (with its position)
Source   R. Sennrich et al., arXiv 1508.07909 (BPE); A. Radford et al. 2019 (byte-level, pre-tokenizer pattern)
"""

import codecs
import difflib
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from muonlm.errors import UserError
from muonlm.storage import write_atomically

EOT = "<|endoftext|>"
# The first found is taken. <|im_end|> ends a turn where another of them is there: added later, it must not become EOT.
EOT_NAMES = (EOT, "</s>", "<|end_of_text|>", "<|eot_id|>", "<eos>", "[EOS]", "[SEP]", "<|im_end|>")
SPECIAL_NAME = re.compile(r"<[^<>\s,]+>|\[[^\[\]\s,]+\]")  # no text of a template reads so by chance: </s>, [SEP]
SPECS = "byte, char, bpe:4096, bpe:1024:digits, gpt2:PATH/merges.txt, PATH/tokenizer.json"
BAD = "\ufffd"
# Where GPT-2's pre-tokenizer always ends a token: in front of a blank or newline that a non-space follows (the rest of
# a longer run of white space is a token before it). A text cut there gives the same tokens as the whole.
SAFE_CUT = re.compile(r"(?=[ \n]\S)")
TOGETHER = 1 << 10  # parts that `tokenizers` is given at once
# Characters; `tokenizers` slows with length: 64 Ki characters take 1.5 times as long a character as 4 Ki.
PART = 1 << 12


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character: itself in printable Latin-1, else from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


class Tokenizer:
    """Made by `Tokenizer.byte/char/hugging_face/load` or `resolve_tokenizer`; immutable."""

    def __init__(self, stored: dict):
        """`stored`: what tokenizer.json holds."""
        self._stored = stored
        self.fingerprint: str = hashlib.sha256(
            json.dumps(stored, sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest()
        self._bytes: list[bytes] | None = None  # id -> bytes, where decoding is joining bytes: all kinds but some hf
        self._hf = None
        self.eot_id: int | None
        self.special: dict[str, int]  # every special token, EOT too: name -> id
        kind = stored.get("muonlm")
        if kind in ("byte", "char"):
            chars: str = stored.get("chars", "")
            plain = [bytes([b]) for b in range(256)] if kind == "byte" else [c.encode() for c in chars]
            names = [EOT] * (kind == "byte" or stored["eot"]) + stored.get("special", [])
            self.kind, self.vocab_size = kind, len(plain) + len(names)
            self.special = {name: i for i, name in enumerate(names, len(plain))}
            self.eot_id = self.special.get(EOT)
            self._bytes = plain + [name.encode() for name in names]
            if kind == "char":
                points = _code_points(chars)
                self._rank = np.full(int(points.max(initial=0)) + 2, -1, np.int64)  # last entry: every character beyond
                self._rank[points] = np.arange(len(points))
        else:
            self._from_hugging_face(stored)
        # Sized for the ids it gives; packed shards use the same rule.
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 65536 else np.uint32)

    def _from_hugging_face(self, stored: dict) -> None:
        self._hf = tokenizers.Tokenizer.from_str(json.dumps(stored))
        self._hf.no_truncation()
        self._hf.no_padding()
        self._hf.encode_special_tokens = True  # "<|endoftext|>" inside a text is text
        vocab = self._hf.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        added = stored.get("added_tokens") or []
        self.special = special = {a["content"]: a["id"] for a in added if a["special"]}
        self.eot_id = next((special[name] for name in EOT_NAMES if name in special), None)
        byte_level = (stored.get("decoder") or {}).get("type") == "ByteLevel"
        if byte_level:
            alphabet = _byte_alphabet()
            self._bytes = [BAD.encode()] * self.vocab_size
            for token, i in vocab.items():
                plain = token in special or not all(c in alphabet for c in token)
                self._bytes[i] = token.encode() if plain else bytes(alphabet[c] for c in token)
        before = stored.get("pre_tokenizer") or {}
        # As ours and GPT-2's: nothing but the pre-tokenizer splits a text, so it may be cut at a SAFE_CUT.
        self._cuts = (
            byte_level
            and (before.get("type"), before.get("add_prefix_space")) == ("ByteLevel", False)
            and stored["model"].get("type") == "BPE"
            and not stored.get("normalizer")
            and len(special) == len(added)  # an added token that is not special is searched in texts
        )
        self.kind = {(0, True): "bpe", (50256, True): "gpt2"}.get((self.eot_id, self._cuts), "hf")

    @classmethod
    def byte(cls) -> "Tokenizer":
        return cls({"muonlm": "byte"})

    @classmethod
    def char(cls, characters: Iterable[str], *, eot: bool) -> "Tokenizer":
        return cls({"muonlm": "char", "chars": "".join(sorted(set(characters))), "eot": bool(eot)})

    @classmethod
    def hugging_face(cls, hf: tokenizers.Tokenizer) -> "Tokenizer":
        return cls(json.loads(hf.to_str()))

    def with_special(self, names: Iterable[str]) -> "Tokenizer":
        """This tokenizer and, at the end of the vocabulary, those of the special tokens that it lacks."""
        missing = [name for name in dict.fromkeys(names) if name not in self.special]
        if not missing:
            return self
        if self._hf is None:
            return Tokenizer(self._stored | {"special": [*self._stored.get("special", []), *missing]})
        hf = tokenizers.Tokenizer.from_str(json.dumps(self._stored))
        hf.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in missing])
        return Tokenizer.hugging_face(hf)

    @classmethod
    def load(cls, path) -> "Tokenizer":
        """From a tokenizer.json, or a folder that holds one."""
        file = Path(path)
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise UserError(f"no tokenizer at {file}; `tokenizer` takes {SPECS}")
        try:
            stored = json.loads(file.read_text("utf-8"))
            if not isinstance(stored, dict) or not ("muonlm" in stored or "model" in stored):
                raise ValueError("no field 'model'")
            return cls(stored)
        except Exception as error:  # noqa: BLE001, `tokenizers` raises bare Exception for a JSON it does not understand
            raise UserError(f"{file} is not a tokenizer.json ({error}); `tokenizer` takes {SPECS}") from None

    def record(self) -> dict:
        """What the index of prepared data says of its tokenizer."""
        return {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "eot_id": self.eot_id,
            "fingerprint": self.fingerprint,
        }

    def extends(self, other: "Tokenizer") -> bool:
        """Whether this is `other`, or `other` with more special tokens behind its vocabulary: same text, same ids."""
        more = sorted(self.special.keys() - other.special.keys(), key=self.special.get)
        return other.with_special(more).fingerprint == self.fingerprint

    def save(self, folder) -> None:
        """Write folder/tokenizer.json."""
        write_atomically(Path(folder, "tokenizer.json"), json.dumps(self._stored, ensure_ascii=False, indent=1))

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, of `self.dtype`."""
        if self.kind == "byte":
            return [np.frombuffer(t.encode("utf-8", "replace"), np.uint8).astype(self.dtype) for t in texts]
        if self.kind == "char":
            return [self._encode_chars(t) for t in texts]
        parts, owner = [], []
        for number, text in enumerate(texts):
            for part in _parts(text) if self._cuts else [text]:
                parts.append(part)
                owner.append(number)
        ids: list[list[np.ndarray]] = [[] for _ in texts]
        for at in range(0, len(parts), TOGETHER):  # an encoding takes some 50 times the memory of its ids
            # encode_batch_fast leaves out character offsets, which nobody here reads
            found = self._hf.encode_batch_fast(parts[at : at + TOGETHER], add_special_tokens=False)
            for number, encoding in zip(owner[at : at + TOGETHER], found, strict=True):
                ids[number].append(np.array(encoding.ids, dtype=self.dtype))
        return [i[0] if len(i) == 1 else np.concatenate(i) for i in ids]

    def _encode_chars(self, text: str) -> np.ndarray:
        ids = self._rank[np.minimum(_code_points(text), len(self._rank) - 1)]
        if len(ids) and ids.min() < 0:
            at = int(np.argmin(ids))
            line, column = text.count("\n", 0, at) + 1, at - (text.rfind("\n", 0, at) + 1) + 1
            raise UserError(
                f"the character {text[at]!r} (U+{ord(text[at]):04X}) at position {at} (line {line}, column {column}) "
                f"is not in "
                f"the vocabulary of this char tokenizer ({len(self._stored['chars'])} characters); take it out, or "
                f"prepare the "
                "data with `tokenizer` byte"
            )
        return ids.astype(self.dtype)

    def decode(self, ids) -> str:
        ids = [int(i) for i in ids]
        if self._bytes is not None:
            return b"".join(self._piece(i) for i in ids).decode("utf-8", "replace")
        # hf: runs of known ids; `tokenizers` drops unknown ids silently, we show them
        out, run = [], []
        for i in [*ids, -1]:
            if 0 <= i < self.vocab_size:
                run.append(i)
            else:
                out.append(self._hf.decode(run, skip_special_tokens=False) if run else "")
                run = []
                out.append(BAD)
        return "".join(out[:-1])

    def _piece(self, i: int) -> bytes:
        return self._bytes[i] if 0 <= i < len(self._bytes) else BAD.encode()

    def stream(self) -> "TextStream":
        return TextStream(self)


class TextStream:
    """push(id) gives the characters that id completes; the pushes and the last flush() join to decode() of all ids.

    One exception, hf with byte fallback: its decoder turns a whole run of bytes into U+FFFD when a later one makes
    the run invalid;
    characters already sent stay as they were.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []  # hf only: pushed so far
        self._sent = ""

    def push(self, i: int) -> str:
        if self._tokenizer._bytes is not None:
            return self._utf8.decode(self._tokenizer._piece(int(i)))
        self._ids.append(int(i))
        text = self._tokenizer.decode(self._ids)
        # A trailing U+FFFD may be half a character; a decoder that rewrites its past is awaited until it agrees again.
        if text.endswith(BAD) or not text.startswith(self._sent):
            return ""
        new, self._sent = text[len(self._sent) :], text
        return new

    def flush(self) -> str:
        """What is left at the end: an unfinished character comes out as U+FFFD."""
        if self._tokenizer._bytes is not None:
            return self._utf8.decode(b"", final=True)
        text = self._tokenizer.decode(self._ids)
        new, self._ids, self._sent = text[len(self._sent) :], [], ""
        return new


def _parts(text: str) -> list[str]:
    """The text cut at the first SAFE_CUT after every PART characters."""
    parts, start = [], 0
    while cut := SAFE_CUT.search(text, start + PART):
        parts.append(text[start : cut.start()])
        start = cut.start()
    return [*parts, text[start:]]


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def made_from_text(spec: str) -> bool:
    """Whether the spec needs a corpus: char, bpe:N and bpe:N:digits. A bad N is refused here, before it is read."""
    if spec == "bpe" or spec.startswith("bpe:"):
        size = spec.removeprefix("bpe").removeprefix(":").removesuffix(":digits")
        if not re.fullmatch(r"[1-9][0-9]*", size) or int(size) < 257:
            raise UserError(
                f"tokenizer {spec!r}: bpe needs a vocabulary size of at least 257 (256 bytes + EOT); try bpe:4096"
            )
        return True
    return spec == "char"


def expected_size(spec: str, special: int = 0) -> tuple[int, str]:
    """(vocabulary that `resolve_tokenizer` will give, with so many special tokens more; what had to be assumed)."""
    kind, *numbers = spec.split(":")
    if kind == "bpe" and numbers and numbers[0].isdigit():  # special tokens are among the N
        return int(numbers[0]), ""
    if kind == "char":
        return 65 + special, ": tiny Shakespeare's 65 characters are assumed"
    if kind in ("byte", "gpt2"):
        return {"byte": 257, "gpt2": 50257}[kind] + special, ""
    return resolve_tokenizer(spec).vocab_size, ""


def resolve_tokenizer(spec: str, texts: Iterable | None = None, special: Iterable[str] = ()) -> Tokenizer:
    """The tokenizer of a spec (SPECS) with these special tokens. char and bpe:N are made from `texts`: strings, one a
    document, or sources.Documents."""
    special = _special_names(special)
    if made_from_text(spec):
        if texts is None:
            how = "made from" if spec == "char" else "trained on"
            raise UserError(f"the tokenizer {spec!r} is {how} a corpus; give one, or take another of {SPECS}")
        if spec == "char":
            return char_tokenizer(texts).with_special(special)
        return train_bpe(texts, int(spec.split(":")[1]), special, digits=spec.endswith(":digits"))
    if spec == "byte":
        return Tokenizer.byte().with_special(special)
    if spec.startswith("gpt2:"):
        return gpt2_tokenizer(Path(spec.removeprefix("gpt2:"))).with_special(special)
    if Path(spec).exists():
        return Tokenizer.load(spec).with_special(special)
    if spec == "gpt2":
        raise UserError("tokenizer 'gpt2' needs its merges file: gpt2:PATH/merges.txt")
    near = difflib.get_close_matches(
        spec.lower(), ["byte", "char", "bpe:4096", "bytes", "gpt2:PATH/merges.txt"], 1, 0.4
    )
    hint = f"did you mean {near[0].replace('bytes', 'byte')}? " if near else ""
    raise UserError(f"unknown tokenizer {spec!r}: no such kind or file; {hint}It is one of {SPECS}")


def _special_names(names: Iterable[str]) -> list[str]:
    """The distinct names, in order; refused if a template could not tell one from its own text."""
    distinct = list(dict.fromkeys(names))
    for name in distinct:
        if not SPECIAL_NAME.fullmatch(name):
            raise UserError(
                f"special token {name!r}: a name stands in <> or [], without blanks and commas; "
                "try `special` '<|im_start|>,<|im_end|>'"
            )
    return distinct


def char_tokenizer(texts: Iterable) -> Tokenizer:
    points, documents = np.empty(0, np.uint32), 0
    for piece in texts:
        points = np.union1d(points, _code_points(getattr(piece, "text", piece)))
        documents += getattr(piece, "last", True)
    return Tokenizer.char(map(chr, points.tolist()), eot=documents > 1)


def train_bpe(texts: Iterable, vocab_size: int, special: Iterable[str] = (), *, digits: bool = False) -> Tokenizer:
    names = list(dict.fromkeys([EOT, *special]))
    if vocab_size < 256 + len(names):
        raise UserError(
            f"tokenizer 'bpe:{vocab_size}': 256 bytes and {len(names)} special tokens need a vocabulary of at least "
            f"{256 + len(names)}; try bpe:4096"
        )
    hf = tokenizers.Tokenizer(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if digits:
        hf.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), hf.pre_tokenizer])
    hf.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=names,  # given first, hence ids 0, 1, …
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    hf.train_from_iterator((part for piece in texts for part in _parts(getattr(piece, "text", piece))), trainer)
    return Tokenizer.hugging_face(hf)


def gpt2_tokenizer(merges_file: Path) -> Tokenizer:
    """Vocabulary by construction: the 256 byte characters in the order of _byte_alphabet, each merge, then EOT."""
    if not merges_file.is_file():
        raise UserError(f"no merges file at {merges_file}; `tokenizer` gpt2:PATH wants GPT-2's merges.txt")
    merges = []
    try:
        lines = merges_file.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{merges_file} is not a merges file (byte {error.start} is not UTF-8)") from None
    for number, line in enumerate(lines, 1):
        if line.strip() and not (number == 1 and line.startswith("#version")):
            pair = tuple(line.split(" "))
            if len(pair) != 2:
                raise UserError(
                    f"{merges_file}:{number}: a merge is two tokens with a space between, found {line[:60]!r}"
                )
            merges.append(pair)
    vocab = {c: i for i, c in enumerate(_byte_alphabet())}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    try:
        hf = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    except Exception as error:  # noqa: BLE001, a merge of tokens that no earlier line makes
        raise UserError(f"{merges_file} is not a merges file ({error}); gpt2:PATH wants GPT-2's merges.txt") from None
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = decoders.ByteLevel()
    hf.add_special_tokens([tokenizers.AddedToken(EOT, special=True, normalized=False)])
    return Tokenizer.hugging_face(hf)
