"""Formats: a file built byte by byte from its description is read, what we write is read back, bad files are named."""

import struct

import numpy as np
import pytest

from muonlm.data.packed import PackedData
from muonlm.data.prep import formats
from muonlm.data.prep.formats import foreign_index, is_foreign
from muonlm.data.prep.index import read_index, verify
from muonlm.data.prep.text import prepare, prepared
from muonlm.data.text.tokenizer import resolve_tokenizer, train_bpe
from muonlm.errors import UserError


def litpkds(ids, *, version=1, code=8, tokens=None) -> bytes:
    """From the description alone: LITPKDS, uint64 1, uint8 8, uint64 count, uint16 ids, all little-endian."""
    out = bytearray(b"LITPKDS")
    out += bytes([version, 0, 0, 0, 0, 0, 0, 0])
    out.append(code)
    out += (len(ids) if tokens is None else tokens).to_bytes(8, "little")
    for i in ids:
        out += bytes([i % 256, i // 256])
    return bytes(out)


def stream(folder, split, tokenizer="byte", block_size=8) -> list[int]:
    return PackedData(folder, split, block_size=block_size, rows=1, seed=0, tokenizer=tokenizer).tokens(10**9).tolist()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "validation").mkdir()
    return tmp_path / "data"


def write(folder, train: list[bytes], val: list[bytes], digits=10):
    for n, data in enumerate(train):
        (folder / "train" / f"train_slim_{n:0{digits}d}.bin").write_bytes(data)
    for n, data in enumerate(val):
        (folder / "validation" / f"validation_{n:0{digits}d}.bin").write_bytes(data)
    return folder


def test_a_litpkds_file_built_byte_by_byte_is_read(folder):
    assert len(litpkds([])) == 24
    write(folder, [litpkds([104, 105, 256]), litpkds([7, 8])], [litpkds([1, 2, 255, 256])])
    assert stream(folder, "train") == [104, 105, 256, 7, 8] and stream(folder, "val") == [1, 2, 255, 256]
    data = PackedData(folder, "train", block_size=3, rows=2, seed=0, tokenizer="byte")
    batch = data.batch(0)
    assert batch.inputs.shape == (2, 3) and batch.count == 4  # four targets in all
    assert data.index["layout"] == "litpkds" and data.vocab_size == 257 and data.num_bytes == 4  # 256 is no text
    assert prepared(folder, tokenizer="byte") == folder


@pytest.mark.parametrize("where", [".", "train and validation", "train and val"])
@pytest.mark.parametrize("names", ["train_slim_00000 validation_00000", "train_0 val_0"])
def test_headerless_rows_are_read_under_any_of_their_names(where, names, tmp_path):
    train, val = (n + ".bin" for n in names.split())
    folders = [tmp_path / w for w in (where.split(" and ") if "and" in where else (".", "."))]
    for part, name, count in zip(folders, (train, val), (130, 65), strict=True):
        part.mkdir(exist_ok=True)
        np.arange(count, dtype="<u2").tofile(part / name)
    assert is_foreign(tmp_path)
    assert stream(tmp_path, "train") == list(range(130)) and stream(tmp_path, "val") == list(range(65))


def test_nanogpt_files_are_read_and_their_pickle_never_opened(tmp_path):
    np.array([5, 6, 7], "<u2").tofile(tmp_path / "train.bin")
    np.array([8, 9], "<u2").tofile(tmp_path / "val.bin")
    (tmp_path / "meta.pkl").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "opened").encode() + b"'\ntR.")
    assert stream(tmp_path, "train") == [5, 6, 7] and stream(tmp_path, "val") == [8, 9]
    for spec in ("", "bpe:4096", "char"):
        with pytest.raises(UserError, match="does not say whose .*meta.pkl is not opened.*`tokenizer` gpt2:PATH"):
            read_index(tmp_path, spec)
    assert not (tmp_path / "opened").exists()
    (tmp_path / "meta.pkl").unlink()
    (tmp_path / "meta.json").write_text('{"tokenizer": "gpt2", "vocab_size": 50257}')
    assert stream(tmp_path, "train") == [5, 6, 7]
    with pytest.raises(UserError, match=r"\(its meta.json says tokenizer gpt2, vocab_size 50257\)"):
        prepared(tmp_path)


@pytest.mark.parametrize("layout", ["rows", "litpkds"])
@pytest.mark.parametrize("spec", ["byte", "bpe"])
def test_rows_written_by_us_hold_the_stream_and_are_read_back(layout, spec, tmp_path, monkeypatch):
    if spec == "bpe":
        train_bpe(["the text number, héllo ☃\n 12345 67890"], 300).save(tmp_path)
        spec = str(tmp_path / "tokenizer.json")
    monkeypatch.setattr(formats, "ROWS", {"train": 5, "val": 2})
    monkeypatch.setattr(formats, "LITPKDS_ROWS", 3)
    text = [f"the text number {i}, héllo ☃\n" for i in range(200)]
    (tmp_path / "t.jsonl").write_text("".join(f'{{"text": "{t[:-1]}\\n"}}\n' for t in text), "utf-8")
    options = dict(tokenizer=spec, layout=layout, block_size=64)
    index = prepare(tmp_path / "t.jsonl", tmp_path / "out", **options)
    assert index["val"]["rule"] == "last:0.05" and index["eod"] is False
    tok = resolve_tokenizer(spec)
    for split, part in (("train", text[:190]), ("val", text[190:])):
        whole = np.concatenate(tok.encode_batch(part))
        rows = len(whole) // 65
        kept = whole[: rows * 65].tolist()
        assert stream(tmp_path / "out", split) == kept and index["splits"][split]["tokens"] == len(kept)
        want = len(tok.decode(kept).encode())
        assert abs(index["splits"][split]["bytes"] - want) <= 3  # a character cut in two at the end
        shards = index["splits"][split]["shards"]
        sizes = [s["tokens"] // 65 for s in shards]
        full = {"rows": {"train": 5, "val": 2}[split], "litpkds": 3}[layout]
        assert sum(sizes) == rows and set(sizes[:-1]) <= {full}
        digits = 10 if layout == "litpkds" else 5
        name = "train/train_slim" if split == "train" else "validation/validation"
        assert [s["file"] for s in shards] == [f"{name}_{n:0{digits}d}.bin" for n in range(len(shards))]
        if layout == "litpkds":  # each header is true, read here without our reader
            for shard in shards:
                data = (tmp_path / "out" / shard["file"]).read_bytes()
                assert struct.unpack("<7sQBQ", data[:24]) == (b"LITPKDS", 1, 8, shard["tokens"])
                assert len(data) == 24 + 2 * shard["tokens"]
    verify(tmp_path / "out")
    own = {s: stream(tmp_path / "out", s) for s in ("train", "val")}
    (tmp_path / "out" / "index.json").unlink()  # as if another program had written the files
    (tmp_path / "out" / "tokenizer.json").unlink()
    assert {s: stream(tmp_path / "out", s, spec) for s in ("train", "val")} == own
    found = foreign_index(tmp_path / "out", spec)
    assert found["layout"] == layout and found["splits"]["val"]["bytes_exact"]
    assert found["splits"]["val"]["bytes"] == len(tok.decode(own["val"]).encode().replace("\ufffd".encode(), b"")) or (
        abs(found["splits"]["val"]["bytes"] - index["splits"]["val"]["bytes"]) <= 3
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (litpkds([1, 2, 3])[:-2], r"has 28 bytes where its header says 30 \(3 tokens\)"),
        (litpkds([1, 2, 3])[:20], "ends inside its LITPKDS header"),
        (litpkds([1, 2, 3], code=4), r"holds int32 \(code 4\)"),
        (litpkds([1, 2, 3], version=2), "LITPKDS version 2, this muonlm reads 1"),
        (litpkds([1]), "too short: 1 tokens"),
        (litpkds([1, 300]), "holds the id 300, the tokenizer byte has 257"),
        (b"\x01\x00" * 65 + b"\x01", "has 131 bytes, an odd number"),
        (b"\x01\x00" * 64, "has 64 tokens, no whole number of rows"),
        (np.arange(1, 66, dtype="<u4").tobytes(), "every second id is 0, as in 32-bit ids"),
        (b"", "too short: 0 tokens"),
    ],
)
def test_a_bad_file_is_named_with_what_is_expected(data, message, folder):
    write(folder, [data], [litpkds([1, 2])])
    with pytest.raises(UserError, match=f"train_slim_0000000000.bin.*{message}.*validation.*uint16.*4097"):
        read_index(folder, "byte")


def test_an_id_beyond_the_vocabulary_between_the_places_looked_at_is_named_too(tmp_path):
    ids = np.full(1 << 20, 7, "<u2")
    ids[100_000] = 300
    ids.tofile(tmp_path / "train.bin")
    ids[:9].tofile(tmp_path / "val.bin")
    with pytest.raises(UserError, match="train.bin holds the id 300, the tokenizer byte has 257"):
        read_index(tmp_path, "byte")


def test_a_row_length_that_the_run_uses_is_accepted(folder):
    write(folder, [b"\x01\x00" * 64], [b"\x01\x00" * 32])
    assert read_index(folder, "byte", block_size=31)["splits"]["train"]["tokens"] == 64


def test_a_folder_without_one_of_the_splits_or_of_unknown_names_is_refused(tmp_path):
    np.arange(65, dtype="<u2").tofile(tmp_path / "part1.bin")
    with pytest.raises(UserError, match="holds .bin files of unknown names; expected: train_slim"):
        prepared(tmp_path, tokenizer="byte")
    np.arange(65, dtype="<u2").tofile(tmp_path / "train_1.bin")
    with pytest.raises(UserError, match=r"holds no validation\*.bin or val_\*.bin; expected"):
        prepared(tmp_path, tokenizer="byte")


def test_the_fingerprint_of_foreign_data_follows_its_content(folder):
    write(folder, [litpkds(list(range(100)))], [litpkds([1, 2])])
    one = foreign_index(folder, "byte")["fingerprint"]
    write(folder, [litpkds([*range(50), 7, *range(51, 100)])], [litpkds([1, 2])])
    assert foreign_index(folder, "byte")["fingerprint"] != one


def test_a_vocabulary_too_large_for_rows_is_refused(tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("some text " * 100)
    tok = resolve_tokenizer("byte")
    tok.dtype = np.dtype(np.uint32)
    monkeypatch.setattr("muonlm.data.prep.options.resolve_tokenizer", lambda *a, **k: tok)
    with pytest.raises(UserError, match="holds uint16 ids and this tokenizer has 257 tokens; use `layout` packed"):
        prepare(tmp_path / "t.txt", tmp_path / "out", tokenizer="byte", layout="rows", block_size=8)


def test_less_than_one_row_is_refused(tmp_path):
    (tmp_path / "t.txt").write_text("some text " * 100)
    with pytest.raises(UserError, match=r"less than one row of 4097 tokens.*`block_size` 256"):
        prepare(tmp_path / "t.txt", tmp_path / "out", tokenizer="byte", layout="litpkds")
    assert [p.name for p in tmp_path.iterdir()] == ["t.txt"]
