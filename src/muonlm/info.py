"""What a config means, without training: parameters, FLOPs, memory, routing, derived values; and the help of every key.

Memory   fp32 masters 4 B and gradients 4 B a parameter; Muon state 4 B per parameter it takes, AdamW 8 B. Activations are not counted.
"""

import ast
import dataclasses
import inspect
import json
from pathlib import Path

from . import config
from .config import Config, UserError, load_recipe, nearest, recipe_names


def describe_keys() -> list[dict]:
    """[{key, default, type, help}] of every config key; the help is the string under the field."""
    table = []
    for name, value in vars(Config()).items():
        if dataclasses.is_dataclass(value):
            docs = _field_docs(type(value))
            table += [
                {"key": f"{name}.{leaf}", "default": json.dumps(default), "help": docs[leaf]}
                for leaf, default in vars(value).items()
            ]
        else:
            table.append({"key": name, "default": json.dumps(value), "help": _field_docs(Config)[name]})
    return table


def _field_docs(cls) -> dict[str, str]:
    body = ast.parse(inspect.getsource(cls)).body[0].body
    return {
        field.target.id: doc.value.value
        for field, doc in zip(body, body[1:])
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
    }


def describe_recipes() -> list[dict]:
    """Each packaged recipe with the first line of its header."""
    table = []
    for name in recipe_names():
        first = (config.RECIPES / f"{name}.toml").read_text(encoding="utf-8").splitlines()[0]
        table.append({"recipe": name, "about": first.lstrip("# ").removeprefix(f"{name} · ")})
    return table


def find(what: str, flags: dict, *, preset: str = "", smoke: bool = False) -> Config:
    """The config of a recipe, a .toml file or a run directory."""
    if Path(what).is_dir():
        if flags or preset or smoke:
            raise UserError(f"{what} is a run, whose settings are what they were; name a recipe to try others.")
        from .checkpoint import read_config  # brings torch, which the list of recipes need not wait for

        return read_config(Path(what))
    try:
        return load_recipe(what, flags, preset=preset, smoke=smoke)
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
    if cfg.data.source == "modular":
        return 2 + cfg.data.operations + cfg.data.prime, "end, =, operations and numbers"
    spec = cfg.data.tokenizer
    sizes = {"byte": 257, "char": 65, "gpt2": 50257}
    kind, _, number = spec.partition(":")
    if kind == "bpe" and number.isdigit():
        return int(number), spec
    if kind in sizes:
        return sizes[kind], f"{spec}: tiny Shakespeare's 65 characters are assumed" if kind == "char" else spec
    from .data.tokenizer import resolve_tokenizer

    return resolve_tokenizer(spec).vocab_size, spec


def describe(cfg: Config) -> dict:
    """Facts of a config as one JSON-able dict."""
    from .model import build_model, count_parameters
    from .train import global_rows, make_optimizer, plan_routes, train_flops_per_token

    size, source = vocabulary(cfg)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=size))
    counts = count_parameters(cfg.model)
    facts = {
        "recipe": cfg.recipe,
        "vocab_size": size,
        "vocab_source": source,
        "parameters": counts,
        "train_flops_per_token": train_flops_per_token(cfg),
        "rows_per_step": global_rows(cfg, 1),
    }
    facts["tokens_per_step"] = facts["rows_per_step"] * cfg.model.block_size
    steps = cfg.train.steps or -(
        -(cfg.train.parse_budget()[1] if cfg.train.budget else cfg.train.tokens) // facts["tokens_per_step"]
    )
    facts["steps"] = steps or f"{cfg.train.epochs:g} epochs of the data"
    model = build_model(cfg.model, "meta")
    muon = 0
    if cfg.optim.name == "muon":
        plan = plan_routes(cfg, model)
        muon = sum(d.numel for d in plan.decisions if d.route == "muon")
        facts["routing"] = plan.table(make_optimizer(cfg, plan).param_groups)
    facts["muon_share"] = muon / counts["total"]
    facts["memory_bytes"] = {
        "parameters": 4 * counts["total"],
        "gradients": 4 * counts["total"],
        "optimizer_state": 4 * muon + 8 * (counts["total"] - muon),
    }
    return facts


def as_text(facts: dict) -> str:
    p, memory = facts["parameters"], facts["memory_bytes"]
    lines = [
        f"{facts['recipe']}: {p['total']:,} parameters ({p['tied']:,} tied, {p['untied']:,} untied, {p['blocks']:,} in blocks)",
        f"vocabulary     {facts['vocab_size']:,} ({facts['vocab_source']})",
        f"step           {facts['rows_per_step']:,} rows = {facts['tokens_per_step']:,} tokens; {facts['steps']} steps",
        f"compute        {facts['train_flops_per_token'] / 1e6:,.1f} MFLOP per token, forward and backward",
        f"memory         {sum(memory.values()) / 2**20:,.0f} MiB: "
        + ", ".join(f"{k.replace('_', ' ')} {v / 2**20:,.0f}" for k, v in memory.items())
        + "; activations come on top",
        f"Muon share     {facts['muon_share']:.1%} of the parameters",
    ]
    return "\n".join(lines + ([""] + [facts["routing"]] if "routing" in facts else []))
