"""Held-out bits per byte, and the trigram that a model must beat."""

import json
import math
from collections import Counter

import numpy as np
import pytest

from muonlm.evals import bpb, measure
from muonlm.evals.trigram import trigram_bpb


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
    result = measure("bpb", finished)
    told = json.loads((finished / "report.json").read_text())
    assert result["val_bpb"] == pytest.approx(told["val_bpb"], rel=1e-9) and result["step"] == 6
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    whole = "".join(documents).encode()
    cut = int(0.9 * len(whole))  # ASCII: characters are bytes
    expected = trigram_bpb(np.frombuffer(whole[:cut], np.uint8), np.frombuffer(whole[cut:], np.uint8))
    assert result["trigram_bpb"] == pytest.approx(expected, rel=0.01)  # the splits may differ by a byte at their ends


def test_other_text_is_read_with_the_tokenizer_of_the_run(finished, tmp_path):
    (tmp_path / "other.txt").write_text("completely different words, zq. " * 300)
    result = measure("bpb", finished, bpb.Options(data=str(tmp_path / "other.txt")), limit=2)
    assert result["val_loss"] > json.loads((finished / "report.json").read_text())["val_loss"]
