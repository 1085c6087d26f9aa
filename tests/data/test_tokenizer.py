"""Tokenizers: known ids, exact round trips, streaming, storage, and what a user reads after a mistake."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from muonlm.data.text.tokenizer import PART, Tokenizer, resolve_tokenizer
from muonlm.errors import UserError

DATA = Path(__file__).parents[3] / "shared" / "data"
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
    import muonlm.data.text.tokenizer as module

    assert BPE._cuts
    module.PART, long = 3, PART
    try:
        assert BPE.encode(text) == BPE._hf.encode(text, add_special_tokens=False).ids
    finally:
        module.PART = long


def test_a_tokenizer_with_another_pre_tokenizer_is_not_cut():
    text = "low lower\nlowest " * PART
    assert HF.encode(text) == HF._hf.encode(text, add_special_tokens=False).ids
    text = "lo\nwer" * PART  # could be cut at its newlines only
    stored = json.loads(json.dumps(BPE._stored))
    token = stored["added_tokens"][0] | {"id": BPE.vocab_size, "content": "o\nw", "special": False}
    stored["added_tokens"].append(token)  # found across the place of a cut
    joins = {"type": "Replace", "pattern": {"String": "\n"}, "content": ""}  # makes one word of two at such a place
    for tok in (Tokenizer(stored), Tokenizer(BPE._stored | {"normalizer": joins})):
        assert tok.encode(text) == tok._hf.encode(text, add_special_tokens=False).ids


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


NEW = ("<|im_start|>", "<|im_end|>")
CHAR = resolve_tokenizer("char", CORPUS)


@pytest.mark.parametrize(
    ("tokenizer", "ids"),
    [
        (resolve_tokenizer("byte", special=NEW), {"<|endoftext|>": 256, NEW[0]: 257, NEW[1]: 258}),
        (resolve_tokenizer("bpe:400", CORPUS, NEW), {"<|endoftext|>": 0, NEW[0]: 1, NEW[1]: 2}),
        (
            resolve_tokenizer("char", CORPUS, NEW),
            {"<|endoftext|>": CHAR.eot_id, NEW[0]: CHAR.vocab_size, NEW[1]: CHAR.vocab_size + 1},
        ),
        (resolve_tokenizer("char", ["abc"], NEW), {NEW[0]: 3, NEW[1]: 4}),
        (BPE.with_special(NEW), {"<|endoftext|>": 0, NEW[0]: BPE.vocab_size, NEW[1]: BPE.vocab_size + 1}),
        (HF.with_special(NEW), HF.special | {NEW[0]: HF.vocab_size, NEW[1]: HF.vocab_size + 1}),
    ],
    ids=["byte", "bpe", "char", "char without EOT", "bpe, later", "hf"],
)
def test_special_tokens_have_their_ids_and_survive_a_file_but_no_text_makes_them(tokenizer, ids, tmp_path):
    tokenizer.save(tmp_path)
    for tok in (tokenizer, Tokenizer.load(tmp_path)):
        assert tok.special == ids and tok.vocab_size > max(ids.values())
        assert tok.eot_id == (ids.get("<|endoftext|>") if tok.kind != "hf" else HF.eot_id)
        assert [tok.decode([i]) for i in ids.values()] == list(ids)
        assert tok.fingerprint == tokenizer.fingerprint
        assert tok.with_special(ids) is tok  # nothing is missing
    if tokenizer.kind != "char":
        assert not set(tokenizer.encode("a" + NEW[0] + "<|endoftext|></s>")) & set(ids.values())
    stream = tokenizer.stream()
    assert "".join(stream.push(ids[name]) for name in NEW) + stream.flush() == "".join(NEW)


@pytest.mark.parametrize("tokenizer", [BYTE, BPE, HF, CHAR], ids=["byte", "bpe", "hf", "char"])
def test_special_tokens_added_later_leave_every_text_as_it_was(tokenizer):
    more = tokenizer.with_special(NEW)
    assert more.encode(CORPUS[0]) == tokenizer.encode(CORPUS[0]) and more.fingerprint != tokenizer.fingerprint
    assert (more.kind, more.eot_id, more.vocab_size) == (tokenizer.kind, tokenizer.eot_id, tokenizer.vocab_size + 2)
    assert tokenizer.with_special([]) is tokenizer and tokenizer.with_special(tokenizer.special) is tokenizer


def test_a_tokenizer_without_extras_is_stored_as_it_always_was():
    assert BYTE.fingerprint == "35fd171e3c7ded5592b938a50d68ae3dc7c564689116933b99342bcd6da0fdb5"
    assert (
        Tokenizer.char("abc", eot=True).fingerprint
        == "a799d78c68ab0cae9780757fc317646eea40a1739fc18f4e22e5760306c40b5a"
    )


def test_a_plain_added_token_becomes_special_at_its_own_id():
    stored = json.loads(json.dumps(BPE._stored))
    token = stored["added_tokens"][0] | {"id": BPE.vocab_size, "content": "<think>", "special": False}
    stored["added_tokens"].append(token)
    plain = Tokenizer(stored)
    assert plain.encode("<think>") == [BPE.vocab_size] and "<think>" not in plain.special
    more = plain.with_special(["<think>"])
    assert more.special["<think>"] == BPE.vocab_size and more.vocab_size == plain.vocab_size
    assert more.encode("<think>") == BPE.encode("<think>")


def test_an_end_of_turn_added_later_does_not_become_the_end_of_text():
    stored = json.loads(json.dumps(BPE._stored).replace("<|endoftext|>", "[SEP]"))
    assert Tokenizer(stored).eot_id == 0 == Tokenizer(stored).with_special(["<|im_end|>"]).eot_id
    assert Tokenizer(json.loads(json.dumps(stored).replace("[SEP]", "<|im_end|>"))).eot_id == 0  # where it is alone


def test_special_tokens_added_one_by_one_are_as_added_at_once():
    for tok in (BYTE, BPE, HF):
        assert tok.with_special(NEW[:1]).with_special(NEW).special == tok.with_special(NEW).special


def test_a_tokenizer_extends_one_that_gives_every_text_the_same_ids(tmp_path):
    for tok in (BYTE, BPE, HF, Tokenizer.char("abc", eot=True)):
        more = tok.with_special(NEW)
        more.save(tmp_path)
        assert tok.extends(tok) and Tokenizer.load(tmp_path).extends(tok) and more.extends(tok.with_special(NEW[:1]))
        assert not tok.extends(more) and not more.extends(tok.with_special(NEW[::-1]))  # other ids
    assert not BYTE.extends(BPE) and not BPE.extends(BYTE)
    assert not Tokenizer.char("abcd", eot=True).extends(Tokenizer.char("abc", eot=True))
    inside = resolve_tokenizer("bpe:400", CORPUS, NEW)  # its special tokens stand in front of the merges
    assert inside.special.keys() == BPE.with_special(NEW).special.keys() and not inside.extends(BPE)
    stored = json.loads(json.dumps(BPE._stored))
    stored["added_tokens"].append(
        stored["added_tokens"][0] | {"id": BPE.vocab_size, "content": "<x>", "special": False}
    )
    assert Tokenizer(stored).with_special(["<x>"]).extends(Tokenizer(stored))  # a token that was there becomes special


@pytest.mark.parametrize("name", ["", "user", "<a b>", "<a,b>", "im_end>"])
def test_a_special_token_that_reads_like_text_is_refused(name):
    with pytest.raises(UserError, match=r"stands in <> or \[\].*<\|im_start\|>"):
        resolve_tokenizer("byte", special=[name])


def test_a_vocabulary_too_small_for_its_special_tokens_is_refused():
    with pytest.raises(UserError, match="256 bytes and 3 special tokens need a vocabulary of at least 259"):
        resolve_tokenizer("bpe:258", CORPUS, NEW)
    assert resolve_tokenizer("bpe:259", CORPUS, NEW).vocab_size == 259


def test_encode_batch_gives_small_integer_arrays():
    out = BPE.encode_batch(["low", "", "wider"])
    assert [o.dtype for o in out] == [np.uint16] * 3 and len(out[1]) == 0


def test_an_unknown_character_is_named_with_its_position():
    tokenizer = resolve_tokenizer("char", ["abc\n"])
    with pytest.raises(UserError, match=r"'Z' \(U\+005A\) at position 5 \(line 2, column 2\).*`tokenizer` byte"):
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
