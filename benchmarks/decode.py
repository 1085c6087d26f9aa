"""Tokens per second of generation: our engine beside transformers' `generate`, on the same weights, one row, greedy.

    python benchmarks/decode.py [--json [FILE]] [--models small,130m] [--tokens 100] [--repeats 5]
                                [--threads 2] [--quick]

Models   transformers' MambaForCausalLM with random weights, N 16, and the same in ours by muonlm.export:
         small   width 256, 4 layers, vocabulary 4096
         130m    width 768, 24 layers, vocabulary 50280: the shapes of state-spaces/mamba-130m
Gate     logits of both on a row of 64 tokens, all at once and token by token, at most AGREE apart, or nothing is timed
generate tokens/s of muonlm.engine.stream and of transformers' generate, from a prompt of 16 tokens, prefill included:
         median [range] over rounds in which both run, in turn; the ratio is the median over rounds of theirs / ours
         in time
position tokens/s of STEPS single steps after 100, 1000 and 10000 tokens, whose state was prefilled before; each round
         times every position, in turn. spread: (largest - smallest median) / smallest
state    bytes of everything that the model carries from token to token, at these positions, for one row

The table goes to stderr, JSON to stdout or to a file.
"""

import argparse
import copy
import logging
import sys

import torch
from scan import interleaved, machine, note, peer, span, summary, write
from torch import Tensor

from muonlm.engine import map_state, stream
from muonlm.export.hf import from_transformers
from muonlm.sampling import Sampling

AGREE = 1e-4
STEPS = 50  # single steps that are timed at once
PREFILL = 256  # tokens of a piece of the prefill: it bounds the logits in memory
POSITIONS = [100, 1000, 10_000]
MODELS = {
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 4096},
    "130m": {"hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50280},
}
QUICK = {"tiny": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}}


def pair(shape: dict):
    """(theirs, ours) of equal weights, logits of about the size that trained models have."""
    config, cls = peer("transformers", "MambaConfig"), peer("transformers", "MambaForCausalLM")
    if config is None or cls is None:
        raise SystemExit("transformers is not installed; there is nothing to compare with, nor weights to compare on")
    for name in ("transformers", "transformers.integrations.hub_kernels"):
        logging.getLogger(name).setLevel(logging.ERROR)  # it says for every kernel that it has no CUDA form here
    torch.manual_seed(0)
    theirs = cls(config(**shape, bos_token_id=None, eos_token_id=None, pad_token_id=None)).eval()
    return theirs, from_transformers(theirs, block_size=1 << 20).eval()


@torch.no_grad()
def deviation(theirs, ours) -> tuple[float, float]:
    """(largest difference of logits, of whole rows and token by token; theirs from the same weights in fp64).

    Rounding grows through layers of random weights: 24 of them bring any fp32 model 4e-3 away from fp64, whoever
    computes it.
    """
    tokens = torch.randint(ours.cfg.vocab_size, (1, 64), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits
    worst, state = float((ours(tokens)[0] - expected).abs().max()), None
    for t in range(tokens.shape[1]):
        logits, state = ours(tokens[:, t : t + 1], state=state)
        worst = max(worst, float((logits[:, 0] - expected[:, t]).abs().max()))
    rounding = float((copy.deepcopy(ours).double()(tokens)[0] - expected).abs().max())
    return worst, rounding


def generation(theirs, ours, tokens: int, repeats: int) -> dict:
    prompt, said = list(range(1, 17)), {}

    def mine():
        said["ours"] = [step[0] for step in stream(ours, prompt, Sampling(temperature=0, max_tokens=tokens))]

    def transformers():
        with torch.no_grad():
            row = theirs.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, use_cache=True)
        said["transformers"] = row[0, len(prompt) :].tolist()

    arms = {"ours": mine, "transformers": transformers}
    for arm in arms.values():
        arm()
    times = interleaved(arms, repeats)
    return {
        "tokens_per_s": {name: summary([tokens / t for t in values]) for name, values in times.items()},
        "speedup": summary([b / a for a, b in zip(times["ours"], times["transformers"])]),
        "same_tokens": said["ours"] == said["transformers"],
    }


def nbytes(state) -> int:
    sizes = []
    map_state(lambda t: sizes.append(t.numel() * t.element_size()), state)
    return sum(sizes)


@torch.no_grad()
def by_position(ours, positions: list[int], steps: int, repeats: int) -> dict:
    row = torch.randint(ours.cfg.vocab_size, (1, max(positions) + steps), generator=torch.Generator().manual_seed(2))
    states, state = {}, None
    for at in range(0, max(positions)):
        if at in (0, *positions) or at % PREFILL == 0:  # a piece ends at every position and every PREFILL tokens
            end = min(p for p in (*positions, (at // PREFILL + 1) * PREFILL) if p > at)
            _, state = ours(row[:, at:end], state=state)
            if end in positions:
                states[end] = map_state(Tensor.clone, state)

    def walk(position: int):
        state = map_state(Tensor.clone, states[position])  # attention would append in place
        for t in range(position, position + steps):
            _, state = ours(row[:, t : t + 1], state=state)

    arms = {p: (lambda p=p: walk(p)) for p in positions}
    for arm in arms.values():
        arm()
    rates = {p: summary([steps / t for t in values]) for p, values in interleaved(arms, repeats).items()}
    medians = [r["median"] for r in rates.values()]
    return {
        "tokens_per_s": rates,
        "spread": (max(medians) - min(medians)) / min(medians),
        "state_bytes": {p: nbytes(states[p]) for p in positions},
    }


def table(document: dict) -> str:
    lines = [", ".join(f"{key} {value}" for key, value in document["machine"].items())]
    for name, r in document["models"].items():
        rates = r["generate"]["tokens_per_s"]
        size, verdict = f"{r['parameters']:,} parameters", "agree" if r["generate"]["same_tokens"] else "DIFFER"
        lines += [""]
        lines += [f"{name}: {size}, logits differ by {r['deviation']:.0e} at most; tokens generated {verdict}"]
        lines += [f"  {arm:14} {span(rate)} tokens/s" for arm, rate in rates.items()]
        lines.append(f"  {'ratio':14} {span(r['generate']['speedup'], form='.2f')}")
        at = r["position"]
        for p, rate in at["tokens_per_s"].items():
            lines.append(f"  at {p:>8}    {span(rate)} tokens/s, state {at['state_bytes'][p]:,} bytes")
        lines.append(f"  {'spread':14} {at['spread']:.1%}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {','.join(MODELS)} (default: all)")
    parser.add_argument("--tokens", type=int, default=100, help="tokens that a round generates (default: 100)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds: does everything run?")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE")
    args = parser.parse_args()
    known = QUICK if args.quick else MODELS
    names = list(QUICK) if args.quick else args.models.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown {unknown[0]!r}; use some of {','.join(known)}")
    tokens, repeats, steps = (8, 2, 4) if args.quick else (args.tokens, args.repeats, STEPS)
    positions = [p // 20 for p in POSITIONS] if args.quick else POSITIONS
    torch.set_num_threads(args.threads)
    document = {"machine": machine(), "models": {}}
    for name in names:
        theirs, ours = pair(known[name])
        worst, rounding = deviation(theirs, ours)
        if not worst <= max(AGREE, 2 * rounding):  # NaN too
            raise SystemExit(
                f"{name}: logits deviate by {worst:.1e}, more than {AGREE:.0e} and than twice their distance from "
                f"fp64, {rounding:.1e}; no time is worth taking"
            )
        document["models"][name] = {
            "parameters": sum(p.numel() for p in ours.parameters()),
            "deviation": worst,
            "their_rounding": rounding,
            "generate": generation(theirs, ours, tokens, repeats),
            "position": by_position(ours, positions, steps, repeats),
        }
        note(name)
    print(table(document), file=sys.stderr)
    write(document, args.json)


if __name__ == "__main__":
    main()
