"""How a run starts from another one's weights: what is told of it, and what is refused.

Which run that is, and what it hands down, is a layer of the config (config/recipes.py). Resuming is something else:
--resume goes on with a run and everything it had.

Raises   UserError: data prepared with another tokenizer than that of the weights
"""

import contextlib
from pathlib import Path

from muonlm.config.runs import read_config, recipe_of
from muonlm.config.schema import Config
from muonlm.errors import UserError


def describe(cfg: Config, parameters: int) -> str:
    """A line for the start of a run: where weights, model, tokenizer, template come from; empty for a first stage."""
    from muonlm.data.text.templates import template as find_template

    if not cfg.init_from:
        return f"fresh weights: no run of {cfg.parent} is taken" if cfg.parent else ""
    run = Path(cfg.init_from).parent.parent
    template, before = cfg.data.template, read_config(run).data.template
    template = f", template {template}" if template else ""
    with contextlib.suppress(UserError):  # a template file that is gone
        if template and before and find_template(before) != find_template(cfg.data.template):
            template += f" (its own is {before}: --data.template {before} keeps it)"
    return (
        f"starts from {cfg.init_from} (recipe {recipe_of(run) or '?'}): its weights and model ({parameters:,} "
        f"parameters, layers {cfg.model.layers}), tokenizer {cfg.data.tokenizer}{template}"
    )


def check_tokenizer(cfg: Config, tokenizer) -> None:
    """Refuse data whose tokenizer is not that of the weights it will train.

    More special tokens at its end are no other tokenizer, if the weights have rows for them. A resumed run may outlive
    the run that it began from: then there is nothing to compare.
    """
    from muonlm.data.text.tokenizer import Tokenizer

    run = Path(cfg.init_from).parent.parent
    if not cfg.init_from or not (run / "tokenizer.json").is_file():
        return
    before = Tokenizer.load(run)
    if tokenizer is None or not tokenizer.extends(before):
        found = (
            "no tokenizer" if tokenizer is None else f"a {tokenizer.kind} tokenizer of {tokenizer.vocab_size:,} tokens"
        )
        raise UserError(
            f"--data {cfg.data.source} was prepared with {found}, but the weights of {cfg.init_from} were trained with "
            f"a {before.kind} tokenizer of {before.vocab_size:,}; give the text itself, or prepare it with "
            f"--tokenizer {run / 'tokenizer.json'}"
        )
    rows = read_config(run).model.vocab_size
    if tokenizer.vocab_size > rows:
        more = ",".join(sorted(tokenizer.special.keys() - before.special.keys(), key=tokenizer.special.get))
        raise UserError(
            f"the weights of {cfg.init_from} have {rows:,} rows of vocabulary; with the special tokens {more} there "
            f"are {tokenizer.vocab_size:,} tokens. Leave these out (--data.special ''): a template then writes them as "
            f"text, and ends a reply in the end-of-text token; or pretrain with them: --data.special '{more}'"
        )
