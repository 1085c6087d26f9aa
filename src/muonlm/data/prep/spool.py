"""Spool: rows → understood items and the side of each, kept beside the output until that is sealed."""

import hashlib
import json
import time
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import numpy as np

from muonlm.errors import UserError
from muonlm.storage import Growing, canonical

from ..sources.expand import Source, rows, size
from ..text.conversations import Conversation, read_conversations, read_preferences
from ..text.templates import Template
from ..text.tokenizer import Tokenizer
from . import held_out, sealed
from .encode import Progress
from .index import KINDS
from .options import PrepOptions
from .sealed import Work

TRAIN, VAL, LEFT_OUT = 0, 1, 2


@dataclass
class State:
    """How far the work on examples is, in plain values, each written down after what it stands for is on the disk."""

    spools: list[dict] = field(default_factory=list)  # of train, then of held-out rows of their own: see Spool.record
    tokenizer: str = ""  # fingerprint of out/tokenizer.json, once it is there
    encoded: int = 0  # items, over all spools
    splits: dict = field(default_factory=dict)  # name -> what its files hold


@dataclass
class Job:
    """What is made of which sources, and how far it is."""

    options: PrepOptions
    form: Template
    files: list[Source]
    val_files: list[Source]
    held: held_out.HeldOut
    tokenizer: str | Tokenizer  # a spec that needs text, or the tokenizer itself
    work: Work
    report: Progress
    state: State = field(default_factory=State)

    @property
    def items(self) -> str:
        return KINDS[self.options.kind].items

    def save(self, **news) -> None:
        for name, value in news.items():
            setattr(self.state, name, value)
        self.work.save(asdict(self.state))


class Spool:
    """Items as JSON lines [where, shared turns, side, …], so that each source is read and understood just once.

    Beside them, a file of their prompts' digests, 8 bytes each.
    """

    def __init__(self, job: Job, number: int, files: list[Source]):
        self.job, self.number, self.files = job, number, files
        self.kind = job.options.kind
        name = ("train", "val")[number]
        self.file, self.prompt_file = job.work.path / f"{name}.jsonl", job.work.path / f"{name}.prompts"
        self.skipped = {"untrained": 0, "empty": 0} | ({"equal": 0} if self.kind == "preferences" else {})
        self.rows = self.items = self.bytes = 0
        self.done = False
        if number < len(job.state.spools):
            saved = job.state.spools[number]
            self.rows, self.items, self.bytes = saved["rows"], saved["items"], saved["bytes"]
            self.skipped, self.done = dict(saved["skipped"]), saved["done"]

    def record(self) -> dict:
        """rows of the sources that are done with, items and bytes of the file that stand for them."""
        names = ("rows", "items", "bytes", "skipped", "done")
        return {name: getattr(self, name) for name in names}

    def fill(self) -> None:
        """Read what is not read yet, and choose TRAIN for all."""
        if not self.done:
            self._read()
        self.prompts = np.fromfile(self.prompt_file, np.uint64)
        self.side = np.zeros(self.items, np.uint8)  # TRAIN, VAL or LEFT_OUT

    def _read(self) -> None:
        job, total, saved = self.job, sum(size(s) for s in self.files), time.monotonic()
        kept = (self.bytes, 8 * self.items) if self.rows else (None, None)
        with Growing(self.file, kept[0]) as out, Growing(self.prompt_file, kept[1]) as prompts:

            def save(done: bool = False) -> None:
                out.sync()
                prompts.sync()
                self.done = done
                job.save(spools=[*job.state.spools[: self.number], self.record()])

            for row in rows(self.files, columns=job.options.columns, start=self.rows):
                for item in self._understood(row):
                    if why := _no_use(item[1:]):
                        self.skipped[why] += 1
                        continue
                    line = canonical(item) + b"\n"
                    out.write(line)
                    prompts.write(array("Q", [_prompt_digest(item[1:])]).tobytes())
                    self.bytes, self.items = self.bytes + len(line), self.items + 1
                self.rows += 1
                if self.rows % 1000 == 0 and self.bytes < total:
                    job.report("read", self.bytes, total)
                if time.monotonic() - saved >= sealed.SAVE_SECONDS:
                    save()
                    saved = time.monotonic()
            save(done=True)
        job.report("read", total, total)

    def _understood(self, row: tuple[dict, str]) -> Iterator[list]:
        """The items of a row."""
        if self.kind == "sft":
            for conversation, where in read_conversations([row]):
                yield [where, [], conversation]
        else:
            for shared, chosen, rejected, where in read_preferences([row]):
                yield [where, shared, chosen, rejected]

    def __iter__(self) -> Iterator[tuple[int, int, list]]:
        """(side, bytes, item)."""
        with open(self.file, "rb") as lines:
            for side, line in zip(self.side, lines, strict=True):
                yield int(side), len(line), json.loads(line)

    def prompts_of(self, side: int) -> np.ndarray:
        return self.prompts[self.side == side]


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


def choose_sides(held: held_out.HeldOut, spools: list[Spool], what: str) -> None:
    """Fill in each spool's `side`; the second, if there is one, is all held out."""
    first = spools[0]
    prompts, n = first.prompts, first.items
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
            f"there are no {what} to hold out: {f'{n} in all' if len(spools) == 1 else 'none in `val`'}; "
            "give more, or a file of some: `val` PATH"
        )
    if not (first.side == TRAIN).any():
        raise UserError(
            f"all {n:,} {what} have the prompt of a held-out one, so none is left to train on; hold out others: "
            "`val` PATH"
        )
