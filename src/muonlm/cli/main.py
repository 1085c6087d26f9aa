"""The command line: the table of verbs, and what an error is turned into.

A verb is a file beside this one with `parser() -> Parser` and `run(args) -> int`, the exit code. Both import what needs
torch inside of functions, so that `--help` and mistakes are answered at once.

Exit codes: 0 done, 1 the run or a check failed, 2 bad input (the message says what to change), 130 interrupted.
"""

import errno
import json
import os
import sys
from importlib import import_module

from muonlm import __version__
from muonlm.errors import RunFailed, UserError, out_of_memory

VERBS = {  # verb, which is the file's name -> what follows it, what it does
    "train": ("[RECIPE]", "train; without a recipe: quickstart, two minutes on a CPU, offline"),
    "generate": ("RUN --prompt TEXT", "continue a text with a trained model"),
    "chat": ("RUN", "talk with a model that was trained on conversations"),
    "eval": ("RUN…", "measure trained models: bits per byte of held-out text, or other --tasks"),
    "prep": ("SOURCE… --to DIR", "turn text files into a sealed folder of tokens"),
    "info": ("[RECIPE|RUN|DATA]", "the recipes; parameters, memory and routing of one; what prepared data holds"),
    "doctor": ("", "check this machine"),
}
HELP = """muonlm {version} trains small language models with Muon.

{verbs}

Your own text:    muonlm train --data my.txt
Any setting:      --section.key VALUE, as in --optim.lr 0.01 (all: muonlm info --keys)
One verb's flags: muonlm VERB --help
For programs:     --json prints one JSON document on stdout, progress on stderr
Exit codes:       0 done, 1 the run or a check failed, 2 bad input (the message says what to change), 130 interrupted"""
OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}  # not of our code


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # what is no text, or cannot be shown, becomes a ?, not a traceback
    parser = None
    try:
        verb = argv[0] if argv else "--help"
        if verb not in VERBS:
            print(answer(verb))
            return 0
        module = import_module(f".{verb}", __package__)
        parser = module.parser()
        code = module.run(parser.parse(argv[1:]))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `muonlm info … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        message, code = told(error, parser)
        return fail(message, code, debug="--debug" in argv, json_mode="--json" in argv)


def answer(word: str) -> str:
    """What is said to a first word that is no verb."""
    if word in ("-h", "--help", "help"):
        lines = [f"    {f'muonlm {verb} {what}':34} {help}" for verb, (what, help) in VERBS.items()]
        return HELP.format(version=__version__, verbs="\n".join(lines))
    if word in ("-V", "--version"):
        return __version__
    from muonlm.config.spelling import nearest  # which --help need not wait for

    raise UserError(f"unknown verb {word!r}.{nearest(word, VERBS) or ' Verbs: ' + ', '.join(VERBS) + '.'}")


def told(error: BaseException, parser) -> tuple[str, int]:
    """(message, exit code) of an error that is no bug of ours; a bug is raised again: its traceback is the report."""
    if isinstance(error, UserError | RunFailed):
        from .flags import in_flags

        return in_flags(error, parser) if parser else str(error), 2 if isinstance(error, UserError) else 1
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted", 130
    if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
        return (
            f"{error.filename or 'a file'} cannot be written or read: {error.strerror}. Make room or choose another "
            "place; a run that was stopped goes on with: muonlm train --resume RUN"
        ), 2
    if out_of_memory(error):  # of training: training/memory.py, which knows what was tried
        return f"out of memory: {error} Ask for less at a time, or use the CPU or a smaller model.", 1
    raise error


def fail(message: str, code: int, *, debug: bool, json_mode: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"muonlm: {message}", file=sys.stderr)
        if json_mode:
            print(json.dumps({"error": message, "exit_code": code}))
    return code
