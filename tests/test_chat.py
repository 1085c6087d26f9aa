"""Chat: every token is read once and replies are those of re-reading; terminal, pipe and JSON show one talk."""

import dataclasses
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from muonlm import build_model
from muonlm.chat import Chat
from muonlm.cli.main import main
from muonlm.config.recipes import load_recipe
from muonlm.config.schema import ModelConfig
from muonlm.data.text.templates import Template, template
from muonlm.data.text.tokenizer import Tokenizer, resolve_tokenizer
from muonlm.engine import pick
from muonlm.errors import UserError
from muonlm.sampling import OF_CHAT
from muonlm.training import checkpoint

TOKENIZER = Tokenizer.char("Question: Answer\nabc", eot=True)  # few tokens, so that a random model stops now and then
BASE = {"n_layer": 2, "d_model": 32, "n_head": 4, "vocab_size": TOKENIZER.vocab_size, "block_size": 2048}
MESSAGES = ["abc", "a cab", "", "b b\nc", "Answer", "cc"]

GREEDY = replace(OF_CHAT, temperature=0.0, max_tokens=20)


def chat_of(variant={}, form="qa", **settings) -> Chat:
    model = build_model(ModelConfig(**BASE | variant), seed=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at initialisation, so that replies differ
            parameter.mul_(3)
    drawing = {name: settings.pop(name) for name in ("max_tokens", "temperature", "seed") if name in settings}
    return Chat(model, TOKENIZER, template(form), sampling=replace(GREEDY, **drawing), **settings)


def watch(chat: Chat) -> list[int]:
    """The tokens that the model reads, one after the other."""
    read = []
    chat.model.register_forward_pre_hook(lambda module, args: read.extend(args[0].flatten().tolist()))
    return read


def reply_ids(chat: Chat, ids: list[int]) -> list[int]:
    """The reply to `ids`, written out without a cache."""
    found, draws = [], torch.rand(chat.sampling.max_tokens, 1, generator=chat.generator)
    with torch.no_grad():
        while len(found) < chat.sampling.max_tokens:
            logits, _ = chat.model(torch.tensor([ids + found]))
            token = int(pick(logits[:, -1], chat.sampling, draws[len(found)]))
            if token == chat.stop:
                break
            found.append(token)
    return found


@pytest.mark.parametrize(
    "variant",
    [{}, {"pattern": "WA", "window": 5}, {"pattern": "M"}, {"pattern": "mA"}, {"pattern": "G"}, {"pattern": "S"}],
    ids=lambda v: v.get("pattern", "A"),
)
def test_each_token_is_read_once_and_replies_are_those_of_reading_everything_again(variant):
    chat, twin = (chat_of(variant, temperature=1.5, seed=1) for _ in range(2))
    read, ids, cut = watch(chat), [], set()
    for number, message in enumerate(MESSAGES):
        ids += chat.form.prompt([{"role": "user", "content": message}], TOKENIZER, continues=number > 0)
        expected = reply_ids(twin, ids)
        assert chat.reply(message) == chat.form.reply(TOKENIZER.decode(expected))
        cut.add(len(expected) == chat.sampling.max_tokens)
        ids += expected
        unread = (
            1 if len(expected) == chat.sampling.max_tokens else 0
        )  # the last of a cut reply waits for the next turn
        assert read == ids[: len(ids) - unread]
        ids.append(chat.stop)
    assert cut == {True, False}, "the test needs replies that stop and replies that are cut"


def test_the_stop_token_of_chatml_ends_replies_and_stands_between_turns():
    tokenizer = resolve_tokenizer("byte", special=["<|im_start|>", "<|im_end|>"])
    model = build_model(ModelConfig(**BASE | {"vocab_size": tokenizer.vocab_size}), seed=0).eval()
    chat = Chat(
        model, tokenizer, template("minimind-chatml"), sampling=replace(GREEDY, max_tokens=3), system="Be brief."
    )
    read = watch(chat)
    first = [chat.reply("hi"), chat.reply("there")][0]
    text = tokenizer.decode(read)
    opening = "<|im_start|>assistant\n"
    start = f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n{opening}{first}<|im_end|>\n"
    assert text.startswith(start + f"<|im_start|>user\nthere<|im_end|>\n{opening}")
    assert read.count(chat.stop) == 4 and chat.stop == tokenizer.special["<|im_end|>"]


def test_the_same_seed_and_messages_give_the_same_replies():
    def talk(seed):
        chat = chat_of(seed=seed, temperature=1.0)
        return [chat.reply(message) for message in MESSAGES]

    assert talk(1) == talk(1) != talk(2)
    assert len(set(talk(1))) == len(MESSAGES), "draws go on from turn to turn"


def test_streamed_pieces_join_to_the_reply_as_it_is_shown():
    """Without the blank that the template puts in front, where the model wrote it."""
    chat, blank = chat_of(temperature=2.0, max_tokens=3), TOKENIZER.encode(" ")
    read, opening, blanks = watch(chat), len(chat.form.prompt([{"role": "user", "content": "a"}], TOKENIZER)), 0
    for seed in range(60):
        chat.generator.manual_seed(seed)
        pieces: list[str] = []
        read.clear()
        chat.reset()
        reply = chat.reply("a", pieces.append)
        assert "".join(pieces) == reply and all(pieces)
        blanks += read[opening : opening + 1] == blank
    assert blanks, "the test needs replies that begin with a blank"


@pytest.mark.parametrize("said", ["ab: cab cb", "ab: c", "ab", "cab cab cab", "ab:  cbc", "ab: a cb cb", "b"])
def test_what_a_template_writes_around_an_answer_is_not_streamed(said, monkeypatch):
    """Letter by letter the beginning and the end are no more than letters; what was shown cannot be taken back."""
    form = Template(name="mine", user="{content}\n", assistant=("b", "ab: {content} cb<|endoftext|>", ""))
    chat = chat_of()
    monkeypatch.setattr(chat, "form", form)
    steps = [[token] for token in TOKENIZER.encode(said)] + [[None]]
    monkeypatch.setattr("muonlm.chat.decode", lambda *_, **__: iter(steps))
    pieces: list[str] = []
    reply = chat.reply("c", pieces.append)
    assert "".join(pieces) == reply == said.removeprefix("ab: ").removesuffix(" cb")


def test_a_reply_that_is_stopped_is_a_turn_like_any_other():
    chat, presses = chat_of(temperature=1.5, seed=1), iter([False, False, True])
    chat.reply("abc", stopped=lambda: next(presses))
    unread, read = chat.unread, watch(chat)
    assert next(presses, None) is None, "it was asked after each of three tokens"
    assert len(unread) == 2 and unread[1] == chat.stop and len(chat.turns) == 2
    chat.reply("b")
    assert read[:2] == unread


def test_a_message_that_cannot_be_read_leaves_the_conversation_as_it_was():
    chat, twin = chat_of(), chat_of()
    assert chat.reply("abc") == twin.reply("abc")
    with pytest.raises(UserError, match="'€'"):
        chat.reply("€")
    assert len(chat.turns) == 2 and chat.reply("b") == twin.reply("b")


def test_undo_forgets_one_exchange_and_reset_all():
    chat = chat_of()
    first = chat.reply("abc")
    chat.reply("b")
    chat.undo()
    read = watch(chat)
    chat.reply("c")
    remembered = [("user", "abc"), ("assistant", first), ("user", "c")]
    expected = chat.form.prompt([{"role": role, "content": text} for role, text in remembered], TOKENIZER)
    assert read[: len(expected)] == expected and len(chat.turns) == 4
    chat.reset()
    assert chat.reply("abc") == first and len(chat.turns) == 2
    for _ in range(3):  # more than there are
        chat.undo()
    assert chat.reply("abc") == first


def test_without_history_every_message_stands_alone():
    chat = chat_of(history=0)
    assert [chat.reply(m) for m in MESSAGES] == [chat_of().reply(m) for m in MESSAGES]


def test_with_a_history_of_one_the_last_exchange_is_remembered():
    chat = chat_of(history=1)
    for message in MESSAGES[:3]:
        chat.reply(message)
    read, last = watch(chat), chat.turns[-2:]
    chat.reply("cc")
    expected = chat.form.prompt([*last, {"role": "user", "content": "cc"}], TOKENIZER)
    assert read[: len(expected)] == expected and len(chat.turns) == 8


def test_at_the_end_of_the_context_the_oldest_exchanges_go_the_system_turn_stays_and_it_is_told_once():
    told: list[str] = []
    chat = chat_of({"block_size": 120}, system="cab", log=told.append)
    read, first, forgot = watch(chat), 0, 0
    for number in range(12):
        read.clear()
        chat.reply("abc")
        if chat.first > first:  # half of the context at most is read again, from the beginning of an exchange
            remembered = [{"role": "system", "content": "cab"}, *chat.turns[chat.first : -1]]
            expected = chat.form.prompt(remembered, TOKENIZER)
            assert read[: len(expected)] == expected and len(expected) <= 60 and chat.first % 2 == 0
            first, forgot = chat.first, forgot + 1
        assert len(chat.prefix.rows[0]) <= 120 and len(chat.turns) == 2 * (number + 1)
    assert 1 < forgot < 6 and len(told) == 1 and "120 tokens" in told[0]


def test_a_reply_longer_than_the_context_goes_on_and_is_told():
    told: list[str] = []
    chat = chat_of({"block_size": 60}, log=told.append, max_tokens=150)
    with torch.no_grad():
        chat.model.head.weight[chat.stop] = 0  # a logit of 0 is never the largest: the reply does not stop
    assert len(chat.reply("abc")) >= 149 and len(told) == 1  # 150 characters, less a leading blank
    chat.reply("b")
    assert len(chat.turns) == 4 and len(told) == 1 and len(chat.prefix.rows[0]) <= 60


# ------------------------------------------------------------------------------------------------ the verb


def make_run(folder, **data):
    """A run directory as a stage leaves it, of a model that was never trained."""
    cfg = load_recipe("quickstart", {}, smoke=True)
    cfg.data = dataclasses.replace(cfg.data, **data)
    tokenizer = resolve_tokenizer("byte")
    cfg.model.vocab_size = tokenizer.vocab_size
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(cfg.to_dict()))
    tokenizer.save(folder)
    weights = dict(build_model(cfg.model, seed=0).named_parameters())
    checkpoint.save(folder, 1, weights, {}, {}, best=True, keep=1)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("chat") / "run", template="qa")


def test_a_run_that_knows_no_turns_is_refused_with_the_two_ways_on(capsys, tmp_path):
    finished = make_run(tmp_path / "pretrained")
    assert main(["chat", str(finished)]) == 2
    said = capsys.readouterr().err
    assert "muonlm generate" in said and "--template qa" in said
    assert main(["chat", str(finished), "--template", "qaa"]) == 2
    assert "did you mean qa" in capsys.readouterr().err


def test_a_run_without_words_is_not_told_to_generate_text(tmp_path, capsys):
    symbols = make_run(tmp_path / "symbols")
    (symbols / "tokenizer.json").unlink()
    assert main(["chat", str(symbols)]) == 2
    said = capsys.readouterr().err
    assert "no tokenizer" in said and "muonlm generate" not in said


def test_a_pipe_gives_one_turn_a_line_and_json_one_document(run, capsys, monkeypatch, tmp_path):
    lines = ["we the people", "", "a line \\", "that goes on", '"""', "/reset is text here", '"""']
    lines += [f"/save {tmp_path}/t.jsonl"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*lines, "quit", "never read"]) + "\n"))
    assert main(["chat", str(run), "--max-tokens", "5", "--json"]) == 0
    out, err = capsys.readouterr()
    conversation = json.loads(out)["conversation"]
    asked = [turn["content"] for turn in conversation if turn["role"] == "user"]
    assert asked == ["we the people", "a line \nthat goes on", "/reset is text here"]
    assert [turn["role"] for turn in conversation] == ["user", "assistant"] * 3
    assert "You: we the people\nAssistant: " + conversation[1]["content"] in err and "never read" not in err
    saved = json.loads((tmp_path / "t.jsonl").read_text())
    assert saved == {"conversations": conversation}
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nno newline at the end"))
    assert main(["chat", str(run), "--max-tokens", "5"]) == 0
    out, err = capsys.readouterr()
    assert out.count("Assistant: ") == 2 and out.startswith("You: a\n") and "Assistant" not in err


@pytest.mark.parametrize(
    "line, said",
    [
        ("/rest", "/reset"),
        ("/save", "needs a file"),
        ("/save {exists}", "exists; choose another"),
        ("/save {exists}/in/a/file", "cannot be written"),
    ],
)
def test_mistaken_commands_say_what_to_type(line, said, run, capsys, monkeypatch, tmp_path):
    """In a pipe they end the program; the terminal's test shows that the conversation goes on there."""
    (tmp_path / "taken").write_text("mine")
    line = line.replace("{exists}", str(tmp_path / "taken"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(line + "\n"))
    assert main(["chat", str(run)]) == 2
    assert said in capsys.readouterr().err and (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize(
    "flags, said",
    [(["--temperature", "-1"], "temperature"), (["--history", "-1"], "history"), (["--max-tokens", "0"], "max-tokens")],
)
def test_impossible_settings_are_refused(flags, said, run, capsys):
    assert main(["chat", str(run), *flags]) == 2
    assert said in capsys.readouterr().err


def test_special_names_in_a_message_are_text():
    tokenizer = resolve_tokenizer("byte")
    model = build_model(ModelConfig(**BASE | {"vocab_size": tokenizer.vocab_size}), seed=0).eval()
    chat = Chat(model, tokenizer, template("qa"), sampling=replace(GREEDY, max_tokens=2))
    read = watch(chat)
    chat.reply("<|endoftext|>")
    assert read.count(tokenizer.eot_id) == 1, "the one that begins the conversation"


class Terminal:
    """A muonlm process at a terminal of its own."""

    def __init__(self, *argv: str):
        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "muonlm", *argv]
        terminal = {"stdin": slave, "stdout": slave, "stderr": slave, "env": os.environ | {"TERM": "dumb"}}
        self.process = subprocess.Popen(
            command, **terminal, start_new_session=True, close_fds=True, preexec_fn=_take_terminal
        )
        os.close(slave)
        self.seen = ""

    def until(self, text: str, seconds: float = 60) -> str:
        """All output up to the next `text`."""
        self._read_while(lambda: text not in self.seen, f"waited for {text!r}", seconds)
        before, _, self.seen = self.seen.partition(text)
        return before

    def until_more_than(self, characters: int) -> None:
        self._read_while(lambda: len(self.seen) <= characters, "waited for output", 60)

    def _read_while(self, lacking, what: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while lacking():
            assert time.monotonic() < end, f"{what}, saw {self.seen!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode("utf-8", "replace").replace("\r\n", "\n")
                except OSError:  # closed: the process has ended
                    assert not lacking(), f"{what}, but it ended: {self.seen!r}"

    def press_until(self, key: str, text: str) -> None:
        """Again and again, as people do: between the prompt and the wait for a key, Python itself loses a Ctrl-C."""
        for _ in range(30):
            self.type(key)
            try:
                self.until(text, 2)
                return
            except AssertionError:
                assert self.process.poll() is None
        raise AssertionError(f"{key!r} was never answered with {text!r}")

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


def _take_terminal():
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_at_a_terminal_ctrl_c_stops_the_reply_mistakes_are_answered_and_ctrl_d_leaves(run, tmp_path):
    terminal = Terminal("chat", str(run), "--max-tokens", "1000000", "--temperature", "0")  # a loop without end
    try:
        assert "template qa" in terminal.until("You: ")
        terminal.type("the people\n")
        terminal.until("Assistant: ")
        terminal.until_more_than(10)
        terminal.type("\x03")
        assert len(terminal.until("You: ")) < 100_000, "it was stopped, it did not end"
        terminal.press_until("\x03", "/exit or Ctrl-D leaves")  # at the prompt there is nothing to stop
        terminal.until("You: ")
        terminal.type("/halp\n")
        terminal.until("/help")
        terminal.until("You: ")
        terminal.type("/help\n")
        terminal.until("/system TEXT")
        terminal.until("You: ")
        terminal.type("two \\\n")
        terminal.until("...  ")
        terminal.type("lines\n")
        terminal.until("Assistant: ")
        terminal.type("\x03")
        terminal.until("You: ")
        terminal.type(f"/save {tmp_path}/talk.jsonl\n")
        terminal.until("4 turns saved")
        terminal.until("You: ")
        terminal.type("/undo\n")
        terminal.until("1 exchanges left")
        terminal.until("You: ")
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
    finally:
        if terminal.process.poll() is None:
            terminal.process.send_signal(signal.SIGKILL)
        terminal.process.wait()
        os.close(terminal.master)
    turns = json.loads((tmp_path / "talk.jsonl").read_text())["conversations"]
    assert [t["content"] for t in turns[::2]] == ["the people", "two \nlines"]
    assert len(turns[1]["content"]) > 8
