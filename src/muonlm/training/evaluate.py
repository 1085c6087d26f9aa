"""Held-out loss and what follows from it: means over whole splits, the same on any number of ranks."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from muonlm.config.schema import Config
from muonlm.data.batch import Batch, Dataset, Splits

from . import parallel
from .objectives import OBJECTIVES
from .parallel import Dist


@torch.no_grad()
def evaluate(net: nn.Module, loss: Callable, data: Splits, cfg: Config, dist: Dist) -> dict[str, float]:
    """{"val_loss": …} in nats per unit of the objective, its metrics, and what objective and data make of them
    (val_perplexity, val_bpb …), for each split of `data.evaluated` (or for cfg.eval.iters batches of it)."""
    model = dist.unwrap(net)
    model.eval()
    result = {}
    for name, split in data.evaluated.items():
        rows = rows_of(split, cfg)
        batches = split.sequential(rows, dist.rank, dist.world, limit=cfg.eval.iters * rows)
        sums, count = total_sums(model, loss, batches, dist, cfg.train.dtype)
        means = {key: value / count for key, value in sums.items()}
        means |= OBJECTIVES[cfg.train.objective].extras(means, count)
        result |= {f"{name}_{key}": value for key, value in split.report(means).items()}
    return result


def rows_of(split: Dataset, cfg: Config) -> int:
    """Rows of a batch of an evaluation."""
    return cfg.eval.rows or split.rows_to_evaluate(cfg.model.block_size)


def rows_at_once(data: Splits, cfg: Config) -> int:
    """The most of them, of all splits."""
    return max(rows_of(split, cfg) for split in data.evaluated.values())


def total_sums(
    model: nn.Module, loss: Callable, batches: Iterable[Batch], dist: Dist, dtype: str
) -> tuple[dict[str, float], float]:
    """Sums of the objective ("loss") and its metrics, and their count, over batches and ranks."""
    sums: dict[str, Tensor] = {}
    count = 0
    for batch in batches:
        with parallel.autocast(dist.device, dtype):
            loss_sum, number, metrics = loss(model, batch.to(dist.device))
        count += number
        for name, value in {"loss": loss_sum, **metrics}.items():
            sums[name] = sums.get(name, 0) + value.to("cpu", torch.float64)  # not every device has fp64
    totals = dist.sum(torch.stack([*sums.values(), torch.tensor(count, dtype=torch.float64)])).tolist()
    return dict(zip(sums, totals)), totals[-1]
