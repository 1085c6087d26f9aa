"""Presets of one's own: [presets.NAME] in muonlm.toml of the current folder, for `muonlm train RECIPE --preset NAME`.

    [presets.muon_custom]
    learning_rate = 2.5e-3          # published names, or ours: optim.lr = 2.5e-3, [presets.muon_custom.optim] lr = …
    max_steps = 80_000

A preset becomes a layer of the config like the recipes' own (schema.py); one of the same name comes before theirs.
What the published names mean here:
    learning_rate     the rate of the optimizer that trains: Muon's matrices (optim.lr; what AdamW takes beside them
                      keeps the recipe's adamw_lr), or under optim.name = adamw every parameter
    weight_decay      of all matrices, whoever moves them: optim.wd and muon.adamw_wd
    momentum          Muon's, constant from the first step; refused under AdamW, whose momentum is adam_beta1
    adam_beta1, 2     one given alone leaves the other as the recipe has it
    max_grad_norm     of clip_mode = clip; 0 turns clipping off
    label_smoothing   must be 0: next-token training has none, and DPO's is dpo.label_smoothing
Every key changes the run or is refused; `in_effect` says what came of each once flags and --smoke have had their word.

Raises   UserError: a file that is not TOML, anything but [presets.NAME] in it, an unknown key, one thing said twice.
"""

import tomllib
from dataclasses import asdict
from pathlib import Path

from muonlm.errors import UserError

from .recipes import LENGTHS, SIZES, read_recipe
from .schema import Config, MuonConfig, OptimConfig, flatten, keys
from .spelling import nearest

FILE = "muonlm.toml"
PUBLISHED = {  # name -> keys that it sets
    "learning_rate": ("optim.lr",),
    "weight_decay": ("optim.wd", "muon.adamw_wd"),
    "max_steps": ("train.steps",),
    "warmup_steps": ("sched.warmup",),
    "eval_interval": ("eval.every",),
    "save_interval": ("train.save_every",),
    "logging_steps": ("log.every",),
    "adam_beta1": (),  # half of optim.betas
    "adam_beta2": (),
    "adam_epsilon": ("optim.eps",),
    "max_grad_norm": ("optim.grad_clip",),
    "label_smoothing": (),
    "momentum": ("muon.momentum",),
}
NOT_OF_A_PRESET = {
    "recipe": "name it: muonlm train RECIPE --preset NAME",
    "parent": "it belongs into a recipe",
    "init_from": "give it as a flag: --init-from RUN",
}


def user_presets(folder: str | Path = ".", *, recipe: str = "") -> dict[str, dict]:
    """{name: layer} of FOLDER/muonlm.toml, {} without such a file; its "baseline" holds under AdamW. `recipe` is
    the one that the layer will lie on (its betas complete a pair)."""
    path = Path(folder) / FILE
    try:
        tree = tomllib.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    for section in tree:
        if section != "presets":
            raise UserError(f"{path} has {section!r}, but knows only [presets.NAME].{nearest(section, ['presets'])}")
    tables = tree.get("presets", {})
    for name, table in tables.items() if isinstance(tables, dict) else [("presets", tables)]:
        if not isinstance(table, dict):
            raise UserError(
                f"{path}: {name!r} is no table of settings; write [presets.NAME] and the settings below it."
            )
    return {name: _layer(table, f"{path} [presets.{name}]", recipe) for name, table in tables.items()}


def _layer(table: dict, where: str, recipe: str) -> dict:
    """A preset as the user wrote it -> {dotted key: value}, with a table "baseline" of the same kind."""
    given, layer, said = flatten(table), {}, {}  # said: key -> the name that set it
    own, plain = keys(), {}

    def put(key: str, value, name: str) -> None:
        if key in said:
            raise UserError(f"{where}: {said[key]} and {name} both set {key}; keep one.")
        layer[key], said[key] = value, name

    for name, value in given.items():
        key = name.removeprefix("baseline.")
        if key in NOT_OF_A_PRESET:
            raise UserError(f"{where}: {name} cannot be set by a preset; {NOT_OF_A_PRESET[key]}.")
        if name in PUBLISHED:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise UserError(f"{where}: {name} = {value!r} should be a number.")
            plain[name] = value
        elif key in own:
            put(name, value, name)
        else:
            hint = nearest(name, [*PUBLISHED, *own]) or " `muonlm info --keys` lists all keys."
            raise UserError(f"{where}: unknown key {name!r}.{hint}")

    if plain.get("label_smoothing"):
        raise UserError(
            f"{where}: label_smoothing = {plain['label_smoothing']} would change nothing: next-token training has none."
            " Leave it out; that of preference training is dpo.label_smoothing = …"
        )
    for name, value in plain.items():
        for key in PUBLISHED[name]:
            put(key, value, name)
    if "momentum" in plain:
        put("muon.momentum_warmup", "", "momentum")  # else the recipe's warm-up would decide where it ends
    if "max_grad_norm" in plain:
        put("optim.clip_mode", "clip" if plain["max_grad_norm"] else "off", "max_grad_norm")
        if not plain["max_grad_norm"]:
            layer.pop("optim.grad_clip")
    betas = {i: plain[name] for i, name in enumerate(("adam_beta1", "adam_beta2")) if name in plain}
    if betas:
        put("optim.betas", [betas.get(i, old) for i, old in enumerate(recipe_betas(recipe)[0])], "adam_beta")
    for ways in (LENGTHS, SIZES):  # of saying the length of a run, the size of a step: one replaces the recipe's
        if any(layer.get(key) for key in ways):
            layer = ways | layer

    # A recipe's [baseline] has the last word under AdamW: what this preset says of the optimizer is said there as well.
    # An optim.lr beside Muon is Muon's rate and stays out of it; learning_rate is that of whichever optimizer trains.
    baseline = {
        key: value for key, value in layer.items() if key.startswith(("optim.", "muon.")) and said.get(key) in PUBLISHED
    }
    if given.get("optim.name") == "adamw":
        baseline = {
            key: value for key, value in layer.items() if key.startswith(("optim.", "muon.")) and key != "optim.name"
        }
    if betas:
        baseline["optim.betas"] = [betas.get(i, old) for i, old in enumerate(recipe_betas(recipe)[1])]
    baseline |= {key.removeprefix("baseline."): layer.pop(key) for key in list(layer) if key.startswith("baseline.")}
    return layer | {"baseline": baseline} if baseline else layer


def recipe_betas(recipe: str) -> tuple[list[float], list[float]]:
    """AdamW's betas in a recipe: beside Muon, and under optim.name = adamw."""
    tree = read_recipe(recipe) if recipe else {}
    beside = flatten(tree).get("optim.betas", list(OptimConfig().betas))
    return beside, flatten(tree).get("baseline.optim.betas", beside)


def in_effect(name: str, layer: dict, cfg: Config, *, mine: bool) -> list[str]:
    """Lines for the start of a run: what each setting of a preset came to, and a warning where one acts less than it
    seems to. mine: the preset is of muonlm.toml."""
    layer, tree, muon = flatten(layer), flatten(asdict(cfg)), cfg.optim.name == "muon"
    if mine and not muon and "muon.momentum" in layer:
        raise UserError(
            f"{FILE} [presets.{name}] sets momentum, which AdamW does not have (its own is adam_beta1); leave it out "
            "of the preset, or train with --optim.name muon."
        )
    baseline = {key.removeprefix("baseline."): value for key, value in layer.items() if key.startswith("baseline.")}
    wanted = {key: value for key, value in layer.items() if not key.startswith("baseline.")} | (
        {} if muon else baseline
    )
    shown = []
    for key, value in wanted.items():
        if key in LENGTHS | SIZES and not value or not muon and key == "muon.adamw_wd":
            continue
        now, said = _text(tree[key]), _text(value)
        shown.append(f"{key} {now}" + (f" (the preset says {said})" if now != said and key != "model.pattern" else ""))
    origin = f"{FILE}, {cfg.recipe}" if mine else cfg.recipe
    lines = [f"preset {name} ({origin}; {cfg.optim.name}): {', '.join(shown) or 'the recipe as it stands'}"]
    before, beta = recipe_betas(cfg.recipe)[0][0], cfg.optim.betas[0]
    steady = flatten(read_recipe(cfg.recipe)).get("muon.momentum", MuonConfig().momentum) == cfg.muon.momentum
    if muon and "optim.betas" in layer and beta != before and "muon.momentum" not in layer and steady:
        lines.append(
            f"warning: preset {name} changes adam_beta1 ({before:g} → {beta:g}), which moves only what AdamW "
            f"takes (embeddings, head, norms); the matrices follow Muon's momentum, still {cfg.muon.momentum:g}: set "
            "momentum = …"
        )
    return lines


def _text(value) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value) if value != "" else "off"
