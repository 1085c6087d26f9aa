"""`muonlm chat`: talk with a model."""

import argparse
import json
import sys

from muonlm.sampling import OF_CHAT

from .parser import Parser, text, values


def parser() -> Parser:
    parser = Parser(
        "chat",
        "Talk with a model that was trained on conversations: muonlm chat runs/my-sft. /help lists the commands.\n"
        "Standard input may be a pipe: each line is one message.",
    )
    parser.add_run()
    parser.add_argument("--template", default="", help="form of a turn, by name or .toml file (default: the run's own)")
    parser.add_argument("--system", type=text, default="", help="system turn to begin with (default: the template's)")
    remember = "exchanges to remember; 0 = each message alone (default: all)"
    parser.add_argument("--history", type=int, metavar="N", help=remember)
    parser.add_fields(OF_CHAT)
    return parser


def log(note: str) -> None:
    print(f"({note})" if "\n" not in note else note, file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> int:
    sampling = values(OF_CHAT, args)
    from muonlm.chat import converse, open_chat
    from muonlm.training.parallel import pick_device

    where = {"template": args.template, "which": args.checkpoint, "device": pick_device(args.device)}
    chat, name = open_chat(args.run, **where, system=args.system, sampling=sampling, history=args.history, log=log)
    log(f"chat with {name}; /help lists the commands, Ctrl-D leaves")
    converse(chat, sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps({"run": args.run, "template": chat.form.name, "conversation": chat.conversation()}))
    return 0
