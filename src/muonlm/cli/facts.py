"""What `muonlm info` knows of recipes, presets, keys and configs, as JSON-able values; tables.py shows them.

Memory   fp32 masters 4 B and gradients 4 B a parameter; AdamW state 8 B, Muon's as its options make it (4 B, usually).
         Activations are not counted.
"""

import dataclasses
import json
import re
from pathlib import Path

from muonlm.config.recipes import RECIPES, USERS_FILE, load_recipe, read_recipe, recipe_names, user_presets
from muonlm.config.runs import read_config, runs_in
from muonlm.config.schema import Config, flatten
from muonlm.config.spelling import nearest
from muonlm.errors import UserError

from .parser import field_docs


def describe_keys() -> list[dict]:
    """[{key, default, help, advanced}] of every config key; advanced is what no recipe sets in any of its tables."""
    used = {key for name in recipe_names() for key in _keys_of(read_recipe(name))}
    rows = []
    for name, value in vars(Config()).items():
        if dataclasses.is_dataclass(value):
            docs = field_docs(type(value))
            rows += [(f"{name}.{leaf}", default, docs[leaf]) for leaf, default in vars(value).items()]
        else:
            rows.append((name, value, field_docs(Config)[name]))
    return [
        {"key": key, "default": json.dumps(default), "help": help, "advanced": key not in used}
        for key, default, help in rows
    ]


def _keys_of(recipe: dict) -> set[str]:
    """Dotted keys that a recipe sets, its presets, [smoke] and [baseline] included."""
    keys = set()
    for key in flatten(recipe):
        words = key.split(".")
        words = words[2:] if words[0] == "preset" else words
        words = words[1:] if words[0] in ("smoke", "baseline") else words
        keys.add(".".join(words))
    return keys


def describe_recipes() -> list[dict]:
    """What the header of each packaged recipe says: `# NAME · HARDWARE, TIME, … · ABOUT`; "about" is all of it."""
    return [_header(name) for name in recipe_names()]


def _header(name: str) -> dict:
    first = (RECIPES / f"{name}.toml").read_text(encoding="utf-8").splitlines()[0]
    _, *more, place, about = first.split(" · ")
    hardware, time, *_ = [*place.split(", "), ""]
    count = re.search(r"([\d,]+|[\d.]+M) parameters", about)
    what = re.sub(r"\s*\([^)]*\)|(, |: )[\d,.]+M? parameters( (un)?tied)?|, [\d,]+ untied", "", about)
    return {
        "recipe": name,
        "about": " · ".join([*more, place, about]),
        "what": re.split("[:;]", what)[0] + "".join(f" ({word})" for word in more),
        "parameters": count and _number(count[1]),
        "hardware": hardware,
        "time": "" if "not measured" in time else time,
    }


def _number(text: str) -> int:
    return round(float(text[:-1]) * 1e6) if text.endswith("M") else int(text.replace(",", ""))


def describe_presets(recipe: str | None = None) -> list[dict]:
    """Presets by recipe, of one recipe or of all, with what each sets; the user's own of this folder come first."""
    names = [recipe] if recipe else recipe_names()
    packaged = [(name, preset) for name in names for preset in read_recipe(name).get("preset", {}).items()]
    mine = [(USERS_FILE, preset) for preset in user_presets().items()]
    return [{"recipe": name, "preset": key, "sets": flatten(table)} for name, (key, table) in mine + packaged]


def find(what: str, flags: dict, *, preset: str = "", smoke: bool = False) -> Config:
    """The config of a recipe, a .toml file or a run directory."""
    if (path := Path(what)).is_dir():
        if not (path / "config.json").is_file():
            inside = runs_in(path)
            hint = f"Did you mean {inside[-1]!r}?" if inside else "`muonlm train` makes runs, `muonlm prep` makes data."
            raise UserError(f"{what} is neither a run (no config.json in it) nor prepared data (no index.json). {hint}")
        if flags or preset or smoke:
            raise UserError(f"{what} is a run, whose settings are what they were; name a recipe to try others.")
        return read_config(path)
    try:
        return load_recipe(what, flags, preset=preset, smoke=smoke, needs_parent=False)
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


def anywhere(cfg: Config) -> Config:
    """A run's config without what only the machine that trained it may have: device and compiled scan."""
    model, train = dataclasses.replace(cfg.model, scan="auto"), dataclasses.replace(cfg.train, device="auto")
    return dataclasses.replace(cfg, model=model, train=train)


def vocabulary(cfg: Config) -> tuple[int, str]:
    """(size, where it comes from) before any text is read."""
    if cfg.model.vocab_size:
        return cfg.model.vocab_size, "model.vocab_size"
    from muonlm.data.open import vocabulary as of_data

    return of_data(cfg)


def describe(cfg: Config) -> dict:
    """Facts of a config as one JSON-able dict."""
    from muonlm.model import build_model, count_parameters, describe_layers, train_flops_per_token
    from muonlm.optim.state import state_bytes
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
    plan = plan_routes(cfg, model)
    optimizer = make_optimizer(cfg, plan)
    routes = plan.to_dict(optimizer.param_groups)
    if any(routes["shares"].values()):
        facts["routing"] = plan.table(optimizer.param_groups)
        facts["routing_by_kind"] = _kinds(routes["tensors"])
    facts["shares"] = {who: routes[f"{who.lower()}_params"] / counts["total"] for who in routes["shares"]}
    facts["muon_share"] = facts["shares"].get("Muon", 0.0)
    facts["memory_bytes"] = {
        "parameters": 4 * counts["total"],
        "gradients": 4 * counts["total"],
        "optimizer_state": state_bytes(optimizer),
    }
    return facts


def _kinds(tensors: list[dict]) -> list[dict]:
    """Tensors that differ in their numbers alone (of the layer, say) as one row."""
    kinds: dict[tuple, dict] = {}
    for tensor in tensors:
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", tensor["name"])
        key = (name, tuple(tensor["shape"]), tensor["by"], tensor.get("lr"))
        row = kinds.setdefault(key, {"tensors": 0, "values": 0, "update_rms": []})
        row["tensors"] += 1
        row["values"] += tensor["numel"]
        row["update_rms"] += [block["update_rms"] for block in tensor.get("blocks", ())]
    return [
        {"kind": name, "shape": list(shape), "by": by, "route": by.lower(), "lr": lr, **row}
        | {"update_rms": [min(row["update_rms"]), max(row["update_rms"])] if row["update_rms"] else None}
        for (name, shape, by, lr), row in kinds.items()
    ]
