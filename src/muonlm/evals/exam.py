"""An exam in word problems: does the reply, steps and all, end in the right number?

    strict     the reply's first `#### n`            flexible     its last number, wherever it stands
    correct    n is the answer as a decimal: commas, $ and a final dot do not count, 72 = 72.0
    steps      every `a ∘ b = c` of the reply is one of the right solution's, in its order (strict correct or not)
    samples    K > 1: K replies a question at `temperature`, each drawn by its own seed; the majority of their strict
               answers counts, the first seen of equals; a reply without one has no vote

Only what the model writes is scored; it answers until its stop token, greedily, at most twice as long as the longest
right reply. The questions of "held_out" have sentences and sums that no training row has; those of
"train" are drawn with another seed than the training rows. `guessing` is what always saying the most frequent answer of
these very questions gives; copying a number of the question is never right. The problems are our own, not GSM8K's.

Raises   UserError: a run without tokenizer, problems longer than its context, impossible settings
Source   X. Wang et al., arXiv:2203.11171 (majority of samples)
"""

import re
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from muonlm.errors import UserError
from muonlm.sampling import Sampling

from .stats import percent, score
from .subject import Subject

LARGEST = 99  # number of a question
SEED = 1  # of the questions; training rows have seed 0
TEMPERATURE = 0.7  # of samples that vote
STRICT = re.compile(r"#### (-?[0-9.,]+)")
FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
EQUATION = re.compile(r"\d+ [-+*/] \d+ = \d+")
DEFAULT_TEMPLATE = "qa"  # for a run that was not trained on conversations


@dataclass(frozen=True, kw_only=True)
class Options:
    steps: str = "1-3"
    """how many steps a story may have: the least and the greatest number, or one number"""
    split: str = "held_out"
    """held_out, or train: new ones of that kind"""
    samples: int = 1
    """replies to a question; more than 1 also vote"""

    def __post_init__(self):
        if not re.fullmatch(r"\d(-\d)?", self.steps):
            raise UserError(
                f"`steps` {self.steps!r}: give the least and the greatest number of steps, such as 1-3, or one number"
            )
        if self.samples < 1:
            raise UserError(f"`samples` {self.samples} must be at least 1.")

    @property
    def span(self) -> tuple[int, int]:
        return int(self.steps[0]), int(self.steps[-1])


def measure(subject: Subject, options: Options, *, limit: int) -> dict:
    """Scores of `limit` questions; the items are every question and reply."""
    from muonlm.data.synthetic.word_problems import rows
    from muonlm.data.text.templates import template
    from muonlm.engine import complete

    problems = list(rows(limit, options.span, largest=LARGEST, seed=SEED, split=options.split))
    form = template(subject.config.data.template or DEFAULT_TEMPLATE)
    model, tokenizer = subject.load()
    asked = [[{"role": "user", "content": row["question"]}] for row in problems]
    prompts = [form.prompt(turns, tokenizer) for turns in asked]
    longest = _longest(form, tokenizer, problems, asked, prompts)
    room = subject.room(model, max(map(len, prompts)), longest, shorter="--steps 1-1")
    stop = frozenset({form.stop_id(tokenizer)})

    def replies(temperature: float, seed: int = 0) -> list[str]:
        sampling = Sampling(temperature=temperature, max_tokens=room, seed=seed)
        found = complete(model, prompts, sampling, stop=stop, vocab=tokenizer.vocab_size)
        return [form.reply(tokenizer.decode(ids)) for ids in found]

    items = [_judge(row, reply) for row, reply in zip(problems, replies(temperature=0), strict=True)]
    result = {
        "split": options.split,
        "steps": list(options.span),
        "largest": LARGEST,
        "template": form.name,
        **_scores(items),
    }
    if options.samples > 1:
        drawn = [replies(TEMPERATURE, seed) for seed in range(options.samples)]
        result |= _vote(problems, items, drawn) | {"samples": options.samples, "temperature": TEMPERATURE}
    return result | {"items": items}


def lines(result: dict) -> list[str]:
    by = "  ".join(f"{k}-step {s['accuracy']:.1%} of {s['n']}" for k, s in result["by_steps"].items())
    shown = [
        f"{result['run']} ({result['checkpoint']}): word_problems ({result['split']}) exact {percent(result)} "
        f"({result['correct']} of {result['n']})  last number {result['flexible']['accuracy']:.1%}  "
        f"all steps right {result['right_steps']['accuracy']:.1%}  guessing {result['guessing']:.1%}  {by}"
    ]
    if "majority" in result:
        shown.append(
            f"  {result['samples']} samples: one {percent(result['single'])}  majority {percent(result['majority'])}  "
            f"any {percent(result['any_sample'])}"
        )
    return shown


def strict_answer(reply: str) -> Decimal | None:
    found = STRICT.search(reply)
    return decimal(found[1]) if found else None


def flexible_answer(reply: str) -> Decimal | None:
    found = FLEXIBLE.findall(reply)
    return decimal(found[-1]) if found else None


def decimal(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", "").replace("$", "").removesuffix("."))
    except InvalidOperation:
        return None


def _judge(row: dict, reply: str) -> dict:
    gold, found = Decimal(row["answer"]), strict_answer(reply)
    return {
        "question": row["question"],
        "rationale": row["rationale"],
        "answer": row["answer"],
        "steps": row["steps"],
        "reply": reply,
        "found": None if found is None else str(found),
        "correct": found == gold,
        "flexible": flexible_answer(reply) == gold,
        "right_steps": EQUATION.findall(reply) == row["rationale"].split("\n"),
    }


def _scores(items: list[dict]) -> dict:
    by_steps = {k: [item["correct"] for item in items if item["steps"] == k] for k in range(10)}
    return {
        **score([item["correct"] for item in items]),
        "flexible": score([item["flexible"] for item in items]),
        "right_steps": score([item["right_steps"] for item in items]),
        "guessing": Counter(item["answer"] for item in items).most_common(1)[0][1] / len(items),
        "by_steps": {str(k): score(right) for k, right in by_steps.items() if right},
    }


def _vote(problems: list[dict], items: list[dict], drawn: list[list[str]]) -> dict:
    """Scores of single samples, of their majority, and of the best of them (an oracle's choice)."""
    singles, majority, oracle = [], [], []
    for row, item, replies in zip(problems, items, zip(*drawn, strict=True), strict=True):
        gold, answers = Decimal(row["answer"]), [strict_answer(reply) for reply in replies]
        votes = Counter(answer for answer in answers if answer is not None)  # in order of first sight
        item["samples"] = list(replies)
        singles += [answer == gold for answer in answers]
        majority.append(bool(votes) and votes.most_common(1)[0][0] == gold)
        oracle.append(gold in answers)
    return {"single": score(singles), "majority": score(majority), "any_sample": score(oracle)}


def _longest(form, tokenizer, problems, asked, prompts) -> int:
    """Tokens of the longest right reply."""
    right = [
        [*turns, {"role": "assistant", "content": row["answer"], "rationale": row["rationale"]}]
        for turns, row in zip(asked, problems, strict=True)
    ]
    return max(len(ids) - len(p) for (ids, _), p in zip(form.encode_batch(right, tokenizer), prompts, strict=True))
