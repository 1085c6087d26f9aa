"""PrepOptions: every setting of a preparation, whatever it makes; each maker reads its own."""

from dataclasses import dataclass
from pathlib import Path

from muonlm.errors import UserError

from ..sources.expand import Source, expand, identity
from ..text.templates import Template
from ..text.templates import template as find_template
from ..text.tokenizer import Tokenizer, made_from_text, resolve_tokenizer
from . import formats, held_out
from .index import FORMAT_VERSION, KINDS


@dataclass(frozen=True, kw_only=True)
class PrepOptions:
    """Raises UserError for values that nothing can be made with."""

    # what is read
    columns: str | list[str] | tuple[str, ...] | None = None  # None: the usual ones
    name: str = ""  # configuration of a hub data set
    split: str = "train"  # of data sets that have some
    # text and conversations
    tokenizer: str = "bpe:4096"  # a spec that needs text learns from the training split
    special: tuple[str, ...] = ()  # more special tokens
    val: str | None = None  # held-out rule or path (held_out.py); None: the usual one
    # text
    layout: str = "packed"  # one of formats.LAYOUTS, or "raw"
    num_tokens: int | None = None  # stop with the piece (≤ 1 MB) that brings the training split to so many tokens
    eod: bool | None = None  # mark documents; None: as usual in the layout
    block_size: int = 4096  # rows of the layouts rows and litpkds hold one token more
    # conversations
    kind: str = ""  # one of index.KINDS
    template: str | Template = "qa"  # a name, a .toml file or the template itself
    # chain-of-thought rows
    exclude: str | list[str] | None = None  # data whose questions may not occur; None: see cot.py
    max_examples: int = 0  # rows kept of each source; 0 = all
    drop_programs: bool = True

    def __post_init__(self):
        object.__setattr__(self, "special", tuple(self.special))
        if self.layout not in (*formats.LAYOUTS, "raw"):
            raise UserError(f"`layout` = {self.layout!r} is unknown; it is {', '.join(formats.LAYOUTS)} or raw")
        if self.num_tokens is not None and self.num_tokens < 2:
            raise UserError(f"`num_tokens` = {self.num_tokens}: at least 2 are needed")
        if self.block_size < 1:
            raise UserError(f"`block_size` = {self.block_size}: at least 1 is needed; 4096 is usual")
        if self.layout == "raw" and (self.val or self.num_tokens):
            raise UserError(
                "layout raw holds whole documents without tokens or splits: leave `val` and `num_tokens` to the "
                "command that makes tokens of it (from the hub, `split` 'train[:1%]' takes a part)"
            )
        if self.kind not in ("", *KINDS):
            raise UserError(f"`kind` = {self.kind!r} of examples is unknown; it is {' or '.join(KINDS)}")
        if self.max_examples < 0:
            raise UserError(f"`max_examples` = {self.max_examples} must be 0 (all) or more")

    @property
    def in_rows(self) -> bool:
        """Whether files are rows of one length, as other trainers read them."""
        return self.layout in ("rows", "litpkds")

    @property
    def marks(self) -> bool:
        """Whether documents are marked."""
        return not self.in_rows if self.eod is None else self.eod

    @property
    def column_names(self) -> list[str]:
        """Those named, in order; none: the usual ones."""
        given = [self.columns] if isinstance(self.columns, str) else list(self.columns or [])
        return [n.strip() for part in given for n in part.split(",") if n.strip()]

    @property
    def form(self) -> Template:
        return self.template if isinstance(self.template, Template) else find_template(self.template)

    def held(self, *, hub: bool = False) -> held_out.HeldOut:
        """The held-out rule; hub: a source is of the hub, where nobody knows how many documents there are."""
        usual = "hash:0.01"
        if self.in_rows:
            usual = "hash:0.05" if hub or self.num_tokens else "last:0.05"
        return held_out.parse(self.val or usual)

    def fixed_tokenizer(self) -> Tokenizer | None:
        """The tokenizer, unless it is made from text."""
        return None if made_from_text(self.tokenizer) else resolve_tokenizer(self.tokenizer, special=self.special)

    def cache_key(self, files: list[Source]) -> dict:
        """What decides the content of text and conversations alike: the sources' content and the settings of both."""
        held = self.held()
        return {
            "format": FORMAT_VERSION,
            "sources": [identity(s) for s in files],
            "tokenizer": self.tokenizer
            if made_from_text(self.tokenizer)
            else resolve_tokenizer(self.tokenizer).fingerprint,
            "columns": self.columns
            if isinstance(self.columns, str) or self.columns is None
            else ",".join(self.columns),
            "val": [identity(s) for s in expand(held.rule)] if held.kind == "path" else held.rule,
        }


def as_list(sources) -> list:
    return [sources] if isinstance(sources, (str, Path, Source)) else list(sources)
