"""`muonlm generate`: continue a text."""

import argparse
import json
import sys
from dataclasses import asdict

from muonlm.errors import UserError
from muonlm.sampling import Sampling

from .parser import Parser, text, values


def parser() -> Parser:
    about = "Continue a prompt with a trained model: muonlm generate runs/quickstart --prompt 'We the'"
    parser = Parser("generate", about)
    parser.add_run()
    parser.add_argument("--prompt", type=text, default="", help="text to continue; - reads standard input")
    parser.add_argument("--samples", type=int, default=1, help="continuations, from one prefill (default 1)")
    stop = "end a continuation at this text (one token); may be repeated"
    parser.add_argument("--stop", action="append", default=[], help=stop)
    parser.add_fields(Sampling())
    return parser


def run(args: argparse.Namespace) -> int:
    sampling = values(Sampling(), args)  # impossible ones are refused before torch and the model are loaded
    if args.samples < 1:
        raise UserError(f"--samples {args.samples} must be at least 1.")
    from muonlm.engine import generate
    from muonlm.training.checkpoint import load
    from muonlm.training.parallel import pick_device

    model, tokenizer = load(args.run, pick_device(args.device), args.checkpoint)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt

    def show(piece: str) -> None:
        print(piece, end="", flush=True)

    live = not args.json
    if live and tokenizer is not None:
        show(prompt)
    how = {"samples": args.samples, "stop": args.stop, "on_text": show if live else None}
    texts = generate(model, tokenizer, prompt, **how, **asdict(sampling))
    if live:
        print()
        for text in texts[1:]:
            print(f"\n--- next sample ---\n{prompt}{text}")
    else:
        print(json.dumps({"prompt": prompt, "samples": texts}))
    return 0
