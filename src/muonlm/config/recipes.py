"""Recipes, presets, and THE order of the layers that a config is made of.

    defaults ← recipe ← preset ← [baseline], if another than Muon trains ← [smoke] ← the run that it starts from ← flags
    the run's own config ← flags                                                            of a run that is resumed

A layer wins over those before it, key by key. Where one thing can be said in several ways, a layer that says it in
one of them replaces all (REPLACES). Each layer is checked by itself, and a message names the one with the mistake.

recipe     a TOML file, packaged or the user's own, laid over the one that it `extends`
preset     [preset.NAME] of the recipe, or [presets.NAME] in muonlm.toml of the current folder, which comes first
baseline   what stands in [baseline] of recipe and preset: settings for AdamW, and what takes rates like its own
smoke      --smoke: SMOKE, and what the recipe's [smoke] says
start      --init-from RUN: weights of RUN's best checkpoint (or of the checkpoint named), step 0, a new schedule;
           model, tokenizer and, unless the recipe names one, conversation template are RUN's too
           init_from = "RUN" in a recipe: the same; a relative path begins where the command is given
           parent = "RECIPE" in a recipe: the newest finished run of that recipe, beside --out, else under runs/
           --init-from none: fresh weights all the same

Raises     UserError: unknown recipe, preset or key, a file that is not TOML, a parent without a run
"""

import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from muonlm.errors import UserError
from muonlm.lazy import load

from .runs import locate, newest_run, read_config
from .schema import Config, OptimConfig, check, flatten, of_keys
from .spelling import nearest

RECIPES = Path(__file__).parents[1] / "recipes"
USERS_FILE = "muonlm.toml"
NONE = "none"
SMOKE = {  # tiny, on a CPU, under a minute, all artefacts written
    "shrunk": True,
    "model.n_layer": 2,
    "model.d_model": 64,
    "model.n_head": 2,
    "model.n_kv_head": 0,
    "model.d_ff": 0,
    "model.block_size": 64,
    "model.window": 32,
    "model.vocab_size": 0,
    "train.steps": 30,
    "train.global_batch": 512,
    "train.micro_batch": 0,
    "train.save_every": 10,
    "train.dtype": "float32",
    "train.device": "cpu",
    "eval.every": 10,
    "eval.iters": 4,
    "eval.sample": 40,
    "eval.target": 0,
    "log.every": 5,
    "data.tokenizer": "byte",
    "sched.warmup": 1,
    "muon.momentum_warmup": "0.85:0.95:10",
}
TRIAL_TEXT = "sotu"  # of a recipe that brings no text
LENGTHS = ("train.steps", "train.epochs", "train.tokens", "train.budget")
REPLACES = (  # a layer that gives one of the first replaces what those before it gave for any of the second
    (LENGTHS, LENGTHS),
    (("train.global_batch", "train.accum", "train.budget"), ("train.global_batch", "train.accum")),
    (("data.source",), ("data.name",)),  # the configuration of a data set is of that one
)
FIXED = (  # what a run keeps when it is resumed
    *("model.", "data.", "dpo.", "seed", "parent", "init_from", "shrunk", "optim.name"),
    *("train.objective", "train.global_batch", "train.accum", "train.dtype"),
)


@dataclass(frozen=True)
class Layer:
    """Settings {dotted key: value} that stand in one place, which a message names."""

    place: str
    values: dict[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", check(flatten(self.values), self.place))


def combine(*layers: Layer) -> dict[str, Any]:
    """{dotted key: value} of layers, of which the last one wins."""
    values: dict[str, Any] = {}
    for layer in layers:
        for ways, replaced in REPLACES:
            if any(layer.values.get(key) for key in ways):
                values = {key: value for key, value in values.items() if key not in replaced}
        values |= layer.values
    return values


def load_recipe(
    name: str = "quickstart",
    flags: dict[str, Any] | None = None,
    *,
    preset: str = "",
    smoke: bool = False,
    out: str | Path | None = None,
    needs_parent: bool = True,
) -> Config:
    """Config of a recipe. `flags` maps dotted keys to values.

    out            the directory that the run will have: a parent's run is looked for beside it, too
    needs_parent   refuse a stage whose parent has no run yet, instead of taking the model of its own recipe
    """
    tree = read_recipe(name)
    tables = {table: tree.pop(table, {}) for table in ("preset", "baseline", "smoke")}
    given = Layer("command line", flags or {})
    tuned, tuned_baseline = preset_layers(name, preset) if preset else (Layer("", {}), Layer("", {}))

    layers = [Layer(f"recipe {name}", tree | {"recipe": name}), tuned]
    baseline = [Layer(f"recipe {name} [baseline]", tables["baseline"]), tuned_baseline]
    if takes_baseline(combine(*layers, given).get("optim.name", OptimConfig().name)):
        layers += baseline
    own_smoke = Layer(f"recipe {name} [smoke]", tables["smoke"])
    if smoke:
        layers += [Layer("--smoke", SMOKE), own_smoke]
        if not combine(*layers, given).get("data.source"):
            layers += [Layer("--smoke", {"data.source": TRIAL_TEXT})]
    start = start_layer(combine(*layers, given), out, smoke=smoke, needs_parent=needs_parent and not smoke)
    layers += [start, given]
    return of_keys(combine(*layers) | {"init_from": start.values["init_from"]})


def resume(run: str | Path, flags: dict[str, Any]) -> Config:
    """The config of a run that goes on. Raises UserError for a flag that would make it another run."""
    stored = flatten(asdict(read_config(run)))
    merged = combine(Layer(f"run {run}", stored), Layer("command line", flags))
    found = flatten(asdict(of_keys(merged)))
    for key in flags:
        if found[key] != stored[key] and key.startswith(FIXED):
            raise UserError(
                f"{key} = {stored[key]!r} in run {run} and cannot become {found[key]!r} in the middle; "
                f"start a new run from its weights with --init-from {run}, or leave the flag out."
            )
    return of_keys(merged | {key: value for key, value in stored.items() if key.startswith(FIXED)})


# --- recipes and presets ----------------------------------------------------------------------------------------------


def recipe_names() -> list[str]:
    return sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.toml"))


def read_recipe(name: str, seen: tuple[str, ...] = ()) -> dict:
    """The TOML tree of a packaged recipe or of the user's own file, laid over the one that it `extends`."""
    path = RECIPES / f"{name}.toml" if name in recipe_names() else Path(name)
    if not path.is_file():
        if path.suffix == ".toml":
            raise UserError(f"recipe file {name!r} does not exist (looked in {Path.cwd()}).")
        raise UserError(f"unknown recipe {name!r}.{_similar(name)}")
    tree = _read_toml(path)
    if parent := tree.pop("extends", ""):
        if name in seen:
            raise UserError(f"recipes extend each other in a circle: {' → '.join([*seen, name])}.")
        tree = _merge(read_recipe(parent, (*seen, name)), tree)
    return tree


def _similar(name: str) -> str:
    """Which recipes may be meant by a name that is none."""
    known = recipe_names()
    if family := [other for other in known if other.startswith(name + "/")]:
        return f" Members of that family: {', '.join(family)}."
    if same := [other for other in known if other.rpartition("/")[2] == name]:
        return f" Did you mean {' or '.join(map(repr, same))}?"
    return nearest(name, known) or f" Known: {', '.join(known)}; or give the path of a .toml file."


def _merge(base: dict, over: dict) -> dict:
    return base | {
        key: _merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in over.items()
    }


def _read_toml(path: Path) -> dict:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None


def presets(recipe: str) -> dict[str, tuple[str, dict]]:
    """Name -> (place, settings) of every preset for a recipe: its own, and before those the user's."""
    own = {
        name: (f"recipe {recipe} [preset.{name}]", table)
        for name, table in read_recipe(recipe).get("preset", {}).items()
    }
    return own | {name: (f"{USERS_FILE} [presets.{name}]", table) for name, table in user_presets().items()}


def user_presets() -> dict[str, dict]:
    """[presets.NAME] of muonlm.toml in the current folder; {} without such a file."""
    path = Path(USERS_FILE)
    tree = _read_toml(path) if path.is_file() else {}
    for section in tree:
        if section != "presets":
            raise UserError(f"{path} has {section!r}, but knows only [presets.NAME].{nearest(section, ['presets'])}")
    tables = tree.get("presets", {})
    for name, table in tables.items() if isinstance(tables, dict) else [("presets", tables)]:
        if not isinstance(table, dict):
            raise UserError(
                f"{path}: {name!r} is no table of settings; write [presets.NAME] and the settings below it."
            )
    return tables


def takes_baseline(optimizer: str) -> bool:
    return load("muonlm.optim:OPTIMIZERS")[optimizer].baseline


def preset_layers(recipe: str, name: str) -> tuple[Layer, Layer]:
    """(settings, [baseline]) of a preset. One that chooses AdamW speaks of it also outside of its [baseline]."""
    known = presets(recipe)
    if name not in known:
        others = f" Known: {', '.join(known)}." if known else " This recipe has none."
        raise UserError(f"recipe {recipe} has no preset {name!r}.{nearest(name, known)}{others}")
    place, table = known[name]
    baseline = Layer(f"{place} baseline", table.get("baseline", {}))
    settings = Layer(place, {key: value for key, value in table.items() if key != "baseline"})
    for key in ("recipe", "parent", "init_from"):
        if key in settings.values:
            raise UserError(f"{place}: {key} cannot be set by a preset; it belongs into a recipe, or is a flag.")
    if takes_baseline(settings.values.get("optim.name", OptimConfig().name)):
        own = {key: value for key, value in settings.values.items() if key.startswith(("optim.", "muon."))}
        baseline = Layer(baseline.place, own | baseline.values)
    return settings, baseline


# --- where a run starts from ------------------------------------------------------------------------------------------


def start_layer(so_far: dict[str, Any], out: str | Path | None, *, smoke: bool, needs_parent: bool) -> Layer:
    """What the run hands down from whose weights this one starts; `init_from` is its checkpoint, or empty."""
    source, parent = so_far.get("init_from", ""), so_far.get("parent", "")
    if not source and parent:
        found = newest_run(parent, out, shrunk=smoke)
        if found is None and needs_parent:
            raise UserError(
                f"recipe {so_far['recipe']} starts from a run of {parent}, and no finished one lies under runs/"
                + (f" or beside {out}" if out else "")
                + f". Make it: muonlm train {parent}; or name a run: --init-from RUN; or start from fresh weights: "
                f"--init-from {NONE}"
            )
        source = str(found or "")
    if source in ("", NONE):
        return Layer("fresh weights", {"init_from": ""})
    run, path = locate(source)
    stored = read_config(run)
    tokenizer = run / "tokenizer.json"
    if not tokenizer.is_file():
        raise UserError(f"run {run} has no tokenizer.json, so no text can be trained on from it; name another run.")
    handed = {
        "init_from": str(path.resolve()),
        "model": asdict(stored.model),
        "data.tokenizer": str(tokenizer.resolve()),
        "data.special": "",  # the weights have no rows for more tokens; a template's stop falls back to EOT
    }
    if not so_far.get("data.template"):
        handed["data.template"] = stored.data.template
    return Layer(f"run {run}", handed)
