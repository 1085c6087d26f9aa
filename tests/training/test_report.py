"""Crossing steps, the picture of a run, and the trigram that a model must beat."""

import json
import math
from collections import Counter

import numpy as np
import pytest

from muonlm.evals.perplexity import bits_per_byte, trigram_bpb
from muonlm.training import report

HISTORY = [
    {"step": s, "train_acc": t, "val_acc": v, "train_loss": 1 / (s + 1), "val_loss": 2 / (s + 1)}
    for s, t, v in [
        (0, 0.0, 0.0),
        (100, 0.5, 0.1),
        (200, 1.0, 0.2),
        (300, 0.9999, 0.989),
        (400, 1.0, 0.99),
        (500, 1.0, 1.0),
        (600, 1.0, 0.999),
    ]
]


def test_crossings_are_the_first_evaluations_that_reach_their_level():
    history = [{"step": 50, "loss": 1.0, "acc": 1.0}, *HISTORY]  # a training line has no whole-split accuracy
    assert report.crossings(history) == {
        "train_99_step": 200,
        "train_100_step": 200,
        "val_99_step": 400,
        "val_100_step": 500,
        "delay_ratio": 2.0,
    }


def test_what_was_not_reached_is_none_and_a_run_without_accuracies_has_none():
    assert report.crossings(HISTORY[:4]) == {
        "train_99_step": 200,
        "train_100_step": 200,
        "val_99_step": None,
        "val_100_step": None,
        "delay_ratio": None,
    }
    assert report.crossings([{"step": 1, "loss": 2.0}]) == {}


@pytest.mark.parametrize(
    "history",
    [
        HISTORY,
        [{"step": s, "loss": 3 - s / 100} for s in range(100)]
        + [{"step": s, "val_loss": 3.1 - s / 100} for s in range(0, 101, 20)],
    ],
    ids=["accuracies", "losses"],
)
def test_the_picture_is_written_and_shows_something(tmp_path, history):
    pytest.importorskip("matplotlib")
    import matplotlib.image

    (tmp_path / "report.json").write_text(json.dumps({"recipe": "r", "seed": 1, "run": str(tmp_path)}))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in history))
    said = []
    result = report.write(tmp_path, said.append)
    picture = matplotlib.image.imread(result["curves"])[..., :3]
    assert picture.shape[0] > 300 and picture.shape[1] > 600
    colourful = (np.ptp(picture, axis=-1) > 0.3).mean()  # curves are coloured, axes and text are grey
    assert 0.001 < colourful < 0.2
    assert json.loads((tmp_path / "report.json").read_text()) == result and any("curves.png" in line for line in said)


def test_a_run_without_metrics_has_a_report_and_no_picture(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({"recipe": "r", "seed": 1}))
    assert "curves" not in report.write(tmp_path, print) and not (tmp_path / "report").exists()


def test_the_trigram_equals_a_direct_count():
    train, held = b"abracadabra abracadabra", b"cadabra!"
    triples = Counter(zip(train, train[1:], train[2:]))
    pairs = Counter((a, b) for a, b, _ in zip(train, train[1:], train[2:]))
    bits = 16.0  # two bytes without context
    for a, b, c in zip(held, held[1:], held[2:]):
        bits -= math.log2((triples[a, b, c] + 1) / (pairs[a, b] + 256))
    found = trigram_bpb(np.frombuffer(train, np.uint8), np.frombuffer(held, np.uint8))
    assert found == pytest.approx(bits / len(held), rel=1e-12)


def test_the_trigram_without_counts_is_uniform():
    """8 bits a byte: nothing learned, or nothing to predict."""
    for train, held in ((b"", b"abcdef"), (b"xy", b"abcdef"), (b"abc", b"ab"), (b"abc", b"")):
        assert trigram_bpb(np.frombuffer(train, np.uint8), np.frombuffer(held, np.uint8)) == 8.0


def test_evaluation_repeats_the_reported_loss_and_sees_the_same_bytes_as_the_trigram(finished, text, tmp_path):
    result = bits_per_byte(finished)
    told = json.loads((finished / "report.json").read_text())
    assert result["val_bpb"] == pytest.approx(told["val_bpb"], rel=1e-9) and result["step"] == 6
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    whole = "".join(documents).encode()
    cut = int(0.9 * len(whole))  # ASCII: characters are bytes
    expected = trigram_bpb(np.frombuffer(whole[:cut], np.uint8), np.frombuffer(whole[cut:], np.uint8))
    assert result["trigram_bpb"] == pytest.approx(expected, rel=0.01)  # the splits may differ by a byte at their ends


def test_other_text_is_read_with_the_tokenizer_of_the_run(finished, tmp_path):
    (tmp_path / "other.txt").write_text("completely different words, zq. " * 300)
    result = bits_per_byte(finished, data=str(tmp_path / "other.txt"), limit=2)
    assert result["val_loss"] > json.loads((finished / "report.json").read_text())["val_loss"]
