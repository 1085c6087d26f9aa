"""Stages: pretraining, SFT and DPO are runs of one loop; this is what a run takes from the one it starts from.

    --init-from RUN     weights of RUN's best checkpoint (or of the checkpoint directory named), step 0, a new schedule, a new run;
                        model, tokenizer and, unless the recipe names one, conversation template are RUN's too. Flags still win.
    init_from = "RUN"   in a recipe: the same; a relative path begins where the command is given
    parent = "RECIPE"   in a recipe: without either, the newest finished run of that recipe beside --out, else under runs/
    --init-from none    fresh weights in spite of both; with --smoke that is also what follows from finding no parent's run

Resuming is something else: --resume goes on with a run and everything it had (loop.py, checkpoint.py).

Raises   UserError: no run of the parent, or a run that cannot be read; data prepared with another tokenizer than the weights.
"""

import contextlib
import json
from pathlib import Path

from muonlm.config import recipes as config
from muonlm.config.recipes import read_recipe
from muonlm.config.schema import Config, flatten
from muonlm.errors import UserError

NONE = "none"


def load_recipe(
    name: str = "quickstart",
    flags: dict | None = None,
    *,
    preset: str = "",
    smoke: bool = False,
    out: str | Path | None = None,
    presets: dict | None = None,
) -> Config:
    """config.load_recipe, with what the run named by --init-from, or found for the recipe's parent, hands down."""
    flags = {key.replace("-", "_"): value for key, value in (flags or {}).items()}
    if flags.get("data.source"):  # a configuration that the recipe names is one of the recipe's own data set
        flags.setdefault("data.name", "")
    recipe = read_recipe(name)
    source, parent = flags.pop("init_from", recipe.get("init_from", "")), flags.get("parent", recipe.get("parent", ""))
    if not source and parent:
        found = newest_run(parent, out, shrunk=smoke)
        if found is None and not smoke:
            raise UserError(
                f"recipe {name} starts from a run of {parent}, and no finished one lies under runs/"
                + (f" or beside {out}" if out else "")
                + f". Make it: muonlm train {parent}; or name a run: --init-from RUN; or start from fresh weights: --init-from {NONE}"
            )
        source = str(found) if found else ""
    if not source or source == NONE:
        return config.load_recipe(name, flags | {"init_from": ""}, preset=preset, smoke=smoke, presets=presets)
    return config.load_recipe(name, flags, preset=preset, smoke=smoke, presets=presets, inherited=inherited(source))


def newest_run(recipe: str, out: str | Path | None = None, *, shrunk: bool = False) -> Path | None:
    """The run of `recipe` that finished last, of those beside `out`; where none is, of those under runs/. `shrunk`: a run
    made by --smoke will do."""
    beside = Path(out).resolve().parent.glob("*/report.json") if out else ()
    under = (path for depth in ("*", "*/*", "*/*/*") for path in Path("runs").resolve().glob(f"{depth}/report.json"))
    for place in (beside, under):
        if runs := [path for path in place if _recipe_of(path.parent, shrunk) == recipe]:
            return max(runs, key=lambda path: path.stat().st_mtime_ns).parent
    return None


def _recipe_of(run: Path, shrunk: bool = True) -> str:
    """The recipe of a run; empty if it cannot be read, or was made by --smoke where that will not do."""
    try:
        config = json.loads((run / "config.json").read_text("utf-8"))
        return config["recipe"] if shrunk or not config.get("shrunk") else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def inherited(source: str) -> dict:
    """Flat keys that a run or checkpoint hands down, `init_from` (its checkpoint) among them."""
    from .checkpoint import locate, read_config

    run, path = locate(source)
    stored = read_config(run)
    tokenizer = run / "tokenizer.json"
    if not tokenizer.is_file():
        raise UserError(f"run {run} has no tokenizer.json, so no text can be trained on from it; name another run.")
    keys = {f"model.{key}": value for key, value in flatten(stored.to_dict()["model"]).items()}
    return keys | {
        "init_from": str(path.resolve()),
        "data.tokenizer": str(tokenizer.resolve()),
        "data.template": stored.data.template,
        "data.special": "",  # the weights have no rows for more tokens; a template's stop falls back to EOT
    }


def describe(cfg: Config, parameters: int) -> str:
    """One line for the start of a run: where its weights, model, tokenizer and template come from. Empty for a first stage."""
    from muonlm.data.text.templates import template as find_template

    from .checkpoint import read_config

    if not cfg.init_from:
        return f"fresh weights: no run of {cfg.parent} is taken" if cfg.parent else ""
    run = Path(cfg.init_from).parent.parent
    template, before = cfg.data.template, read_config(run).data.template
    template = f", template {template}" if template else ""
    with contextlib.suppress(UserError):  # a template file that is gone
        if template and before and find_template(before) != find_template(cfg.data.template):
            template += f" (its own is {before}: --data.template {before} keeps it)"
    return (
        f"starts from {cfg.init_from} (recipe {_recipe_of(run) or '?'}): its weights and model ({parameters:,} parameters, "
        f"layers {cfg.model.layers}), tokenizer {cfg.data.tokenizer}{template}"
    )


def check_tokenizer(cfg: Config, tokenizer) -> None:
    """Refuse data whose tokenizer is not that of the weights it will train. More special tokens at its end are no other
    tokenizer, if the weights have rows for them. A resumed run may outlive the run that it began from: nothing to compare."""
    from muonlm.data.text.tokenizer import Tokenizer

    from .checkpoint import read_config

    run = Path(cfg.init_from).parent.parent
    if not cfg.init_from or not (run / "tokenizer.json").is_file():
        return
    before = Tokenizer.load(run)
    if tokenizer is None or not tokenizer.extends(before):
        found = (
            "no tokenizer" if tokenizer is None else f"a {tokenizer.kind} tokenizer of {tokenizer.vocab_size:,} tokens"
        )
        raise UserError(
            f"--data {cfg.data.source} was prepared with {found}, but the weights of {cfg.init_from} were trained with a "
            f"{before.kind} tokenizer of {before.vocab_size:,}; give the text itself, or prepare it with "
            f"--tokenizer {run / 'tokenizer.json'}"
        )
    rows = read_config(run).model.vocab_size
    if tokenizer.vocab_size > rows:
        more = ",".join(sorted(tokenizer.special.keys() - before.special.keys(), key=tokenizer.special.get))
        raise UserError(
            f"the weights of {cfg.init_from} have {rows:,} rows of vocabulary; with the special tokens {more} there are "
            f"{tokenizer.vocab_size:,} tokens. Leave these out (--data.special ''): a template then writes them as text, and "
            f"ends a reply in the end-of-text token; or pretrain with them: --data.special '{more}'"
        )
