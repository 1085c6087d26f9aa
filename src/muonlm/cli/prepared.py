"""What `muonlm info` says of a folder of prepared data: what it holds, every file of it compared with its hash."""

from pathlib import Path

from muonlm.errors import UserError

SHOWN = 8  # sources that are listed in text
READING = ("data.tokenizer", "model.block_size")  # flags that say how data of another program is read


def is_data(what: str) -> bool:
    """Whether this is a folder of prepared data, ours or another program's, whole or damaged."""
    path = Path(what)
    if not path.is_dir():
        return False
    from muonlm.data.prep.formats import is_foreign
    from muonlm.data.prep.index import is_ours

    own = is_ours(path) or (path / "index.json").is_file()
    return own or (is_foreign(path) and not (path / "config.json").is_file())


def describe(folder: str, flags: dict) -> dict:
    """Facts of a folder of prepared data, JSON-able. A UserError names the first file that was altered.

    "files": how many were compared with what the index records; None for another program's, which records nothing.
    """
    from muonlm.data.prep.index import hashed_files, read_index, verify
    from muonlm.data.text.tokenizer import Tokenizer

    path, width = Path(folder), flags.get("model.block_size", "0")
    if not width.isdigit():
        raise UserError(f"--model.block_size {width!r} is the row length - 1, a whole number such as 4096.")
    index = read_index(path, flags.get("data.tokenizer", ""), block_size=int(width))
    foreign = "foreign" in index
    if strange := [key for key in flags if not (foreign and key in READING)]:
        what = "takes only --data.tokenizer and --model.block_size" if foreign else "is what it was made to be"
        raise UserError(f"{folder} is prepared data, which {what}; leave out --{strange[0]}.")
    facts = {"data": folder, "kind": "text", "layout": index["layout"], "made": index.get("created")}
    if index["layout"] == "examples":
        facts["kind"] = {"sft": "conversations"}.get(index["kind"], index["kind"])
    counts = ("examples", "documents", "tokens", "targets", "bytes", "bytes_exact")
    if foreign:
        counts = counts[2:]
    facts["splits"] = {name: {c: s[c] for c in counts if c in s} for name, s in index["splits"].items()}
    facts["tokenizer"] = index["tokenizer"]
    facts["template"] = index["template"]["name"] if "template" in index else None
    facts["separator"] = None
    if index.get("eod"):
        tok = Tokenizer.load(path)
        facts["separator"] = next(name for name, i in tok.special.items() if i == tok.eot_id)
    facts["val"], facts["mixture"] = index["val"], index.get("mixture", [])
    facts["sources"] = index.get("sources", [])
    facts["files"] = None
    if not foreign:
        verify(path)
        facts["files"] = len(hashed_files(index)) + 2 + ("template" in index)  # the index and the tokenizer, too
    return facts


def rows(facts: dict) -> tuple[str, list[tuple[str, str]]]:
    """The facts as a title and (label, text)."""
    own, tok, sources = facts["files"] is not None, facts["tokenizer"], facts["sources"]
    table = []
    for name, split in facts["splits"].items():
        about = "" if split.get("bytes_exact", True) else " (about)"
        table.append((name, ", ".join(f"{n:,} {c}" for c, n in split.items() if c != "bytes_exact") + about))
    table.append(("tokenizer", f"{tok['kind']}, vocabulary {tok['vocab_size']:,}"))
    if facts["template"]:
        table.append(("template", facts["template"]))
    elif own:
        table.append(("separator", f"{facts['separator']} before each document" if facts["separator"] else "none"))
    if own:
        empty = "; as it would leave a split empty: the end of the data" if facts["val"]["fallback"] else ""
        table.append(("held out", facts["val"]["rule"] + empty))
    for part in facts["mixture"]:
        table.append(("mixture", f"{part['share']:.1%} {part['source']} (weight {part['weight']:g})"))
    for source in sources[:SHOWN]:
        size = f", {source['bytes']:,} bytes" if source.get("bytes") else ""
        table.append(("source", f"{source['path']} ({source['split']}{size})"))
    if len(sources) > SHOWN:
        table.append(("", f"and {len(sources) - SHOWN:,} more; --json lists all"))
    table += [("", line) for line in dict.fromkeys(s["licence"] for s in sources if s.get("licence"))]
    checked = f"all {facts['files']} files as recorded" if own else "no hashes are recorded: nothing can be compared"
    table.append(("files", checked))
    made = f"made {facts['made']}" if own else "made by another program"
    return f"{facts['data']}: {facts['kind']}, layout {facts['layout']}, {made}", table
