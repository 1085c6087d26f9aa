"""Prepare: nothing is lost, the split is as stated, folders are sealed whole or not at all."""

import errno
import io
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlm.cli import main as cli
from muonlm.data.packed import PackedData, bpb
from muonlm.data.prep import encode, formats, held_out, sealed, shards, text
from muonlm.data.prep.examples import prepare_examples, prepared_examples
from muonlm.data.prep.index import read_index, verify
from muonlm.data.prep.sealed import partial_path
from muonlm.data.prep.text import prepare, prepared
from muonlm.data.sources import expand as sources_module
from muonlm.data.text.tokenizer import Tokenizer
from muonlm.errors import UserError

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is absent: it holds the third-party texts")


def tokens(folder, split) -> list[int]:
    index = read_index(folder)
    dtype = np.dtype(index["dtype"])
    return [int(t) for s in index["splits"][split]["shards"] for t in np.fromfile(Path(folder) / s["file"], dtype)]


def texts(folder, split) -> list[str]:
    """The documents of a split, cut at EOT."""
    tokenizer, ids = Tokenizer.load(folder), tokens(folder, split)
    assert ids[0] == tokenizer.eot_id
    starts = [i for i, t in enumerate(ids) if t == tokenizer.eot_id] + [len(ids)]
    return [tokenizer.decode(ids[a + 1 : b]) for a, b in pairwise(starts)]


def jsonl(path, documents):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in documents), "utf-8")
    return path


MANY = [f"document {i}: {'é' * (i % 7)} ends\n" for i in range(400)]


@given(
    documents=st.lists(st.text(min_size=1, max_size=30), min_size=4, max_size=30, unique=True), shard=st.integers(3, 60)
)
@settings(max_examples=40, deadline=None)
def test_the_packer_loses_no_token_and_keeps_the_order(tmp_path_factory, documents, shard):
    base = tmp_path_factory.mktemp("pack")
    old = formats.SHARD, encode.BATCH
    formats.SHARD, encode.BATCH = shard, 20
    try:
        index = prepare(jsonl(base / "a.jsonl", documents), base / "out", tokenizer="byte", val="hash:0.3")
    finally:
        formats.SHARD, encode.BATCH = old
    train, val = texts(base / "out", "train"), texts(base / "out", "val")
    if index["val"]["fallback"]:
        assert "".join(train + val) == "".join(documents)
    else:
        held = set(val)
        assert train == [d for d in documents if d not in held] and val == [d for d in documents if d in held]
    for name, found in (("train", train), ("val", val)):
        split = index["splits"][name]
        assert split["bytes"] == len("".join(found).encode()) and split["documents"] == len(found)
        assert split["tokens"] == len(tokens(base / "out", name))
        assert all(s["tokens"] == shard for s in split["shards"][:-1])


def test_held_out_documents_depend_on_content_alone_and_grow_with_the_fraction(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", MANY)
    other = jsonl(tmp_path / "b.jsonl", [*reversed(MANY), MANY[3], MANY[3]])
    small = prepare(source, tmp_path / "s", tokenizer="byte", val="hash:0.05")
    prepare(source, tmp_path / "l", tokenizer="byte", val="hash:0.3")
    prepare(other, tmp_path / "o", tokenizer="byte", val="hash:0.3")
    s, large, o = (set(texts(tmp_path / n, "val")) for n in "slo")
    assert s < large == o
    assert not large & set(texts(tmp_path / "o", "train"))  # equal documents share a side
    assert 85 < len(large) < 155  # binomial(400, 0.3): mean 120, sd 9.2; 3.8 sigma
    assert small["val"] == {"rule": "hash:0.05", "fallback": False, "overlap": 0}


def test_one_file_of_one_line_works_end_to_end(tmp_path):
    (tmp_path / "one.txt").write_text("hello world")
    for spec in ("byte", "char", "bpe:4096"):
        index = prepare(tmp_path / "one.txt", tmp_path / spec[:3], tokenizer=spec)
        assert index["val"] == {"rule": "hash:0.01", "fallback": True}
        for split in ("train", "val"):
            data = PackedData(tmp_path / spec[:3], split, block_size=64, rows=4, seed=1)
            assert len(data) == 1 and data.batch(3).count == 4 * (data.num_tokens - 1)


@pytest.mark.parametrize("text", ["a", "ab", "abc"])
def test_a_corpus_too_short_for_two_splits_is_refused_and_leaves_nothing(text, tmp_path):
    (tmp_path / "s.txt").write_text(text)
    with pytest.raises(UserError, match=r"split has \d tokens, at least 2 are needed: .*`val` PATH"):
        prepare(tmp_path / "s.txt", tmp_path / "out", tokenizer="char")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.txt"]


@pytest.mark.parametrize("piece", [7, 1 << 20])
@pytest.mark.parametrize("count", [1, 3])
def test_tail_holds_out_the_last_characters_of_the_stream(piece, count, tmp_path, monkeypatch):
    monkeypatch.setattr(sources_module, "PIECE", piece)
    parts = [f"line one\nand two {i}\n" * 5 for i in range(count)]
    for i, part in enumerate(parts):
        (tmp_path / f"{i}.txt").write_text(part)
    index = prepare([tmp_path / f"{i}.txt" for i in range(count)], tmp_path / "out", tokenizer="byte", val="tail:0.25")
    whole = "".join(parts)
    cut = int(0.75 * len(whole))
    assert "".join(texts(tmp_path / "out", "train")) == whole[:cut]
    assert "".join(texts(tmp_path / "out", "val")) == whole[cut:]
    assert index["splits"]["train"]["documents"] + index["splits"]["val"]["documents"] == count + 1
    assert index["splits"]["train"]["bytes"] == cut


@needs_data
def test_tiny_shakespeare_splits_as_nanogpt_does(tmp_path):
    text = (DATA / "tinyshakespeare.txt").read_text("utf-8")
    for layout, name in (("packed", "-00000"), ("bin", "")):
        index = prepare(
            DATA / "tinyshakespeare.txt", tmp_path / layout, tokenizer="char", val="tail:0.1", layout=layout
        )
        rank = {c: i for i, c in enumerate(sorted(set(text)))}
        cut = int(0.9 * len(text))
        for split, part in (("train", text[:cut]), ("val", text[cut:])):
            found = np.fromfile(tmp_path / layout / f"{split}{name}.bin", "<u2")
            assert found.tolist() == [rank[c] for c in part]
        assert index["vocab_size"] == 65
    names = sorted(p.name for p in (tmp_path / "bin").iterdir())
    assert names == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]
    assert PackedData(tmp_path / "bin", "val", block_size=64, rows=2, seed=0).num_tokens == len(text) - cut


def test_separate_validation_text_is_used_whole_and_its_overlap_counted(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", MANY[:20])
    held = jsonl(tmp_path / "v.jsonl", [MANY[4], "quite new"])
    index = prepare(source, tmp_path / "out", tokenizer="byte", val=str(held))
    assert texts(tmp_path / "out", "train") == MANY[:20] and texts(tmp_path / "out", "val") == [MANY[4], "quite new"]
    assert index["val"]["overlap"] == 1
    assert [s["split"] for s in index["sources"]] == ["train", "val"]


def test_bpe_never_sees_held_out_text(tmp_path):
    text = "aaaa bbbb " * 50
    (tmp_path / "t.txt").write_text(text + "zqzqzqzq " * 40)
    prepare(tmp_path / "t.txt", tmp_path / "out", tokenizer="bpe:400", val=f"tail:{360 / 860}")
    pieces = [
        Tokenizer.load(tmp_path / "out").decode([i]) for i in range(257, Tokenizer.load(tmp_path / "out").vocab_size)
    ]
    assert any("aa" in p for p in pieces) and not any("zq" in p for p in pieces)


def test_a_long_text_in_pieces_gives_the_tokens_of_the_whole(tmp_path, monkeypatch):
    text = "".join(f"the line number {i} of this text\n\n" if i % 3 else f"and {i}\n" for i in range(800))
    (tmp_path / "t.txt").write_text(text)
    monkeypatch.setattr(sources_module, "PIECE", 500)
    prepare(tmp_path / "t.txt", tmp_path / "out", tokenizer="bpe:300", val="tail:0.1")
    tokenizer, cut = Tokenizer.load(tmp_path / "out"), int(0.9 * len(text))
    assert tokens(tmp_path / "out", "train") == [0, *tokenizer._hf.encode(text[:cut], add_special_tokens=False).ids]
    assert tokens(tmp_path / "out", "val") == [0, *tokenizer._hf.encode(text[cut:], add_special_tokens=False).ids]


def test_num_tokens_stops_at_the_document_that_reaches_it(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "BATCH", 50)
    source = jsonl(tmp_path / "a.jsonl", MANY)
    index = prepare(source, tmp_path / "out", tokenizer="byte", val="hash:0.3", num_tokens=300)
    train = texts(tmp_path / "out", "train")
    held = set(texts(tmp_path / "out", "val"))
    assert train == [d for d in MANY if d in set(train)] and not held & set(train)
    assert 300 <= index["splits"]["train"]["tokens"] < 300 + max(len(d.encode()) + 1 for d in MANY)


def test_the_index_records_sources_and_the_fingerprint_is_of_content_alone(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", MANY)
    copy = jsonl(tmp_path / "copy.jsonl", MANY)
    one = prepare(source, tmp_path / "1", tokenizer="byte")
    two = prepare(copy, tmp_path / "2", tokenizer="byte")
    three = prepare(jsonl(tmp_path / "c.jsonl", MANY[:-1] + ["other"]), tmp_path / "3", tokenizer="byte")
    assert one["fingerprint"] == two["fingerprint"] != three["fingerprint"]
    assert one["sources"][0]["sha256"] == two["sources"][0]["sha256"] and one["sources"][0]["path"] == str(source)
    assert verify(tmp_path / "1") == one
    assert PackedData(tmp_path / "1", block_size=8, rows=1, seed=0).fingerprint == one["fingerprint"]


def test_standard_input_is_prepared_and_its_copy_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"some piped text\n" * 9)))
    index = prepare("-", tmp_path / "out", tokenizer="bpe:300")
    assert "".join(texts(tmp_path / "out", "train") + texts(tmp_path / "out", "val")) == "some piped text\n" * 9
    assert index["sources"][0]["path"] == "-" and index["sources"][0]["bytes"] == 144
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "index.json",
        "tokenizer.json",
        "train-00000.bin",
        "val-00000.bin",
    ]


def files(folder) -> dict:
    return {p.relative_to(folder): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def same(one, other) -> bool:
    """Whether two prepared folders hold the same bytes, but for the time in their indexes and its checksum."""
    a, b = files(one), files(other)
    for found in (a, b):
        for name in formats_with_index & {str(p) for p in found}:
            index = json.loads(found.pop(Path(name)))
            found[name] = {k: v for k, v in index.items() if k not in ("created", "checksum")}
    return a == b


formats_with_index = {"index.json", "meta.json", "raw.json"}


def break_at(monkeypatch, number: int, error: BaseException):
    """Make the number-th of the calls that change the disk raise instead; returns the names of all that were made."""
    calls = []
    for owner, name in (
        (os, "replace"),
        (os, "rename"),
        (os, "fsync"),
        (shards.Files, "write"),
        (shards.Files, "seal"),
    ):
        plain = getattr(owner, name)

        def call(*args, _plain=plain, _name=name, **kwargs):
            calls.append(_name)
            if len(calls) == number:
                raise error
            return None if _name == "fsync" else _plain(*args, **kwargs)  # no power fails here, and syncing is slow

        monkeypatch.setattr(owner, name, call)
    return calls


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("a bug"), UserError("a bad row")], ids=type)
def test_an_error_leaves_no_trace_and_an_older_target_untouched(error, exists, tmp_path, monkeypatch):
    source = jsonl(tmp_path / "a.jsonl", MANY)
    if exists:
        prepare(source, tmp_path / "out", tokenizer="byte")
    before = files(tmp_path)
    for number in range(1, 100):
        with monkeypatch.context() as patch:
            calls = break_at(patch, number, error)
            try:
                prepare(source, tmp_path / "out", tokenizer="char", overwrite=True)
                break
            except type(error):
                pass
        if (tmp_path / "out").exists() and verify(tmp_path / "out")["tokenizer"]["kind"] == "char":
            assert calls[-1] == "fsync"  # of the rename: the new folder stood already
            break
        assert files(tmp_path) == before and len(list(tmp_path.iterdir())) == 1 + exists, calls
    assert number > 15


LAYOUTS = ("packed", "bin", "rows", "litpkds", "raw")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("val", ["hash:0.2", "tail:0.3", "last:0.3", "PATH"])
def test_stopped_before_any_change_of_the_disk_it_goes_on_to_the_same_bytes(layout, val, tmp_path, monkeypatch):
    """Every ninth place for each rule and layout, from another one on each, so that nearly all are tried."""
    if layout == "raw" and val != "hash:0.2":
        pytest.skip("raw has no splits")
    source = jsonl(tmp_path / "a.jsonl", [*MANY[:60], "", *MANY[60:100]])
    (tmp_path / "b.txt").write_text("one long text\n" * 200)
    monkeypatch.setattr(sources_module, "PIECE", 1000)
    monkeypatch.setattr(held_out, "HASHED", 900)
    monkeypatch.setattr(formats, "SHARD", 1500)
    monkeypatch.setattr(formats, "ROWS", {"train": 100, "val": 40})
    monkeypatch.setattr(formats, "LITPKDS_ROWS", 60)
    monkeypatch.setattr(shards, "RAW_SHARD", 4000)
    monkeypatch.setattr(encode, "BATCH", 1200)
    monkeypatch.setattr(sealed, "SAVE_SECONDS", 0)
    rule = str(jsonl(tmp_path / "v.jsonl", [MANY[3], *MANY[200:240]])) if val == "PATH" else val
    options = dict(layout=layout, tokenizer="char", block_size=15) | ({} if layout == "raw" else {"val": rule})
    sources = [source, tmp_path / "b.txt"]
    with monkeypatch.context() as patch:
        calls = break_at(patch, 0, KeyboardInterrupt())
        prepare(sources, tmp_path / "whole", **options)
    resumed = 0
    first = 1 + ["hash:0.2", "tail:0.3", "last:0.3", "PATH"].index(val) + 4 * LAYOUTS.index(layout) % 9
    for number in range(first, len(calls) + 1, 41 if layout == "raw" else 9):  # raw saves at every document here
        out, said = tmp_path / f"out{number}", []
        with monkeypatch.context() as patch:
            break_at(patch, number, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                prepare(sources, out, **options)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda handle: None)
            index = prepare(sources, out, **options, log=said.append)
        resumed += any("going on" in line for line in said)
        assert same(out, tmp_path / "whole") and not partial_path(out).exists(), calls[number - 1]
        assert index == json.loads(
            (out / {"bin": "meta.json", "raw": "raw.json"}.get(layout, "index.json")).read_text()
        )
        shutil.rmtree(out)
    assert resumed > 2


def test_a_stop_while_an_older_target_is_replaced_loses_neither(tmp_path, monkeypatch):
    source, out = jsonl(tmp_path / "a.jsonl", MANY), tmp_path / "out"
    old = prepare(source, out, tokenizer="byte")
    for number in (1, 2):  # the renames: old target aside, new one in its place
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            renamed = []

            def stop(*args, _plain=os.rename if number == 1 else os.replace, _renamed=renamed):
                if Path(args[1]) == out or Path(args[1]).name == "old":
                    raise KeyboardInterrupt
                return _plain(*args)

            patch.setattr(os, "rename" if number == 1 else "replace", stop)
            prepare(source, out, tokenizer="char", overwrite=True)
        with sealed.sealed(out) as work:  # whoever opens it next puts the old one back
            work.keep = True
            assert verify(out) == old
            raise_after = work.path
        assert not raise_after.exists()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", lambda a, b, _plain=os.replace: (_plain(a, b), Path(b) == out and stop_now()))
        prepare(source, out, tokenizer="char", overwrite=True)
    assert verify(out)["tokenizer"]["kind"] == "char"  # stopped after the exchange: the same command finds it finished
    said = []
    assert prepare(source, out, tokenizer="char", log=said.append) == verify(out) and "was finished" in said[0]
    assert not partial_path(out).exists()


def stop_now():
    raise KeyboardInterrupt


def test_other_settings_or_sources_begin_again_and_say_so(tmp_path, monkeypatch):
    source, said = jsonl(tmp_path / "a.jsonl", MANY), []
    monkeypatch.setattr(encode, "BATCH", 1000)
    monkeypatch.setattr(sealed, "SAVE_SECONDS", 0)

    def stopped(**options):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(shards.TokenShards, "finish", lambda *a: stop_now())
            prepare(source, tmp_path / "out", tokenizer="byte", **options)

    stopped()
    prepare(source, tmp_path / "out", tokenizer="byte", val="hash:0.3", log=said.append)
    assert said == ["what an earlier command left unfinished is of other settings or sources: beginning again"]
    stopped(overwrite=True)
    jsonl(source, MANY[:-1] + ["document 399 is now another"])
    prepare(source, tmp_path / "out", tokenizer="byte", overwrite=True, log=said.append)
    assert len(said) == 2 and said[1] == said[0]
    texts_now = texts(tmp_path / "out", "train") + texts(tmp_path / "out", "val")
    assert "document 399 is now another" in texts_now


def test_a_full_disk_keeps_what_is_done(tmp_path, monkeypatch):
    source = jsonl(tmp_path / "a.jsonl", MANY)
    with monkeypatch.context() as patch:
        patch.setattr(shards.TokenShards, "write", lambda *a: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space")))
        with pytest.raises(
            UserError, match=r"out could not be written: the disk is full \([\d,]+ MiB free\).*same command again"
        ):
            prepare(source, tmp_path / "out", tokenizer="byte")
    assert partial_path(tmp_path / "out").exists() and not (tmp_path / "out").exists()
    assert verify(tmp_path / "out") if prepare(source, tmp_path / "out", tokenizer="byte") else False


def test_a_disk_that_is_full_from_the_start_keeps_nothing_and_does_not_say_so(tmp_path, monkeypatch):
    source = jsonl(tmp_path / "a.jsonl", MANY)
    monkeypatch.setattr(sealed.Work, "save", lambda *a: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space")))
    with pytest.raises(UserError, match="disk is full.*run the same command again, or choose another `to`"):
        prepare(source, tmp_path / "out", tokenizer="byte")
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_link_as_target_leads_to_what_is_made_and_a_mount_point_is_refused(tmp_path, monkeypatch):
    source = jsonl(tmp_path / "a.jsonl", MANY)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for _ in range(2):
        prepare(source, tmp_path / "link", tokenizer="byte", overwrite=True)
        assert (tmp_path / "link").is_symlink() and verify(tmp_path / "real")
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(UserError, match="/proc is a mount point, which cannot be replaced; .*`to` /proc/data"):
        prepare(source, "/proc", tokenizer="byte")


def test_overwrite_never_takes_an_index_json_of_someone_else_for_ours(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.json").write_text('{"pages": []}')
    with pytest.raises(UserError, match="would delete something else"):
        prepare(jsonl(tmp_path / "a.jsonl", MANY), tmp_path / "site", tokenizer="byte", overwrite=True)
    assert (tmp_path / "site" / "index.json").exists()


def test_held_out_text_on_standard_input_is_refused(tmp_path):
    with pytest.raises(UserError, match="`val` - would read standard input several times; save it first"):
        prepare(jsonl(tmp_path / "a.jsonl", MANY), tmp_path / "out", tokenizer="byte", val="-")


def test_a_tokenizer_learns_from_a_row_that_is_longer_than_its_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "SAMPLE", 2000)
    monkeypatch.setattr(text, "PIECE", 100)
    for n in range(4):  # whole, the row would be left out in each case with a chance of more than a half
        row = " ".join(f"words {n} and {i} more" for i in range(300))
        prepare(jsonl(tmp_path / "a.jsonl", [row]), tmp_path / "out", tokenizer="bpe:300", overwrite=n > 0)
        assert read_index(tmp_path / "out")["vocab_size"] > 280


def test_the_cache_tells_a_weighted_folder_from_the_same_files_weighted_one_by_one(tmp_path):
    (tmp_path / "f").mkdir()
    for name in ("f/a", "f/b", "c"):
        jsonl(tmp_path / f"{name}.jsonl", [f"{name} {t}" for t in MANY])
    folder = [f"{tmp_path}/f=1", f"{tmp_path}/c.jsonl=1"]
    alone = [f"{tmp_path}/{name}.jsonl=1" for name in ("f/a", "f/b", "c")]
    one, other = (prepared(s, tokenizer="byte", cache=tmp_path / "cache") for s in (folder, alone))
    assert one != other and read_index(one)["fingerprint"] != read_index(other)["fingerprint"]


def test_verify_reads_every_file_of_conversations_and_refuses_foreign_folders(tmp_path):
    prepare_examples("word_problems:50", tmp_path / "out", kind="sft", template="qa", tokenizer="byte")
    verify(tmp_path / "out")
    for part in ("tokens", "trained", "lengths"):
        file = tmp_path / "out" / f"train-{part}.bin"
        whole = file.read_bytes()
        file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        with pytest.raises(UserError, match=f"train-{part}.bin was altered"):
            verify(tmp_path / "out")
        file.write_bytes(whole)
    file = tmp_path / "out" / "qa.toml"
    file.write_text(file.read_text().replace("Answer", "Reply"))
    with pytest.raises(UserError, match="qa.toml was altered: the template differs"):
        verify(tmp_path / "out")


def test_prepared_folders_are_no_text_to_prepare(tmp_path):
    prepare_examples("word_problems:50", tmp_path / "talk", kind="sft", template="qa", tokenizer="byte")
    with pytest.raises(UserError, match="talk holds tokens, made by muonlm prep"):  # its qa.toml was taken for code
        prepare(tmp_path / "talk", tmp_path / "out", tokenizer="byte")


def told(capsys, *argv) -> tuple[dict, str]:
    """What `muonlm info` says of a folder: as JSON, as text."""
    assert cli.main(["info", *map(str, argv)]) == 0
    text = capsys.readouterr().out
    assert cli.main(["info", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out), text


def refused(capsys, *argv) -> str:
    assert cli.main(["info", *map(str, argv)]) == 2
    return capsys.readouterr().err


def test_info_says_what_prepared_text_holds_and_that_it_is_whole(tmp_path, capsys):
    sources = [jsonl(tmp_path / f"{name}.jsonl", [f"{name} {t}" for t in MANY]) for name in "abcdefghij"]
    index = prepare([f"{s}=1" for s in sources], tmp_path / "out", tokenizer="byte", val="hash:0.1")
    facts, text = told(capsys, tmp_path / "out")
    counts = ("documents", "tokens", "bytes")
    assert facts["splits"] == {n: {c: s[c] for c in counts} for n, s in index["splits"].items()}
    assert facts["tokenizer"]["kind"] == "byte" and facts["sources"] == index["sources"] and facts["files"] == 4
    assert (facts["kind"], facts["layout"], facts["template"]) == ("text", "packed", None)
    train, separator = index["splits"]["train"], facts["separator"]
    assert f"train          {train['documents']:,} documents, {train['tokens']:,} tokens, {train['bytes']:,}" in text
    assert f"tokenizer      byte, vocabulary 257\nseparator      {separator} before each document\n" in text
    assert Tokenizer.load(tmp_path / "out").special[separator] == 256
    assert "held out       hash:0.1\n" in text and text.count("\nmixture ") == 10 and "and 2 more;" in text
    assert text.endswith("files          all 4 files as recorded\n")
    for flags, named in ((["--optim.lr", "1"], "optim.lr"), (["--smoke"], "smoke"), (["--data.tokenizer", "byte"], "")):
        assert f"is what it was made to be; leave out --{named}" in refused(capsys, tmp_path / "out", *flags)
    shard = tmp_path / "out" / "val-00000.bin"
    shard.write_bytes(b"!" + shard.read_bytes()[1:])
    assert "val-00000.bin was altered" in refused(capsys, tmp_path / "out")
    prepare(sources[0], tmp_path / "bare", tokenizer="byte", val="hash:1e-9", eod=False)
    facts, text = told(capsys, tmp_path / "bare")
    assert facts["separator"] is None and "separator      none\nheld out       hash:1e-9; as it would leave" in text


@pytest.mark.parametrize("kind", ["sft", "preferences"])
def test_info_says_what_conversations_hold(kind, tmp_path, capsys):
    index = prepare_examples("word_problems:50", tmp_path / "out", kind=kind, template="qa", tokenizer="byte")
    facts, text = told(capsys, tmp_path / "out")
    assert facts["kind"] == {"sft": "conversations"}.get(kind, kind) and facts["template"] == "qa"
    for name, split in facts["splits"].items():
        assert split == {c: index["splits"][name][c] for c in ("examples", "documents", "tokens", "targets")}
    assert "template       qa\n" in text and "separator" not in text
    assert facts["files"] == len(list((tmp_path / "out").iterdir())) == 9
    assert "source         word_problems:50 (train)\n" in text and "all 9 files as recorded" in text


def test_info_reads_a_folder_of_another_program_with_the_tokenizer_that_is_named(tmp_path, capsys):
    np.arange(131, dtype="<u2").tofile(tmp_path / "train_0.bin")
    np.arange(131, dtype="<u2").tofile(tmp_path / "val_0.bin")
    assert "name the tokenizer it was made with: --data.tokenizer" in refused(capsys, tmp_path)
    named = [tmp_path, "--data.tokenizer", "byte"]
    assert "set --model.block_size to the row length" in refused(capsys, *named)
    facts, text = told(capsys, *named, "--model.block_size", 130)
    assert facts["files"] is None and facts["splits"]["val"]["tokens"] == 131 and "documents" not in text
    assert "rows, made by another program" in text and "no hashes are recorded: nothing can be compared" in text
    assert "takes only --data.tokenizer and" in refused(capsys, *named, "--model.block_size", 130, "--seed", 2)
    assert "'wide' is the row length - 1" in refused(capsys, *named, "--model.block_size", "wide")


def test_info_of_a_folder_that_is_neither_run_nor_data_says_so(tmp_path, capsys):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    found = refused(capsys, tmp_path / "runs")
    assert "runs is neither a run (no config.json in it) nor prepared data (no index.json). `muonlm train`" in found
    (tmp_path / "runs" / "mine" / "config.json").write_text("{}")
    assert f"Did you mean '{tmp_path}/runs/mine'?" in refused(capsys, tmp_path / "runs")


@pytest.mark.parametrize("form", ["cot", "sft", "preferences"])
def test_the_command_makes_each_form_of_conversations_and_names_a_flag_it_does_not_use(form, tmp_path, capsys):
    command = ["prep", "word_problems:60", "--as", form, "--to", str(tmp_path / form)]
    flags = [] if form == "cot" else ["--tokenizer", "byte", "--template", "qa"]
    assert cli.main(command + flags) == 0
    objective = {"cot": "sft", "sft": "sft", "preferences": "dpo"}[form]
    assert f"--data {tmp_path / form} --train.objective {objective}" in capsys.readouterr().out
    examples = prepared_examples(
        tmp_path / form, kind="sft" if form == "cot" else form, template="qa", tokenizer="byte", cache=tmp_path / "c"
    )
    assert sum(s["examples"] for s in read_index(examples)["splits"].values()) == 60
    assert cli.main([*command, "--num-tokens", "9", "--overwrite"]) == 2
    assert f"--num-tokens does nothing with --as {form}" in capsys.readouterr().err


def test_a_second_process_at_the_same_target_is_refused(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", MANY)
    with sealed.sealed(tmp_path / "out"):
        with pytest.raises(UserError, match="another process is making .*out right now"):
            prepare(source, tmp_path / "out", tokenizer="byte")
    assert prepare(source, tmp_path / "out", tokenizer="byte")


KILLED = """
import os, pathlib, random, shutil, signal, sys, time
from muonlm.data.prep import encode, sealed, shards, text as prepare
encode.BATCH, sealed.SAVE_SECONDS = 1 << 17, 0
folder, sources = pathlib.Path(sys.argv[1]), sys.argv[2:]

def begin(to):
    child = os.fork()
    if not child:
        log = lambda line: print(line, file=sys.stderr, flush=True)
        prepare.prepare(sources, to, tokenizer=str(folder / "words"), log=log)
        os._exit(0)
    return child

def saved():
    try:
        return (folder / ".out.partial" / "state.json").read_bytes()
    except OSError:
        return None

prepare.prepare(sources[1], folder / "words", tokenizer="bpe:400")  # made before: else most kills would fall on it
start = time.monotonic()
os.waitpid(begin(folder / "whole"), 0)
gap, rng, kills = (time.monotonic() - start) / 16, random.Random(7), 0
while kills < 10:
    child = begin(folder / "out")
    before = saved()
    while kills % 3 and saved() == before:  # two in three in the middle of the work, the others anywhere
        time.sleep(0.001)
    time.sleep(rng.uniform(0, gap))
    os.kill(child, signal.SIGKILL)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL:
        kills += 1
    if (folder / "out").exists():  # done too early: once more, killed more often
        shutil.rmtree(folder / "out")
        gap, kills = gap / 2, 0
print(kills)
child = begin(folder / "out")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@needs_data
def test_killed_at_ten_random_moments_and_run_again_it_makes_the_same_bytes(tmp_path):
    """Real processes, real SIGKILL, 4 MB of real text in three forms; forked from one that has imported everything."""
    sources = [str(DATA / n) for n in ("tinyshakespeare.txt", "wikitext2_valid.txt", "gsm8k_train.jsonl")]
    sources[2] = str(tmp_path / "gsm8k.jsonl")
    rows = [json.loads(line) for line in (DATA / "gsm8k_train.jsonl").read_text("utf-8").splitlines()[:3000]]
    jsonl(tmp_path / "gsm8k.jsonl", [f"{r['question']}\n{r['answer']}" for r in rows])
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), *sources], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == 10 and run.stderr.count("going on where") >= 5, run.stderr
    assert same(tmp_path / "out", tmp_path / "whole") and verify(tmp_path / "out")
    assert not list(tmp_path.glob(".*"))


def test_weights_are_realised_and_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "BATCH", 500)
    a = jsonl(tmp_path / "a.jsonl", [f"a {i} " + "x" * 40 for i in range(500)])
    b = jsonl(tmp_path / "b.jsonl", [f"b {i} " + "y" * 90 for i in range(500)])
    index = prepare([f"{a}=3", f"{b}=1"], tmp_path / "out", tokenizer="byte", num_tokens=12_000)
    train = texts(tmp_path / "out", "train")
    first, second = (sum(len(t) for t in train if t[0] == which) for which in "ab")
    assert [m["characters"] for m in index["mixture"]] == [first, second]
    assert first / (first + second) == pytest.approx(0.75, abs=0.02)  # a document is 1 % of the text, val takes some


def test_num_tokens_leaves_no_split_empty_and_is_the_same_for_any_batch(tmp_path, monkeypatch):
    source = jsonl(tmp_path / "a.jsonl", MANY)
    for rule in ("hash:0.01", "tail:0.2", "last:0.2"):
        made = []
        for batch in (60, 3000, 1 << 20):
            monkeypatch.setattr(encode, "BATCH", batch)
            made.append(prepare(source, tmp_path / f"{rule[:4]}{batch}", tokenizer="byte", val=rule, num_tokens=200))
        assert len({m["fingerprint"] for m in made}) == 1
        train, val = (made[0]["splits"][n]["tokens"] for n in ("train", "val"))
        longest = max(len(d.encode()) + 1 for d in MANY)
        assert 200 <= train < 200 + longest and 2 <= val
        if rule != "hash:0.01":
            assert 50 <= val < 50 + len("".join(MANY).encode()) // 400 * 400  # a fifth of the whole; tail is one piece


def test_the_last_documents_are_held_out_and_their_copies_counted(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [MANY[399], *MANY])
    index = prepare(source, tmp_path / "out", tokenizer="byte", val="last:0.05")
    cut = int(0.95 * 401)
    assert (
        texts(tmp_path / "out", "train") == [MANY[399], *MANY][:cut]
        and texts(tmp_path / "out", "val") == MANY[cut - 1 :]
    )
    assert index["val"] == {"rule": "last:0.05", "fallback": False, "overlap": 1}


def test_without_eod_documents_follow_each_other_unmarked(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", MANY)
    prepare(source, tmp_path / "out", tokenizer="byte", val="last:0.1", eod=False)
    assert bytes(tokens(tmp_path / "out", "train")).decode() == "".join(MANY[:360])


def test_raw_text_is_read_back_as_the_documents_it_came_from(tmp_path, monkeypatch):
    monkeypatch.setattr(sources_module, "PIECE", 100)
    monkeypatch.setattr(held_out, "HASHED", 90)
    (tmp_path / "long.txt").write_text('a "quoted" line \u2028 of é\n' * 90)
    sources = [jsonl(tmp_path / "a.jsonl", [*MANY, ""]), tmp_path / "long.txt"]
    index = prepare(sources, tmp_path / "raw", layout="raw")
    assert index["documents"] == 401 == sum(s["documents"] for s in index["shards"])
    wanted = prepare(sources, tmp_path / "a", tokenizer="byte", val="hash:0.1")
    assert (
        prepare(tmp_path / "raw", tmp_path / "b", tokenizer="byte", val="hash:0.1")["fingerprint"]
        == wanted["fingerprint"]
    )


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    source = jsonl(tmp_path / "a.jsonl", MANY)
    finish = shards.TokenShards.finish
    monkeypatch.setattr(shards.TokenShards, "finish", lambda *a: (jsonl(source, MANY[:-1]), finish(*a)))
    with pytest.raises(UserError, match="a.jsonl was changed while it was read; run the command again"):
        prepare(source, tmp_path / "out", tokenizer="byte")


def test_more_special_tokens_are_put_into_a_tokenizer_made_here(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", MANY)
    prepare(source, tmp_path / "out", tokenizer="bpe:300", special=["<|im_start|>", "<|im_end|>"])
    assert Tokenizer.load(tmp_path / "out").special == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}


def test_an_existing_target_is_refused_without_overwrite_and_replaced_with_it(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", MANY)
    prepare(source, tmp_path / "out", tokenizer="byte")
    with pytest.raises(UserError, match="out exists already; add `overwrite`"):
        prepare(source, tmp_path / "out", tokenizer="char")
    assert prepare(source, tmp_path / "out", tokenizer="char", overwrite=True)["tokenizer"]["kind"] == "char"
    assert verify(tmp_path / "out")["tokenizer"]["kind"] == "char"
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="is not prepared data, so `overwrite` would delete something else"):
        prepare(source, tmp_path / "precious", tokenizer="char", overwrite=True)
    assert (tmp_path / "precious" / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val": "hash:2"}, "fraction must lie between 0 and 1, like hash:0.1"),
        ({"val": "tail:x"}, "like tail:0.1"),
        ({"val": "0.1"}, "write hash:0.01, tail:0.1 or the path"),
        ({"val": "held.txt"}, "held.txt does not exist"),
        ({"tokenizer": "bytes"}, "did you mean byte"),
        ({"tokenizer": "bpe:9"}, "try bpe:4096"),
        ({"layout": "shards"}, "it is packed, bin, rows, litpkds or raw"),
        ({"num_tokens": 1}, "at least 2"),
    ],
)
def test_a_bad_setting_is_refused_before_any_work(settings, message, tmp_path):
    source = jsonl(tmp_path / "a.jsonl", MANY)
    with pytest.raises(UserError, match=message):
        prepare(source, tmp_path / "deep" / "out", **settings)
    assert not (tmp_path / "deep").exists()


def test_a_char_tokenizer_that_lacks_a_character_names_the_file(tmp_path):
    prepare(jsonl(tmp_path / "a.jsonl", MANY), tmp_path / "out", tokenizer="char")
    other = jsonl(tmp_path / "b.jsonl", ["end", "send", "Zen"] * 3)
    with pytest.raises(UserError, match=r"b.jsonl:3: the character 'Z' .*at position 0.*`tokenizer` byte"):
        prepare(other, tmp_path / "new", tokenizer=str(tmp_path / "out"), val="tail:0.2")


def test_prepared_takes_a_prepared_folder_and_caches_everything_else_by_content(tmp_path):
    source, cache = jsonl(tmp_path / "a.jsonl", MANY), tmp_path / "cache"
    first = prepared(source, tokenizer="byte", cache=cache)
    assert prepared(first) == first
    stamp = (first / "index.json").stat().st_mtime_ns
    assert prepared([jsonl(tmp_path / "same.jsonl", MANY)], tokenizer="byte", cache=cache) == first
    assert (first / "index.json").stat().st_mtime_ns == stamp  # found, not made
    others = {
        prepared(source, tokenizer="char", cache=cache),
        prepared(source, tokenizer="byte", val="hash:0.2", cache=cache),
        prepared(jsonl(tmp_path / "b.jsonl", MANY[1:]), tokenizer="byte", cache=cache),
    }
    assert len(others | {first}) == 4
    (first / "train-00000.bin").write_bytes(b"")
    assert prepared(source, tokenizer="byte", cache=cache) == first and verify(first)
    (first / "train-00000.bin").write_bytes(b"")
    with pytest.raises(UserError, match="train-00000.bin has 0 bytes"):
        prepared(first)  # named by the user: not ours to repair


def test_processes_that_prepare_the_same_data_at_once_share_one_result(tmp_path):
    source, found = jsonl(tmp_path / "a.jsonl", MANY), []
    gate = threading.Barrier(4)

    def work():
        gate.wait()
        found.append(prepared(source, tokenizer="byte", cache=tmp_path / "cache"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert len(found) == 4 and len(set(found)) == 1 and verify(found[0])
    assert len(list((tmp_path / "cache" / "data").iterdir())) == 1  # no folder left aside


def test_bits_per_byte_of_a_uniform_guess_over_bytes_is_eight(tmp_path):
    (tmp_path / "t.txt").write_text("abcdefgh" * 8)
    split = prepare(tmp_path / "t.txt", tmp_path / "out", tokenizer="byte", val="tail:0.5")["splits"]["val"]
    assert split["tokens"] == split["bytes"] + 1  # EOT first: as many targets as bytes
    assert bpb(math.log(256), split) == pytest.approx(8, rel=1e-12)  # float rounding only


def test_progress_reports_the_bytes_of_text_done(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "BATCH", 2000)
    calls = []
    index = prepare(
        jsonl(tmp_path / "a.jsonl", MANY), tmp_path / "out", tokenizer="byte", progress=lambda *a: calls.append(a)
    )
    done = [d for stage, d, _ in calls if stage == "tokenise"]
    assert len(done) > 2 and done == sorted(done)
    assert done[-1] == sum(s["bytes"] for s in index["splits"].values()) == calls[-1][2] < calls[0][2]
