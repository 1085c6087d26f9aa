"""Templates: a conversation as the tokens a model is trained on, and which of them it is trained to write.

    example  = begin, [default system], turn, turn, …          turn = system | user | (before, trained, after)
    trained  = the assistant's text as the template writes it, and the stop token that ends it; nothing else
    prompt   = the same tokens up to the next assistant's `before`, so a prompt at inference is a prefix of an example

A template is data: strings with the slots {content}, {input} and {rationale}, built in (TEMPLATES) or a .toml file:

    begin     = "<|endoftext|>"                 # once, in front of the example
    system    = "{content}\n\n"
    user      = "Question: {content}\n"
    assistant = ["Answer:", " {content}<|endoftext|>", ""]      # before (not trained), trained, after (not trained)
    # and where wanted: user_input (a user turn with an input), rationale (what an answer with one reads),
    # default_system, stop (the token `trained` ends in)

Borders  text on both sides of a special token, and of a border between trained and not trained, is tokenised apart:
         no token straddles the border, whatever the texts are
Special  a name in the TEMPLATE's own strings becomes that token's id where the tokenizer has it, else it is text. In a
         content it is always text. <|endoftext|> means the tokenizer's EOT, whatever its name (if it has none, it is
         left out). A stop token that the tokenizer lacks is replaced by EOT wherever the template writes it
Tail     what follows the last trained token is left out: nothing could learn from it
Cost     one `encode_batch` of the distinct texts, and about 30 µs a conversation beside it
Raises   UserError: unknown template, a broken .toml, a trained part without its stop token, a tokenizer that has
         neither stop token nor EOT
Sources  minimind (chatml); stanford_alpaca (the preamble); K. Cobbe et al., arXiv 2110.14168 (`#### n`)
"""

import dataclasses
import difflib
import functools
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from muonlm.errors import UserError

from .conversations import Conversation
from .tokenizer import EOT, SPECIAL_NAME, Tokenizer

SLOTS = ("content", "input", "rationale")
FIELDS = {  # of a template -> slots it must hold, slots it may hold
    "begin": ((), ()),
    "system": (("content",), ("content",)),
    "user": (("content",), ("content",)),
    "user_input": (("content", "input"), ("content", "input")),
    "rationale": (("content", "rationale"), ("content", "rationale")),
    "default_system": ((), ()),
}


@dataclass(frozen=True, kw_only=True)
class Template:
    """See the module's docstring. `dataclasses.asdict` gives the definition, `template(definition)` takes it back."""

    name: str
    user: str
    assistant: tuple[str, str, str]
    user_input: str = ""  # "": the user form, its content being content and input on lines of their own
    rationale: str = "{rationale}\n#### {content}"  # what {content} of an answer is when the turn has a rationale
    begin: str = EOT
    system: str = "{content}\n\n"
    default_system: str = ""
    stop: str = EOT

    def __post_init__(self):
        where = f"template {self.name!r}"
        if not isinstance(self.assistant, list | tuple) or len(self.assistant) != 3:
            raise UserError(
                f"{where}: assistant is {self.assistant!r}; write assistant = "
                f'["before", "{{content}}{self.stop}", "after"]'
            )
        object.__setattr__(self, "assistant", tuple(self.assistant))  # a list in TOML and JSON
        before, trained, after = self.assistant
        forms = {key: getattr(self, key) for key in FIELDS} | {"stop": self.stop}
        rules = FIELDS | {"stop": ((), ()), "before": ((), ()), "trained": (("content",),) * 2, "after": ((), ())}
        for key, form in (forms | {"before": before, "trained": trained, "after": after}).items():
            if not isinstance(form, str):
                raise UserError(f"{where}: {key} is {form!r}; give a string")
            must, may = rules[key]
            found = re.findall(r"\{(\w+)\}", form)
            if strange := [slot for slot in found if slot not in may]:
                known = ", ".join(f"{{{slot}}}" for slot in may) or "no slots"
                raise UserError(f"{where}: {key} has {{{strange[0]}}}; it takes {known}")
            if form or key != "user_input":
                if lacking := [slot for slot in must if found.count(slot) != 1]:
                    raise UserError(f"{where}: {key} is {form!r}; it must hold {{{lacking[0]}}} once")
        if not SPECIAL_NAME.fullmatch(self.stop):
            raise UserError(f'{where}: stop is {self.stop!r}; name a special token: stop = "{EOT}" or "<|im_end|>"')
        if not trained.endswith(self.stop):
            raise UserError(
                f"{where}: the trained part {trained!r} does not end in the stop token {self.stop!r}, so no reply "
                f"would learn to stop; write assistant = [{before!r}, {trained + self.stop!r}, {after!r}], or name "
                "another token: stop = …"
            )

    def encode(self, conversation: Conversation, tok: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
        """(ids of tok.dtype, trained as bool) of an example: trained[i] says that the model learns to write ids[i]."""
        return self.encode_batch([conversation], tok)[0]

    def encode_batch(
        self, conversations: list[Conversation], tok: Tokenizer, *, given: list[int] | None = None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """`encode` of each. given[i]: so many first turns of conversation i are context only, none of their tokens is
        trained (the turns that both sides of a preference share)."""
        forms = _compiled(self, tok)
        plans = [
            _without_tail(self._plan(turns, forms, given=given[i] if given else 0))
            for i, turns in enumerate(conversations)
        ]
        ids = _Ids([piece for plan in plans for piece, _ in plan], tok)
        return [ids.joined(plan) for plan in plans]

    def prompt(self, turns: Conversation, tok: Tokenizer, *, continues: bool = False) -> list[int]:
        """Ids of these turns and the opening of the assistant's turn that follows.

        continues=True goes on behind the stop token of the previous reply: no begin, no default system. (Who cut a
        reply short feeds the stop token first: in training every reply has one.)"""
        plan = self._plan(turns, _compiled(self, tok), continues=continues, opens=True)
        return _Ids([piece for piece, _ in plan], tok).joined(plan)[0].tolist()

    def texts(self, conversation: Conversation, special: tuple[str, ...] = ()) -> list[str]:
        """The texts that `encode` would tokenise one by one.

        For a tokenizer that is still to be trained and will have EOT and `special`.
        """
        names = {EOT: 0} | {name: i for i, name in enumerate(special, 1)}
        plan = self._plan(conversation, _parse(self, names | {self.stop: names.get(self.stop, 0)}))
        return [piece for piece, _ in _without_tail(plan) if isinstance(piece, str)]

    def stop_id(self, tok: Tokenizer) -> int:
        """The token a reply ends in: the template's stop token, or the tokenizer's EOT if it lacks that."""
        if self.stop != EOT and self.stop in tok.special:
            return tok.special[self.stop]
        if tok.eot_id is None:
            more = "" if self.stop == EOT else f", or add the token: `special` '{self.stop}'"
            raise UserError(
                f"template {self.name!r}: this {tok.kind} tokenizer has neither {self.stop} nor another end-of-text "
                f"token, so no reply could learn to stop; prepare the data with `tokenizer` bpe:4096 or byte{more}"
            )
        return tok.eot_id

    def reply(self, text: str) -> str:
        """What a user is shown of a decoded reply (without its stop token): not what the template puts around it."""
        before, after = self._around
        return text.removeprefix(before).removesuffix(after)

    def reply_so_far(self, text: str) -> str:
        """The same while the reply is being written: without what may turn out to be the template's. It only grows."""
        before, after = self._around
        if before.startswith(text):
            return ""
        text = text.removeprefix(before)
        held = next((n for n in range(len(after), 0, -1) if text.endswith(after[:n])), 0)
        return text[: len(text) - held]

    @property
    def _around(self) -> list[str]:
        """What the template writes before and behind an answer's content, the stop token aside."""
        return self.assistant[1].removesuffix(self.stop).split("{content}")

    def _plan(self, turns, forms, *, given=0, continues=False, opens=False) -> list[tuple[str | int, bool]]:
        """[(text to be tokenised by itself, or an id; trained)]."""
        plan: list[tuple[str | int, bool]] = []
        held: list[str] = []  # texts of the running piece

        def end_piece(trained: bool) -> None:
            if text := "".join(held):
                plan.append((text, trained))
            held.clear()

        def write(form: list, values: dict, trained: bool = False) -> None:
            for part in form:
                if isinstance(part, int):
                    end_piece(trained)
                    plan.append((part, trained))
                else:
                    held.append(part if isinstance(part, str) else values[part.name])

        if continues:
            write(forms["after"], {})
        else:
            write(forms["begin"], {})
            if self.default_system and not (turns and turns[0]["role"] == "system"):
                write(forms["system"], {"content": self.default_system})
        for number, turn in enumerate(turns):
            if turn["role"] == "assistant":
                write(forms["before"], {})
                end_piece(False)
                learns = number >= given
                write(forms["reasoned" if turn.get("rationale") else "trained"], turn, learns)
                write(forms["after"], {})  # behind the stop token, an id: the border is already there
            else:
                write(forms["user_input" if turn.get("input") else turn["role"]], turn)
        if opens:
            write(forms["before"], {})
        end_piece(False)
        return plan


@dataclass(frozen=True)
class _Slot:
    name: str


@functools.lru_cache(maxsize=64)
def _compiled(template: Template, tok: Tokenizer) -> dict[str, list]:
    """The template's forms for this tokenizer: each a list of texts, ids and slots."""
    names: dict[str, int | None] = {n: i for n, i in tok.special.items() if SPECIAL_NAME.fullmatch(n)}
    return _parse(template, names | {EOT: tok.eot_id, template.stop: template.stop_id(tok)})


def _parse(template: Template, names: dict[str, int | None]) -> dict[str, list]:
    marks = re.compile("(" + "|".join([*map(re.escape, names), *(rf"\{{{s}\}}" for s in SLOTS)]) + ")")

    def parts(form: str) -> list:
        found = []
        for part in marks.split(form):
            if part in names:
                found += [] if names[part] is None else [names[part]]
            elif marks.fullmatch(part):
                found.append(_Slot(part[1:-1]))
            elif part:
                found.append(part)
        return found

    before, trained, after = template.assistant
    return {
        "begin": parts(template.begin),
        "system": parts(template.system),
        "user": parts(template.user),
        "user_input": parts(template.user_input or template.user.replace("{content}", "{content}\n{input}")),
        "before": parts(before),
        "trained": parts(trained),
        "reasoned": parts(trained.replace("{content}", template.rationale)),
        "after": parts(after),
    }


def _without_tail(plan: list[tuple[str | int, bool]]) -> list[tuple[str | int, bool]]:
    last = next((i for i in reversed(range(len(plan))) if plan[i][1]), len(plan) - 1)
    return plan[: last + 1]


class _Ids:
    """The ids of each distinct text and special token of some plans."""

    def __init__(self, pieces: list[str | int], tok: Tokenizer):
        distinct = dict.fromkeys(pieces)
        texts = [piece for piece in distinct if isinstance(piece, str)]
        self._of: dict[str | int, np.ndarray] = dict(zip(texts, tok.encode_batch(texts), strict=True))
        self._of |= {i: np.array([i], tok.dtype) for i in distinct if isinstance(i, int)}
        self._dtype = tok.dtype

    def joined(self, plan: list[tuple[str | int, bool]]) -> tuple[np.ndarray, np.ndarray]:
        found = [self._of[piece] for piece, _ in plan] or [np.empty(0, self._dtype)]
        flags = np.array([trained for _, trained in plan], bool)
        return np.concatenate(found), np.repeat(flags, [len(f) for f in found[: len(flags)]])


TEMPLATES = {
    t.name: t
    for t in [
        Template(
            name="minimind-chatml",
            begin="",
            system="<|im_start|>system\n{content}<|im_end|>\n",
            user="<|im_start|>user\n{content}<|im_end|>\n",
            assistant=("<|im_start|>assistant\n", "{content}<|im_end|>", "\n"),
            default_system="You are a helpful assistant",
            stop="<|im_end|>",
        ),
        Template(
            name="alpaca-plain",
            user="Instruction:\n{content}\n\n",
            user_input="Instruction:\n{content}\n\nInput:\n{input}\n\n",
            assistant=("Response:\n", "{content}" + EOT, ""),
        ),
        Template(
            name="alpaca-stanford",
            user="Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n### Instruction:\n{content}\n\n",
            user_input="Below is an instruction that describes a task, paired with an input that provides further "
            "context. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\n{content}\n\n### Input:\n{input}\n\n",
            assistant=("### Response:", "{content}" + EOT, ""),
        ),
        Template(name="qa", user="Question: {content}\n", assistant=("Answer:", " {content}" + EOT, "")),
        Template(
            name="think",
            user="Question: {content}\n",
            assistant=("Answer:", " {content}" + EOT, ""),
            rationale="<think>{rationale}</think>\n#### {content}",
        ),
        Template(
            name="stepwise",
            user="Question: {content}\n",
            assistant=("Answer: Let's think step by step.", " {content}" + EOT, ""),
        ),
    ]
}


def template(given: str | Path | dict) -> Template:
    """A built-in template by name, one of a .toml file, or one of its definition (`dataclasses.asdict`)."""
    if isinstance(given, dict):
        return Template(**given)
    if str(given) in TEMPLATES:
        return TEMPLATES[str(given)]
    known = ", ".join(TEMPLATES)
    if not str(given).endswith(".toml"):
        near = difflib.get_close_matches(str(given).lower(), TEMPLATES, 1, 0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"unknown template {str(given)!r}; {hint}It is one of {known}, or a .toml file")
    path = Path(given).expanduser()
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"the template {given} cannot be read ({reason}); give a .toml file or one of {known}"
        ) from None
    fields = [f.name for f in dataclasses.fields(Template) if f.name != "name"]
    if strange := [key for key in table if key not in fields]:
        near = difflib.get_close_matches(strange[0], fields, 1, 0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"{given}: unknown key {strange[0]!r}; {hint}A template has {', '.join(fields)}")
    if lacking := [key for key in ("user", "assistant") if key not in table]:
        raise UserError(
            f'{given}: no {lacking[0]!r}; a template needs at least user = "Question: {{content}}\\n" and '
            f'assistant = ["Answer:", " {{content}}{EOT}", ""]'
        )
    return Template(**{"name": path.stem} | table)
