"""Chain-of-thought data: rows of questions with worked answers, in one form whose reasoning comes before the answer.

    row      {"question", "rationale", "answer", "type", "text"}
    text     "Question: q\\nAnswer: rationale\\n#### answer"
    answer   what stands behind `####`, in \\boxed{…}, or behind "the answer is"; a number loses commas, spaces,
             currency, unit and final dot ("$1,200.00 in all." -> "1200.00"); what is no number stays as it is ("B",
             "3/4")
    type     the first that fits: percentage, equation, geometry, arithmetic (at most one calculation), word_problem,
             default
    program  the solution is Python, by its `source` (MathInstruct: data/PoT/…) or its looks. Never executed, so that
             its answer is unknown: dropped, or with drop_programs=False kept as it is with "program": true and answer
             ""
    overlap  a question is dropped if its words are those of an `exclude`d one, or share SHINGLE of them in a row with
             it: so no question of a test set is trained on. Words are compared without case and punctuation

Written  to/train.jsonl (all rows) · examples.json (the first 10) · metadata.json (counts of everything kept and
         dropped, sources, licences, checksum). Nothing random: the same rows give the same bytes. In bounded memory:
         the words of the excluded questions are all that is held
Safety   written aside, synced, renamed (sealed.py): the folder is whole or absent
Raises   UserError: unknown schema or column (with what was found), no usable row, a target that exists
Source   X. Yue et al., MAmmoTH, arXiv:2309.05653 (MathInstruct: CoT and PoT rows); 13-word overlap: T. Brown et al.,
         arXiv:2005.14165, appendix C
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from muonlm.errors import UserError
from muonlm.storage import Growing, digest, write

from ..sources import expand as src
from ..text.conversations import read_conversations
from .options import PrepOptions, as_list
from .sealed import Log, refuse_early, sealed

SHINGLE = 13  # words in a row that two questions may not share
TEST_SET = "openai/gsm8k"  # what is excluded by itself where the hub is in use
EXCLUDED_SPLIT = "test"  # of what is excluded, where it has splits
TYPES = ("percentage", "equation", "geometry", "arithmetic", "word_problem", "default")
DROPPED = ("program", "overlap", "no answer", "no reasoning", "dialogue")

HASHES = re.compile(r"####[ \t]*([^\n]+)")
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
# A sentence that says the answer: up to a dot that ends it, or the end of the line.
SAID = re.compile(
    r"(?:\b(?:so|thus|hence|therefore),?\s+)?(?:\bthe\s+)?\b(?:final\s+|correct\s+)?answer(?:\s+is\s*:?|\s*:)\s*"
    r"(\S[^\n]*?)(?:\.(?=\s|$)|(?=\n|$))",
    re.IGNORECASE,
)
NUMBER = re.compile(
    r"(?:\w+\s*=\s*)?([-−]?)\s*[$€£]?\s*([-−]?(?:\d[\d,]*(?:\.\d+)?|\.\d+))(?:\s*%|\s+[A-Za-z][A-Za-z ]*)?\.?"
)
PROGRAM = re.compile(r"^\s*(?:import \w|from \w+ import |def \w+\(|print\(|```python)", re.MULTILINE)
ASSIGNMENT = re.compile(r"^[A-Za-z_]\w* = [^=\n]+$")
CALCULATION = re.compile(r"\d[\d.,]*\s*%?\s*(?:[-+*/×÷]|x(?=\s))\s*[$(]?\d[^=\n]*=")
PERCENTAGE = re.compile(r"%|\bpercent", re.IGNORECASE)
EQUATION = re.compile(
    r"\b(?:equations?|solve for|find the value of [a-z]\b)|\b[a-z]\s*=|\d[a-z]\b\s*[-+=]", re.IGNORECASE
)
GEOMETRY = re.compile(
    r"\b(?:triang|circle|rectang|squares?\b(?! root)|polygon|radius|diameter|perimeter|circumference|angle|cylinder|"
    r"cone\b|sphere|cube\b|area\b|volume|hypotenuse|parallel)",
    re.IGNORECASE,
)
STORY = re.compile(r"\bhow (?:many|much|far|long|old|fast)\b", re.IGNORECASE)


def prepare_cot(
    sources,
    to,
    *,
    overwrite: bool = False,
    log: Log | None = None,
    progress: Callable[[int], None] | None = None,
    **settings,
) -> dict:
    """Write the folder `to`; returns its metadata.

    settings: of PrepOptions. `columns` are two, of the question and the solution, for rows of no known schema. Without
    `exclude`, the test set of GSM8K is excluded if a source is of the hub, else nothing (the metadata says which).
    progress: called with the number of rows read. log: see `sealed`.
    """
    options, specs = PrepOptions(**settings), [str(s) for s in as_list(sources)]
    refuse_early(to, overwrite)
    names = _question_and_solution(options)
    files = [source for spec in specs for source in src.expand(spec, name=options.name, split=options.split)]
    src.refuse_text(files)
    exclude = as_list(options.exclude or [])
    if options.exclude is None and any(source.form == "hub" for source in files):
        exclude = [TEST_SET]
    forbidden = _Forbidden(exclude)
    what = {"specs": specs, "exclude": exclude, "settings": [names, options.max_examples, options.drop_programs]}
    with sealed(to, overwrite=overwrite, log=log) as work:
        if finished := work.begin(files, [], what):
            return finished
        return work.complete(
            lambda: _write(work.out, specs, files, names, options, forbidden, progress), "metadata.json", ascii=False
        )


def _write(out: Path, specs, files, names, options: PrepOptions, forbidden: "_Forbidden", progress) -> dict:
    """The rows and the first ten of them; returns the metadata."""
    counts, examples, read = Counter(), [], 0
    with Growing(out / "train.jsonl") as rows:
        for spec in specs:
            kept = 0
            for record, where in src.rows([spec], name=options.name, split=options.split):
                read += 1
                if progress:
                    progress(read)
                for row in _examples(record, where, names):
                    fate = _fate(row, forbidden, options.drop_programs)
                    counts[fate] += 1
                    if fate == "kept":
                        counts[row["type"]] += 1
                        kept += 1
                        rows.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                        examples += [row] if len(examples) < 10 else []
                if kept >= options.max_examples > 0:
                    break
    if not counts["kept"]:
        why = ", ".join(f"{counts[fate]} {fate}" for fate in DROPPED if counts[fate]) or "there are none"
        raise UserError(
            f"{', '.join(specs)}: of {read} rows none can be used ({why}); other columns are named by "
            "`columns` QUESTION,SOLUTION"
        )
    write(out / "examples.json", json.dumps(examples, ensure_ascii=False, indent=1))
    return {
        "format_version": 1,
        "layout": "cot",
        "sources": specs,
        "name": options.name,
        "split": options.split,
        "columns": names,
        "licences": sorted({text for source in files if (text := src.licence(source))}),
        "rows_read": read,
        "examples": counts["kept"],
        "types": {kind: counts[kind] for kind in TYPES},
        "dropped": {fate: counts[fate] for fate in DROPPED},
        "excluded": {"sources": forbidden.specs, "questions": forbidden.count, "words_in_a_row": SHINGLE},
        "drop_programs": options.drop_programs,
        "max_examples": options.max_examples,
        "sha256": digest(out / "train.jsonl", "sha256"),
    }


def number(text: str) -> str | None:
    """The number that an answer is, without commas, spaces, currency, unit and final dot; else None."""
    found = NUMBER.fullmatch(text.strip())
    if not found:
        return None
    sign, digits = found.groups()
    return (sign + digits.replace(",", "")).replace("−", "-")


def take_answer(solution: str) -> tuple[str, str] | None:
    """(reasoning, answer) of a solution, wherever in it the answer stands; None where none is found."""
    for pattern in (HASHES, BOXED, SAID):
        if found := [*pattern.finditer(solution)]:
            last = found[-1]
            if pattern is BOXED:  # part of a sentence: that one stays
                return solution.strip(), _normal(last[1])
            # What follows an answer is reasoning that came too late.
            reasoning = f"{solution[: last.start()].rstrip()}\n{solution[last.end() :].strip()}"
            return reasoning.strip(), _normal(last[1])
    return None


def kind(question: str, rationale: str) -> str:
    """Which of TYPES."""
    if PERCENTAGE.search(question):
        return "percentage"
    if EQUATION.search(question):
        return "equation"
    if GEOMETRY.search(question):
        return "geometry"
    calculations = len(CALCULATION.findall(rationale))
    if len(re.findall(r"\d+", question)) >= 2 and (calculations == 1 or not STORY.search(question)):
        return "arithmetic"
    return "word_problem" if STORY.search(question) else "default"


def is_program(solution: str, source: str = "") -> bool:
    """Whether a solution is a Python program, by its source or its looks: two lines in three are assignments."""
    if "/PoT/" in source or PROGRAM.search(solution):
        return True
    lines = [line for line in solution.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return len(lines) >= 2 and 3 * sum(bool(ASSIGNMENT.match(line)) for line in lines) >= 2 * len(lines)


def _examples(record: dict, where: str, names: list[str]) -> Iterator[dict]:
    """The rows of a record; "answer" is None where none is found, "dialogue" is set where there are more turns."""
    if names:
        lacking = [column for column in names if column not in record]
        if lacking:
            raise UserError(
                f"{where}: no column {lacking[0]!r}; found {', '.join(record)}; give two of them: "
                "`columns` QUESTION,SOLUTION"
            )
        record = {"question": record[names[0]], "answer": record[names[1]], "source": record.get("source")}
    for turns, _ in read_conversations([(record, where)]):
        turns = [turn for turn in turns if turn["role"] != "system"]
        if [turn["role"] for turn in turns] != ["user", "assistant"]:
            yield {"dialogue": True}
            continue
        asked, solved = turns
        question = "\n".join(part.strip() for part in (asked["content"], asked.get("input", "")) if part.strip())
        rationale = solved.get("rationale")
        program = is_program(rationale or solved["content"], str(record.get("source") or ""))
        if rationale is not None:
            found = rationale.strip(), _normal(solved["content"])
        elif program:
            found = solved["content"].strip(), ""
        else:
            found = take_answer(solved["content"]) or (solved["content"], None)
        row = {"question": question, "rationale": found[0], "answer": found[1], "type": kind(question, found[0])}
        row["text"] = f"Question: {question}\nAnswer: {found[0]}" + (f"\n#### {found[1]}" if found[1] else "")
        yield row | ({"program": True} if program else {})


def _fate(row: dict, forbidden: "_Forbidden", drop_programs: bool) -> str:
    """ "kept", or which of DROPPED."""
    if "dialogue" in row:
        return "dialogue"
    if row["question"] in forbidden:
        return "overlap"
    if "program" in row:
        return "program" if drop_programs else "kept"
    if not row["answer"]:
        return "no answer"
    return "kept" if row["rationale"] else "no reasoning"


def _normal(answer: str) -> str:
    found = number(answer)
    return answer.strip().removesuffix(".").strip() if found is None else found


class _Forbidden:
    """The words of questions that may not occur: whole, and every SHINGLE of them in a row."""

    def __init__(self, specs: list[str]):
        self.specs, self.count = specs, 0
        self._whole: set[int] = set()
        self._shingles: set[int] = set()
        for record, where in src.rows(self.specs, split=EXCLUDED_SPLIT) if self.specs else ():
            for turns, _ in read_conversations([(record, where)]):
                asked = next((turn["content"] for turn in turns if turn["role"] == "user"), "")
                words = _words(asked)
                self.count += 1
                self._whole.add(_digest(words))
                self._shingles.update(_shingles(words))

    def __contains__(self, question: str) -> bool:
        words = _words(question)
        return _digest(words) in self._whole or any(s in self._shingles for s in _shingles(words))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _shingles(words: list[str]) -> Iterator[int]:
    return (_digest(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1))


def _digest(words: list[str]) -> int:
    return int.from_bytes(hashlib.blake2b(" ".join(words).encode("utf-8", "replace"), digest_size=8).digest())


def _question_and_solution(options: PrepOptions) -> list[str]:
    names = options.column_names
    if names and len(names) != 2:
        raise UserError(
            f"`columns` {','.join(names)}: chain-of-thought data has two columns; give `columns` QUESTION,SOLUTION"
        )
    return names
