"""What a config means, without training: parameters, FLOPs, memory, routing, derived values; and the help of every key.
What a folder of prepared data holds, every file of it compared with its hash.

Rates    the same update under another lr mode, or under AdamW: `rates`, for --convert-lr.
Memory   fp32 masters 4 B and gradients 4 B a parameter; AdamW state 8 B, Muon's as its options make it (4 B, usually). Activations are not counted.
"""

import dataclasses
import json
import math
import re
from pathlib import Path

from muonlm.config import schema as config
from muonlm.config.presets import user_presets
from muonlm.config.schema import Config, load_recipe, nearest, recipe_names
from muonlm.errors import UserError

from .parser import field_docs

SHOWN = 8  # sources that are listed in text
READING = ("data.tokenizer", "model.block_size")  # flags that say how data of another program is read


def describe_keys() -> list[dict]:
    """[{key, default, type, help}] of every config key; the help is the string under the field."""
    table = []
    for name, value in vars(Config()).items():
        if dataclasses.is_dataclass(value):
            docs = field_docs(type(value))
            table += [
                {"key": f"{name}.{leaf}", "default": json.dumps(default), "help": docs[leaf]}
                for leaf, default in vars(value).items()
            ]
        else:
            table.append({"key": name, "default": json.dumps(value), "help": field_docs(Config)[name]})
    return table


def describe_recipes() -> list[dict]:
    """Each packaged recipe with the first line of its header."""
    table = []
    for name in recipe_names():
        first = (config.RECIPES / f"{name}.toml").read_text(encoding="utf-8").splitlines()[0]
        table.append({"recipe": name, "about": first.lstrip("# ").removeprefix(f"{name} · ")})
    return table


def describe_presets(recipe: str | None = None) -> list[dict]:
    """Presets by recipe, of one recipe or of all, with what each sets; the user's own of this folder come first."""
    names = [recipe] if recipe else recipe_names()
    packaged = [(name, preset) for name in names for preset in config.read_recipe(name).get("preset", {}).items()]
    mine = [("muonlm.toml", preset) for preset in user_presets(recipe=recipe or "").items()]
    return [{"recipe": name, "preset": key, "sets": config.flatten(table)} for name, (key, table) in mine + packaged]


def find(what: str, flags: dict, *, preset: str = "", smoke: bool = False) -> Config:
    """The config of a recipe, a .toml file or a run directory."""
    if (path := Path(what)).is_dir():
        from muonlm.training.checkpoint import (  # brings torch, which the list of recipes need not wait for
            read_config,
            runs_in,
        )

        if not (path / "config.json").is_file():
            inside = runs_in(path)
            hint = f"Did you mean {inside[-1]!r}?" if inside else "`muonlm train` makes runs, `muonlm prep` makes data."
            raise UserError(f"{what} is neither a run (no config.json in it) nor prepared data (no index.json). {hint}")
        if flags or preset or smoke:
            raise UserError(f"{what} is a run, whose settings are what they were; name a recipe to try others.")
        return read_config(path)
    try:
        return load_recipe(
            what, flags, preset=preset, smoke=smoke, presets=user_presets(recipe=what) if preset else None
        )
    except UserError as error:
        if (
            "unknown recipe" in str(error)
            and ("/" in what or what.startswith("."))
            and not nearest(what, recipe_names())
        ):
            raise UserError(
                f"{what!r} is neither a recipe nor a run directory. `muonlm info` lists the recipes."
            ) from None
        raise


def vocabulary(cfg: Config) -> tuple[int, str]:
    """(size, where it comes from) before any text is read."""
    if cfg.model.vocab_size:
        return cfg.model.vocab_size, "model.vocab_size"
    from muonlm.data.open import vocabulary as of_data

    return of_data(cfg)


def describe(cfg: Config) -> dict:
    """Facts of a config as one JSON-able dict."""
    from muonlm.model import build_model, count_parameters, describe_layers, train_flops_per_token
    from muonlm.training.resolve import check, rows_per_step
    from muonlm.training.setup import make_optimizer, plan_routes

    check(cfg)
    size, source = vocabulary(cfg)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=size))
    counts = count_parameters(cfg.model)
    facts = {
        "recipe": cfg.recipe,
        "vocab_size": size,
        "vocab_source": source,
        "parameters": counts,
        "layers": describe_layers(cfg.model),
        "train_flops_per_token": train_flops_per_token(cfg.model),
        "rows_per_step": rows_per_step(cfg, 1),
    }
    facts["tokens_per_step"] = facts["rows_per_step"] * cfg.model.block_size
    facts["steps"] = cfg.train.fixed_steps(facts["tokens_per_step"]) or f"{cfg.train.epochs:g} epochs of the data"
    model = build_model(cfg.model, "meta")
    muon, state = 0, 8 * counts["total"]
    if cfg.optim.name == "muon":
        plan = plan_routes(cfg, model)
        muon = plan.counts()["muon"]
        optimizer = make_optimizer(cfg, plan)
        facts["routing"] = plan.table(optimizer.param_groups)
        matrices = [
            (p, split, g) for g in optimizer.param_groups if g["use_muon"] for p, split in zip(g["params"], g["splits"])
        ]
        layouts = [optimizer.state_layout(*matrix) for matrix in matrices]
        state = sum(math.prod(shape) * dtype.itemsize for layout in layouts for shape, dtype in layout.values())
        state += 8 * (counts["total"] - sum(p.numel() for p, *_ in matrices))
    facts["muon_share"] = muon / counts["total"]
    facts["memory_bytes"] = {
        "parameters": 4 * counts["total"],
        "gradients": 4 * counts["total"],
        "optimizer_state": state,
    }
    return facts


def as_text(facts: dict) -> str:
    p, memory = facts["parameters"], facts["memory_bytes"]
    lines = [
        f"{facts['recipe']}: {p['total']:,} parameters ({p['tied']:,} tied, {p['untied']:,} untied, {p['without_embeddings']:,} without embeddings)",
        f"vocabulary     {facts['vocab_size']:,} ({facts['vocab_source']})",
        f"step           {facts['rows_per_step']:,} rows = {facts['tokens_per_step']:,} tokens; {facts['steps']} steps",
        f"compute        {facts['train_flops_per_token'] / 1e6:,.1f} MFLOP per token, forward and backward",
        f"memory         {sum(memory.values()) / 2**20:,.0f} MiB: "
        + ", ".join(f"{k.replace('_', ' ')} {v / 2**20:,.0f}" for k, v in memory.items())
        + "; activations come on top",
        f"Muon share     {facts['muon_share']:.1%} of the parameters",
    ]
    for i, layer in enumerate(facts["layers"]):
        writes = f", write gain {layer['write_gain']:.4f}" if "write_gain" in layer else ""
        lines.append(f"layer {i:<8} {layer['mixer']}, {layer['parameters']:,} parameters{writes}")
    return "\n".join(lines + ([""] + [facts["routing"]] if "routing" in facts else []))


def is_data(what: str) -> bool:
    """Whether this is a folder of prepared data, ours or another program's, whole or damaged."""
    path = Path(what)
    if not path.is_dir():
        return False
    from muonlm.data.prep.formats import is_foreign
    from muonlm.data.prep.index import is_ours

    own = is_ours(path) or (path / "index.json").is_file()
    return own or (is_foreign(path) and not (path / "config.json").is_file())


def describe_data(folder: str, flags: dict) -> dict:
    """Facts of a folder of prepared data as one JSON-able dict. A UserError names the first file that was altered.

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


def data_as_text(facts: dict) -> str:
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
    first = f"{facts['data']}: {facts['kind']}, layout {facts['layout']}, {made}"
    return "\n".join([first] + [f"{label:<14} {text}" for label, text in table])


def rates(lr: str, wd: str | None, from_mode: str | None, to_mode: str | None, shape: str | None) -> dict:
    """--convert-lr: the words as typed -> the same update in another lr mode, for one shape or for those of a d_model of 768."""
    from muonlm.optim.rates import MODES, convert_lr

    usage = "muonlm info --convert-lr 0.02 --from original --to match_rms_adamw --shape 768x768 --wd 0.05"
    if not (from_mode and to_mode):
        raise UserError(f"--convert-lr needs --from and --to, each one of {', '.join(MODES)}; as in: {usage}")
    numbers = []
    for flag, text in (("--convert-lr", lr), ("--wd", wd or "0")):
        try:
            numbers.append(float(text))
        except ValueError:
            numbers.append(math.nan)
        if not 0.0 <= numbers[-1] < math.inf:
            raise UserError(f"{flag} {text!r} is not a number >= 0; as in: {usage}")
    if shape and not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape):
        raise UserError(f"--shape {shape!r} is not rows x columns, as nn.Linear stores them; as in: {usage}")
    shapes = [tuple(map(int, shape.split("x")))] if shape else [(768, 768), (3072, 768), (768, 3072)]
    table = []
    for one in shapes:
        new_lr, new_wd = convert_lr(*numbers, one, from_mode, to_mode)
        as_adamw, _ = convert_lr(numbers[0], 0.0, one, from_mode, "adamw")
        table.append({"shape": list(one), "lr": new_lr, "wd": wd and new_wd, "update_rms": 0.2 * as_adamw})
    return {"from": {"mode": from_mode, "lr": numbers[0], "wd": wd and numbers[1]}, "to": to_mode, "conversions": table}


def rates_as_text(facts: dict) -> str:
    old, to, table = facts["from"], facts["to"], facts["conversions"]
    if len(table) == 1:
        one, size = table[0], "x".join(map(str, table[0]["shape"]))
        before, after = (
            f"lr {r['lr']:.6g}" + (f" with wd {r['wd']:.6g}" if r["wd"] is not None else "") for r in (old, one)
        )
        decay = "; add --wd if you use weight decay: it must be divided by what lr is multiplied by."
        if old["wd"] is not None:
            decay = f" and shrink them by lr x wd = {old['lr'] * old['wd']:.3g}."
        return (
            f"{before} under {old['mode']}  =  {after} under {to}, for a matrix of {size}.\n"
            f"Both move its entries by {one['update_rms']:.3g} (RMS) a step{decay}"
        )
    keys = ["lr", "update_rms"] if old["wd"] is None else ["lr", "wd", "update_rms"]
    lines = [f"under {old['mode']}: " + ", ".join(f"{k} {old[k]:.6g}" for k in keys[:-1]), f"under {to}:"]
    lines += ["  matrix    " + "".join(f"{k.replace('_rms', ' RMS'):>14}" for k in keys)]
    lines += [f"  {'x'.join(map(str, r['shape'])):10}" + "".join(f"{r[k]:14.6g}" for k in keys) for r in table]
    if len({f"{r['lr']:.6g}" for r in table}) > 1:
        lines.append(
            "The rate depends on the shape: one for all is exact for one only. --shape ROWSxCOLUMNS asks for yours."
        )
    return "\n".join(lines)
