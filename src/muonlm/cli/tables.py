"""The tables of `muonlm info`: as wide as the terminal; where nobody looks (a pipe, a file) each row is one line."""

import sys

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

WIDE = 2000  # columns in a pipe


def show(*parts: RenderableType) -> None:
    """Print tables and texts; through `print`, since rich exits by itself when a reader goes away."""
    width = None if sys.stdout.isatty() else WIDE
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def table(*columns: str, right: tuple[str, ...] = (), whole: tuple[str, ...] = ()) -> Table:
    """A table with these headings; of `right` ones the cells end, and `whole` ones are never broken."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", no_wrap=name in whole, overflow="fold")
    return made


def facts(title: str, rows: list[tuple[str, str]]) -> list[RenderableType]:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, min_width=13)
    grid.add_column(overflow="fold")
    for row in rows:
        grid.add_row(*row)
    return [Text(title, style="bold"), grid]


def recipes(found: list[dict]) -> list[RenderableType]:
    """By family; in a pipe with whole names, for grep."""
    piped = not sys.stdout.isatty()
    columns = ("recipe", "what it is", "params", "on", "time")
    made, family = table(*columns, right=("params",), whole=("recipe", "params", "on", "time")), ""
    for recipe in sorted(found, key=lambda row: "/" in row["recipe"]):  # those of no family first
        group, _, name = recipe["recipe"].rpartition("/")
        if group != family and not piped:
            made.add_section()
            made.add_row(Text(group + "/", style="bold"))
        family = group
        name = recipe["recipe"] if piped else f"  {name}" if group else name
        hardware = recipe["hardware"].removeprefix("a ").replace(" CPU cores", " CPUs")
        time = recipe["time"].removesuffix(" of training").replace(" minutes", " min")
        made.add_row(name, recipe["what"], short(recipe["parameters"]), hardware, time or "–")
    if piped:
        return [made]
    return [made, "\nmuonlm info FAMILY/NAME says more, muonlm train FAMILY/NAME trains. –: not measured by us"]


def short(count: int | None) -> str:
    if count is None:
        return ""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.{3 - len(str(int(count / size)))}f}{letter}"
    return str(count)


def keys(found: list[dict]) -> list[RenderableType]:
    made, section = table("key", "meaning (default)", whole=("key",)), None
    for row in found:
        here = row["key"].rpartition(".")[0]
        if section not in (None, here):
            made.add_section()
        section = here
        default = "" if row["default"] == '""' else f" ({row['default']})"
        made.add_row(f"--{row['key']}{' *' * row['advanced']}", row["help"] + default)
    return [made, "\n* advanced: no recipe sets it"]


def presets(found: list[dict]) -> list[RenderableType]:
    """By recipe; in a pipe one a line."""
    if not sys.stdout.isatty():
        made = table("recipe", "preset", "sets")
        for row in found:
            made.add_row(row["recipe"], f"--preset {row['preset']}", settings(row["sets"]))
        return [made]
    parts, width = [], max((len(row["preset"]) for row in found), default=0)
    for recipe in dict.fromkeys(row["recipe"] for row in found):
        mine = [
            (f"--preset {row['preset']:{width}}", settings(row["sets"])) for row in found if row["recipe"] == recipe
        ]
        parts += ["", *facts(recipe, mine)]
    return parts[1:]


def settings(sets: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in sets.items())


def config(found: dict, asked: str) -> list[RenderableType]:
    """Facts, and who trains which kind of tensor. asked: the words after `muonlm info`."""
    shown = facts(heading(found, asked), config_rows(found))
    if "routing_by_kind" not in found:
        return shown
    made = table(
        *("tensors", "shape", "×", "values", "by", "lr", "update"),
        right=("×", "values", "lr", "update"),
        whole=("shape", "×", "values", "by", "lr", "update"),
    )
    for row in found["routing_by_kind"]:
        shape = "x".join(map(str, row["shape"]))
        rate = "" if row["lr"] is None else f"{row['lr']:.4g}"
        rms = "–".join(dict.fromkeys(f"{rms:.1e}" for rms in row["update_rms"] or ()))
        made.add_row(row["kind"], shape, str(row["tensors"]), short(row["values"]), row["by"], rate, rms)
    more = f"Every tensor, and why: muonlm info {asked} --routing"
    predicted = any(row["update_rms"] for row in found["routing_by_kind"])
    return [*shown, "", made, "\n" + "update: RMS that is predicted for a step of Muon. " * predicted + more]


def every_tensor(found: dict, asked: str) -> list[RenderableType]:
    routing = found.get("routing", "AdamW trains every tensor.")
    return [*facts(heading(found, asked), config_rows(found)), "\n" + routing]


def heading(found: dict, asked: str) -> str:
    return asked if asked.startswith(found["recipe"]) else f"{asked}: {found['recipe']}"


def config_rows(found: dict) -> list[tuple[str, str]]:
    p, memory = found["parameters"], found["memory_bytes"]
    parts = ", ".join(f"{name.replace('_', ' ')} {size / 2**20:,.0f}" for name, size in memory.items())
    counts = f"{p['tied']:,} tied, {p['untied']:,} untied, {p['without_embeddings']:,} without embeddings"
    steps = found["steps"] if isinstance(found["steps"], str) else f"{found['steps']:,} steps"
    rows = [
        ("parameters", f"{p['total']:,} ({counts})"),
        ("vocabulary", f"{found['vocab_size']:,} ({found['vocab_source']})"),
        ("step", f"{found['rows_per_step']:,} rows = {found['tokens_per_step']:,} tokens; {steps}"),
        ("compute", f"{found['train_flops_per_token'] / 1e6:,.1f} MFLOP per token, forward and backward"),
        ("memory", f"{sum(memory.values()) / 2**20:,.0f} MiB: {parts}; activations come on top"),
        *((f"{who} share", f"{share:.1%} of the parameters") for who, share in found["shares"].items()),
    ]
    layers = [tuple(layer.items()) for layer in found["layers"]]
    for kind in dict.fromkeys(layers):
        layer, number = dict(kind), layers.count(kind)
        writes = f", write gain {layer['write_gain']:.4f}" if "write_gain" in layer else ""
        each = " each" if number > 1 else ""
        label = "layers" if kind == layers[0] else ""
        rows.append((label, f"{number} × {layer['mixer']}, {layer['parameters']:,} parameters{each}{writes}"))
    return rows
