"""Exact match on word problems: does the reply, steps and all, end in the right number?

    strict     the reply's first `#### n`            flexible     its last number, wherever it stands
    correct    n is the answer as a decimal: commas, $ and a final dot do not count, 72 = 72.0
    steps      every `a ∘ b = c` of the reply is one of the right solution's, in its order (strict correct or not) (1)
    Wilson     centre (p + z²/2n) / (1 + z²/n), half-width z·√(p(1 − p)/n + z²/4n²) / (1 + z²/n), z = 1.96 (2)
    samples    K > 1: K replies a question at `temperature`, each drawn by its own seed; the majority of their strict
               answers counts, the first seen of equals; a reply without one has no vote

Only what the model writes is scored; it answers until its stop token, greedily, at most twice as long as the longest
right reply. The questions of "held_out" have sentences and sums that no training row has; those of
"train" are drawn with another seed than the training rows. `guessing` is what always saying the most frequent answer of
these very questions gives; copying a number of the question is never right. The problems are our own, not GSM8K's.

Raises   UserError: a run without tokenizer, problems longer than its context, impossible settings
Source   E. B. Wilson, JASA 22 (1927); X. Wang et al., arXiv:2203.11171 (majority of samples)
"""

import json
import re
from collections import Counter
from decimal import Decimal, InvalidOperation
from pathlib import Path

import torch

from muonlm.data.synthetic.word_problems import rows
from muonlm.data.text.templates import Template, template
from muonlm.engine import complete
from muonlm.errors import UserError
from muonlm.training import checkpoint

SEED = 1  # of the questions; training rows have seed 0
STRICT = re.compile(r"#### (-?[0-9.,]+)")
FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
EQUATION = re.compile(r"\d+ [-+*/] \d+ = \d+")
DEFAULT_TEMPLATE = "qa"  # for a run that was not trained on conversations


def exact_match(
    run: str | Path,
    *,
    n: int = 200,
    steps: tuple[int, int] = (1, 3),
    largest: int = 99,
    split: str = "held_out",
    which: str = "best",
    device: str = "cpu",
    samples: int = 1,
    temperature: float = 0.7,
) -> dict:
    """The result, also written to RUN/evals/word_problems.json with every question and reply."""
    if n < 1 or samples < 1:
        raise UserError(f"{n} word problems, {samples} samples of each: both must be at least 1; try --limit 200")
    problems = list(rows(n, steps, largest=largest, seed=SEED, split=split))
    folder, path = checkpoint.locate(run, which)
    form = template(checkpoint.read_config(folder).data.template or DEFAULT_TEMPLATE)
    model, tokenizer = checkpoint.load(path, torch.device(device))
    if tokenizer is None:
        raise UserError(f"run {folder} has no tokenizer, so it cannot read a question; evaluate a run trained on text")
    asked = [[{"role": "user", "content": row["question"]}] for row in problems]
    prompts = [form.prompt(turns, tokenizer) for turns in asked]
    settings = {
        "max_tokens": _room(form, tokenizer, problems, asked, prompts, model.context, folder),
        "stop": frozenset({form.stop_id(tokenizer)}),
        "vocab": tokenizer.vocab_size,
    }

    def replies(**sampling) -> list[str]:
        return [form.reply(tokenizer.decode(ids)) for ids in complete(model, prompts, **settings, **sampling)]

    greedy = replies()
    items = [_judge(row, reply) for row, reply in zip(problems, greedy, strict=True)]
    result = {
        "task": "word_problems",
        "run": str(folder),
        "checkpoint": path.name,
        "step": checkpoint.read_meta(path)["step"],
        "split": split,
        "steps": list(steps),
        "largest": largest,
        "template": form.name,
        **score([item["correct"] for item in items]),
        "flexible": score([item["flexible"] for item in items]),
        "right_steps": score([item["right_steps"] for item in items]),
        "guessing": Counter(row["answer"] for row in problems).most_common(1)[0][1] / n,
        "by_steps": {
            str(k): score([item["correct"] for item in items if item["steps"] == k])
            for k in range(steps[0], steps[1] + 1)
            if any(item["steps"] == k for item in items)
        },
    }
    if samples > 1:
        drawn = [replies(temperature=temperature, seed=seed) for seed in range(samples)]
        result |= _vote(problems, items, drawn) | {"samples": samples, "temperature": temperature}
    target = folder / "evals" / "word_problems.json"
    target.parent.mkdir(exist_ok=True)
    checkpoint.write_atomically(target, json.dumps(result | {"items": items}, indent=1, ensure_ascii=False))
    return result


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


def wilson(correct: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval (2) of a share: 0 of 100 -> (0, 0.0370), 50 of 100 -> (0.4038, 0.5962)."""
    p = correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5 / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def score(right: list[bool]) -> dict:
    n, correct = len(right), sum(right)
    return {"n": n, "correct": correct, "accuracy": correct / n, "interval": list(wilson(correct, n))}


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


def _room(form: Template, tokenizer, problems, asked, prompts, context: int | None, folder: Path) -> int:
    """Tokens that a reply may have."""
    right = [
        [*turns, {"role": "assistant", "content": row["answer"], "rationale": row["rationale"]}]
        for turns, row in zip(asked, problems, strict=True)
    ]
    longest = max(len(ids) - len(p) for (ids, _), p in zip(form.encode_batch(right, tokenizer), prompts, strict=True))
    prompt = max(map(len, prompts))
    if context is not None and prompt + longest > context:
        raise UserError(
            f"these word problems have up to {prompt} + {longest} tokens with their answers, and run {folder} sees "
            f"{context}; ask shorter ones (--steps 1-1), or train with --model.block_size {prompt + longest}"
        )
    return 2 * longest if context is None else min(2 * longest, context - prompt)
