"""The table of data: each source says what it gives; a new one is a file and a line."""

import json
import sys

import pytest
import torch

from muonlm.cli.main import main
from muonlm.config.schema import Config
from muonlm.data import open as table
from muonlm.data.batch import IGNORE, Batch
from muonlm.data.open import open_splits, source_of, vocabulary
from muonlm.errors import UserError
from muonlm.training.parallel import Dist

ALONE = Dist(0, 1, torch.device("cpu"))

TOY = '''
import torch
from muonlm.data.batch import IGNORE, Batch, Dataset, Splits

class Counting(Dataset):
    """Row i counts up from i; the last position is not trained."""
    vocab_size, fingerprint = 16, "counting"

    def __init__(self, width, rows):
        self.width, self.rows = width, rows

    def __len__(self):
        return 16

    def batch(self, step, rank=0, world=1):
        return self._rows(torch.arange(step * self.rows, (step + 1) * self.rows)[rank::world])

    def sequential(self, rows, rank=0, world=1, *, limit=0):
        for at in range(rank, limit or 16, rows * world):
            yield self._rows(torch.arange(at, at + rows))

    def _rows(self, first):
        counted = (first[:, None] + torch.arange(self.width + 1)) % 16
        targets = counted[:, 1:].clone()
        targets[:, -1] = IGNORE
        return Batch(counted[:, :-1], targets, len(first) * (self.width - 1))

def open_counting(cfg, rows, dist):
    made = Counting(cfg.model.block_size, rows)
    return Splits(made, {"val": made})

def vocabulary(cfg):
    return 16, "sixteen numbers"
'''


def test_a_new_source_is_one_file_and_one_line_of_the_table(tmp_path, monkeypatch, capsys):
    (tmp_path / "toy_counting.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    line = table.Source("text", "toy_counting:open_counting", "toy_counting:vocabulary", name="counting")
    monkeypatch.setattr(table, "SOURCES", [*table.SOURCES, line])

    argv = "train quickstart --smoke --data counting --train.steps 40 --eval.every 40 --eval.sample 8 --json --out"
    assert main([*argv.split(), str(tmp_path / "run")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["val_loss"] < 2 and "val_bpb" not in report  # ln 16 = 2.77: it learned to count
    assert not any((tmp_path / "run" / "samples").iterdir())  # symbols are no text
    assert main(["info", str(tmp_path / "run")]) == 0
    sys.modules.pop("toy_counting")


def test_a_source_that_cannot_give_what_is_needed_is_refused_with_one_that_can():
    assert source_of("anything.txt").gives == "text" and source_of("", "preferences").gives == "preferences"
    with pytest.raises(
        UserError, match="`source` modular gives pairs of numbers, and conversations are needed; .*jsonl"
    ):
        source_of("modular", "conversations")
    with pytest.raises(UserError, match="`source` my.txt gives text or .*, and keys and values are needed; .*recall"):
        source_of("my.txt", "keys and values")


@pytest.mark.parametrize("source", ["modular", "recall"])
def test_what_is_said_of_the_vocabulary_beforehand_is_so(source):
    cfg = Config()
    cfg.data.source = source
    assert open_splits(cfg, "", 8, ALONE).vocab_size == vocabulary(cfg)[0]


def test_every_data_set_answers_what_the_protocol_asks(text, tmp_path):
    """Text, conversations and generated data: the loop asks all of them the same."""
    from muonlm.data.prep.examples import prepare_examples
    from muonlm.data.prep.text import prepare

    prepare(text, tmp_path / "text", tokenizer="byte", val="tail:0.1")
    prepare_examples("word_problems:40:1", tmp_path / "sft", kind="sft", template="qa", tokenizer="byte")
    asked = {"text": str(tmp_path / "text"), "conversations": str(tmp_path / "sft")}
    asked |= {"pairs of numbers": "modular", "keys and values": "recall"}
    for wanted, source in asked.items():
        cfg = Config()
        cfg.data.source, cfg.data.tokenizer = source, "byte"
        data = open_splits(cfg, wanted, 8, ALONE)
        for split in (data.train, *data.evaluated.values()):
            assert split.rows == 8 and split.steps_per_epoch >= len(split) / 8
            assert split.steps_per_epoch < len(split) / 8 + 1 and split.rows_to_evaluate(1 << 30) == 1
            assert bool(split.tokenizer) == (wanted in ("text", "conversations"))
            assert bool(split.template) == (wanted == "conversations") == bool(split.notes)
            assert bool(split.text(100)) == (wanted == "text")
            means = split.report({"loss": 1.0})
            assert means.pop("loss") == 1.0
            assert [*means] == {"text": ["bpb"], "conversations": ["perplexity"]}.get(wanted, [])
            first = next(split.sequential(2))
            assert isinstance(first, Batch) and int((first.targets != IGNORE).sum()) == first.count
