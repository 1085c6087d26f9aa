"""Conversations: rows of the usual data sets as one form, a list of turns.

    turn = {"role": "system" | "user" | "assistant", "content": text}
           + "input" (user turns of alpaca: the material that the instruction is about)
           + "rationale" (assistant turns: the reasoning in front of the answer, which is then `content`)

Which schema a row has follows from its columns, row by row (SCHEMAS, PREFERENCES: the first whose columns are there).
Roles come from the field, never from parity. Texts are taken as they are, but for hh-rlhf's and GSM8K's, whose markers
and the white space at them go. A row of seed tasks gives one conversation an instance.

Raises   UserError naming the row: no known schema (what was found, what is known), an unknown role, a field that is no
         text
Sources  minimind (`conversations`), ShareGPT (`from`, `value`), OpenAI (`messages`), stanford_alpaca and its seed
         tasks, K. Cobbe et al., arXiv 2110.14168 (GSM8K: `answer` = reasoning, `<<…>>` calculator marks, `#### n`),
         Y. Bai et al., arXiv 2204.05862 (hh-rlhf: "\n\nHuman: …\n\nAssistant: …")
"""

import re
from collections.abc import Iterable, Iterator

from muonlm.errors import UserError

Turn = dict[str, str]
Conversation = list[Turn]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
SCHEMAS = (  # the columns that show a schema; the first that a row has is taken
    ("conversations",),
    ("messages",),
    ("instruction", "instances"),
    ("instruction", "output"),
    ("question", "rationale", "answer"),
    ("question", "answer"),
    ("prompt", "completion"),
    ("prompt", "response"),
)
PREFERENCES = (
    ("prompt", "chosen", "rejected"),
    ("chosen", "rejected"),
    ("question", "rationale", "answer", "wrong_rationale", "wrong_answer"),
)
SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")  # of hh-rlhf


def read_conversations(rows: Iterable[tuple[dict, str]]) -> Iterator[tuple[Conversation, str]]:
    """(conversation, where) of each row (record, where)."""
    for row, where in rows:
        schema = _schema(row, SCHEMAS, where)
        if schema in (("conversations",), ("messages",)):
            yield _turns(row[schema[0]], f"{where}: {schema[0]}"), where
        elif schema == ("instruction", "instances"):
            if not isinstance(row["instances"], list) or not all(isinstance(i, dict) for i in row["instances"]):
                raise UserError(f'{where}: instances is not a list like [{{"input": "…", "output": "…"}}]')
            for instance in row["instances"]:
                yield _instruction(instance | {"instruction": row["instruction"]}, where), where
        elif schema == ("instruction", "output"):
            yield _instruction(row, where), where
        elif schema == ("question", "rationale", "answer"):
            answer = _answer(_text(row, "answer", where), _text(row, "rationale", where))
            yield [_turn("user", _text(row, "question", where)), answer], where
        elif schema == ("question", "answer"):
            reasoning, mark, number = _text(row, "answer", where).rpartition("####")
            answer = _answer(number.strip() if mark else number, reasoning.rstrip())
            yield [_turn("user", _text(row, "question", where)), answer], where
        else:
            yield [_turn(r, _text(row, k, where)) for r, k in zip(("user", "assistant"), schema, strict=True)], where


def read_preferences(
    rows: Iterable[tuple[dict, str]],
) -> Iterator[tuple[Conversation, Conversation, Conversation, str]]:
    """(turns both sides share, the chosen side's own, the rejected side's own, where) of each row."""
    for row, where in rows:
        schema = _schema(row, PREFERENCES, where)
        if "wrong_answer" in schema:
            right = _answer(_text(row, "answer", where), _text(row, "rationale", where))
            wrong = _answer(_text(row, "wrong_answer", where), _text(row, "wrong_rationale", where))
            yield [_turn("user", _text(row, "question", where))], [right], [wrong], where
            continue
        prompt = _side(row, "prompt", "user", where) if "prompt" in schema else []
        if prompt and prompt[-1] == _turn("assistant", ""):
            prompt.pop()  # "\n\nHuman: …\n\nAssistant:" opens the reply
        # Without a prompt a side is the whole dialogue, so a bare string cannot be one.
        speaker = "assistant" if prompt else None
        chosen, rejected = (_behind(prompt, _side(row, key, speaker, where)) for key in ("chosen", "rejected"))
        same = 0
        while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
            same += 1
        yield chosen[:same], chosen[same:], rejected[same:], where


def _behind(prompt: Conversation, side: Conversation) -> Conversation:
    """The prompt and the side's turns; some data sets repeat the prompt in each side."""
    repeats = bool(prompt) and prompt[-1] in side and side[0]["role"] != "assistant"
    return side if repeats else prompt + side


def _schema(row: dict, known: tuple[tuple[str, ...], ...], where: str) -> tuple[str, ...]:
    for columns in known:
        if all(row.get(c) is not None for c in columns):
            return columns
    found = ", ".join(c for c in row if row[c] is not None) or "none"
    listed = "; ".join("+".join(columns) for columns in known)
    other = ""
    if known is SCHEMAS and {"chosen", "rejected"} <= set(row):
        other = " These are preferences: they are for `objective` dpo."
    elif known is PREFERENCES and any(set(columns) <= set(row) for columns in SCHEMAS):
        other = " These are conversations: they are for `objective` sft."
    kind = "conversation" if known is SCHEMAS else "preference"
    raise UserError(f"{where}: no {kind} in the columns {found}.{other} Known are {listed}; rename the columns to one")


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


def _answer(content: str, rationale: str) -> Turn:
    return _turn("assistant", content) | ({"rationale": rationale} if rationale else {})


def _instruction(row: dict, where: str) -> Conversation:
    user = _turn("user", _text(row, "instruction", where))
    if row.get("input") is not None and (given := _text(row, "input", where)).strip():
        user["input"] = given
    return [user, _turn("assistant", _text(row, "output", where))]


def _text(row: dict, key: str, where: str) -> str:
    value = row.get(key)
    if isinstance(value, int) and not isinstance(value, bool):  # an answer: 42
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} holds {type(value).__name__} {str(value)[:40]!r}, not text")
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where}: {key} holds a lone surrogate (\\ud800 … \\udfff), which is no character; take the row out"
        ) from None
    return value


def _turns(given, where: str) -> Conversation:
    if not isinstance(given, list):
        raise UserError(
            f"{where} holds {type(given).__name__} {str(given)[:40]!r}, not a list of turns like "
            '[{"role": "user", "content": "…"}]'
        )
    turns = []
    for number, turn in enumerate(given, 1):
        at = f"{where}, turn {number}"
        if not isinstance(turn, dict):
            raise UserError(f'{at} is {type(turn).__name__} {str(turn)[:40]!r}, not {{"role": "user", "content": "…"}}')
        named = "role" if turn.get("role") is not None else "from"
        content = "content" if turn.get("content") is not None else "value"
        role = ROLES.get(str(turn.get(named)).lower())
        if named not in turn or role is None:
            raise UserError(
                f"{at}: the role is {turn.get(named)!r}, found keys {', '.join(turn) or 'none'}; roles are "
                f"{', '.join(ROLES)}, in the key role or from"
            )
        if content not in turn:
            raise UserError(f"{at}: no text, found keys {', '.join(turn)}; it belongs into the key content or value")
        turns.append(_turn(role, _text(turn, content, at)))
    return turns


def _side(row: dict, key: str, speaker: str | None, where: str) -> Conversation:
    """Turns of a column: a list of turns, hh-rlhf's text, or a plain text that `speaker` said."""
    if not isinstance(row[key], str):
        return _turns(row[key], f"{where}: {key}")
    text = _text(row, key, where)
    marks = list(SPEAKER.finditer(text))
    if marks and marks[0].start() == 0:
        ends = [m.start() for m in marks[1:]] + [len(text)]
        return [_turn(ROLES[m[1].lower()], text[m.end() : end].strip()) for m, end in zip(marks, ends, strict=True)]
    if speaker is None:
        raise UserError(
            f"{where}: {key} begins {text[:40]!r}: neither turns nor '\\n\\nHuman: …\\n\\nAssistant: …'; a plain "
            "reply needs its question in a column prompt"
        )
    return [_turn(speaker, text)]
