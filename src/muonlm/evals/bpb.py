"""Held-out loss of a run, in nats per token and bits per byte, beside a byte trigram's (trigram.py).

bits per byte = Σ nats over all predicted tokens / (ln 2 · UTF-8 bytes of the text)
"""

from dataclasses import dataclass

from muonlm.errors import UserError

from .stats import wilson
from .subject import Subject


@dataclass(frozen=True, kw_only=True)
class Options:
    data: str = ""
    """evaluate on the held-out part of this text, with the run's tokenizer, instead of the run's own"""


def measure(subject: Subject, options: Options, *, limit: int) -> dict:
    """Loss of a checkpoint on a held-out split, of at most `limit` batches (0: all)."""
    from muonlm.training import checkpoint
    from muonlm.training.evaluate import evaluate
    from muonlm.training.objectives import OBJECTIVES
    from muonlm.training.parallel import start
    from muonlm.training.resolve import open_data

    from .trigram import trigram_reference

    data = options.data
    folder, cfg = subject.folder, subject.config
    cfg.eval.iters = limit
    if data:
        cfg.data.source, cfg.data.tokenizer = data, str(subject.need_tokenizer())
        cfg.dpo.reference = "model"  # the sums that a run keeps are of its own pairs
    with start(subject.device) as dist:
        splits = open_data(cfg, dist)
        if not data and subject.meta["data"] != splits.fingerprint:  # its held-out part may have been trained on
            raise UserError(
                f"run {folder} was trained on other data: {cfg.data.source!r} changed since. Put the old data back, or "
                f"name what is to be measured: `data` {cfg.data.source}"
            )
        model, _ = checkpoint.load(subject.checkpoint, dist.device)
        objective = OBJECTIVES[cfg.train.objective]
        loss = objective.start(cfg, model, splits, folder, started=True, dist=dist, log=lambda line: None)
        result = evaluate(model, loss, splits, cfg, dist)
    return result | trigram_reference(splits)


def lines(result: dict) -> list[str]:
    numbers = "  ".join(f"{key} {value:.4f}" for key, value in result.items() if isinstance(value, float))
    shown = [f"{result['run']} ({result['checkpoint']}): {numbers}"]
    return shown + ([f"  {preferences(result)}"] if "val_pairs" in result else [])


def preferences(result: dict) -> str:
    """A line on the held-out pairs of a DPO run. Ties count half, in the interval too."""
    share, pairs = result["val_acc"], result["val_pairs"]
    low, high = wilson(share * pairs, pairs)
    return (
        f"held-out preferences: {share:.1%} of {pairs:,} pairs as preferred, 95 % interval [{low:.1%}, {high:.1%}]; "
        "a coin: 50 %"
    )
