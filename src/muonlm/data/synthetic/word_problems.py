"""Word problems: arithmetic stories of one to four steps, each with a right and a wrong worked solution.

    step k   a_k ∘ b_k = a_{k+1}, ∘ ∈ {+, −, ×, ÷}, ÷ exact; the answer of a K-step story is a_{K+1} (1)
    numbers  2 ≤ all of them ≤ largest; a_1 ≤ largest/2; b_k ≤ largest/3 of + and −, ≤ 9 of × and ÷ (2)
    answer   is none of the question's numbers: copying one of them is never right (3)
    split    an equation (a, ∘, b) is reserved if a or b lies in a band 13–14, 33–34, 53–54, … (n mod 20), or, for +
             and −, if its hash says so (1 of 8; a + b and b + a are one). No row of the training split has a reserved
             equation, its wrong solution included. In a held-out solution every sum and difference is reserved, and
             there is at least one; products and quotients are those of training: tables are known or not, nothing
             infers them (4)
    wrong    one mistake in one step, carried on through the steps after it, and the answer differs: (5)
                 result     a ∘ b = c ± 1, ± 2 or ± 10       (the only false equation)
                 operation  + for −, × for + and so on       (a true equation of the wrong story)
                 number     another number of the question in the place of b

The sentences of the two splits are disjoint; they use the same words, names and things (a name whose token was never
trained stops a small model before the sums begin: LOG 2026-11-22). Row i is a function of (seed, split, i) and the
settings: instant seek, whatever n is.

Rows     {"question", "rationale": "12 + 5 = 17\\n17 - 4 = 13", "answer": "13", "wrong_rationale", "wrong_answer",
         "mistake": "operation in step 2", "steps": 2, "text": question and solution as prose, for pretraining}
Digits   take a tokenizer that makes each digit a token (bpe:1024:digits, byte): sums are learned digit by digit
Cost     about 6,000 rows a second at the defaults
Raises   UserError for steps outside 1 … 4, a largest number outside 20 … 999, an unknown split, a negative count
"""

import functools
import hashlib
import random
from collections.abc import Iterator

from muonlm.errors import UserError

STEPS = (1, 4)  # what `steps` may span
LARGEST = (20, 999)
FACTORS = range(2, 10)  # multipliers and divisors
# How often a step has this operation, where the numbers allow all four. Division is rarer: it makes the numbers small.
WEIGHTS = {"+": 3, "-": 3, "*": 2, "/": 1}
MISREAD = {"+": "-*", "-": "+", "*": "+", "/": "-*"}  # operations a reader may take for this one
SLIPS = (1, -1, 2, -2, 10, -10)

NAMES = (
    "Tom Anna Ben Sara Max Lucy Sam Nina Paul Emma Jack Mia Leo Ella Dan Ruth Mark Jane Luke Rose Peter Clara John "
    "Alice Fred Julia Noah Maria Simon Laura Eric Helen Oscar Ida Ralph Carol Frank Edith Carl Susan Ralf Judy Alan "
    "Betty Roger Irene Ted Doris Bruno Agnes Felix Greta"
).split()
THINGS = (
    "apples pens books coins cards stones eggs shells nuts stamps toys balls maps roses letters pictures fish "
    "chairs ships horses stars songs plates tickets"
).split()

# In an event, {name} has the things so far, {new} is the person whom the story then goes on with, {other} a bystander.
TEMPLATES = {
    "train": {
        "start": (
            "{name} has {a} {things}.",
            "{name} has {a} {things} at home.",
            "In the morning {name} has {a} {things}.",
            "{name} starts with {a} {things}.",
            "{name} owns {a} {things}.",
            "At first {name} has {a} {things}.",
            "There are {a} {things} and {name} has all of them.",
            "{name} has a bag with {a} {things}.",
            "Today {name} starts with {a} {things}.",
        ),
        "groups": (
            "{name} has {a} boxes with {b} {things} in each.",
            "{name} buys {a} bags of {b} {things} each.",
            "There are {a} bags and {name} puts {b} {things} in each.",
            "In the morning {name} has {a} boxes of {b} {things} each.",
        ),
        "+": (
            "{name} buys {b} more {things}.",
            "{name} gets {b} {things} from {other}.",
            "{name} gets {b} more from {other}.",
            "{name} finds {b} {things}.",
            "Then {name} finds {b} more.",
            "Then {name} buys {b} {things}.",
            "{other} gives {name} {b} more {things}.",
            "Later {other} gives {name} {b} more.",
            "Later {name} gets {b} more {things}.",
            "After that {name} finds {b} more of them.",
            "Next {name} buys another {b} {things}.",
            "{new} has {b} more {things} than {name}.",
            "{new} has {b} more than {name}.",
            "{new} owns {b} more {things} than {name}.",
            "Then {new} has {b} more of them than {name}.",
        ),
        "-": (
            "{name} gives {b} {things} to {other}.",
            "{name} gives {b} to {other}.",
            "{name} loses {b} of them.",
            "{name} loses {b} {things}.",
            "Then {name} sells {b} {things}.",
            "Then {name} loses {b} of the {things}.",
            "{other} takes {b} of the {things}.",
            "Later {other} takes {b} of them.",
            "Later {name} sells {b} of them.",
            "After that {name} gives {other} {b} of the {things} to keep.",
            "Next {name} sells {b}.",
            "{new} has {b} fewer {things} than {name}.",
            "{new} has {b} fewer than {name}.",
            "{new} owns {b} fewer {things} than {name}.",
            "Then {new} has {b} fewer of them than {name}.",
        ),
        "*": (
            "{new} has {b} times as many {things} as {name}.",
            "{new} owns {b} times as many as {name}.",
            "Then {new} has {b} times as many as {name}.",
            "{name} works and now has {b} times as many.",
            "Then {name} makes it {b} times as many {things}.",
            "After that {name} has {b} times as many {things}.",
        ),
        "/": (
            "{name} puts them in {b} equal bags and keeps one bag.",
            "{name} shares the {things} in {b} equal parts and keeps one.",
            "Then {name} makes {b} equal boxes and keeps one of them.",
            "Later {name} puts the {things} in {b} equal boxes and keeps one box.",
            "Next {name} makes {b} equal parts of them and keeps one part.",
        ),
        "ask": (
            "How many {things} does {name} have now?",
            "How many does {name} have?",
            "In the end, how many {things} does {name} have?",
            "So how many {things} does {name} have?",
            "How many of them does {name} have at last?",
            "After all that, how many {things} does {name} have?",
        ),
    },
    "held_out": {
        "start": (
            "{name} starts the morning with {a} {things}.",
            "At home {name} has {a} {things}.",
        ),
        "groups": (
            "{name} has {a} boxes and there are {b} {things} in each.",
            "{name} starts with {a} bags of {b} {things} each.",
        ),
        "+": (
            "{name} then finds {b} more {things}.",
            "Then {name} gets {b} more {things} from {other}.",
            "Now {name} buys {b} more.",
            "{new} has {b} {things} more than {name}.",
        ),
        "-": (
            "{name} then loses {b} {things}.",
            "Then {name} gives {b} of them to {other}.",
            "Now {name} sells {b} of the {things}.",
            "{new} has {b} {things} fewer than {name}.",
        ),
        "*": (
            "Now {new} has {b} times as many {things} as {name}.",
            "{name} then has {b} times as many.",
        ),
        "/": (
            "{name} makes {b} equal parts and keeps one of the parts.",
            "Then {name} puts the {things} in {b} equal bags and keeps one.",
        ),
        "ask": (
            "Now how many {things} does {name} have?",
            "How many {things} does {name} have in the end?",
        ),
    },
}


def rows(
    n: int, steps: tuple[int, int] = (1, 3), *, largest: int = 99, seed: int = 0, split: str = "train", start: int = 0
) -> Iterator[dict]:
    """Rows start … n − 1 of a split; `steps` is the (least, greatest) number of steps of a story."""
    _check(n, steps, largest, split)
    return (problem(i, steps, largest=largest, seed=seed, split=split) for i in range(start, n))


def problem(i: int, steps: tuple[int, int] = (1, 3), *, largest: int = 99, seed: int = 0, split: str = "train") -> dict:
    """Row i."""
    draw = Draw(f"word problem {seed} {split} {i}")
    length = steps[0] + draw.below(steps[1] - steps[0] + 1)
    chain = None
    while chain is None:  # some lead nowhere: the answer is a number of the question, or no step goes on from here
        chain = _chain(draw, length, largest, split)
    question = _story(draw, chain, TEMPLATES[split])
    mistake, wrong = _mistaken(draw, chain, largest, split)
    rationale, answer = [_equation(*step) for step in chain], chain[-1][3]
    return {
        "question": question,
        "rationale": "\n".join(rationale),
        "answer": str(answer),
        "wrong_rationale": "\n".join(_equation(*step) for step in wrong),
        "wrong_answer": str(wrong[-1][3]),
        "mistake": mistake,
        "steps": length,
        "text": f"{question} {', then '.join(rationale)}. The answer is {answer}.",
    }


@functools.lru_cache(maxsize=1 << 16)
def reserved(a: int, op: str, b: int) -> bool:
    """Whether (4) keeps this equation for the held-out split."""
    if _in_band(a) or _in_band(b):
        return True
    if op in "*/":
        return False
    a, b = (min(a, b), max(a, b)) if op == "+" else (a, b)
    return hashlib.blake2b(f"{a} {op} {b}".encode(), digest_size=1).digest()[0] % 8 == 0


def compute(a: int, op: str, b: int) -> int | None:
    """a ∘ b, None where it is no whole number."""
    if op == "/":
        return a // b if a % b == 0 else None
    return a + b if op == "+" else a - b if op == "-" else a * b


class Draw:
    """Random choices made of Random.random() alone, the one sequence that Python promises never to change."""

    def __init__(self, key: str):
        self._random = random.Random(key).random

    def below(self, n: int) -> int:
        return int(self._random() * n)

    def one(self, options):
        return options[self.below(len(options))]

    def weighted(self, weights: dict):
        at = self._random() * sum(weights.values())
        for option, weight in weights.items():
            at -= weight
            if at < 0:
                break
        return option

    def some(self, options: list, count: int) -> list:
        """`count` different ones."""
        left = list(options)
        return [left.pop(self.below(len(left))) for _ in range(count)]


Step = tuple[int, str, int, int]  # a, operation, b, result


def _chain(draw: Draw, length: int, largest: int, split: str) -> list[Step] | None:
    """The equations of a story; None if these draws lead nowhere."""
    a, chain = 2 + draw.below(largest // 2 - 1), []
    for _ in range(length):
        moves = _moves(a, largest, split)
        if not moves:
            return None
        op = draw.weighted({op: WEIGHTS[op] for op in moves})
        b = draw.one(moves[op])
        chain.append((a, op, b, compute(a, op, b)))
        a = chain[-1][3]
    new = split == "train" or any(op in "+-" for _, op, _, _ in chain)  # to the reader of the training rows
    return chain if new and a not in _numbers(chain) else None


@functools.lru_cache(maxsize=4096)
def _moves(a: int, largest: int, split: str) -> dict[str, tuple[int, ...]]:
    """By operation the second numbers that may follow a."""
    terms = range(2, largest // 3 + 1)
    moves = {}
    for op in WEIGHTS:
        fit = tuple(b for b in (terms if op in "+-" else FACTORS) if _allowed((a, op, b), largest, split))
        if fit:
            moves[op] = fit
    return moves


def _allowed(left: tuple[int, str, int], largest: int, split: str) -> bool:
    result = compute(*left)
    return (
        result is not None and 2 <= result <= largest and reserved(*left) == (split == "held_out" and left[1] in "+-")
    )


def _in_band(n: int) -> bool:
    return n % 20 in (13, 14)


def _numbers(chain: list[Step]) -> list[int]:
    """The numbers that the question names."""
    return [chain[0][0], *(b for _, _, b, _ in chain)]


def _equation(a: int, op: str, b: int, result: int) -> str:
    return f"{a} {op} {b} = {result}"


# ---------------------------------------------------------------------------------------------------------- the story


def _story(draw: Draw, chain: list[Step], words: dict) -> str:
    name, *others = draw.some(NAMES, 1 + len(chain))
    things = draw.one(THINGS)
    a, op, b, _ = chain[0]
    # A product at the beginning may be so many boxes of so many things; the first event then is in the opening.
    groups = op == "*" and draw.below(2) == 0
    sentences = [draw.one(words["groups" if groups else "start"]).format(name=name, things=things, a=a, b=b)]
    for (_, op, b, _), other in list(zip(chain, others, strict=True))[groups:]:
        event = draw.one(words[op])
        sentences.append(event.format(name=name, new=other, other=other, things=things, b=b))
        name = other if "{new}" in event else name
    sentences.append(draw.one(words["ask"]).format(name=name, things=things))
    return " ".join(sentences)


# -------------------------------------------------------------------------------------------------------- the mistake


def _mistaken(draw: Draw, chain: list[Step], largest: int, split: str) -> tuple[str, list[Step]]:
    """(what went wrong, the equations written down): a kind of mistake is drawn, then one of its cases."""
    cases: dict[str, list[tuple[str, list[Step]]]] = {}
    for at, (a, op, b, result) in enumerate(chain):
        tries = [("result", (a, op, b, result + slip)) for slip in SLIPS]
        tries += [("operation", (a, wrong, b, compute(a, wrong, b))) for wrong in MISREAD[op]]
        others = {number for number in _numbers(chain)[1:] if number != b}  # not a_1: few would take it twice
        tries += [("number", (a, op, other, compute(a, op, other))) for other in sorted(others)]
        for kind, step in tries:
            wrong = _carry_on([*chain[:at], step], chain[at + 1 :])
            if wrong and wrong[-1][3] != chain[-1][3] and _plausible(wrong, largest, split):
                cases.setdefault(kind, []).append((f"{kind} in step {at + 1}", wrong))
    return draw.one(cases[draw.one(sorted(cases))])  # "result" always has a case: the last step, one off


def _carry_on(done: list[Step], rest: list[Step]) -> list[Step] | None:
    for _, op, b, _ in rest:
        a = done[-1][3]
        if a is None or (result := compute(a, op, b)) is None:
            return None
        done.append((a, op, b, result))
    return done


def _plausible(wrong: list[Step], largest: int, split: str) -> bool:
    """Within the range of right solutions; and a training row never shows a reserved equation."""
    if any(result is None or not 1 <= result <= largest for *_, result in wrong):
        return False
    return split == "held_out" or not any(reserved(a, op, b) for a, op, b, _ in wrong)


def _check(n: int, steps, largest: int, split: str) -> None:
    if split not in TEMPLATES:
        raise UserError(f"unknown split {split!r} of word problems; it is 'train' or 'held_out'")
    if n < 0:
        raise UserError(f"{n} word problems; give a count of 1 or more, such as word_problems:20000")
    low, high = steps
    if not STEPS[0] <= low <= high <= STEPS[1]:
        raise UserError(f"steps {low}-{high}: a word problem has {STEPS[0]} to {STEPS[1]} steps; try 1-3")
    if not LARGEST[0] <= largest <= LARGEST[1]:
        raise UserError(f"largest={largest} must be {LARGEST[0]} to {LARGEST[1]}; 99 is usual")
