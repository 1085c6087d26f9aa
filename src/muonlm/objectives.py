"""Objectives: `fn(model, batch) -> (loss_sum, count, metrics)`.

`loss_sum` is the differentiable sum over trained tokens (nats), `count` how many there are, `metrics` detached sums over the same
items. The loop divides by the count of the whole global step, so accumulation and data parallelism equal one big batch.
"""

import torch.nn.functional as F
from torch import Tensor


def next_token(model, batch) -> tuple[Tensor, int, dict[str, Tensor]]:
    """Σ −log p(token t+1 | tokens ≤ t)."""
    return model(batch.inputs, batch.targets), batch.count, {}


def classify(model, batch) -> tuple[Tensor, int, dict[str, Tensor]]:
    """Σ −log p(answer | row), one answer a row; `acc` counts rows whose most likely class is the answer."""
    logits = model(batch.inputs)
    loss = F.cross_entropy(logits, batch.targets, reduction="sum")
    return loss, batch.count, {"acc": (logits.detach().argmax(-1) == batch.targets).sum()}


def recall(model, batch) -> tuple[Tensor, int, dict[str, Tensor]]:
    """Σ −log p(value | row so far) over the questions of data/recall.py; `acc` counts those whose most likely token is the value."""
    logits, _ = model(batch.inputs)
    asked = batch.targets >= 0
    logits, targets = logits[asked].float(), batch.targets[asked]
    loss = F.cross_entropy(logits, targets, reduction="sum")
    return loss, batch.count, {"acc": (logits.detach().argmax(-1) == targets).sum()}


OBJECTIVES = {"next_token": next_token, "classify": classify, "recall": recall}
