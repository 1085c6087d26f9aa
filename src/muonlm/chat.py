"""Chat: a conversation with a model that was trained on one, its state carried from turn to turn.

    read in turn 1   begin, system, user 1, opening of the reply
    read in turn n   the last reply's end (what it drew last, the stop token), user n, opening of the reply

so each token is read once, however long the conversation is. Whatever ends a reply (the stop token, an end of text, the
limit, Ctrl-C), the template's stop token is what is read behind it, as in training.

Forgetting   A model whose context is limited looks back on `context` tokens. Before a turn that would leave less room
             than a reply may take (at most half of the context), the oldest exchanges are forgotten until what is
             read again fills at most half of it; the system turn stays. A reply that outgrows the context itself
             loses the older half (engine.py). Both are said once. `history` = n remembers the last n exchanges,
             read again each time.
Raises       UserError: a run that has no template or no tokenizer, impossible sampling settings, a text that the
             tokenizer cannot express; the conversation is then as it was before.
"""

import contextlib
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from muonlm.config.runs import locate, read_config
from muonlm.config.spelling import nearest
from muonlm.data.text.templates import TEMPLATES, Template
from muonlm.data.text.templates import template as find_template
from muonlm.engine import Prefix, decode, need_words
from muonlm.errors import UserError
from muonlm.sampling import OF_CHAT, Sampling
from muonlm.storage import write_atomically
from muonlm.training.checkpoint import load

COMMANDS = """\
/reset          forget the conversation         /undo        forget the last exchange
/system TEXT    begin again with this system turn            /save FILE   write the conversation as a line of JSON
/exit           leave; so do exit, quit and Ctrl-D           /help        this list
A line that ends in \\ goes on in the next; \"\"\" begins and ends a block of lines. Ctrl-C stops a reply."""


class Chat:
    """`turns`: the whole conversation, [{"role": "user" | "assistant", "content": …}, …], forgotten ones included."""

    def __init__(
        self,
        model,
        tokenizer,
        form: Template,
        *,
        system: str = "",
        sampling: Sampling = OF_CHAT,
        history: int | None = None,
        log: Callable[[str], None] = lambda note: None,
    ):
        if history is not None and history < 0:
            raise UserError(f"`history` {history} must be 0 (each message alone) or more; without it all is kept.")
        need_words(tokenizer)
        self.model, self.tokenizer, self.form = model, tokenizer, form
        self.stop = form.stop_id(tokenizer)
        self.system, self.sampling, self.history, self.log = system, sampling, history, log
        self.generator = torch.Generator().manual_seed(sampling.seed)  # a CPU's: the same draws on every device
        self.warned = False
        self.reset()

    def reset(self, system: str | None = None) -> None:
        """Begin again, with another system turn if one is given."""
        self.system = self.system if system is None else system
        self.turns: list[dict] = []
        self.first = 0  # turns before it are forgotten
        self.prefix: Prefix | None = None  # None: the next turn reads all that is remembered
        self.unread: list[int] = []  # the end of the last reply

    def undo(self) -> None:
        del self.turns[-2:]
        self.first, self.prefix = min(self.first, len(self.turns)), None

    def conversation(self) -> list[dict]:
        return [*self._opening(), *self.turns]

    def reply(self, text: str, on_text: Callable[[str], None] | None = None, stopped=lambda: False) -> str:
        """The reply to a message. `on_text` gets its pieces as they come; it ends early when stopped() is true."""
        user = {"role": "user", "content": text}
        prefix, self.first = self._read(user)
        self.prefix = None  # until the reply is whole: an exception must not leave half a turn behind
        draws = torch.rand(self.sampling.max_tokens, 1, generator=self.generator).to(prefix.device)
        ends = frozenset({self.stop, self.tokenizer.eot_id} - {None})
        length = len(prefix.rows[0])
        pieces, written, shown, unread = self.tokenizer.stream(), "", "", []

        def show(piece: str, visible_part=self.form.reply_so_far) -> None:
            nonlocal written, shown
            written += piece
            visible = visible_part(written)
            if on_text and len(visible) > len(shown):
                on_text(visible[len(shown) :])
                shown = visible

        for [token] in decode(prefix, draws, self.sampling, stop=ends, vocab=self.tokenizer.vocab_size):
            unread = [] if token is None else [token]
            if token is not None:
                length += 1
                show(pieces.push(token))
            if stopped():
                break
        show(pieces.flush(), self.form.reply)
        if prefix.context and length > prefix.context:
            self._warn_of_forgetting()
        reply = self.form.reply(written)
        self.turns += [user, {"role": "assistant", "content": reply}]
        self.prefix, self.unread = prefix, [*unread, self.stop]
        return reply

    def _opening(self) -> list[dict]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _read(self, user: dict) -> tuple[Prefix, int]:
        """A prefix that holds all that leads to the reply, and the first turn that it remembers."""
        context, first = self.model.context, self.first
        if self.history is not None:
            first = max(first, len(self.turns) - 2 * self.history)
        if self.prefix is not None and first == self.first:
            new = self.unread + self.form.prompt([user], self.tokenizer, continues=True)
            room = context and context - min(self.sampling.max_tokens, context // 2)
            if not context or len(self.prefix.rows[0]) + len(new) <= room:
                self.prefix.extend([new])
                return self.prefix, first
            self._warn_of_forgetting()
        ids = self._ids_from(first, user)
        if context and len(ids) > context - min(self.sampling.max_tokens, context // 2):
            self._warn_of_forgetting()
            while first < len(self.turns) and len(ids) > context // 2:
                first += 2
                ids = self._ids_from(first, user)
        return Prefix.prefill(self.model, [ids]), first

    def _ids_from(self, first: int, user: dict) -> list[int]:
        return self.form.prompt([*self._opening(), *self.turns[first:], user], self.tokenizer)

    def _warn_of_forgetting(self) -> None:
        if not self.warned:
            self.warned = True
            self.log(
                f"this model looks back on {self.model.context:,} tokens; what is older is forgotten from here on "
                "(the oldest exchanges first, the system turn last)"
            )


def open_chat(run: str, *, template: str = "", which: str = "best", device="cpu", **settings) -> tuple[Chat, str]:
    """(chat with a run or checkpoint directory, what to call it). `template`: if not the run's own."""
    folder, path = locate(run, which)
    template = template or read_config(folder).data.template
    if not template:
        if not (folder / "tokenizer.json").exists():
            need_words(None)
        raise UserError(
            f"run {folder} was not trained on conversations (data.template is empty): it does not know what a turn is. "
            f"Continue a text with: muonlm generate {run} --prompt TEXT; or name the form of a turn: `template` qa "
            f"(one of {', '.join(TEMPLATES)}, or a .toml file)."
        )
    form = find_template(template)
    model, tokenizer = load(path, device)
    return Chat(model, tokenizer, form, **settings), f"{folder} ({path.name}, template {form.name})"


# ------------------------------------------------------------------------------------------------ the terminal


def converse(chat: Chat, out=None) -> None:
    """Read messages and commands from standard input until it ends or one says so; the transcript goes to `out`.

    At a terminal, mistakes and Ctrl-C are answered and the conversation goes on; in a pipe they end the program.
    """
    out = out or sys.stdout
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, input() then edits lines and remembers them

    def write(text: str) -> None:
        print(text, end="", file=out, flush=True)

    saved: set[Path] = set()
    messages = read_messages(terminal, write)
    while True:
        try:
            text, plain = next(messages)
        except StopIteration:
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            chat.log("nothing to stop; /exit or Ctrl-D leaves")
            messages = read_messages(terminal, write)
            continue
        if not plain and text.strip().lower() in ("exit", "quit", "/exit", "/quit"):
            return
        try:
            if not plain and (found := re.fullmatch(r"/([a-z]+)(?:\s+(.*))?", text.strip(), re.DOTALL)):
                obey(chat, found[1], found[2] or "", saved)
                continue
            with stoppable(terminal) as stopped:
                write("Assistant: ")
                chat.reply(text, write, stopped)
                write("\n")
                if len(chat.unread) > 1 and not stopped():  # more than the stop token: it drew none itself
                    chat.log(f"cut after {chat.sampling.max_tokens} tokens; --max-tokens allows more")
        except UserError as error:
            if not terminal:
                raise
            chat.log(str(error))


def obey(chat: Chat, command: str, rest: str, saved: set[Path]) -> None:
    if command == "help":
        chat.log(COMMANDS)
    elif command == "reset":
        chat.reset()
        chat.log("a new conversation")
    elif command == "undo":
        chat.undo()
        chat.log(f"{len(chat.turns) // 2} exchanges left" if chat.turns else "nothing said yet")
    elif command == "system":
        if rest:
            chat.reset(rest)
        current = chat.system or chat.form.default_system or "(none)"
        chat.log(f"a new conversation, system: {current}" if rest else f"system: {current}")
    elif command == "save":
        save(chat, rest, saved)
    else:
        known = ["/help", "/reset", "/system", "/undo", "/save", "/exit"]
        raise UserError(f"unknown command /{command}.{nearest('/' + command, known) or ' /help lists them.'}")


def save(chat: Chat, name: str, saved: set[Path]) -> None:
    if not name:
        raise UserError("/save needs a file, as in /save talk.jsonl")
    path = Path(name).expanduser()
    if path.exists() and path not in saved:
        raise UserError(f"{path} exists; choose another, as in /save {path.with_name(path.stem + '-2' + path.suffix)}")
    try:
        write_atomically(path, json.dumps({"conversations": chat.conversation()}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}. Choose another place.") from None
    saved.add(path)
    chat.log(f"{len(chat.conversation())} turns saved in {path}")


def read_messages(terminal: bool, write: Callable[[str], None]) -> Iterator[tuple[str, bool]]:
    """(message, whether it was a block and so cannot be a command); empty ones are left out."""

    def line(prompt: str) -> str:
        if not terminal:
            text = sys.stdin.readline()
            if not text:
                raise EOFError
            write(prompt + text.removesuffix("\n") + "\n")  # the transcript reads as it does at a terminal
            return text.removesuffix("\n")
        if sys.stdout.isatty():
            return input(prompt)
        write(prompt)  # standard output is no place for it
        return input()

    ended = False
    while not ended:
        parts, block = [], False
        try:
            first = line("You: ")
            block = first.lstrip().startswith('"""')
            parts = [first.lstrip().removeprefix('"""') if block else first]
            while not parts[-1].rstrip().endswith('"""') if block else parts[-1].endswith("\\"):
                parts.append(line("...  "))
        except EOFError:
            ended = True
            if terminal:
                write("\n")
        text = "\n".join(parts if block else (part.removesuffix("\\") for part in parts))
        text = text.rstrip().removesuffix('"""') if block else text
        if text.strip():
            yield text.strip("\n") if block else text, block


@contextlib.contextmanager
def stoppable(terminal: bool) -> Iterator[Callable[[], bool]]:
    """While it lasts, the first Ctrl-C at a terminal only makes the yielded function true: a state stays whole between
    two tokens. A second one interrupts as ever."""
    pressed = []

    def press(number, frame):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    if not terminal:
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
