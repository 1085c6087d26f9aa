"""Tokenizers: known ids, exact round trips, streaming, storage, and what a user reads after a mistake."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from muonlm.config import UserError
from muonlm.data.tokenizer import PART, Tokenizer, resolve_tokenizer

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is absent: it holds the third-party texts")
CORPUS = ["low lower lowest newer wider, it's naïve — 東京 🙂!\n" * 40, "the second document\n\n  indented\n" * 30]
BPE = resolve_tokenizer("bpe:400", CORPUS)
BYTE = Tokenizer.byte()


def sentencepiece_like() -> Tokenizer:
    """A Hugging Face tokenizer that is not byte-level: Metaspace with byte fallback, as Llama's."""
    hf = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    hf.pre_tokenizer = pre_tokenizers.Metaspace()
    hf.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    hf.train_from_iterator(
        ["low lower lowest newer wider " * 20],
        trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False),
    )
    stored = json.loads(hf.to_str())
    stored["added_tokens"] = [a for a in stored["added_tokens"] if not a["content"].startswith("<0x")]
    return Tokenizer(stored)


HF = sentencepiece_like()


@pytest.mark.parametrize("tokenizer", [BYTE, BPE], ids=["byte", "bpe"])
@given(text=st.text(max_size=200))
@settings(max_examples=150, deadline=None)
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text(max_size=200))
@settings(max_examples=100, deadline=None)
def test_char_round_trips_its_own_corpus(text):
    tokenizer = resolve_tokenizer("char", [text])
    assert tokenizer.vocab_size == len(set(text)) and tokenizer.eot_id is None
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("tokenizer", [BYTE, BPE, resolve_tokenizer("char", CORPUS)], ids=["byte", "bpe", "char"])
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_decode_takes_any_ids_and_streaming_gives_the_same_text(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 7), max_size=40))
    stream = tokenizer.stream()
    pushed = [stream.push(i) for i in ids]
    assert "".join(pushed) + stream.flush() == tokenizer.decode(ids)


@given(ids=st.lists(st.integers(0, HF.vocab_size + 7), max_size=30), text=st.text(alphabet="low er東🙂", max_size=20))
@settings(max_examples=100, deadline=None)
def test_other_hugging_face_tokenizers_decode_any_ids_and_stream_valid_text(ids, text):
    assert isinstance(
        HF.decode(ids), str
    )  # streams may differ here: byte fallback rewrites a run when it turns out invalid
    stream, encoded = HF.stream(), HF.encode(text)
    assert "".join([stream.push(i) for i in encoded]) + stream.flush() == HF.decode(encoded)


@pytest.mark.parametrize("tokenizer", [BYTE, BPE, HF], ids=["byte", "bpe", "hf"])
def test_a_stream_never_shows_half_a_character(tokenizer):
    stream, text = tokenizer.stream(), "low 東京 🙂 wider"
    pushed = [stream.push(i) for i in tokenizer.encode(text)]
    assert "".join(pushed) == text and stream.flush() == ""
    assert not any("\ufffd" in piece for piece in pushed)
    assert "" in pushed  # the bytes of 東 come one by one: some pushes must wait


def test_bad_utf8_decodes_to_the_replacement_character():
    assert BYTE.decode([0x61, 0xFF, 0x62, 0xE6, 0x9D]) == "a\ufffdb\ufffd"
    assert BPE.decode([BPE.vocab_size + 3]) == "\ufffd"


def test_eot_has_its_place_in_each_kind_and_text_cannot_forge_it():
    assert (BYTE.vocab_size, BYTE.eot_id) == (257, 256)
    assert (BPE.kind, BPE.eot_id) == ("bpe", 0)
    assert resolve_tokenizer("char", ["ab", "bc"]).eot_id == 3 and resolve_tokenizer("char", ["abc"]).eot_id is None
    assert (HF.kind, HF.decode([HF.eot_id])) == ("hf", "</s>")
    assert 0 not in BPE.encode("a<|endoftext|>b")


@given(st.text(alphabet=" \n\t\r\x1c\x85\xa0ab'.1東", min_size=0, max_size=300))
@settings(max_examples=300, deadline=None)
def test_cutting_long_texts_for_speed_leaves_the_tokens_as_they_are(text):
    import muonlm.data.tokenizer as module

    assert BPE._cuts
    module.PART, long = 3, PART
    try:
        assert BPE.encode(text) == BPE._hf.encode(text, add_special_tokens=False).ids
    finally:
        module.PART = long


def test_a_tokenizer_with_another_pre_tokenizer_is_not_cut():
    text = "low lower\nlowest " * PART
    assert HF.encode(text) == HF._hf.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "tokenizer", [BYTE, BPE, HF, resolve_tokenizer("char", ["héé\n", "b"])], ids=["byte", "bpe", "hf", "char"]
)
def test_saved_and_loaded_is_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    for again in (Tokenizer.load(tmp_path), resolve_tokenizer(str(tmp_path / "tokenizer.json"))):
        same = ("kind", "vocab_size", "eot_id", "fingerprint")
        assert [getattr(again, a) for a in same] == [getattr(tokenizer, a) for a in same]
        assert again.encode("bé") == tokenizer.encode("bé")


def test_training_bpe_twice_gives_the_same_tokenizer():
    assert resolve_tokenizer("bpe:400", CORPUS).fingerprint == BPE.fingerprint
    assert resolve_tokenizer("bpe:300", CORPUS).fingerprint != BPE.fingerprint


def test_encode_batch_gives_small_integer_arrays():
    out = BPE.encode_batch(["low", "", "wider"])
    assert [o.dtype for o in out] == [np.uint16] * 3 and len(out[1]) == 0


def test_an_unknown_character_is_named_with_its_position():
    tokenizer = resolve_tokenizer("char", ["abc\n"])
    with pytest.raises(UserError, match=r"'Z' \(U\+005A\) at position 5 \(line 2, column 2\).*--data.tokenizer byte"):
        tokenizer.encode("abc\naZ")
    with pytest.raises(UserError, match=r"U\+1F642"):
        tokenizer.encode("🙂")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bite", "did you mean byte"),
        ("bpe:abc", "try bpe:4096"),
        ("bpe:256", "at least 257"),
        ("gpt2", "gpt2:PATH"),
        ("gpt2:/nowhere/merges.txt", "no merges file at /nowhere/merges.txt"),
        ("nowhere/tokenizer.json", "byte, char, bpe:4096"),
        ("char", "made from a corpus"),
        ("bpe:300", "trained on a corpus"),
    ],
)
def test_a_bad_spec_is_answered_with_a_valid_one(spec, message):
    with pytest.raises(UserError, match=message):
        resolve_tokenizer(spec)


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', '{"model": {"type": "nonsense"}}', '{"muonlm": "char"}'])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer.json is not a tokenizer.json"):
        Tokenizer.load(tmp_path)


def test_a_broken_merges_file_is_refused_with_its_line(tmp_path):
    (tmp_path / "m.txt").write_text("#version: 0.2\na b\nabc\n")
    with pytest.raises(UserError, match=r"m.txt:3: a merge is two tokens"):
        resolve_tokenizer(f"gpt2:{tmp_path / 'm.txt'}")


@needs_data
def test_gpt2_from_its_merges_gives_the_known_ids():
    gpt2 = resolve_tokenizer(f"gpt2:{DATA / 'gpt2_merges.txt'}")
    assert (gpt2.kind, gpt2.vocab_size, gpt2.eot_id) == ("gpt2", 50257, 50256)
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.decode([50256]) == "<|endoftext|>" and gpt2.decode([198]) == "\n" and gpt2.decode([220]) == " "


@needs_data
def test_tiny_shakespeare_has_65_characters_and_char_encoding_is_their_rank():
    text = (DATA / "tinyshakespeare.txt").read_text("utf-8")
    tokenizer = resolve_tokenizer("char", [text])
    rank = {c: i for i, c in enumerate(sorted(set(text)))}
    assert tokenizer.vocab_size == 65
    assert tokenizer.encode(text[:5000]) == [rank[c] for c in text[:5000]]
