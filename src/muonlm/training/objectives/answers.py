"""The likelihood of answers: one a row (grokking), or of the questions in a row (associative recall)."""

import torch.nn.functional as F
from torch import Tensor


def classify(model, batch) -> tuple[Tensor, int, dict[str, Tensor]]:
    """Σ −log p(answer | row), one answer a row; `acc` counts rows whose most likely class is the answer."""
    logits = model(batch.inputs)
    loss = F.cross_entropy(logits, batch.targets, reduction="sum")
    return loss, batch.count, {"acc": (logits.detach().argmax(-1) == batch.targets).sum()}


def recall(model, batch) -> tuple[Tensor, int, dict[str, Tensor]]:
    """Σ −log p(value | row so far) over the questions of data/synthetic/recall.py.

    `acc` counts those whose most likely token is the value.
    """
    logits, _ = model(batch.inputs)
    asked = batch.targets >= 0
    logits, targets = logits[asked].float(), batch.targets[asked]
    loss = F.cross_entropy(logits, targets, reduction="sum")
    return loss, batch.count, {"acc": (logits.detach().argmax(-1) == targets).sum()}
